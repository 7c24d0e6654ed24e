"""How guests are asked to stop, and what happens to those that do not listen."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest

from tests.system.vmd.daemon import READY, Daemon, vm_block

pytestmark = pytest.mark.kvm

Start = Callable[[str], Daemon]


def test_a_guest_takes_the_power_button(start_vmd: Start) -> None:
    """A guest that listens for the ACPI power button is asked by it, and powers off in order."""
    with start_vmd(vm_block("one", enabled=True)) as vmd, vmd.client() as client:
        client.wait_for_state("one", "running")
        with client.console("one") as console:
            console.expect(READY)
            assert client.ask("stop", name="one")["type"] == "done"
            console.read_to_end()
            assert b"power button" in console.output
        client.wait_for_state("one", "stopped")


def test_a_guest_that_does_not_listen_has_three_seconds(start_vmd: Start) -> None:
    """A guest that spins does not take the button's interrupt; it is ended when its time is over.

    Meanwhile it is shown as stopping, and cannot be asked again.
    """
    with start_vmd(vm_block("one", enabled=True)) as vmd, vmd.client() as client:
        client.wait_for_state("one", "running")
        with client.console("one") as console:
            console.expect(READY)
            console.type(b"s")
            console.expect(b"s: spin")
            before = time.monotonic()
            assert client.ask("stop", name="one")["type"] == "done"
            assert client.vm("one")["state"] == "stopping"
            assert client.ask("stop", name="one")["code"] == "EALREADY"
            console.read_to_end()
        client.wait_for_state("one", "stopped")
        assert 2.5 < time.monotonic() - before < 10


def test_a_spinning_guest_is_killed_at_once(start_vmd: Start) -> None:
    """Force waits for nothing."""
    with start_vmd(vm_block("one", enabled=True)) as vmd, vmd.client() as client:
        client.wait_for_state("one", "running")
        with client.console("one") as console:
            console.expect(READY)
            console.type(b"s")
            console.expect(b"s: spin")
            before = time.monotonic()
            assert client.ask("stop", name="one", force=True, wait=True)["type"] == "terminated"
            assert time.monotonic() - before < 2


def test_a_paused_guest_can_be_stopped(start_vmd: Start) -> None:
    """It goes on to do as it is asked."""
    with start_vmd(vm_block("one", enabled=True)) as vmd, vmd.client() as client:
        client.wait_for_state("one", "running")
        with client.console("one") as console:
            console.expect(READY)
            assert client.ask("pause", name="one")["type"] == "done"
            assert client.ask("stop", name="one", wait=True)["type"] == "terminated"
            console.read_to_end()
            assert b"power button" in console.output


def test_a_guest_that_triple_faults_too_often(start_vmd: Start) -> None:
    """A reboot restarts the VM; the third in so short a time is the last."""
    with start_vmd(vm_block("one", enabled=True)) as vmd, vmd.client() as client:
        pid = client.wait_for_state("one", "running")["pid"]
        for count in range(1, 4):
            with client.console("one") as console:
                console.expect(READY, count)
                console.type(b"t")
                console.read_to_end()
            if count < 3:
                pid = client.wait_for_reboot("one", pid)["pid"]
        stopped = client.wait_for_state("one", "stopped")
        assert stopped["pid"] is None


def test_the_daemon_can_be_ended_at_any_moment(start_vmd: Start) -> None:
    """SIGTERM while VMs are starting leaves nothing behind, and is quick."""
    config = "".join(vm_block(f"vm{index}", enabled=True) for index in range(4))
    with start_vmd(config) as vmd:
        before = time.monotonic()
        assert vmd.stop() == 0
        assert time.monotonic() - before < 10


def test_a_long_name(start_vmd: Start) -> None:
    """A name may have as many characters as OpenBSD allows; processes show what fits."""
    name = "n" * 63
    with start_vmd(vm_block(name)) as vmd, vmd.client() as client:
        assert client.ask("start", name=name)["type"] == "started"
        assert client.ask("stop", name=name, wait=True)["type"] == "terminated"
        assert client.ask("start", name="n" * 64)["type"] == "failed"
