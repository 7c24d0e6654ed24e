"""The file that an image lies in: whole vectored transfers, durability, holes."""

import errno
import os
from collections.abc import Callable, Iterator, Sequence

from vmm_kvm.bits import align_up
from vmm_kvm.block import fallocate
from vmm_kvm.block.image import LastingError
from vmm_kvm.block.vectors import cut, fill_zeros, zeros
from vmm_kvm.log import Log
from vmm_kvm.scatter import Scatter, total

log = Log(__name__)

_IOV_MAX = 1024  # Linux: buffers in one preadv or pwritev
_GRAIN = 64 << 10
"""Holes are told apart from data no more finely than this."""
_END = 1 << 63
_NOT_SUPPORTED = {errno.EOPNOTSUPP, errno.ENOSYS, errno.ENODEV, errno.EINVAL}


class HostFile:
    """A regular file or block device at an open descriptor, which it owns.

    Faults are OSError with the kernel's errno. Not thread-safe.
    """

    __slots__ = (
        "_is_sync_lost",
        "_is_written",
        "_unsupported",
        "end",
        "fd",
        "is_read_only",
        "name",
    )

    def __init__(self, fd: int, name: str, *, is_read_only: bool) -> None:
        """Take ownership of `fd`; `name` is for messages."""
        self.fd = fd
        self.name = name
        self.is_read_only = is_read_only
        self._unsupported: set[Callable[[int, int, int], None]] = set()
        self._is_sync_lost = False
        # Earlier writes of another process may not be durable yet.
        self._is_written = True
        self.end = self.size()
        """Offset from which the file was never written: it reads as zero there."""

    def close(self) -> None:
        """Close the descriptor, and with it go its locks; idempotent."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def size(self) -> int:
        """Return the size of the file or block device as it is now, in bytes."""
        return os.lseek(self.fd, 0, os.SEEK_END)

    def readv(self, offset: int, buffers: Sequence[memoryview]) -> None:
        """Fill all of `buffers` from `offset`; what lies beyond the end of the file is zero."""
        size, done = total(buffers), 0
        if type(buffers) is Scatter:
            done = buffers.read_from(self.fd, offset)
        if done < size:
            fill_zeros(_transferred(os.preadv, self.fd, buffers, offset, size, done=done))

    def writev(self, offset: int, buffers: Sequence[memoryview]) -> None:
        """Write all of `buffers` at `offset`; on a fault some of them may have been written."""
        size, done = total(buffers), 0
        self._is_written = True
        self.end = max(self.end, offset + size)
        if type(buffers) is Scatter:
            done = buffers.write_to(self.fd, offset)
        if done < size and _transferred(os.pwritev, self.fd, buffers, offset, size, done=done):
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    def is_hole(self, offset: int, size: int) -> bool:
        """Tell whether the file system knows that a range has no data; it then reads as zero."""
        try:
            return os.lseek(self.fd, offset, os.SEEK_DATA) >= offset + size
        except OSError as err:
            return err.errno == errno.ENXIO  # no data up to the end; else: it does not know

    def parts(self, offset: int, size: int) -> Iterator[tuple[int, bool]]:
        """Yield the sizes of the parts of a range, and whether each is known to be a hole.

        Two system calls for each piece of data, however large holes are.

        Source: lseek(2), SEEK_DATA and SEEK_HOLE
        """
        end = offset + size
        while offset < end:
            data = min(self._seek(offset, os.SEEK_DATA, offset), end)
            start = data if data == end else max(offset, data - data % _GRAIN)
            if start > offset:
                yield start - offset, True
            if start < end:
                hole = self._seek(data, os.SEEK_HOLE, end)
                offset = min(end, align_up(hole, _GRAIN))
                yield offset - start, False
            else:
                offset = end

    def _seek(self, offset: int, whence: int, otherwise: int) -> int:
        """Return where data or a hole begins; `otherwise` where the file system does not know."""
        try:
            return os.lseek(self.fd, offset, whence)
        except OSError as err:
            return _END if err.errno == errno.ENXIO else otherwise

    def read(self, offset: int, size: int) -> bytearray:
        """Return `size` bytes from `offset`; what lies beyond the end of the file is zero."""
        data = bytearray(size)
        self.readv(offset, [memoryview(data)])
        return data

    def write(self, offset: int, data: bytes | bytearray | memoryview) -> None:
        """Write all of `data` at `offset`."""
        self.writev(offset, [memoryview(data)])

    def sync(self) -> None:
        """Make everything written so far durable.

        Once this has failed it fails for ever: the kernel reports a lost write once and then
        forgets it, so no later success would mean anything for what was written before.
        """
        if self._is_sync_lost:
            raise LastingError(errno.EIO, "an earlier flush failed")
        if not self._is_written:
            return
        try:
            os.fdatasync(self.fd)
        except OSError as err:
            self._is_sync_lost = True
            log.warning("%s: flush: %s", self.name, err.strerror)
            raise LastingError(err.errno, err.strerror) from err
        self._is_written = False

    def reserve(self, offset: int, size: int) -> None:
        """Allocate room for a range that will be written as a whole; its data are undefined.

        Raises:
            OSError: ENOSPC, or an I/O fault.
        """
        if not self._allocation(fallocate.allocate, offset, size):
            self.writev(offset, zeros(size))

    def punch(self, offset: int, size: int) -> bool:
        """Free the blocks of a range, which then reads as zero; False where that cannot be."""
        return self._allocation(fallocate.punch_hole, offset, size)

    def zero(self, offset: int, size: int) -> None:
        """Make a range read as zero, by the file system's own means if it has any."""
        if not self._allocation(fallocate.zero_range, offset, size):
            self.writev(offset, zeros(size))

    def _allocation(
        self, operation: Callable[[int, int, int], None], offset: int, size: int
    ) -> bool:
        """Change which blocks a range has; False where the file system cannot."""
        if operation in self._unsupported:
            return False
        self._is_written = True
        try:
            operation(self.fd, offset, size)
        except OSError as err:
            if err.errno not in _NOT_SUPPORTED:
                raise
            self._unsupported.add(operation)
            return False
        return True


class FileWindow(HostFile):
    """A part of a file that is only read, as a file."""

    __slots__ = ("_size", "_start")

    def __init__(self, fd: int, name: str, window: tuple[int, int]) -> None:
        """Take ownership of `fd`; `window` is where the part begins, and its size in bytes."""
        self._start, self._size = window
        super().__init__(fd, name, is_read_only=True)

    def size(self) -> int:
        """Return the size of the part."""
        return self._size

    def readv(self, offset: int, buffers: Sequence[memoryview]) -> None:
        """Fill all of `buffers`, whose end is inside of the part."""
        super().readv(self._start + offset, buffers)

    def is_hole(self, offset: int, size: int) -> bool:
        """Tell whether the file system knows that a range has no data."""
        return super().is_hole(self._start + offset, size)

    def parts(self, offset: int, size: int) -> Iterator[tuple[int, bool]]:
        """Yield the sizes of the parts of a range, and whether each is known to be a hole."""
        return super().parts(self._start + offset, size)


def _transferred(
    transfer: Callable[[int, Sequence[memoryview], int], int],
    fd: int,
    buffers: Sequence[memoryview],
    offset: int,
    size: int,
    *,
    done: int,
) -> Sequence[memoryview]:
    """Read or write buffers of `size` bytes, of which `done` are; return what is left.

    It takes several calls if need be. Something is left where the file ends.
    """
    rest = cut(buffers, done, size - done) if done else buffers
    while done < size:
        count = transfer(fd, rest if len(rest) <= _IOV_MAX else rest[:_IOV_MAX], offset + done)
        if not count:
            return rest
        done += count
        if done < size:
            rest = cut(buffers, done, size - done)
    return ()
