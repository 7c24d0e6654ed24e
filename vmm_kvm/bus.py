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
        self._cache: dict[int, tuple[int, int, BusDevice] | None] = {}

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
        cache = self._cache
        claim = cache[address] if address in cache else self._find(address)
        if claim is None:
            return all_ones(size)
        base, end, device = claim
        if address + size > end:
            return all_ones(size)
        with device.lock:
            return device.read(address - base, size)

    def write(self, address: int, size: int, value: int) -> None:
        """Write `size` (1, 2, 4 or 8) bytes; called on a vCPU thread."""
        cache = self._cache
        claim = cache[address] if address in cache else self._find(address)
        if claim is None:
            return
        base, end, device = claim
        if address + size > end:
            return
        with device.lock:
            device.write(address - base, size, value)

    def _find(self, address: int) -> tuple[int, int, BusDevice] | None:
        with self._lock:
            if len(self._cache) >= _CACHED_ADDRESSES:
                self._cache = {}
            at = bisect_right(self._bases, address) - 1
            claim = self._ranges[at] if at >= 0 and address < self._ranges[at][1] else None
            self._cache[address] = claim
            return claim
