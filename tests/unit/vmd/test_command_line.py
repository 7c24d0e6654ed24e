"""The command line of vmd, as far as it answers at once."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]


def vmd(*arguments: str) -> tuple[int, str, str]:
    """Run vmd; returns status, output and errors."""
    done = subprocess.run(
        [sys.executable, "-m", "vmd", *arguments],
        check=False,
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    return done.returncode, done.stdout, done.stderr


def test_version() -> None:
    """The version is that of pyproject.toml."""
    wanted = re.search(r'^version = "(.*)"', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert wanted
    assert vmd("--version") == (0, f"vmd {wanted[1]}\n", "")


def test_misuse() -> None:
    """A wrong command line is answered by the usage."""
    for arguments in (["--frobnicate"], ["operand"], ["-f"]):
        status, output, errors = vmd(*arguments)
        assert (status, output, errors.startswith("usage: vmd [-dnv]")) == (1, "", True)


def test_what_is_shown_is_one_line() -> None:
    """Names in errors cannot move the cursor, nor break the line."""
    odd, shown = "a\x1b[31m\nb", "a\\x1b[31m\\x0ab"
    status, _, errors = vmd("-n", "-D", odd, "-f", f"/{odd}")
    first, second, *rest = errors.splitlines()
    assert first == f"vmd: could not parse macro definition {shown}"
    assert second == f"vmd: failed to open /{shown}: No such file or directory"
    assert (status, [line for line in rest if shown in line]) == (1, [])
    status, _, errors = vmd("-d", "--user", "-f", "/dev/null", "--socket", f"/nowhere/{odd}")
    assert status == 1
    assert errors.splitlines()[-1].startswith(f"vmd: /nowhere/{shown}: ")
