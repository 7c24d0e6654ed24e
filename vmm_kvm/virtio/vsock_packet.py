"""Packets of virtio-vsock: the header, and what its fields can be.

Source: virtio 1.3 §5.10.6; Linux include/uapi/linux/virtio_vsock.h
"""

import struct
from collections.abc import Sequence
from enum import IntEnum, IntFlag
from typing import NamedTuple

from vmm_kvm.virtio.buffers import gather

HOST_CID = 2
"""The host's address (VMADDR_CID_HOST)."""
STREAM = 1
"""The type of stream sockets (VIRTIO_VSOCK_TYPE_STREAM)."""
EVENT_TRANSPORT_RESET = 0
"""All connections are gone, and the guest's address may be another one."""

_HEADER = struct.Struct("<QQIIIHHIII")  # struct virtio_vsock_hdr
HEADER_SIZE = _HEADER.size
_U32 = (1 << 32) - 1


class Op(IntEnum):
    """A packet's operation (VIRTIO_VSOCK_OP_*)."""

    REQUEST = 1
    RESPONSE = 2
    RST = 3
    SHUTDOWN = 4
    RW = 5
    CREDIT_UPDATE = 6
    CREDIT_REQUEST = 7


class Shutdown(IntFlag):
    """Directions that a side shuts down (VIRTIO_VSOCK_SHUTDOWN_F_*)."""

    NONE = 0
    RECEIVE = 1
    SEND = 2
    BOTH = 3


class Header(NamedTuple):
    """The header of a packet, as either side writes it; all are unsigned."""

    src_cid: int
    dst_cid: int
    src_port: int
    dst_port: int
    length: int
    """Bytes of data behind the header."""
    type: int
    op: int
    flags: int
    buf_alloc: int
    """Bytes for which the sender has room, as if nothing were in its buffer."""
    fwd_cnt: int
    """Bytes that have left this buffer, modulo 2 ** 32."""

    @classmethod
    def read(cls, buffers: Sequence[memoryview]) -> "Header | None":
        """Copy a header out of guest memory; None where there are too few bytes for one."""
        data = gather(buffers, HEADER_SIZE)
        return cls._make(_HEADER.unpack(data)) if len(data) == HEADER_SIZE else None

    def pack(self) -> bytes:
        """Return the header as it lies in memory."""
        return _HEADER.pack(*self)


class Packet(NamedTuple):
    """A connection's packet for the guest; its data are in the guest's buffer already."""

    op: Op
    flags: int = 0
    length: int = 0
