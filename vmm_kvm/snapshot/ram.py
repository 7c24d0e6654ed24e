"""Guest RAM as runs of data; the rest is zeros, and is not saved.

A place in RAM is counted from its first byte, over all regions, so that holes of the guest-physical
address space take no room.
"""

import os
from collections.abc import Iterator
from errno import ENXIO
from typing import NamedTuple, Protocol

from vmm_kvm.bits import MIB, PAGE_SIZE
from vmm_kvm.errors import SnapshotError

PIECE = MIB
"""Bytes of the longest run."""
_ZEROS = bytes(PIECE)
_ZERO_PAGE = bytes(PAGE_SIZE)


class Region(Protocol):
    """A contiguous piece of guest RAM."""

    @property
    def gpa(self) -> int:
        """Guest-physical address of its first byte."""

    @property
    def size(self) -> int:
        """Bytes, a multiple of 4096."""

    @property
    def offset(self) -> int:
        """Its start among all RAM, bytes."""


class Ram(Protocol):
    """The memory of a guest; a `GuestMemory`."""

    @property
    def fd(self) -> int:
        """The file that has it, by the same offsets; -1 if there is none."""

    @property
    def size(self) -> int:
        """Bytes."""

    @property
    def regions(self) -> "tuple[Region, ...]":
        """Its parts, one after the other."""

    def view(self, gpa: int, size: int) -> memoryview:
        """Return a writable view of a piece of one region."""


class Run(NamedTuple):
    """Bytes of RAM, and where they are."""

    offset: int
    data: bytes


def runs(ram: Ram) -> Iterator[Run]:
    """Yield what RAM holds that is not zero, ascending, in whole pages and copies of at most 1 MiB.

    Pages that the guest has never touched stay untouched: those of a file are known by its holes,
    and the kernel has one page of zeros for reading all others.
    """
    for offset, view in _pieces(ram):
        data = bytes(view)  # a copy: comparing a view takes fifteen times as long
        if not is_zero(data):
            yield from _split(offset, data)


def runs_of(ram: Ram, offset: int, size: int) -> Iterator[Run]:
    """Yield the non-zero runs of a piece of one region, as `runs` does; at most 1 MiB."""
    for start, stop in _extents(ram.fd, offset, offset + size):
        view = place(ram, start, stop - start)
        assert view is not None, "a piece is inside of one region"
        data = bytes(view)
        if not is_zero(data):
            yield from _split(start, data)


def is_zero(data: bytes) -> bool:
    """Tell whether at most 1 MiB is all zeros."""
    return data == (_ZEROS if len(data) == PIECE else bytes(len(data)))


def _split(offset: int, data: bytes) -> Iterator[Run]:
    """Yield the runs of pages that are not zero."""
    start = None
    for at in range(0, len(data), PAGE_SIZE):
        if data.startswith(_ZERO_PAGE, at):
            if start is not None:
                yield Run(offset + start, data[start:at])
                start = None
        elif start is None:
            start = at
    if start is not None:
        yield Run(offset + start, data[start:])


def _pieces(ram: Ram) -> Iterator[tuple[int, memoryview]]:
    """Yield views of at most 1 MiB of all that may hold something, and their offsets."""
    for region in ram.regions:
        end = region.offset + region.size
        for start, stop in _extents(ram.fd, region.offset, end):
            for offset in range(start, stop, PIECE):
                size = min(PIECE, stop - offset)
                yield offset, ram.view(region.gpa + offset - region.offset, size)


def read_extents(fd: int, ram: Ram) -> None:
    """Read RAM, a memfd that is all zeros, from a file that has it by the same offsets.

    Raises:
        SnapshotError: the file is too short.
        OSError: it cannot be read.
    """
    for start, stop in _extents(fd, 0, ram.size):
        copy_in(fd, start, ram, start, stop - start)


def copy_in(fd: int, position: int, ram: Ram, offset: int, size: int) -> None:
    """Copy a piece of a file from `position` on into RAM, a memfd, at `offset`.

    The kernel copies without mapping the pages, which takes half the time.

    Raises:
        SnapshotError: the file is too short.
        OSError: it cannot be read.
    """
    os.lseek(ram.fd, offset, os.SEEK_SET)
    end = position + size
    while position < end:
        count = os.sendfile(ram.fd, fd, position, end - position)
        if not count:
            raise SnapshotError("memory: the file ends too early")
        position += count


def _extents(fd: int, start: int, end: int) -> Iterator[tuple[int, int]]:
    """Yield where a file has data between two offsets; all of it where there is no file."""
    if fd < 0:
        yield start, end
        return
    while start < end:
        try:
            data = os.lseek(fd, start, os.SEEK_DATA)
        except OSError as err:
            if err.errno != ENXIO:  # nothing but a hole follows
                raise
            return
        if data >= end:
            return
        start = min(os.lseek(fd, data, os.SEEK_HOLE), end)
        yield data, start


def place(ram: Ram, offset: int, size: int) -> memoryview | None:
    """Return a writable view of RAM, or None if it is not all in one region."""
    for region in ram.regions:
        if region.offset <= offset and offset + size <= region.offset + region.size:
            return ram.view(region.gpa + offset - region.offset, size)
    return None
