"""A VM's latest console output, in memory that outlives its process.

The parent makes a memfd for each VM that runs and hands it to one VM process after another, so that
a console shows what was written before a reboot. Only the VM process writes it; the parent reads
how much was written, to tell a client the range that it has missed.

Layout: how many bytes were ever written, 8 bytes little-endian; then a ring of `CAPACITY` bytes.
"""

import mmap
import os
import struct
from typing import NamedTuple

from vmm_kvm.memfd import make_memory

CAPACITY = 256 * 1024
"""Bytes that a slow reader may lag before it misses some."""
REPLAY = 64 * 1024
"""Bytes that a late reader is shown."""

_TOTAL = struct.Struct("<Q")
_SIZE = _TOTAL.size + CAPACITY
_POSITION_MAX = 1 << 62
"""No guest writes so much; a compromised VM process may claim it."""


def make_ring(name: str) -> int:
    """Return the descriptor of an empty ring of fixed size; the caller owns it."""
    return make_memory(f"console:{name}", _SIZE)


class Replay(NamedTuple):
    """The earlier output for a late reader; positions as those of OutputRing."""

    start: int
    size: int
    """Bytes; what follows is new."""


def replay(fd: int) -> Replay:
    """Return the earlier output for a new reader, from the ring at `fd`, which stays open."""
    (total,) = _TOTAL.unpack(os.pread(fd, _TOTAL.size, 0))
    size = min(total, REPLAY)
    return Replay(min(total - size, _POSITION_MAX), size)


class OutputRing:
    """A ring, mapped. Positions count bytes from the first that was ever written."""

    __slots__ = ("_data", "_map", "total")

    def __init__(self, fd: int) -> None:
        """Map the ring at `fd`, which stays the caller's."""
        self._map = mmap.mmap(fd, _SIZE)
        self._data = memoryview(self._map)[_TOTAL.size :]
        self.total: int = _TOTAL.unpack_from(self._map)[0]
        """The position of the next byte."""

    def append(self, data: bytes | bytearray) -> None:
        """Append, overwriting the oldest bytes."""
        position = self.total + max(0, len(data) - CAPACITY)
        kept = memoryview(data)[-CAPACITY:]
        while kept:
            at = position % CAPACITY
            part = kept[: CAPACITY - at]
            self._data[at : at + len(part)] = part
            position += len(part)
            kept = kept[len(part) :]
        self.total = position
        _TOTAL.pack_into(self._map, 0, position)

    def late(self) -> int:
        """Return the position at which a late reader begins."""
        return max(0, self.total - REPLAY)

    def nearest(self, position: int) -> int:
        """Return the position that is there and nearest to `position`."""
        return min(max(position, self.total - CAPACITY, 0), self.total)

    def read(self, position: int, size: int) -> tuple[int, bytes]:
        """Return up to `size` bytes from `position`, or from the oldest if those are gone.

        Also returns the position behind them.
        """
        position = min(max(position, self.total - CAPACITY), self.total)
        at = position % CAPACITY
        size = min(size, self.total - position, CAPACITY - at)
        return position + size, bytes(self._data[at : at + size])

    def close(self) -> None:
        """Drop the mapping; idempotent."""
        self._data.release()
        self._map.close()
