"""Read a fuzzer's bytes as numbers, choices and pieces for a target.

An input has no end: after its last byte follow zeros, so that each prefix of an input is one too.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

Item = TypeVar("Item")


class Input:
    """An input, read from its beginning."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    @property
    def is_over(self) -> bool:
        """Whether nothing but zeros follows."""
        return self._at >= len(self._data)

    def piece(self, size: int) -> bytes:
        """Return the next `size` bytes, or as many as there are."""
        piece = self._data[self._at : self._at + size]
        self._at += size
        return piece

    def rest(self) -> bytes:
        """Return the remaining bytes."""
        return self.piece(len(self._data))

    def number(self, size: int) -> int:
        """Return the next `size` bytes as a number, little-endian."""
        return int.from_bytes(self.piece(size), "little")

    def choice(self, items: Sequence[Item]) -> Item:
        """Return one of at most 256 items."""
        return items[self.number(1) % len(items)]


def check_line(text: str) -> None:
    """Check that an error's text is one line; control characters are escaped where it is shown."""
    assert len(text.splitlines()) == 1, f"not a line: {text!r}"
