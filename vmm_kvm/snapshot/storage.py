"""A machine on its way together with its disks: the stream of `stream`, and disks beside it.

    magic | u32 number of disks | u64 bytes of each disk, 0 for one that cannot be copied | frames

A frame carries bytes of the machine's stream, or a part of a disk, as the guest reads it. Of two
parts with the same place the later one counts. The first frames have the stream's beginning, with
the manifest; the receiver then says which disks it wants. A frame with the sha256 of all parts of
disks follows the last of these. The machine's stream has a checksum of its own.

What is read is hostile, as in `stream`.
"""

import hashlib
import struct
from collections.abc import Collection, Sequence
from typing import NamedTuple

from vmm_kvm.errors import SnapshotError
from vmm_kvm.snapshot.manifest import DISKS_MAX
from vmm_kvm.snapshot.ram import PIECE
from vmm_kvm.snapshot.stream import Sink, Source, check_magic

MAGIC = b"VMMKVM\0C"
_HEAD = struct.Struct("<8sI")
_SIZE = struct.Struct("<Q")
_FRAME = struct.Struct("<BBxxIQQ")  # kind, disk, bytes that follow, offset and size in the disk
_STREAM, _DATA, _ZERO, _DONE = range(4)
_SMALL = 4096
_ZEROS_MAX = 1 << 30  # bytes of one frame
_SECTOR = 512
_DISK_MAX = 1 << 60


class StorageWriter:
    """Writes the frames; a `Sink` for the machine's stream."""

    def __init__(self, sink: Sink, sizes: Sequence[int]) -> None:
        """Write the beginning.

        Raises:
            OSError, SnapshotError: of `sink`.
        """
        self._sink = sink
        self._digest = hashlib.sha256()
        self.written = 0
        """Bytes of disks."""
        head = _HEAD.pack(MAGIC, len(sizes)) + b"".join(map(_SIZE.pack, sizes))
        sink.write(head)

    def write(self, data: bytes) -> None:
        """Write bytes of the machine's stream."""
        for at in range(0, len(data), PIECE):
            piece = data[at : at + PIECE] if len(data) > PIECE else data
            head = _FRAME.pack(_STREAM, 0, len(piece), 0, 0)
            if len(piece) <= _SMALL:
                self._sink.write(head + piece)
            else:
                self._sink.write(head)
                self._sink.write(piece)

    def write_data(self, disk: int, offset: int, data: bytes) -> None:
        """Write a part of a disk, at most 1 MiB."""
        self._write_part(_FRAME.pack(_DATA, disk, len(data), offset, len(data)))
        self._write_part(data)

    def write_zeros(self, disk: int, offset: int, size: int) -> None:
        """Write that a part of a disk, at most 1 GiB, is zeros."""
        self._write_part(_FRAME.pack(_ZERO, disk, 0, offset, size))

    def finish_disks(self) -> None:
        """Write that no more of the disks follows."""
        self._sink.write(_FRAME.pack(_DONE, 0, self._digest.digest_size, 0, 0))
        self._sink.write(self._digest.digest())

    def _write_part(self, data: bytes) -> None:
        self._digest.update(data)
        self._sink.write(data)
        self.written += len(data)


class DiskPart(NamedTuple):
    """A part of a disk."""

    disk: int
    offset: int
    size: int
    data: memoryview | None
    """None: zeros."""


class StorageReader:
    """The frames, read in two steps: the stream's beginning by `readinto`, then by `next`."""

    def __init__(self, source: Source) -> None:
        """Read the beginning.

        Raises:
            SnapshotError: it is none.
            OSError: of `source`.
        """
        self._source = source
        self._digest = hashlib.sha256()
        self._left = 0  # of a frame with bytes of the stream
        self._wanted: Collection[int] = ()
        self.are_disks_done = False
        """Whether all of the disks is there, and right."""
        head = self._read(_HEAD.size)
        check_magic(bytes(head[: len(MAGIC)]), MAGIC)
        count = _HEAD.unpack(head)[1]
        if count > DISKS_MAX:
            raise SnapshotError(f"disks: {count}, at most {DISKS_MAX} are possible")
        self.sizes: list[int] = [_SIZE.unpack(self._read(_SIZE.size))[0] for _ in range(count)]
        """Of the disks that can be copied, in bytes; 0 of others."""
        for size in self.sizes:
            if size % _SECTOR or size > _DISK_MAX:
                raise SnapshotError(f"disks: one of {size} bytes")

    def want(self, disks: Collection[int]) -> None:
        """Take parts of these disks alone."""
        self._wanted = disks

    def readinto(self, view: memoryview) -> int:
        """Read bytes of the machine's stream, before anything of a disk; never the end."""
        if not self._left:
            kind, disk, stored, offset, size = self._head()
            if kind != _STREAM or disk or offset or size:
                raise SnapshotError("disks: before the manifest")
            self._left = stored
        count = self._source.readinto(view[: self._left])
        if not count:
            raise SnapshotError("the stream ends too early")
        self._left -= count
        return count

    def next(self) -> DiskPart | memoryview | None:
        """Read bytes of the stream, or a part of a disk; None once, when no more of disks follows.

        Raises:
            SnapshotError: the stream ends, or is damaged.
            OSError: of the source.
        """
        kind, disk, stored, offset, size = self._head()
        if kind == _STREAM and not (disk or offset or size):
            return self._read(stored)
        if self.are_disks_done:
            raise SnapshotError("disks: a frame behind their end")
        if kind == _DONE and not (disk or offset or size):
            if stored != self._digest.digest_size or self._read(stored) != self._digest.digest():
                raise SnapshotError("disks: the checksum is wrong: the stream is damaged")
            self.are_disks_done = True
            return None
        if kind not in {_DATA, _ZERO} or stored != (size if kind == _DATA else 0):
            raise SnapshotError("disks: a frame that is none")
        if disk not in self._wanted or not size or offset + size > self.sizes[disk]:
            raise SnapshotError(f"disks: {size} bytes at {offset:#x} of disk {disk}: out of place")
        if offset % _SECTOR or size % _SECTOR or size > _ZEROS_MAX:
            raise SnapshotError(f"disks: {size} bytes at {offset:#x}: no blocks")
        self._digest.update(_FRAME.pack(kind, disk, stored, offset, size))
        data = self._read(stored) if kind == _DATA else None
        if data is not None:
            self._digest.update(data)
        return DiskPart(disk, offset, size, data)

    def _head(self) -> tuple[int, int, int, int, int]:
        kind, disk, stored, offset, size = _FRAME.unpack(self._read(_FRAME.size))
        if stored > PIECE or (kind == _STREAM and not stored):
            raise SnapshotError(f"a frame of {stored} bytes")
        return kind, disk, stored, offset, size

    def _read(self, size: int) -> memoryview:
        whole = memoryview(bytearray(size))
        view = whole
        while view:
            count = self._source.readinto(view)
            if not count:
                raise SnapshotError("the stream ends too early")
            view = view[count:]
        return whole
