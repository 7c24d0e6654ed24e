"""How the daemon stops guests, and ends those that do not obey."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable

import pytest

from tests.system.vmd.daemon import READY, Daemon, vm_block, vmctl

pytestmark = pytest.mark.kvm

Start = Callable[[str], Daemon]


def test_a_guest_takes_the_power_button(start_vmd: Start) -> None:
    """A guest that obeys the ACPI power button powers off properly at a stop."""
    with start_vmd(vm_block("one", enabled=True)) as vmd, vmd.client() as client:
        client.wait_for_state("one", "running")
        with client.console("one") as console:
            console.expect(READY)
            assert client.ask("stop", name="one")["type"] == "done"
            console.read_to_end()
            assert b"power button" in console.output
        client.wait_for_state("one", "stopped")


def test_a_guest_that_does_not_listen_has_three_seconds(start_vmd: Start) -> None:
    """A guest that spins ignores the button; the daemon ends it at its time-out.

    Meanwhile it is shown as stopping, and a second stop is refused.
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
    """A forced stop does not wait."""
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
    """A paused guest is resumed for the stop, and powers off."""
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
    """A name may be as long as OpenBSD allows; titles of processes are cut."""
    name = "n" * 63
    with start_vmd(vm_block(name)) as vmd, vmd.client() as client:
        assert client.ask("start", name=name)["type"] == "started"
        assert client.ask("stop", name=name, wait=True)["type"] == "terminated"
        assert client.ask("start", name="n" * 64)["type"] == "failed"


def test_a_stop_of_all_leaves_none_to_start(start_vmd: Start) -> None:
    """After a stop of all, no VM runs, no starting one survives, and no waiting one starts."""
    names = [f"vm{index}" for index in range(6)]
    config = "staggered start parallel 2 delay 1\n" + "".join(
        vm_block(name, enabled=True) for name in names
    )
    with start_vmd(config) as vmd, vmd.client() as client:
        done = vmctl(vmd, "stop", "-a", "-w")
        assert done.returncode == 0, done.stderr
        assert [line.split(":")[0] for line in done.stderr.splitlines()] == [
            f"stopping vm {name}" for name in names
        ]
        assert {vm["state"] for vm in client.vms()} == {"stopped"}
        time.sleep(1.5)  # its turn would have come
        assert {vm["state"] for vm in client.vms()} == {"stopped"}
        assert client.ask("start", name="vm5")["type"] == "started"


def test_vms_start_and_stop_in_order(start_vmd: Start) -> None:
    """A VM that starts after another is stopped before it; each is asked in order."""
    config = (
        "staggered start parallel 3 delay 60\n"
        + vm_block("web", 'after "app"', enabled=True)
        + vm_block("app", 'after "db"', enabled=True)
        + vm_block("db", enabled=True)
    )
    with start_vmd(config) as vmd, vmd.client() as client:
        client.wait_for_state("web", "running")
        began = {str(vm["name"]): vm["started_at"] for vm in client.vms()}
        assert sorted(began, key=lambda name: float(str(began[name]))) == ["db", "app", "web"]
        with client.console("web") as console:
            console.expect(READY)
        done = vmctl(vmd, "stop", "-a", "-w")
        assert done.returncode == 0, done.stderr
        ends = {}
        for vm in client.vms():
            end = vm["last_end"]
            assert isinstance(end, dict)
            assert end["reason"] == "stopped"
            ends[str(vm["name"])] = end["at"]
        assert sorted(ends, key=ends.__getitem__) == ["web", "app", "db"]


def test_a_guest_has_the_time_that_its_configuration_says(start_vmd: Start) -> None:
    """A guest that spins gets its configured time, not 3 or 123 seconds; the end is logged."""
    with start_vmd(vm_block("one", "stop timeout 1", enabled=True)) as vmd, vmd.client() as client:
        client.wait_for_state("one", "running")
        with client.console("one") as console:
            console.expect(READY)
            console.type(b"s")
            console.expect(b"s: spin")
        before = time.monotonic()
        assert client.ask("stop", name="one", wait=True)["type"] == "terminated"
        assert 0.9 < time.monotonic() - before < 2.9
        end = client.vm("one")["last_end"]
        assert isinstance(end, dict)
        assert (end["reason"], end["message"]) == ("killed", "the guest did not stop in time")
        vmd.wait_for_log("vm/one: stopped: the guest did not stop in time")


def test_a_process_that_does_not_end_is_ended(start_vmd: Start) -> None:
    """A VM process stopped by SIGSTOP does not react to a stop; vmd kills it."""
    with start_vmd(vm_block("one", "stop timeout 1", enabled=True)) as vmd, vmd.client() as client:
        pid = client.wait_for_state("one", "running")["pid"]
        assert isinstance(pid, int)
        os.kill(pid, signal.SIGSTOP)
        assert client.ask("stop", name="one", wait=True)["type"] == "terminated"
        end = client.vm("one")["last_end"]
        assert isinstance(end, dict)
        assert (end["reason"], end["exit"]) == ("killed", -signal.SIGKILL)
        vmd.wait_for_log("vm/one: stopped: the guest did not stop in time")


def test_a_pause_of_a_process_that_is_stopped(start_vmd: Start) -> None:
    """A pause of a VM process in SIGSTOP fails each time; it is listed, runs on, and ends."""
    with start_vmd(vm_block("one", enabled=True)) as vmd, vmd.client() as client:
        pid = client.wait_for_state("one", "running")["pid"]
        assert isinstance(pid, int)
        os.kill(pid, signal.SIGSTOP)
        why = f"a signal has stopped it, and kill -CONT {pid} lets it go on"
        for kind in ("pause", "unpause"):
            refused = client.ask(kind, name="one")
            told = (refused["type"], refused["code"], refused["message"])
            assert told == ("failed", "EAGAIN", f"the VM process does not answer: {why}")
        assert client.vm("one")["state"] == "running"
        os.kill(pid, signal.SIGCONT)
        client.wait_for_state("one", "paused")
        assert client.ask("unpause", name="one")["type"] == "done"
        os.kill(pid, signal.SIGSTOP)
        assert client.ask("stop", name="one", force=True, wait=True)["type"] == "terminated"


def test_the_last_of_quick_reboots_is_told(start_vmd: Start) -> None:
    """The log and the status say that it restarted too quickly."""
    with start_vmd(vm_block("one", enabled=True)) as vmd, vmd.client() as client:
        pid = client.wait_for_state("one", "running")["pid"]
        for count in range(1, 4):
            with client.console("one") as console:
                console.expect(READY, count)
                console.type(b"t")
                console.read_to_end()
            if count < 3:
                pid = client.wait_for_reboot("one", pid)["pid"]
        end = client.wait_for_state("one", "stopped")["last_end"]
        assert isinstance(end, dict)
        assert end["reason"] == "reboot"
        assert "restarted too quickly" in str(end["message"])
        vmd.wait_for_log("vm/one: failed: vm 1 restarted too quickly")
