"""The core of the guest tests: its tests exist, and no file is left out."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.guest.core import CORE, WITHOUT

ROOT = Path(__file__).resolve().parents[2]


def _collected(selection: str) -> set[str]:
    """Return the places below tests/guest of the tests that a marker expression selects."""
    done = subprocess.run(
        [
            *(sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider"),
            *("-m", selection, "tests/guest"),
        ],
        check=True,
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    prefix = "tests/guest/"
    lines = done.stdout.splitlines()
    return {line.removeprefix(prefix) for line in lines if line.startswith(prefix)}


@pytest.mark.timeout(300)
def test_the_core_is_what_the_marker_selects() -> None:
    """Each name in the table is a guest test, marked `core`, and no other test is."""
    assert set(CORE) == _collected("guest and core")


def test_each_file_has_a_share() -> None:
    """No file of guest tests is left out of the core without a reason."""
    files = {path.name for path in (ROOT / "tests" / "guest").glob("test_*.py")}
    assert files - WITHOUT.keys() == {name.partition("::")[0] for name in CORE}
    assert WITHOUT.keys() <= files
