"""The host's network interfaces, by rtnetlink: the few operations that priv needs.

pyroute2 speaks the protocol. Only this module imports it, because the import is slow and takes much
memory; it needs no thread, and no file once it is connected.

Source: rtnetlink(7); Linux include/uapi/linux/if_link.h
"""

import fcntl
import os
from errno import ESRCH
from typing import NamedTuple, Protocol

from pyroute2 import IPRoute
from pyroute2.netlink.exceptions import NetlinkError

from vmm_kvm.net import abi

_ANY_TAP = "tap%d"
_ALIAS_MAX = 255
_FOREVER = 0xFFFF_FFFF
_NO_MASTER = 0
_AF_INET, _AF_INET6 = 2, 10
_EVERYWHERE = {_AF_INET: "0.0.0.0/0", _AF_INET6: "::/0"}
_LAST = 0xFF00_2000
"""The metric of a route that every other precedes, from vrf.rst."""


class LinkError(Exception):
    """The kernel refused an operation; `str()` is one line, `errno` says why."""

    def __init__(self, what: str, errno: int) -> None:
        super().__init__(f"{what}: {os.strerror(errno)}")
        self.errno = errno


class Link(NamedTuple):
    """An interface."""

    ifindex: int
    """The kernel's number for it, from 1."""
    name: str
    kind: str
    """`bridge`, `vrf`, `tun`; empty for hardware."""
    alias: str
    lladdr: str
    """Its Ethernet address, such as `fe:e1:ba:12:34:56`."""
    master: int
    """The index of the bridge or VRF that it belongs to; 0 for none."""
    is_up: bool


class Rtnetlink:
    """A connection to the kernel. For one thread.

    Each method raises LinkError where the kernel refuses; none waits for anything but the kernel.
    """

    def __init__(self, route: IPRoute | None = None) -> None:
        """Connect; or take over the connection `route`."""
        self._route = route or IPRoute()

    def close(self) -> None:
        """Disconnect."""
        self._route.close()

    @staticmethod
    def attach_tap(fd: int, name: str, *, is_multi_queue: bool) -> str:
        """Make `fd`, an open /dev/net/tun, a queue of a tap, which is made if it does not exist.

        Frames have virtio's header, as the guest's device writes it. Returns the tap's name,
        which is the first free of tap0, tap1 ... if `name` is empty.

        Raises:
            LinkError: the tap is in use, of another kind, or there can be no more.

        Source: Linux Documentation/networking/tuntap.rst
        """
        flags = abi.IFF_TAP | abi.IFF_NO_PI | abi.IFF_VNET_HDR
        if is_multi_queue:
            flags |= abi.IFF_MULTI_QUEUE
        try:
            request = abi.ifreq.pack((name or _ANY_TAP).encode(), flags)
            answer = fcntl.ioctl(fd, abi.TUNSETIFF, request)
        except OSError as err:
            raise LinkError(name or "tap", err.errno or 0) from err
        found: bytes = abi.ifreq.unpack(answer)[0]
        return found.rstrip(b"\0").decode()

    def links(self) -> list[Link]:
        """Return all interfaces."""
        return [_link(each) for each in self._ask("interfaces", "dump")]

    def find(self, name: str) -> Link | None:
        """Return the interface of a name, if there is one."""
        try:
            found = self._ask(name, "get", ifname=name)
        except LinkError:
            return None
        return _link(found[0]) if found else None

    def make_bridge(self, name: str, lladdr: str) -> Link:
        """Make a bridge that forwards at once, and knows no spanning tree."""
        options = {"kind": "bridge", "br_stp_state": 0, "br_forward_delay": 0}
        self._ask(name, "add", ifname=name, address=lladdr, **options)
        return self._made(name)

    def make_vrf(self, name: str, lladdr: str, table: int) -> Link:
        """Make a VRF with a routing table of its own."""
        self._ask(name, "add", ifname=name, address=lladdr, kind="vrf", vrf_table=table)
        return self._made(name)

    def _made(self, name: str) -> Link:
        found = self.find(name)
        if found is None:
            raise LinkError(name, 19)  # ENODEV: it has been removed already
        return found

    def delete(self, link: Link) -> None:
        """Remove an interface."""
        self._ask(link.name, "del", index=link.ifindex)

    def set_alias(self, link: Link, alias: str) -> None:
        """Give an interface a description, of which the kernel keeps 255 bytes."""
        encoded = alias.encode()[:_ALIAS_MAX]
        self._ask(link.name, "set", index=link.ifindex, ifalias=encoded.decode(errors="ignore"))

    def set_lladdr(self, link: Link, lladdr: str) -> None:
        """Give an interface an Ethernet address."""
        self._ask(link.name, "set", index=link.ifindex, address=lladdr)

    def set_mtu(self, link: Link, mtu: int) -> None:
        """Set the largest packet, in bytes without the Ethernet header."""
        self._ask(link.name, "set", index=link.ifindex, mtu=mtu)

    def set_group(self, link: Link, group: int) -> None:
        """Put an interface into a group."""
        self._ask(link.name, "set", index=link.ifindex, group=group)

    def set_up(self, link: Link, *, is_up: bool) -> None:
        """Let an interface carry frames, or not."""
        self._ask(link.name, "set", index=link.ifindex, state="up" if is_up else "down")

    def set_master(self, link: Link, master: Link | None) -> None:
        """Add an interface to a bridge or a VRF, or take it out."""
        index = master.ifindex if master else _NO_MASTER
        self._ask(link.name, "set", index=link.ifindex, master=index)

    def set_address(self, link: Link, address: str, bits: int) -> None:
        """Give an interface an IPv4 or IPv6 address for ever, which it may have already."""
        family = _AF_INET6 if ":" in address else _AF_INET
        options: dict[str, object] = {"flags": 0x02} if family == _AF_INET6 else {}  # IFA_F_NODAD
        try:
            self._route.addr(
                "replace",
                index=link.ifindex,
                family=family,
                address=address,
                prefixlen=bits,
                preferred_lft=_FOREVER,
                valid_lft=_FOREVER,
                **options,
            )
        except NetlinkError as err:
            raise LinkError(f"{link.name}: {address}/{bits}", err.code) from err

    def set_route(self, link: Link, address: str, table: int) -> None:
        """Reach a host's IPv6 address through an interface; in the main table if `table` is 0."""
        options = {"table": table} if table else {}
        try:
            self._route.route(
                "replace", dst=f"{address}/128", family=_AF_INET6, oif=link.ifindex, **options
            )
        except NetlinkError as err:
            raise LinkError(f"{link.name}: route to {address}", err.code) from err

    def close_table(self, table: int) -> None:
        """Keep look-ups in a routing table that find no route from continuing in the main table.

        Undone by `open_table`: unlike other routes, these do not go with an interface.

        Source: Linux Documentation/networking/vrf.rst
        """
        for family, everywhere in _EVERYWHERE.items():
            try:
                self._route.route("replace", **_last_route(family, everywhere, table))
            except NetlinkError as err:
                raise LinkError(f"routing table {table:#x}", err.code) from err

    def open_table(self, table: int) -> None:
        """Undo `close_table`, if that was done."""
        for family, everywhere in _EVERYWHERE.items():
            try:
                self._route.route("del", **_last_route(family, everywhere, table))
            except NetlinkError as err:
                if err.code != ESRCH:
                    raise LinkError(f"routing table {table:#x}", err.code) from err

    def _ask(self, what: str, command: str, **options: object) -> "list[_Message]":
        try:
            return list(self._route.link(command, **options))
        except NetlinkError as err:
            raise LinkError(what, err.code) from err


class _Message(Protocol):
    """pyroute2's form of a struct ifinfomsg and its attributes."""

    def __getitem__(self, key: str) -> int: ...

    def get_attr(self, name: str) -> str | int | None: ...

    def get_nested(self, *names: str) -> str | None: ...


def _last_route(family: int, everywhere: str, table: int) -> dict[str, object]:
    return {
        "family": family,
        "dst": everywhere,
        "type": "unreachable",
        "table": table,
        "priority": _LAST,
    }


def _link(message: _Message) -> Link:
    return Link(
        ifindex=message["index"],
        name=str(message.get_attr("IFLA_IFNAME")),
        kind=message.get_nested("IFLA_LINKINFO", "IFLA_INFO_KIND") or "",
        alias=str(message.get_attr("IFLA_IFALIAS") or ""),
        lladdr=str(message.get_attr("IFLA_ADDRESS") or ""),
        master=int(message.get_attr("IFLA_MASTER") or 0),
        is_up=bool(message["flags"] & abi.IFF_UP),
    )
