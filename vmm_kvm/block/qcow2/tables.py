"""The L1 table and a cache of L2 tables: where guest clusters are.

All of it changes in memory; `vmm_kvm.block.qcow2.metadata` says when what is written. A table that
an internal snapshot shares is copied before it changes.

Source: qcow2 specification, "Cluster mapping".
"""

from array import array

from vmm_kvm.block.file import HostFile
from vmm_kvm.block.qcow2.faults import Faults
from vmm_kvm.block.qcow2.header import Header
from vmm_kvm.block.qcow2.refcounts import Refcounts

COPIED = 1 << 63
"""The cluster is referred to once: it may be written in place."""
OFFSET_MASK = 0x00FF_FFFF_FFFF_FE00

_CACHE_BYTES = 32 << 20
_CACHE_TABLES_MAX = 16384
_CACHE_TABLES_MIN = 8


class L2Table:
    """One L2 table in memory; `words` in the order of the disk, in native integers."""

    __slots__ = ("first", "is_new", "last", "offset", "words")

    def __init__(self, words: "array[int]", offset: int, *, is_new: bool) -> None:
        """Take ownership of `words`, which are, or will be, at `offset` in the file."""
        self.words = words
        self.offset = offset
        self.is_new = is_new
        """Nothing on disk refers to it, nor has it ever been written."""
        self.first = len(words)
        """The part changed since the last write: words from `first` to before `last`."""
        self.last = 0


class Tables:
    """The active L1 table of one image, and those L2 tables that have been needed lately."""

    def __init__(self, file: HostFile, header: Header, faults: Faults) -> None:
        """Read the L1 table.

        Raises:
            OSError: it cannot be read.
        """
        self._file = file
        self._faults = faults
        self._cluster_size = header.cluster_size
        self._cluster_bits = header.cluster_bits
        self._offset = header.l1_offset
        self.l1 = read_words(file, header.l1_offset, header.l1_size)
        self._l1_dirty: set[int] = set()
        self._cache: dict[int, L2Table] = {}
        count = _CACHE_BYTES >> header.cluster_bits
        self._cache_max = min(max(count, _CACHE_TABLES_MIN), _CACHE_TABLES_MAX)
        self._dirty: set[int] = set()

    def get(self, index: int) -> L2Table | None:
        """Return the L2 table of L1 entry `index`, None if there is none.

        Raises:
            OSError: it cannot be read, or the image is corrupt.
        """
        table = self._cache.get(index)
        if table is not None:
            return table
        if index >= len(self.l1):
            return None
        offset = self.l1[index] & OFFSET_MASK
        if not offset:
            return None
        if offset & (self._cluster_size - 1):
            raise self._faults.corrupt(f"L2 table {index} at invalid offset {offset:#x}")
        table = L2Table(
            read_words(self._file, offset, self._cluster_size >> 3), offset, is_new=False
        )
        self._insert(index, table)
        return table

    def next_index(self, index: int, stop: int) -> int:
        """Return the first L1 entry from `index` on that has a table; `stop` if none before it."""
        l1, count = self.l1, min(stop, len(self.l1))
        while index < count and not l1[index] & OFFSET_MASK:
            index += 1
        return index if index < count else stop

    def get_writable(self, index: int, refcounts: Refcounts) -> L2Table:
        """Return the L2 table of L1 entry `index` to change it; make or copy it if need be.

        The caller reports each change of its words by `touch`.

        Raises:
            OSError: as `get`, or there is no room for it.
        """
        table = self.get(index)
        if table is not None and self.l1[index] & COPIED:
            return table
        words = table.words[:] if table else array("Q", bytes(self._cluster_size))
        cluster, _ = refcounts.allocate(1)
        copy = L2Table(words, cluster << self._cluster_bits, is_new=True)
        try:
            self._file.reserve(copy.offset, self._cluster_size)
        except BaseException:
            refcounts.cancel(cluster, 1)
            raise
        if table is not None:
            refcounts.release(table.offset >> self._cluster_bits)
        self._insert(index, copy)
        self._dirty.add(index)
        self.l1[index] = copy.offset | COPIED
        self._l1_dirty.add(index)
        refcounts.reserve(cluster, 1)
        return copy

    def touch(self, index: int, table: L2Table, first: int, last: int) -> None:
        """Note that the words from `first` to before `last` of table `index` have changed."""
        table.first = min(table.first, first)
        table.last = max(table.last, last)
        self._cache[index] = table  # where it was may have been needed for another
        self._dirty.add(index)

    def flag(self, index: int, *, is_copied: bool) -> None:
        """Set whether L1 entry `index` says that its table is this disk's alone."""
        entry = self.l1[index] & ~COPIED | (COPIED if is_copied else 0)
        if entry != self.l1[index]:
            self.l1[index] = entry
            self._l1_dirty.add(index)

    def _insert(self, index: int, table: L2Table) -> None:
        if len(self._cache) >= self._cache_max:
            # Drop the oldest half: counting each use would cost more than it saves.
            clean = [old for old in self._cache if old not in self._dirty]
            for old in clean[: self._cache_max // 2]:
                del self._cache[old]
        self._cache[index] = table

    def is_crowded(self) -> bool:
        """Tell whether so much has changed that it should be written before more does."""
        return len(self._dirty) >= self._cache_max // 2

    # Writing, in the order that `Metadata.commit` says

    def is_clean(self) -> bool:
        """Tell whether there is nothing to write."""
        return not (self._dirty or self._l1_dirty)

    def write_new(self) -> None:
        """Write tables that nothing on disk refers to yet."""
        for index in sorted(self._dirty):
            table = self._cache[index]
            if table.is_new:
                self._write(table, 0, len(table.words))
                table.is_new = False
                self._dirty.discard(index)

    def write_links(self) -> None:
        """Write changes of other tables, then those of the L1 table."""
        for index in sorted(self._dirty):
            table = self._cache[index]
            self._write(table, table.first, table.last)
            self._dirty.discard(index)
        run: list[int] = []
        for index in sorted(self._l1_dirty):
            if run and index != run[-1] + 1:
                self._write_l1(run)
                run = []
            run.append(index)
        if run:
            self._write_l1(run)

    def _write(self, table: L2Table, first: int, last: int) -> None:
        words = table.words[first:last]
        words.byteswap()
        self._file.write(table.offset + first * 8, words.tobytes())
        table.first, table.last = len(table.words), 0

    def _write_l1(self, run: list[int]) -> None:
        words = self.l1[run[0] : run[-1] + 1]
        words.byteswap()
        self._file.write(self._offset + run[0] * 8, words.tobytes())
        self._l1_dirty.difference_update(run)


def read_words(file: HostFile, offset: int, count: int) -> "array[int]":
    """Read `count` big-endian 64-bit words; what lies beyond the end of the file is zero."""
    words = array("Q", bytes(file.read(offset, count * 8)))
    words.byteswap()
    return words
