"""Tables for people, on a terminal: aligned, in colour, and never cropped.

A line that is longer than the terminal is wide runs over, as OpenBSD's lines do: a name or an id
that is cut without a sign is taken for another.
"""

import os
import sys
from collections.abc import Sequence
from typing import NamedTuple

from vmm_kvm.text import printable

_RIGHT = {"ID", "PID", "VCPUS", "MAXMEM", "CURMEM", "CPU", "READ/S", "WRITE/S", "IN/S", "OUT/S"}
_COLOURS = {
    "running": "32",
    "paused": "33",
    "waiting": "36",
    "stopping": "35",
    "stopped": "2",
    "ok": "32",
    "limited": "33",
    "missing": "31",
}
_STATES = {"STATE", "STATUS"}
_BOLD = "1"


def width(text: str) -> int:
    """Return how many columns of a terminal `text` takes, which is printable."""
    if text.isascii():
        return len(text)
    from unicodedata import combining, east_asian_width  # noqa: PLC0415 - hardly ever needed

    return sum(0 if combining(one) else 2 if east_asian_width(one) in "WF" else 1 for one in text)


def styled(text: str, style: str) -> str:
    """Return `text` in a style of the terminal's, by its number, unless none are wanted."""
    if not style or os.environ.get("NO_COLOR") or os.environ.get("TERM", "dumb") == "dumb":
        return text
    return f"\x1b[{style}m{text}\x1b[0m"


class Line(NamedTuple):
    """A line of a table."""

    shown: str
    """With its styles."""
    width: int
    """How many columns it takes."""


def table_lines(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[Line]:
    """Return the lines of a table; the word that is a state has its colour."""
    cells = [[printable(cell) for cell in row] for row in rows]
    widths = [max(map(width, column)) for column in zip(header, *cells, strict=True)]
    return [
        _line(header, widths, header, _BOLD),
        *(_line(header, widths, row, "") for row in cells),
    ]


def _line(header: Sequence[str], widths: Sequence[int], row: Sequence[str], style: str) -> Line:
    plain, shown = [], []
    for name, size, cell in zip(header, widths, row, strict=True):
        space = " " * (size - width(cell))
        colour = style or (_COLOURS.get(cell.partition(" ")[0], "") if name in _STATES else "")
        pair = (space, cell) if name in _RIGHT else (cell, space)
        plain.append("".join(pair))
        shown.append("".join(styled(part, colour) if part is cell else part for part in pair))
    end = len(plain[-1]) - len(plain[-1].rstrip(" "))
    text = " ".join(shown)
    return Line(text[: len(text) - end], width(" ".join(plain)) - end)


def show_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table on the terminal."""
    print("\n".join(line.shown for line in table_lines(header, rows)))


def show_facts(facts: Sequence[tuple[str, str]]) -> None:
    """Print names and values, a line each, on the terminal."""
    size = max((width(name) for name, _ in facts), default=0) + 1
    for name, text in facts:
        print(f"{styled(name, _BOLD)}{' ' * (size - width(name))}{printable(text)}".rstrip())


class Screen:
    """A table that is drawn again and again in its place."""

    def __init__(self) -> None:
        """Begin at the cursor."""
        self._drawn: list[int] = []

    def show(self, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """Draw a table instead of the last one; rows that the terminal has no room for are counted.

        What was drawn is found again by the width of its lines, as the terminal is now.
        """
        columns, height = os.get_terminal_size(sys.stdout.fileno())
        lines = _fitting(table_lines(header, rows), columns or 80, (height or 24) - 1)
        up = sum(_rows(size, columns or 80) for size in self._drawn)
        back = f"\x1b[{up}A\r\x1b[J" if up else ""
        print(back + "\n".join(line.shown for line in lines), flush=True)
        self._drawn = [line.width for line in lines]


def _fitting(lines: list[Line], columns: int, room: int) -> list[Line]:
    """Return as many of `lines` as `room` lines of the terminal hold, and how many are left out."""
    used = 0
    for index, line in enumerate(lines):
        used += _rows(line.width, columns)
        if used > room:
            kept = lines[: max(index - 1, 1)]
            text = f"and {len(lines) - len(kept)} more"
            return [*kept, Line(text, len(text))]
    return lines


def _rows(size: int, columns: int) -> int:
    """Return how many lines of the terminal a line takes that is `size` columns wide."""
    return max(1, -(-size // columns))
