"""Pages for users: vmctl accepts each command in them, and vmd each configuration."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from tests.tutorial import ROOT, Typed, Where, steps
from vmctl.line.cli import read
from vmd.config.check import check

PAGES = ("README.md", "docs/tutorial.md", "docs/ci.md")
_BLOCKS = re.compile(r"^```(?:console|sh)?\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_LINE = re.compile(r"^(?:\$ )?vmctl ([^#|<>&;\n]*)", re.MULTILINE)


def _commands(page: str) -> list[list[str]]:
    """Return the command lines of vmctl in the blocks of a page."""
    blocks = (block.replace("\\\n", " ") for block in _BLOCKS.findall(page))
    lines = (line for block in blocks for line in _LINE.findall(block))
    return [shlex.split(line) for line in lines if "..." not in line]


@pytest.mark.parametrize("page", PAGES)
def test_commands_are_right(page: str) -> None:
    """Each command is accepted as printed."""
    commands = _commands((ROOT / page).read_text())
    assert len(commands) >= 3
    for words in commands:
        read(words)


def test_steps_of_the_tutorial(tmp_path: Path) -> None:
    """Commands, logins and a console's escape are recognised; vmd accepts the configuration."""
    found = list(steps((ROOT / "docs" / "tutorial.md").read_text()))
    assert found[0] == Typed(Where.SHELL, "vmctl doctor")
    assert {one.where for one in found} == set(Where)
    (text,) = (one.text for one in found if one.text.startswith("cat > vm.conf"))
    disk = tmp_path / "first.qcow2"
    disk.write_bytes(bytes(512))
    config = tmp_path / "vm.conf"
    lines = text.replace("$PWD", str(tmp_path)).split("\n")[1:-1]
    config.write_text("\n".join(lines) + "\n")
    assert check(str(config), {})[1] == 0
