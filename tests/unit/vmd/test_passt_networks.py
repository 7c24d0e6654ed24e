"""Networks without privileges: a passt for each local interface."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator, Sequence

import pytest

from vmd.config.model import Config, ForwardConfig, InterfaceConfig, SwitchConfig, VmConfig
from vmd.parent.errors import ResourceError
from vmd.parent.interfaces import Interface
from vmd.parent.passt_networks import PasstNetworks
from vmd.rules.vm import Vm
from vmd.rules.vm_state import VmState

LLADDR = "fe:e1:bb:d1:00:01"
LOCAL = InterfaceConfig(
    is_local=True,
    lladdr=LLADDR,
    mtu=9000,
    forwards=(ForwardConfig("tcp", 2222, 22), ForwardConfig("udp", 53, 5353)),
)
SWITCHED = InterfaceConfig(switch="lan", lladdr=LLADDR)


def _vm(*interfaces: InterfaceConfig, number: int = 1) -> Vm:
    return Vm(VmConfig("one", interfaces=interfaces), VmState(number), 0)


@pytest.fixture
def networks() -> Iterator[PasstNetworks]:
    """Return networks of nobody; every process has ended afterwards."""
    made = PasstNetworks()
    yield made
    made.close()
    for pid in tuple(made.pids):
        os.waitpid(pid, 0)
        made.reaped(pid)
    assert not made.pids


def _attached(networks: PasstNetworks, vm: Vm) -> Sequence[Interface]:
    found: list[Sequence[Interface] | ResourceError] = []
    networks.attach(vm, found.append)
    (one,) = found
    assert not isinstance(one, ResourceError)
    return one


def _first_words(network: Interface) -> str:
    assert network.stream is not None
    with socket.socket(fileno=os.dup(network.stream)) as stream:
        stream.settimeout(10)
        return stream.recv(4096).decode()


@pytest.mark.usefixtures("fake_passt")
def test_a_local_interface_has_a_passt(networks: PasstNetworks) -> None:
    """It is told which ports lead to the guest, and stays over a reboot."""
    vm = _vm(LOCAL, SWITCHED)
    local, switched = _attached(networks, vm)
    words = _first_words(local)
    assert words.startswith("--foreground --quiet --fd ")
    assert words.endswith(" -t 2222:22 -u 53:5353")
    assert (local.spec.lladdr, local.spec.mtu, local.has_link) == (LLADDR, 9000, True)
    assert (switched.spec.mtu, switched.has_link) == (1500, False)
    assert len(networks.pids) == 1
    again = _attached(networks, vm)
    assert [one.stream for one in again] == [local.stream, switched.stream]
    assert len(networks.pids) == 1
    networks.release(vm.id)
    networks.release(vm.id)
    (pid,) = networks.pids
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    networks.reaped(pid)


def test_without_passt_there_is_no_cable(
    networks: PasstNetworks, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The VM starts; the log says what is missing."""
    monkeypatch.setenv("PATH", "/nonexistent")
    networks.configure(Config(switches=(SwitchConfig("lan", "bridge0"),)))
    assert [one.has_link for one in _attached(networks, _vm(LOCAL, SWITCHED))] == [False, False]
    assert [record.getMessage() for record in caplog.records] == [
        "no switches: they need root",
        "vm/one: interface 0: no network: passt is not installed",
        "vm/one: interface 1: no network: switches need root",
    ]


@pytest.mark.usefixtures("fake_passt")
def test_cables_follow_the_configuration(networks: PasstNetworks) -> None:
    """Those that changed are told of, once; what is told of an interface agrees."""
    vm = _vm(LOCAL, SWITCHED)
    assert [info.is_up for info in networks.told(vm)] == [True, True]
    _attached(networks, vm)
    assert networks.refresh() == {}
    vm.config = vm.config._replace(interfaces=(LOCAL._replace(is_up=False), SWITCHED))
    networks.add(Config())
    networks.forget_switches()
    assert networks.refresh() == {1: (False, False)}
    assert networks.refresh() == {}
    told = networks.told(vm)
    assert [info.is_up for info in told] == [False, False]
    assert [info.mtu for info in told] == [9000, 1500]


def test_a_vm_without_interfaces(networks: PasstNetworks) -> None:
    """It needs nothing, and no process."""
    assert _attached(networks, _vm()) == ()
    assert (networks.peers, networks.pids) == ({}, set())
