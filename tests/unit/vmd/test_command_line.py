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
    """What cannot be understood is answered by the usage."""
    for arguments in (["--frobnicate"], ["operand"], ["-f"]):
        status, output, errors = vmd(*arguments)
        assert (status, output, errors.startswith("usage: vmd [-dnv]")) == (1, "", True)
