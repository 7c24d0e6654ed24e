"""Guest-physical memory: mapped once, seen by guest-physical address.

It is one shared memfd, which device processes map too; or, if no other process needs it, private
memory in huge pages, with which a booting guest has a fifth of the exits. Hosts give huge pages to
private memory by default, to a memfd only if the operator said so.

RAM lies around the PCI hole: from 0 up to the hole, and from 4 GiB up for the rest. It does not
know what firmware, E820 or ACPI say about it.
"""

import ctypes
import errno
import mmap
import os
import sys
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from errno import ENOMEM
from typing import NamedTuple, Self

from vmm_kvm.bits import MIB, PAGE_SIZE, align_up
from vmm_kvm.errors import GuestMemoryError, Refusal, RefusedError, SpecError
from vmm_kvm.libc import madvise, map_over, mincore, move_pages, reserve, unmap
from vmm_kvm.memfd import ALL_SEALS, make_memory, make_scratch, seal
from vmm_kvm.write_log import Place, WriteLog

_BLOCK_SIZE = 512  # of st_blocks, always
_HUGE = 2 << 20
_MAP_NORESERVE = 0x4000  # Python 3.11 has no name for it
_PIECE = 64 << 20  # bytes of memory that are asked about at a time
_FROZEN_PIECES = 4096  # of all RAM, at most; each may become a mapping of its own
_ZEROS = bytes(PAGE_SIZE)


class Region(NamedTuple):
    """A contiguous piece of guest RAM."""

    gpa: int
    """Guest-physical address of its first byte, a multiple of 4096."""
    size: int
    """Bytes, a multiple of 4096."""
    offset: int
    """Its start in the memfd or mapping, bytes."""

    @property
    def end(self) -> int:
        """The first guest-physical address behind the region."""
        return self.gpa + self.size


class Run(NamedTuple):
    """A range of positions in RAM, bytes."""

    start: int
    end: int


class GuestMemory:
    """The RAM of one VM; a context manager that owns its memory and mapping.

    Reads and writes are plain memory accesses and may come from any thread. Every access is
    checked: one outside RAM, or across a hole, raises GuestMemoryError.
    """

    __slots__ = (
        "__weakref__",
        "_attached",
        "_finalizer",
        "_low_end",
        "_view",
        "fd",
        "files",
        "hva",
        "is_mapped",
        "regions",
        "size",
        "writes",
    )

    def __init__(
        self,
        ranges: Sequence[tuple[int, int]],
        name: str = "guest",
        *,
        is_private: bool = False,
        mapped: tuple[int, int] | None = None,
    ) -> None:
        """Allocate RAM for `ranges`, pairs of (guest-physical address, bytes), ascending.

        With `is_private` there is no memfd: no other process can map it. With `mapped` too, it
        begins with what a file holds: its descriptor, which stays the caller's, and an offset that
        is a multiple of 4096. The file stays as it is; whoever cuts it short ends this process.

        Raises:
            SpecError: the ranges are not aligned, empty, ascending or disjoint.
            RefusedError: the host has not that much memory.
            OSError: the host has no descriptors left.
        """
        regions = []
        offset = end = 0
        for gpa, size in ranges:
            if gpa % PAGE_SIZE or size % PAGE_SIZE or size <= 0 or gpa < end:
                raise SpecError(f"memory {gpa:#x}+{size:#x}: not aligned, empty or overlapping")
            regions.append(Region(gpa, size, offset))
            offset += size
            end = gpa + size
        if not regions:
            raise SpecError("no memory ranges")
        self.regions = tuple(regions)
        self.size = offset
        self.writes = WriteLog()
        """The log in which devices mark their writes."""
        self._attached: list[tuple[int, memoryview]] = []
        self.is_mapped = mapped is not None
        """Whether all of it began as a file: reading what is a hole there makes a page."""
        self.files = [Run(0, offset)] if mapped else []
        """What of RAM is mapped from a file; runs may touch, and overlap."""
        # Nearly every access is to the region at 0, so it is checked first.
        self._low_end = regions[0].end if regions[0].gpa == 0 else 0
        self.fd = -1
        """The memfd; -1 for private memory."""
        self._finalizer: weakref.finalize[[int], GuestMemory] | None = None
        try:
            if mapped is None:
                mapping = self._allocate(name, offset, is_private=is_private)
            else:
                assert is_private
                mapping = _map_file(mapped, offset)
        except OSError as err:
            if err.errno != ENOMEM:
                raise
            text = f"{offset // MIB} MiB of memory: {err.strerror}"
            raise RefusedError(Refusal.ENOMEM, text) from err
        with suppress(OSError):  # a kernel without huge pages
            mapping.madvise(mmap.MADV_HUGEPAGE)
        address = ctypes.addressof(ctypes.c_char.from_buffer(mapping))
        skipped = -address % _HUGE if is_private and mapped is None else 0
        self.hva = address + skipped
        self._view = memoryview(mapping)[skipped : skipped + offset]

    def _allocate(self, name: str, size: int, *, is_private: bool) -> mmap.mmap:
        if is_private:
            # A huge page of the guest is one of the host if their addresses agree: leave room.
            mapping = mmap.mmap(-1, size + _HUGE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            with suppress(OSError):  # a kernel that merges nothing
                # A guest could learn the contents of another one's page from the time of a write.
                mapping.madvise(mmap.MADV_UNMERGEABLE)
        else:
            self.fd = make_memory(f"vmm:{name}", size)
            # The mapping goes when its last view does: a thread may still hold one after close().
            self._finalizer = weakref.finalize(self, os.close, self.fd)
            mapping = mmap.mmap(self.fd, size)
        return mapping

    def close(self) -> None:
        """Close the memfd and drop the mapping; idempotent."""
        if self._finalizer:
            self._finalizer()
        self.writes.turn_off()
        self._view = memoryview(b"")
        self._low_end = 0
        self._attached = []
        self.regions = ()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def log_writes(self, log: memoryview) -> None:
        """Let devices of this process mark their writes in `log`, until `writes` is off."""
        starts = [(self.hva + region.offset, region) for region in self.regions]
        places = [Place(start, start + region.size, region.gpa) for start, region in starts]
        self.writes.turn_on(log, places)

    def attach(self, gpa: int, view: memoryview) -> None:
        """Let devices of this process reach other memory of the guest, at `gpa`, until `close`.

        It is in no region: not RAM, and unknown to device processes.
        """
        self._attached.append((gpa, view))

    def view(self, gpa: int, size: int) -> memoryview:
        """Return a writable view of `size` bytes of guest RAM at `gpa`, without copying.

        The guest can change the bytes at any time: copy first, then check, then use.

        Raises:
            GuestMemoryError: the range is not inside one region.
        """
        end = gpa + size
        if 0 <= gpa <= end <= self._low_end:
            return self._view[gpa:end]
        for region in self.regions:
            if region.gpa <= gpa <= end <= region.end:
                start = gpa - region.gpa + region.offset
                return self._view[start : start + size]
        for start, attached in self._attached:
            if start <= gpa <= end <= start + len(attached):
                return attached[gpa - start : end - start]
        raise GuestMemoryError(gpa, size)

    def read(self, gpa: int, size: int) -> bytes:
        """Copy `size` bytes out of guest RAM at `gpa`.

        Raises:
            GuestMemoryError: the range is not inside one region.
        """
        return bytes(self.view(gpa, size))

    def write(self, gpa: int, data: bytes | bytearray | memoryview) -> None:
        """Copy `data` into guest RAM at `gpa`.

        Raises:
            GuestMemoryError: the range is not inside one region.
        """
        self.view(gpa, len(data))[:] = data

    def discard(self, view: memoryview) -> int:
        """Give the whole pages of a view of guest RAM back to the host; returns their bytes.

        Whoever reads them next finds zeros, or in RAM that began as a file's what the file has. Of
        memory that is no RAM nothing is given back.

        Raises:
            OSError: the kernel does not take the pages.
        """
        first = ctypes.addressof(ctypes.c_char.from_buffer(view))
        start, end = align_up(first, PAGE_SIZE), (first + len(view)) & -PAGE_SIZE
        if not self.hva <= start < end <= self.hva + self.size:
            return 0
        # Shared pages stay in the memfd unless they are removed from it.
        advice = mmap.MADV_REMOVE if self.fd >= 0 else mmap.MADV_DONTNEED
        madvise(start, end - start, advice)
        return end - start

    def resident_size(self) -> int:
        """Return how many bytes of the host's memory hold guest RAM; pages never touched do not.

        Of private memory, swapped-out pages do not count.

        Raises:
            OSError: the kernel does not tell.
        """
        if self.fd >= 0:
            return os.fstat(self.fd).st_blocks * _BLOCK_SIZE
        return resident_bytes(self.hva, self.size)

    def contains(self, gpa: int, size: int) -> bool:
        """Tell whether `size` bytes at `gpa` lie inside one region."""
        return any(r.gpa <= gpa and gpa + size <= r.end for r in self.regions)


def _map_file(mapped: tuple[int, int], size: int) -> mmap.mmap:
    fd, offset = mapped
    try:
        mapping = mmap.mmap(fd, size, mmap.MAP_PRIVATE | _MAP_NORESERVE, offset=offset)
    except ValueError as err:  # so says Python where the file has less
        raise SpecError(f"memory: {err}") from err
    with suppress(OSError):  # a kernel that merges nothing
        mapping.madvise(mmap.MADV_UNMERGEABLE)
    return mapping


def resident_bytes(address: int, size: int) -> int:
    """Return how many of `size` bytes of this process's memory at `address` are in RAM.

    Both are multiples of 4096.

    Raises:
        OSError: they are not, or not all of it is mapped.

    Source: mincore(2)
    """
    pages = 0
    for start in range(address, address + size, _PIECE):
        pages += mincore(start, min(_PIECE, address + size - start)).count(1)
    return pages * PAGE_SIZE


def freeze(memory: GuestMemory, name: str, goes_on: Callable[[], bool]) -> int | None:
    """Copy private RAM into memory that can never change; returns its descriptor, the caller's.

    The guest, which stands still, goes on from the copy: what it writes is its own again. What it
    has never touched stays as it is. None if `goes_on`, asked now and then, said no: of what has
    been copied by then the guest goes on all the same.

    Raises:
        OSError: the host has no memory or descriptors left.
    """
    fd = make_scratch(f"vmm:{name}")
    try:
        os.ftruncate(fd, memory.size)
        piece = _piece(memory)
        memory.files = _merged(memory.files)
        for region in memory.regions:
            for start in range(0, region.size, piece):
                if not goes_on():
                    os.close(fd)
                    return None
                size = min(piece, region.size - start)
                at = region.offset + start
                if _copy_pages(memory.view(region.gpa + start, size), fd, at):
                    _map_piece(memory, fd, at, size)
                    memory.files.append(Run(at, at + size))
        seal(fd, ALL_SEALS)
    except BaseException:
        os.close(fd)
        raise
    return fd


def adopt(memory: GuestMemory, fd: int) -> Callable[[], None]:
    """Let private RAM go on from a memfd that has the same contents.

    The guest stands still meanwhile; afterwards what it writes is its own. The caller then calls
    what is returned: it gives back the pages that RAM had, which takes long, and seals the memfd,
    so that nobody can change it.

    Raises:
        OSError: the kernel has no room for the mappings.
    """
    before = _merged(memory.files)
    after = _merged([*before, *_data(memory, fd)])
    empty = list(_gaps(after, memory.size))
    others = _gaps(_merged([*before, *empty]), memory.size)
    aside = _Aside(memory)
    try:
        for start, end in (*before, *others):
            aside.take(start, end - start)
        for start, end in after:
            _map_piece(memory, fd, start, end - start)
        for start, end in empty:
            # Zeros that reading has made would count as touched by the guest.
            madvise(memory.hva + start, end - start, mmap.MADV_DONTNEED)
    except BaseException:
        aside.put_back()
        raise
    memory.files = after

    def finish() -> None:
        aside.drop()
        seal(fd, ALL_SEALS)

    return finish


def _piece(memory: GuestMemory) -> int:
    return align_up(max(_HUGE, memory.size // _FROZEN_PIECES), _HUGE)


def _merged(runs: Iterable[Run]) -> list[Run]:
    """Return the same as few runs, ascending: one mapping is quick."""
    merged: list[Run] = []
    for run in sorted(runs):
        if merged and run.start <= merged[-1].end:
            last = merged.pop()
            merged.append(Run(last.start, max(last.end, run.end)))
        else:
            merged.append(run)
    return merged


def _gaps(runs: Sequence[Run], size: int) -> Iterator[Run]:
    """Yield the rest of RAM."""
    starts = (0, *(run.end for run in runs))
    ends = (*(run.start for run in runs), size)
    return (Run(start, end) for start, end in zip(starts, ends, strict=True) if start < end)


def _data(memory: GuestMemory, fd: int) -> Iterator[Run]:
    """Yield the pieces of RAM of which a file has any data."""
    piece = _piece(memory)
    for region in memory.regions:
        at, end = region.offset, region.offset + region.size
        while (found := _find_data(fd, at)) < end:
            start = region.offset + (found - region.offset) // piece * piece
            at = min(start + piece, end)
            yield Run(start, at)


def _find_data(fd: int, offset: int) -> int:
    """Return where a file has data at an offset or behind it."""
    try:
        return os.lseek(fd, offset, os.SEEK_DATA)
    except OSError as err:
        if err.errno != errno.ENXIO:
            raise
        return sys.maxsize  # nothing but a hole follows


class _Aside:
    """Pages that RAM has had, where no guest sees them."""

    def __init__(self, memory: GuestMemory) -> None:
        self._hva = memory.hva
        self._size = memory.size + _HUGE
        self._start = reserve(self._size)
        # The kernel moves whole tables of pages if addresses are the same modulo 2 MiB.
        self._target = self._start + (memory.hva - self._start) % _HUGE
        self._taken: list[tuple[int, int]] = []

    def take(self, start: int, size: int) -> None:
        """Move pages here, if the kernel can; else they stay."""
        with suppress(OSError):
            move_pages(self._hva + start, size, self._target + start)
            self._taken.append((start, size))

    def put_back(self) -> None:
        """Undo all of it, over whatever has been mapped there since."""
        try:
            for start, size in self._taken:
                move_pages(self._target + start, size, self._hva + start)
        except OSError:
            os.abort()  # no guest may go on without its memory
        self.drop()

    def drop(self) -> None:
        """Give all of them back to the host."""
        unmap(self._start, self._size)


def _map_piece(memory: GuestMemory, fd: int, offset: int, size: int) -> None:
    map_over(memory.hva + offset, size, fd, offset, is_private=True)
    with suppress(OSError):  # a kernel that merges nothing
        madvise(memory.hva + offset, size, mmap.MADV_UNMERGEABLE)


def _copy_pages(view: memoryview, fd: int, offset: int) -> bool:
    """Write the pages of `view` that are not zero; tell whether there are any."""
    data = bytes(view)  # comparing a view takes fifteen times as long
    if data == bytes(len(data)):
        return False
    start = None
    for at in range(0, len(data) + 1, PAGE_SIZE):
        is_zero = at == len(data) or data.startswith(_ZEROS, at)
        if not is_zero and start is None:
            start = at
        elif is_zero and start is not None:
            pending = memoryview(data)[start:at]
            while pending:
                count = os.pwrite(fd, pending, offset + at - len(pending))
                pending = pending[count:]
            start = None
    return True
