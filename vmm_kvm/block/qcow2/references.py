"""An image's references: the number of times that its own tables name each host cluster.

Source: qcow2 specification, "Host cluster management", "Snapshots", "Bitmaps".
"""

import struct
from array import array
from collections import Counter
from collections.abc import Iterator

from vmm_kvm.block.file import HostFile
from vmm_kvm.block.qcow2.compressed import CompressedClusters
from vmm_kvm.block.qcow2.header import L1_BYTES_MAX, Autoclear, Header
from vmm_kvm.block.qcow2.mapping import ALL_SUBCLUSTERS, COMPRESSED, SUBCLUSTERS, ZERO
from vmm_kvm.block.qcow2.snapshots import read_snapshots
from vmm_kvm.block.qcow2.tables import OFFSET_MASK, read_words
from vmm_kvm.errors import ImageError

CHUNK = 1 << 16
_BITMAP_ENTRY = struct.Struct(">QIIBBHI")
_BITMAPS_MAX = 65535
_FINDINGS_MAX = 100


class References:
    """The counted references to each host cluster, and faults among them."""

    def __init__(self, file: HostFile, header: Header) -> None:
        """Count every reference of the image in `file`.

        Raises:
            OSError: the file cannot be read.
        """
        self._file = file
        self._header = header
        self._bits = header.cluster_bits
        # The last cluster of a file may be there in part.
        self._clusters = -(-file.size() >> self._bits)
        self._compressed = CompressedClusters(file, header)
        self.chunks: dict[int, array[int]] = {}
        """Counts of CHUNK clusters each; those that are missing are zero."""
        self.errors: list[str] = []
        """The first hundred faults."""
        self.error_count = 0
        self.data_clusters = 0
        """Clusters of the disk that have data in the file."""
        self.compressed_clusters = 0
        self.active_tables: dict[int, int] = {}
        """The L2 table of each L1 entry that has one: its offset."""
        self._count_all()

    def add(self, first: int, count: int, times: int, what: str) -> None:
        """Count `times` references to some clusters; tell if they are not in the file."""
        if first + count > self._clusters:
            self.error(f"{what} beyond the end of the file")
            count = max(self._clusters - first, 0)
        for cluster in range(first, first + count):
            chunk = self.chunks.get(cluster >> 16)
            if chunk is None:
                chunk = self.chunks[cluster >> 16] = array("I", bytes(CHUNK * 4))
            chunk[cluster & (CHUNK - 1)] += times

    def get(self, cluster: int) -> int:
        """Return how often a cluster is referred to."""
        chunk = self.chunks.get(cluster >> 16)
        return chunk[cluster & (CHUNK - 1)] if chunk else 0

    def error(self, what: str) -> None:
        """Note that something is wrong."""
        self.error_count += 1
        if len(self.errors) < _FINDINGS_MAX:
            self.errors.append(what)

    def _add_bytes(self, offset: int, size: int, what: str) -> None:
        if size:
            first = offset >> self._bits
            self.add(first, (offset + size - 1 >> self._bits) - first + 1, 1, what)

    def _count_all(self) -> None:
        header = self._header
        self.add(0, 1, 1, "header")
        self._count_refcounts()
        tables: Counter[int] = Counter()
        for index, offset in self._l1(header.l1_offset, header.l1_size, "L1 table"):
            self.active_tables[index] = offset
            tables[offset] += 1
        try:
            snapshots, size = read_snapshots(self._file, header)
        except ImageError as err:
            self.error(str(err))
        else:
            self._add_bytes(header.snapshots_offset, size, "snapshot table")
            for snapshot in snapshots:
                what = f"L1 table of snapshot {snapshot.identifier}"
                for _, offset in self._l1(snapshot.l1_offset, snapshot.l1_size, what):
                    tables[offset] += 1
        active = set(self.active_tables.values())
        for offset, times in tables.items():
            self.add(offset >> self._bits, 1, times, "L2 table")
            if offset >> self._bits < self._clusters:
                self._count_l2(offset, times, is_active=offset in active)
        if header.bitmaps and header.autoclear & Autoclear.BITMAPS:
            self._count_bitmaps()

    def _count_refcounts(self) -> None:
        header = self._header
        size = header.refcount_table_clusters << self._bits
        self._add_bytes(header.refcount_table_offset, size, "refcount table")
        for index, entry in enumerate(
            read_words(self._file, header.refcount_table_offset, size // 8)
        ):
            if not entry:
                continue
            if entry & (header.cluster_size - 1):
                self.error(f"refcount block {index} at invalid offset {entry:#x}")
            else:
                self.add(entry >> self._bits, 1, 1, f"refcount block {index}")

    def _l1(self, offset: int, size: int, what: str) -> Iterator[tuple[int, int]]:
        """Count an L1 table; yield which of its entries has which L2 table."""
        self._add_bytes(offset, size * 8, what)
        if offset + size * 8 > self._clusters << self._bits:
            return
        for index, entry in enumerate(read_words(self._file, offset, size)):
            table = entry & OFFSET_MASK
            if table & (self._header.cluster_size - 1):
                self.error(f"L2 table {index} at invalid offset {table:#x}")
            elif table:
                yield index, table

    def _count_l2(self, offset: int, times: int, *, is_active: bool) -> None:
        header = self._header
        words = read_words(self._file, offset, header.cluster_size >> 3)
        step = 2 if header.has_subclusters else 1
        mask = header.cluster_size - 1
        for place in range(0, len(words), step):
            entry = words[place]
            if not entry and (step == 1 or not words[place + 1]):
                continue
            if entry & COMPRESSED:
                self.add(*self._compressed.clusters(entry), times, "compressed cluster")
                self.compressed_clusters += is_active
                continue
            host = entry & OFFSET_MASK
            if host & mask:
                self.error(f"cluster at invalid offset {host:#x}")
                continue
            if entry & ZERO and (header.version < 3 or step == 2):
                self.error("a cluster with a zero flag that this image cannot have")
            if step == 2:
                bitmap = words[place + 1]
                if bitmap & ALL_SUBCLUSTERS & bitmap >> SUBCLUSTERS:
                    self.error("a subcluster that is both data and zero")
                if bitmap & ALL_SUBCLUSTERS and not host:
                    self.error("subclusters without a cluster")
            if host:
                self.add(host >> self._bits, 1, times, "cluster")
                self.data_clusters += is_active

    def _count_bitmaps(self) -> None:
        """Count persistent bitmaps: their directory, and each one's table and data."""
        bitmaps = self._header.bitmaps
        assert bitmaps is not None
        end = bitmaps.offset + bitmaps.size
        is_there = end <= self._clusters << self._bits
        if not is_there or bitmaps.offset % self._header.cluster_size:
            self.error("bitmap directory at invalid offset, or too large")
            return
        self._add_bytes(bitmaps.offset, bitmaps.size, "bitmap directory")
        position = bitmaps.offset
        for _ in range(min(bitmaps.total, _BITMAPS_MAX)):
            fields = _BITMAP_ENTRY.unpack(self._file.read(position, _BITMAP_ENTRY.size))
            table_offset, table_size, name_size, extra_size = *fields[:2], *fields[5:7]
            position += (_BITMAP_ENTRY.size + name_size + extra_size + 7) & ~7
            if table_size * 8 > L1_BYTES_MAX or position > end:
                self.error("bitmap directory is corrupt")
                return
            self._add_bytes(table_offset, table_size * 8, "bitmap table")
            if table_offset + table_size * 8 > self._clusters << self._bits:
                continue
            for entry in read_words(self._file, table_offset, table_size):
                if entry & OFFSET_MASK:
                    self.add((entry & OFFSET_MASK) >> self._bits, 1, 1, "bitmap")
