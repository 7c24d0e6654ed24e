"""Networks without privileges: a passt for each local interface."""

from __future__ import annotations

import os
import select
import signal
import socket
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

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
    forwards=(ForwardConfig("tcp", 52222, 22), ForwardConfig("udp", 50053, 5353)),
)
SWITCHED = InterfaceConfig(switch="lan", lladdr=LLADDR)


def _vm(*interfaces: InterfaceConfig, number: int = 1) -> Vm:
    return Vm(VmConfig("one", interfaces=interfaces), VmState(number), 0)


@pytest.fixture
def networks() -> Iterator[PasstNetworks]:
    """Return networks for this user; every process has ended afterwards."""
    made = PasstNetworks()
    yield made
    made.close()
    for pid in tuple(made.pids):
        os.waitpid(pid, 0)
        made.reaped(pid, 0)
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
    """Each passt gets the ports that lead to the guest, and stays over a reboot."""
    vm = _vm(LOCAL, SWITCHED)
    local, switched = _attached(networks, vm)
    words = _first_words(local)
    assert words.startswith("--foreground --fd ")
    assert words.endswith(" -t 52222:22 -u 50053:5353")
    assert (local.spec.lladdr, local.spec.mtu, local.has_link) == (LLADDR, 9000, True)
    assert (switched.spec.mtu, switched.has_link) == (1500, False)
    assert len(networks.pids) == 1
    again = _attached(networks, vm)
    assert [one.stream for one in again] == [local.stream, switched.stream]
    assert len(networks.pids) == 1
    networks.release(vm.id)
    networks.release(vm.id)
    (pid,) = networks.pids
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) in {0, -signal.SIGTERM}
    networks.reaped(pid, 0)


def test_without_passt_there_is_no_cable(
    networks: PasstNetworks, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Without passt the VM starts, and its absence is reported."""
    monkeypatch.setenv("PATH", "/nonexistent")
    told = _troubles(networks)
    networks.configure(Config(switches=(SwitchConfig("lan", "bridge0"),)))
    vm = _vm(LOCAL, SWITCHED)
    assert [one.has_link for one in _attached(networks, vm)] == [False, False]
    assert [record.getMessage() for record in caplog.records] == ["no switches: they need root"]
    assert told == [
        (1, 0, "no network: passt is not installed"),
        (1, 1, "no network: switches need root"),
    ]
    problems = [info.problem for info in networks.told(vm)]
    assert problems == ["passt is not installed", "switches need root"]


def _troubles(networks: PasstNetworks) -> list[tuple[int, int, str]]:
    """Return the troubles reported from now on."""
    told: list[tuple[int, int, str]] = []
    networks.watch(lambda vm_id, index, text: told.append((vm_id, index, text)))
    return told


def _reap(networks: PasstNetworks) -> None:
    for pid in tuple(networks.pids):
        _, waited = os.waitpid(pid, 0)
        networks.reaped(pid, os.waitstatus_to_exitcode(waited))


@pytest.mark.parametrize(
    ("said", "why"),
    [
        ("", "exit status 1, and it does not say why"),
        ("Failed to bind any port for '-t 80:80'\n", "Failed to bind any port for '-t 80:80'"),
        (
            (
                "Failed to send 46 bytes to syslog\nDon't run as root. Changing to nobody...\n"
                "No external routable interface for IPv4\nExternal interface not usable\n"
            ),
            (
                "No external routable interface for IPv4; External interface not usable"
                " (is this host offline?)"
            ),
        ),
        ("one\ntwo\nthree\nfour\n", "two; three; four"),
        ("\n\n  \n", "exit status 1, and it does not say why"),
        ("no newline", "no newline"),
        (
            "Couldn't set user namespace: Operation not permitted\n",
            "Couldn't set user namespace: Operation not permitted",
        ),
    ],
)
@pytest.mark.usefixtures("fake_passt")
def test_a_passt_that_ends_is_told_of(
    said: str, why: str, networks: PasstNetworks, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At a passt's end the link goes down, with passt's last message as the reason."""
    monkeypatch.setenv("PASST_SAYS", said)
    monkeypatch.setenv("PASST_ENDS", "1")
    told = _troubles(networks)
    vm = _vm(SWITCHED, LOCAL)
    assert [one.has_link for one in _attached(networks, vm)] == [False, True]
    del told[:]
    _reap(networks)
    assert told == [(1, 1, f"no network: passt has ended: {why}")]
    assert networks.refresh() == {1: (False, False)}
    info = networks.told(vm)[1]
    assert (info.is_up, info.problem) == (False, f"passt has ended: {why}")


@pytest.mark.parametrize(
    ("script", "why"),
    [
        ("exit 0", "exit status 0, and it does not say why"),
        ("exit 3", "exit status 3, and it does not say why"),
        ("kill -SEGV $$", "signal 11, and it does not say why"),
        ("kill -KILL $$", "signal 9, and it does not say why"),
        ("echo bad >&2; exit 1", "bad"),
        ("echo bad; exit 1", "exit status 1, and it does not say why"),
        ("printf '\\377\\376bad' >&2; exit 1", "\ufffd\ufffdbad"),
        ("yes line | head -c 3000000 >&2; exit 1", "line; line; line"),
        ("exec /none", "{program}: 2: exec: /none: not found"),
    ],
)
def test_a_passt_that_is_none(
    script: str,
    why: str,
    networks: PasstNetworks,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Whatever a passt does instead of its work, the link goes down, with all that is known."""
    program = tmp_path / "passt"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    told = _troubles(networks)
    assert _attached(networks, _vm(LOCAL))[0].has_link
    _reap(networks)
    expected = why.format(program=program)
    assert told == [(1, 0, f"no network: passt has ended: {expected}")]


@pytest.mark.parametrize(
    ("contents", "why"),
    [
        (b"#!/none/interpreter\n", "No such file or directory"),
        (b"\0\1\2\3", "Exec format error"),
        (b"", "Exec format error"),
    ],
)
def test_a_passt_that_cannot_be_run(
    contents: bytes,
    why: str,
    networks: PasstNetworks,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The VM starts all the same, as it does without any passt."""
    program = tmp_path / "passt"
    program.write_bytes(contents)
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    told = _troubles(networks)
    assert not _attached(networks, _vm(LOCAL))[0].has_link
    assert told == [(1, 0, f"no network: passt cannot be run: {program}: {why}")]
    assert not networks.pids


@pytest.mark.parametrize(
    ("address", "why"),
    [
        ("192.0.2.1", "Cannot assign requested address"),
        ("2001:db8::1", "Cannot assign requested address"),
        ("fe80::1", "Invalid argument"),  # no interface is named
    ],
)
@pytest.mark.parametrize("protocol", ["tcp", "udp"])
def test_an_address_of_another_host(
    protocol: str, address: str, why: str, networks: PasstNetworks
) -> None:
    """A forward from an address that this host has not is told with the address."""
    vm = _vm(LOCAL._replace(forwards=(ForwardConfig(protocol, 50080, 80, address),)))
    told = _troubles(networks)
    assert not _attached(networks, vm)[0].has_link
    assert told == [(1, 0, f"no network: {protocol} port 50080 of {address}: {why}")]


@pytest.mark.usefixtures("fake_passt")
def test_a_reboot_tries_again(networks: PasstNetworks) -> None:
    """At its reboot a guest whose passt has ended gets a new one; the others keep theirs."""
    lasting = LOCAL._replace(forwards=())
    vm = _vm(lasting, LOCAL)
    first, second = _attached(networks, vm)
    pid = max(networks.pids)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    networks.reaped(pid, 0)
    again = _attached(networks, vm)
    assert [one.has_link for one in again] == [True, True]
    assert again[0].stream == first.stream
    assert len(networks.pids) == 2
    assert [info.problem for info in networks.told(vm)] == ["", ""]
    assert second.spec == again[1].spec


@pytest.mark.usefixtures("fake_passt")
def test_the_addresses_of_a_guest_are_told(
    networks: PasstNetworks, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The guest has the addresses that passt reports, of both families."""
    text = "DHCP:\n    assign: 192.0.2.2\n    mask: 255.255.255.0\nNDP:\n    assign: fd00::2\n"
    monkeypatch.setenv("PASST_SAYS", text)
    vm = _vm(LOCAL, SWITCHED)
    local, _ = _attached(networks, vm)
    _first_words(local)
    deadline = time.monotonic() + 10
    while not networks.told(vm)[0].guest_addresses and time.monotonic() < deadline:
        select.select([], [], [], 0.01)
    addresses = [info.guest_addresses for info in networks.told(vm)]
    assert addresses == [("192.0.2.2", "fd00::2"), ()]


@pytest.mark.parametrize("protocol", ["tcp", "udp"])
@pytest.mark.parametrize(
    ("family", "address"), [(socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1")]
)
@pytest.mark.usefixtures("fake_passt")
def test_a_port_in_use_is_told_of(
    protocol: str, family: socket.AddressFamily, address: str, networks: PasstNetworks
) -> None:
    """A port in use is reported, on any address: passt itself may use the other family silently.

    Then there is no network, rather than one that lacks a forward.
    """
    is_tcp = protocol == "tcp"
    with socket.socket(family, socket.SOCK_STREAM if is_tcp else socket.SOCK_DGRAM) as other:
        other.bind((address, 0))
        if is_tcp:
            other.listen()
        port = other.getsockname()[1]
        vm = _vm(LOCAL._replace(forwards=(ForwardConfig(protocol, port, 80),)))
        told = _troubles(networks)
        (one,) = _attached(networks, vm)
        assert not one.has_link
        why = f"{protocol} port {port} of this host: Address already in use"
        assert told == [(1, 0, f"no network: {why}")]
        assert not networks.pids


@pytest.mark.usefixtures("fake_passt")
def test_a_port_is_waited_for_that_is_about_to_be_free(networks: PasstNetworks) -> None:
    """A VM that starts right after another waits for the end of that one's passt."""
    _attached(networks, _vm(LOCAL))
    networks.release(1)
    found: list[Sequence[Interface] | ResourceError] = []
    networks.attach(_vm(LOCAL, number=2), found.append)
    networks.attach(_vm(LOCAL, number=3), found.append)
    assert found == []
    networks.release(3)
    _reap(networks)
    (one,) = found
    assert not isinstance(one, ResourceError)
    assert one[0].has_link


@pytest.mark.usefixtures("fake_passt")
def test_cables_follow_the_configuration(networks: PasstNetworks) -> None:
    """Changed links are reported, once; the status of an interface agrees."""
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
    """A VM without interfaces needs no process."""
    assert _attached(networks, _vm()) == ()
    assert (networks.peers, networks.pids) == ({}, set())
