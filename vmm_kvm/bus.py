"""Buses: disjoint address ranges, each claimed by one device.

PIO, MMIO and PCI BARs are all of this kind. A device never learns its base address, its bus or
which vCPU asks: it sees an offset and a size.

Locks: one per device, `BusDevice.lock`. `Bus` takes it around `read` and `write`; code that enters
a device in another way (console input, a timer, the power button) calls a method that takes it
itself. Never two device locks at once: a device calls out (an IrqLine, a transmit function) but
never into another device.
"""

import threading
from bisect import bisect_right
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple, Protocol, Self

from vmm_kvm.bits import all_ones
from vmm_kvm.errors import BusError

# A guest may touch any number of addresses: drop the look-ups after this many.
_CACHED_ADDRESSES = 4096


class BusDevice(Protocol):
    """A device, as far as a bus needs it."""

    lock: threading.Lock

    def read(self, offset: int, size: int) -> int:
        """Return `size` (1, 2, 4 or 8) bytes at `offset` as a little-endian integer."""

    def write(self, offset: int, size: int, value: int) -> None:
        """Take the low `size` (1, 2, 4 or 8) bytes of `value` at `offset`."""


class Clearable(Protocol):
    """A table of look-ups on a bus."""

    def clear(self) -> None:
        """Forget everything."""


class Claim(NamedTuple):
    """The parts that an access needs, found once per address.

    It holds the methods themselves: after an exit caches are cold, and `with` and two attribute
    look-ups cost half a microsecond.
    """

    base: int
    end: int
    acquire: Callable[[], bool]
    release: Callable[[], None]
    read: Callable[[int, int], int]
    write: Callable[[int, int, int], None]

    @classmethod
    def of(cls, base: int, end: int, device: BusDevice) -> Self:
        """Return the claim of `device` on the addresses from `base` up to `end`."""
        lock = device.lock
        return cls(base, end, lock.acquire, lock.release, device.read, device.write)


class _Undriven:
    """Stands for addresses without a device; its range is empty, so no access reaches it."""

    lock = threading.Lock()

    def read(self, _offset: int, size: int) -> int:
        return all_ones(size)

    def write(self, _offset: int, _size: int, _value: int) -> None:
        pass


_UNCLAIMED = Claim.of(0, 0, _Undriven())


class Bus:
    """A map from disjoint address ranges to devices.

    Unclaimed reads return all ones, writes are dropped, as on real hardware; so do
    accesses that straddle the end of a range. Ranges may change while vCPUs run.
    """

    __slots__ = ("_bases", "_claims", "_lock", "_ranges", "_watched", "size", "version")

    def __init__(self, size: int) -> None:
        """Make an empty bus of `size` addresses."""
        self.size = size
        self.version = 0
        """Changes whenever a range does: earlier results of `find` are stale then."""
        self._watched: list[Clearable] = []
        self._lock = threading.Lock()  # guards all below; vCPUs look into _claims without it
        self._bases: list[int] = []
        self._ranges: list[tuple[int, int, BusDevice]] = []
        self._claims: dict[int, Claim] = {}  # by address

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
            self._forget()

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
            self._forget()

    def read(self, address: int, size: int) -> int:
        """Read `size` (1, 2, 4 or 8) bytes; called on a vCPU thread."""
        try:
            base, end, acquire, release, read, _ = self._claims[address]
        except KeyError:
            base, end, acquire, release, read, _ = self.find(address)
        if address + size > end:
            return all_ones(size)
        acquire()
        try:
            return read(address - base, size)
        finally:
            release()

    def write(self, address: int, size: int, value: int) -> None:
        """Write `size` (1, 2, 4 or 8) bytes; called on a vCPU thread."""
        try:
            base, end, acquire, release, _, write = self._claims[address]
        except KeyError:
            base, end, acquire, release, _, write = self.find(address)
        if address + size > end:
            return
        acquire()
        try:
            write(address - base, size, value)
        finally:
            release()

    def find(self, address: int) -> Claim:
        """Return the claim that covers `address`; its range is empty if there is none."""
        with self._lock:
            at = bisect_right(self._bases, address) - 1
            if at >= 0 and address < self._ranges[at][1]:
                claim = Claim.of(*self._ranges[at])
            else:
                claim = _UNCLAIMED
            if len(self._claims) >= _CACHED_ADDRESSES:
                self._claims = {}
            self._claims[address] = claim
            return claim

    def ranges(self) -> list[tuple[int, int]]:
        """Return the claimed ranges, ascending: base, and the first address behind."""
        with self._lock:
            return [(base, end) for base, end, _ in self._ranges]

    @contextmanager
    def watched(self, table: Clearable) -> Iterator[None]:
        """Empty `table`, which holds answers of `find`, whenever a range changes in this block."""
        with self._lock:
            self._watched.append(table)
        try:
            yield
        finally:
            with self._lock:
                self._watched = [other for other in self._watched if other is not table]

    def _forget(self) -> None:
        self._claims = {}
        self.version += 1  # first: a thread that stores a stale entry sees it
        for table in self._watched:
            table.clear()
