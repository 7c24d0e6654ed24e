"""Buses: disjoint address ranges, each claimed by one device.

PIO, MMIO and PCI BARs are all of this kind. A device never learns its base address, its bus or
which vCPU asks: it sees an offset and a size.

Locks: one per device, `BusDevice.lock`. `Bus` takes it around `read` and `write`; whoever enters a
device in another way (console input, a timer, the power button) goes through a method that takes
it itself. Never two device locks at once: a device calls out (an IrqLine, a transmit function)
but never into another device.
"""

import threading
from bisect import bisect_right
from collections.abc import Callable
from typing import Protocol

from vmm_kvm.bits import all_ones
from vmm_kvm.errors import BusError

# A guest may touch any number of addresses: forget what was looked up when it has touched many.
_CACHED_ADDRESSES = 4096


class BusDevice(Protocol):
    """What a bus needs of a device."""

    lock: threading.Lock

    def read(self, offset: int, size: int) -> int:
        """Return `size` (1, 2, 4 or 8) bytes at `offset` as a little-endian integer."""

    def write(self, offset: int, size: int, value: int) -> None:
        """Take the low `size` (1, 2, 4 or 8) bytes of `value` at `offset`."""


# What an access needs, looked up once per address: the hot path of every exit. Offset and bytes
# up to the end of the range; then the methods themselves, because `with` and two attribute
# look-ups cost half a microsecond after an exit.
_Claim = tuple[
    int,
    int,
    Callable[[], bool],
    Callable[[], None],
    Callable[[int, int], int],
    Callable[[int, int, int], None],
]


def _nobody_reads(_offset: int, size: int) -> int:
    return all_ones(size)


def _nobody_writes(_offset: int, _size: int, _value: int) -> None:
    pass


_NO_LOCK = threading.Lock()  # never taken: nothing fits into no room
_UNCLAIMED: _Claim = (0, 0, _NO_LOCK.acquire, _NO_LOCK.release, _nobody_reads, _nobody_writes)


class Bus:
    """A map from disjoint address ranges to devices.

    Reads that nobody claims return all ones, writes are dropped, as on real hardware; so do
    accesses that straddle the end of a range. Ranges may change while vCPUs run.
    """

    __slots__ = ("_bases", "_cache", "_lock", "_ranges", "size")

    def __init__(self, size: int) -> None:
        """Make an empty bus of `size` addresses."""
        self.size = size
        self._lock = threading.Lock()  # guards _bases and _ranges; the cache is only replaced
        self._bases: list[int] = []
        self._ranges: list[tuple[int, int, BusDevice]] = []
        self._cache: dict[int, _Claim] = {}

    def insert(self, base: int, size: int, device: BusDevice) -> None:
        """Let `device` claim `size` addresses from `base`.

        Raises:
            BusError: the range is empty, leaves the bus, or overlaps another one.
        """
        if size <= 0 or base < 0 or base + size > self.size:
            raise BusError(f"range {base:#x}+{size:#x}: outside a bus of {self.size:#x}")
        with self._lock:
            at = bisect_right(self._bases, base)
            if at > 0 and self._ranges[at - 1][1] > base:
                raise BusError(f"range {base:#x}+{size:#x}: overlaps {self._ranges[at - 1][0]:#x}")
            if at < len(self._bases) and base + size > self._bases[at]:
                raise BusError(f"range {base:#x}+{size:#x}: overlaps {self._bases[at]:#x}")
            self._bases.insert(at, base)
            self._ranges.insert(at, (base, base + size, device))
            self._cache = {}

    def remove(self, base: int) -> None:
        """Withdraw the range that starts at `base`.

        Raises:
            BusError: no range starts there.
        """
        with self._lock:
            at = bisect_right(self._bases, base) - 1
            if at < 0 or self._bases[at] != base:
                raise BusError(f"range {base:#x}: not on this bus")
            del self._bases[at], self._ranges[at]
            self._cache = {}

    def read(self, address: int, size: int) -> int:
        """Read `size` (1, 2, 4 or 8) bytes; called on a vCPU thread."""
        try:
            offset, room, acquire, release, read, _ = self._cache[address]
        except KeyError:
            offset, room, acquire, release, read, _ = self._find(address)
        if size > room:
            return all_ones(size)
        acquire()
        try:
            return read(offset, size)
        finally:
            release()

    def write(self, address: int, size: int, value: int) -> None:
        """Write `size` (1, 2, 4 or 8) bytes; called on a vCPU thread."""
        try:
            offset, room, acquire, release, _, write = self._cache[address]
        except KeyError:
            offset, room, acquire, release, _, write = self._find(address)
        if size > room:
            return
        acquire()
        try:
            write(offset, size, value)
        finally:
            release()

    def _find(self, address: int) -> _Claim:
        with self._lock:
            if len(self._cache) >= _CACHED_ADDRESSES:
                self._cache = {}
            at = bisect_right(self._bases, address) - 1
            claim = _UNCLAIMED
            if at >= 0 and address < self._ranges[at][1]:
                base, end, device = self._ranges[at]
                lock = device.lock
                claim = (
                    address - base,
                    end - address,
                    lock.acquire,
                    lock.release,
                    device.read,
                    device.write,
                )
            self._cache[address] = claim
            return claim
