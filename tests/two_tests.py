"""A Debian source package with two tests, and their results by autopkgtest."""

from __future__ import annotations

from pathlib import Path

CONTROL = """Tests: first
Depends:
Restrictions: needs-root, breaks-testbed

Tests: second
Depends:
Restrictions: needs-root
"""
TEST = """#!/bin/sh
set -e
test ! -e /root/mark
test "$(cat text)" = right
test "$(dpkg --print-architecture)" = amd64
echo mark > /root/mark
echo "$1 {name}: $(hostname)" > "$AUTOPKGTEST_ARTIFACTS/{name}"
echo "this is {name}"
"""


def source_package(folder: Path) -> Path:
    """Write a source package with two tests, of which the first breaks its testbed."""
    tests = folder / "debian" / "tests"
    tests.mkdir(parents=True)
    (folder / "text").write_text("right\n")
    (tests / "control").write_text(CONTROL)
    for name in ("first", "second"):
        (tests / name).write_text(TEST.format(name=name))
        (tests / name).chmod(0o755)
    (folder / "debian" / "control").write_text(
        "Source: two-tests\nMaintainer: Nobody <nobody@invalid>\n\n"
        "Package: two-tests\nArchitecture: all\nDescription: nothing\n"
    )
    (folder / "debian" / "changelog").write_text(
        "two-tests (1) unstable; urgency=low\n\n  * Begin.\n\n"
        " -- Nobody <nobody@invalid>  Thu, 01 Jan 2026 00:00:00 +0000\n"
    )
    return folder


def check_results(result: Path) -> None:
    """Fail unless both tests have passed, and each has left its file."""
    summary = [line.split() for line in (result / "summary").read_text().splitlines()]
    assert summary == [["first", "PASS"], ["second", "PASS"]]
    left = sorted(path.name for path in (result / "artifacts").iterdir())
    assert left == ["first", "second"]
