"""The parts of a disk that have changed since they were copied: to copy a disk that is in use.

For one thread, which writes and copies in turn.
"""

from collections.abc import Sequence
from typing import NamedTuple

from vmm_kvm.bits import MIB
from vmm_kvm.block.image import StoredImage
from vmm_kvm.scatter import total

BLOCK = 64 << 10
"""Bytes of a disk that are marked together; larger for a disk of more than 1 TiB."""
PIECE = MIB
"""The most data, in bytes, that are copied at a time."""
ZEROS_MAX = 1 << 30
"""The most zeros, in bytes, that are reported at a time."""
_BLOCKS_MAX = 1 << 24
_MARK, _NO_MARK = b"\1", b"\0"


class Change(NamedTuple):
    """A part of a disk that is to be copied; all in bytes."""

    start: int
    size: int
    """0: nothing has changed."""
    is_zero: int
    """1: it reads as zero."""
    left: int
    """What is to be copied besides."""


class ChangeLog:
    """Marks of the blocks of a disk, one byte each: all are marked in the beginning."""

    def __init__(self, size: int) -> None:
        """Begin with a disk of `size` bytes."""
        self._size = size
        self._block = BLOCK
        while size > self._block * _BLOCKS_MAX:
            self._block *= 2
        self._marks = bytearray(_MARK) * -(-size // self._block)
        self._left = len(self._marks)
        self._at = 0

    def mark(self, offset: int, length: int) -> None:
        """Mark a range that is being changed; what lies outside the disk is ignored."""
        first = offset // self._block
        end = min(-(-(offset + length) // self._block), len(self._marks))
        if first < end:
            self._left += self._marks.count(_NO_MARK, first, end)
            self._marks[first:end] = _MARK * (end - first)

    def take(self, image: StoredImage) -> Change:
        """Clear the marks of the next range, and return it; going round the disk."""
        first = self._marks.find(_MARK, self._at)
        if first < 0:
            first = self._marks.find(_MARK)
        if first < 0:
            return Change(0, 0, 0, 0)
        start, is_zero = first * self._block, False
        for most in (ZEROS_MAX, PIECE):
            count = max(1, most // self._block)
            end = self._marks.find(_NO_MARK, first, first + count)
            end = min(first + count, len(self._marks)) if end < 0 else end
            size = min(end * self._block, self._size) - start
            is_zero = image.reads_zero(start, size)
            if is_zero:
                break
        self._marks[first:end] = _NO_MARK * (end - first)
        self._left -= end - first
        self._at = end
        return Change(start, size, is_zero, self._left * self._block)


class LoggedImage:
    """An image whose changes are marked in a log; both stay the caller's."""

    def __init__(self, image: StoredImage, log: ChangeLog) -> None:
        """Pass requests on to `image`."""
        self._image, self._log = image, log
        self.size, self.is_read_only = image.size, image.is_read_only
        self.readv, self.flush = image.readv, image.flush
        self.reads_zero, self.parts = image.reads_zero, image.parts
        self.close = image.close

    def writev(self, offset: int, buffers: Sequence[memoryview]) -> None:
        """Write all of `buffers`."""
        self._log.mark(offset, total(buffers))
        self._image.writev(offset, buffers)

    def discard(self, offset: int, length: int) -> None:
        """Give up a range."""
        self._log.mark(offset, length)
        self._image.discard(offset, length)

    def write_zeroes(self, offset: int, length: int, *, may_unmap: bool) -> None:
        """Make a range read as zero."""
        self._log.mark(offset, length)
        self._image.write_zeroes(offset, length, may_unmap=may_unmap)
