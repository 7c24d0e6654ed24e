"""The priv process: its changes to the host's network for the parent.

rtnetlink, nftables and the settings are fakes; tests/system/vmd uses the kernel's.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from errno import EPERM
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.unit.vmd.far import Far
from vmd.config.model import ForwardConfig, InterfaceConfig, SwitchConfig
from vmd.priv.nat import clearing, nat, ruleset
from vmd.priv.nftables import NftablesError
from vmd.priv.process import VRF_TABLE, Priv
from vmd.priv.rtnetlink import Link, LinkError, Rtnetlink
from vmd.priv.settings import Settings
from vmd.wire.channel import Channel
from vmd.wire.internal import (
    PARENT_AND_PRIV,
    PRIV_AND_PARENT,
    Configure,
    Configured,
    ForgetTaps,
    InterfaceTrouble,
    LocalAddresses,
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
from vmm_kvm.loop import EventLoop

MARK = "vmd /run/vmd.sock"
TABLE = "vmd"
LLADDR = "fe:e1:bb:d1:00:01"
LOCAL = LocalAddresses(
    host4="100.64.1.2",
    guest4="100.64.1.3",
    host_lladdr="fe:e1:bb:d1:00:02",
    host6="fd00::1",
    guest6="fd00::2",
)


class FakeNetlink:
    """A host's interfaces; it records changes, and refuses those that a test chooses."""

    def __init__(self) -> None:
        self.table: dict[str, Link] = {}
        self.done: list[str] = []
        self.refused: set[str] = set()
        self._indices = iter(range(1, 1000))

    def add(self, name: str, kind: str, lladdr: str = "", alias: str = "") -> Link:
        """Add an existing interface."""
        link = Link(next(self._indices), name, kind, alias, lladdr, 0, is_up=False)
        self.table[name] = link
        return link

    def _do(self, what: str, name: str, *values: object) -> None:
        if what in self.refused:
            raise LinkError(name, EPERM)
        self.done.append(" ".join(map(str, (what, name, *values))))

    def attach_tap(self, fd: int, name: str, *, is_multi_queue: bool) -> str:
        """Make a tap."""
        assert os.fstat(fd)
        name = name or f"tap{sum(link.kind == 'tun' for link in self.table.values())}"
        self._do("tap", name, is_multi_queue)
        if name not in self.table:
            self.add(name, "tun")
        return name

    def links(self) -> list[Link]:
        """Return all interfaces."""
        if "links" in self.refused:
            raise LinkError("interfaces", EPERM)
        return list(self.table.values())

    def find(self, name: str) -> Link | None:
        """Find an interface."""
        return self.table.get(name)

    def make_bridge(self, name: str, lladdr: str) -> Link:
        """Make a bridge."""
        self._do("bridge", name)
        return self.add(name, "bridge", lladdr)

    def make_vrf(self, name: str, lladdr: str, table: int) -> Link:
        """Make a VRF."""
        self._do("vrf", name, table - VRF_TABLE)
        return self.add(name, "vrf", lladdr)

    def delete(self, link: Link) -> None:
        """Remove an interface."""
        self._do("delete", link.name)
        del self.table[link.name]

    def set_alias(self, link: Link, alias: str) -> None:
        """Describe an interface."""
        self._do("alias", link.name, alias)
        self.table[link.name] = self.table[link.name]._replace(alias=alias)

    def set_lladdr(self, link: Link, lladdr: str) -> None:
        """Set an address."""
        self._do("lladdr", link.name, lladdr)

    def set_mtu(self, link: Link, mtu: int) -> None:
        """Set the MTU."""
        self._do("mtu", link.name, mtu)

    def set_group(self, link: Link, group: int) -> None:
        """Set the group."""
        self._do("group", link.name, group)

    def set_up(self, link: Link, *, is_up: bool) -> None:
        """Set up or down."""
        self._do("up" if is_up else "down", link.name)

    def set_master(self, link: Link, master: Link | None) -> None:
        """Set the master."""
        self._do("master", link.name, master.name if master else "")

    def set_address(self, link: Link, address: str, bits: int) -> None:
        """Add an address."""
        self._do("address", link.name, f"{address}/{bits}")

    def set_route(self, link: Link, address: str, table: int) -> None:
        """Add a route."""
        self._do("route", link.name, address, table)

    def close_table(self, table: int) -> None:
        """Close a table."""
        self._do("close", str(table - VRF_TABLE))

    def open_table(self, table: int) -> None:
        """Open a table."""
        self._do("open", str(table - VRF_TABLE))


class FakeFilter:
    """A packet filter that records rules."""

    def __init__(self) -> None:
        self.texts: list[str] = []
        self.refused = ""
        """Text that no rules may contain; empty for none."""

    def run(self, rules: str) -> None:
        """Take rules."""
        if self.refused and self.refused in rules:
            raise NftablesError("nftables: Error: refused")
        self.texts.append(rules)


class Rig:
    """A priv process's work, with the test as the parent."""

    def __init__(self, loop: EventLoop, settings: Path, *, has_filter: bool = True) -> None:
        self.loop = loop
        self.settings = settings
        self.netlink = FakeNetlink()
        self.filter = FakeFilter()
        self.parent: Far[ParentToPriv, PrivToParent] = Far(loop, PARENT_AND_PRIV)
        self.channel = Channel(self.parent.near, PRIV_AND_PARENT)
        priv = Priv(
            loop,
            self.channel,
            self.netlink,
            self.filter if has_filter else None,
            Settings(str(settings)),
        )
        self.channel.watch(loop, priv.take, lambda _: priv.parent_left())

    def configure(self, **fields: object) -> None:
        """Send a configuration."""
        message = Configure(mark=MARK, table=TABLE, **fields)  # type: ignore[arg-type] # fields of its own
        count = len(self.parent.of(Configured))
        self.parent.say(message)
        self.parent.wait(Configured, count + 1)

    def make(self, *taps: TapSpec, vm_id: int = 1) -> TapsMade:
        """Make a VM's taps."""
        count = len(self.parent.of(TapsMade))
        queues = sum(len(tap.queues) for tap in taps)
        fds = [os.open(os.devnull, os.O_RDWR) for _ in range(queues)]
        self.parent.say(MakeTaps(id=vm_id, taps=taps), fds)
        return self.parent.wait(TapsMade, count + 1)

    def done(self) -> list[str]:
        """Return the operations since the last call."""
        done, self.netlink.done = self.netlink.done, []
        return done

    def setting(self, name: str, value: str = "") -> Path:
        """Make a setting; returns its file."""
        path = self.settings / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(value)
        return path

    def close(self) -> None:
        """Close everything."""
        self.channel.close()
        self.parent.close()


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[Rig]:
    """Return a priv process on a host without interfaces."""
    with EventLoop() as loop:
        made = Rig(loop, tmp_path)
        yield made
        made.close()


def _tap(
    config: InterfaceConfig = InterfaceConfig(),  # noqa: B008 - a tuple
    *,
    queues: tuple[int, ...] = (0,),
    bridge: str = "",
    group: int = 0,
    local: LocalAddresses | None = None,
) -> TapSpec:
    return TapSpec(
        config=config._replace(lladdr=LLADDR),
        alias="vm1-if0-one",
        queues=queues,
        bridge=bridge,
        group=group,
        local=local,
    )


LOCKED = InterfaceConfig(is_locked=True)


def test_a_switch_that_is_made(rig: Rig) -> None:
    """A bridge of ours has the mark and its address, and goes when it is not needed any more."""
    accept_ra = rig.setting("ipv6/conf/bridge9/accept_ra", "1")
    switch = SwitchConfig(name="lan", interface="bridge9", is_created=True, address="10.0.0.1/24")
    rig.configure(switches=(switch,))
    assert rig.done() == [
        "bridge bridge9",
        f"alias bridge9 {MARK}: switch lan",
        "up bridge9",
        "address bridge9 10.0.0.1/24",
    ]
    assert accept_ra.read_text() == "0"
    rig.configure()
    assert rig.done() == ["delete bridge9"]


def test_a_switch_that_the_host_has(rig: Rig, caplog: pytest.LogCaptureFixture) -> None:
    """An existing bridge is used unchanged, and never removed; a wrong one is reported."""
    rig.netlink.add("bridge0", "bridge")
    rig.netlink.add("eth0", "")
    rig.configure(
        switches=(
            SwitchConfig(name="lan", interface="bridge0"),
            SwitchConfig(name="wan", interface="bridge1"),
            SwitchConfig(name="not", interface="eth0"),
        )
    )
    assert rig.done() == ["up bridge0"]
    rig.configure()
    assert rig.done() == []
    assert [record.getMessage() for record in caplog.records] == [
        'switch "wan": bridge "bridge1" does not exist',
        'switch "not": "eth0" is not a bridge',
    ]


def test_what_a_killed_priv_has_left(rig: Rig) -> None:
    """Marked interfaces are removed, unless more messages follow; others are not."""
    rig.netlink.add("bridge7", "bridge", alias=f"{MARK}: switch old")
    rig.netlink.add("bridge8", "bridge", alias="vmd /other: switch old")
    rig.configure(is_partial=True)
    assert rig.done() == []
    rig.configure()
    assert rig.done() == ["delete bridge7"]


def test_rdomains(rig: Rig) -> None:
    """Each routing domain has a VRF, which goes with its last interface."""
    switch = SwitchConfig(name="lan", interface="bridge9", is_created=True, rdomain=5)
    rig.configure(switches=(switch,))
    assert rig.done()[2:] == [
        "vrf rdomain5 5",
        f"alias rdomain5 {MARK}: rdomain5",
        "close 5",
        "up rdomain5",
        "master bridge9 rdomain5",
        "up bridge9",
    ]
    rig.configure()
    assert rig.done() == ["delete bridge9", "delete rdomain5", "open 5"]


def test_a_local_interface(rig: Rig) -> None:
    """It has addresses, a route, and ports that lead to the guest; its frames are checked first."""
    disable = rig.setting("ipv6/conf/tap0/disable_ipv6")
    loopback = rig.setting("ipv4/conf/tap0/route_localnet", "0\n")
    rig.configure(nat4="100.64.0.0/10")
    forwards = (ForwardConfig("tcp", 2222, 22),)
    config = InterfaceConfig(is_locked=True, mtu=9000, forwards=forwards)
    tap = _tap(config, local=LOCAL, group=7, queues=(0, 1))
    made = rig.make(tap)
    assert [one.name for one in made.taps] == ["tap0"]
    assert made.is_filtered
    assert rig.done() == [
        "tap tap0 True",
        "tap tap0 True",
        "alias tap0 vm1-if0-one",
        "lladdr tap0 fe:e1:bb:d1:00:02",
        "mtu tap0 9000",
        "group tap0 7",
        "up tap0",
        "address tap0 100.64.1.2/31",
        "address tap0 fd00::1/96",
        "route tap0 fd00::2 0",
    ]
    assert disable.read_text() == "0"
    assert loopback.read_text().startswith("1")
    assert "dport 2222 dnat ip to 100.64.1.3:22" in rig.filter.texts[-1]
    assert LLADDR.replace(":", "") in rig.filter.texts[-1]
    rig.parent.say(ForgetTaps(id=1))
    assert rig.parent.wait(TapsForgotten).id == 1
    assert rig.filter.texts[-1] == ruleset(TABLE, nat("100.64.0.0/10", ""))
    assert loopback.read_text().startswith("0")


def test_an_interface_on_a_switch(rig: Rig) -> None:
    """An interface joins its bridge, even one that appears later; the parent hears of both."""
    rig.configure()
    rig.make(_tap(), _tap(InterfaceConfig(is_up=False), bridge="bridge0", queues=(1,)))
    assert rig.done()[-1] == "down tap1"
    rig.configure()
    rig.netlink.add("bridge0", "bond")
    rig.configure()
    rig.netlink.add("bridge0", "bridge")
    rig.configure(switches=(SwitchConfig(name="lan", interface="bridge0"),))
    assert "master tap1 bridge0" in rig.done()
    assert [(one.id, one.index, one.message) for one in rig.parent.of(InterfaceTrouble)] == [
        (1, 1, 'bridge "bridge0" does not exist'),
        (1, 1, '"bridge0" is not a bridge'),
        (1, 1, ""),
    ]
    rig.make(_tap(InterfaceConfig(rdomain=3)), vm_id=2)
    assert "master tap2 rdomain3" in rig.done()


def test_what_cannot_be_made(rig: Rig, caplog: pytest.LogCaptureFixture) -> None:
    """The VM has no interfaces, with a reason; a partial refusal is told or logged."""
    rig.parent.say(MakeTaps(id=1, taps=(_tap(),)), [os.open(os.devnull, os.O_RDWR)])
    assert rig.parent.wait(TapsFailed).message == "nothing is configured"
    rig.configure()
    rig.parent.say(MakeTaps(id=1, taps=(_tap(),)))
    assert rig.parent.wait(TapsFailed, 2).message == "descriptor 0 of 0 is missing"
    rig.netlink.refused = {"tap"}
    rig.parent.say(MakeTaps(id=1, taps=(_tap(),)), [os.open(os.devnull, os.O_RDWR)])
    assert rig.parent.wait(TapsFailed, 3).message == "tap0: Operation not permitted"
    rig.parent.say(MakeTaps(id=1, taps=(_tap(InterfaceConfig(tap="gone"), queues=()),)))
    assert rig.parent.wait(TapsFailed, 4).message == "gone: No such device"
    rig.netlink.refused = {"mtu", "up", "links", "bridge"}
    caplog.clear()
    rig.make(_tap())
    assert [record.getMessage() for record in caplog.records] == ["tap0: Operation not permitted"]
    (told,) = rig.parent.of(InterfaceTrouble)
    assert (told.id, told.index, told.message) == (1, 0, "tap0: Operation not permitted")
    rig.configure(switches=(SwitchConfig(name="lan", interface="bridge9", is_created=True),))
    assert [record.getMessage() for record in caplog.records][1:] == [
        "cannot remove an interface: interfaces: Operation not permitted",
        'switch "lan": bridge9: Operation not permitted',
    ]


@pytest.mark.parametrize(
    ("refused", "what", "needs", "is_filtered"),
    [
        ("dport 2222 dnat", "forward tcp 2222 to 22", "nft_fib_inet", True),
        ("127.0.0.0/8 drop", "forward tcp 2222 to 22 for 127.0.0.1", "nft_nat", True),
        ("egress", "locked lladdr", "Linux 5.16", False),
    ],
)
def test_rules_that_are_refused(
    rig: Rig, refused: str, what: str, needs: str, is_filtered: bool
) -> None:
    """The parent gets the VMs of refused rules and the missing features; all others apply."""
    loopback = rig.setting("ipv4/conf/tap1/route_localnet", "0\n")
    rig.configure(nat4="100.64.0.0/10")
    rig.filter.refused = refused
    config = InterfaceConfig(is_locked=True, forwards=(ForwardConfig("tcp", 2222, 22),))
    made = rig.make(_tap(), _tap(config, local=LOCAL, queues=(1,)), vm_id=4)
    assert made.is_filtered == is_filtered
    told = rig.parent.of(RulesRefused)
    assert {(one.id, one.index) for one in told} == {(4, 1)}
    assert any(
        one.message.startswith(f"{what}: nftables: Error: refused (it needs ")
        and needs in one.message
        for one in told
    )
    there = rig.filter.texts[-1]
    assert "ip saddr 100.64.0.0/10" in there
    assert refused not in there
    assert ("@ll,48,48" in there) == is_filtered
    # The guard keeps the guest's packets from the loopback network.
    assert loopback.read_text().startswith("1") == ("127.0.0.0/8 drop" in there)
    rig.make(_tap(), vm_id=5)
    assert rig.parent.of(RulesRefused) == told


def test_a_refused_nat_leaves_forwards(rig: Rig, caplog: pytest.LogCaptureFixture) -> None:
    """A refused rule that belongs to no VM is logged, with the missing feature."""
    rig.setting("ipv4/ip_forward", "1\n")
    rig.filter.refused = "daddr != 100.64.0.0/10 masquerade"
    rig.configure(nat4="100.64.0.0/10")
    config = InterfaceConfig(forwards=(ForwardConfig("tcp", 2222, 22, "192.0.2.1"),))
    rig.make(_tap(config, local=LOCAL))
    assert "dnat ip to 100.64.1.3:22" in rig.filter.texts[-1]
    told = [record.getMessage() for record in caplog.records]
    assert told == [
        (
            "nat of 100.64.0.0/10: nftables: Error: refused"
            " (it needs the kernel's nft_chain_nat and nft_masq)"
        )
    ]


def test_rules_that_are_there_are_not_sent(rig: Rig) -> None:
    """The same configuration twice applies its rules once."""
    rig.configure()
    rig.configure()
    assert rig.filter.texts == [clearing(TABLE)]


def test_without_nftables(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Without nftables all else is done; its absence is reported once per configuration."""
    with EventLoop() as loop:
        rig = Rig(loop, tmp_path, has_filter=False)
        rig.configure()
        assert not rig.make(_tap(LOCKED)).is_filtered
        assert not rig.make(_tap(LOCKED), vm_id=2).is_filtered
        told = [record.getMessage() for record in caplog.records]
        assert told == ["no nftables: no NAT, no forwarded ports"]
        assert [(one.id, one.message) for one in rig.parent.of(RulesRefused)] == [
            (number, "locked lladdr: no nftables") for number in (1, 2)
        ]
        rig.close()


def test_forwarding(rig: Rig, caplog: pytest.LogCaptureFixture) -> None:
    """IPv4's forwarding is turned on for NAT; the operator decides on IPv6's."""
    ipv4 = rig.setting("ipv4/ip_forward", "0\n")
    rig.setting("ipv6/conf/all/forwarding", "0\n")
    rig.configure(nat4="100.64.0.0/10", nat6="fd00::/64")
    assert ipv4.read_text().startswith("1")
    assert "does not forward IPv6" in caplog.records[-1].getMessage()
    ipv4.unlink()
    rig.configure(nat4="100.64.0.0/10")
    assert caplog.records[-1].getMessage() == (
        f"nat and forwards: {ipv4}: No such file or directory"
    )


def test_the_parents_end(rig: Rig) -> None:
    """At the parent's end everything made is removed, and the loop stops."""
    rig.parent.say(SetVerbosity(level=1))
    rig.configure(switches=(SwitchConfig(name="lan", interface="bridge9", is_created=True),))
    rig.done()
    rig.parent.channel.close()
    rig.loop.run()
    assert rig.done() == ["delete bridge9"]
    assert rig.filter.texts[-1] == clearing(TABLE)


class Call(NamedTuple):
    """A call to pyroute2."""

    what: str
    command: str
    options: dict[str, object]


class FakeMessage(dict[str, int]):
    """A struct ifinfomsg."""

    def get_attr(self, name: str) -> str | int | None:
        """Return an attribute."""
        values: dict[str, str | int] = {"IFLA_IFNAME": "tap7", "IFLA_IFALIAS": "vm1"}
        return {**values, "IFLA_MASTER": 4}.get(name)

    def get_nested(self, *_names: str) -> str | None:
        """Return the kind."""
        return "tun"


class FakeRoute:
    """pyroute2's connection, which records calls."""

    def __init__(self) -> None:
        self.calls: list[Call] = []

    def link(self, command: str, **options: object) -> list[FakeMessage]:
        """Take a request for interfaces."""
        self.calls.append(Call("link", command, options))
        return [FakeMessage(index=7, flags=1)]

    def addr(self, command: str, **options: object) -> None:
        """Take a request for addresses."""
        self.calls.append(Call("addr", command, options))

    def route(self, command: str, **options: object) -> None:
        """Take a request for routes."""
        self.calls.append(Call("route", command, options))

    def close(self) -> None:
        """Disconnect."""


def test_requests_to_rtnetlink() -> None:
    """Each operation is one request, or two if IPv4 and IPv6 have one each."""
    route = FakeRoute()
    netlink = Rtnetlink(route)
    link = Link(7, "tap7", "tun", "vm1", "", 4, is_up=True)
    assert netlink.links() == [link]
    assert netlink.find("tap7") == link
    assert netlink.make_bridge("tap7", LLADDR) == link
    assert netlink.make_vrf("tap7", LLADDR, 99) == link
    made = [one.options for one in route.calls if one.command == "add"]
    assert made[0]["kind"] == "bridge"
    assert made[1] == {"ifname": "tap7", "address": LLADDR, "kind": "vrf", "vrf_table": 99}
    route.calls.clear()
    netlink.delete(link)
    netlink.set_alias(link, "é" * 200)
    netlink.set_lladdr(link, LLADDR)
    netlink.set_mtu(link, 1400)
    netlink.set_group(link, 3)
    netlink.set_up(link, is_up=False)
    netlink.set_master(link, None)
    expected: list[dict[str, object]] = [
        {},
        {"ifalias": "é" * 127},
        {"address": LLADDR},
        {"mtu": 1400},
        {"group": 3},
        {"state": "down"},
        {"master": 0},
    ]
    assert [one.options for one in route.calls] == [{"index": 7, **each} for each in expected]
    route.calls.clear()
    netlink.set_address(link, "10.0.0.1", 24)
    netlink.set_address(link, "fd00::1", 64)
    netlink.set_route(link, "fd00::2", 0)
    netlink.set_route(link, "fd00::2", 99)
    netlink.close_table(99)
    netlink.open_table(99)
    assert [(one.what, one.command) for one in route.calls] == [
        *[("addr", "replace")] * 2,
        *[("route", "replace")] * 4,
        *[("route", "del")] * 2,
    ]
    assert [one.options["family"] for one in route.calls] == [2, 10, 10, 10, 2, 10, 2, 10]
    assert [one.options.get("table") for one in route.calls][2:] == [None, *[99] * 5]
    netlink.close()


def test_what_is_no_tap() -> None:
    """A file that is no tap is refused, by its name."""
    with open(os.devnull, "rb") as file, pytest.raises(LinkError, match=r"^tap5: Inappropriate"):  # noqa: PTH123
        Rtnetlink.attach_tap(file.fileno(), "tap5", is_multi_queue=True)
