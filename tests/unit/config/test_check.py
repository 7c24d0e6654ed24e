"""`vmd -n`, and the campaign of mutated files."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests.unit.config.fake_host import FakeHost
from vmd.config.check import check, parse_macro

SEED = os.environ.get("VMM_FUZZ_SEED", "1")
COUNT = os.environ.get("VMM_FUZZ_COUNT", "300")


def test_a_file_that_is_right() -> None:
    """`vmd -n` says that a right file is right."""
    assert check("f", {}, host=FakeHost({"f": b"vm x { disable }"})) == (["configuration OK"], 0)


def test_a_file_that_is_wrong() -> None:
    """Lines about errors start with the daemon's name; those about macros do not."""
    host = FakeHost({"f": b'a = b\nvm x { disk "none" }'})
    assert check("f", {}, host=host) == (
        [
            "vmd: disk none: No such file or directory",
            "vmd: f:2: failed to parse disks: none",
            "warning: macro 'a' not used",
        ],
        1,
    )


def test_a_missing_file() -> None:
    """The default file may be absent; one that the user named may not."""
    line = "vmd: failed to open none: No such file or directory"
    assert check("none", {}, host=FakeHost({})) == ([line], 1)
    optional = check("none", {}, is_optional=True, host=FakeHost({}))
    assert optional == (["configuration OK"], 0)


def test_macros_of_the_command_line() -> None:
    """Macros of the command line override the file's, and need not be used."""
    host = FakeHost({"f": b"m = wrong\nvm $m { disable }"})
    lines, _ = check("f", {"m": "right", "unused": "x"}, is_verbose=True, host=host)
    assert lines == ['vm "right" {', "\tdisable", "}", "configuration OK"]


def test_what_was_read_can_be_shown() -> None:
    """No control character reaches a terminal, not even in a name."""
    host = FakeHost({"f": b'vm "\x1b[2J\\\\\n" { disable }'})
    lines, status = check("f", {}, is_verbose=True, host=host)
    assert (lines, status) == (
        ['vm "\\x1b[2J\\\\', '" {', "\tdisable", "}", "configuration OK"],
        0,
    )


@pytest.mark.parametrize(
    ("text", "macro"),
    [
        ("a=b", ("a", "b")),
        ("a=b=c", ("a=b", "c")),
        ("a=", ("a", "")),
        ("=b", ("", "b")),
        ("a", None),
        ("", None),
    ],
)
def test_definitions_of_macros(text: str, macro: tuple[str, str] | None) -> None:
    """Definitions are divided at the last equals sign."""
    assert parse_macro(text) == macro


def test_mutated_files() -> None:
    """Each mutated file is reported in lines, or accepted and read again equally."""
    done = subprocess.run(
        [
            *(sys.executable, "tests/campaigns/mutate_configs.py"),
            *("--count", COUNT, "--seed", SEED),
        ],
        check=False,
        capture_output=True,
        text=True,
    )
    assert (done.stdout + done.stderr).endswith(" 0 deviations\n")
    assert done.returncode == 0
