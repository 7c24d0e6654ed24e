"""Counters of a device's traffic, in memory that its process writes and the VM's reads.

Numbers of eight bytes in the host's order, each with one writer: in and out, and of a disk the
generations of its image, as it was found and as it was left when all was written. Any bytes of the
other process are valid numbers.
"""

import mmap
import os
from collections.abc import Sequence

from vmm_kvm.block.image import StoredImage
from vmm_kvm.memfd import make_memory
from vmm_kvm.scatter import total

_SIZE = mmap.PAGESIZE
_READ, _WRITTEN = 0, 1
_FOUND, _LEFT, _GENERATION = 2, 5, 3  # places, and how many numbers one has


def make_counters() -> int:
    """Return the descriptor of counters that stand at 0; the caller owns it.

    Raises:
        OSError: the host has no memory or descriptors left.
    """
    return make_memory("counters", _SIZE)


class Counters:
    """The counters of one device, mapped until they are collected."""

    def __init__(self, fd: int) -> None:
        """Map the counters at `fd`, which is closed."""
        try:
            self.values = memoryview(mmap.mmap(fd, _SIZE)).cast("Q")
        finally:
            os.close(fd)

    @property
    def read(self) -> int:
        """Bytes that the guest has read."""
        return self.values[_READ]

    @property
    def written(self) -> int:
        """Bytes that the guest has written."""
        return self.values[_WRITTEN]

    def set_generation(self, numbers: Sequence[int], *, is_found: bool = False) -> None:
        """Note the generation of a disk's image, three numbers; with `is_found` as it was found."""
        at = _FOUND if is_found else _LEFT
        for place, number in enumerate(numbers[:_GENERATION]):
            self.values[at + place] = number

    def generation(self, *, is_found: bool = False) -> tuple[int, ...]:
        """Return the generation of a disk's image as it was left, or found."""
        at = _FOUND if is_found else _LEFT
        return tuple(self.values[at : at + _GENERATION])


class CountedImage:
    """A disk image whose transfers are counted; owns the image, and is used as that is."""

    def __init__(self, image: StoredImage, counters: Counters) -> None:
        """Count reads and writes of `image`."""
        self._image = image
        self._values = counters.values
        self.size = image.size
        self.is_read_only = image.is_read_only
        self.flush = image.flush
        self.discard = image.discard
        self.write_zeroes = image.write_zeroes
        self.close = image.close
        self.reads_zero, self.parts = image.reads_zero, image.parts
        self.peek = image.readv

    def readv(self, offset: int, buffers: Sequence[memoryview]) -> None:
        """Fill all of `buffers` from byte `offset`."""
        self._image.readv(offset, buffers)
        self._values[_READ] += total(buffers)

    def writev(self, offset: int, buffers: Sequence[memoryview]) -> None:
        """Write all of `buffers`."""
        self._image.writev(offset, buffers)
        self._values[_WRITTEN] += total(buffers)
