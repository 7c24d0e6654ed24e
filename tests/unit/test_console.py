"""cu's escapes, in typed input."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmctl.screen.console import Escape, EscapeParser


@pytest.mark.parametrize(
    ("typed", "parts"),
    [
        (b"ls\r", [b"ls\r"]),
        (b"~.", [Escape.POWER_OFF]),
        (b"ls\r~.", [b"ls\r", Escape.POWER_OFF]),
        (b"a~.", [b"a~."]),
        (b"~~.", [b"~."]),
        (b"\n~#x", [b"\n", Escape.BREAK, b"x"]),
        (b"~#~.", [Escape.BREAK, Escape.POWER_OFF]),
        (b"~\x1a", [Escape.SUSPEND]),
        (b"~?", [Escape.HELP]),
        (b"~x\r~.", [b"~x\r", Escape.POWER_OFF]),
        (b"~", []),
    ],
)
def test_escapes(typed: bytes, parts: list[bytes | Escape]) -> None:
    """A tilde counts at the start of a line only; doubled, it is one tilde."""
    assert parts == list(EscapeParser().feed(typed))


@given(st.lists(st.binary(max_size=8)))
def test_chunks_do_not_matter(chunks: list[bytes]) -> None:
    """Escapes are found however the reads split the input."""
    whole = _joined(list(EscapeParser().feed(b"".join(chunks))))
    parser = EscapeParser()
    assert whole == _joined([part for chunk in chunks for part in parser.feed(chunk)])


def _joined(parts: list[bytes | Escape]) -> list[bytes | Escape]:
    joined: list[bytes | Escape] = []
    for part in parts:
        if joined and isinstance(part, bytes) and isinstance(joined[-1], bytes):
            joined[-1] += part
        else:
            joined.append(part)
    return joined
