"""The DHCP and BOOTP server of local interfaces: from one frame to its answer, bytes to bytes.

Each interface has one client and one address for it, so nothing is remembered and no lease ends.

Source: RFC 2131, RFC 2132, RFC 951; section 12.5 of OpenBSD's behaviour.
"""

import struct
from enum import IntEnum
from typing import NamedTuple

from vmm_kvm.limits import MTU_DEFAULT
from vmm_kvm.net.inet import BROADCAST, Udp, parse_udp, udp_frame

SERVER_PORT, CLIENT_PORT = 67, 68
PAYLOAD_MIN = 300
"""Bytes of a BOOTP message at least: RFC 951's size."""
LEASE_FOREVER = 0xFFFF_FFFF
BOOT_FILE = b"auto_install"
"""The file that a guest which boots from the network is told to load, as in OpenBSD's vmd."""
MAGIC = b"\x63\x82\x53\x63"

# op htype hlen hops xid secs flags ciaddr yiaddr siaddr giaddr chaddr sname file
_BOOTP = struct.Struct(">BBBBIHH4s4s4s4s16s64s128s")
_BOOTREQUEST, _BOOTREPLY = 1, 2
_ETHERNET = 1
_ETHERNET_SIZE = 14
_FRAME_MAX = _ETHERNET_SIZE + MTU_DEFAULT
_NOWHERE = b"\0\0\0\0"
_TTL = 16
_LOW_DELAY = 0x10
_HOST_NAME_MAX = 255


class Option(IntEnum):
    """Options that are read or written. Source: RFC 2132."""

    PAD = 0
    SUBNET_MASK = 1
    ROUTER = 3
    DNS = 6
    HOST_NAME = 12
    REQUESTED_ADDRESS = 50
    LEASE_TIME = 51
    MESSAGE_TYPE = 53
    SERVER_ID = 54
    END = 255


class MessageType(IntEnum):
    """Kinds of messages. Source: RFC 2132 §9.6."""

    DISCOVER = 1
    OFFER = 2
    REQUEST = 3
    DECLINE = 4
    ACK = 5
    NAK = 6
    RELEASE = 7
    INFORM = 8


class Lease(NamedTuple):
    """The lease of an interface's one client."""

    guest_lladdr: bytes
    host_lladdr: bytes
    """Six bytes each."""
    guest: bytes
    host: bytes
    """IPv4 addresses, four bytes each, alone in a network of 31 bits."""
    host_name: bytes = b""
    """The guest's, ASCII; none if empty."""
    boot_file: bytes = b""


class Request(NamedTuple):
    """A client's request."""

    xid: int
    htype: int
    hlen: int
    flags: int
    chaddr: bytes
    """All 16 bytes of the field."""
    message_type: int | None
    """None for BOOTP."""
    requested: bytes | None
    """The address of option 50, four bytes."""


def answer(frame: bytes, lease: Lease, *, is_summed: bool = True) -> bytes | None:
    """Return the frame that answers a guest's; None for all that is no request of this client.

    `is_summed`: see `inet.parse_udp`.
    """
    request = parse_request(frame, lease, is_summed=is_summed)
    return None if request is None else _reply(request, lease)


def parse_request(frame: bytes, lease: Lease, *, is_summed: bool = True) -> Request | None:
    """Return the request in the frame, if it is one to answer.

    OpenBSD passes over frames of less than 314 bytes: small clients of Linux send such.
    """
    if len(frame) > _FRAME_MAX:
        return None
    udp = parse_udp(frame, is_summed=is_summed)
    if (
        udp is None
        or udp.destination_lladdr not in {BROADCAST, lease.host_lladdr}
        or udp.source_lladdr != lease.guest_lladdr
        or (udp.source_port, udp.destination_port) != (CLIENT_PORT, SERVER_PORT)
        or len(udp.payload) < _BOOTP.size
    ):
        return None
    op, htype, hlen, hops, xid, _, flags, ciaddr, _, _, _, chaddr, _, file = _BOOTP.unpack_from(
        udp.payload
    )
    if (
        (op, htype, hlen, hops) != (_BOOTREQUEST, _ETHERNET, len(lease.guest_lladdr), 0)
        or chaddr[:hlen] != lease.guest_lladdr
        or ciaddr not in {_NOWHERE, lease.guest}
        or file[0]
    ):
        return None
    options = parse_options(udp.payload[_BOOTP.size :])
    kind = options.get(Option.MESSAGE_TYPE, b"")
    requested = options.get(Option.REQUESTED_ADDRESS)
    return Request(
        xid,
        htype,
        hlen,
        flags,
        chaddr,
        kind[0] if len(kind) == 1 else None,
        requested if requested is not None and len(requested) == len(_NOWHERE) else None,
    )


def parse_options(field: bytes) -> dict[int, bytes]:
    """Return options by number, the first of each; what does not fit ends the list.

    Source: RFC 2131 §4.1, RFC 2132 §2.
    """
    found: dict[int, bytes] = {}
    if not field.startswith(MAGIC):
        return found
    at = len(MAGIC)
    while at < len(field) and field[at] != Option.END:
        if field[at] == Option.PAD:
            at += 1
            continue
        if at + 2 > len(field) or at + 2 + field[at + 1] > len(field):
            break
        end = at + 2 + field[at + 1]
        found.setdefault(field[at], field[at + 2 : end])
        at = end
    return found


def _reply(request: Request, lease: Lease) -> bytes | None:
    kind = _reply_type(request, lease)
    if request.message_type is not None and kind is None:
        return None
    is_refusal = kind is MessageType.NAK
    payload = _BOOTP.pack(
        _BOOTREPLY,
        request.htype,
        request.hlen,
        0,
        request.xid,
        0,
        request.flags,
        _NOWHERE,
        _NOWHERE if is_refusal else lease.guest,
        _NOWHERE if is_refusal else lease.host,
        _NOWHERE,
        request.chaddr,
        b"",
        b"" if is_refusal else lease.boot_file,
    )
    payload += MAGIC + _options(kind, lease) + bytes([Option.END])
    destination = BROADCAST[:4] if is_refusal else lease.guest
    udp = Udp(
        *(lease.guest_lladdr, lease.host_lladdr, lease.host, destination),
        *(SERVER_PORT, CLIENT_PORT, payload.ljust(PAYLOAD_MIN, b"\0")),
    )
    return udp_frame(udp, ttl=_TTL, tos=_LOW_DELAY)


def _reply_type(request: Request, lease: Lease) -> MessageType | None:
    """Return the kind of the answer; None for BOOTP, and for messages without an answer.

    OpenBSD refuses every kind that it does not know; a DECLINE or RELEASE wants no answer, and an
    INFORM one without a lease, which a guest with another address would misunderstand.
    """
    match request.message_type:
        case MessageType.DISCOVER:
            return MessageType.OFFER
        case MessageType.REQUEST if request.requested in {None, lease.guest}:
            return MessageType.ACK
        case None | MessageType.DECLINE | MessageType.RELEASE | MessageType.INFORM:
            return None
    return MessageType.NAK


def _options(kind: MessageType | None, lease: Lease) -> bytes:
    options: list[tuple[Option, bytes]] = []
    if kind is not None:
        options.append((Option.MESSAGE_TYPE, bytes([kind])))
    if kind is MessageType.NAK:
        options.append((Option.SERVER_ID, lease.host))
        return b"".join(bytes([number, len(value)]) + value for number, value in options)
    if kind is not None:
        options += [
            (Option.LEASE_TIME, LEASE_FOREVER.to_bytes(4, "big")),
            (Option.SERVER_ID, lease.host),
        ]
    options += [
        (Option.SUBNET_MASK, b"\xff\xff\xff\xfe"),
        (Option.ROUTER, lease.host),
        (Option.DNS, lease.host),
    ]
    if lease.host_name:
        options.append((Option.HOST_NAME, lease.host_name[:_HOST_NAME_MAX]))
    return b"".join(bytes([number, len(value)]) + value for number, value in options)
