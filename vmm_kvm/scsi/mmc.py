"""Descriptions of a CD or DVD: contents, features, events, and the drive's mode pages.

The medium is data in one session and one track, as an ISO image is. Addresses are in blocks of
2048 bytes; MSF is minutes, seconds and frames of a CD, with its lead-in of two seconds.

Source: MMC-5.
"""

import struct
from enum import IntEnum

from vmm_kvm.scsi.spc import (
    INVALID_FIELD,
    SAVING_NOT_SUPPORTED,
    Check,
    Data,
    Outcome,
)

BLOCK_SIZE = 2048

_FRAMES = 75
_SECONDS = 60
_LEAD_IN_FRAMES = 150
_MSF_MAX = 256 * _SECONDS * _FRAMES - 1
_CD_BLOCKS_MAX = 80 * _SECONDS * _FRAMES  # more is a DVD

_TRACK = 1
_SESSION = 1
_LEAD_OUT = 0xAA
_DATA_TRACK = 0x14  # ADR 1: position; control 4: data
_POINT_FIRST, _POINT_LAST, _POINT_LEAD_OUT = 0xA0, 0xA1, 0xA2

_CURRENT = 1
_PERSISTENT = 2

EVENT_HEADER_SIZE = 4
"""Bytes before an event, if there is one, in what GET EVENT STATUS NOTIFICATION returns."""
_EVENT_NONE = 0x80
_CLASS_MEDIA = 4


class Profile(IntEnum):
    """Kinds of media (MMC-5 table 90)."""

    NONE = 0x0000
    CD_ROM = 0x0008
    DVD_ROM = 0x0010


class MediaEvent(IntEnum):
    """Events of the medium (MMC-5 table 303)."""

    NO_CHANGE = 0
    NEW_MEDIA = 2
    MEDIA_REMOVAL = 3


def profile(blocks: int) -> Profile:
    """Return the kind of a medium of so many blocks; 0 means that there is none."""
    if not blocks:
        return Profile.NONE
    return Profile.CD_ROM if blocks <= _CD_BLOCKS_MAX else Profile.DVD_ROM


def msf(block: int) -> bytes:
    """Return three bytes: minutes, seconds and frames; a DVD's later blocks have the last MSF."""
    seconds, frames = divmod(min(block + _LEAD_IN_FRAMES, _MSF_MAX), _FRAMES)
    return bytes((*divmod(seconds, _SECONDS), frames))


def read_toc(cdb: bytes, blocks: int) -> Outcome:
    """Answer READ TOC/PMA/ATIP. Source: MMC-5 §6.26; SFF-8020i §10.8.20 for the older format."""
    is_msf = bool(cdb[1] & 0x02)
    # Old ATAPI drivers put the format into the control byte.
    kind = cdb[2] & 0x0F or cdb[9] >> 6
    first, allocation = cdb[6], int.from_bytes(cdb[7:9], "big")
    match kind:
        case 0:
            if first > _TRACK and first != _LEAD_OUT:
                return Check(INVALID_FIELD)
            body = bytes((_TRACK, _TRACK))
            if first <= _TRACK:
                body += _toc_entry(_TRACK, _address(0, is_msf))
            body += _toc_entry(_LEAD_OUT, _address(blocks, is_msf))
        case 1:
            body = bytes((_SESSION, _SESSION)) + _toc_entry(_TRACK, _address(0, is_msf))
        case 2:
            if first > _SESSION:
                return Check(INVALID_FIELD)
            body = bytes((_SESSION, _SESSION)) + b"".join(
                (
                    _raw_entry(_POINT_FIRST, bytes((_TRACK, 0, 0))),
                    _raw_entry(_POINT_LAST, bytes((_TRACK, 0, 0))),
                    _raw_entry(_POINT_LEAD_OUT, msf(blocks)),
                    _raw_entry(_TRACK, msf(0)),
                )
            )
        case _:
            return Check(INVALID_FIELD)
    return Data((struct.pack(">H", len(body)) + body)[:allocation])


def _address(block: int, is_msf: bool) -> bytes:
    return b"\0" + msf(block) if is_msf else min(block, 0xFFFF_FFFF).to_bytes(4, "big")


def _toc_entry(track: int, address: bytes) -> bytes:
    return struct.pack(">xBBx4s", _DATA_TRACK, track, address)


def _raw_entry(point: int, position: bytes) -> bytes:
    return struct.pack(">BBxB4x3s", _SESSION, _DATA_TRACK, point, position)


def get_configuration(cdb: bytes, blocks: int) -> Outcome:
    """Answer GET CONFIGURATION. Source: MMC-5 §6.6, §5.3."""
    kind = cdb[1] & 0x03
    start, allocation = int.from_bytes(cdb[2:4], "big"), int.from_bytes(cdb[7:9], "big")
    if kind == 3:
        return Check(INVALID_FIELD)
    current = profile(blocks)
    is_cd, is_dvd = current is Profile.CD_ROM, current is Profile.DVD_ROM
    profiles = struct.pack(">HBxHBx", Profile.DVD_ROM, is_dvd, Profile.CD_ROM, is_cd)
    always = _PERSISTENT | _CURRENT
    features = (
        # code, version << 2 and flags, contents
        (0x0000, always, profiles),
        (0x0001, 2 << 2 | always, struct.pack(">IB3x", 1, 0x01)),  # core: SCSI, device busy event
        (0x0002, 1 << 2 | always, b"\x02\0\0\0"),  # morphing: operational change events
        (0x0003, always, b"\x29\0\0\0"),  # removable: tray, can eject and lock
        (0x0010, bool(blocks), struct.pack(">IHBx", BLOCK_SIZE, 1, 0)),  # random readable
        (0x001E, 2 << 2 | is_cd, bytes(4)),  # CD read
        (0x001F, is_dvd, b""),  # DVD read
        (0x0105, always, b""),  # timeout
    )
    body = b"".join(
        struct.pack(">HBB", code, flags, len(contents)) + contents
        for code, flags, contents in features
        if (code == start if kind == 2 else code >= start)
        and (kind != 1 or flags & _CURRENT or not blocks)
    )
    header = struct.pack(">I2xH", 4 + len(body), current)
    return Data((header + body)[:allocation])


def get_event(cdb: bytes, event: MediaEvent, *, is_open: bool, has_medium: bool) -> Outcome:
    """Answer GET EVENT STATUS NOTIFICATION: only polled, only the media class. MMC-5 §6.7."""
    if not cdb[1] & 0x01:
        return Check(INVALID_FIELD)
    wanted, allocation = cdb[4], int.from_bytes(cdb[7:9], "big")
    supported = 1 << _CLASS_MEDIA
    if not wanted & supported:
        return Data(struct.pack(">HBB", 2, _EVENT_NONE, supported)[:allocation])
    status = is_open | has_medium << 1
    header = struct.pack(">HBB", 6, _CLASS_MEDIA, supported)
    return Data((header + struct.pack(">BB2x", event, status))[:allocation])


def read_disc_information(cdb: bytes) -> Outcome:
    """Answer READ DISC INFORMATION: one finished session of one track. Source: MMC-5 §6.22."""
    allocation = int.from_bytes(cdb[7:9], "big")
    if cdb[1] & 0x07:
        return Check(INVALID_FIELD)
    complete = 0b1110  # disc and last session
    unrestricted = 0x20
    nowhere = 0xFFFF_FFFF  # where a next session would begin
    data = struct.pack(
        ">HBBBBBBBBBBIII8xBB",
        32,
        complete,
        _TRACK,
        _SESSION,
        _TRACK,
        _TRACK,
        unrestricted,
        0,  # disc type: CD-DA or CD-ROM
        0,
        0,
        0,
        0,  # disc identification
        nowhere,
        nowhere,
        0,
        0,
    )
    return Data(data[:allocation])


def mechanism_status(cdb: bytes, *, is_open: bool) -> Data:
    """Answer MECHANISM STATUS: no changer. Source: MMC-5 §6.10."""
    allocation = int.from_bytes(cdb[8:10], "big")
    return Data(struct.pack(">BB6x", 0, is_open << 4)[:allocation])


_PAGE_ERROR_RECOVERY = 0x01
_PAGE_CAPABILITIES = 0x2A
_PAGE_ALL = 0x3F
_RETRIES = 5
_MEDIUM_DATA_CD = 0x01
_MEDIUM_ABSENT = 0x70
_MEDIUM_TRAY_OPEN = 0x71
_SPEED = 706  # kB/s: four times that of a CD
_BUFFER_KIB = 512


def mode_sense(cdb: bytes, *, is_open: bool, is_locked: bool, has_medium: bool) -> Outcome:
    """Answer MODE SENSE(6) or (10), without block descriptors.

    Source: SPC-4 §6.11; MMC-3 §6.3; SFF-8020i §10.8.6 for the medium type.
    """
    control, page, subpage = cdb[2] >> 6, cdb[2] & 0x3F, cdb[3]
    if control == 3:
        return Check(SAVING_NOT_SUPPORTED)
    pages = {
        _PAGE_ERROR_RECOVERY: bytes((0, _RETRIES, 0, 0, 0, 0)),
        _PAGE_CAPABILITIES: _capabilities(is_locked=is_locked),
    }
    if page != _PAGE_ALL:
        if page not in pages:
            return Check(INVALID_FIELD)
        pages = {page: pages[page]}
    if subpage not in (0, 0xFF if page == _PAGE_ALL else 0):
        return Check(INVALID_FIELD)
    body = b"".join(
        # The guest can change none of it.
        bytes((code, len(contents))) + (bytes(len(contents)) if control == 1 else contents)
        for code, contents in pages.items()
    )
    medium = _MEDIUM_TRAY_OPEN if is_open else _MEDIUM_DATA_CD if has_medium else _MEDIUM_ABSENT
    if cdb[0] == 0x1A:
        return Data((struct.pack(">BBxx", 3 + len(body), medium) + body)[: cdb[4]])
    allocation = int.from_bytes(cdb[7:9], "big")
    return Data((struct.pack(">HB5x", 6 + len(body), medium) + body)[:allocation])


def _capabilities(*, is_locked: bool) -> bytes:
    """Return the CD/DVD capabilities and mechanical status page behind its two-byte header."""
    reads = 0b1111  # CD-R, CD-RW, CD-R with method 2, DVD-ROM
    tray_that_locks_and_ejects = 0b0010_1001
    return struct.pack(
        ">BBBBBBHHHHxB2x",
        reads,
        0,  # writes nothing
        0b0111_0000,  # mode 2 forms 1 and 2, several sessions
        0,
        tray_that_locks_and_ejects | is_locked << 1,
        0,
        _SPEED,
        2,  # volume levels: on and off
        _BUFFER_KIB,
        _SPEED,
        0,
    )
