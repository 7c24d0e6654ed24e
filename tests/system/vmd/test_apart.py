"""Rights of the processes of a running daemon: descriptors, users, capabilities, filters."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.system.vmd.conftest import missing_separation
from tests.system.vmd.daemon import (
    READY,
    ROOT,
    Daemon,
    descendants,
    is_alive,
    process_title,
    vm_block,
)
from vmd.confine.sandbox import find_identity
from vmd.confine.uids import UIDS_DEFAULT

pytestmark = pytest.mark.kvm

_NO_LANDLOCK = """
from vmd.confine import landlock
landlock.version = lambda: 0
import runpy
runpy.run_module('vmd', run_name='__main__', alter_sys=True)
"""
_LINE = "this kernel has no Landlock, or it is switched off: only system call filters"


def _status(pid: int) -> dict[str, str]:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}


@pytest.mark.parametrize("is_user", [True, False], ids=["user", "root"])
def test_children_have_no_terminal(tmp_path: Path, is_user: bool) -> None:
    """Standard input and output of every child are /dev/null."""
    if not is_user and (reason := missing_separation()):
        pytest.skip(reason)
    image = tmp_path / "disk.img"
    image.write_bytes(bytes(1 << 20))
    config = vm_block("one", f'disk "{image}"')
    with Daemon(tmp_path, config, is_user=is_user) as vmd, vmd.client() as client:
        assert client.ask("start", name="one")["type"] == "started"
        titles = {}
        for pid in descendants(vmd.process.pid):
            title = process_title(pid)
            try:
                opened = [Path(f"/proc/{pid}/fd/{number}").readlink() for number in (0, 1)]
            except FileNotFoundError:  # it has ended meanwhile
                continue
            titles[title] = opened
        assert {"vm/one", "disk/one", "vmd: control", "vmd: vmm"} <= set(titles)
        assert set(map(tuple, titles.values())) == {(Path("/dev/null"),) * 2}


def _uid(pid: int) -> int:
    """Return the user of a process, which must be all four of its users, and its groups' number."""
    status = _status(pid)
    (uid,) = set(status["Uid"].split())
    assert set(status["Gid"].split()) == {str(_GIDS.get(int(uid), uid))}
    assert status["Groups"] == ""
    return int(uid)


_GIDS = {find_identity().uid: find_identity().gid} if missing_separation() is None else {}


def _disks(directory: Path, *names: str) -> list[str]:
    """Make disks, and return their lines of vm.conf."""
    for name in names:
        (directory / name).write_bytes(bytes(1 << 20))
    return [f'disk "{directory / name}"' for name in names]


@pytest.mark.root
def test_no_child_is_root(tmp_path: Path) -> None:
    """Each child runs as `_vmd` or a uid of its own; three have capabilities; all have filters."""
    if reason := missing_separation():
        pytest.skip(reason)
    with Daemon(tmp_path, vm_block("one"), is_user=False) as vmd, vmd.client() as client:
        assert client.ask("start", name="one")["type"] == "started"
        vmd.wait_for_child("vmd: zygote")
        vmd.wait_for_child("vmd: local")
        found = {
            process_title(pid): (_status(pid), _uid(pid))
            for pid in descendants(vmd.process.pid)
            if is_alive(pid)
        }
        assert _status(vmd.process.pid)["Seccomp"] == "2"
    for title, (status, uid) in found.items():
        is_ours = title in {"vmd: priv", "vmd: local", "vmd: vmm", "vmd: tpm"}
        assert (uid == find_identity().uid) == is_ours, title
        assert (UIDS_DEFAULT.first == uid & UIDS_DEFAULT.mask) != is_ours, title
        assert status["Seccomp"] == "2", title
        assert int(status["CapBnd"], 16) == 0
        setting = 1 << 6 | 1 << 7
        kept = {"vmd: priv": 1 << 12, "vmd: zygote": setting, "vmd: tpm": setting}
        assert int(status["CapPrm"], 16) == kept.get(title, 0), title
    assert len({uid for _, uid in found.values()}) >= 4  # ours, control's, the zygote's, one's


@pytest.mark.root
def test_each_vm_has_a_uid(tmp_path: Path) -> None:
    """All processes of one VM have its uid, and no others; a VM that starts again gets another."""
    if reason := missing_separation():
        pytest.skip(reason)
    lines = _disks(tmp_path, "a", "b"), _disks(tmp_path, "c")
    config = vm_block("one", *lines[0], enabled=True) + vm_block("two", *lines[1], enabled=True)
    with Daemon(tmp_path, config, is_user=False) as vmd, vmd.client() as client:
        pids = {name: client.wait_for_state(name, "running")["pid"] for name in ("one", "two")}
        vmd.wait_for_child("disk")  # it waits ready
        found: dict[str, list[int]] = {}
        for pid in descendants(vmd.process.pid):
            if is_alive(pid):
                found.setdefault(process_title(pid), []).append(_uid(pid))
        one, two = found["vm/one"], found["vm/two"]
        assert (found["disk/one"], found["disk/two"]) == (one * 2, two)
        others = {uid for title, uids in found.items() if "/" not in title for uid in uids}
        assert len({*one, *two}) == 2
        assert not {*one, *two} & others
        assert pids["one"] == vmd.child("vm/one")
        assert client.ask("stop", name="one", force=True, wait=True)["type"] == "terminated"
        assert client.ask("start", name="one")["type"] == "started"
        assert _uid(vmd.child("vm/one")) not in {*one, *two}


@pytest.mark.root
def test_vms_have_numbers_of_their_own(tmp_path: Path) -> None:
    """VM processes live in a pid namespace, where init is the first; clients get host pids."""
    if reason := missing_separation():
        pytest.skip(reason)
    config = vm_block("one", *_disks(tmp_path, "a"), enabled=True)
    with Daemon(tmp_path, config, is_user=False) as vmd, vmd.client() as client:
        pid = client.wait_for_state("one", "running")["pid"]
        assert isinstance(pid, int)
        numbers = {process_title(one): _numbers(one) for one in descendants(vmd.process.pid)}
        host = len(_status(os.getpid())["NSpid"].split())
        assert len(numbers["vmd: vmm"]) == host
        inner = {title: found[host:] for title, found in numbers.items() if len(found) == host + 1}
        assert inner.keys() >= {"vmd: init", "vmd: zygote", "vm/one", "disk/one"}
        assert inner["vmd: init"] == [1]
        assert numbers["vm/one"][host - 1] == pid
        assert inner["vm/one"] != [pid]


def _numbers(pid: int) -> list[int]:
    return [int(word) for word in _status(pid)["NSpid"].split()]


_ATTACK = """
import os, signal
from vmd.confine import landlock, seccomp
from vmd.vm import process

landlock.version = lambda: 0
seccomp.install = lambda program: seccomp.no_new_privileges()

def attack(self, run=process.VmProcess.run):
    from vmd.confine.syscalls import SYSCALLS
    from vmm_kvm.libc import LIBC
    call = lambda name, *arguments: LIBC.syscall(SYSCALLS[name], *arguments)
    pids = [pid for pid in range(1, 1 << 16) if pid != os.getpid()]
    signalled = [pid for pid in pids if call("kill", pid, 0) == 0]
    traced = [pid for pid in pids if call("ptrace", 0x4206, pid, 0, 0) == 0]
    process.log.info("signalled %s, traced %s", sorted(signalled), traced)
    run(self)

process.VmProcess.run = attack
import runpy
runpy.run_module('vmd', run_name='__main__', alter_sys=True)
"""


@pytest.mark.root
def test_a_vm_process_without_filters_reaches_none_of_another_vm(tmp_path: Path) -> None:
    """Without filters and Landlock, its uid still keeps a VM process from all but its own disk."""
    if reason := missing_separation():
        pytest.skip(reason)
    if int(Path("/proc/sys/kernel/pid_max").read_text()) > _PIDS:
        pytest.skip("too many pids to try")
    lines = _disks(tmp_path, "a"), _disks(tmp_path, "b")
    config = vm_block("one", *lines[0], enabled=True) + vm_block("two", *lines[1])
    program = ("-c", _ATTACK)
    with Daemon(tmp_path, config, is_user=False, program=program) as vmd, vmd.client() as client:
        client.wait_for_state("one", "running")
        assert client.ask("start", name="two")["type"] == "started"
        disk = _numbers(vmd.child("disk/two"))[-1]
        vmd.wait_for_log("vm/two: signalled")
        (said,) = [line for line in vmd.log.read_text().splitlines() if "vm/two: sig" in line]
        assert said == f"vm/two: signalled [{disk}], traced []"


_PIDS = 1 << 16


def test_a_kernel_without_landlock_is_said_loudly(tmp_path: Path) -> None:
    """The log begins with the warning, `vmd -n` prints it, and VMs start."""
    program = ("-c", _NO_LANDLOCK)
    with Daemon(tmp_path, vm_block("one"), program=program) as vmd, vmd.client() as client:
        assert client.ask("start", name="one")["type"] == "started"
        with client.console("one") as console:
            console.expect(READY)
        assert vmd.log.read_text().count(_LINE) == 1
        command = [sys.executable, *program, "-n", "--user", "-f", str(vmd.config)]
        told = subprocess.run(command, cwd=ROOT, stderr=subprocess.PIPE, check=True, text=True)
    assert f"vmd: {_LINE}" in told.stderr
