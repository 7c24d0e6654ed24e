"""Raw images: the file, or the block device, is the disk."""

import errno
import os
from collections.abc import Iterator, Sequence

from vmm_kvm.bits import align_up
from vmm_kvm.block.file import HostFile
from vmm_kvm.block.headers import SECTOR_SIZE, image_format
from vmm_kvm.block.image import LastingError
from vmm_kvm.block.vectors import cut, fill_zeros
from vmm_kvm.scatter import total


class RawImage:
    """A raw image; owns its file. See `vmm_kvm.block.image.Image`."""

    __slots__ = ("_file", "_is_probed", "is_read_only", "size")

    def __init__(self, file: HostFile, *, is_probed: bool) -> None:
        """Take ownership of `file`; its size now, rounded up to sectors, is the disk's.

        With `is_probed` nobody said that the file is raw: what would make it look like an image of
        another format is not written.
        """
        self._file = file
        self._is_probed = is_probed
        self.is_read_only = file.is_read_only
        self.size = align_up(file.size(), SECTOR_SIZE)

    def readv(self, offset: int, buffers: Sequence[memoryview]) -> None:
        """Fill all of `buffers`; what lies beyond the end of the disk is zero."""
        over = offset + total(buffers) - self.size
        if over > 0:  # never data that another program appended to the file
            inside = max(total(buffers) - over, 0)
            fill_zeros(cut(buffers, inside, over))
            buffers = cut(buffers, 0, inside)
            if not inside:
                return
        self._file.readv(offset, buffers)

    def reads_zero(self, offset: int, length: int) -> bool:
        """Tell whether a range is a hole in the file."""
        return self._file.is_hole(offset, length)

    def parts(self, offset: int, length: int) -> Iterator[tuple[int, bool]]:
        """Yield the sizes of the parts of a range, and whether each is a hole in the file."""
        return self._file.parts(offset, length)

    def writev(self, offset: int, buffers: Sequence[memoryview]) -> None:
        """Write all of `buffers`.

        Raises:
            OSError: EPERM if the first sector would be another format's header.
        """
        size = total(buffers)
        self._check(offset, size)
        if self._is_probed and offset < SECTOR_SIZE and size:
            done = self._write_first(offset, buffers, min(size, SECTOR_SIZE - offset))
            offset, buffers = offset + done, cut(buffers, done, size - done)
            if not buffers:
                return
        self._file.writev(offset, buffers)

    def flush(self) -> None:
        """Make everything written so far durable."""
        if not self.is_read_only:
            self._file.sync()

    def discard(self, offset: int, length: int) -> None:
        """Free the blocks of a range, where the file system can."""
        self._check(offset, length)
        if length:
            self._file.punch(offset, length)

    def write_zeroes(self, offset: int, length: int, *, may_unmap: bool) -> None:
        """Make a range read as zero; with `may_unmap` its blocks are freed."""
        self._check(offset, length)
        if length and not (may_unmap and self._file.punch(offset, length)):
            self._file.zero(offset, length)

    def close(self) -> None:
        """Close the file; idempotent."""
        self._file.close()

    def _write_first(self, offset: int, buffers: Sequence[memoryview], size: int) -> int:
        """Write the first `size` bytes of `buffers` into the first sector; returns `size`.

        They are copied before they are looked at: a guest can change its own at any time.
        """
        data = b"".join(map(bytes, cut(buffers, 0, size)))
        sector = self._file.read(0, SECTOR_SIZE)
        sector[offset : offset + size] = data
        found = image_format(bytes(sector))
        if found:
            text = f"a {found} header, on a disk of which nobody has said that its format is raw"
            raise LastingError(errno.EPERM, text)
        self._file.write(offset, data)
        return size

    def _check(self, offset: int, length: int) -> None:
        if self.is_read_only:
            raise LastingError(errno.EROFS, os.strerror(errno.EROFS))
        if offset < 0 or length < 0 or offset + length > self.size:
            raise LastingError(errno.EINVAL, "beyond the end of the disk")
