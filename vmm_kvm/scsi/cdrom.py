"""A CD-ROM drive: commands in, answers out.

It knows the size of its medium, not its contents: a command that reads is answered with the extent
to read, which goes straight into the guest's buffers. It has the commands that Linux, OpenBSD,
SeaBIOS, OVMF, GRUB and isolinux use, and answers others with sense data.
"""

from typing import Literal

from vmm_kvm.errors import StateError
from vmm_kvm.scsi import mmc, spc
from vmm_kvm.scsi.mmc import BLOCK_SIZE, MediaEvent
from vmm_kvm.scsi.spc import DONE, Check, Data, Extent, Identity, Opcode, Outcome, Sense
from vmm_kvm.state import U8, U64, PartState

DEVICE_TYPE = 0x05
"""CD/DVD (SPC-4 table 142)."""
CDB_SIZE_MAX = 16
"""Bytes of a command that are read."""

IDENTITY = Identity("OpenBSD", "VMM CD-ROM", "001", "vmm-cd0")
"""As vmd(8) has it, which has no serial number."""

_NEEDS_MEDIUM = frozenset(
    {
        Opcode.TEST_UNIT_READY,
        *(Opcode.READ_6, Opcode.READ_10, Opcode.READ_12, Opcode.READ_16),
        *(Opcode.READ_CAPACITY_10, Opcode.SERVICE_ACTION_IN_16, Opcode.SEEK_10),
        *(Opcode.READ_TOC, Opcode.READ_DISC_INFORMATION),
    }
)
# Executed even while a unit attention is pending (SAM-5 §5.14; MMC-5 §6.7 for events).
_IGNORES_ATTENTION = frozenset(
    {
        *(Opcode.INQUIRY, Opcode.REPORT_LUNS, Opcode.REQUEST_SENSE),
        *(Opcode.GET_CONFIGURATION, Opcode.GET_EVENT_STATUS_NOTIFICATION),
    }
)


class CdRomState(PartState):
    """Everything that a guest can observe of a drive."""

    blocks: U64
    """Of its medium, also while the tray is open."""
    is_open: bool
    is_locked: bool
    event: MediaEvent
    attention: tuple[U8, U8, U8] | None
    """Sense key, additional code and qualifier for the next command."""
    version: Literal[1] = 1


class CdRom:
    """A drive with a tray; not thread-safe.

    The guest may open the tray and close it again: the medium is back then, and the drive reports
    that it may have changed.

    Source: MMC-5; SPC-4; OpenBSD vmd/vioscsi.c
    """

    __slots__ = ("_attention", "_blocks", "_event", "_is_locked", "_is_open")

    def __init__(self, size: int | None) -> None:
        """Make a drive, its tray closed, with a medium of `size` bytes; None is an empty one."""
        self._blocks = -(-size // BLOCK_SIZE) if size else 0
        self._is_open = False
        self._is_locked = False
        self._event = MediaEvent.NO_CHANGE
        self._attention: Sense | None = None

    @property
    def blocks(self) -> int:
        """Blocks of 2048 bytes on the medium that can be read; 0 without one."""
        return 0 if self._is_open else self._blocks

    def reset(self) -> None:
        """Act as at a logical unit reset: unlock the tray, and let the next command report it."""
        self._is_locked = False
        self._attention = spc.RESET_OCCURRED

    def execute(self, cdb: bytes) -> Outcome:
        """Execute a command; `cdb` is a command descriptor block, zeros behind its end.

        Every command is answered, an impossible one with a Check.
        """
        cdb = cdb[:CDB_SIZE_MAX].ljust(CDB_SIZE_MAX, b"\0")
        opcode = cdb[0]
        if self._attention and opcode not in _IGNORES_ATTENTION:
            sense, self._attention = self._attention, None
            return Check(sense)
        if opcode in _NEEDS_MEDIUM:
            if not self.blocks:
                is_open = self._is_open
                return Check(spc.NO_MEDIUM_TRAY_OPEN if is_open else spc.NO_MEDIUM_TRAY_CLOSED)
            return self._execute_with_medium(opcode, cdb)
        match opcode:
            case Opcode.INQUIRY:
                return spc.inquiry(cdb, DEVICE_TYPE, IDENTITY)
            case Opcode.REPORT_LUNS:
                return spc.report_luns(cdb)
            case Opcode.REQUEST_SENSE:
                return self._request_sense(cdb)
            case Opcode.MODE_SENSE_6 | Opcode.MODE_SENSE_10:
                has_medium = bool(self.blocks)
                return mmc.mode_sense(
                    cdb, is_open=self._is_open, is_locked=self._is_locked, has_medium=has_medium
                )
            case Opcode.START_STOP_UNIT:
                return self._start_stop(cdb)
            case Opcode.PREVENT_ALLOW_MEDIUM_REMOVAL:
                self._is_locked = bool(cdb[4] & 0x01)
                return DONE
            case Opcode.GET_CONFIGURATION:
                return mmc.get_configuration(cdb, self.blocks)
            case Opcode.GET_EVENT_STATUS_NOTIFICATION:
                return self._get_event(cdb)
            case Opcode.MECHANISM_STATUS:
                return mmc.mechanism_status(cdb, is_open=self._is_open)
            case Opcode.SET_CD_SPEED | Opcode.SYNCHRONIZE_CACHE_10:
                return DONE
            case _:
                return Check(spc.INVALID_OPCODE)

    def save(self) -> CdRomState:
        """Return a snapshot."""
        attention = self._attention
        return CdRomState(
            blocks=self._blocks,
            is_open=self._is_open,
            is_locked=self._is_locked,
            event=self._event,
            attention=None
            if attention is None
            else (attention.key, attention.code, attention.qualifier),
        )

    def restore(self, state: CdRomState) -> None:
        """Continue from a snapshot of a drive with the same medium.

        Raises:
            StateError: the medium has another size, or there is no such sense key.
        """
        if state.blocks != self._blocks:
            raise StateError(f"a medium of {state.blocks} blocks, not {self._blocks}")
        if state.attention and state.attention[0] not in {int(key) for key in spc.SenseKey}:
            raise StateError(f"attention: sense key {state.attention[0]}")
        self._is_open = state.is_open
        self._is_locked = state.is_locked
        self._event = state.event
        self._attention = state.attention and Sense(
            spc.SenseKey(state.attention[0]), *state.attention[1:]
        )

    def _execute_with_medium(self, opcode: int, cdb: bytes) -> Outcome:
        match opcode:
            case Opcode.TEST_UNIT_READY:
                return DONE
            case Opcode.READ_CAPACITY_10:
                return spc.read_capacity_10(self.blocks, BLOCK_SIZE)
            case Opcode.SERVICE_ACTION_IN_16:
                if cdb[1] & 0x1F != spc.SERVICE_ACTION_READ_CAPACITY_16:
                    return Check(spc.INVALID_FIELD)
                return spc.read_capacity_16(cdb, self.blocks, BLOCK_SIZE)
            case Opcode.READ_TOC:
                return mmc.read_toc(cdb, self.blocks)
            case Opcode.READ_DISC_INFORMATION:
                return mmc.read_disc_information(cdb)
            case Opcode.SEEK_10:
                is_there = int.from_bytes(cdb[2:6], "big") < self.blocks
                return DONE if is_there else Check(spc.LBA_OUT_OF_RANGE)
            case _:  # a READ
                block, count = spc.read_range(cdb)
                if block + count > self.blocks:
                    return Check(spc.LBA_OUT_OF_RANGE)
                return Extent(block * BLOCK_SIZE, count * BLOCK_SIZE)

    def _request_sense(self, cdb: bytes) -> Outcome:
        answer = spc.request_sense(cdb, self._attention or spc.NO_SENSE)
        if isinstance(answer, Data):
            self._attention = None
        return answer

    def _start_stop(self, cdb: bytes) -> Outcome:
        power_condition, load_or_eject, start = cdb[4] & 0xF0, cdb[4] & 0x02, cdb[4] & 0x01
        if power_condition or not load_or_eject:
            return DONE  # there is no motor
        if not start and self._is_locked:
            return Check(spc.REMOVAL_PREVENTED)
        if self._is_open == bool(start):
            self._is_open = not start
            if self._blocks and start:
                self._event = MediaEvent.NEW_MEDIA
                self._attention = spc.MEDIUM_MAY_HAVE_CHANGED
            elif self._blocks:
                self._event = MediaEvent.MEDIA_REMOVAL
        return DONE

    def _get_event(self, cdb: bytes) -> Outcome:
        answer = mmc.get_event(
            cdb, self._event, is_open=self._is_open, has_medium=bool(self.blocks)
        )
        if isinstance(answer, Data) and len(answer.data) > mmc.EVENT_HEADER_SIZE:
            self._event = MediaEvent.NO_CHANGE
        return answer
