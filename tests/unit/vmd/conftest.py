"""Shared by tests of the daemon's processes."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

# Prints its arguments, and lives as long as its stream, or ends at once.
_PASST = """\
#!{python}
import os, sys
fd = int(sys.argv[sys.argv.index("--fd") + 1])
os.write(fd, " ".join(sys.argv[1:]).encode())
sys.stderr.write(os.environ.get("PASST_SAYS", ""))
if "PASST_ENDS" in os.environ:
    sys.exit(1)
while os.read(fd, 4096):
    pass
"""


@pytest.fixture
def fake_passt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Put a passt first in PATH that moves no frames."""
    directory = tmp_path / "bin"
    directory.mkdir()
    program = directory / "passt"
    program.write_text(_PASST.format(python=sys.executable))
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{directory}:{os.environ['PATH']}")
