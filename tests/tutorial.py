"""A page of docs/ as a script: the lines that a reader types, and the program that reads them.

Only blocks in the language `console` count. In these, a line is

    $ command       typed into the reader's shell, with the lines up to END if it has `<<END`
    # command       typed into root's shell in the guest
    NAME login: user    typed at the guest's prompt
    ~.              leaves a console

and any other line is output.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from enum import Enum
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
_BLOCK = re.compile(r"^```console\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_LOGIN = re.compile(r"\w+ login: (\w+)")


class Where(Enum):
    """The program that reads the typed lines."""

    SHELL = "the reader's shell"
    GUEST = "root's shell in the guest"
    LOGIN = "a guest's prompt to log in"
    CONSOLE = "a console, at any time"


class Typed(NamedTuple):
    """A command or answer that a reader types."""

    where: Where
    text: str


def steps(page: str) -> Iterator[Typed]:
    """Yield the steps of a page's text, in order."""
    for block in _BLOCK.findall(page):
        lines = iter(block.splitlines())
        for line in lines:
            login = _LOGIN.fullmatch(line)
            if login:
                yield Typed(Where.LOGIN, login[1])
            elif line == "~.":
                yield Typed(Where.CONSOLE, line)
            elif line.startswith("# "):
                yield Typed(Where.GUEST, line[2:])
            elif line.startswith("$ "):
                yield Typed(Where.SHELL, "\n".join(_whole(line[2:], lines)))


def _whole(command: str, lines: Iterator[str]) -> Iterator[str]:
    """Yield a command, and its lines up to the END of its here-document."""
    yield command
    end = re.search(r"<<'?(\w+)", command)
    if end:
        for line in lines:
            yield line
            if line == end[1]:
                return
