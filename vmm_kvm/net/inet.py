"""Shared by IPv4, IPv6 and UDP: the checksum, and frames with a datagram in them.

Source: RFC 791, RFC 768, RFC 8200, RFC 1071.
"""

import struct
from typing import NamedTuple

ETHERNET = struct.Struct(">6s6sH")
"""Destination, source, type."""
ETHERTYPE_IPV4, ETHERTYPE_IPV6 = 0x0800, 0x86DD
BROADCAST = b"\xff" * 6
PROTOCOL_UDP, PROTOCOL_ICMPV6 = 17, 58
_IPV4 = struct.Struct(">BBHHHBBH4s4s")
_UDP = struct.Struct(">HHHH")
_SIZE4 = 4
_MULTICAST4, _BROADCAST4 = 0xE, b"\xff" * 4
_MULTICAST6 = 0xFF
_FRAGMENT = 0x3FFF  # more fragments, and the offset


def is_of_host(address: bytes) -> bool:
    """Tell whether one host can have an IPv4 or IPv6 address, of 4 or 16 bytes.

    Source: RFC 1122 §3.2.1.3; RFC 4291 §2.4.
    """
    if len(address) == _SIZE4:
        is_multicast = address[0] >> 4 == _MULTICAST4
        return not (is_multicast or address[0] == 0 or address == _BROADCAST4)
    return address[0] != _MULTICAST6 and any(address)


class Udp(NamedTuple):
    """A UDP datagram over IPv4, with its source and destination."""

    destination_lladdr: bytes
    source_lladdr: bytes
    source: bytes
    destination: bytes
    """IPv4 addresses, 4 bytes each."""
    source_port: int
    destination_port: int
    payload: bytes


def checksum(data: bytes) -> int:
    """Return the Internet checksum; 0 where `data` holds its own and is right.

    Source: RFC 1071 §1.
    """
    if len(data) % 2:
        data += b"\0"
    # A big number modulo 0xffff is its digits' sum, carries added in; 0 and 0xffff are the same.
    total = int.from_bytes(data, "big") % 0xFFFF
    return 0xFFFF - total if total or not any(data) else 0


def parse_udp(frame: bytes, *, is_summed: bool = True) -> Udp | None:
    """Return the UDP datagram in an Ethernet frame; None if there is none, or it is damaged.

    `is_summed`: its UDP checksum is there. The sender's kernel leaves it to hardware, and where
    there is none it never is: the frame has not been on a wire.
    """
    if len(frame) < ETHERNET.size + _IPV4.size + _UDP.size:
        return None
    to_lladdr, from_lladdr, kind = ETHERNET.unpack_from(frame)
    if kind != ETHERTYPE_IPV4:
        return None
    packet = frame[ETHERNET.size :]
    first, _, total, _, fragment, _, protocol, _, source, destination = _IPV4.unpack_from(packet)
    header_size = (first & 0xF) * 4
    if (
        first >> 4 != 4
        or header_size < _IPV4.size
        or not header_size + _UDP.size <= total <= len(packet)
        or fragment & _FRAGMENT
        or protocol != PROTOCOL_UDP
        or checksum(packet[:header_size])
    ):
        return None
    datagram = packet[header_size:total]
    source_port, destination_port, length, summed = _UDP.unpack_from(datagram)
    if not _UDP.size <= length <= len(datagram):
        return None
    datagram = datagram[:length]
    if is_summed and summed and checksum(_pseudo4(source, destination, length) + datagram):
        return None
    payload = datagram[_UDP.size :]
    return Udp(
        *(to_lladdr, from_lladdr, source, destination),
        *(source_port, destination_port, payload),
    )


def udp_frame(udp: Udp, *, ttl: int, tos: int = 0) -> bytes:
    """Return the Ethernet frame of a UDP datagram."""
    length = _UDP.size + len(udp.payload)
    header = _UDP.pack(udp.source_port, udp.destination_port, length, 0)
    pseudo = _pseudo4(udp.source, udp.destination, length)
    summed = checksum(pseudo + header + udp.payload) or 0xFFFF  # 0 means that there is none
    header = _UDP.pack(udp.source_port, udp.destination_port, length, summed)
    fields = (0x45, tos, _IPV4.size + length, 0, 0, ttl, PROTOCOL_UDP)
    ip = _IPV4.pack(*fields, 0, udp.source, udp.destination)
    ip = _IPV4.pack(*fields, checksum(ip), udp.source, udp.destination)
    ethernet = ETHERNET.pack(udp.destination_lladdr, udp.source_lladdr, ETHERTYPE_IPV4)
    return ethernet + ip + header + udp.payload


def _pseudo4(source: bytes, destination: bytes, length: int) -> bytes:
    return source + destination + struct.pack(">BBH", 0, PROTOCOL_UDP, length)


def pseudo6(source: bytes, destination: bytes, length: int, protocol: int) -> bytes:
    """Return the pseudo-header that a checksum over IPv6 covers. Source: RFC 8200 §8.1."""
    return source + destination + struct.pack(">II", length, protocol)
