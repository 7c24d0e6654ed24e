"""A machine on its way through a pipe.

    magic | u32 bytes of the manifest | manifest | state | records | end record | sha256

Records are runs of RAM, ascending: raw, or compressed by zlib; what no record has is zeros. In a
stream of a machine that runs meanwhile (`is_live` in the manifest) there is no state before them:
they come in any order, the later one of two for the same page counts, and the state follows them
in records of its own. The sha256 is that of all before it.

The machine may not run before the sum has been verified: a truncated stream is refused.

Both ends are blocking here, as far as `Sink` and `Source` are: see `fds` for what waits, and how
long. Everything that is read is treated as hostile: what is allocated is bounded by what has been
received, and nothing is written outside RAM.
"""

import hashlib
import struct
import zlib
from typing import Protocol

from vmm_kvm.bits import PAGE_SIZE
from vmm_kvm.errors import SnapshotError
from vmm_kvm.snapshot import manifest as manifests
from vmm_kvm.snapshot.manifest import MANIFEST_MAX, STATE_MAX, Manifest
from vmm_kvm.snapshot.ram import PIECE, Ram, is_zero, place, runs

MAGIC = b"VMMKVM\0S"
"""How a stream begins; a file has an F instead of the S."""
_HEAD = struct.Struct("<8sI")
HEAD_SIZE = _HEAD.size
_RECORD = struct.Struct("<BxxxIQQ")  # kind, bytes that follow, offset and size in RAM
_END, _RAW, _ZLIB, _ZERO, _STATE = range(5)  # the last two in a live stream alone
_LEVEL = 1
_WORTH_IT = 0.9  # of a run's size: else it travels as it is


class Sink(Protocol):
    """Takes a stream."""

    def write(self, data: bytes) -> None:
        """Write all of it.

        Raises:
            OSError, SnapshotError: it cannot be written.
        """


class Source(Protocol):
    """Gives a stream."""

    def readinto(self, view: memoryview) -> int:
        """Read at least one byte, and at most as many as there is room for; 0 at the end.

        Raises:
            OSError, SnapshotError: it cannot be read.
        """


class LiveWriter:
    """Writes a machine in rounds, while it runs; see `precopy`."""

    def __init__(self, sink: Sink, manifest: Manifest) -> None:
        """Write the beginning.

        Raises:
            SnapshotError: the machine cannot be described.
            OSError, SnapshotError: of `sink`.
        """
        self._sink = sink
        self._digest = hashlib.sha256()
        self.written = 0
        """Bytes."""
        text = manifests.encode(manifest._replace(is_live=True, state_size=0))
        self._write(_HEAD.pack(MAGIC, len(text)) + text)

    def _write(self, data: bytes) -> None:
        self._digest.update(data)
        self._sink.write(data)
        self.written += len(data)

    def write_run(self, offset: int, data: bytes) -> None:
        """Write the present RAM at `offset`: whole pages, at most 1 MiB of them."""
        if is_zero(data):
            self._write(_RECORD.pack(_ZERO, 0, offset, len(data)))
        else:
            self._write(_RECORD.pack(_RAW, len(data), offset, len(data)))
            self._write(data)

    def finish(self, state: bytes) -> None:
        """Write the state and the end."""
        for at in range(0, len(state), PIECE):
            piece = state[at : at + PIECE]
            self._write(_RECORD.pack(_STATE, len(piece), at, len(piece)))
            self._write(piece)
        self._write(_RECORD.pack(_END, 0, 0, 0))
        self._sink.write(self._digest.digest())


def write_stream(
    sink: Sink, manifest: Manifest, state: bytes, ram: Ram, *, compresses: bool = False
) -> None:
    """Write a paused machine.

    Args:
        sink: where to.
        manifest: with the size of `state`.
        state: what `state.encode` returns.
        ram: read, but not changed.
        compresses: runs that become smaller by it travel compressed.

    Raises:
        SnapshotError: the machine cannot be described.
        OSError, SnapshotError: of `sink`.
    """
    digest = hashlib.sha256()

    def write(data: bytes) -> None:
        digest.update(data)
        sink.write(data)

    write(head(manifest))
    write(state)
    for offset, data in runs(ram):
        kind, body = _RAW, data
        if compresses:
            packed = zlib.compress(data, _LEVEL)
            if len(packed) < len(data) * _WORTH_IT:
                kind, body = _ZLIB, packed
        write(_RECORD.pack(kind, len(body), offset, len(data)))
        write(body)
    write(_RECORD.pack(_END, 0, 0, 0))
    sink.write(digest.digest())


def head(manifest: Manifest) -> bytes:
    """Return how the stream of a machine begins; its state follows.

    Raises:
        SnapshotError: the machine cannot be described.
    """
    text = manifests.encode(manifest)
    return _HEAD.pack(MAGIC, len(text)) + text


def parse_head(data: memoryview) -> tuple[Manifest, memoryview]:
    """Return the manifest and the state of what `head` and a state make, which no RAM follows.

    Raises:
        SnapshotError: it is no such thing.
    """
    if len(data) < HEAD_SIZE:
        raise SnapshotError("header: the stream ends too early")
    magic, size = _HEAD.unpack_from(data)
    check_magic(magic, MAGIC)
    manifest = manifests.decode(_manifest_text(data[HEAD_SIZE:], size))
    state = data[HEAD_SIZE + size :]
    if len(state) != manifest.state_size:
        raise SnapshotError(f"state: {len(state)} bytes, not {manifest.state_size}")
    return manifest, state


def _manifest_text(data: memoryview, size: int) -> bytes:
    if size > MANIFEST_MAX:
        raise SnapshotError(f"manifest: {size} bytes, at most {MANIFEST_MAX} are possible")
    if size > len(data):
        raise SnapshotError("manifest: the stream ends too early")
    return bytes(data[:size])


def check_magic(found: bytes, wanted: bytes) -> None:
    """Refuse what does not begin as a snapshot does.

    Raises:
        SnapshotError: in OpenBSD's words.
    """
    if found != wanted:
        raise SnapshotError("incompatible dump signature")


class StreamReader:
    """A stream, read in three steps: the beginning, the state, the RAM."""

    def __init__(self, source: Source, text: bytes | None = None) -> None:
        """Read the beginning, and not one byte behind the manifest.

        With `text`, the manifest's, another reader has read that much of `source` already.

        Raises:
            SnapshotError: it is no stream.
            OSError: of `source`.
        """
        self._source = source
        if text is None:
            magic, size = _HEAD.unpack(_exactly(source, HEAD_SIZE, "header"))
            check_magic(magic, MAGIC)
            if size > MANIFEST_MAX:
                raise SnapshotError(f"manifest: {size} bytes, at most {MANIFEST_MAX} are possible")
            text = _exactly(source, size, "manifest")
        self.text = text
        """Of the manifest."""
        self.manifest = manifests.decode(text)
        self._digest = hashlib.sha256(_HEAD.pack(MAGIC, len(text)) + text)

    def read_machine(self, ram: Ram) -> bytes:
        """Read all that follows the manifest: RAM, which is all zeros before, and the state.

        Raises:
            SnapshotError: the stream breaks off, or is damaged: RAM is of no use then.
            OSError: of the source.
        """
        if self.manifest.is_live:
            return self._read_live(ram)
        state = self.read_state()
        self.read_ram(ram)
        return state

    def _read_live(self, ram: Ram) -> bytes:
        state = bytearray()
        while (record := self._next_record()) is not None:
            kind, stored, offset, size = record
            if kind == _STATE:
                if stored != size or offset != len(state) or len(state) + size > STATE_MAX:
                    raise SnapshotError(f"state: a record of {size} bytes at {offset:#x}")
                piece = _exactly(self._source, size, "state")
                self._digest.update(piece)
                state += piece
                continue
            if state:
                raise SnapshotError("memory: a record behind the state")
            if offset % PAGE_SIZE or size % PAGE_SIZE:
                raise SnapshotError(f"memory: a record of {size} bytes at {offset:#x}: no pages")
            view = _place(ram, offset, size)
            if kind == _ZERO and not stored:
                view[:] = bytes(size)
            else:
                self._read_record(kind, stored, view)
        self._check_digest()
        return bytes(state)

    def read_state(self) -> bytes:
        """Read the state that follows the manifest.

        Raises:
            SnapshotError: the stream ends before it.
            OSError: of the source.
        """
        state = _exactly(self._source, self.manifest.state_size, "state")
        self._digest.update(state)
        return state

    def read_ram(self, ram: Ram) -> None:
        """Read the records that follow the state into RAM that is all zeros, and the sha256.

        Raises:
            SnapshotError: a record is out of place, or the stream breaks off, or is damaged: RAM
                is of no use then.
            OSError: of the source.
        """
        end = 0
        while (record := self._next_record()) is not None:
            kind, stored, offset, size = record
            if offset < end:
                raise _out_of_place(offset, size)
            end = offset + size
            self._read_record(kind, stored, _place(ram, offset, size))
        self._check_digest()

    def _next_record(self) -> tuple[int, int, int, int] | None:
        """Read the head of a record: kind, bytes that follow, offset and size; None at the end."""
        head = _exactly(self._source, _RECORD.size, "memory")
        self._digest.update(head)
        kind, stored, offset, size = _RECORD.unpack(head)
        if kind == _END:
            if any(head):
                raise SnapshotError("memory: a record that is none")
            return None
        if not 0 < size <= PIECE:
            raise _out_of_place(offset, size)
        return kind, stored, offset, size

    def _check_digest(self) -> None:
        found = _exactly(self._source, self._digest.digest_size, "checksum")
        if found != self._digest.digest():
            raise SnapshotError("the checksum is wrong: the stream is damaged")

    def _read_record(self, kind: int, stored: int, view: memoryview) -> None:
        size = len(view)
        if kind == _RAW and stored == size:
            _fill(self._source, view, "memory")
            self._digest.update(view)
        elif kind == _ZLIB and 0 < stored < size:
            body = _exactly(self._source, stored, "memory")
            self._digest.update(body)
            view[:] = _unpack(body, size)
        else:
            raise SnapshotError("memory: a record that is none")


def _place(ram: Ram, offset: int, size: int) -> memoryview:
    view = place(ram, offset, size)
    if view is None:
        raise SnapshotError(f"memory: a record of {size} bytes at {offset:#x}: outside RAM")
    return view


def _out_of_place(offset: int, size: int) -> SnapshotError:
    return SnapshotError(f"memory: a record of {size} bytes at {offset:#x}: out of place")


def _unpack(body: bytes, size: int) -> bytes:
    """Unpack a run, of which no more than `size` bytes are ever made."""
    unpacker = zlib.decompressobj()
    try:
        data = unpacker.decompress(body, size)
    except zlib.error as err:
        raise SnapshotError(f"memory: {err}") from err
    if len(data) != size or not unpacker.eof or unpacker.unused_data:
        raise SnapshotError("memory: a compressed record of another size")
    return data


def _exactly(source: Source, size: int, what: str) -> bytes:
    """Read `size` bytes; room is made as they come, not as a stream promises."""
    data = bytearray()
    while len(data) < size:
        piece = bytearray(min(PIECE, size - len(data)))
        _fill(source, memoryview(piece), what)
        data += piece
    return bytes(data)


def _fill(source: Source, view: memoryview, what: str) -> None:
    while view:
        count = source.readinto(view)
        if not count:
            raise SnapshotError(f"{what}: the stream ends too early")
        view = view[count:]
