"""Ethernet headers: source, destination and VLAN. Pure.

Source: IEEE 802.3 §3.2, 802.1Q §9.6; virtio 1.2 §5.1.6.5
"""

import re
from typing import NamedTuple

ADDRESS_SIZE = 6
HEADER_SIZE = 14
BROADCAST = b"\xff" * ADDRESS_SIZE
HEAD_SIZE = HEADER_SIZE + 4
"""Bytes that a filter reads: the header, with a VLAN tag."""

_WRITTEN = re.compile(r"[0-9a-fA-F]{1,2}(?::[0-9a-fA-F]{1,2}){5}")
_GROUP = 1  # of the first byte
_TYPE = slice(12, 14)
_VLAN = b"\x81\x00"
_TAG = slice(14, 16)
_VLAN_MASK = 0xFFF


def is_group(address: bytes) -> bool:
    """Tell whether an address is a multicast one, broadcast among them."""
    return bool(address[0] & _GROUP)


def parse_lladdr(written: str) -> bytes:
    """Return the address of a station that is written as six parts of one or two hex digits.

    Raises:
        ValueError: it is written otherwise, or is multicast or zero, which no station has.
    """
    if not _WRITTEN.fullmatch(written):
        raise ValueError(f"invalid address: {written}")
    address = bytes(int(part, 16) for part in written.split(":"))
    if is_group(address) or not any(address):
        raise ValueError(f"invalid address: {written}: no station has it")
    return address


def text(address: bytes) -> str:
    """Return an address as people write it."""
    return address.hex(":")


class Filter(NamedTuple):
    """The frames that a station wants to receive."""

    lladdr: bytes
    """Its own address."""
    is_promiscuous: bool = True
    """Everything; nothing else matters then, save VLANs."""
    has_all_group: bool = False
    has_all_unicast: bool = False
    has_no_group: bool = False
    has_no_unicast: bool = False
    has_no_broadcast: bool = False
    unicast: frozenset[bytes] = frozenset()
    """Further addresses of its own."""
    group: frozenset[bytes] = frozenset()
    """Multicast addresses that it listens to."""
    vlans: frozenset[int] | None = None
    """Of tagged frames these; None for all. Frames of VLAN 0 are not tagged."""

    def accepts(self, head: bytes) -> bool:
        """Tell whether a frame is wanted; `head` are its first bytes, at least the header."""
        if self.vlans is not None and head[_TYPE] == _VLAN:
            vlan = int.from_bytes(head[_TAG], "big") & _VLAN_MASK
            if vlan and vlan not in self.vlans:
                return False
        if self.is_promiscuous:
            return True
        target = head[:ADDRESS_SIZE]
        if target == BROADCAST:
            return not self.has_no_broadcast
        if is_group(target):
            return not self.has_no_group and (self.has_all_group or target in self.group)
        if self.has_no_unicast:
            return False
        return self.has_all_unicast or target == self.lladdr or target in self.unicast


def locked_filter(lladdr: bytes) -> Filter:
    """Return the filter of a guest whose address is locked: its own frames, and all multicast."""
    return Filter(lladdr, is_promiscuous=False, has_all_group=True)
