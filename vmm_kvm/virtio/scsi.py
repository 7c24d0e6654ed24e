"""virtio-scsi: a host adapter whose only logical unit, target 0 LUN 0, is a CD-ROM drive.

Every command is finished before the next is read, so there is never one to abort. There are no
events to report: the event queue's buffers stay with the device.

Source: virtio 1.2 §5.6; OpenBSD vmd/vioscsi.c
"""

import struct
from typing import Annotated, Literal, NamedTuple

from vmm_kvm.block.image import Image
from vmm_kvm.errors import VirtqueueError
from vmm_kvm.log import Log
from vmm_kvm.scatter import total
from vmm_kvm.scsi.cdrom import CdRom
from vmm_kvm.scsi.spc import UNRECOVERED_READ_ERROR, Check, Data, Extent, Sense
from vmm_kvm.state import Part, PartState, Range
from vmm_kvm.virtio import abi
from vmm_kvm.virtio.buffers import gather, scatter, split
from vmm_kvm.virtio.chain import Chain
from vmm_kvm.virtio.queue import Virtqueue

log = Log(__name__)

CONTROL_QUEUE, EVENT_QUEUE, REQUEST_QUEUE = 0, 1, 2
QUEUE_SIZE = 128

_CONFIG = struct.Struct("<IIIIIIIHHI")
_SENSE_SIZE_AT, _CDB_SIZE_AT = 20, 24
_SENSE_SIZE_MAX = 252  # SPC-4 §4.5.1
_CDB_SIZE_MAX = 260  # SPC-4 §4.2.3
_SEGMENTS_MAX = QUEUE_SIZE - 2
_SECTORS_MAX = 2048
_COMMANDS_PER_LUN = 32
_EVENT_SIZE = 16
# OpenBSD's driver takes the largest target for the number of targets, so this is one more.
_TARGET_MAX = 1
_LUN_MAX = 0

_COMMAND_HEADER = struct.Struct("<8s8sBBB")  # LUN, tag, task attribute, priority, CRN; then the CDB
_RESPONSE = struct.Struct("<IIHBB")  # sense length, residual, qualifier, status, response; sense
_TYPE = struct.Struct("<I")
_TASK_MANAGEMENT = struct.Struct("<II8sQ")  # type, function, LUN, tag
_NOTIFICATION = struct.Struct("<I8sI")  # type, LUN, events
_NOTIFICATION_RESPONSE = struct.Struct("<IB")  # events, response

_SINGLE_LEVEL_LUN = 1
_FLAT_LUN = 0x40
_STATUS_GOOD, _STATUS_CHECK_CONDITION = 0x00, 0x02
_RESETS = frozenset(
    {
        abi.VIRTIO_SCSI_T_TMF_I_T_NEXUS_RESET,
        abi.VIRTIO_SCSI_T_TMF_LOGICAL_UNIT_RESET,
    }
)


class Target(NamedTuple):
    """The meaning of the eight bytes of a LUN."""

    target: int
    lun: int

    @classmethod
    def of(cls, lun: bytes) -> "Target | None":
        """Read a LUN; None if it is in no form that virtio has. Source: virtio 1.2 §5.6.6.1."""
        if lun[0] != _SINGLE_LEVEL_LUN or lun[2] & ~0x3F not in (0, _FLAT_LUN) or any(lun[4:]):
            return None
        return cls(lun[1], (lun[2] & 0x3F) << 8 | lun[3])


DRIVE = Target(0, 0)


class ScsiCdSpec(NamedTuple):
    """A CD-ROM drive of a machine."""

    image: Image | None
    """The medium in it, which stays the caller's."""
    kind: Literal["scsi-cd"] = "scsi-cd"


class ScsiState(PartState):
    """Everything that a guest can observe of the adapter besides its drive."""

    sense_size: Annotated[int, Range(0, _SENSE_SIZE_MAX)]
    cdb_size: Annotated[int, Range(1, _CDB_SIZE_MAX)]
    version: Literal[1] = 1


class VirtioScsi:
    """A host adapter with a CD-ROM drive; a `virtio.device.Backend`."""

    __slots__ = (
        "_cdb_size",
        "_drive",
        "_image",
        "_owns_image",
        "_sense_size",
        "device_id",
        "features",
        "queue_sizes",
    )

    def __init__(self, image: Image | None, *, owns_image: bool = True) -> None:
        """Make an adapter whose drive holds `image`; None leaves it empty.

        With `owns_image` the image is closed with the device.
        """
        self.device_id = abi.VIRTIO_ID_SCSI
        self.features = 0
        self.queue_sizes: tuple[int, ...] = (QUEUE_SIZE, QUEUE_SIZE, QUEUE_SIZE)
        self._image = image
        self._owns_image = owns_image
        self._drive = CdRom(image.size if image else None)
        self._sense_size = abi.VIRTIO_SCSI_SENSE_DEFAULT_SIZE
        self._cdb_size = abi.VIRTIO_SCSI_CDB_DEFAULT_SIZE

    def config(self) -> bytes:
        """Return the configuration space. Source: virtio 1.2 §5.6.4."""
        return _CONFIG.pack(
            1,  # request queues
            _SEGMENTS_MAX,
            _SECTORS_MAX,
            _COMMANDS_PER_LUN,
            _EVENT_SIZE,
            self._sense_size,
            self._cdb_size,
            0,  # largest channel
            _TARGET_MAX,
            _LUN_MAX,
        )

    def write_config(self, offset: int, data: bytes) -> None:
        """Take the sizes of sense data and commands, if they are possible; ignore the rest."""
        if len(data) != 4:
            return
        size = int.from_bytes(data, "little")
        if offset == _SENSE_SIZE_AT and size <= _SENSE_SIZE_MAX:
            self._sense_size = size
        elif offset == _CDB_SIZE_AT and 0 < size <= _CDB_SIZE_MAX:
            self._cdb_size = size

    def start(self, features: int) -> None:
        """Begin; no feature matters."""

    def process(self, index: int, queue: Virtqueue) -> None:
        """Execute every command or task management function in queue `index`.

        Raises:
            VirtqueueError: a request is shorter than its kind.
        """
        if index == EVENT_QUEUE:
            while queue.pop() is not None:
                pass
            return
        serve = self._control if index == CONTROL_QUEUE else self._command
        while (chain := queue.pop()) is not None:
            queue.push(chain, serve(chain))

    def reset(self) -> None:
        """Return to the sizes that every driver knows; the drive keeps its state."""
        self._sense_size = abi.VIRTIO_SCSI_SENSE_DEFAULT_SIZE
        self._cdb_size = abi.VIRTIO_SCSI_CDB_DEFAULT_SIZE

    def close(self) -> None:
        """Close the image, if it is owned; idempotent."""
        if self._image and self._owns_image:
            self._image.close()

    # Snapshots

    def parts(self, name: str) -> list[Part]:
        """Return the adapter and its drive."""
        return [Part(f"{name}/scsi", self), Part(f"{name}/cdrom", self._drive)]

    def save(self) -> ScsiState:
        """Return a snapshot."""
        return ScsiState(sense_size=self._sense_size, cdb_size=self._cdb_size)

    def restore(self, state: ScsiState) -> None:
        """Continue from a snapshot."""
        self._sense_size = state.sense_size
        self._cdb_size = state.cdb_size

    # Commands

    def _command(self, chain: Chain) -> int:
        """Execute a command; returns how many bytes were written.

        Source: virtio 1.2 §5.6.6.1
        """
        header = gather(chain.readable, _COMMAND_HEADER.size + self._cdb_size)
        answer, data = split(chain.writable, _RESPONSE.size + self._sense_size)
        answer_size = total(answer)
        if len(header) < _COMMAND_HEADER.size + self._cdb_size:
            raise VirtqueueError(f"SCSI request of {len(header)} bytes")
        if answer_size < _RESPONSE.size + self._sense_size:
            raise VirtqueueError(f"SCSI response of {answer_size} bytes")
        sense, done = None, 0
        if Target.of(header[:8]) == DRIVE:
            response, sense, done = self._execute(header[_COMMAND_HEADER.size :], data)
        else:
            response = abi.VIRTIO_SCSI_S_BAD_TARGET
        encoded = sense.encode()[: self._sense_size] if sense else b""
        status = _STATUS_CHECK_CONDITION if sense else _STATUS_GOOD
        scatter(
            answer,
            _RESPONSE.pack(len(encoded), total(data) - done, 0, status, response)
            + encoded.ljust(self._sense_size, b"\0"),
        )
        return answer_size + done

    def _execute(self, cdb: bytes, data: list[memoryview]) -> tuple[int, Sense | None, int]:
        """Execute a command; returns response, sense data if it failed, and bytes of `data`."""
        room = total(data)
        match self._drive.execute(cdb):
            case Check(sense):
                return abi.VIRTIO_SCSI_S_OK, sense, 0
            case Data(answer) if len(answer) <= room:
                return abi.VIRTIO_SCSI_S_OK, None, scatter(data, answer)
            case Extent(offset, length) if length <= room:
                failure = self._read(offset, split(data, length)[0])
                return abi.VIRTIO_SCSI_S_OK, failure, 0 if failure else length
            case Data() | Extent():
                return abi.VIRTIO_SCSI_S_OVERRUN, None, 0

    def _read(self, offset: int, data: list[memoryview]) -> Sense | None:
        """Read from the medium straight into the guest's buffers; returns why it failed."""
        assert self._image, "the drive has a medium"
        try:
            self._image.readv(offset, data)
        except OSError as err:
            log.warning("CD-ROM: read at %#x: %s", offset, err)
            return UNRECOVERED_READ_ERROR
        return None

    # Task management and asynchronous notification

    def _control(self, chain: Chain) -> int:
        """Serve a request of the control queue; returns how many bytes were written.

        Source: virtio 1.2 §5.6.6.2
        """
        request = gather(chain.readable, _TASK_MANAGEMENT.size)
        kind = _TYPE.unpack_from(request)[0] if len(request) >= _TYPE.size else None
        if kind == abi.VIRTIO_SCSI_T_TMF and len(request) >= _TASK_MANAGEMENT.size:
            _, function, lun, _ = _TASK_MANAGEMENT.unpack_from(request)
            answer = bytes((self._manage(function, Target.of(lun)),))
        elif (
            kind in (abi.VIRTIO_SCSI_T_AN_QUERY, abi.VIRTIO_SCSI_T_AN_SUBSCRIBE)
            and len(request) >= _NOTIFICATION.size
        ):
            _, lun, _ = _NOTIFICATION.unpack_from(request)
            answer = _NOTIFICATION_RESPONSE.pack(0, _presence(Target.of(lun)))
        else:
            raise VirtqueueError(f"SCSI control request {kind} of {len(request)} bytes")
        if total(chain.writable) < len(answer):
            raise VirtqueueError("SCSI control request without room for the response")
        return scatter(chain.writable, answer)

    def _manage(self, function: int, target: Target | None) -> int:
        response = _presence(target)
        if response == abi.VIRTIO_SCSI_S_OK and function in _RESETS:
            self._drive.reset()
        if function > abi.VIRTIO_SCSI_T_TMF_QUERY_TASK_SET:
            return abi.VIRTIO_SCSI_S_FUNCTION_REJECTED
        return response  # S_OK is FUNCTION COMPLETE: no command is under way


def _presence(target: Target | None) -> int:
    if target is None or target.target != DRIVE.target:
        return abi.VIRTIO_SCSI_S_BAD_TARGET
    return abi.VIRTIO_SCSI_S_OK if target == DRIVE else abi.VIRTIO_SCSI_S_INCORRECT_LUN
