"""A qcow2 image that is open as a disk. See `vmm_kvm.block.image.Image`."""

import errno
import os
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from vmm_kvm.block.file import HostFile
from vmm_kvm.block.image import LastingError
from vmm_kvm.block.qcow2.eraser import Eraser
from vmm_kvm.block.qcow2.faults import Faults
from vmm_kvm.block.qcow2.header import Header, Incompatible
from vmm_kvm.block.qcow2.mapping import Mapping
from vmm_kvm.block.qcow2.metadata import Metadata
from vmm_kvm.block.qcow2.reader import Reader
from vmm_kvm.block.qcow2.tables import Tables
from vmm_kvm.block.qcow2.writer import Writer
from vmm_kvm.block.vectors import cut, fill_zeros
from vmm_kvm.errors import ImageError
from vmm_kvm.scatter import total

if TYPE_CHECKING:
    from vmm_kvm.block.image import StoredImage


class Changes:
    """The parts that only an image open for writing has."""

    __slots__ = ("eraser", "metadata", "writer")

    def __init__(self, metadata: Metadata, writer: Writer, eraser: Eraser) -> None:
        """Keep them together."""
        self.metadata = metadata
        self.writer = writer
        self.eraser = eraser


class Qcow2Image:
    """A qcow2 image; owns its file and its base."""

    __slots__ = ("_base", "_changes", "_file", "_reader", "header", "is_read_only", "size")

    def __init__(self, file: HostFile, header: Header, base: "StoredImage | None") -> None:
        """Open the image in `file`; takes ownership of it and of `base`, if this succeeds.

        An image that was not closed, and says that its reference counts may be wrong, is repaired
        before it is written to.

        Raises:
            ImageError: the image is marked as corrupt, or cannot be repaired.
            OSError: it cannot be read.
        """
        self._file = file
        self._base = base
        self.header = header
        self.size = header.size
        self.is_read_only = file.is_read_only
        faults = Faults(file, header)
        tables = Tables(file, header, faults)
        mapping = Mapping(header, tables, faults)
        self._reader = Reader(file, header, mapping, base)
        self._changes: Changes | None = None
        if file.is_read_only:
            return
        if header.incompatible & Incompatible.CORRUPT:
            raise ImageError(f"{file.name}: marked as corrupt: it can only be opened read-only")
        metadata = Metadata(file, header, tables, faults)
        if header.incompatible & Incompatible.DIRTY:
            from vmm_kvm.block.qcow2.repair import repair  # noqa: PLC0415 - after a crash alone

            repair(file, header, metadata)
        metadata.begin()
        writer = Writer(file, header, mapping, self._reader, metadata)
        eraser = Eraser(header, self._reader, writer, metadata, base)
        self._changes = Changes(metadata, writer, eraser)

    def readv(self, offset: int, buffers: Sequence[memoryview]) -> None:
        """Fill all of `buffers`; what lies beyond the end of the disk is zero."""
        size = total(buffers)
        if offset + size > self.size:
            inside = max(self.size - offset, 0)
            fill_zeros(cut(buffers, inside, size - inside))
            buffers = cut(buffers, 0, inside)
            size = inside
        if size:
            self._reader.read(offset, buffers, size)

    def reads_zero(self, offset: int, length: int) -> bool:
        """Tell whether a range is known to read as zero, without reading it."""
        return self._reader.reads_zero(offset, length)

    def parts(self, offset: int, length: int) -> Iterator[tuple[int, bool]]:
        """Yield the sizes of the parts of a range, and whether each is known to read as zero."""
        return self._reader.parts(offset, length)

    def writev(self, offset: int, buffers: Sequence[memoryview]) -> None:
        """Write all of `buffers`."""
        size = total(buffers)
        changes = self._check(offset, size)
        if size:
            changes.writer.write(offset, buffers, size)

    def flush(self) -> None:
        """Make everything written so far durable, and the mapping that leads to it."""
        if self._changes:
            self._changes.metadata.commit()

    def discard(self, offset: int, length: int) -> None:
        """Free the clusters that lie in a range as a whole."""
        self._check(offset, length).eraser.discard(offset, length)

    def write_zeroes(self, offset: int, length: int, *, may_unmap: bool) -> None:
        """Make a range read as zero; with `may_unmap` its clusters are freed."""
        changes = self._check(offset, length)
        if length:
            changes.eraser.write_zeroes(offset, length, may_unmap=may_unmap)

    def close(self) -> None:
        """Write the metadata back and close the file and the base; idempotent.

        Raises:
            OSError: not everything could be written; the file is closed all the same.
        """
        changes, self._changes = self._changes, None
        try:
            if changes:
                changes.metadata.commit()
                changes.metadata.commit()  # writes the releases of the first one
        finally:
            self._file.close()
            if self._base:
                self._base.close()

    def _check(self, offset: int, length: int) -> Changes:
        if self._changes is None:
            raise LastingError(errno.EROFS, os.strerror(errno.EROFS))
        if offset < 0 or length < 0 or offset + length > self.size:
            raise LastingError(errno.EINVAL, "beyond the end of the disk")
        return self._changes
