"""The pages of guest RAM that devices write to, while a log is wanted.

KVM logs what vCPUs write. Everything else that writes into guest memory marks it here: threads of
this process when they give a chain of buffers back, fw_cfg, and other processes through the same
memory, whose layout is that of vhost: a bit for each page of 4 KiB, by guest-physical address.

A byte that is not zero says that any of its eight pages may have been written to. So a writer that
finds a byte set has nothing to do, one that does not sets all of it, and none of them needs an
atomic operation: `take` clears a byte first, and its caller copies the pages afterwards. A mark is
made after the write that it is for. If `take` overtakes it, it finds the mark the next time.

Source: QEMU docs/interop/vhost-user, "Migration"
"""

import ctypes
import mmap
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from vmm_kvm.bits import PAGE_SIZE, align_up
from vmm_kvm.memfd import make_memory

_PER_BYTE = 8 * PAGE_SIZE
_MARKED = re.compile(rb"[^\0]+")
_CLEAN = bytes(PAGE_SIZE)


class Place(NamedTuple):
    """A piece of guest memory, as it lies in this process."""

    start: int
    """Address of its first byte in this process."""
    end: int
    gpa: int


def log_size(end: int) -> int:
    """Return how many bytes the log of memory that ends at guest-physical address `end` has."""
    return align_up(-(-end // _PER_BYTE), PAGE_SIZE)


def blocks_set(log: bytes | bytearray) -> Iterator[tuple[int, bytes]]:
    """Yield the blocks of a log, or of a bitmap, that are not all zeros, and where they begin.

    Looking at what is zeros takes no time to speak of, however large the memory is.
    """
    for at in range(0, len(log), PAGE_SIZE):
        block = bytes(log[at : at + PAGE_SIZE])
        if block != _CLEAN[: len(block)]:
            yield at, block


class WriteLog:
    """The log for writers of this process; each memory has one, mostly off."""

    __slots__ = ("_log", "_places", "is_on")

    def __init__(self) -> None:
        """Begin without a log."""
        self.is_on = False
        """Whether anybody wants to know; any thread may look."""
        self._log = memoryview(b"")
        self._places: tuple[Place, ...] = ()

    def turn_on(self, log: memoryview, places: Sequence[Place]) -> None:
        """Mark in `log` from now on; `places` are where guest memory lies in this process."""
        self._places = tuple(places)
        self._log = log
        self.is_on = True

    def turn_off(self) -> None:
        """Mark nothing any more; a writer that has not seen it yet finds a log for no memory."""
        self.is_on = False
        self._log = memoryview(b"")

    def mark(self, gpa: int, size: int) -> None:
        """Note that `size` bytes at `gpa`, at least one, were written to."""
        log = self._log
        first, last = gpa // _PER_BYTE, (gpa + size - 1) // _PER_BYTE
        if first < 0 or last >= len(log):  # no RAM
            return
        log[first : last + 1] = b"\xff" * (last + 1 - first)

    def mark_views(self, views: Iterable[memoryview]) -> None:
        """Note that views of guest memory, none of them empty, were written to."""
        places = self._places
        for view in views:
            address = ctypes.addressof(ctypes.c_char.from_buffer(view))
            for start, end, gpa in places:
                if start <= address < end:
                    self.mark(address - start + gpa, len(view))
                    break


class SharedLog:
    """The memory of a log, which other processes can map; a context manager's worth of one."""

    def __init__(self, end: int) -> None:
        """Make a log, with nothing marked, of memory that ends at guest-physical address `end`.

        Raises:
            OSError: the host has no memory or descriptors left.
        """
        self.size = log_size(end)
        """Bytes."""
        self.fd = make_memory("vmm:writes", self.size)
        try:
            mapping = mmap.mmap(self.fd, self.size)
        except BaseException:
            os.close(self.fd)
            raise
        self.view = memoryview(mapping)

    @property
    def address(self) -> int:
        """Where it lies in this process, until it is closed."""
        return ctypes.addressof(ctypes.c_char.from_buffer(self.view))

    def close(self) -> None:
        """Close the descriptor; idempotent. The memory goes with its last view."""
        self.view = memoryview(b"")
        fd, self.fd = self.fd, -1
        if fd >= 0:
            os.close(fd)

    def take(self) -> Iterator[tuple[int, int]]:
        """Clear the log; yield ranges that were marked, as guest-physical addresses from and to."""
        for at, block in blocks_set(bytes(self.view)):
            for found in _MARKED.finditer(block):
                start, end = at + found.start(), at + found.end()
                self.view[start:end] = bytes(end - start)
                yield start * _PER_BYTE, end * _PER_BYTE
