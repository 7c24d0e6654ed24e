"""Protocols of the kernel's network interfaces that priv uses; tests replace them."""

from typing import Protocol

from vmd.priv.rtnetlink import Link


class Netlink(Protocol):
    """The host's network interfaces; see `rtnetlink`. Each method may raise LinkError."""

    def attach_tap(self, fd: int, name: str, *, is_multi_queue: bool) -> str:
        """Make `fd` a queue of a tap, of any name if `name` is empty; returns the name."""

    def links(self) -> list[Link]:
        """Return all interfaces."""

    def find(self, name: str) -> Link | None:
        """Return the interface of a name, if there is one."""

    def make_bridge(self, name: str, lladdr: str) -> Link:
        """Make a bridge."""

    def make_vrf(self, name: str, lladdr: str, table: int) -> Link:
        """Make a VRF with a routing table of its own."""

    def delete(self, link: Link) -> None:
        """Remove an interface."""

    def set_alias(self, link: Link, alias: str) -> None:
        """Give an interface a description."""

    def set_lladdr(self, link: Link, lladdr: str) -> None:
        """Give an interface an Ethernet address."""

    def set_mtu(self, link: Link, mtu: int) -> None:
        """Set the largest packet, in bytes without the Ethernet header."""

    def set_group(self, link: Link, group: int) -> None:
        """Put an interface into a group."""

    def set_up(self, link: Link, *, is_up: bool) -> None:
        """Let an interface carry frames, or not."""

    def set_master(self, link: Link, master: Link | None) -> None:
        """Add an interface to a bridge or a VRF, or take it out."""

    def set_address(self, link: Link, address: str, bits: int) -> None:
        """Give an interface an address, which it may have already."""

    def set_route(self, link: Link, address: str, table: int) -> None:
        """Route an address to an interface."""

    def close_table(self, table: int) -> None:
        """Let a routing table end in nothing."""

    def open_table(self, table: int) -> None:
        """Undo `close_table`."""


class PacketFilter(Protocol):
    """The host's packet filter; see `nftables`."""

    def run(self, rules: str) -> None:
        """Execute commands, all or none; may raise NftablesError."""
