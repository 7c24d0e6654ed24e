"""IPv6 router solicitations and advertisements, bytes to bytes.

Source: RFC 4861 §4.1, §4.2 and §6.2; RFC 8106 §5.1.
"""

import struct
from typing import NamedTuple

from vmm_kvm.net.inet import ETHERNET, ETHERTYPE_IPV6, PROTOCOL_ICMPV6, checksum, pseudo6

ROUTER_LIFETIME_S = 1800
"""How long the host stays a guest's router after an advertisement."""
INTERVAL_S = 300
"""Interval of unsolicited advertisements."""

_IPV6 = struct.Struct(">IHBB16s16s")
_ROUTER_SOLICITATION, _ROUTER_ADVERTISEMENT = 133, 134
_HOP_LIMIT = 255  # that of a neighbour: no router passes it on
_VERSION = 6 << 28
_ALL_NODES = bytes.fromhex("ff02") + bytes(13) + b"\x01"
_ALL_ROUTERS = _ALL_NODES[:-1] + b"\x02"
_ALL_NODES_LLADDR = bytes.fromhex("333300000001")
_SOLICITATION_SIZE = 8
_SOURCE_LLADDR, _PREFIX, _RDNSS = 1, 3, 25
_AUTONOMOUS, _ON_LINK = 0x40, 0x80
_FOREVER = 0xFFFF_FFFF


class Router(NamedTuple):
    """The host's advertisement on a local interface."""

    lladdr: bytes
    link_local: bytes
    """Its address on the link, from which it is known: 16 bytes, as those below."""
    network: bytes
    """The first 64 bits are the prefix in which guests make their addresses."""
    host: bytes
    """The host's address in the interface's network of 96 bits; it answers DNS there."""


def link_local(lladdr: bytes) -> bytes:
    """Return the link-local address that the kernel gives an interface. Source: RFC 4291 §2.5.6."""
    return (
        bytes.fromhex("fe80000000000000")
        + bytes([lladdr[0] ^ 2])
        + lladdr[1:3]
        + b"\xff\xfe"
        + lladdr[3:]
    )


def is_solicitation(frame: bytes, guest_lladdr: bytes) -> bool:
    """Tell whether a guest asks for an advertisement.

    Source: RFC 4861 §6.1.1. The checksum is not checked, since it may be left to hardware that does
    not exist: the answer is one that is also sent every few minutes.
    """
    if len(frame) < ETHERNET.size + _IPV6.size + _SOLICITATION_SIZE:
        return False
    _, source_lladdr, kind = ETHERNET.unpack_from(frame)
    first, length, protocol, hops, _, destination = _IPV6.unpack_from(frame, ETHERNET.size)
    return bool(
        kind == ETHERTYPE_IPV6
        and source_lladdr == guest_lladdr
        and first >> 28 == 6
        and protocol == PROTOCOL_ICMPV6
        and hops == _HOP_LIMIT
        and destination == _ALL_ROUTERS
        and length >= _SOLICITATION_SIZE
        and frame[ETHERNET.size + _IPV6.size] == _ROUTER_SOLICITATION
        and frame[ETHERNET.size + _IPV6.size + 1] == 0
    )


def advertisement(router: Router, *, lifetime_s: int = ROUTER_LIFETIME_S) -> bytes:
    """Return the frame that advertises the router to all on the link; with 0 s, withdraws it."""
    lifetime = min(lifetime_s, 0xFFFF)
    body = struct.pack(">BBHBBHII", _ROUTER_ADVERTISEMENT, 0, 0, 64, 0, lifetime, 0, 0)
    body += bytes([_SOURCE_LLADDR, 1]) + router.lladdr
    # Not "on link": other guests that have addresses of the prefix are behind the router.
    body += struct.pack(
        ">BBBBIII8s8s", _PREFIX, 4, 64, _AUTONOMOUS, _FOREVER, _FOREVER, 0, router.network[:8], b""
    )
    # The host's own network is, so that the DNS server can be reached without detours.
    body += struct.pack(
        ">BBBBIII16s", _PREFIX, 4, 96, _ON_LINK, _FOREVER, _FOREVER, 0, router.host[:12] + bytes(4)
    )
    body += struct.pack(">BBHI16s", _RDNSS, 3, 0, _FOREVER, router.host)
    pseudo = pseudo6(router.link_local, _ALL_NODES, len(body), PROTOCOL_ICMPV6)
    summed = checksum(pseudo + body)
    body = body[:2] + summed.to_bytes(2, "big") + body[4:]
    ip = _IPV6.pack(_VERSION, len(body), PROTOCOL_ICMPV6, _HOP_LIMIT, router.link_local, _ALL_NODES)
    return ETHERNET.pack(_ALL_NODES_LLADDR, router.lladdr, ETHERTYPE_IPV6) + ip + body
