"""`vmctl stop` of VMs in each state, by one and by several at once."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.system.vmd.daemon import READY, ROOT, TIMEOUT_S, Client, Daemon, vm_block, vmctl

pytestmark = pytest.mark.kvm

ONLOOKERS = (["stop", "-w", "one"], ["stop", "-w", "1"], ["stop", "-aw"], ["wait", "1"])
TURNS = "staggered start parallel 1 delay 600\n"


def outcome(vmd: Daemon, *words: str) -> tuple[int, str]:
    """Return the status of a command, and the outcome that its last line tells."""
    done = vmctl(vmd, *words)
    return done.returncode, done.stderr.rstrip("\n").rpartition(": ")[2]


def spin(client: Client, name: str) -> None:
    """Have a guest ignore the power button."""
    with client.console(name) as console:
        console.expect(READY)
        console.type(b"s")
        console.expect(b"s: spin")


def test_of_vms_that_wait(tmp_path: Path) -> None:
    """A stop takes a waiting VM's turn, in each form; a second one has nothing to stop."""
    config = TURNS + "".join(vm_block(f"vm{number}", enabled=True) for number in range(6))
    with Daemon(tmp_path, config) as vmd, vmd.client() as client:
        client.wait_for_state("vm0", "running")
        assert outcome(vmd, "stop", "vm1") == (0, "requested to shutdown vm 2")
        assert outcome(vmd, "stop", "vm1") == (1, "cannot stop vm that is not running")
        assert outcome(vmd, "stop", "-w", "vm2") == (0, "terminated vm 3")
        assert outcome(vmd, "stop", "-f", "vm3") == (0, "requested to shutdown vm 4")
        assert outcome(vmd, "stop", "-fw", "5") == (0, "terminated vm 5")
        assert outcome(vmd, "wait", "vm4") == (1, "cannot wait for vm that is not running")
        assert client.vm("vm5")["state"] == "waiting"
        assert vmctl(vmd, "stop", "-aw").returncode == 0
        assert {vm["state"] for vm in client.vms()} == {"stopped"}
        assert vmctl(vmd, "stop", "-aw").returncode == 0


def test_of_a_vm_that_stops(tmp_path: Path) -> None:
    """All who stop a VM and wait see its end, the second too; without a wait it is refused."""
    config = vm_block("one", "stop timeout 4", enabled=True)
    with Daemon(tmp_path, config) as vmd, vmd.client() as client:
        client.wait_for_state("one", "running")
        spin(client, "one")
        assert outcome(vmd, "stop", "one") == (0, "requested to shutdown vm 1")
        assert outcome(vmd, "stop", "one") == (1, "Operation already in progress")
        waiting = [
            subprocess.Popen(
                [sys.executable, "-m", "vmctl", *words],
                env={"VMD_SOCKET": str(vmd.socket)},
                cwd=ROOT,
                stderr=subprocess.PIPE,
                text=True,
            )
            for words in ONLOOKERS
        ]
        for process in waiting:
            _, errors = process.communicate(timeout=TIMEOUT_S)
            assert (process.returncode, errors.rpartition(": ")[2]) == (0, "terminated vm 1\n")
        assert client.vm("one")["state"] == "stopped"


def test_of_paused_vms_and_by_force(tmp_path: Path) -> None:
    """A paused VM is stopped, of one with a short time and of one by force that ignores it."""
    config = "staggered start parallel 3 delay 600\n" + "".join(
        vm_block(name, "stop timeout 1", enabled=True) for name in ("calm", "deaf", "wild")
    )
    with Daemon(tmp_path, config) as vmd, vmd.client() as client:
        for name in ("calm", "deaf", "wild"):
            client.wait_for_state(name, "running")
        spin(client, "deaf")
        spin(client, "wild")
        for name in ("calm", "deaf"):
            assert client.ask("pause", name=name)["type"] == "done"
        assert outcome(vmd, "stop", "-fw", "wild") == (0, "terminated vm 3")
        assert outcome(vmd, "stop", "-aw") == (0, "terminated vm 1")
        ends = {str(vm["name"]): vm["last_end"] for vm in client.vms()}
        assert {name: end["reason"] for name, end in ends.items() if isinstance(end, dict)} == {
            "calm": "stopped",
            "deaf": "killed",
            "wild": "killed",
        }
        for words in (["calm"], ["-w", "calm"], ["-f", "calm"], ["-fw", "calm"]):
            assert outcome(vmd, "stop", *words) == (1, "cannot stop vm that is not running")
        for name in ("none", "77", "99999999999999999999"):
            assert outcome(vmd, "stop", "-w", name) == (1, "vm not found")
