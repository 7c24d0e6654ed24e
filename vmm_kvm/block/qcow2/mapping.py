"""From ranges of the disk to where they are in the file.

Source: qcow2 specification, "Cluster mapping", "Extended L2 Entries".
"""

from array import array
from enum import IntEnum
from typing import NamedTuple

from vmm_kvm.block.qcow2.faults import Faults
from vmm_kvm.block.qcow2.header import Header
from vmm_kvm.block.qcow2.tables import COPIED, OFFSET_MASK, Tables

COMPRESSED = 1 << 62
ZERO = 1
SUBCLUSTERS = 32
ALL_SUBCLUSTERS = (1 << SUBCLUSTERS) - 1


class Kind(IntEnum):
    """The kind of a range of the disk."""

    HOLE = 0
    """Not allocated: the base's contents, or zeros without one."""
    ZERO = 1
    DATA = 2
    """In clusters that are this disk's alone: they may be written in place."""
    SHARED = 3
    """In clusters that a snapshot has as well."""
    COMPRESSED = 4


class Extent(NamedTuple):
    """A range that is of one kind, and contiguous in the file."""

    kind: Kind
    host: int
    """Offset in the file of the first byte; for COMPRESSED, the L2 entry."""
    size: int
    """Bytes."""


class Mapping:
    """Reads the tables of one image."""

    def __init__(self, header: Header, tables: Tables, faults: Faults) -> None:
        """Read `tables`, by the geometry of `header`."""
        self._tables = tables
        self._faults = faults
        self._cluster_bits = header.cluster_bits
        self._cluster_size = header.cluster_size
        self._l2_bits = header.l2_bits
        self._subcluster_bits = header.subcluster_bits
        self._has_subclusters = header.has_subclusters
        self._has_zero_flag = header.version >= 3
        self._table_bits = header.l2_bits + header.cluster_bits
        self._l2_mask = (1 << header.l2_bits) - 1
        # Of an entry with plain data of this disk alone, only COPIED is set of these.
        self._marks = COPIED | COMPRESSED | ZERO | (header.cluster_size - 1 & OFFSET_MASK)

    def find(self, offset: int, size: int) -> int:
        """Return where a range is in the file if it is plain DATA in one cluster, else 0.

        This is what most small requests are, so it is done in the fewest steps; 0 says nothing.

        Raises:
            OSError: a table cannot be read, or is corrupt.
        """
        number = offset >> self._cluster_bits
        if (offset + size - 1) >> self._cluster_bits != number:
            return 0
        table = self._tables.get(offset >> self._table_bits)
        if table is None:
            return 0
        number &= self._l2_mask
        if not self._has_subclusters:
            entry = table.words[number]
        elif table.words[number * 2 + 1] == ALL_SUBCLUSTERS:
            entry = table.words[number * 2]
        else:
            return 0
        if entry & self._marks != COPIED or not entry & OFFSET_MASK:
            return 0
        return (entry & OFFSET_MASK) + (offset & (self._cluster_size - 1))

    def extents(self, offset: int, size: int) -> list[Extent]:
        """Return what `size` bytes of the disk from `offset` are, in order.

        Raises:
            OSError: a table cannot be read, or is corrupt.
        """
        end = offset + size
        found: list[Extent] = []
        table_bits = self._table_bits
        walk = self._extended if self._has_subclusters else self._standard
        while offset < end:
            index = offset >> table_bits
            stop = min(end, (index + 1) << table_bits)
            table = self._tables.get(index)
            if table is None:
                following = self._tables.next_index(index, (end - 1 >> table_bits) + 1)
                stop = min(end, following << table_bits)
                self._append(found, Kind.HOLE, 0, stop - offset)
            else:
                walk(found, table.words, offset, stop)
            offset = stop
        return found

    def end_of_gap(self, offset: int, end: int) -> int:
        """Return where the range of an L2 table begins, from `offset` on; `end` if none before."""
        following = self._tables.next_index(offset >> self._table_bits, end >> self._table_bits)
        return min(end, following << self._table_bits)

    def _append(self, found: list[Extent], kind: Kind, host: int, size: int) -> None:
        """Add an extent, merged with the last one if it continues that."""
        if found and found[-1].kind is kind:
            last = found[-1]
            if kind <= Kind.ZERO or (kind is not Kind.COMPRESSED and last.host + last.size == host):
                found[-1] = Extent(kind, last.host, last.size + size)
                return
        found.append(Extent(kind, host, size))

    def _standard(self, found: list[Extent], words: "array[int]", offset: int, stop: int) -> None:
        """Walk through part of one table of 64-bit entries."""
        cluster_size = self._cluster_size
        mask = (1 << self._l2_bits) - 1
        while offset < stop:
            index = offset >> self._cluster_bits & mask
            last = (stop - 1) >> self._cluster_bits & mask
            entry = words[index]
            within = offset & (cluster_size - 1)
            kind, host = self._classify(entry)
            following = index + 1
            if kind <= Kind.ZERO:
                marks = COMPRESSED | ZERO | (0 if kind is Kind.ZERO else OFFSET_MASK)
                same = entry & marks
                while following <= last and words[following] & marks == same:
                    following += 1
            elif kind is not Kind.COMPRESSED:
                expected = entry + cluster_size
                while following <= last and words[following] == expected:
                    following += 1
                    expected += cluster_size
                host += within
            size = min(stop, offset - within + (following - index) * cluster_size) - offset
            self._append(found, kind, host, size)
            offset += size

    def _classify(self, entry: int) -> tuple[Kind, int]:
        if entry & COMPRESSED:
            return Kind.COMPRESSED, entry
        host = entry & OFFSET_MASK
        if host & (self._cluster_size - 1):
            raise self._faults.corrupt(f"cluster at invalid offset {host:#x}")
        if entry & ZERO:
            if not self._has_zero_flag:
                raise self._faults.corrupt("a zero cluster in a version 2 image")
            return Kind.ZERO, 0
        if not host:
            return Kind.HOLE, 0
        return (Kind.DATA if entry & COPIED else Kind.SHARED), host

    def _extended(self, found: list[Extent], words: "array[int]", offset: int, stop: int) -> None:
        """Walk through part of one table of 128-bit entries."""
        bits = self._subcluster_bits
        mask = (1 << self._l2_bits) - 1
        while offset < stop:
            index = (offset >> self._cluster_bits & mask) * 2
            entry, bitmap = words[index], words[index + 1]
            within = offset & (self._cluster_size - 1)
            end = min(stop, offset - within + self._cluster_size)
            if entry & COMPRESSED:
                self._append(found, Kind.COMPRESSED, entry, end - offset)
                offset = end
                continue
            host = self.check_extended(entry, bitmap)
            kind = Kind.DATA if entry & COPIED else Kind.SHARED
            while offset < end:
                within = offset & (self._cluster_size - 1)
                place = within >> bits
                state = bitmap >> place & _STATE
                # Most clusters are allocated as a whole, or not at all.
                run = SUBCLUSTERS if bitmap in {0, ALL_SUBCLUSTERS} else place + 1
                while run < SUBCLUSTERS and bitmap >> run & _STATE == state:
                    run += 1
                size = min(end - offset, (run << bits) - within)
                if state & 1:
                    self._append(found, kind, host + within, size)
                else:
                    self._append(found, Kind.ZERO if state else Kind.HOLE, 0, size)
                offset += size

    def check_extended(self, entry: int, bitmap: int) -> int:
        """Return the host offset of a 128-bit entry that is not compressed, 0 for none."""
        host = entry & OFFSET_MASK
        allocated = bitmap & ALL_SUBCLUSTERS
        if host & (self._cluster_size - 1) or (allocated and not host):
            raise self._faults.corrupt(f"cluster at invalid offset {host:#x}")
        if allocated & bitmap >> SUBCLUSTERS:
            raise self._faults.corrupt("a subcluster that is both data and zero")
        return host


_STATE = 1 << SUBCLUSTERS | 1  # of subcluster 0: bit 0 allocated, bit 32 zero
