"""Giving up ranges of a disk: discard, and zeros that need not be written.

Source: qcow2 specification, "Standard Cluster Descriptor" (bit 0), "Extended L2 Entries".
"""

from array import array
from typing import TYPE_CHECKING

from vmm_kvm.bits import align_down, align_up
from vmm_kvm.block.qcow2.header import Header
from vmm_kvm.block.qcow2.mapping import ALL_SUBCLUSTERS, COMPRESSED, SUBCLUSTERS, ZERO
from vmm_kvm.block.qcow2.metadata import Metadata
from vmm_kvm.block.qcow2.reader import Reader
from vmm_kvm.block.qcow2.tables import COPIED, OFFSET_MASK
from vmm_kvm.block.qcow2.writer import Writer
from vmm_kvm.block.vectors import zeros

if TYPE_CHECKING:
    from vmm_kvm.block.image import StoredImage

_PIECE = 1 << 20


class Eraser:
    """Erases ranges of one disk."""

    def __init__(
        self,
        header: Header,
        reader: Reader,
        writer: Writer,
        metadata: Metadata,
        base: "StoredImage | None",
    ) -> None:
        """Change `metadata`; what cannot be erased there is overwritten by `writer`."""
        self._reader = reader
        self._writer = writer
        self._metadata = metadata
        self._tables = metadata.tables
        self._size = header.size
        self._base_size = base.size if base else 0
        self._has_zero_flag = header.version >= 3
        self._cluster_bits = header.cluster_bits
        self._cluster_size = header.cluster_size
        self._subcluster_bits = header.subcluster_bits
        self._l2_bits = header.l2_bits
        self._step = 2 if header.has_subclusters else 1

    def discard(self, offset: int, size: int) -> None:
        """Free whole clusters; where a base would show through they read as zero afterwards.

        Raises:
            OSError: part of it may be done.
        """
        if self._base_size and not self._has_zero_flag:
            return
        start = align_up(offset, self._cluster_size)
        stop = offset + size
        if stop < self._size:
            stop = align_down(stop, self._cluster_size)
        if start < stop:
            self._erase(start, stop, keeps=False, is_discard=True)

    def write_zeroes(self, offset: int, size: int, *, may_unmap: bool) -> None:
        """Make a range read as zero; with `may_unmap` its whole clusters are freed.

        Raises:
            OSError: part of it may be done.
        """
        stop = offset + size
        if self._base_size and not self._has_zero_flag:
            self._overwrite(offset, stop)
            return
        granule = 1 << self._subcluster_bits
        # Behind the disk's end there is nothing to be kept.
        end = align_up(stop, self._cluster_size) if stop == self._size else stop
        start = min(align_up(offset, granule), end)
        if offset < start:
            self._overwrite(offset, min(start, stop))
        last = max(align_down(end, granule), start)
        first_whole = min(align_up(start, self._cluster_size), last)
        last_whole = max(align_down(last, self._cluster_size), first_whole)
        self._erase_subclusters(start, first_whole)
        if first_whole < last_whole:
            self._erase(first_whole, last_whole, keeps=not may_unmap, is_discard=False)
        self._erase_subclusters(last_whole, last)
        if last < stop:
            self._overwrite(last, stop)

    def _overwrite(self, start: int, stop: int) -> None:
        """Write zeros, save where they are already."""
        while start < stop:
            size = min(stop - start, _PIECE - start % _PIECE)
            if not self._reader.reads_zero(start, size):
                self._writer.write(start, zeros(size), size)
            start += size

    def _erase(self, start: int, stop: int, *, keeps: bool, is_discard: bool) -> None:
        """Erase whole clusters; with `keeps` those with a place of their own keep it."""
        number = start >> self._cluster_bits
        end = -(-stop >> self._cluster_bits)
        while number < end:
            self._metadata.relieve()
            index = number >> self._l2_bits
            part = min(end, (index + 1) << self._l2_bits) - number
            self._erase_in_table(index, number, part, keeps=keeps, is_discard=is_discard)
            number += part

    def _erase_in_table(
        self, index: int, number: int, count: int, *, keeps: bool, is_discard: bool
    ) -> None:
        """Erase `count` clusters from `number` on, all of L2 table `index`."""
        first = (number & ((1 << self._l2_bits) - 1)) * self._step
        last = first + count * self._step
        is_based = number << self._cluster_bits < self._base_size
        table = self._tables.get(index)
        is_empty = table is None or not any(table.words[first:last])
        if is_empty and (is_discard or not is_based):
            return  # nothing is allocated, so nothing is to be given up
        table = self._tables.get_writable(index, self._metadata.refcounts)
        words = table.words
        based = -(-self._base_size >> self._cluster_bits)
        for place in range(first, last, self._step):
            entry = words[place]
            is_hole = not entry & (COMPRESSED | OFFSET_MASK)
            if self._step == 2:
                is_hole = not entry and not words[place + 1]
            elif entry & ZERO:
                is_hole = False
            if not (is_hole and is_discard):
                self._erase_entry(words, place, keeps=keeps, is_based=number < based)
            number += 1
        self._tables.touch(index, table, first, last)

    def _erase_entry(self, words: "array[int]", place: int, *, keeps: bool, is_based: bool) -> None:
        entry = words[place]
        is_owned = entry & COPIED and not entry & COMPRESSED and entry & OFFSET_MASK
        if keeps and is_owned and self._has_zero_flag:
            zero_entry, is_zero = entry & (OFFSET_MASK | COPIED), True
        else:
            self._writer.release(entry)
            zero_entry, is_zero = 0, is_based
        if self._step == 1:
            words[place] = zero_entry | (ZERO if is_zero else 0)
        else:
            words[place] = zero_entry
            words[place + 1] = ALL_SUBCLUSTERS << SUBCLUSTERS if is_zero else 0

    def _erase_subclusters(self, start: int, stop: int) -> None:
        """Mark some subclusters of one cluster as zero."""
        if start >= stop or self._reader.reads_zero(start, stop - start):
            return
        self._metadata.relieve()
        number = start >> self._cluster_bits
        index = number >> self._l2_bits
        table = self._tables.get_writable(index, self._metadata.refcounts)
        place = (number & ((1 << self._l2_bits) - 1)) * 2
        if table.words[place] & COMPRESSED:
            self._overwrite(start, stop)
            return
        first = (start >> self._subcluster_bits) % SUBCLUSTERS
        count = (stop - start) >> self._subcluster_bits
        marks = ((1 << count) - 1) << first
        table.words[place + 1] = table.words[place + 1] & ~marks | marks << SUBCLUSTERS
        self._tables.touch(index, table, place, place + 2)
