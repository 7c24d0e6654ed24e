"""The messages of vhost-user: numbers, flags and payloads, from bytes and to bytes.

A message is a header of three 32-bit fields (request, flags, bytes of payload) and a payload, all
little-endian on x86. Pure: descriptors and sockets are in `channel`. Left out, because nothing here
offers their features: IOTLB, in-flight tracking, postcopy, in-band notifications.

Source: QEMU docs/interop/vhost-user, "Message Specification".
"""

import enum
import struct
from collections.abc import Sequence
from typing import NamedTuple, Self

from vmm_kvm.errors import VmmError

HEADER_SIZE = 12
PAYLOAD_MAX = 1024
"""Bytes; the largest payload defined, 8 memory regions or 256 bytes of configuration, is 268."""
CONFIG_MAX = 256
"""Bytes of configuration space that can be accessed; QEMU's VHOST_USER_MAX_CONFIG_SIZE."""
REGIONS_MAX = 8
"""Regions, each with its descriptor, in one memory table."""
FDS_MAX = 8
QUEUES_MAX = 256
"""Queue indices are 8 bits wide in the messages that carry a descriptor."""

FEATURE_PROTOCOL_FEATURES = 1 << 30
"""The virtio feature bit by which a server says that it has protocol features."""
FEATURE_LOG_ALL = 1 << 26
"""The virtio feature bit by which a front-end has writes to guest memory logged."""
VRING_LOG = 1 << 0
"""In the flags of a ring's address: its used ring is logged too."""

VERSION = 1
VERSION_MASK = 0x3
FLAG_REPLY = 1 << 2
FLAG_NEED_REPLY = 1 << 3

VRING_INDEX_MASK = 0xFF
VRING_NO_FD = 1 << 8
HALT_SHIFT = 8
"""In a status that a server of ours tells one of our front-ends: from this bit on stands the errno
of a request that waits for the host, 0 for none. A status of virtio's ends below."""
"""In SET_VRING_KICK, _CALL and _ERR: no descriptor comes along, so the ring is polled."""

_HEADER = struct.Struct("<III")
_U64 = struct.Struct("<Q")
_LOG = struct.Struct("<QQ")
_VRING_STATE = struct.Struct("<II")
_VRING_ADDRESS = struct.Struct("<IIQQQQ")
_REGION_COUNT = struct.Struct("<II")
_REGION = struct.Struct("<QQQQ")
_SINGLE_REGION = struct.Struct("<QQQQQ")
_IMAGE_COPY = struct.Struct("<QQQ")
_CHANGE = struct.Struct("<QQQQQ")
_CONFIG = struct.Struct("<III")


class VhostUserError(VmmError):
    """The peer broke the protocol or went away; the connection is of no more use."""


class Request(enum.IntEnum):
    """Requests of a front-end, by the specification's names without VHOST_USER_."""

    GET_FEATURES = 1
    SET_FEATURES = 2
    SET_OWNER = 3
    RESET_OWNER = 4
    SET_MEM_TABLE = 5
    SET_LOG_BASE = 6
    SET_VRING_NUM = 8
    SET_VRING_ADDR = 9
    SET_VRING_BASE = 10
    GET_VRING_BASE = 11
    SET_VRING_KICK = 12
    SET_VRING_CALL = 13
    SET_VRING_ERR = 14
    GET_PROTOCOL_FEATURES = 15
    SET_PROTOCOL_FEATURES = 16
    GET_QUEUE_NUM = 17
    SET_VRING_ENABLE = 18
    GET_CONFIG = 24
    SET_CONFIG = 25
    RESET_DEVICE = 34
    GET_MAX_MEM_SLOTS = 36
    ADD_MEM_REG = 37
    REM_MEM_REG = 38
    SET_STATUS = 39
    GET_STATUS = 40
    LEND = 0x6B76_6D01
    """Ours, of no specification: 1 releases the device's resource, 0 takes it back."""
    COPY_IMAGE = 0x6B76_6D02
    """Ours alone: copy a part of a disk, `ImageCopy`, into the file that comes along."""
    LOG_CHANGES = 0x6B76_6D03
    """Ours alone: 1 marks all of a disk as changed, and from now on what changes; 0 ends that."""
    COPY_CHANGES = 0x6B76_6D04
    """Ours alone: copy the next changed part of a disk to the beginning of the file that comes
    along; answered by an `ImageChange`."""


COPY_MAX = 64 << 20
"""Bytes of a disk that are copied by one request: a server has to answer in time."""


class ImageCopy(NamedTuple):
    """A part of a disk, and where it goes; all in bytes."""

    start: int
    size: int
    target: int

    def pack(self) -> bytes:
        """Return the payload."""
        return _IMAGE_COPY.pack(*self)

    @classmethod
    def unpack(cls, data: bytes) -> Self:
        """Read a payload.

        Raises:
            VhostUserError: it is none.
        """
        if len(data) != _IMAGE_COPY.size:
            raise VhostUserError(f"{len(data)} bytes of payload")
        return cls(*_IMAGE_COPY.unpack(data))


class ImageChange(NamedTuple):
    """A part of a disk that had changed, and has been copied; all in bytes."""

    error: int
    """The number of an error; 0 for none."""
    start: int
    size: int
    """0: nothing has changed."""
    is_zero: int
    """1: it reads as zero, and is not in the file."""
    left: int
    """What has changed besides."""

    def pack(self) -> bytes:
        """Return the payload."""
        return _CHANGE.pack(*self)

    @classmethod
    def unpack(cls, data: bytes) -> Self:
        """Read a payload; raises VhostUserError for another size."""
        return cls(*_unpack(_CHANGE, data))


class ProtocolFeature(enum.IntFlag):
    """Protocol features, by the specification's names."""

    MQ = 1 << 0
    LOG_SHMFD = 1 << 1
    REPLY_ACK = 1 << 3
    CONFIG = 1 << 9
    RESET_DEVICE = 1 << 13
    CONFIGURE_MEM_SLOTS = 1 << 15
    STATUS = 1 << 16


class Header(NamedTuple):
    """The first 12 bytes of every message."""

    request: int
    flags: int
    size: int
    """Bytes of payload that follow."""

    @classmethod
    def unpack(cls, data: bytes) -> Self:
        """Decode and check a header; whether the request is known is the caller's question.

        Raises:
            VhostUserError: another version, or a payload that no message has.
        """
        header = cls._make(_HEADER.unpack(data))
        if header.flags & VERSION_MASK != VERSION:
            raise VhostUserError(f"protocol version {header.flags & VERSION_MASK}, not {VERSION}")
        if header.size > PAYLOAD_MAX:
            raise VhostUserError(f"{request_name(header.request)}: payload of {header.size} bytes")
        return header

    def pack(self) -> bytes:
        """Encode the header."""
        return _HEADER.pack(*self)


class VringState(NamedTuple):
    """A number that belongs to a ring: its size, its base, whether it is enabled."""

    ring: int
    """The ring's index."""
    num: int

    @classmethod
    def unpack(cls, payload: bytes) -> Self:
        """Decode; raises VhostUserError for another size."""
        return cls._make(_unpack(_VRING_STATE, payload))

    def pack(self) -> bytes:
        """Encode."""
        return _VRING_STATE.pack(*self)


class VringAddress(NamedTuple):
    """The places of a ring's parts, as addresses in the front-end's process."""

    ring: int
    """The ring's index."""
    flags: int
    descriptor: int
    used: int
    available: int
    log: int

    @classmethod
    def unpack(cls, payload: bytes) -> Self:
        """Decode; raises VhostUserError for another size."""
        return cls._make(_unpack(_VRING_ADDRESS, payload))

    def pack(self) -> bytes:
        """Encode."""
        return _VRING_ADDRESS.pack(*self)


class MemoryRegion(NamedTuple):
    """A piece of guest memory that the descriptor beside it maps."""

    guest_address: int
    size: int
    user_address: int
    """The address of its first byte in the front-end's process, which ring addresses refer to."""
    mmap_offset: int
    """Its start in the descriptor's file, bytes."""


class ConfigAccess(NamedTuple):
    """A piece of the device's configuration space."""

    offset: int
    flags: int
    data: bytes

    @classmethod
    def unpack(cls, payload: bytes) -> Self:
        """Decode and check.

        Raises:
            VhostUserError: the sizes disagree, or the piece ends behind 256 bytes.
        """
        if len(payload) < _CONFIG.size:
            raise VhostUserError(f"payload of {len(payload)} bytes, not {_CONFIG.size} or more")
        offset, size, flags = _CONFIG.unpack_from(payload)
        if size != len(payload) - _CONFIG.size or offset + size > CONFIG_MAX:
            raise VhostUserError(f"configuration space {offset:#x}+{size:#x}: out of range")
        return cls(offset, flags, payload[_CONFIG.size :])

    def pack(self) -> bytes:
        """Encode."""
        return _CONFIG.pack(self.offset, len(self.data), self.flags) + self.data


def pack_u64(value: int) -> bytes:
    """Encode a payload of one 64-bit number."""
    return _U64.pack(value)


def unpack_u64(payload: bytes) -> int:
    """Decode a payload of one 64-bit number; raises VhostUserError for another size."""
    return _unpack(_U64, payload)[0]


def pack_log(size: int, offset: int) -> bytes:
    """Encode where a log lies in its file: bytes of it, and where it begins."""
    return _LOG.pack(size, offset)


def unpack_log(payload: bytes) -> tuple[int, int]:
    """Decode it; raises VhostUserError for another size."""
    size, offset = _unpack(_LOG, payload)
    return size, offset


def pack_regions(regions: Sequence[MemoryRegion]) -> bytes:
    """Encode a memory table of at most `REGIONS_MAX` regions."""
    return _REGION_COUNT.pack(len(regions), 0) + b"".join(_REGION.pack(*one) for one in regions)


def unpack_regions(payload: bytes) -> list[MemoryRegion]:
    """Decode a memory table.

    Regions may be followed by unused ones, which some front-ends send along.

    Raises:
        VhostUserError: more than `REGIONS_MAX` regions, or fewer than it says.
    """
    if len(payload) < _REGION_COUNT.size:
        raise VhostUserError(f"payload of {len(payload)} bytes, not {_REGION_COUNT.size} or more")
    count, _ = _REGION_COUNT.unpack_from(payload)
    room = (len(payload) - _REGION_COUNT.size) // _REGION.size
    if count > min(room, REGIONS_MAX):
        raise VhostUserError(f"{count} memory regions in a payload of {len(payload)} bytes")
    end = _REGION_COUNT.size + count * _REGION.size
    return [
        MemoryRegion._make(one) for one in _REGION.iter_unpack(payload[_REGION_COUNT.size : end])
    ]


def pack_region(region: MemoryRegion) -> bytes:
    """Encode the single region of ADD_MEM_REG and REM_MEM_REG."""
    return _SINGLE_REGION.pack(0, *region)


def unpack_region(payload: bytes) -> MemoryRegion:
    """Decode the single region of ADD_MEM_REG and REM_MEM_REG; raises VhostUserError."""
    return MemoryRegion._make(_unpack(_SINGLE_REGION, payload)[1:])


def request_name(request: int) -> str:
    """Return the specification's name of a request, or its number when it has none here."""
    try:
        return Request(request).name
    except ValueError:
        return f"request {request}"


def _unpack(layout: struct.Struct, payload: bytes) -> tuple[int, ...]:
    if len(payload) != layout.size:
        raise VhostUserError(f"payload of {len(payload)} bytes, not {layout.size}")
    return layout.unpack(payload)
