"""SCSI common to all device types: operation codes, sense data, outcomes, INQUIRY, REPORT LUNS.

Source: SPC-4; SBC-3 for capacities.
"""

import struct
from enum import IntEnum
from typing import NamedTuple


class Opcode(IntEnum):
    """Operation codes: the first byte of a command descriptor block."""

    TEST_UNIT_READY = 0x00
    REQUEST_SENSE = 0x03
    READ_6 = 0x08
    INQUIRY = 0x12
    MODE_SENSE_6 = 0x1A
    START_STOP_UNIT = 0x1B
    PREVENT_ALLOW_MEDIUM_REMOVAL = 0x1E
    READ_CAPACITY_10 = 0x25
    READ_10 = 0x28
    SEEK_10 = 0x2B
    SYNCHRONIZE_CACHE_10 = 0x35
    READ_TOC = 0x43
    GET_CONFIGURATION = 0x46
    GET_EVENT_STATUS_NOTIFICATION = 0x4A
    READ_DISC_INFORMATION = 0x51
    MODE_SENSE_10 = 0x5A
    READ_16 = 0x88
    SERVICE_ACTION_IN_16 = 0x9E
    REPORT_LUNS = 0xA0
    READ_12 = 0xA8
    SET_CD_SPEED = 0xBB
    MECHANISM_STATUS = 0xBD


SERVICE_ACTION_READ_CAPACITY_16 = 0x10


class SenseKey(IntEnum):
    """Kinds of conditions in sense data (SPC-4 table 48)."""

    NO_SENSE = 0x0
    NOT_READY = 0x2
    MEDIUM_ERROR = 0x3
    ILLEGAL_REQUEST = 0x5
    UNIT_ATTENTION = 0x6


class Sense(NamedTuple):
    """A condition: its key, and the additional code and qualifier (SPC-4 annex E)."""

    key: SenseKey
    code: int = 0
    qualifier: int = 0

    def encode(self) -> bytes:
        """Return 18 bytes of current, fixed-format sense data. Source: SPC-4 §4.5.3."""
        return _SENSE.pack(_SENSE_CURRENT, self.key, _SENSE_MORE, self.code, self.qualifier)


_SENSE = struct.Struct(">BxB4xB4xBB4x")
_SENSE_CURRENT = 0x70
_SENSE_MORE = 10  # bytes behind the eighth

NO_SENSE = Sense(SenseKey.NO_SENSE)
NO_MEDIUM_TRAY_CLOSED = Sense(SenseKey.NOT_READY, 0x3A, 0x01)
NO_MEDIUM_TRAY_OPEN = Sense(SenseKey.NOT_READY, 0x3A, 0x02)
UNRECOVERED_READ_ERROR = Sense(SenseKey.MEDIUM_ERROR, 0x11)
INVALID_OPCODE = Sense(SenseKey.ILLEGAL_REQUEST, 0x20)
LBA_OUT_OF_RANGE = Sense(SenseKey.ILLEGAL_REQUEST, 0x21)
INVALID_FIELD = Sense(SenseKey.ILLEGAL_REQUEST, 0x24)
SAVING_NOT_SUPPORTED = Sense(SenseKey.ILLEGAL_REQUEST, 0x39)
REMOVAL_PREVENTED = Sense(SenseKey.ILLEGAL_REQUEST, 0x53, 0x02)
MEDIUM_MAY_HAVE_CHANGED = Sense(SenseKey.UNIT_ATTENTION, 0x28)
RESET_OCCURRED = Sense(SenseKey.UNIT_ATTENTION, 0x29, 0x03)


class Data(NamedTuple):
    """The command is done; these bytes, if any, go to the initiator."""

    data: bytes


class Extent(NamedTuple):
    """The command asks for bytes of the medium, which the caller has to read."""

    offset: int
    length: int


class Check(NamedTuple):
    """CHECK CONDITION: the command failed, and the initiator learns why."""

    sense: Sense


Outcome = Data | Extent | Check
DONE = Data(b"")


class Identity(NamedTuple):
    """A device's identity; ASCII."""

    vendor: str
    """At most 8 characters."""
    product: str
    """At most 16 characters."""
    revision: str
    """At most 4 characters."""
    serial: str
    """At most 64 characters."""


_VERSION_SPC3 = 5
_RESPONSE_FORMAT = 2
_REMOVABLE = 0x80
_COMMAND_QUEUING = 0x02
_PAGE_SUPPORTED = 0x00
_PAGE_SERIAL = 0x80
_PAGE_IDENTIFICATION = 0x83
_ASCII = 2
_T10_VENDOR_ID = 1
_EVPD = 0x01
_LUNS_ALLOCATION_MIN = 16
_LUN_0 = bytes(8)


def inquiry(cdb: bytes, device_type: int, identity: Identity) -> Outcome:
    """Answer INQUIRY for a device with removable media. Source: SPC-4 §6.4, §7.8."""
    page, allocation = cdb[2], int.from_bytes(cdb[3:5], "big")
    if cdb[1] & ~_EVPD:
        return Check(INVALID_FIELD)
    if cdb[1] & _EVPD:
        body = _vital_product_data(page, identity)
        if body is None:
            return Check(INVALID_FIELD)
        return Data((struct.pack(">BBH", device_type, page, len(body)) + body)[:allocation])
    if page:
        return Check(INVALID_FIELD)
    standard = struct.pack(
        ">BBBBBBBB8s16s4s",
        device_type,
        _REMOVABLE,
        _VERSION_SPC3,
        _RESPONSE_FORMAT,
        36 - 5,
        0,
        0,
        _COMMAND_QUEUING,
        _padded(identity.vendor, 8),
        _padded(identity.product, 16),
        _padded(identity.revision, 4),
    )
    return Data(standard[:allocation])


def _vital_product_data(page: int, identity: Identity) -> bytes | None:
    match page:
        case 0x00:
            return bytes((_PAGE_SUPPORTED, _PAGE_SERIAL, _PAGE_IDENTIFICATION))
        case 0x80:
            return identity.serial.encode("ascii")
        case 0x83:
            name = (
                _padded(identity.vendor, 8)
                + _padded(identity.product, 16)
                + identity.serial.encode("ascii")
            )
            return struct.pack(">BBxB", _ASCII, _T10_VENDOR_ID, len(name)) + name
        case _:
            return None


def _padded(text: str, size: int) -> bytes:
    return text.encode("ascii").ljust(size)[:size]


def report_luns(cdb: bytes) -> Outcome:
    """Answer REPORT LUNS for a target whose only logical unit is 0. Source: SPC-4 §6.33."""
    select, allocation = cdb[2], int.from_bytes(cdb[6:10], "big")
    if allocation < _LUNS_ALLOCATION_MIN or select > 2:
        return Check(INVALID_FIELD)
    luns = b"" if select == 1 else _LUN_0  # 1: only well-known ones, and there are none
    return Data((struct.pack(">I4x", len(luns)) + luns)[:allocation])


def request_sense(cdb: bytes, sense: Sense) -> Outcome:
    """Answer REQUEST SENSE; there is no descriptor format. Source: SPC-4 §6.39."""
    if cdb[1] & 0x01:
        return Check(INVALID_FIELD)
    return Data(sense.encode()[: cdb[4]])


def read_capacity_10(blocks: int, block_size: int) -> Data:
    """Answer READ CAPACITY(10): all ones for what takes READ CAPACITY(16). Source: SBC-3 §5.15."""
    return Data(struct.pack(">II", min(blocks - 1, 0xFFFF_FFFF), block_size))


def read_capacity_16(cdb: bytes, blocks: int, block_size: int) -> Data:
    """Answer READ CAPACITY(16). Source: SBC-3 §5.16."""
    allocation = int.from_bytes(cdb[10:14], "big")
    return Data(struct.pack(">QI20x", blocks - 1, block_size)[:allocation])


def read_range(cdb: bytes) -> tuple[int, int]:
    """Return the first block and the number of blocks that a READ of any length names."""
    match cdb[0]:
        case Opcode.READ_6:
            return int.from_bytes(cdb[1:4], "big") & 0x1F_FFFF, cdb[4] or 256
        case Opcode.READ_10:
            return int.from_bytes(cdb[2:6], "big"), int.from_bytes(cdb[7:9], "big")
        case Opcode.READ_12:
            return int.from_bytes(cdb[2:6], "big"), int.from_bytes(cdb[6:10], "big")
        case _:
            return int.from_bytes(cdb[2:10], "big"), int.from_bytes(cdb[10:14], "big")
