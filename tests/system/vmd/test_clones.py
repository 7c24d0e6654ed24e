"""VMs that vmctl clones, with a real daemon: the clones' resources, and what is left."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

from tests.system.vmd.daemon import (
    READY,
    TIMEOUT_S,
    Client,
    Daemon,
    descendants,
    is_alive,
    process_title,
    vm_block,
)
from tests.system.vmd.test_send import running, started, vmctl
from tests.touching_guest import READY as TOUCHED
from tests.touching_guest import touching_guest

pytestmark = pytest.mark.kvm

Start = Callable[[str], Daemon]


def start_template(vmd: Daemon, client: Client, name: str = "template") -> None:
    """Start a template with the self-test guest, and pause it when that is ready."""
    begun = vmctl(vmd, "start", "--template", "--selftest", "-m", "64M", name)
    assert begun.returncode == 0, begun.stderr
    with client.console(name) as console:
        console.expect(READY)
    assert vmctl(vmd, "pause", name).returncode == 0


def test_a_running_vm_is_cloned(start_vmd: Start) -> None:
    """Source and clone run on and answer input; status names the source; a clone can be cloned."""
    with start_vmd(vm_block("one", enabled=True)) as vmd, vmd.client() as client:
        pid = started(vmd, "one")
        cloned = vmctl(vmd, "clone", "one", "two")
        assert cloned.stderr.startswith(b"vmctl: started vm 2 (two) successfully, tty /dev/pts/")
        assert cloned.returncode == 0
        for name in ("one", "two"):
            running(vmd, name)
        assert client.vm("one")["pid"] == pid
        assert client.vm("two")["clone_of"] == "one"
        assert b"clone of: one" in vmctl(vmd, "show", "two").stdout
        assert vmctl(vmd, "clone", "two", "three").returncode == 0
        assert vmctl(vmd, "stop", "-fw", "two").returncode == 0
        for name in ("one", "three"):
            running(vmd, name)


def test_a_vm_is_cloned_while_it_runs(start_vmd: Start, tmp_path: Path) -> None:
    """A VM with half of its memory touched, and one with more, are cloned, twice."""
    blocks = ""
    for name, size in (("small", 8), ("large", 40)):
        image = tmp_path / name
        image.write_bytes(touching_guest(size << 20))
        blocks += vm_block(name, boot=image, enabled=True)
    with start_vmd(blocks) as vmd, vmd.client() as client:
        for name in ("small", "large"):
            client.wait_for_state(name, "running")
            with client.console(name) as console:
                console.expect(TOUCHED)
            for number in (1, 2):
                assert vmctl(vmd, "clone", name, f"{name}{number}").returncode == 0
                running(vmd, f"{name}{number}")
                running(vmd, name)


def test_clones_of_a_template(start_vmd: Start) -> None:
    """A template stays paused; its clones are numbered, run without it, and boot at a reboot."""
    with start_vmd("") as vmd, vmd.client() as client:
        start_template(vmd, client)
        refused = vmctl(vmd, "unpause", "template")
        assert refused.returncode == 1
        assert b"it is a template, and stays as it is for its clones" in refused.stderr
        assert vmctl(vmd, "clone", "-n", "3", "template", "c%d").returncode == 0
        cloned = vmctl(vmd, "clone", "--json", "-n", "2", "template", "c%d")
        told = json.loads(cloned.stdout)
        assert [(one["name"], one["code"]) for one in told] == [("c4", ""), ("c5", "")]
        uids = [Path(f"/proc/{vm['pid']}").stat().st_uid for vm in client.vms()]
        assert len(set(uids)) == (6 if uids[0] != os.geteuid() else 1)
        assert vmctl(vmd, "stop", "-fw", "template").returncode == 0
        for one in told:
            assert client.vm(one["name"])["pid"] == one["pid"]
            running(vmd, one["name"])
        with client.console("c4") as console:
            console.type(b"r")  # a reset
            console.read_to_end()
        client.wait_for_reboot("c4", told[0]["pid"])
        with client.console("c4") as console:
            console.expect(READY)
        running(vmd, "c5")


def test_clones_have_a_templates_disks(start_vmd: Start, tmp_path: Path) -> None:
    """Clones' writes vanish with them; the image is not writable while a clone lives."""
    image = tmp_path / "disk.raw"
    image.write_bytes(b"\x55" * (1 << 20))
    block = vm_block("template", f'disk "{image}" format raw')
    other = vm_block("other", f'disk "{image}" format raw')
    with start_vmd(block + other) as vmd, vmd.client() as client:
        assert client.ask("start", name="template", is_template=True)["type"] == "started"
        with client.console("template") as console:
            console.expect(READY)
        assert client.ask("pause", name="template")["type"] == "done"
        cloned = vmctl(vmd, "clone", "-n", "2", "template", "c%d")
        assert cloned.returncode == 0, cloned.stderr
        assert vmctl(vmd, "stop", "-fw", "template").returncode == 0
        for name in ("c1", "c2"):
            running(vmd, name)
        assert client.ask("start", name="other")["code"] == "disk-missing"
        for name in ("c1", "c2"):
            assert vmctl(vmd, "stop", "-fw", name).returncode == 0
        begun = client.ask("start", name="other")
        assert begun["type"] == "started", begun
        assert image.read_bytes() == b"\x55" * (1 << 20)


@pytest.mark.usefixtures("networks")
@pytest.mark.root
def test_clones_have_interfaces_of_their_own(tmp_path: Path) -> None:
    """A clone keeps the guest's lladdr; addresses and the host's side are new."""
    config = vm_block("template", "local interface")
    with Daemon(tmp_path, config, is_user=False) as vmd, vmd.client() as client:
        assert client.ask("start", name="template", is_template=True)["type"] == "started"
        with client.console("template") as console:
            console.expect(READY)
        assert client.ask("pause", name="template")["type"] == "done"
        assert vmctl(vmd, "clone", "-n", "2", "template", "c%d").returncode == 0
        found = []
        for name in ("template", "c1", "c2"):
            vms = client.ask("status", name=name, interfaces=True)["vms"]
            assert isinstance(vms, list)
            found += vms[0]["interfaces"]
        assert len({one["lladdr"] for one in found}) == 1
        assert len({one["tap"] for one in found}) == 3
        assert len({tuple(one["host_addresses"]) for one in found}) == 3
        running(vmd, "c1")


def test_a_template_that_runs_is_not_cloned(start_vmd: Start) -> None:
    """Cloning a running template fails with one line that says what to do."""
    with start_vmd("") as vmd:
        assert vmctl(vmd, "start", "--template", "--selftest", "-m", "64M", "t").returncode == 0
        refused = vmctl(vmd, "clone", "t", "c")
        assert refused.stderr.decode().splitlines() == [
            "vmctl: clone vm command failed: Device or resource busy",
            "vmctl: the template still runs: it has to be paused",
        ]
        assert refused.returncode == 1


def test_what_cannot_be_cloned(start_vmd: Start) -> None:
    """What cannot be cloned is refused in a line, and nothing is made."""
    with start_vmd(vm_block("one", enabled=True) + vm_block("off")) as vmd, vmd.client() as client:
        started(vmd, "one")
        for words, text in (
            (("none", "c"), "no such VM"),
            (("one", "one"), 'there is a VM "one"'),
            (("-n", "2", "one", "c"), '2 clones need a "%d" in their name'),
            (("-n", "0", "one", "c%d"), "count is too small: 0"),
            (("-n", "257", "one", "c%d"), "count is too large: 257"),
            (("-n", "x", "one", "c%d"), "count is invalid: x"),
            (("one", "-"), "invalid VM name"),
            (("off", "c"), "the VM is not running"),
        ):
            refused = vmctl(vmd, "clone", *words)
            assert refused.stderr.decode().splitlines()[-1] == f"vmctl: {text}"
            assert refused.returncode == 1
        assert {vm["name"] for vm in client.vms()} == {"one", "off"}
        running(vmd, "one")


def wait_until_gone(client: Client, *names: str) -> None:
    """Ask until these VMs are gone."""
    deadline = time.monotonic() + TIMEOUT_S
    while left := {str(vm["name"]) for vm in client.vms()} & set(names):
        assert time.monotonic() < deadline, f"{left} are still there"
        time.sleep(0.02)


def memfds(pid: int) -> int:
    """Return the number of a process's descriptors of guest memory."""
    names = (str(fd.readlink()) for fd in Path(f"/proc/{pid}/fd").iterdir())
    return sum(name.startswith(("/memfd:vmm:", "/memfd:state:")) for name in names)


def test_nothing_is_left_of_clones(start_vmd: Start) -> None:
    """Shared memory goes with the last of killed source and clones."""
    with start_vmd("") as vmd, vmd.client() as client:
        start_template(vmd, client)
        assert vmctl(vmd, "clone", "-n", "4", "template", "c%d").returncode == 0
        assert memfds(vmd.process.pid) > 0
        pids = [int(str(vm["pid"])) for vm in client.vms()]
        os.kill(vmd.child("vm/template"), signal.SIGKILL)
        wait_until_gone(client, "template")
        running(vmd, "c1")
        assert memfds(vmd.process.pid) == 0
        for pid in pids:
            if is_alive(pid):
                os.kill(pid, signal.SIGKILL)
        wait_until_gone(client, "c1", "c2", "c3", "c4")
        assert not any(is_alive(pid) for pid in pids)


def kill_when_there(vmd: Daemon, victim: str, delay_s: float) -> None:
    """Kill the first VM process whose title begins so, after a while; none is no error.

    A process that waits to become a VM's is called `vm`.
    """
    time.sleep(delay_s)
    for pid in descendants(vmd.process.pid):
        title = process_title(pid)
        if title == victim or (title.startswith(victim) and "/" in victim):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            return


def test_kills_at_every_step(start_vmd: Start) -> None:
    """A kill of any process during cloning gives one answer, no half clone, and no leftovers."""
    rounds = [
        (victim, delay_ms / 1000)
        for victim in ("vm/one", "vm/c", "vm")
        for delay_ms in (0, 3, 10, 30, 100)
    ]
    with start_vmd("") as vmd, vmd.client() as client:
        for victim, delay_s in rounds:
            begun = vmctl(vmd, "start", "--selftest", "-m", "16M", "one")
            assert begun.returncode == 0, begun.stderr
            client.send("clone", name="one", clone="c%d", count=3)
            kill_when_there(vmd, victim, delay_s)
            answer, _ = client.receive()
            assert answer["type"] in {"cloned", "failed"}
            vms = answer.get("vms", [])
            assert isinstance(vms, list)
            there = {vm["name"] for vm in client.vms()}
            for vm in vms:
                if vm["code"]:
                    assert vm["name"] not in there
                elif victim == "vm/one":  # clones run on without their source
                    running(vmd, vm["name"])
            for name in there:
                client.ask("stop", name=name, force=True, wait=True)
            wait_until_gone(client, "one", "c1", "c2", "c3")
            assert memfds(vmd.process.pid) == 0
        titles = [process_title(pid) for pid in descendants(vmd.process.pid)]
        assert not [title for title in titles if title.startswith("vm/")]
