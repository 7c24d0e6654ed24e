"""The priv process: the only one that changes the host's network interfaces and packet filter.

It has CAP_NET_ADMIN, a connection to rtnetlink and one to nftables, and may write the settings
below /proc/sys/net. It decides nothing: the parent names the interfaces. Objects that a crash could
leave behind bear a mark, and are removed when they are no longer wanted; taps vanish with their
descriptors.

It logs what the host lacks or the kernel refuses, and does the rest. When the parent is
gone, it removes what it has made, and ends.

Source: sections 5.3, 12.2 and 12.3 of OpenBSD's behaviour.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, Protocol, TypeVar, assert_never
from zlib import crc32

from vmd.config.model import SwitchConfig
from vmd.priv.host import Netlink, PacketFilter
from vmd.priv.nat import (
    Piece,
    Place,
    clearing,
    forward,
    install,
    is_loopback,
    lock,
    nat,
    ruleset,
)
from vmd.priv.nftables import NftablesError
from vmd.priv.rtnetlink import Link, LinkError
from vmd.priv.settings import Settings
from vmd.rules.addressing import BITS4, BITS6
from vmd.shared import log as logging
from vmd.wire.channel import Channel, ChannelError, Fds, Received
from vmd.wire.internal import (
    Configure,
    Configured,
    ForgetTaps,
    InterfaceTrouble,
    LocalAddresses,
    MadeTap,
    MakeTaps,
    ParentToPriv,
    PrivToParent,
    RulesRefused,
    SetVerbosity,
    TapsFailed,
    TapsForgotten,
    TapsMade,
    TapSpec,
)
from vmm_kvm.log import Log

log = Log(__name__)

_Value = TypeVar("_Value")

VRF_TABLE = 0x7644_0000
"""Routing table of rdomain 0; the others follow. Other programs use lower numbers."""
_LLADDR = "fe:e1:ba:"
_ENODEV = 19


class Stopper(Protocol):
    """An event loop that can be stopped."""

    def stop(self) -> None:
        """Let it return."""


class _Tap(NamedTuple):
    """An interface of a VM that there is."""

    spec: TapSpec
    link: Link


class Priv:
    """The priv process's work, on the event loop's thread."""

    def __init__(
        self,
        loop: Stopper,
        parent: Channel[PrivToParent, ParentToPriv],
        netlink: Netlink,
        nftables: PacketFilter | None,
        settings: Settings,
    ) -> None:
        """Serve `parent` until it is gone; all stays the caller's."""
        self._settings = settings
        self._loop = loop
        self._parent = parent
        self._netlink = netlink
        self._nftables = nftables
        self._wanted: Configure | None = None
        self._taps: dict[int, tuple[_Tap, ...]] = {}
        self._rules: str | None = None  # the kernel's rules, once they are known
        self._pieces_tried: tuple[Piece, ...] | None = None
        self._accepted: list[Piece] = []
        self._refused: dict[Piece, str] = {}
        self._opened: set[str] = set()  # taps that the loopback network reaches
        self._has_told = False
        self._troubles: dict[int, dict[int, str]] = {}  # by VM, then by interface

    # Messages of the parent

    def take(self, received: Received[ParentToPriv]) -> None:
        """Obey a message, and answer it."""
        with received.fds as fds:
            match received.message:
                case Configure():
                    self._configure(received.message)
                    self._tell(Configured())
                case MakeTaps():
                    self._attach(received.message, fds)
                case ForgetTaps(id=vm_id):
                    self._taps.pop(vm_id, None)
                    self._troubles.pop(vm_id, None)
                    self._filter()
                    self._remove_unwanted()
                    self._tell(TapsForgotten(id=vm_id))
                case SetVerbosity(level=level):
                    logging.set_verbosity(level)
                case _:
                    assert_never(received.message)

    def parent_left(self) -> None:
        """Restore the host's network as it was before us, and end."""
        self._taps.clear()
        if self._wanted:
            self._configure(Configure(mark=self._wanted.mark, table=self._wanted.table))
        self._loop.stop()

    def _tell(self, message: PrivToParent) -> None:
        try:
            self._parent.send(message)
        except ChannelError as err:  # its end is on the way
            log.debug("parent: %s", err)

    # Switches, rdomains, NAT

    def _configure(self, wanted: Configure) -> None:
        self._wanted = wanted
        self._has_told = False
        self._remove_unwanted()
        for switch in wanted.switches:
            try:
                self._switch(switch)
            except (LinkError, OSError) as err:
                log.warning('switch "%s": %s', switch.name, err)
        for vm_id, taps in self._taps.items():  # of a bridge that is made again, or exists at last
            for index, tap in enumerate(taps):
                if tap.spec.bridge:
                    self._note(vm_id, index, self._join(tap.spec, tap.link))
        if wanted.nat4 or wanted.nat6:
            self._settings.forward_packets(ipv4=bool(wanted.nat4), ipv6=bool(wanted.nat6))
        self._filter()

    def _mark(self, what: str) -> str:
        assert self._wanted is not None
        return f"{self._wanted.mark}: {what}"

    def _own_lladdr(self, name: str) -> str:
        """Return the address that an interface of ours is made with."""
        return _LLADDR + crc32(self._mark(name).encode()).to_bytes(4, "big")[:3].hex(":")

    def _is_ours(self, link: Link) -> bool:
        """Tell whether an interface bears our mark, or would but for an earlier kill."""
        if link.alias:
            return link.alias.startswith(self._mark(""))
        return link.kind in {"bridge", "vrf"} and link.lladdr == self._own_lladdr(link.name)

    def _switch(self, switch: SwitchConfig) -> None:
        netlink = self._netlink
        link = netlink.find(switch.interface)
        if link is None:
            if not switch.is_created:
                log.warning('switch "%s": %s', switch.name, _missing(switch.interface))
                return
            link = netlink.make_bridge(switch.interface, self._own_lladdr(switch.interface))
        elif link.kind != "bridge":
            log.warning('switch "%s": "%s" is not a bridge', switch.name, switch.interface)
            return
        if switch.is_created and self._is_ours(link):
            netlink.set_alias(link, self._mark(f"switch {switch.name}"))
            self._settings.set(link.name, "accept_ra", 0)  # guests do not tell the host its routers
        if switch.rdomain is not None:
            vrf = self._vrf(switch.rdomain)
            if link.master != vrf.ifindex:
                netlink.set_master(link, vrf)
        if link.is_up != switch.is_up:
            netlink.set_up(link, is_up=switch.is_up)
        if switch.is_created and switch.address:
            address, _, bits = switch.address.partition("/")
            netlink.set_address(link, address, int(bits))

    def _vrf(self, rdomain: int) -> Link:
        name = f"rdomain{rdomain}"
        link = self._netlink.find(name)
        if link is None:
            link = self._netlink.make_vrf(name, self._own_lladdr(name), VRF_TABLE + rdomain)
        if self._is_ours(link):
            self._netlink.set_alias(link, self._mark(name))
            self._netlink.close_table(VRF_TABLE + rdomain)
            self._netlink.set_up(link, is_up=True)
        return link

    def _remove_unwanted(self) -> None:
        """Remove interfaces that bear our mark and are no longer wanted."""
        if self._wanted is None or self._wanted.is_partial:
            return
        switches = self._wanted.switches
        wanted = {switch.interface for switch in switches if switch.is_created}
        rdomains = {switch.rdomain for switch in switches}
        rdomains.update(tap.spec.config.rdomain for taps in self._taps.values() for tap in taps)
        wanted.update(f"rdomain{number}" for number in rdomains if number is not None)
        try:
            for link in self._netlink.links():
                if self._is_ours(link) and link.name not in wanted:
                    self._netlink.delete(link)
                    if link.kind == "vrf":
                        number = int(link.name.removeprefix("rdomain"))
                        self._netlink.open_table(VRF_TABLE + number)
        except LinkError as err:
            log.warning("cannot remove an interface: %s", err)

    def _filter(self) -> None:
        """Set the packet filter's rules, as far as the kernel accepts them."""
        if self._wanted is None or self._wanted.is_partial:
            return
        pieces = tuple(self._pieces(self._wanted))
        if pieces == self._pieces_tried:
            return
        if self._nftables is None:
            unknown = [piece for piece in pieces if piece not in self._refused]
            self._refused = dict.fromkeys(pieces, "no nftables")
            if pieces and not self._has_told:
                log.warning("no nftables: no NAT, no forwarded ports")
                self._has_told = True
            for piece in unknown:
                if piece.place is not None:
                    self._tell_rules_refused(piece.place, f"{piece.what}: no nftables")
            return
        # Pieces accepted before come first, so that they stay while the others are tried.
        ordered = sorted(pieces, key=lambda piece: piece not in self._accepted)
        self._accepted, refused = install(ordered, self._apply)
        new = {piece: why for piece, why in refused.items() if piece not in self._refused}
        self._pieces_tried, self._refused = pieces, refused
        if not pieces and self._rules != clearing(self._wanted.table):
            log.warning("the packet filter's rules cannot be removed")
        for piece, why in new.items():
            self._tell_refused(piece, why)
        self._open_loopback(
            {one.place.tap for one in self._accepted if one.opens_loopback and one.place}
        )

    def _pieces(self, wanted: Configure) -> Iterator[Piece]:
        yield from nat(wanted.nat4, wanted.nat6)
        for vm_id, taps in self._taps.items():
            for index, tap in enumerate(taps):
                config, place = tap.spec.config, Place(vm_id, index, tap.link.name)
                if config.is_locked:
                    yield lock(tap.spec.lladdr, place)
                if tap.spec.local is not None:
                    for each in config.forwards:
                        yield from forward(each, tap.spec.local, place)

    def _apply(self, pieces: Sequence[Piece]) -> str:
        """Set the rules to `pieces`; returns the reason if they are refused."""
        assert self._wanted is not None
        assert self._nftables is not None
        text = ruleset(self._wanted.table, pieces)
        if text == self._rules:
            return ""
        try:
            self._nftables.run(text)
        except NftablesError as err:
            return str(err)
        self._rules = text
        return ""

    def _tell_refused(self, piece: Piece, why: str) -> None:
        text = f"{piece.what}: {why} (it needs {piece.needs})"
        if piece.place is None:
            log.warning("%s", text)
        else:
            self._tell_rules_refused(piece.place, text)

    def _tell_rules_refused(self, place: Place, text: str) -> None:
        self._tell(RulesRefused(id=place.vm_id, index=place.position, message=text))

    def _open_loopback(self, taps: set[str]) -> None:
        """Let the host's loopback network reach guests through `taps`, and through no other."""
        for name in taps ^ self._opened:
            try:
                self._settings.open_loopback(name, is_open=name in taps)
            except OSError as err:
                log.warning("%s: no forwards from 127.0.0.1: %s", name, err.strerror)
        self._opened = taps

    def _is_filtered(self, vm_id: int) -> bool:
        """Tell whether the kernel drops a VM's frames with a wrong lladdr."""
        return not any(
            piece.is_lock and piece.place and piece.place.vm_id == vm_id for piece in self._refused
        )

    # Interfaces of VMs

    def _attach(self, message: MakeTaps, fds: Fds) -> None:
        if self._wanted is None:
            self._tell(TapsFailed(id=message.id, message="nothing is configured"))
            return
        try:
            taps = [self._tap(spec, fds) for spec in message.taps]
        except (LinkError, ChannelError) as err:
            self._tell(TapsFailed(id=message.id, message=str(err)))
            return
        self._taps[message.id] = tuple(taps)
        forwards = (each for spec in message.taps for each in spec.config.forwards)
        if any(not is_loopback(each.address) for each in forwards):
            self._settings.forward_packets(ipv4=True, ipv6=False)
        self._filter()  # before the first frame can pass
        for index, tap in enumerate(taps):
            try:
                trouble = self._set_up(tap)
            except (LinkError, OSError) as err:
                trouble = str(err)
            self._note(message.id, index, trouble)
        told = (MadeTap(name=tap.link.name, index=tap.link.ifindex) for tap in taps)
        is_filtered = not self._wanted.is_partial and self._is_filtered(message.id)
        self._tell(TapsMade(id=message.id, taps=tuple(told), is_filtered=is_filtered))

    def _tap(self, spec: TapSpec, fds: Fds) -> _Tap:
        """Make an interface, or find it again; it carries no frames yet."""
        name = spec.config.tap or ""
        with Fds([fds.take(at) for at in spec.queues]) as queues:
            for fd in queues.left:
                name = self._netlink.attach_tap(fd, name, is_multi_queue=len(spec.queues) > 1)
        link = self._netlink.find(name)
        if link is None:
            raise LinkError(name, _ENODEV)
        return _Tap(spec, link)

    def _note(self, vm_id: int, index: int, trouble: str) -> None:
        """Tell of an interface's trouble, or that it has none any more, when that changes."""
        known = self._troubles.setdefault(vm_id, {})
        if known.get(index, "") != trouble:
            known[index] = trouble
            self._tell(InterfaceTrouble(id=vm_id, index=index, message=trouble))

    def _set_up(self, tap: _Tap) -> str:
        """Configure an interface fully; a failure of a part is logged, and the rest goes on.

        Returns why it is not on its bridge, if it is to be on one.

        Raises:
            LinkError, OSError: it stays down.
        """
        trouble = ""
        spec, link, netlink = tap.spec, tap.link, self._netlink
        self._try(netlink.set_alias, link, spec.alias)
        # The host accepts no address or router from behind it; it uses IPv6 there only where it is
        # the router itself.
        has_ipv6 = spec.local is not None and bool(spec.local.host6)
        for name, value in (("accept_ra", 0), ("addr_gen_mode", 0), ("accept_dad", 0)):
            self._settings.set(link.name, name, value)
        self._settings.set(link.name, "disable_ipv6", int(not has_ipv6))
        if spec.local is not None:
            self._try(netlink.set_lladdr, link, spec.local.host_lladdr)
        self._try(netlink.set_mtu, link, spec.mtu)
        if spec.group:
            self._try(netlink.set_group, link, spec.group)
        if spec.bridge:
            trouble = self._join(spec, link)
        elif spec.config.rdomain is not None:
            # Outside its rdomain, it would reach networks that it must not.
            netlink.set_master(link, self._vrf(spec.config.rdomain))
        netlink.set_up(link, is_up=spec.config.is_up)
        if spec.local is not None:
            self._set_addresses(spec, spec.local, link)
        return trouble

    def _join(self, spec: TapSpec, link: Link) -> str:
        """Put an interface on its bridge, where it may be already; returns why it is not there."""
        try:
            bridge = self._netlink.find(spec.bridge)
            if bridge is None:
                return _missing(spec.bridge)
            if bridge.kind != "bridge":
                return f'"{spec.bridge}" is not a bridge'
            self._netlink.set_master(link, bridge)
        except LinkError as err:
            return str(err)
        return ""

    def _set_addresses(self, spec: TapSpec, local: LocalAddresses, link: Link) -> None:
        self._netlink.set_address(link, local.host4, BITS4)
        if local.host6:
            self._netlink.set_address(link, local.host6, BITS6)
            if spec.config.is_up:
                table = 0 if spec.config.rdomain is None else VRF_TABLE + spec.config.rdomain
                self._netlink.set_route(link, local.guest6, table)

    @staticmethod
    def _try(operation: Callable[[Link, _Value], None], link: Link, value: _Value) -> None:
        try:
            operation(link, value)
        except LinkError as err:
            log.warning("%s", err)


def _missing(bridge: str) -> str:
    return f'bridge "{bridge}" does not exist'
