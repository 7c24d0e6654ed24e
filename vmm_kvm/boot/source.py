"""Bytes that a boot path reads: a file, or the unpacked contents of one.

Files are read with pread and copied into guest memory by sendfile, never mapped: a mapping of a
file that somebody truncates kills the process with SIGBUS, a short read is an error that can be
reported.
"""

import errno
import os
import stat
import weakref
from typing import NewType, Protocol

from vmm_kvm.errors import BootError
from vmm_kvm.memory import GuestMemory

Stamp = NewType("Stamp", str)
"""Identifies one state of one file: device, inode, size, and both of its time stamps."""

_CHUNK = 1 << 30  # Linux transfers at most 0x7ffff000 bytes in one call


class Source(Protocol):
    """Something of known size that can be read in pieces."""

    name: str
    """The prefix of error messages: the path as the user gave it."""
    size: int
    """Bytes."""

    def read(self, offset: int, size: int) -> bytes:
        """Return exactly `size` bytes from `offset`.

        Raises:
            BootError: they are not all there.
        """

    def place(self, memory: GuestMemory, gpa: int, offset: int, size: int) -> None:
        """Copy `size` bytes from `offset` to the guest-physical address `gpa`.

        Raises:
            BootError: they are not all there.
            GuestMemoryError: the guest has no such memory; a caller checks this before.
        """


class BytesSource:
    """A source in memory."""

    __slots__ = ("_data", "name", "size")

    def __init__(self, name: str, data: bytes) -> None:
        self.name = name
        self.size = len(data)
        self._data = data

    def read(self, offset: int, size: int) -> bytes:
        """Return exactly `size` bytes from `offset`.

        Raises:
            BootError: they are not all there.
        """
        _check(self, offset, size)
        return self._data[offset : offset + size]

    def place(self, memory: GuestMemory, gpa: int, offset: int, size: int) -> None:
        """Copy `size` bytes from `offset` to the guest-physical address `gpa`.

        Raises:
            BootError: they are not all there.
            GuestMemoryError: the guest has no such memory.
        """
        _check(self, offset, size)
        memory.write(gpa, memoryview(self._data)[offset : offset + size])


class FileSource:
    """A regular file; owns its descriptor and closes it when it is collected."""

    __slots__ = ("__weakref__", "_finalizer", "fd", "name", "size", "stamp")

    def __init__(self, fd: int, name: str) -> None:
        """Take ownership of `fd`, which is open for reading.

        Raises:
            BootError: it is not a regular file, or is empty.
        """
        self.fd = fd
        self.name = name
        self._finalizer = weakref.finalize(self, os.close, fd)
        try:
            status = os.fstat(fd)
            _check_kind(name, status)
        except BaseException:
            self.close()
            raise
        self.size = status.st_size
        self.stamp = stamp_of(status)

    @classmethod
    def open(cls, path: str) -> "FileSource":
        """Open the file at `path`.

        Raises:
            BootError: it cannot be read, is not a regular file, or is empty.
        """
        try:
            # Do not wait for a writer if the path turns out to be a FIFO.
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
        except OSError as err:
            raise BootError(f"{path}: {err.strerror}") from err
        except ValueError as err:  # whose words differ between versions of Python
            raise BootError(f"{path!r}: a path has no NUL") from err
        return cls(fd, path)

    @classmethod
    def of(cls, file: "str | FileSource") -> "FileSource":
        """Return a file that is open already, or open the one at a path.

        Raises:
            BootError: as `open` does.
        """
        return file if isinstance(file, FileSource) else cls.open(file)

    def close(self) -> None:
        """Close the descriptor; idempotent."""
        self._finalizer()

    def __str__(self) -> str:
        return self.name

    def read(self, offset: int, size: int) -> bytes:
        """Return exactly `size` bytes from `offset`.

        Raises:
            BootError: they are not all there, or the host cannot read them.
        """
        _check(self, offset, size)
        try:
            data = os.pread(self.fd, size, offset)
            while len(data) < size:
                more = os.pread(self.fd, size - len(data), offset + len(data))
                if not more:
                    raise BootError(f"{self.name}: truncated while it was read")
                data += more
        except OSError as err:
            raise BootError(f"{self.name}: {err.strerror}") from err
        return data

    def place(self, memory: GuestMemory, gpa: int, offset: int, size: int) -> None:
        """Copy `size` bytes from `offset` to the guest-physical address `gpa`.

        To a memfd the bytes go from the page cache without a mapping of either: no page is cleared
        before it is filled, and none faults. Moves the file offset of `memory.fd`.

        Raises:
            BootError: they are not all there, or the host cannot read them.
            GuestMemoryError: the guest has no such memory.
        """
        _check(self, offset, size)
        view = memory.view(gpa, size)
        if memory.fd < 0:
            self._read_into(view, offset)
            return
        region = next(r for r in memory.regions if r.gpa <= gpa < r.end or size == 0)
        done = 0
        try:
            os.lseek(memory.fd, region.offset + gpa - region.gpa, os.SEEK_SET)
            while done < size:
                sent = os.sendfile(memory.fd, self.fd, offset + done, min(size - done, _CHUNK))
                if sent == 0:
                    raise BootError(f"{self.name}: truncated while it was read")
                done += sent
        except OSError as err:
            if err.errno not in (errno.EINVAL, errno.ENOSYS):
                raise BootError(f"{self.name}: {err.strerror}") from err
            # A file system without splice, or guest memory that only a mapping can fill.
            self._read_into(view[done:], offset + done)

    def _read_into(self, view: memoryview, offset: int) -> None:
        done = 0
        try:
            while done < len(view):
                got = os.preadv(self.fd, [view[done:]], offset + done)
                if got == 0:
                    raise BootError(f"{self.name}: truncated while it was read")
                done += got
        except OSError as err:
            raise BootError(f"{self.name}: {err.strerror}") from err


def stamp_of(status: os.stat_result) -> Stamp:
    """Return what changes whenever the file does, as far as its file system can tell."""
    return Stamp(
        f"{status.st_dev:x}-{status.st_ino:x}-{status.st_size:x}"
        f"-{status.st_mtime_ns:x}-{status.st_ctime_ns:x}"
    )


def _check(source: Source, offset: int, size: int) -> None:
    if offset < 0 or size < 0 or offset + size > source.size:
        raise BootError(
            f"{source.name}: truncated: {size:#x} bytes at {offset:#x} of {source.size:#x}"
        )


def _check_kind(name: str, status: os.stat_result) -> None:
    if stat.S_ISDIR(status.st_mode):
        raise BootError(f"{name}: is a directory")
    if not stat.S_ISREG(status.st_mode):
        raise BootError(f"{name}: not a regular file")
    if status.st_size == 0:
        raise BootError(f"{name}: empty file")
