"""Writing to a disk: in place where a cluster is the disk's alone, else to a new cluster.

A new cluster is written before the mapping in memory refers to it. If that fails nothing has
changed; the mapping on disk is the business of `vmm_kvm.block.qcow2.metadata`.
"""

import errno
from array import array
from collections.abc import Iterator, Sequence

from vmm_kvm.bits import align_down, align_up
from vmm_kvm.block.file import HostFile
from vmm_kvm.block.qcow2.header import Header
from vmm_kvm.block.qcow2.mapping import (
    ALL_SUBCLUSTERS,
    COMPRESSED,
    SUBCLUSTERS,
    Extent,
    Kind,
    Mapping,
)
from vmm_kvm.block.qcow2.metadata import Metadata
from vmm_kvm.block.qcow2.reader import Reader
from vmm_kvm.block.qcow2.tables import COPIED, OFFSET_MASK, L2Table
from vmm_kvm.block.vectors import cut


class Segment:
    """Consecutive clusters of one L2 table."""

    __slots__ = ("count", "first", "index", "table")

    def __init__(self, table: L2Table, index: int, first: int, count: int) -> None:
        """Note `count` clusters from entry `first` of `table`, which L1 entry `index` names."""
        self.table = table
        self.index = index
        self.first = first
        self.count = count


class Writer:
    """Writes ranges of one disk, and drops what old clusters they replace."""

    def __init__(
        self,
        file: HostFile,
        header: Header,
        mapping: Mapping,
        reader: Reader,
        metadata: Metadata,
    ) -> None:
        """Write to `file` and change `metadata`."""
        self._file = file
        self._mapping = mapping
        self._reader = reader
        self._metadata = metadata
        self._tables = metadata.tables
        self._refcounts = metadata.refcounts
        self._size = header.size
        self._cluster_bits = header.cluster_bits
        self._cluster_size = header.cluster_size
        self._subcluster_bits = header.subcluster_bits
        self._l2_bits = header.l2_bits
        self._step = 2 if header.has_subclusters else 1

    def write(self, offset: int, buffers: Sequence[memoryview], size: int) -> None:
        """Write `buffers`, `size` bytes together, at `offset`.

        Raises:
            OSError: part of it may be written; the image is sound, and the rest is as before.
        """
        self._metadata.relieve()
        host = self._mapping.find(offset, size)
        if host:
            self._file.writev(host, buffers)
            return
        extents = self._mapping.extents(offset, size)
        if len(extents) == 1 and extents[0].kind is Kind.DATA:
            self._file.writev(extents[0].host, buffers)
            return
        try:
            self._write_extents(extents, offset, buffers)
        except OSError as err:
            if err.errno != errno.ENOSPC or not self._refcounts.released:
                raise
            self._metadata.commit()  # gives space back
            self._write_extents(self._mapping.extents(offset, size), offset, buffers)

    def _write_extents(
        self, extents: list[Extent], offset: int, buffers: Sequence[memoryview]
    ) -> None:
        done = start = 0  # from `start` to `done` there is no place to write to
        for extent in extents:
            if extent.kind is Kind.DATA:
                self._write_elsewhere(offset, start, done, buffers)
                self._file.writev(extent.host, cut(buffers, done, extent.size))
                start = done + extent.size
            done += extent.size
        self._write_elsewhere(offset, start, done, buffers)

    def _write_elsewhere(
        self, offset: int, start: int, stop: int, buffers: Sequence[memoryview]
    ) -> None:
        """Write the bytes `start` to `stop` of a request at `offset` to clusters as needed."""
        while start < stop:
            position = offset + start
            first = position >> self._cluster_bits
            last = (offset + stop - 1) >> self._cluster_bits
            count = self._unowned(first, last)
            end = min(offset + stop, (first + max(count, 1)) << self._cluster_bits)
            if count:
                end = self._write_new(position, end, cut(buffers, start, end - position))
            else:
                self._write_owned(position, end, cut(buffers, start, end - position))
            start = end - offset

    def _unowned(self, first: int, last: int) -> int:
        """Return how many clusters from `first` on have no place of their own in the file."""
        mask = (1 << self._l2_bits) - 1
        number = first
        while number <= last:
            index = number >> self._l2_bits
            stop = min(last + 1, (index + 1) << self._l2_bits)
            table = self._tables.get(index)
            if table is None:
                number = stop
                continue
            words = table.words
            while number < stop:
                entry = words[(number & mask) * self._step]
                if entry & COPIED and not entry & COMPRESSED and entry & OFFSET_MASK:
                    return number - first
                number += 1
        return number - first

    def _write_owned(self, start: int, stop: int, buffers: Sequence[memoryview]) -> None:
        """Write within one cluster that has its place already, but not all contents in it."""
        cluster = start >> self._cluster_bits
        (segment,) = self._segments(cluster, 1)
        words = segment.table.words
        place = segment.first * self._step
        host = words[place] & OFFSET_MASK
        granule = 1 << self._subcluster_bits
        self._write_padded(
            start, stop, host - (cluster << self._cluster_bits), (granule, granule), buffers
        )
        words[place] = host | COPIED
        if self._step == 2:
            touched = self._touched(cluster, start, stop)
            words[place + 1] = (words[place + 1] | touched) & ~(touched << SUBCLUSTERS)
        self._touch(segment)

    def _write_new(self, start: int, stop: int, buffers: Sequence[memoryview]) -> int:
        """Write to new clusters, as many as there are in a row; return where it ended."""
        first = start >> self._cluster_bits
        last = (stop - 1) >> self._cluster_bits
        segments = list(self._segments(first, last - first + 1))
        host, count = self._refcounts.allocate(last - first + 1)
        try:
            if count <= last - first:
                last = first + count - 1
                stop = (last + 1) << self._cluster_bits
                segments = list(self._segments(first, count))
                buffers = cut(buffers, 0, stop - start)
            copies = self._holds_data(segments[0], 0), self._holds_data(segments[-1], -1)
            head, tail = (
                self._cluster_size if copied else 1 << self._subcluster_bits for copied in copies
            )
            self._write_padded(
                start, stop, (host - first) << self._cluster_bits, (head, tail), buffers
            )
        except BaseException:
            self._refcounts.cancel(host, count)
            self._metadata.give_back(host, count)
            raise
        for segment in segments:
            self._link(segment, host << self._cluster_bits, start, stop)
            host += segment.count
        return stop

    def _write_padded(
        self,
        start: int,
        stop: int,
        shift: int,
        granules: tuple[int, int],
        buffers: Sequence[memoryview],
    ) -> None:
        """Write to the file at `shift` from the disk's offsets, from granule to granule.

        The rest of the granules is copied from the disk, unless disk and file are zeros there.
        """
        head = align_down(start, granules[0])
        tail = align_up(stop, granules[1])
        is_fresh = head + shift >= self._file.end
        parts = list(buffers)
        if head < start and not (is_fresh and self._reads_zero(head, start)):
            parts.insert(0, self._contents(head, start))
        else:
            head = start
        if stop < tail and not (is_fresh and self._reads_zero(stop, tail)):
            parts.append(self._contents(stop, tail))
        self._file.writev(head + shift, parts)

    def _reads_zero(self, start: int, stop: int) -> bool:
        stop = min(stop, self._size)
        return start >= stop or self._reader.reads_zero(start, stop - start)

    def _contents(self, start: int, stop: int) -> memoryview:
        """Return the disk's contents; zeros beyond its end."""
        data = memoryview(bytearray(stop - start))
        size = min(stop, self._size) - start
        if size > 0:
            self._reader.read(start, [data[:size]], size)
        return data

    def _segments(self, first: int, count: int) -> Iterator[Segment]:
        """Yield the L2 tables of clusters, made writable."""
        mask = (1 << self._l2_bits) - 1
        while count:
            index = first >> self._l2_bits
            part = min(count, mask + 1 - (first & mask))
            yield Segment(
                self._tables.get_writable(index, self._refcounts), index, first & mask, part
            )
            first += part
            count -= part

    def _holds_data(self, segment: Segment, which: int) -> bool:
        """Tell whether the first (0) or last (-1) cluster of a segment has contents to copy."""
        place = (segment.first + (segment.count - 1 if which else 0)) * self._step
        entry = segment.table.words[place]
        if self._step == 1 or entry & COMPRESSED:
            return bool(entry)
        return bool(segment.table.words[place + 1] & ALL_SUBCLUSTERS)

    def _touched(self, cluster: int, start: int, stop: int) -> int:
        """Return a bitmap of the subclusters of `cluster` that a range of the disk touches."""
        begin = cluster << self._cluster_bits
        first = max(start - begin, 0) >> self._subcluster_bits
        last = (min(stop - begin, self._cluster_size) - 1) >> self._subcluster_bits
        return (1 << (last + 1)) - (1 << first)

    def _link(self, segment: Segment, host: int, start: int, stop: int) -> None:
        """Map a segment to the clusters from `host` on; release its former ones."""
        words = segment.table.words
        first = segment.first * self._step
        end = first + segment.count * self._step
        stop_host = host + (segment.count << self._cluster_bits)
        entries = range(host | COPIED, stop_host | COPIED, self._cluster_size)
        if self._step == 1:
            old = words[first:end]
            if any(old):
                for entry in old:
                    self.release(entry)
            words[first:end] = array("Q", entries)
        else:
            cluster = (segment.index << self._l2_bits) + segment.first
            for place, entry in zip(range(first, end, 2), entries, strict=True):
                old_entry, bitmap = words[place], words[place + 1]
                if old_entry & COMPRESSED or bitmap & ALL_SUBCLUSTERS:
                    bitmap = ALL_SUBCLUSTERS
                else:
                    touched = self._touched(cluster, start, stop)
                    bitmap = touched | bitmap & ~(touched << SUBCLUSTERS)
                self.release(old_entry)
                words[place], words[place + 1] = entry, bitmap
                cluster += 1
        self._touch(segment)

    def _touch(self, segment: Segment) -> None:
        first = segment.first * self._step
        self._tables.touch(segment.index, segment.table, first, first + segment.count * self._step)

    def release(self, entry: int) -> None:
        """Release the host clusters of an L2 entry that has been, or is about to be, replaced."""
        if entry & COMPRESSED:
            self._reader.compressed.forget(entry)
            self._refcounts.release(*self._reader.compressed.clusters(entry))
        elif entry & OFFSET_MASK:
            self._refcounts.release((entry & OFFSET_MASK) >> self._cluster_bits)
