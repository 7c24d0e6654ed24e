"""One interface of a VM: the descriptors for the VM's processes, and its description."""

import os
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from msgspec.structs import replace

from vmd.config.model import InterfaceConfig
from vmd.parent.errors import ResourceError
from vmd.rules.addressing import BITS4, BITS6
from vmd.wire.channel import Fds
from vmd.wire.internal import MadeTap, TapSpec
from vmd.wire.messages import ForwardInfo, InterfaceInfo
from vmm_kvm.limits import MTU_DEFAULT

_VHOST_NET = "/dev/vhost-net"
_COUNTERS = "/proc/self/net/dev"
_COLUMNS = 16
_USED = (0, 1, 8, 9, 11)  # of those: what Counters has


Links = tuple[bool, ...]
"""Whether the guest finds the cable of each interface plugged in."""


class Interface(NamedTuple):
    """An existing interface of a VM; descriptors stay their owners'."""

    spec: TapSpec
    tap: MadeTap
    queues: tuple[int, ...]
    """Descriptors of the tap."""
    may_vhost: bool
    """The kernel may move its frames."""
    stream: int | None = None
    """Descriptor of a stream of frames, where there is no tap."""
    has_link: bool = True
    """The guest finds its cable plugged in."""


Trouble = Callable[[int, int, str], None]
"""Called when a part of an interface fails, with a VM's id, the interface's index, and the part and
the reason."""

Then = Callable[[tuple[Interface, ...] | ResourceError], None]
"""Called once, when a VM's interfaces exist or cannot be made."""


def open_vhosts(count: int) -> list[int]:
    """Open /dev/vhost-net so many times, for the caller to close; none if the host has none."""
    fds: list[int] = []
    try:
        fds.extend(os.open(_VHOST_NET, os.O_RDWR | os.O_CLOEXEC) for _ in range(count))
    except OSError:
        Fds(fds).close()
        return []
    return fds


class Counters(NamedTuple):
    """Counters of an interface on the host's side, which receives the guest's frames."""

    received: int
    received_packets: int
    sent: int
    sent_packets: int
    dropped: int
    """Frames that were to be sent."""


def parse_counters(text: str) -> dict[str, Counters]:
    """Return counters by interface. Source: proc_pid_net(5), "dev"."""
    found = {}
    for line in text.splitlines():
        name, colon, rest = line.rpartition(":")
        words = rest.split()
        if colon and len(words) >= _COLUMNS:
            received, packets, sent, sent_packets, dropped = (int(words[at]) for at in _USED)
            found[name.strip()] = Counters(received, packets, sent, sent_packets, dropped)
    return found


def interface_infos(
    configs: Sequence[InterfaceConfig], interfaces: Sequence[Interface]
) -> tuple[InterfaceInfo, ...]:
    """Return the description of a VM's interfaces; `interfaces` are the existing ones."""
    if not interfaces:
        return tuple(_configured(config) for config in configs)
    with open(_COUNTERS, encoding="utf-8", errors="replace") as file:  # noqa: PTH123 - the plainest
        counters = parse_counters(file.read())
    return tuple(
        _there(config, interface, counters)
        for config, interface in zip(configs, interfaces, strict=True)
    )


def _configured(config: InterfaceConfig) -> InterfaceInfo:
    return InterfaceInfo(
        lladdr=config.lladdr or "",
        switch=config.switch or "",
        is_local=config.is_local,
        is_locked=config.is_locked,
        is_up=config.is_up,
        mtu=config.mtu or MTU_DEFAULT,
        queues=config.queues or 1,
        group=config.group or "",
        rdomain=config.rdomain,
        forwards=tuple(
            ForwardInfo(
                protocol=each.protocol,
                port=each.port,
                to_port=each.to_port,
                address=each.address,
            )
            for each in config.forwards
        ),
    )


def _there(
    config: InterfaceConfig, interface: Interface, counters: Mapping[str, Counters]
) -> InterfaceInfo:
    spec, name = interface.spec, interface.tap.name
    found = counters.get(name, Counters(0, 0, 0, 0, 0))
    host: list[str] = []
    guest: list[str] = []
    if spec.local is not None:
        host.append(f"{spec.local.host4}/{BITS4}")
        guest.append(f"{spec.local.guest4}/{BITS4}")
        if spec.local.host6:
            host.append(f"{spec.local.host6}/{BITS6}")
            guest.append(f"{spec.local.guest6}/64")
    return replace(
        _configured(config),
        tap=name,
        is_up=interface.has_link,
        is_locked=spec.config.is_locked,
        rdomain=spec.config.rdomain,
        host_addresses=tuple(host),
        guest_addresses=tuple(guest),
        received=found.sent,
        received_packets=found.sent_packets,
        sent=found.received,
        sent_packets=found.received_packets,
        dropped=found.dropped,
    )
