"""Sockets for answering guests on local interfaces, opened with the parent's rights.

Source: packet(7), socket(7), resolv.conf(5); Linux include/uapi/linux/filter.h
"""

import ctypes
import ipaddress
import socket
import struct

_RESOLV_CONF = "/etc/resolv.conf"
_DNS_PORT = 53
_RECEIVE_BUFFER = 64 << 10  # bytes; a guest that floods fills no more
_ETH_P_IP = 0x0800
_ETH_P_ALL = 3
_SOL_PACKET = 263
_PACKET_AUXDATA = 8
_PACKET_IGNORE_OUTGOING = 23
_SO_ATTACH_FILTER = 26

# Classic BPF: code, jumps, operand.
_INSTRUCTION = struct.Struct("<HBBI")
_LOAD_HALF, _LOAD_BYTE = 0x28, 0x30  # BPF_LD | BPF_{H,B} | BPF_ABS
_LOAD_IP_HEADER_SIZE = 0xB1  # BPF_LDX | BPF_B | BPF_MSH
_LOAD_HALF_AFTER = 0x48  # BPF_LD | BPF_H | BPF_IND
_IS, _HAS_BITS = 0x15, 0x45  # BPF_JMP | BPF_{JEQ,JSET} | BPF_K
_RETURN = 0x06
_ALL = 0xFFFF_FFFF

# Requests to a DHCP server, and router solicitations; other packets are filtered out.
_WANTED = b"".join(
    _INSTRUCTION.pack(*instruction)
    for instruction in (
        (_LOAD_HALF, 0, 0, 12),  # the frame's type
        (_IS, 0, 7, 0x0800),
        (_LOAD_BYTE, 0, 0, 23),  # IPv4: the protocol
        (_IS, 0, 11, 17),
        (_LOAD_HALF, 0, 0, 20),  # a fragment?
        (_HAS_BITS, 9, 0, 0x1FFF),
        (_LOAD_IP_HEADER_SIZE, 0, 0, 14),
        (_LOAD_HALF_AFTER, 0, 0, 16),  # UDP: the destination port
        (_IS, 5, 6, 67),
        (_IS, 0, 5, 0x86DD),
        (_LOAD_BYTE, 0, 0, 20),  # IPv6: the protocol
        (_IS, 0, 3, 58),
        (_LOAD_BYTE, 0, 0, 54),  # ICMPv6: the type
        (_IS, 0, 1, 133),
        (_RETURN, 0, 0, _ALL),
        (_RETURN, 0, 0, 0),
    )
)


class _SockFprog(ctypes.Structure):
    """struct sock_fprog."""

    _fields_ = (("len", ctypes.c_ushort), ("filter", ctypes.c_char_p))


def open_frames(interface: str, *, has_ipv6: bool) -> int:
    """Return a packet socket that reads what guests ask for on an interface, and sends answers.

    Without IPv6 the kernel passes only incoming IPv4 frames.

    Raises:
        OSError: the interface is gone, or there is no right to it.
    """
    with socket.socket(socket.AF_PACKET, socket.SOCK_RAW | socket.SOCK_NONBLOCK, 0) as frames:
        program = _SockFprog(len(_WANTED) // _INSTRUCTION.size, _WANTED)
        frames.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, bytes(program))
        frames.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _RECEIVE_BUFFER)
        frames.setsockopt(_SOL_PACKET, _PACKET_AUXDATA, 1)
        frames.setsockopt(_SOL_PACKET, _PACKET_IGNORE_OUTGOING, 1)
        # No packet arrives before this, so each one has passed the filter.
        frames.bind((interface, _ETH_P_ALL if has_ipv6 else _ETH_P_IP))
        return frames.detach()


def open_dns(address: str, interface: str) -> int:
    """Return a UDP socket on port 53 of an address, which hears that interface alone.

    Raises:
        OSError: the port is in use, or there is no such address.
    """
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK) as dns:
        dns.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, interface.encode() + b"\0")
        dns.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _RECEIVE_BUFFER)
        dns.bind((address, _DNS_PORT))
        return dns.detach()


def resolver(path: str = _RESOLV_CONF) -> str:
    """Return the address of the host's own DNS server; empty if it has none."""
    try:
        with open(path, encoding="utf-8", errors="replace") as file:  # noqa: PTH123 - plainest
            words = [line.split() for line in file]
    except OSError:
        return ""
    for line in words:
        if len(line) > 1 and line[0] == "nameserver":
            try:
                return str(ipaddress.ip_address(line[1]))
            except ValueError:
                continue
    return ""
