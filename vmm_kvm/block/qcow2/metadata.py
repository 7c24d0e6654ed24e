"""The metadata of an image that is open for writing, and the order in which it reaches the disk.

Changes collect in memory. A commit writes them so that the image on disk is sound at each moment:
what refers to a cluster is written after the cluster's count, what it holds, and the tables on the
way to it; and a count drops after the last reference is gone. A crash in between leaves clusters
that are counted and not used (a leak, which costs only space), never the reverse.

    1. new refcount blocks, new L2 tables, a refcount table that moves: nothing refers to them yet
    -- durable, along with the guest's data
    2. the refcount table's entries or its new place, counts that changed
    -- durable
    3. changed L2 entries, L1 entries
    -- durable
    4. releases: counts drop, and the blocks go back to the file system

A step that fails is done again by the next commit: nothing is forgotten before it is written. New
tables and blocks have their room in the file from the start, so that a full disk does not keep a
commit from giving space back.
"""

import errno

from vmm_kvm.block.file import HostFile
from vmm_kvm.block.image import LastingError
from vmm_kvm.block.qcow2.faults import Faults
from vmm_kvm.block.qcow2.header import AUTOCLEAR_OFFSET, INCOMPATIBLE_OFFSET, Header, Incompatible
from vmm_kvm.block.qcow2.refcounts import Refcounts
from vmm_kvm.block.qcow2.tables import OFFSET_MASK, Tables
from vmm_kvm.log import Log

log = Log(__name__)


class Metadata:
    """Tables and reference counts of one image that is open for writing."""

    def __init__(self, file: HostFile, header: Header, tables: Tables, faults: Faults) -> None:
        """Read the metadata for changes of the image whose mapping is `tables`.

        Raises:
            OSError: the refcount table cannot be read.
        """
        self._file = file
        self._header = header
        self._cluster_bits = header.cluster_bits
        self.faults = faults
        self.tables = tables
        self.refcounts = Refcounts(file, header, faults)
        l1_size = max(header.l1_size * 8, 1)
        self.refcounts.reserve(
            header.l1_offset >> self._cluster_bits, -(-l1_size >> self._cluster_bits)
        )
        for entry in tables.l1:
            if entry & OFFSET_MASK:
                self.refcounts.reserve((entry & OFFSET_MASK) >> self._cluster_bits, 1)

    def begin(self) -> None:
        """Clear the features that a program which changes the image must clear; durable after.

        Source: qcow2 specification, "autoclear_features", "incompatible_features" bit 0.
        """
        if self._header.version < 3:
            return
        is_dirty = self._header.incompatible & Incompatible.DIRTY
        if self._header.autoclear:
            self._file.write(AUTOCLEAR_OFFSET, bytes(8))
        if is_dirty:
            features = self._header.incompatible & ~Incompatible.DIRTY
            self._file.write(INCOMPATIBLE_OFFSET, features.to_bytes(8, "big"))
        if self._header.autoclear or is_dirty:
            self._file.sync()

    def relieve(self) -> None:
        """Commit if much has collected; called before each change.

        Raises:
            OSError: see `commit`; or EIO, because the image is corrupt.
        """
        if self.faults.is_corrupt:
            raise LastingError(errno.EIO, "the image is corrupt")
        if self.tables.is_crowded() or self.refcounts.is_crowded():
            self.commit()

    def commit(self) -> None:
        """Write all changes, and make them and all of the guest's data durable.

        Raises:
            OSError: not everything is written; the next commit writes the rest.
        """
        tables, refcounts = self.tables, self.refcounts
        if not (tables.is_clean() and refcounts.is_clean()) and not self.faults.is_corrupt:
            is_linked_later = refcounts.write_new()
            tables.write_new()
            if is_linked_later:
                self._file.sync()
            refcounts.write_links()
            if not tables.is_clean():
                self._file.sync()
                tables.write_links()
        self._file.sync()
        if refcounts.released and not self.faults.is_corrupt:
            for first, count in refcounts.apply_releases():
                self.give_back(first, count)

    def give_back(self, first: int, count: int) -> None:
        """Give the space of some clusters that are free back to the file system."""
        try:
            self._file.punch(first << self._cluster_bits, count << self._cluster_bits)
        except OSError as err:  # it costs space, nothing else
            log.debug("%s: punch hole: %s", self._file.name, err.strerror)
