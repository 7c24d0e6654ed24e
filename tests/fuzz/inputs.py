"""From the bytes of a fuzzer to what a target is fed with: numbers, choices, pieces.

Without an end: behind the last byte everything is zero, so that each prefix of an input is one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

Item = TypeVar("Item")


class Input:
    """An input that is read from its beginning."""

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
        """Return all that is left."""
        return self.piece(len(self._data))

    def number(self, size: int) -> int:
        """Return the next `size` bytes as a number, little-endian."""
        return int.from_bytes(self.piece(size), "little")

    def choice(self, items: Sequence[Item]) -> Item:
        """Return one of at most 256 items."""
        return items[self.number(1) % len(items)]


def check_line(text: str) -> None:
    """Hold an error's text to one line; what a terminal obeys is escaped where it is shown."""
    assert len(text.splitlines()) == 1, f"not a line: {text!r}"
