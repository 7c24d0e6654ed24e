"""Guest memory as a device process sees it: regions mapped from descriptors that were received.

Two kinds of addresses lead into it: guest-physical ones, in descriptors and requests, and those of
the front-end's process, in SET_VRING_ADDR. The front-end is trusted with its own memory: a file
that it shortens afterwards ends this process by SIGBUS, as it ends every other user of it.
"""

import ctypes
import mmap
import os
from bisect import bisect_right
from typing import NamedTuple

from vmm_kvm.bits import PAGE_SIZE, align_down
from vmm_kvm.errors import GuestMemoryError
from vmm_kvm.virtio.vhost_user.messages import MemoryRegion, VhostUserError
from vmm_kvm.write_log import Place, WriteLog

LOG_MAX = 1 << 30
"""Bytes of a log, for 32 TiB of memory."""
SLOTS_MAX = 64
"""Regions at once; QEMU has one per memory module that can be plugged, and two more."""
_ADDRESS_END = 1 << 64


class _Mapped(NamedTuple):
    gpa: int
    end: int
    user_address: int
    view: memoryview


class Regions:
    """The regions of one connection, by guest-physical and by user address.

    A view keeps its mapping: what is removed is unmapped when its last view is gone.
    """

    __slots__ = ("_log", "_mapped", "_starts", "writes")

    def __init__(self) -> None:
        """Begin without memory."""
        self._mapped: list[_Mapped] = []  # ascending
        self._starts: list[int] = []  # their first addresses, to search in
        self._log = memoryview(b"")
        self.writes = WriteLog()
        """The log in which writes to them are marked."""

    def __len__(self) -> int:
        return len(self._mapped)

    def add(self, region: MemoryRegion, fd: int) -> None:
        """Map a region of the file behind `fd`, which stays the caller's.

        Raises:
            VhostUserError: it is empty, overlaps another, wraps around, does not lie in the file,
                cannot be mapped, or there are `SLOTS_MAX` already.
        """
        text = f"memory region {region.guest_address:#x}+{region.size:#x}"
        if len(self._mapped) >= SLOTS_MAX:
            raise VhostUserError(f"{text}: more than {SLOTS_MAX}")
        if (
            region.size == 0
            or region.guest_address + region.size > _ADDRESS_END
            or region.user_address + region.size > _ADDRESS_END
        ):
            raise VhostUserError(f"{text}: empty, or beyond the end of addresses")
        for other in self._mapped:
            size = other.end - other.gpa
            if _overlap(region.guest_address, region.size, other.gpa, size) or _overlap(
                region.user_address, region.size, other.user_address, size
            ):
                raise VhostUserError(f"{text}: overlaps another")
        try:
            view = _map(fd, region.mmap_offset, region.size)
        except (OSError, ValueError, OverflowError) as err:
            raise VhostUserError(f"{text}: cannot be mapped: {err}") from err
        index = bisect_right(self._starts, region.guest_address)
        end = region.guest_address + region.size
        self._starts.insert(index, region.guest_address)
        self._mapped.insert(index, _Mapped(region.guest_address, end, region.user_address, view))
        self._follow()

    def map_log(self, size: int, offset: int, fd: int) -> None:
        """Map a log of writes, a bit for each page; `fd` stays the caller's.

        Raises:
            VhostUserError: it does not lie in the file, or cannot be mapped.
        """
        if not 0 < size <= LOG_MAX or offset % PAGE_SIZE:
            raise VhostUserError(f"a log of {size} bytes at {offset:#x}")
        try:
            self._log = _map(fd, offset, size)
        except (OSError, ValueError, OverflowError) as err:
            raise VhostUserError(f"the log cannot be mapped: {err}") from err
        self._follow()

    def log_writes(self, *, is_on: bool) -> None:
        """Mark writes in the log, if there is one, from now on, or mark no more."""
        self.writes.is_on = is_on
        self._follow()

    def _follow(self) -> None:
        """Know where everything lies now, while writes are marked."""
        if not self.writes.is_on:
            return
        places = []
        for one in self._mapped:
            start = ctypes.addressof(ctypes.c_char.from_buffer(one.view))
            places.append(Place(start, start + one.end - one.gpa, one.gpa))
        self.writes.turn_on(self._log, places)

    def remove(self, region: MemoryRegion) -> None:
        """Forget the region with these two addresses and this size.

        Raises:
            VhostUserError: there is none.
        """
        for index, one in enumerate(self._mapped):
            if (one.gpa, one.end - one.gpa, one.user_address) == (
                region.guest_address,
                region.size,
                region.user_address,
            ):
                del self._mapped[index], self._starts[index]
                return
        raise VhostUserError(f"memory region {region.guest_address:#x}+{region.size:#x}: unknown")

    def clear(self) -> None:
        """Forget every region."""
        self._mapped.clear()
        self._starts.clear()

    def view(self, gpa: int, size: int) -> memoryview:
        """Return a writable view of `size` bytes of guest RAM at `gpa`, without copying.

        Raises:
            GuestMemoryError: the range is not inside one region.
        """
        index = bisect_right(self._starts, gpa) - 1
        if index >= 0:
            one = self._mapped[index]
            if size >= 0 and gpa + size <= one.end:
                start = gpa - one.gpa
                return one.view[start : start + size]
        raise GuestMemoryError(gpa, size)

    def guest_address(self, user_address: int) -> int:
        """Return the guest-physical address of the front-end's `user_address`.

        Raises:
            VhostUserError: it is in no region.
        """
        found = self._at_user_address(user_address)
        if found is None:
            raise VhostUserError(f"user address {user_address:#x}: in no memory region")
        return user_address - found.user_address + found.gpa

    def has_user_address(self, user_address: int) -> bool:
        """Tell whether the front-end's `user_address` is in a region."""
        return self._at_user_address(user_address) is not None

    def _at_user_address(self, user_address: int) -> _Mapped | None:
        for one in self._mapped:
            if 0 <= user_address - one.user_address < one.end - one.gpa:
                return one
        return None


def _overlap(start: int, size: int, other_start: int, other_size: int) -> bool:
    return start < other_start + other_size and other_start < start + size


def _map(fd: int, offset: int, size: int) -> memoryview:
    """Map `size` bytes at `offset` of the file; huge pages want both to be multiples of theirs."""
    status = os.fstat(fd)
    if offset + size > status.st_size:
        raise ValueError(f"the file has {status.st_size} bytes")
    granule = max(PAGE_SIZE, status.st_blksize)
    start = align_down(offset, granule)
    length = min(status.st_size, -(-(offset + size) // granule) * granule) - start
    mapping = mmap.mmap(fd, length, offset=start)
    return memoryview(mapping)[offset - start : offset - start + size]
