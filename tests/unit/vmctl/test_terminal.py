"""Guests' changes to a terminal, and their undoing."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmctl.screen.terminal import TerminalState

SEABIOS = b"\x1bc\x1b[?7l\x1b[2J\x1b[0mSeaBIOS (version 1.16.3)\n"
PLAIN = b"\x1b[0m"


def restored(*pieces: bytes) -> bytes:
    """Return the sequences that restore the terminal after these pieces of output."""
    state = TerminalState()
    for piece in pieces:
        state.note(piece)
    return state.restore()


@pytest.mark.parametrize(
    ("output", "undone"),
    [
        (b"", b""),
        (b"hello\r\n", PLAIN),
        (SEABIOS, b"\x1b[?7h" + PLAIN),
        (b"\x1b[?25l\n", b"\x1b[?25h" + PLAIN),
        (b"\x1b[?25l\x1b[?25h\n", PLAIN),
        (b"\x1b[31mred\n", PLAIN),
        (b"\x1b[?1049h\x1b[?1h\x1b=vi\n", b"\x1b[?1049l\x1b[?1l\x1b>" + PLAIN),
        (b"\x1b[?1049h\x1b[?1049l\n", PLAIN),
        (b"\x1b[?47;1000;1006h\n", b"\x1b[?47l\x1b[?1000l\x1b[?1006l" + PLAIN),
        (b"\x1b[?2004h\n", b"\x1b[?2004l" + PLAIN),
        (b"\x1b[5;10r\n", b"\x1b7\x1b[r\x1b8" + PLAIN),
        (b"\x1b[5;10r\x1b[r\n", PLAIN),
        (b"\x1b[4hx\n", b"\x1b[4l" + PLAIN),
        (b"\x1b[3 q\n", b"\x1b[0 q" + PLAIN),
        (b"\x1b(0lqk\n", b"\x1b(B" + PLAIN),
        (b"\x1b(0lqk\x1b(B\n", PLAIN),
        (b"\x0elqk\n", b"\x0f" + PLAIN),
        (b"\x1b[?7l\x1bc\n", PLAIN),
        (b"\x1b[?9999h\x1b[?12l\n", PLAIN),
        (b"login: ", PLAIN + b"\r\n"),
        (b"# \x1b[6n", PLAIN + b"\r\n"),
        (b"done\n\x1b[0m\x1b[?25h", PLAIN),
        (b"50%\r", PLAIN + b"\r\n"),
    ],
)
def test_what_was_changed_is_undone(output: bytes, undone: bytes) -> None:
    """Only changes are undone, however the output is cut; an open line is ended."""
    assert restored(output) == undone
    for at in range(len(output)):
        assert restored(output[:at], output[at:]) == undone
    assert restored(*(bytes([value]) for value in output)) == undone


@given(st.lists(st.binary(max_size=40)))
def test_any_output_is_taken(pieces: list[bytes]) -> None:
    """Any output is accepted, and only known sequences undo it."""
    text = restored(*pieces)
    assert bool(text) == any(pieces)
    assert len(text) < 400


def test_long_output_costs_no_memory() -> None:
    """A sequence without end is forgotten."""
    state = TerminalState()
    for _ in range(1000):
        state.note(b"\x1b[?" + b"1;" * 1000)
    state.note(b"7l\n")
    assert len(state._tail) <= 2 * 64
    assert state.restore() == PLAIN
