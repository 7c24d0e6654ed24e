"""The parent's side of networks: what each VM's interfaces are to be, and who makes them.

Nothing of the host's network is changed here. priv does that; what it needs is opened here and
passed along: /dev/net/tun, whose descriptors keep the taps alive as long as their VM exists, so
that a guest which reboots finds the same ones. On local interfaces, the local process answers the
guest; its sockets are opened here too.

A VM waits for its interfaces before it is launched. Where there is no priv, or the host has no
taps, VMs run without.

Source: section 12 of OpenBSD's behaviour, with the advice of its section 21.
"""

import os
from collections.abc import Callable
from itertools import count, islice
from typing import assert_never
from zlib import crc32

from msgspec.structs import replace

from vmd.config.model import BootDevice, Config, InterfaceConfig, Prefix, SwitchConfig
from vmd.parent.interfaces import Links, Network, interface_infos
from vmd.parent.local_sockets import open_dns, open_frames, resolver
from vmd.parent.passt import PasstNetworks
from vmd.parent.resources import ResourceError
from vmd.rules.addressing import (
    DEFAULT_PREFIX,
    LocalAddresses,
    RangeError,
    host_lladdr,
    is_host_name,
    local_addresses,
    random_prefix6,
    subnet4,
    subnet6,
)
from vmd.rules.vm import Vm
from vmd.shared.paths import SYSTEM_SOCKET
from vmd.wire.channel import Channel, ChannelError, Fds, MalformedError, OversizeError, Received
from vmd.wire.internal import (
    Configure,
    Configured,
    ForgetLocal,
    ForgetTaps,
    ForwardSpec,
    LocalSpec,
    LocalToParent,
    MadeTap,
    MakeTaps,
    ParentToLocal,
    ParentToPriv,
    PrivToParent,
    ServeLocal,
    SetVerbosity,
    SwitchSpec,
    TapsFailed,
    TapsForgotten,
    TapsMade,
    TapSpec,
)
from vmd.wire.messages import ErrorCode, InterfaceInfo
from vmm_kvm.log import Log
from vmm_kvm.loop import EventLoop

log = Log(__name__)

_TUN = "/dev/net/tun"
_GROUP_NAMES = "/etc/iproute2/group"
_GROUP_FIRST, _GROUP_MASK = 1 << 30, (1 << 30) - 1
_MTU_DEFAULT = 1500
_ALIAS_MAX = 63
_PREFIX6_ENTROPY = 7


class _Held:
    """What there is of one VM's network; owns the descriptors of its taps."""

    __slots__ = ("attached", "fds", "is_filtered", "links", "sent", "specs", "then", "vm")

    def __init__(self, vm: Vm, specs: tuple[TapSpec, ...], links: Links, then: "Then") -> None:
        self.vm = vm
        self.specs = self.sent = specs
        self.links = links
        self.fds: list[int] = []
        self.then: Then | None = then
        self.attached: tuple[MadeTap, ...] = ()
        self.is_filtered = False

    def close(self) -> None:
        for fd in self.fds:
            os.close(fd)
        self.fds.clear()

    def networks(self) -> tuple[Network, ...]:
        return tuple(
            Network(
                spec,
                tap,
                tuple(self.fds[at] for at in spec.queues),
                self.is_filtered or not spec.is_locked,
                has_link=has_link,
            )
            for spec, tap, has_link in zip(self.specs, self.attached, self.links, strict=True)
        )


Then = Callable[[tuple[Network, ...] | ResourceError], None]
"""What is called, once, when a VM's interfaces are there, or cannot be."""


class Networks:
    """Networks of all VMs, on the event loop's thread."""

    def __init__(
        self, loop: EventLoop, socket_path: str | None, passt: PasstNetworks | None
    ) -> None:
        """Begin with none; with `passt`, make do without privileges.

        `socket_path` tells this daemon's things from those of others on the same host.
        """
        self._loop = loop
        self._passt = passt
        name = socket_path or SYSTEM_SOCKET
        self._mark = f"vmd {name}"
        self._table = "vmd" if name == SYSTEM_SOCKET else f"vmd_{crc32(name.encode()):08x}"
        self._priv: Channel[ParentToPriv, PrivToParent] | None = None
        self._local: Channel[ParentToLocal, LocalToParent] | None = None
        self._switches: dict[str, SwitchConfig] = {}
        self._prefix4 = DEFAULT_PREFIX
        self._prefix6: Prefix | None = None
        self._random6 = random_prefix6(os.urandom(_PREFIX6_ENTROPY))
        self._is_nat = False
        self._is_configured = False
        self._held: dict[int, _Held] = {}
        self._leaving: dict[int, _Held] = {}
        self._waiting: list[tuple[Vm, Then]] = []
        self._verbosity = 0

    # Processes

    def priv_started(self, channel: Channel[ParentToPriv, PrivToParent]) -> None:
        """Let a new priv process make the host's network what it is to be; takes over `channel`."""
        self._priv = channel
        channel.watch(self._loop, self._from_priv, lambda err: _cut(channel, err))
        self._send(SetVerbosity(level=self._verbosity))
        if not self._is_configured:
            return
        # What there is already comes first, so that no rule for it is missing meanwhile.
        self._send(replace(self._configuration(), is_partial=True))
        for vm_id, held in self._held.items():
            if held.attached:
                self._attach(vm_id, held)
        self._send(self._configuration())
        for vm_id, held in tuple(self._held.items()):
            if not held.attached:
                self._attach(vm_id, held)

    def priv_ended(self) -> None:
        """Wait for another priv process; nobody refers any more to what is about to go."""
        if self._priv:
            self._priv.close()
            self._priv = None
        for vm_id in tuple(self._leaving):
            self._left(vm_id)

    def give_up(self) -> None:
        """Fail whatever waits for a priv process: there will be no other."""
        waiting, self._waiting = self._waiting, []
        for _, then in waiting:
            then(ResourceError(ErrorCode.EAGAIN, "there is no priv process"))
        for vm_id, held in tuple(self._held.items()):
            if not held.attached:
                self._fail(vm_id, held, "there is no priv process")

    def local_started(self, channel: Channel[ParentToLocal, LocalToParent]) -> None:
        """Let a new local process answer guests; takes over `channel`."""
        self._local = channel
        channel.watch(self._loop, lambda received: received.fds.close(), lambda _: None)
        self._tell_local(SetVerbosity(level=self._verbosity))
        for held in self._held.values():
            self._serve(held)

    def local_ended(self) -> None:
        """Wait for another local process."""
        if self._local:
            self._local.close()
            self._local = None

    def set_verbosity(self, level: int) -> None:
        """Log more or less, in the processes of networks."""
        self._verbosity = level
        self._send(SetVerbosity(level=level))
        self._tell_local(SetVerbosity(level=level))

    def _send(self, message: ParentToPriv, fds: tuple[int, ...] = ()) -> None:
        if self._priv is None:
            Fds(fds).close()
            return
        try:
            self._priv.send(message, fds)
        except (ChannelError, OversizeError) as err:
            log.warning("priv: %s", err)

    def _tell_local(self, message: ParentToLocal, fds: tuple[int, ...] = ()) -> None:
        if self._local is None:
            Fds(fds).close()
            return
        try:
            self._local.send(message, fds)
        except (ChannelError, OversizeError) as err:
            log.warning("local: %s", err)

    # Configuration

    def configure(self, config: Config) -> None:
        """Make the host's network what a vm.conf says; VMs that run keep their addresses."""
        self._switches = {}
        self.add(config)
        self._prefix4 = config.local_prefix or DEFAULT_PREFIX
        self._prefix6 = None
        if config.is_local_inet6:
            self._prefix6 = config.local_prefix6 or self._random6
        self._is_nat = config.is_nat
        self._is_configured = True
        if self._passt is not None and self._switches:
            log.warning("no switches: they need root")
        self._send(self._configuration())

    def add(self, config: Config) -> None:
        """Add the switches of another file; of two with the same name the first counts."""
        for switch in config.switches:
            if switch.is_enabled:
                self._switches.setdefault(switch.name, switch)
        if self._is_configured:
            self._send(self._configuration())

    def forget_switches(self) -> None:
        """Remove all switches; interfaces that are on one stay on it if it is not ours."""
        self._switches = {}
        self._send(self._configuration())

    def _configuration(self) -> Configure:
        return Configure(
            mark=self._mark,
            table=self._table,
            switches=tuple(map(_switch_spec, self._switches.values())),
            nat4=subnet4(self._prefix4) if self._is_nat else "",
            nat6=subnet6(self._prefix6) if self._is_nat and self._prefix6 else "",
        )

    # Interfaces of VMs

    def attach(self, vm: Vm, then: Then) -> None:
        """Make a VM's interfaces, or find them from before its reboot; then call `then`."""
        held = self._held.get(vm.id)
        if not vm.config.interfaces:
            then(())
        elif held is not None and held.then is None:
            then(held.networks())
        elif self._passt is not None:
            try:
                networks = self._passt.attach(vm)
            except OSError as err:
                then(ResourceError(ErrorCode.EIO, f"passt: {err.strerror}"))
            else:
                then(networks)
        elif not _has_taps():
            log.warning("vm/%s: started without its interfaces: %s is missing", vm.name, _TUN)
            then(())
        elif self._leaving:
            # Their names may be those that it wants.
            self._waiting.append((vm, then))
        else:
            self._begin(vm, then)

    def _begin(self, vm: Vm, then: Then) -> None:
        try:
            held = _Held(vm, self._specs(vm), self._links(vm), then)
        except ResourceError as err:
            then(err)
            return
        self._held[vm.id] = held
        self._attach(vm.id, held)

    def _attach(self, vm_id: int, held: _Held) -> None:
        """Ask priv for interfaces, or tell a new one of those that there are already."""
        if self._priv is None:
            return  # it is told when there is one
        held.sent = held.specs
        if held.attached:
            specs = zip(held.specs, held.attached, strict=True)
            there = tuple(replace(spec, name=tap.name, queues=()) for spec, tap in specs)
            self._send(MakeTaps(id=vm_id, taps=there))
            return
        try:
            # A descriptor can be a queue only once, and one that crashed may have made it that.
            held.close()
            for _ in range(sum(len(spec.queues) for spec in held.specs)):
                held.fds.append(os.open(_TUN, os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK))
            fds = tuple(os.dup(fd) for fd in held.fds)
        except OSError as err:
            self._fail(vm_id, held, f"{_TUN}: {err.strerror}")
            return
        self._send(MakeTaps(id=vm_id, taps=held.specs), fds)

    def refresh(self) -> dict[int, Links]:
        """Bring interfaces up and down as VMs and switches are configured now.

        Returns the links of the VMs, by their ids, for whose guests that changes something.
        """
        if self._passt is not None:
            return self._passt.refresh()
        changed = {}
        for vm_id, held in self._held.items():
            states = [interface.is_up for interface in held.vm.config.interfaces]
            specs = tuple(
                replace(spec, is_up=is_up) for spec, is_up in zip(held.specs, states, strict=True)
            )
            links = self._links(held.vm)
            if links != held.links:
                held.links = changed[vm_id] = links
            if specs != held.specs:
                held.specs = specs
                if held.attached:
                    self._attach(vm_id, held)
        return changed

    def release(self, vm_id: int) -> None:
        """Remove a VM's interfaces, if it has any."""
        if self._passt is not None:
            self._passt.release(vm_id)
        self._waiting = [one for one in self._waiting if one[0].id != vm_id]
        held = self._held.pop(vm_id, None)
        if held is None:
            return
        self._tell_local(ForgetLocal(id=vm_id))
        if self._priv is None:
            held.close()
            return
        self._leaving[vm_id] = held
        self._send(ForgetTaps(id=vm_id))

    def _left(self, vm_id: int) -> None:
        held = self._leaving.pop(vm_id, None)
        if held is not None:
            held.close()
        if not self._leaving:
            waiting, self._waiting = self._waiting, []
            for vm, then in waiting:
                self.attach(vm, then)

    def _fail(self, vm_id: int, held: _Held, message: str) -> None:
        then, held.then = held.then, None
        self.release(vm_id)
        if then:
            then(ResourceError(ErrorCode.EIO, message))

    # What priv says

    def _from_priv(self, received: Received[PrivToParent]) -> None:
        received.fds.close()  # it has none to give
        match received.message:
            case Configured():
                return
            case TapsMade(id=vm_id, taps=taps, is_filtered=is_filtered):
                held = self._held.get(vm_id)
                if held is not None and len(taps) == len(held.specs):
                    self._attached(held, taps, is_filtered=is_filtered)
            case TapsFailed(id=vm_id, message=message):
                held = self._held.get(vm_id)
                if held is not None:
                    self._fail(vm_id, held, message)
            case TapsForgotten(id=vm_id):
                self._left(vm_id)
            case _:
                assert_never(received.message)

    def _attached(self, held: _Held, taps: tuple[MadeTap, ...], *, is_filtered: bool) -> None:
        then, held.then = held.then, None
        if then is not None:  # else it was told to a new priv process
            held.attached, held.is_filtered = taps, is_filtered
            self._serve(held)
            if held.sent != held.specs:  # they have changed meanwhile
                self._attach(held.vm.id, held)
            then(held.networks())

    # What is to be made

    def _specs(self, vm: Vm) -> tuple[TapSpec, ...]:
        places = count()
        specs = tuple(
            replace(
                self._spec(vm, index, interface),
                queues=tuple(islice(places, interface.queues or 1)),
            )
            for index, interface in enumerate(vm.config.interfaces)
        )
        wanted = [each[:2] for one in vm.config.interfaces for each in one.forwards]
        for protocol, port in wanted:
            if wanted.count((protocol, port)) > 1:
                text = f"forward {protocol} {port}: two interfaces want it"
                raise ResourceError(ErrorCode.EINVAL, text)
        return specs

    def _links(self, vm: Vm) -> Links:
        """Return whether frames can get through each interface: no cable leads to a dead switch."""
        switches = [self._switches.get(one.switch or "") for one in vm.config.interfaces]
        return tuple(
            interface.is_up and (switch is None or switch.is_up)
            for interface, switch in zip(vm.config.interfaces, switches, strict=True)
        )

    def _spec(self, vm: Vm, index: int, interface: InterfaceConfig) -> TapSpec:
        switch = None
        if interface.switch is not None:
            switch = self._switches.get(interface.switch)
            if switch is None:
                log.warning('vm/%s: switch "%s" not found', vm.name, interface.switch)
        rdomain = interface.rdomain
        if rdomain is None and switch is not None:
            rdomain = switch.rdomain
        group = interface.group or (switch.group if switch else None)
        assert interface.lladdr is not None
        return TapSpec(
            name=interface.tap or "",
            lladdr=interface.lladdr,
            alias=f"vm{vm.id}-if{index}-{vm.name}"[:_ALIAS_MAX],
            bridge=switch.interface if switch else "",
            group=_group_number(group) if group else 0,
            rdomain=rdomain,
            is_up=interface.is_up,
            is_locked=interface.is_locked or (switch is not None and switch.is_locked),
            mtu=interface.mtu or _MTU_DEFAULT,
            local=self._local_spec(vm, index, interface.lladdr) if interface.is_local else None,
            forwards=self._forwards(interface),
        )

    def _local_spec(self, vm: Vm, index: int, lladdr: str) -> LocalSpec:
        try:
            found = local_addresses(self._prefix4, self._prefix6, vm.id, index, lladdr)
        except RangeError as err:
            raise ResourceError(ErrorCode.EINVAL, str(err)) from err
        return _told(found, lladdr)

    def _forwards(self, interface: InterfaceConfig) -> tuple[ForwardSpec, ...]:
        taken = {
            (forward.protocol, forward.port): held.vm.name
            for held in self._held.values()
            for spec in held.specs
            for forward in spec.forwards
        }
        for protocol, port, _ in interface.forwards:
            owner = taken.get((protocol, port))
            if owner is not None:
                text = f'forward {protocol} {port}: vm "{owner}" has it'
                raise ResourceError(ErrorCode.EBUSY, text)
        return tuple(
            ForwardSpec(protocol=protocol, port=port, to_port=to_port)
            for protocol, port, to_port in interface.forwards
        )

    # Local interfaces

    def _serve(self, held: _Held) -> None:
        """Let the local process answer the guest on those interfaces that are local."""
        if self._local is None:
            return
        boots = held.vm.config.boot_device is BootDevice.NET
        name = held.vm.name if is_host_name(held.vm.name) else ""
        for index, (spec, tap) in enumerate(zip(held.specs, held.attached, strict=False)):
            if spec.local is None:
                continue
            try:
                fds = [open_frames(tap.name, has_ipv6=bool(spec.local.host6))]
            except OSError as err:
                log.warning("%s: no DHCP: %s", spec.alias, err.strerror)
                continue
            addresses = [spec.local.host4, *([spec.local.host6] if spec.local.host6 else [])]
            for address in addresses:
                try:
                    fds.append(open_dns(address, tap.name))
                except OSError as err:
                    log.warning("%s: no DNS on %s: %s", spec.alias, address, err.strerror)
            self._tell_local(
                ServeLocal(
                    id=held.vm.id,
                    interface=spec.alias,
                    lladdr=spec.lladdr,
                    addresses=spec.local,
                    host_name=name,
                    boots_from_net=boots and index == 0,
                    dns=tuple(range(1, len(fds))),
                    resolver=resolver(),
                ),
                tuple(fds),
            )

    # Looking

    def told(self, vm: Vm) -> tuple[InterfaceInfo, ...]:
        """Return what there is to tell of a VM's interfaces."""
        if self._passt is not None:
            return self._passt.told(vm)
        held = self._held.get(vm.id)
        networks = held.networks() if held is not None and held.attached else ()
        return interface_infos(vm.config.interfaces, networks)


def _cut(channel: Channel[ParentToPriv, PrivToParent], err: ChannelError) -> None:
    """The channel has ended, and so has priv, or it will: what it said was no message."""
    if isinstance(err, MalformedError):
        log.error("priv: %s", err)
        channel.close()


def _switch_spec(switch: SwitchConfig) -> SwitchSpec:
    return SwitchSpec(
        name=switch.name,
        interface=switch.interface,
        is_ours=switch.is_created,
        address=switch.address or "",
        rdomain=switch.rdomain,
        is_up=switch.is_up,
    )


def _told(addresses: LocalAddresses, lladdr: str) -> LocalSpec:
    return LocalSpec(
        host4=str(addresses.host4),
        guest4=str(addresses.guest4),
        host_lladdr=host_lladdr(lladdr),
        host6=str(addresses.host6 or ""),
        guest6=str(addresses.autoconf6 or ""),
    )


def _has_taps() -> bool:
    return os.path.exists(_TUN)  # noqa: PTH110 - the plainest way


def _group_number(name: str) -> int:
    """Return Linux's number for a group: the operator's, or else one made from its name.

    Source: ip-link(8), "group".
    """
    try:
        with open(_GROUP_NAMES, encoding="utf-8", errors="replace") as file:  # noqa: PTH123
            for line in file:
                number, _, rest = line.partition("#")[0].strip().partition(" ")
                if rest.strip() == name and number.isdecimal():
                    return int(number)
    except OSError:
        pass  # there is no such file: nobody has named a group
    return _GROUP_FIRST | crc32(name.encode()) & _GROUP_MASK
