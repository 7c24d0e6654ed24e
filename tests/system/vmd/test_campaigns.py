"""Parts of the campaigns against the daemon; tests/campaigns has all of them."""

from __future__ import annotations

import os
import typing
from pathlib import Path

import pytest

from tests.campaigns import compromised, hostile_clients, kill_daemon, reload_storm, valid_floods
from tests.system.vmd.daemon import READY, Daemon, vm_block
from vmd.wire.messages import AnyRequest

pytestmark = [pytest.mark.kvm, pytest.mark.timeout(300)]

SEED = 11


def test_killed_processes(tmp_path: Path) -> None:
    """A process of each kind, killed under load, ends the VMs that need it and no others."""
    killed = kill_daemon.run(tmp_path, 1, SEED)
    kinds = set(kill_daemon.KINDS) - (set() if os.geteuid() == 0 else kill_daemon.OF_ROOT)
    assert killed == dict.fromkeys(kinds, 1)


def test_hostile_clients(reachable: Path) -> None:
    """Hostile clients neither slow nor grow the daemon, and leave nothing."""
    assert "packets" in hostile_clients.run(reachable, 3000, SEED, patience=8)


def test_storms_of_signals(tmp_path: Path) -> None:
    """Reloading without end loses no VM."""
    assert "SIGHUP" in reload_storm.run(tmp_path, 200)


def test_valid_floods(tmp_path: Path) -> None:
    """Users with endless requests cost no VM, and delay others for a moment at most."""
    for directory in tmp_path.parents[:3]:
        directory.chmod(directory.stat().st_mode | 0o011)
    assert valid_floods.run(tmp_path, 64, 12.0).statuses


def test_floods_of_subscriptions(tmp_path: Path) -> None:
    """A connection gets events once, however often it asks, and a start does not wait."""
    for directory in tmp_path.parents[:3]:
        directory.chmod(directory.stat().st_mode | 0o011)
    assert "not answered once" in valid_floods.run_events(tmp_path, 16_000)


@pytest.mark.parametrize(
    ("kind", "rounds"), [("vm", compromised.VM_WAYS), ("disk", 1), ("share", 1)]
)
def test_processes_of_vms_that_were_taken_over(tmp_path: Path, kind: str, rounds: int) -> None:
    """A compromised process of a VM ends its own VM alone, whatever it sends."""
    assert "taken over" in compromised.run_vms(tmp_path, kind, rounds, SEED)


@pytest.mark.parametrize("seed", [1, 2])
def test_a_control_process_that_was_taken_over(tmp_path: Path, seed: int) -> None:
    """A compromised control process costs no VM, and is replaced."""
    assert "replaced" in compromised.run_control(tmp_path, seed)


def test_floods_of_failing_starts(tmp_path: Path) -> None:
    """Endless names delay no other user, use no ids, and have their share of the log."""
    for directory in tmp_path.parents[:3]:
        directory.chmod(directory.stat().st_mode | 0o011)
    assert "under new names" in valid_floods.run_starts(tmp_path, 5.0)


@pytest.mark.skipif(os.geteuid() != 0, reason="another user's connection needs root")
def test_floods_of_owners(tmp_path: Path) -> None:
    """All that an owner may ask for, with answers unread, delays no other user's console."""
    for directory in tmp_path.parents[:3]:
        directory.chmod(directory.stat().st_mode | 0o011)
    assert "answers to requests" in valid_floods.run_owners(tmp_path, 250, 8.0, patience=8)


def test_campaigns_have_requests_of_each_type() -> None:
    """A type of request that is new in the protocol has to be added to the campaigns."""
    types = {str(each.__struct_config__.tag) for each in typing.get_args(AnyRequest)}
    assert {str(request["type"]) for request in hostile_clients.REQUESTS} == types
    assert types - valid_floods.TYPES_OF_OWNERS == set()


@pytest.mark.skipif(os.geteuid() != 0, reason="another user's connection needs root")
def test_consoles_that_one_user_does_not_take(tmp_path: Path) -> None:
    """Another user's console still opens: the kernel counts descriptors under way."""
    for directory in tmp_path.parents[:3]:
        directory.chmod(directory.stat().st_mode | 0o011)
    tmp_path.chmod(0o711)
    nobody = hostile_clients.NOBODY
    config = f"socket owner {nobody}\n" + vm_block("his", f"owner {nobody}", enabled=True)
    config += vm_block("mine", enabled=True)
    with Daemon(tmp_path, config, is_user=False) as vmd, vmd.client() as client:
        for name in ("his", "mine"):
            client.wait_for_state(name, "running")
        ask = b'{"type":"console","name":"his"}'
        with valid_floods.flooded(vmd.socket, 96, ask):
            for _ in range(10):
                with client.console("mine") as console:
                    console.expect(READY)
