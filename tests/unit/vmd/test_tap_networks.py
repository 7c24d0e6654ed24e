"""Networks of taps: the parent's requests to priv and local, and when a VM may start.

The test is both. /dev/null stands in for /dev/net/tun: it can be opened, and is no tap.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from tests.unit.vmd.far import Far, run_until
from vmd.config.model import (
    Config,
    ForwardConfig,
    InterfaceConfig,
    Prefix,
    SwitchConfig,
    VmConfig,
)
from vmd.confine.confinements import Kind
from vmd.parent.errors import ResourceError
from vmd.parent.interfaces import Interface
from vmd.parent.tap_networks import TapNetworks
from vmd.parent.taps import group_number
from vmd.rules.vm import Vm
from vmd.rules.vm_state import VmState
from vmd.wire.internal import (
    PRIV_AND_PARENT,
    Configure,
    Configured,
    ForgetTaps,
    InterfaceTrouble,
    MadeTap,
    MakeTaps,
    ParentToPriv,
    PrivToParent,
    RulesRefused,
    SetVerbosity,
    TapsFailed,
    TapsForgotten,
    TapsMade,
)
from vmd.wire.local import LOCAL_AND_PARENT, ForgetLocal, LocalToParent, ParentToLocal
from vmm_kvm.boot_device import BootDevice
from vmm_kvm.loop import EventLoop

LLADDR = "fe:e1:bb:d1:00:01"
LAN = SwitchConfig("lan", "bridge0", group="guests", is_locked=True, rdomain=4)
SWITCHED = InterfaceConfig(switch="lan", lladdr=LLADDR)
LOCAL = InterfaceConfig(
    is_local=True, lladdr=LLADDR, queues=2, mtu=9000, forwards=(ForwardConfig("tcp", 2222, 22),)
)

Found = Sequence[Interface] | ResourceError


def _vm(*interfaces: InterfaceConfig, number: int = 1, name: str = "one") -> Vm:
    return Vm(VmConfig(name, interfaces=interfaces), VmState(number), 0)


class Rig:
    """Networks whose priv and local processes are the test."""

    def __init__(self, loop: EventLoop, tun: str = os.devnull) -> None:
        self.loop = loop
        self.networks = TapNetworks(loop, "/tmp/vmd.sock", tun=tun)
        self.priv: Far[PrivToParent, ParentToPriv] = self.start_priv()
        self.local: Far[LocalToParent, ParentToLocal] = Far(loop, LOCAL_AND_PARENT)
        self.networks.peers[Kind.LOCAL].started(self.local.near, lambda: None)
        self.found: dict[int, Found] = {}

    def start_priv(self) -> Far[PrivToParent, ParentToPriv]:
        """Start a new priv process."""
        self.priv = Far(self.loop, PRIV_AND_PARENT)
        self.networks.peers[Kind.PRIV].started(self.priv.near, lambda: None)
        return self.priv

    def attach(self, vm: Vm) -> None:
        """Have a VM's interfaces made."""
        self.networks.attach(vm, lambda found: self.found.__setitem__(vm.id, found))

    def error(self, vm_id: int = 1) -> str:
        """Return the reason for which a VM has no interfaces."""
        found = self.found.pop(vm_id)
        assert isinstance(found, ResourceError)
        return str(found)

    def make(self, count: int = 1, *, is_filtered: bool = True) -> MakeTaps:
        """Be a priv that makes taps; returns the request."""
        told = self.priv.wait(MakeTaps, count)
        taps = tuple(
            MadeTap(name=f"notap{index}", index=index + 5) for index in range(len(told.taps))
        )
        self.priv.say(TapsMade(id=told.id, taps=taps, is_filtered=is_filtered))
        return told

    def made(self, vm: Vm, *, is_filtered: bool = True) -> Sequence[Interface]:
        """Have a VM's interfaces made; returns them."""
        self.attach(vm)
        self.make(len(self.priv.of(MakeTaps)) + 1, is_filtered=is_filtered)
        run_until(self.loop, lambda: vm.id in self.found)
        found = self.found.pop(vm.id)
        assert not isinstance(found, ResourceError)
        return found

    def close(self) -> None:
        """Close everything."""
        for peer in self.networks.peers.values():
            peer.close()
        self.networks.close()
        self.priv.close()
        self.local.close()


@pytest.fixture
def rig() -> Iterator[Rig]:
    """Return networks without a configuration."""
    with EventLoop() as loop:
        made = Rig(loop)
        yield made
        made.close()


def test_the_configuration_is_told(rig: Rig) -> None:
    """The priv process gets enabled switches and NAT prefixes; later files count too."""
    rig.networks.add(Config(switches=(LAN,)))  # before there is any
    rig.networks.configure(
        Config(
            switches=(LAN, SwitchConfig("off", "bridge1", is_enabled=False)),
            is_nat=True,
            is_local_inet6=True,
            local_prefix6=Prefix(0xFD << 120, 64),
        )
    )
    told = rig.priv.wait(Configure)
    assert told.mark == "vmd /tmp/vmd.sock"
    assert told.table.startswith("vmd_")
    assert [(one.name, one.interface) for one in told.switches] == [("lan", "bridge0")]
    assert (told.nat4, told.nat6) == ("100.64.0.0/10", "fd00::/64")
    rig.networks.add(Config(switches=(LAN._replace(interface="x"), SwitchConfig("wan", "bridge2"))))
    told = rig.priv.wait(Configure, 2)
    assert [one.interface for one in told.switches] == ["bridge0", "bridge2"]
    rig.networks.forget_switches()
    assert rig.priv.wait(Configure, 3).switches == ()
    rig.priv.say(Configured())


def test_what_an_interface_inherits(rig: Rig) -> None:
    """An interface has its switch's bridge, group, lock and rdomain; then the VM may start."""
    rig.networks.configure(Config(switches=(LAN,)))
    vm = _vm(SWITCHED, LOCAL)
    rig.attach(vm)
    told = rig.make(is_filtered=False)
    switched, local = told.taps
    assert switched.config == SWITCHED._replace(is_locked=True, rdomain=4)
    assert (switched.bridge, switched.group > 0) == ("bridge0", True)
    assert (switched.mtu, switched.queues, switched.alias) == (1500, (0,), "vm1-if0-one")
    assert (local.config, local.queues, local.mtu) == (LOCAL, (1, 2), 9000)
    assert local.local is not None
    assert (local.local.host4, local.local.guest4) == ("100.64.1.4", "100.64.1.5")
    assert len(rig.priv.fds_of(told)) == 3
    run_until(rig.loop, lambda: vm.id in rig.found)
    found = rig.found[vm.id]
    assert not isinstance(found, ResourceError)
    assert [len(one.queues) for one in found] == [1, 2]
    assert [one.may_vhost for one in found] == [False, True]
    infos = rig.networks.told(vm)
    assert [(one.tap, one.is_locked) for one in infos] == [("notap0", True), ("notap1", False)]
    assert infos[1].host_addresses == ("100.64.1.4/31",)


def test_a_reboot_keeps_the_taps(rig: Rig) -> None:
    """At a reboot the taps are there at once; after the end they are forgotten, and closed."""
    rig.networks.configure(Config())
    vm = _vm(LOCAL)
    before = rig.made(vm)
    rig.attach(vm)
    assert rig.found.pop(vm.id) == before
    rig.networks.release(vm.id)
    assert rig.priv.wait(ForgetTaps).id == vm.id
    assert rig.local.wait(ForgetLocal).id == vm.id
    other = _vm(LOCAL, number=2)
    rig.attach(other)  # its taps may have the same names
    rig.priv.say(TapsForgotten(id=vm.id))
    assert rig.make(2).id == 2
    run_until(rig.loop, lambda: 2 in rig.found)


def test_ports_that_are_taken(rig: Rig) -> None:
    """One port of the host leads to one guest."""
    rig.networks.configure(Config())
    rig.made(_vm(LOCAL))
    rig.attach(_vm(LOCAL, number=2, name="two"))
    assert rig.error(2) == 'forward tcp 2222: vm "one" has it'
    twice = LOCAL._replace(forwards=(ForwardConfig("udp", 5, 5), ForwardConfig("udp", 5, 6)))
    rig.attach(_vm(twice, number=3))
    assert rig.error(3) == "forward udp 5: two interfaces want it"
    within = LOCAL._replace(forwards=(ForwardConfig("tcp", 80, 80, "::1"),))
    rig.attach(_vm(within, number=5))
    assert rig.error(5) == (
        "forward tcp ::1 80: only vmd --user can;"
        " name another address of this host, such as 127.0.0.1, or * for all"
    )
    rig.networks.configure(Config(local_prefix=Prefix(0x0A000000, 30)))
    rig.attach(_vm(LOCAL._replace(forwards=()), number=4))
    assert rig.error(4) == "dhcp address range exceeded, vm id 4 interface 0"


def test_priv_cannot(rig: Rig) -> None:
    """If priv fails the VM does not start, with priv's reason; its descriptors are closed."""
    rig.networks.configure(Config())
    rig.attach(_vm(LOCAL))
    rig.priv.wait(MakeTaps)
    rig.priv.say(TapsFailed(id=1, message="tap0: Device or resource busy"))
    run_until(rig.loop, lambda: 1 in rig.found)
    assert rig.error() == "tap0: Device or resource busy"
    assert rig.priv.wait(ForgetTaps).id == 1
    rig.priv.say(TapsForgotten(id=1))
    rig.made(_vm(LOCAL))


def test_the_next_priv_is_told_what_there_is(rig: Rig) -> None:
    """First the new priv gets existing taps, without their descriptors; then it makes others."""
    rig.networks.configure(Config())
    rig.made(_vm(LOCAL))
    rig.attach(_vm(SWITCHED, number=2))
    rig.priv.wait(MakeTaps, 2)
    rig.networks.peers[Kind.PRIV].ended()
    rig.priv.close()
    rig.attach(_vm(SWITCHED, number=3))
    rig.start_priv()
    run_until(rig.loop, lambda: len(rig.priv.of(MakeTaps)) == 3)
    kinds = [type(one) for one in rig.priv.heard]
    assert kinds == [SetVerbosity, Configure, MakeTaps, Configure, MakeTaps, MakeTaps]
    partial, whole = rig.priv.of(Configure)
    assert (partial.is_partial, whole.is_partial) == (True, False)
    there, *waiting = rig.priv.of(MakeTaps)
    assert [(tap.config.tap, tap.queues) for tap in there.taps] == [("notap0", ())]
    assert [one.id for one in waiting] == [2, 3]
    assert all(len(rig.priv.fds_of(one)) == 1 for one in waiting)


def test_when_there_will_be_no_priv(rig: Rig) -> None:
    """Waiting VMs do not start without a priv; releases then take effect at once."""
    rig.networks.configure(Config())
    rig.made(_vm(LOCAL))
    rig.attach(_vm(SWITCHED, number=2))
    rig.networks.release(1)
    rig.attach(_vm(SWITCHED, number=3))
    rig.networks.peers[Kind.PRIV].ended()  # so that 3 need not wait for 1 any more
    rig.networks.peers[Kind.PRIV].give_up()
    assert [rig.error(2), rig.error(3)] == ["there is no priv process"] * 2


def test_cables_and_states_follow_the_configuration(rig: Rig) -> None:
    """Interfaces that go up or down are told to priv, links that do are told to the guest."""
    rig.networks.configure(Config(switches=(LAN,)))
    vm = _vm(SWITCHED)
    rig.made(vm)
    assert rig.networks.refresh() == {}
    rig.networks.configure(Config(switches=(LAN._replace(is_up=False),)))
    assert rig.networks.refresh() == {1: (False,)}
    vm.config = vm.config._replace(interfaces=(SWITCHED._replace(is_up=False),))
    assert rig.networks.refresh() == {}
    told = rig.priv.wait(MakeTaps, 2)
    assert [(tap.config.tap, tap.config.is_up) for tap in told.taps] == [("notap0", False)]


def test_interfaces_that_change_while_they_are_made(rig: Rig) -> None:
    """Changes are sent to priv again, once it has made the interfaces."""
    rig.networks.configure(Config())
    vm = _vm(SWITCHED)
    rig.attach(vm)
    rig.priv.wait(MakeTaps)
    vm.config = vm.config._replace(interfaces=(SWITCHED._replace(is_up=False),))
    rig.networks.refresh()
    rig.make()
    assert [tap.config.is_up for tap in rig.priv.wait(MakeTaps, 2).taps] == [False]


def test_without_taps_vms_start_all_the_same(caplog: pytest.LogCaptureFixture) -> None:
    """The log names missing taps; an interface that cannot be opened is an error."""
    with EventLoop() as loop:
        rig = Rig(loop, "/nonexistent")
        rig.attach(_vm(LOCAL))
        rig.attach(_vm(number=2))
        assert rig.found == {1: (), 2: ()}
        text = "vm/one: started without its interfaces: /nonexistent is missing"
        assert [record.getMessage() for record in caplog.records] == [text]
        rig.close()
        rig = Rig(loop, "/")
        rig.networks.configure(Config())
        rig.attach(_vm(LOCAL))
        assert rig.error() == "/: Is a directory"
        rig.close()


def test_a_guest_that_cannot_be_answered(rig: Rig, caplog: pytest.LogCaptureFixture) -> None:
    """Without its interface, the local process has no socket; the VM starts."""
    rig.networks.configure(Config())
    vm = _vm(LOCAL)
    vm.config = vm.config._replace(boot_device=BootDevice.NET)
    rig.made(vm)
    assert caplog.records[-1].getMessage().startswith("vm1-if0-one: no DHCP: ")
    rig.networks.peers[Kind.LOCAL].ended()
    with Far[LocalToParent, ParentToLocal](rig.loop, LOCAL_AND_PARENT) as far:
        rig.networks.peers[Kind.LOCAL].started(far.near, lambda: None)
        far.say(LocalToParent())
        assert len(caplog.records) == 2


def test_groups_have_numbers(tmp_path: Path) -> None:
    """A group has the operator's number, or one derived from its name, and no other's."""
    names = tmp_path / "group"
    names.write_text("# comment\n0 default\n7 guests # ours\nx odd\n")
    assert group_number("guests", str(names)) == 7
    assert group_number("odd", str(names)) >= 1 << 30
    assert group_number("guests", str(tmp_path / "none")) == group_number("guests", os.devnull)


def test_rules_that_priv_is_refused(rig: Rig) -> None:
    """A rule that fails is reported at once, and shown as long as the VM exists."""
    told: list[tuple[int, int, str]] = []
    rig.networks.watch(lambda *trouble: told.append(trouble))
    rig.networks.configure(Config())
    vm = _vm(LOCAL)
    rig.made(vm)
    for vm_id, index in ((1, 0), (1, 9), (7, 0)):
        rig.priv.say(RulesRefused(id=vm_id, index=index, message="forward: refused"))
    run_until(rig.loop, lambda: told != [])
    rig.priv.say(RulesRefused(id=1, index=0, message="locked lladdr: refused"))
    run_until(rig.loop, lambda: len(told) > 1)
    assert told == [(1, 0, "forward: refused"), (1, 0, "locked lladdr: refused")]
    assert rig.networks.told(vm)[0].problem == "forward: refused; locked lladdr: refused"
    for text in ("no bridge", "no bridge", ""):
        rig.priv.say(InterfaceTrouble(id=1, index=0, message=text))
        if text:
            run_until(rig.loop, lambda: len(told) > 2)
            problem = "no bridge; forward: refused; locked lladdr: refused"
            assert rig.networks.told(vm)[0].problem == problem
    run_until(rig.loop, lambda: "bridge" not in rig.networks.told(vm)[0].problem)
    assert told[2:] == [(1, 0, "no bridge")]
    rig.networks.release(1)
    assert rig.networks.told(vm)[0].problem == ""
