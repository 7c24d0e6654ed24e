"""Reading a disk: from the image, its compressed clusters, and its base."""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from vmm_kvm.block.file import HostFile
from vmm_kvm.block.qcow2.compressed import CompressedClusters
from vmm_kvm.block.qcow2.header import Header
from vmm_kvm.block.qcow2.mapping import Extent, Kind, Mapping
from vmm_kvm.block.vectors import cut, fill, fill_zeros

if TYPE_CHECKING:
    from vmm_kvm.block.image import StoredImage


_REGION = 1 << 30
"""Bytes whose extents are in memory at once."""


class Reader:
    """Reads ranges of one disk."""

    def __init__(
        self,
        file: HostFile,
        header: Header,
        mapping: Mapping,
        base: "StoredImage | None",
    ) -> None:
        """Read from `file` by `mapping`, and from `base` where nothing is allocated."""
        self._file = file
        self._mapping = mapping
        self._base = base
        self._cluster_mask = header.cluster_size - 1
        self.compressed = CompressedClusters(file, header)

    def read(self, offset: int, buffers: Sequence[memoryview], size: int) -> None:
        """Fill `buffers`, `size` bytes together, from `offset`.

        Raises:
            OSError: the file or a table cannot be read, or is corrupt.
        """
        host = self._mapping.find(offset, size)
        if host:
            self._file.readv(host, buffers)
            return
        extents = self._mapping.extents(offset, size)
        if len(extents) == 1:
            self._read_extent(extents[0], offset, buffers)
            return
        done = 0
        for extent in extents:
            self._read_extent(extent, offset + done, cut(buffers, done, extent.size))
            done += extent.size

    def _read_extent(self, extent: Extent, offset: int, buffers: Sequence[memoryview]) -> None:
        kind, host, size = extent
        if kind in {Kind.DATA, Kind.SHARED}:
            self._file.readv(host, buffers)
        elif kind is Kind.COMPRESSED:
            start = offset & self._cluster_mask
            fill(buffers, memoryview(self.compressed.read(host))[start : start + size])
        elif kind is Kind.HOLE and self._base is not None:
            self._base.readv(offset, buffers)
        else:
            fill_zeros(buffers)

    def reads_zero(self, offset: int, size: int) -> bool:
        """Tell by the tables whether a range reads as zero, without reading it."""
        for extent in self._mapping.extents(offset, size):
            if extent.kind > Kind.ZERO:
                return False
            if extent.kind is Kind.HOLE and self._base is not None:
                shared = min(extent.size, self._base.size - offset)
                if shared > 0 and not self._base.reads_zero(offset, shared):
                    return False
            offset += extent.size
        return True

    def parts(self, offset: int, size: int) -> Iterator[tuple[int, bool]]:
        """Yield the sizes of the parts of a range, and whether each is known to read as zero.

        Clusters that are allocated and were never written are holes in the file.
        """
        end = offset + size
        while offset < end:
            stop = min(end, (offset // _REGION + 1) * _REGION)
            stop = max(stop, self._mapping.end_of_gap(offset, end))
            for kind, host, length in self._mapping.extents(offset, stop - offset):
                if kind in {Kind.DATA, Kind.SHARED}:
                    yield from self._file.parts(host, length)
                elif kind is Kind.HOLE and self._base is not None:
                    shared = max(0, min(length, self._base.size - offset))
                    if shared:
                        yield from self._base.parts(offset, shared)
                    if shared < length:
                        yield length - shared, True
                else:
                    yield length, kind <= Kind.ZERO
                offset += length
