"""The disk in a layer of a container image: the one regular file of its folder `disk`.

A layer is a tar archive, as it is or compressed by gzip. It comes from a stranger: its names lead
nowhere, all sizes are bounded, and only the bytes of that file are taken.

Source: OCI image specification 1.1 "Image Layer Filesystem Changeset"; RFC 1952.
"""

import gzip
import os
import zlib
from collections.abc import Callable, Iterator
from typing import IO

from vmctl.client import CommandError
from vmctl.guest.unpack import FILE, TarReader

_USTAR, _USTAR_OFFSET = b"ustar", 257
_GZIP, _ZSTD = b"\x1f\x8b", b"\x28\xb5\x2f\xfd"
_MEMBERS_MAX = 4096
_PIECE = 64 << 10
_ZEROS = bytes(_PIECE)
_FOLDER = b"disk"


def is_archive(first: bytes) -> bool:
    """Tell whether a layer with these first bytes is an archive, not a disk.

    Raises:
        CommandError: it is compressed by something other than gzip.
    """
    if first.startswith(_ZSTD):
        raise CommandError("a layer compressed by zstd, not by gzip")
    return first.startswith(_GZIP) or first.startswith(_USTAR, _USTAR_OFFSET)


def unpack(source: int, limit: int, begin: Callable[[int], None]) -> Iterator[bytes]:
    """Yield the bytes of the disk in the layer at the descriptor `source`, which stays open.

    `begin` learns the size in front of the first piece.

    Raises:
        CommandError: there is no disk, or more than one, or more than `limit` bytes altogether.
    """
    with open(source, "rb", closefd=False) as file:
        file.seek(0)
        is_compressed = file.read(len(_GZIP)) == _GZIP
        file.seek(0)
        if is_compressed:
            with gzip.GzipFile(fileobj=file, mode="rb") as unpacked:
                yield from _disk(TarReader(_Bounded(unpacked, limit).read), begin)
        else:
            yield from _disk(TarReader(_Bounded(file, limit).read), begin)


def _disk(reader: TarReader, begin: Callable[[int], None]) -> Iterator[bytes]:
    has_found = False
    for _ in range(_MEMBERS_MAX):
        member = reader.next()
        if member is None:
            if not has_found:
                raise CommandError("no file in a folder disk")
            return
        if member.kind == FILE and len(member.parts) == 2 and member.parts[0] == _FOLDER:
            if has_found:
                raise CommandError("more than one file in its folder disk")
            has_found = True
            begin(member.size)
            while piece := reader.read():
                yield piece
    raise CommandError(f"more than {_MEMBERS_MAX} files in its archive")


class _Bounded:
    """An archive of which at most so many bytes are read."""

    def __init__(self, file: IO[bytes] | gzip.GzipFile, limit: int) -> None:
        self._file = file
        self._left = self._limit = limit

    def read(self, size: int) -> bytes:
        """Return so many bytes, or fewer at the end.

        Raises:
            CommandError: the archive is broken, or too long.
        """
        data = b""
        while len(data) < size:
            try:
                piece = self._file.read(size - len(data))
            except (EOFError, gzip.BadGzipFile, zlib.error) as err:
                raise CommandError(f"a broken archive: {err}") from None
            if not piece:
                break
            data += piece
        self._left -= len(data)
        if self._left < 0:
            raise CommandError(f"its archive has more than the limit of {self._limit} bytes")
        return data


def write_sparse(fd: int, piece: bytes) -> None:
    """Append a piece; zeros become a hole, and the caller sets the file's size at the end.

    Raises:
        OSError: it cannot be written.
    """
    if piece == _ZEROS:
        os.lseek(fd, len(piece), os.SEEK_CUR)
        return
    view = memoryview(piece)
    while view:
        view = view[os.write(fd, view) :]
