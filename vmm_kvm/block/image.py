"""Disk images of every format: the interface that all of them have."""

from collections.abc import Iterator, Sequence
from enum import StrEnum
from typing import NamedTuple, Protocol


class Format(StrEnum):
    """How a file holds a disk."""

    RAW = "raw"
    QCOW2 = "qcow2"


class LastingError(OSError):
    """A fault that stays, however often the request is repeated."""


class Image(Protocol):
    """A virtual disk. Not thread-safe: its user serialises.

    Faults are OSError with an errno: EIO, ENOSPC, EROFS; EINVAL beyond the end of the disk. After
    one the image is sound and can be used further. Those that are no LastingError are the host's:
    once it can, the same request succeeds.
    """

    size: int
    """Bytes, a multiple of 512."""
    is_read_only: bool

    def readv(self, offset: int, buffers: Sequence[memoryview]) -> None:
        """Fill all of `buffers` from byte `offset`; what lies beyond the end is zero."""

    def writev(self, offset: int, buffers: Sequence[memoryview]) -> None:
        """Write all of `buffers`; durable after the next flush."""

    def flush(self) -> None:
        """Make all that was written durable, data and metadata."""

    def discard(self, offset: int, length: int) -> None:
        """Give up a range: afterwards it reads as zero or as before, and may use no space."""

    def write_zeroes(self, offset: int, length: int, *, may_unmap: bool) -> None:
        """Make a range read as zero; with `may_unmap` it need keep no space."""

    def close(self) -> None:
        """Write metadata back and drop the file and its locks; idempotent.

        The file is closed even when this raises OSError: what was not flushed may be lost.
        """


class StoredImage(Image, Protocol):
    """An image that is kept in a file."""

    def reads_zero(self, offset: int, length: int) -> bool:
        """Tell whether a range is known to read as zero, without reading it."""

    def parts(self, offset: int, length: int) -> Iterator[tuple[int, bool]]:
        """Yield the sizes of the parts of a range, and whether each is known to read as zero.

        The image is not written meanwhile. One hole is one part, or few, however large it is.

        Raises:
            OSError: the file or a table cannot be read, or is corrupt.
        """


class Layer(NamedTuple):
    """One file of a chain."""

    source: str | int
    """A path, or a descriptor, which is taken over."""
    disk_format: Format | None
    """None: to be probed."""
    window: tuple[int, int] | None = None
    """Of a raw image that is only read: where it begins in the file, and its size in bytes."""
