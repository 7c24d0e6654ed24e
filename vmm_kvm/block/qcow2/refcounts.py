"""Reference counts of an image's host clusters: looking up, allocating, releasing.

All of it happens in memory; `vmm_kvm.block.qcow2.metadata` says when what is written. A release is
only noted: while the image on disk still refers to a cluster, its count must not drop, and nobody
else may use it.

Clusters are numbered from the start of the file. A table names blocks, a block holds the counts
of consecutive clusters, and both count themselves.

Source: qcow2 specification, "Host cluster management".
"""

import errno
from array import array

from vmm_kvm.block.file import HostFile
from vmm_kvm.block.image import LastingError
from vmm_kvm.block.qcow2.counts import pack, unpack, width
from vmm_kvm.block.qcow2.faults import Faults
from vmm_kvm.block.qcow2.header import (
    REFCOUNT_TABLE_BYTES_MAX,
    REFCOUNT_TABLE_FIELDS,
    REFCOUNT_TABLE_FIELDS_OFFSET,
    Header,
)

_TABLE_OFFSET_MASK = ~0x1FF & (1 << 64) - 1
_OFFSET_END = 1 << 56  # an L2 entry can name no higher host offset
_CACHE_BYTES = 16 << 20
_RESERVED_MAX = 1 << 18
_RELEASES_MAX = 4096


class Block:
    """A refcount block in memory."""

    __slots__ = ("counts", "first", "is_new", "last")

    def __init__(self, counts: bytearray, *, is_new: bool) -> None:
        """Take ownership of `counts`, as they are in memory."""
        self.counts = counts
        self.is_new = is_new
        """Nothing on disk refers to it, nor has it ever been written."""
        self.first = len(counts)
        """The part changed since the last write: bytes from `first` to before `last`."""
        self.last = 0

    def change(self, start: int, data: bytes) -> None:
        """Change counts, `start` in bytes."""
        end = start + len(data)
        self.counts[start:end] = data
        self.first = min(self.first, start)
        self.last = max(self.last, end)


class Refcounts:
    """The refcount structures of one image that is open for writing, or being checked."""

    def __init__(self, file: HostFile, header: Header, faults: Faults) -> None:
        """Read the refcount table; blocks are read when they are needed.

        Raises:
            OSError: it cannot be read.
        """
        self._file = file
        self._faults = faults
        self._cluster_bits = header.cluster_bits
        self.bits = header.refcount_bits
        """Of a count on disk, 1 to 64."""
        self._width = width(header.refcount_bits)
        self._one = (1).to_bytes(self._width, "big")
        self.per_block = (8 << header.cluster_bits) // header.refcount_bits
        """Counts, so clusters, in a block."""
        self.table_offset = header.refcount_table_offset
        self.table_clusters = header.refcount_table_clusters
        size = header.refcount_table_clusters << header.cluster_bits
        self.table = array("Q", bytes(file.read(header.refcount_table_offset, size)))
        self.table.byteswap()
        self._blocks: dict[int, Block] = {}
        self._blocks_max = max(_CACHE_BYTES >> header.cluster_bits, 16)
        self._dirty: set[int] = set()
        self._dirty_table: set[int] = set()
        self._is_moving = False
        self._old_tables: list[tuple[int, int]] = []
        self._hint = 0  # no cluster before this one is free
        self.released: list[tuple[int, int]] = []
        """Releases for the next commit: first cluster, number."""
        self.reserved: set[int] = set()
        """Clusters with metadata; an allocation that yields one shows that the counts are wrong."""
        self._reserve_own()

    def _reserve_own(self) -> None:
        self.reserve(0, 1)
        self.reserve(self.table_offset >> self._cluster_bits, self.table_clusters)
        for entry in self.table:
            if entry:
                self.reserve(entry >> self._cluster_bits, 1)

    def reserve(self, first: int, count: int) -> None:
        """Note clusters that hold metadata; a safety net, which ends at some size."""
        if len(self.reserved) < _RESERVED_MAX:
            self.reserved.update(range(first, first + count))

    # Looking up

    def get(self, cluster: int) -> int:
        """Return the count of one cluster."""
        index, entry = divmod(cluster, self.per_block)
        if index >= len(self.table) or not self.table[index]:
            return 0
        start = entry * self._width
        return int.from_bytes(self._block(index).counts[start : start + self._width], "big")

    def counts(self, index: int) -> bytearray | None:
        """Return all counts of a block as they are in memory, None if there is no such block."""
        if index >= len(self.table) or not self.table[index]:
            return None
        return self._block(index).counts

    def _block(self, index: int) -> Block:
        block = self._blocks.get(index)
        if block is not None:
            return block
        offset = self.table[index] & _TABLE_OFFSET_MASK
        if offset & ((1 << self._cluster_bits) - 1) or not 0 < offset < _OFFSET_END:
            raise self._faults.corrupt(f"refcount block {index} at invalid offset {offset:#x}")
        data = self._file.read(offset, 1 << self._cluster_bits)
        if len(self._blocks) >= self._blocks_max:
            for old in [n for n in self._blocks if n not in self._dirty][: self._blocks_max // 2]:
                del self._blocks[old]
        block = self._blocks[index] = Block(unpack(data, self.bits), is_new=False)
        return block

    def is_crowded(self) -> bool:
        """Tell whether so much has changed that it should be written before more does."""
        return len(self._dirty) >= self._blocks_max // 2 or len(self.released) >= _RELEASES_MAX

    # Allocating

    def allocate(self, count: int) -> tuple[int, int]:
        """Take up to `count` free clusters, the first that there are; return first and number.

        Raises:
            OSError: the counts are corrupt or cannot be read; EFBIG at the format's limit.
        """
        while True:
            index, entry = divmod(self._hint, self.per_block)
            if (self._hint + count) << self._cluster_bits >= _OFFSET_END:
                raise LastingError(errno.EFBIG, "the image file is full")
            if index >= len(self.table) or not self.table[index]:
                whole = min(index, len(self.table)) * self.per_block
                self._add_blocks(whole, {index})
                continue
            block = self._block(index)
            start = _find_zero(block.counts, entry * self._width, self._width)
            if start < 0:
                self._hint = (index + 1) * self.per_block
                continue
            wanted = block.counts[start : start + count * self._width]
            found = (len(wanted) - len(wanted.lstrip(b"\0"))) // self._width
            first = index * self.per_block + start // self._width
            self._check_free(first, found)
            block.change(start, self._one * found)
            self._dirty.add(index)
            self._hint = first + found
            return first, found

    def cancel(self, first: int, count: int) -> None:
        """Release allocated clusters to which nothing refers yet."""
        self._add(first, count, -1)

    def release(self, first: int, count: int = 1) -> None:
        """Drop one reference to each of some clusters, once nothing on disk refers to them."""
        if self.released and sum(self.released[-1]) == first:
            first, count = self.released[-1][0], self.released.pop()[1] + count
        self.released.append((first, count))

    def _check_free(self, first: int, count: int) -> None:
        if not self.reserved.isdisjoint(range(first, first + count)):
            raise self._faults.corrupt("a cluster with metadata has no reference count")

    def replace(self, cluster: int, value: int) -> None:
        """Set the count of a cluster whose block there is, as a repair does."""
        index, entry = divmod(cluster, self.per_block)
        if value >> self.bits:
            raise LastingError(errno.EOVERFLOW, "a reference count does not fit")
        self._block(index).change(entry * self._width, value.to_bytes(self._width, "big"))
        self._dirty.add(index)
        if not value:
            self._hint = min(self._hint, cluster)

    def _add(self, first: int, count: int, change: int) -> list[int]:
        """Change counts; return which clusters became free."""
        freed: list[int] = []
        while count:
            index, entry = divmod(first, self.per_block)
            part = min(count, self.per_block - entry)
            if index >= len(self.table) or not self.table[index]:
                raise self._faults.corrupt(f"cluster {first} is in use and has no refcount block")
            block = self._block(index)
            start = entry * self._width
            size = part * self._width
            if change == -1 and block.counts[start : start + size] == self._one * part:
                block.change(start, bytes(size))
                freed += range(first, first + part)
            else:
                for number in range(part):
                    at = start + number * self._width
                    value = int.from_bytes(block.counts[at : at + self._width], "big") + change
                    if value < 0:
                        raise self._faults.corrupt(f"cluster {first + number} is in use and free")
                    block.change(at, value.to_bytes(self._width, "big"))
                    if not value:
                        freed.append(first + number)
            self._dirty.add(index)
            first += part
            count -= part
        if freed:
            self._hint = min(self._hint, freed[0])
        return freed

    # Growing

    def add_blocks(self, base: int, clusters: range) -> range:
        """Make blocks for all of `clusters` at `base`; nothing from there on is in use.

        Returns the clusters that they, and a table that had to grow, are in.
        """
        wanted = range(clusters.start // self.per_block, -(-clusters.stop // self.per_block))
        missing = {n for n in wanted if n >= len(self.table) or not self.table[n]}
        return range(base, base + self._add_blocks(base, missing))

    def _add_blocks(self, base: int, indices: set[int]) -> int:
        """Make the missing blocks `indices`, at the free clusters from `base` on.

        They count themselves, so that they may need further ones; and where the table is too
        short for them, a longer one is put behind them. Returns how many clusters that took.
        """
        missing = set(indices)
        table_clusters = 0
        while missing:
            needed = max(missing) + 1
            if needed > len(self.table) and needed > self._entries(table_clusters):
                table_clusters = self._longer(needed)
            used = len(missing) + table_clusters
            touched = range(base // self.per_block, (base + used - 1) // self.per_block + 1)
            further = {n for n in touched if n >= len(self.table) or not self.table[n]} - missing
            if not further:
                break
            missing |= further
        used = len(missing) + table_clusters
        if not used:
            return 0
        self._check_free(base, used)
        self._file.reserve(base << self._cluster_bits, used << self._cluster_bits)
        if table_clusters:
            self._move_table(base + len(missing), table_clusters)
        for place, index in enumerate(sorted(missing)):
            self.table[index] = (base + place) << self._cluster_bits
            self._dirty_table.add(index)
            self._blocks[index] = Block(bytearray(self.per_block * self._width), is_new=True)
            self._dirty.add(index)
        self._add(base, used, 1)
        self.reserve(base, used)
        return used

    def _entries(self, clusters: int) -> int:
        return clusters << (self._cluster_bits - 3)

    def _longer(self, needed: int) -> int:
        """Return how many clusters a table gets that needs `needed` entries and more later."""
        clusters = -(-needed << 3 >> self._cluster_bits)
        clusters = max(clusters + 1, self.table_clusters * 3 // 2)
        while clusters << self._cluster_bits > REFCOUNT_TABLE_BYTES_MAX:
            clusters -= 1
            if self._entries(clusters) < needed:
                raise LastingError(errno.EFBIG, "the image file is full")
        return clusters

    def _move_table(self, first: int, clusters: int) -> None:
        old = (self.table_offset >> self._cluster_bits, self.table_clusters)
        if self._is_moving:  # nothing on disk refers to the one before
            self.cancel(*old)
            self.reserved.difference_update(range(old[0], sum(old)))
        else:
            self._old_tables.append(old)
        self.table_offset = first << self._cluster_bits
        self.table_clusters = clusters
        self.table.frombytes(bytes((self._entries(clusters) - len(self.table)) * 8))
        self._is_moving = True

    # Writing, in the order that `Metadata.commit` says

    def is_clean(self) -> bool:
        """Tell whether there is nothing to write or release."""
        return not (self._dirty or self._dirty_table or self._is_moving or self.released)

    def write_new(self) -> bool:
        """Write what nothing on disk refers to yet; tell whether there was anything."""
        fresh = [index for index in self._dirty if self._blocks[index].is_new]
        for index in sorted(fresh):
            block = self._blocks[index]
            self._file.write(self.table[index], pack(block.counts, self.bits))
            self._is_written(index)
        if self._is_moving:
            self._file.write(self.table_offset, _big_endian(self.table))
            self._dirty_table.clear()
        return bool(self._dirty_table) or self._is_moving

    def write_links(self) -> None:
        """Write the table's entries, or where it is now, and blocks that have changed."""
        if self._is_moving:
            fields = REFCOUNT_TABLE_FIELDS.pack(self.table_offset, self.table_clusters)
            self._file.write(REFCOUNT_TABLE_FIELDS_OFFSET, fields)
            self._is_moving = False
            self.released += self._old_tables
            self._old_tables.clear()
        for index in sorted(self._dirty_table):
            self._file.write(self.table_offset + index * 8, self.table[index].to_bytes(8, "big"))
            self._dirty_table.discard(index)
        self._write_blocks()

    def _write_blocks(self) -> None:
        for index in sorted(self._dirty):
            block = self._blocks[index]
            # Whole bytes on disk, which hold up to 8 counts.
            step = self._width * max(1, 8 // self.bits)
            first = block.first // step * step
            last = -(-block.last // step) * step
            data = pack(block.counts[first:last], self.bits)
            offset = self.table[index] & _TABLE_OFFSET_MASK
            self._file.write(offset + first // self._width * self.bits // 8, data)
            self._is_written(index)

    def _is_written(self, index: int) -> None:
        block = self._blocks[index]
        block.is_new = False
        block.first, block.last = len(block.counts), 0
        self._dirty.discard(index)

    def apply_releases(self) -> list[tuple[int, int]]:
        """Make the noted releases; return the runs of clusters that are free now."""
        runs: list[tuple[int, int]] = []
        self.released.sort(reverse=True)
        while self.released:
            # Forgotten even on failure: a leak does less harm than one release too many.
            for cluster in self._add(*self.released.pop(), -1):
                if runs and sum(runs[-1]) == cluster:
                    runs[-1] = (runs[-1][0], runs[-1][1] + 1)
                else:
                    runs.append((cluster, 1))
                self.reserved.discard(cluster)
        self._write_blocks()
        return runs


def _find_zero(counts: bytearray, start: int, size: int) -> int:
    """Return where the first count of zero lies, in bytes from `start` on, or -1."""
    zero = bytes(size)
    found = counts.find(zero, start)
    while found >= 0 and found % size:
        found = counts.find(zero, found + size - found % size)
    return found


def _big_endian(numbers: "array[int]") -> bytes:
    swapped = array("Q", numbers)
    swapped.byteswap()
    return swapped.tobytes()
