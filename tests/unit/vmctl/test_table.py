"""Tables on a terminal: alignment, colours, and drawing one over the other."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import termios

import pytest

from vmctl.screen.table import _fitting, _rows, table_lines, width
from vmm_kvm.text import printable

HEADER = ("ID", "PID", "STATE", "NAME")
STYLE = re.compile(r"\x1b\[[0-9;]*m")


@pytest.mark.parametrize(
    ("text", "shown", "columns"),
    [
        ("web", "web", 3),
        ("日本", "日本", 4),
        ("e\u0301", "e\u0301", 1),
        ("\uff21\uff22", "\uff21\uff22", 4),
        ("\udcff\x1b[2J", "\\xff\\x1b[2J", 11),
        ("a\nb\tc", "a\\x0ab\\x09c", 11),
        ("\u202egnp.exe", "\\u202egnp.exe", 13),
        ("", "", 0),
    ],
)
def test_width(text: str, shown: str, columns: int) -> None:
    """East Asian characters take two columns; characters that move the cursor are escaped."""
    assert printable(text) == shown
    assert width(shown) == columns


def test_columns_are_aligned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Numbers end, and words start, in the same column of every line; nothing is cut."""
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    rows = [("1", "15395", "running", "日本"), ("12", "7", "stopped", "x" * 300)]
    lines = table_lines(HEADER, rows)
    assert [STYLE.sub("", line.shown) for line in lines] == [
        "ID   PID STATE   NAME",
        " 1 15395 running 日本",
        f"12     7 stopped {'x' * 300}",
    ]
    assert [line.width for line in lines] == [21, 21, 317]
    assert lines[1].shown.count("\x1b[32mrunning\x1b[0m") == 1


def test_a_name_that_is_a_state_has_no_colour(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the column of states has colours."""
    monkeypatch.setenv("TERM", "xterm")
    line = table_lines(HEADER, [("1", "2", "paused", "running")])[1]
    assert "\x1b[33mpaused" in line.shown
    assert "32m" not in line.shown


@pytest.mark.parametrize(("name", "value"), [("NO_COLOR", "1"), ("TERM", "dumb")])
def test_no_colours(name: str, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Terminals without colours, and users who switch them off, get none."""
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv(name, value)
    assert "\x1b" not in table_lines(HEADER, [("1", "2", "paused", "x")])[1].shown


def test_lines_that_fit() -> None:
    """Lines that do not fit are counted; long lines take several of the terminal's."""
    rows = [(str(number), "7", "running", "x" * 100) for number in range(10)]
    lines = table_lines(HEADER, rows)
    assert _fitting(lines, 80, 100) == lines
    fitting = _fitting(lines, 80, 10)
    assert sum(_rows(line.width, 80) for line in fitting) <= 10
    assert fitting[-1].shown == f"and {len(lines) - len(fitting) + 1} more"
    assert [_rows(size, 80) for size in (0, 1, 80, 81, 160, 161)] == [1, 1, 1, 2, 2, 3]


def test_a_table_is_drawn_over_the_last() -> None:
    """The cursor goes back as many lines as the last table took on the terminal."""
    program = (
        "from vmctl.screen.table import Screen\n"
        "screen = Screen()\n"
        "for name in ('x' * 25, 'y'):\n"
        "    screen.show(('ID', 'NAME'), [('1', name)])"
    )
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 20, 0, 0))
    subprocess.run([sys.executable, "-c", program], stdout=slave, check=True)
    os.close(slave)
    shown = b""
    while not shown.endswith(b"y\r\n"):
        shown += os.read(master, 1000)
    os.close(master)
    # A header of one line and a row of two.
    assert b"\x1b[3A\r\x1b[J" in shown
    assert shown.count(b"\x1b[3A") == 1
