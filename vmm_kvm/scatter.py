"""Scatter lists: a request's data as a sequence of memoryviews of bytes, none of them empty.

A long one in guest memory may be a `Scatter`, which is such a sequence too: the kernel takes it as
it is, and views of its pieces are made on demand.
"""

import ctypes
import errno
import os
import struct
from collections.abc import Iterator, Sequence
from typing import TypeAlias, overload

from vmm_kvm.libc import LIBC

_PIECE = struct.Struct("<QQ")  # struct iovec: address, bytes

_Slice: TypeAlias = "slice[int | None, int | None, int | None]"


class Scatter(Sequence[memoryview]):
    """Pieces of one mapping, as preadv(2) and pwritev(2) take them; immutable."""

    __slots__ = ("_address", "_count", "_iovecs", "_memory", "_views", "is_writable", "size")

    def __init__(
        self, memory: memoryview, address: int, iovecs: bytes, size: int, *, is_writable: bool
    ) -> None:
        """Describe pieces of `memory`, whose first byte lies at `address` of this process.

        `iovecs` is an array of struct iovec, at most 1,024, which the caller has checked: each is
        inside of `memory`, and together they are `size` bytes.
        """
        self._memory = memory
        self._address = address
        self._iovecs = iovecs
        self._count = len(iovecs) // _PIECE.size
        self._views: list[memoryview] | None = None
        self.size = size
        """Bytes of all pieces together."""
        self.is_writable = is_writable
        """Whether the device writes them; else it reads them."""

    def read_from(self, fd: int, offset: int) -> int:
        """Fill the pieces from a file; returns how many bytes there were.

        Raises:
            OSError: an I/O fault.
        """
        done: int = LIBC.preadv64(fd, self._iovecs, self._count, offset)
        if done < 0:
            _may_go_on()
            return self.read_from(fd, offset)
        return done

    def write_to(self, fd: int, offset: int) -> int:
        """Write the pieces to a file; returns how many bytes were written.

        Raises:
            OSError: an I/O fault, or no room.
        """
        done: int = LIBC.pwritev64(fd, self._iovecs, self._count, offset)
        if done < 0:
            _may_go_on()
            return self.write_to(fd, offset)
        return done

    def views(self) -> list[memoryview]:
        """Return a view of each piece; the list is kept."""
        if self._views is None:
            memory, base = self._memory, self._address
            self._views = [
                memory[address - base : address - base + size]
                for address, size in _PIECE.iter_unpack(self._iovecs)
            ]
        return self._views

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[memoryview]:
        return iter(self.views())

    @overload
    def __getitem__(self, index: int) -> memoryview: ...
    @overload
    def __getitem__(self, index: _Slice) -> list[memoryview]: ...
    def __getitem__(self, index: "int | _Slice") -> memoryview | list[memoryview]:
        return self.views()[index]


def _may_go_on() -> None:
    """Raise the error, unless the call was interrupted."""
    error = ctypes.get_errno()
    if error != errno.EINTR:
        raise OSError(error, os.strerror(error))


def total(buffers: Sequence[memoryview]) -> int:
    """Return how many bytes `buffers` hold together."""
    if type(buffers) is Scatter:
        return buffers.size
    return len(buffers[0]) if len(buffers) == 1 else sum(map(len, buffers))
