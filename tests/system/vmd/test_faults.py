"""The consequences when a process of the daemon dies: kill -9 of each kind."""

from __future__ import annotations

import os
import resource
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.system.vmd.conftest import each_daemon
from tests.system.vmd.daemon import (
    READY,
    SELFTEST,
    TIMEOUT_S,
    Daemon,
    descendants,
    is_alive,
    process_title,
    vm_block,
)
from vmd.parent.status import FRESH_NS
from vmm_kvm.clock import NANOSECONDS

pytestmark = pytest.mark.kvm

Start = Callable[[str], Daemon]
_IMPATIENT = "from vmd.vmm.blanks import Blanks; Blanks.__init__.__kwdefaults__['patience_s'] = 5"
_RUN = "import runpy; runpy.run_module('vmd', run_name='__main__', alter_sys=True)"
ROUNDS = 3


def _kill(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)


def test_a_vm_process(start_vmd: Start) -> None:
    """If a VM process dies, its VM is stopped and its waiter answered; all else runs on."""
    config = vm_block("one", enabled=True) + vm_block("two", enabled=True)
    with start_vmd(config) as vmd, vmd.client() as client, vmd.client() as waiter:
        other = client.wait_for_state("two", "running")["pid"]
        client.wait_for_state("one", "running")
        waiter.send("wait", name="one")
        waiter.send("status", serial=1)
        assert waiter.receive()[0]["serial"] == 1
        _kill(vmd.child("vm/one"))
        assert waiter.receive()[0]["type"] == "terminated"
        assert client.vm("one")["state"] == "stopped"
        assert client.vm("two")["pid"] == other
        assert client.ask("start", name="one")["type"] == "started"


def test_a_device_process(start_vmd: Start, tmp_path_factory: pytest.TempPathFactory) -> None:
    """A VM that has lost its disk process ends, and no other does; it can be started again."""
    image = tmp_path_factory.mktemp("disk") / "disk.raw"
    image.write_bytes(bytes(1 << 20))
    config = vm_block("one", f'disk "{image}"', enabled=True) + vm_block("two", enabled=True)
    with start_vmd(config) as vmd, vmd.client() as client:
        other = client.wait_for_state("two", "running")["pid"]
        client.wait_for_state("one", "running")
        _kill(vmd.child("disk/one"))
        client.wait_for_state("one", "stopped")
        assert client.vm("two")["pid"] == other
        vmd.wait_for_log("vm/one: failed: disk0: its process was killed by signal 9")
        assert client.ask("start", name="one")["type"] == "started"


def test_control(start_vmd: Start) -> None:
    """If control dies, clients lose their connections, VMs run on, and new clients are served."""
    with start_vmd(vm_block("one", enabled=True)) as vmd:
        with vmd.client() as client:
            pid = client.wait_for_state("one", "running")["pid"]
        for _ in range(ROUNDS):
            with vmd.client() as client:
                client.ask("status")
                _kill(vmd.child("vmd: control"))
                with pytest.raises(OSError):  # noqa: PT011 - the end, or a reset
                    client.receive()
        with vmd.client() as client:
            assert client.vm("one")["pid"] == pid


def test_an_answer_for_a_client_that_control_took_along(start_vmd: Start) -> None:
    """A request of a client of the last control process is not answered to the next one's."""
    with start_vmd(vm_block("one", enabled=True)) as vmd:
        with vmd.client() as client:
            pid = client.wait_for_state("one", "running")["pid"]
            assert isinstance(pid, int)
            os.kill(pid, signal.SIGSTOP)  # its silence delays the answer about its status
            time.sleep(2 * FRESH_NS / NANOSECONDS)  # its earlier statistics are too old then
            client.send("status", serial=7)
            assert client.ask("log", level=1, serial=8)["serial"] == 8
            _kill(vmd.child("vmd: control"))
        with vmd.client() as client:
            assert client.ask("log", level=1, serial=1)["serial"] == 1
            assert client.ask("status", serial=2)["serial"] == 2
        os.kill(pid, signal.SIGCONT)


def test_vmm(start_vmd: Start, tmp_path_factory: pytest.TempPathFactory) -> None:
    """If vmm dies, all its VMs end, with their processes, are reported, and can start again."""
    image = tmp_path_factory.mktemp("disk") / "disk.raw"
    image.write_bytes(bytes(1 << 20))
    config = vm_block("one", f'disk "{image}"', enabled=True) + vm_block("two", enabled=True)
    with start_vmd(config) as vmd, vmd.client() as client, vmd.client() as waiter:
        for name in ("one", "two"):
            client.wait_for_state(name, "running")
        waiter.send("wait", name="two")
        waiter.send("status", serial=1)
        assert waiter.receive()[0]["serial"] == 1
        vmm = vmd.child("vmd: vmm")
        below = descendants(vmm)
        titles = {process_title(pid) for pid in below}
        assert {"vm/one", "vm/two", "disk/one"} <= titles
        _kill(vmm)
        assert waiter.receive()[0]["type"] == "terminated"
        for name in ("one", "two"):
            client.wait_for_state(name, "stopped")
        assert [pid for pid in below if is_alive(pid)] == []
        for name in ("one", "two"):
            assert client.ask("start", name=name)["type"] == "started"


def test_the_process_that_is_ready(start_vmd: Start) -> None:
    """If the process that waits to be a VM is killed, the next start makes a new one."""
    with start_vmd(vm_block("one") + vm_block("two")) as vmd, vmd.client() as client:
        vmm = vmd.wait_for_child("vmd: vmm")  # the zygote has a waiting one
        ready = vmd.wait_for_child("vm", vmm)
        _kill(ready)
        vmd.wait_for_log("the vm process made ahead has ended, status -9")
        assert client.ask("start", name="one")["type"] == "started"
        ready = vmd.wait_for_idle_child("vm", vmm)
        assert client.ask("start", name="two")["pid"] == ready
        assert vmd.child("vm/two") == ready


def test_the_disk_process_that_is_ready(start_vmd: Start, tmp_path: Path) -> None:
    """A waiting disk process serves the next disk; if it is killed, that disk gets a new one."""
    image = tmp_path / "disk"
    image.write_bytes(bytes(1 << 20))
    with start_vmd(vm_block("one", f'disk "{image}"')) as vmd, vmd.client() as client:
        ready = vmd.wait_for_idle_child("disk")
        assert client.ask("start", name="one")["type"] == "started"
        assert vmd.child("disk/one") == ready
        _kill(vmd.wait_for_child("disk"))
        vmd.wait_for_log("the disk process made ahead has ended, status -9")
        assert client.ask("stop", name="one", force=True, wait=True)["type"] == "terminated"
        assert client.ask("start", name="one")["type"] == "started"


def test_the_zygote(start_vmd: Start) -> None:
    """If the zygote dies vmm and its VMs end as well; the next start starts both again."""
    with start_vmd(vm_block("one", enabled=True)) as vmd, vmd.client() as client:
        client.wait_for_state("one", "running")
        before = vmd.child("vmd: vmm")
        _kill(vmd.wait_for_child("vmd: zygote"))
        client.wait_for_state("one", "stopped")
        vmd.wait_for_log("the zygote has ended, status -9")
        assert client.ask("start", name="one")["type"] == "started"
        assert vmd.child("vmd: vmm") != before


@each_daemon
def test_a_zygote_that_hangs(tmp_path: Path, *, is_user: bool) -> None:
    """If the zygote hangs, the parent kills a hanging VM process, and vmm starts again."""
    program = ("-c", f"{_IMPATIENT}\n{_RUN}")
    config = vm_block("one", enabled=True) + vm_block("two", enabled=True)
    environ = {"VMD_WARM": "off"}  # it serves sooner
    with (
        Daemon(tmp_path, config, is_user=is_user, program=program, environ=environ) as vmd,
        vmd.client() as client,
    ):
        pids = {name: client.wait_for_state(name, "running")["pid"] for name in ("one", "two")}
        vmm = vmd.child("vmd: vmm")
        one = pids["one"]
        assert isinstance(one, int)
        for pid in (vmd.wait_for_child("vmd: zygote", vmm), one):
            os.kill(pid, signal.SIGSTOP)
        stopped = client.ask("stop", name="one", force=True, wait=True)
        assert stopped["type"] == "terminated"
        assert client.vm("two")["pid"] == pids["two"]
        assert client.ask("stop", name="two", force=True, wait=True)["type"] == "terminated"
        vmd.wait_for_log("lost child: vmm")
        vmd.wait_for_child("vmd: vmm", vmd.process.pid)
        deadline = time.monotonic() + TIMEOUT_S
        while client.ask("start", name="one")["type"] != "started":  # until the next vmm serves
            assert time.monotonic() < deadline
            time.sleep(0.2)


def test_the_parent(start_vmd: Start) -> None:
    """If the parent dies nothing is left, and the next daemon takes over the socket."""
    with start_vmd(vm_block("one", enabled=True)) as vmd:
        with vmd.client() as client:
            client.wait_for_state("one", "running")
        below = descendants(vmd.process.pid)
        vmd.process.kill()
        vmd.process.wait()
        deadline = time.monotonic() + TIMEOUT_S
        while any(is_alive(pid) for pid in below):
            assert time.monotonic() < deadline, [Path(f"/proc/{pid}/comm") for pid in below]
            time.sleep(0.05)
        assert vmd.socket.exists()


def test_a_process_that_dies_again_and_again(start_vmd: Start) -> None:
    """A kind of process that dies again and again ends the daemon, with an error."""
    with start_vmd(vm_block("one", enabled=True)) as vmd:
        with vmd.client() as client:
            client.wait_for_state("one", "running")
        deadline = time.monotonic() + TIMEOUT_S
        while vmd.process.poll() is None:
            assert time.monotonic() < deadline
            found = [pid for pid in descendants(vmd.process.pid) if _is_control(pid)]
            for pid in found:
                _kill(pid)
            time.sleep(0.05)
        assert vmd.process.returncode == 1
        assert "control ends too often" in vmd.log.read_text()


def _is_control(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/comm").read_text() == "vmd: control\n"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_the_guest_is_not_disturbed(start_vmd: Start) -> None:
    """A console stays attached when control dies: its stream leads to the VM."""
    with start_vmd(vm_block("one", enabled=True)) as vmd, vmd.client() as client:
        client.wait_for_state("one", "running")
        with client.console("one") as console:
            console.expect(READY)
            _kill(vmd.child("vmd: control"))
            console.type(b"i")
            console.expect(READY, 2)


def test_a_parent_without_descriptors_refuses(start_vmd: Start) -> None:
    """Requests with more descriptors than the parent has room for are refused; all runs on."""
    with start_vmd(vm_block("one", enabled=True)) as vmd, vmd.client() as client:
        before = client.wait_for_state("one", "running")["pid"]
        control = vmd.child("vmd: control")
        used = {int(path.name) for path in Path(f"/proc/{vmd.process.pid}/fd").iterdir()}
        limits = resource.prlimit(vmd.process.pid, resource.RLIMIT_NOFILE)
        room = [number for number in range(len(used) + 40) if number not in used][39]
        resource.prlimit(vmd.process.pid, resource.RLIMIT_NOFILE, (room, limits[1]))
        with SELFTEST.open("rb") as kernel:
            fds = (kernel.fileno(),) * 60
            for _ in range(6):
                refused = client.ask("start", fds, name="two", kernel=0)
                assert (refused["type"], refused["code"]) == ("failed", "EAGAIN"), refused
        resource.prlimit(vmd.process.pid, resource.RLIMIT_NOFILE, limits)
        with SELFTEST.open("rb") as kernel:
            assert client.ask("start", (kernel.fileno(),), name="two", kernel=0)["pid"]
        assert vmd.child("vmd: control") == control
        assert client.vm("one")["pid"] == before
