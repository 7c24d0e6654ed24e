"""Plans taps, switches and addresses: from the configuration to priv's messages.

Source: section 12 of OpenBSD's behaviour, with the advice of its section 21.
"""

import os
from collections.abc import Iterable, Sequence
from itertools import count, islice
from zlib import crc32

from msgspec.structs import replace

from vmd.config.model import Config, InterfaceConfig, Prefix, SwitchConfig
from vmd.parent.errors import ResourceError
from vmd.parent.interfaces import Links
from vmd.rules.addressing import (
    DEFAULT_PREFIX,
    RangeError,
    local_addresses,
    random_prefix6,
    subnet4,
    subnet6,
)
from vmd.rules.vm import Vm
from vmd.shared.paths import SYSTEM_SOCKET
from vmd.wire.internal import Configure, LocalAddresses, TapSpec
from vmd.wire.messages import ErrorCode
from vmm_kvm.log import Log

log = Log(__name__)

_GROUP_NAMES = "/etc/iproute2/group"
_GROUP_FIRST, _GROUP_MASK = 1 << 30, (1 << 30) - 1
_ALIAS_MAX = 63
_PREFIX6_ENTROPY = 7

TakenForwards = dict[tuple[str, int], str]
"""Forwarded protocols and ports of the host, and the names of their VMs."""


class TapPlan:
    """The configured network; decides, and does nothing."""

    def __init__(self, socket_path: str | None) -> None:
        """Begin without a configuration.

        `socket_path` distinguishes this daemon's objects from those of others on the same host.
        """
        name = socket_path or SYSTEM_SOCKET
        self._mark = f"vmd {name}"
        self._table = "vmd" if name == SYSTEM_SOCKET else f"vmd_{crc32(name.encode()):08x}"
        self._switches: dict[str, SwitchConfig] = {}
        self._prefix4 = DEFAULT_PREFIX
        self._prefix6: Prefix | None = None
        self._random6 = random_prefix6(os.urandom(_PREFIX6_ENTROPY))
        self._is_nat = False
        self.is_configured = False
        """Whether there has been a configuration."""

    def configure(self, config: Config) -> None:
        """Plan by a vm.conf."""
        self._switches = {}
        self.add(config)
        self._prefix4 = config.local_prefix or DEFAULT_PREFIX
        self._prefix6 = None
        if config.is_local_inet6:
            self._prefix6 = config.local_prefix6 or self._random6
        self._is_nat = config.is_nat
        self.is_configured = True

    def add(self, config: Config) -> None:
        """Add the switches of another file; of two with the same name the first counts."""
        for switch in config.switches:
            if switch.is_enabled:
                self._switches.setdefault(switch.name, switch)

    def forget_switches(self) -> None:
        """Have no switches."""
        self._switches = {}

    # The plan

    def configuration(self, *, is_partial: bool = False) -> Configure:
        """Return priv's message about everything but the interfaces of VMs."""
        return Configure(
            mark=self._mark,
            table=self._table,
            switches=tuple(self._switches.values()),
            nat4=subnet4(self._prefix4) if self._is_nat else "",
            nat6=subnet6(self._prefix6) if self._is_nat and self._prefix6 else "",
            is_partial=is_partial,
        )

    def links(self, vm: Vm) -> Links:
        """Return whether each interface has a link; one on a switch that is down has none."""
        switches = [self._switches.get(one.switch or "") for one in vm.config.interfaces]
        return tuple(
            interface.is_up and (switch is None or switch.is_up)
            for interface, switch in zip(vm.config.interfaces, switches, strict=True)
        )

    def specs(self, vm: Vm, taken: TakenForwards) -> tuple[TapSpec, ...]:
        """Return the plan of a VM's taps; `taken` are the ports of other VMs.

        Raises:
            ResourceError: an address or a port is not to be had.
        """
        places = count()
        specs = tuple(
            replace(
                self._spec(vm, index, interface),
                queues=tuple(islice(places, interface.queues or 1)),
            )
            for index, interface in enumerate(vm.config.interfaces)
        )
        _check_forwards(vm.config.interfaces, taken)
        return specs

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
            config=interface._replace(
                rdomain=rdomain,
                is_locked=interface.is_locked or (switch is not None and switch.is_locked),
            ),
            alias=f"vm{vm.id}-if{index}-{vm.name}"[:_ALIAS_MAX],
            bridge=switch.interface if switch else "",
            group=group_number(group) if group else 0,
            local=self._addresses(vm, index, interface.lladdr) if interface.is_local else None,
        )

    def _addresses(self, vm: Vm, index: int, lladdr: str) -> LocalAddresses:
        try:
            return local_addresses(self._prefix4, self._prefix6, vm.id, index, lladdr)
        except RangeError as err:
            raise ResourceError(ErrorCode.EINVAL, str(err)) from err


def taken_forwards(taps: Iterable[tuple[str, Iterable[TapSpec]]]) -> TakenForwards:
    """Return the ports that lead to guests, given the names of VMs and their taps."""
    return {
        (forward.protocol, forward.port): name
        for name, specs in taps
        for spec in specs
        for forward in spec.config.forwards
    }


def _check_forwards(interfaces: Sequence[InterfaceConfig], taken: TakenForwards) -> None:
    wanted = [each[:2] for one in interfaces for each in one.forwards]
    for interface in interfaces:
        for forward in interface.forwards:
            if forward.address == "::1":
                text = (
                    f"forward {forward.protocol} ::1 {forward.port}: only vmd --user can;"
                    " name another address of this host, such as 127.0.0.1, or * for all"
                )
                raise ResourceError(ErrorCode.EINVAL, text)
    for protocol, port in wanted:
        owner = taken.get((protocol, port))
        if owner is not None:
            text = f'forward {protocol} {port}: vm "{owner}" has it'
            raise ResourceError(ErrorCode.EBUSY, text)
        if wanted.count((protocol, port)) > 1:
            text = f"forward {protocol} {port}: two interfaces want it"
            raise ResourceError(ErrorCode.EINVAL, text)


def group_number(name: str, path: str = _GROUP_NAMES) -> int:
    """Return Linux's number for a group: the operator's, or else one made from its name.

    Source: ip-link(8), "group".
    """
    try:
        with open(path, encoding="utf-8", errors="replace") as file:  # noqa: PTH123 - the plainest
            for line in file:
                number, _, rest = line.partition("#")[0].strip().partition(" ")
                if rest.strip() == name and number.isdecimal():
                    return int(number)
    except OSError:
        pass  # no such file: no group has a name
    return _GROUP_FIRST | crc32(name.encode()) & _GROUP_MASK
