"""A raw image as memory: what virtio-pmem shows to a guest.

Reads and writes are the guest's own; the host's kernel moves pages. If another program truncates
the file while it is mapped, an access beyond the new end kills the process; the lock keeps out
programs that respect it.
"""

import ctypes
import mmap
import os
import stat
from errno import EINVAL
from typing import Self

from vmm_kvm.bits import MIB
from vmm_kvm.block.locks import lock
from vmm_kvm.errors import ImageError

ALIGNMENT = 2 * MIB
"""The size must be a multiple of this, in bytes: Linux takes persistent memory in such pieces."""


class MappedImage:
    """A raw image, mapped; a context manager that owns the mapping and the file.

    With `is_private` what is written stays in memory and vanishes with the mapping: the file is
    opened for reading only, and may be shared with other readers.
    """

    __slots__ = ("_fd", "hva", "is_private", "name", "size", "view")

    def __init__(self, path: str, *, is_private: bool = False, fd: int | None = None) -> None:
        """Open and map `path`, locked as every image is.

        Or map `fd`, which is open, for writing too unless `is_private`, and locked already; it is
        taken over, also when this fails, and `path` is for messages.

        Raises:
            ImageError: it is missing, in use, no regular file, empty, or no multiple of 2 MiB.
        """
        self.name = path
        self.is_private = is_private
        """Whether writes stay in memory."""
        self._fd = _open(path, is_private=is_private) if fd is None else fd
        try:
            self.size = self._checked_size()
            if fd is None:
                lock(self._fd, path, writes=not is_private)
            mapping = mmap.mmap(
                self._fd, self.size, mmap.MAP_PRIVATE if is_private else mmap.MAP_SHARED
            )
            if is_private:
                _keep_apart(mapping)
        except OSError as err:
            os.close(self._fd)
            raise ImageError(f"{path}: {err.strerror}") from err
        except BaseException:
            os.close(self._fd)
            raise
        self.view = memoryview(mapping)
        """All of it. The mapping goes when the last view does."""
        self.hva = ctypes.addressof(ctypes.c_char.from_buffer(mapping))
        """The address in this process."""

    def _checked_size(self) -> int:
        status = os.fstat(self._fd)
        if not stat.S_ISREG(status.st_mode):
            raise ImageError(f"{self.name}: not a regular file")
        if status.st_size == 0 or status.st_size % ALIGNMENT:
            raise ImageError(
                f"{self.name}: {status.st_size} bytes, not a multiple of {ALIGNMENT // MIB} MiB"
            )
        return status.st_size

    def flush(self) -> None:
        """Make everything written so far durable; nothing to do for a private one.

        Raises:
            OSError: the kernel could not write it.
        """
        if not self.is_private:
            # For a shared mapping the kernel finds the pages that were written, also by a guest.
            os.fdatasync(self._fd)

    def close(self) -> None:
        """Close the file and let go of the mapping; idempotent."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)
            self.view = memoryview(b"")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def _keep_apart(mapping: mmap.mmap) -> None:
    """Have no page of a mapping merged with an equal one, which its guest could time.

    Source: madvise(2), MADV_UNMERGEABLE
    """
    try:
        mapping.madvise(mmap.MADV_UNMERGEABLE)
    except OSError as err:
        if err.errno != EINVAL:  # a kernel that merges nothing
            raise


def _open(path: str, *, is_private: bool) -> int:
    flags = os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY
    try:
        return os.open(path, flags | (os.O_RDONLY if is_private else os.O_RDWR))
    except (OSError, ValueError) as err:
        text = err.strerror if isinstance(err, OSError) else str(err)
        raise ImageError(f"{path}: {text}") from err
