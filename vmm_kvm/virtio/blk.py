"""virtio-blk: a disk image as a block device.

Requests are served one after the other on the device's thread, and data go between the image and
guest memory without a copy. A fault of the image is an error of the request (VIRTIO_BLK_S_IOERR),
and the device goes on; or, where the device was told to stop at errors, the request waits in its
queue until the host can do it, as when the host's disk is full. A malformed request stops the
device.

Source: virtio 1.2 §5.2
"""

import struct
from collections.abc import Sequence
from errno import EIO
from typing import Literal, NamedTuple

from vmm_kvm.block.image import Image, LastingError
from vmm_kvm.errors import HaltError, StateError, VirtqueueError
from vmm_kvm.limits import DISK_QUEUES_MAX
from vmm_kvm.log import Log
from vmm_kvm.scatter import total
from vmm_kvm.state import U64, Part, PartState
from vmm_kvm.virtio import abi
from vmm_kvm.virtio.buffers import gather, scatter, split
from vmm_kvm.virtio.chain import Chain
from vmm_kvm.virtio.queue import Virtqueue

log = Log(__name__)

QUEUE_SIZE = 256
SECTOR_SIZE = 512
"""Of the protocol, for any block size of the image and the guest."""

_HEADER = struct.Struct("<IIQ")  # type, reserved, sector
_HEADER_SIZE = _HEADER.size
_SEGMENT = struct.Struct("<QII")  # sector, sectors, flags; of discard and write zeroes
_SEGMENTS_MAX = 16
_SEGMENT_SECTORS_MAX = (1 << 31) // SECTOR_SIZE
# capacity, size_max, seg_max, geometry, blk_size, topology (exponent, offset, minimum, optimum),
# writeback, unused, num_queues, discard (sectors, segments, alignment), write zeroes (sectors,
# segments, may unmap), unused.
_CONFIG = struct.Struct("<QIIIIBBHIBBHIIIIIB3s")
_PHYSICAL_BLOCK_EXPONENT = 3  # 4 KiB: good for the host's file systems and partitioning tools
_PHYSICAL_BLOCK_SECTORS = 1 << _PHYSICAL_BLOCK_EXPONENT

_OK, _IOERR, _UNSUPP = (
    abi.VIRTIO_BLK_S_OK,
    abi.VIRTIO_BLK_S_IOERR,
    abi.VIRTIO_BLK_S_UNSUPP,
)
_IN, _OUT = abi.VIRTIO_BLK_T_IN, abi.VIRTIO_BLK_T_OUT
_WRITES = frozenset({_OUT, abi.VIRTIO_BLK_T_DISCARD, abi.VIRTIO_BLK_T_WRITE_ZEROES})
_VERBS = {
    _IN: "read",
    _OUT: "write",
    abi.VIRTIO_BLK_T_FLUSH: "flush",
    abi.VIRTIO_BLK_T_DISCARD: "discard",
    abi.VIRTIO_BLK_T_WRITE_ZEROES: "write of zeroes",
}
_FEATURES = (
    1 << abi.VIRTIO_BLK_F_SEG_MAX
    | 1 << abi.VIRTIO_BLK_F_BLK_SIZE
    | 1 << abi.VIRTIO_BLK_F_FLUSH
    | 1 << abi.VIRTIO_BLK_F_TOPOLOGY
)
_WRITE_FEATURES = 1 << abi.VIRTIO_BLK_F_DISCARD | 1 << abi.VIRTIO_BLK_F_WRITE_ZEROES


class BlkSpec(NamedTuple):
    """A disk of a machine; its image is open and stays the caller's, for one machine at a time."""

    image: Image
    name: str
    """For the log."""
    serial: str = ""
    """The identity that the guest reads, at most 20 bytes; empty for none."""
    queues: int = 1
    """1 to 64."""
    stops_at_errors: bool = False
    """Faults of the host pause the VM; otherwise the guest gets them as errors."""
    kind: Literal["blk"] = "blk"


class BlkState(PartState):
    """Properties that must be equal in a restored disk; requests are in the queues."""

    capacity: U64
    """Bytes."""
    is_read_only: bool
    version: Literal[1] = 1


class VirtioBlk:
    """A block device; a `virtio.device.Backend`."""

    __slots__ = (
        "_capacity",
        "_faults",
        "_image",
        "_is_write_through",
        "_name",
        "_owns_image",
        "_serial",
        "_stops_at_errors",
        "device_id",
        "features",
        "queue_sizes",
    )

    def __init__(
        self,
        image: Image,
        *,
        name: str,
        serial: str = "",
        queues: int = 1,
        stops_at_errors: bool = False,
        owns_image: bool = True,
    ) -> None:
        """Make a disk of `image`, which has no other user while the device exists.

        Args:
            image: the contents.
            name: for the log.
            serial: the disk's identity, of which the guest reads the first 20 bytes.
            queues: 1 to 64; all are served in turn, so more than one spares the guest locks only.
            stops_at_errors: whether a fault of the host is a HaltError, or the guest's to know.
            owns_image: whether closing the device closes the image.
        """
        assert 1 <= queues <= DISK_QUEUES_MAX
        self.device_id = abi.VIRTIO_ID_BLOCK
        self.features = _FEATURES
        if image.is_read_only:
            self.features |= 1 << abi.VIRTIO_BLK_F_RO
        else:
            self.features |= _WRITE_FEATURES
        if queues > 1:
            self.features |= 1 << abi.VIRTIO_BLK_F_MQ
        self.queue_sizes = (QUEUE_SIZE,) * queues
        self._image = image
        self._capacity = image.size
        self._name = name
        self._stops_at_errors = stops_at_errors
        self._owns_image = owns_image
        encoded = serial.encode(errors="replace")
        self._serial = encoded[: abi.VIRTIO_BLK_ID_BYTES].ljust(abi.VIRTIO_BLK_ID_BYTES, b"\0")
        self._is_write_through = False
        self._faults: set[tuple[int, int | None]] = set()

    def config(self) -> bytes:
        """Return the configuration space (struct virtio_blk_config)."""
        limits = (
            (_SEGMENT_SECTORS_MAX, _SEGMENTS_MAX) if self.features & _WRITE_FEATURES else (0, 0)
        )
        return _CONFIG.pack(
            self._capacity // SECTOR_SIZE,
            0,
            QUEUE_SIZE - 2,  # header and status
            0,
            SECTOR_SIZE,
            _PHYSICAL_BLOCK_EXPONENT,
            0,
            _PHYSICAL_BLOCK_SECTORS,
            0,
            1,
            0,
            len(self.queue_sizes),
            *limits,
            _PHYSICAL_BLOCK_SECTORS,
            *limits,
            1,
            bytes(3),
        )

    def write_config(self, offset: int, data: bytes) -> None:
        """Ignore it: nothing there can be written."""

    def start(self, features: int) -> None:
        """Begin; a driver that does not know FLUSH gets a write-through cache."""
        self._is_write_through = not features >> abi.VIRTIO_BLK_F_FLUSH & 1

    def process(self, _index: int, queue: Virtqueue) -> None:
        """Serve every available request.

        Raises:
            GuestError: one has no room for header or status, or the queue is malformed.
            HaltError: the host has a fault, and the device stops at errors.
        """
        try:
            while chain := queue.pop(with_pieces=True):
                queue.push(chain, self._serve(chain))
        except HaltError:
            queue.unpop()
            raise

    def reset(self) -> None:
        """Do nothing: no request outlives `process`."""

    def close(self) -> None:
        """Close the image, if it is the device's; a fault of it is logged."""
        if not self._owns_image:
            return
        try:
            self._image.close()
        except OSError as err:
            log.warning("%s: close: %s", self._name, err)

    def parts(self, name: str) -> list[Part]:
        """Return itself."""
        return [Part(f"{name}/blk", self)]

    def save(self) -> BlkState:
        """Return the disk's properties."""
        return BlkState(capacity=self._capacity, is_read_only=self._image.is_read_only)

    def restore(self, state: BlkState) -> None:
        """Continue with another disk of the same kind.

        Raises:
            StateError: it is of another size, or cannot be written where that one could.
        """
        if state != self.save():
            raise StateError(
                f"a disk of {state.capacity} bytes, not {self._capacity}"
                if state.capacity != self._capacity
                else "read-only and writable disks differ"
            )

    def _serve(self, chain: Chain) -> int:
        """Execute a request and write its status; returns how many bytes are written."""
        readable, writable, pieces = chain.readable, chain.writable, chain.pieces
        if pieces is not None and not (len(readable[0]) == _HEADER_SIZE and len(writable[0]) == 1):
            chain.spread()
            pieces = None
        if readable and len(readable[0]) == _HEADER_SIZE:  # as every driver has it
            kind, _, sector = _HEADER.unpack(readable.pop(0))
        else:
            kind, _, sector = self._unpack_header(readable)
            _, readable = split(readable, _HEADER_SIZE)
        if not writable:
            raise VirtqueueError(f"{self._name}: a request without room for its status")
        if len(writable[-1]) == 1:
            status = writable.pop()
        else:
            writable, (status,) = split(writable, total(writable) - 1)
        source: Sequence[memoryview] = readable
        target: Sequence[memoryview] = writable
        if pieces is None:
            room = total(writable) if writable else 0
        elif pieces.is_writable:
            target, room = pieces, pieces.size
        else:
            source, room = pieces, 0
        size = 0
        try:
            if kind == _IN:
                result = self._read(sector, target, room)
                size = room if result == _OK else 0
            elif kind in _WRITES:
                result = self._write(kind, sector, source)
            elif kind == abi.VIRTIO_BLK_T_FLUSH:
                self._image.flush()
                result = _OK
            elif kind == abi.VIRTIO_BLK_T_GET_ID:
                size = scatter(target, self._serial)
                result = _OK
            else:
                result = _UNSUPP
        except OSError as err:
            self._note_fault(kind, sector, err)
            if self._stops_at_errors and not isinstance(err, LastingError):
                raise HaltError(self._name, err.errno or EIO) from err
            result = _IOERR
        status[0] = result
        # Data before the status count only if all of them were written (virtio 1.2 §2.7.8.2).
        return room + 1 if size == room else size

    def _unpack_header(self, readable: Sequence[memoryview]) -> tuple[int, int, int]:
        header = gather(readable, _HEADER_SIZE)
        if len(header) < _HEADER_SIZE:
            raise VirtqueueError(f"{self._name}: a request header of {len(header)} bytes")
        kind, reserved, sector = _HEADER.unpack(header)
        return kind, reserved, sector

    def _read(self, sector: int, buffers: Sequence[memoryview], size: int) -> int:
        offset = sector * SECTOR_SIZE
        if size % SECTOR_SIZE or offset + size > self._capacity:
            return _IOERR
        self._image.readv(offset, buffers)
        return _OK

    def _write(self, kind: int, sector: int, buffers: Sequence[memoryview]) -> int:
        if self._image.is_read_only:
            return _IOERR
        if kind == _OUT:
            size, offset = total(buffers), sector * SECTOR_SIZE
            if size % SECTOR_SIZE or offset + size > self._capacity:
                return _IOERR
            self._image.writev(offset, buffers)
        else:
            result = self._write_segments(kind, buffers)
            if result != _OK:
                return result
        if self._is_write_through:
            self._image.flush()
        return _OK

    def _write_segments(self, kind: int, buffers: Sequence[memoryview]) -> int:
        """Discard or zero ranges; none of them if one is impossible."""
        size = total(buffers)
        if size % _SEGMENT.size or not 0 < size <= _SEGMENTS_MAX * _SEGMENT.size:
            return _IOERR
        segments = list(_SEGMENT.iter_unpack(gather(buffers, size)))
        unmap = abi.VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP
        known = unmap if kind == abi.VIRTIO_BLK_T_WRITE_ZEROES else 0
        for sector, sectors, flags in segments:
            if flags & ~known:
                return _UNSUPP
            if sectors > _SEGMENT_SECTORS_MAX or (sector + sectors) * SECTOR_SIZE > self._capacity:
                return _IOERR
        for sector, sectors, flags in segments:
            offset, length = sector * SECTOR_SIZE, sectors * SECTOR_SIZE
            if kind == abi.VIRTIO_BLK_T_DISCARD:
                self._image.discard(offset, length)
            else:
                self._image.write_zeroes(offset, length, may_unmap=bool(flags & unmap))
        return _OK

    def _note_fault(self, kind: int, sector: int, err: OSError) -> None:
        """Log each kind of fault once: a guest can cause it as often as it likes."""
        fault = kind, err.errno
        if fault not in self._faults:
            self._faults.add(fault)
            where = f" at sector {sector}" if kind in {_IN, _OUT} else ""
            log.warning("%s: %s%s: %s", self._name, _VERBS[kind], where, err.strerror)
