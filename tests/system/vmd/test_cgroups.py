"""Control groups of VMs, in a cgroup that a test gives the daemon, as a service manager does."""

from __future__ import annotations

import os
import re
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from tests.system.vmd.conftest import missing_separation
from tests.system.vmd.daemon import TIMEOUT_S, Daemon, descendants, is_alive, vm_block
from vmd.confine.sandbox import TASKS_MAX
from vmd.parent.cgroups import cpu_max, memory_max

pytestmark = [pytest.mark.kvm, pytest.mark.root]

MIB = 1 << 20
BELOW = ("guest", "devices")


def _eventually(is_so: Callable[[], bool]) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def _remove(group: Path) -> None:
    """Remove a group without processes, and the groups in it."""
    for folder, _, _ in os.walk(group, topdown=False):
        Path(folder).rmdir()


@pytest.fixture
def group() -> Iterator[Path]:
    """Return a new control group; remove it with all groups in it at the end."""
    found = re.search(r"^\S+ (\S+) cgroup2 ", Path("/proc/mounts").read_text(), re.MULTILINE)
    if reason := missing_separation() or (None if found else "no cgroup2 is mounted"):
        pytest.skip(reason)
    assert found
    root = Path(found[1])
    there = (root / "cgroup.controllers").read_text().split()
    for controller in {"cpu", "memory", "pids"}.intersection(there):
        (root / "cgroup.subtree_control").write_text(f"+{controller}")
    made = Path(tempfile.mkdtemp(prefix="vmd-test-", dir=root))
    yield made
    _eventually(lambda: "populated 0" in (made / "cgroup.events").read_text())
    _remove(made)


def _daemon(directory: Path, group: Path, config: str) -> Daemon:
    """Start a daemon in a control group of its own."""
    join = f'echo $$ > {group}/cgroup.procs && exec "$@"'
    return Daemon(directory, config, is_user=False, prefix=("sh", "-euc", join, "join"))


def _procs(group: Path) -> set[int]:
    return set(map(int, (group / "cgroup.procs").read_text().split()))


def _group_of(pid: int) -> Path:
    """Return the control group of a VM, by the pid of its process."""
    (line,) = Path(f"/proc/{pid}/cgroup").read_text().splitlines()[-1:]
    found = re.search(r"^\S+ (\S+) cgroup2 ", Path("/proc/mounts").read_text(), re.MULTILINE)
    assert found
    return Path(found[1]) / line.removeprefix("0::/").removesuffix("/guest")


def _groups(group: Path) -> set[str]:
    return {path.name for path in group.iterdir() if path.is_dir()}


def test_each_vm_has_a_group(tmp_path: Path, group: Path) -> None:
    """A VM's processes are in its group, the daemon's in another; the group goes with the VM."""
    image = tmp_path / "disk.img"
    image.write_bytes(bytes(MIB))
    lines = (f'disk "{image}"', f'share "{tmp_path}" tag "t"')
    config = vm_block("one", *lines, enabled=True) + vm_block("two", enabled=True)
    with _daemon(tmp_path, group, config) as vmd, vmd.client() as client:
        for name in ("one", "two"):
            client.wait_for_state(name, "running")
        first, second = (_group_of(vmd.child(f"vm/{name}")) for name in ("one", "two"))
        assert first.parent == second.parent == group
        assert first != second
        assert _procs(first / "guest") == {vmd.child("vm/one")}
        assert _procs(first / "devices") == {vmd.child("disk/one"), vmd.child("share/one")}
        assert _procs(second / "guest") == {vmd.child("vm/two")}
        ours = {vmd.process.pid, vmd.child("vmd: vmm"), vmd.child("vmd: control")}
        assert ours <= _procs(group / "vmd")
        assert client.ask("stop", name="one", force=True, wait=True)["type"] == "terminated"
        _eventually(lambda: not first.exists())  # the share's process may end last
        assert second.exists()
        assert client.ask("start", name="one")["type"] == "started"
        third = _group_of(vmd.child("vm/one"))
        assert third not in {first, second}
        assert _procs(third / "guest") == {vmd.child("vm/one")}
    assert _groups(group) == {"vmd"}


def test_processes_wait_in_the_next_group(tmp_path: Path, group: Path) -> None:
    """Processes made ahead are in the next VM's group before there is a VM."""
    image, missing = tmp_path / "disk.img", tmp_path / "missing.img"
    image.write_bytes(bytes(MIB))
    missing.write_bytes(bytes(MIB))
    config = "".join(
        (vm_block("one", f'disk "{image}"'), vm_block("two"), vm_block("bad", f'disk "{missing}"'))
    )
    with _daemon(tmp_path, group, config) as vmd, vmd.client() as client:
        missing.unlink()
        _eventually(lambda: len(_waiting(group)) == 2)
        (spare,) = _groups(group) - {"vmd"}
        waiting = _waiting(group)
        assert client.ask("start", name="one")["type"] == "started"
        assert _group_of(vmd.child("vm/one")) == group / spare
        assert {vmd.child("vm/one"), vmd.child("disk/one")} == waiting
        _eventually(lambda: len(_groups(group)) == 3 and len(_waiting(group)) == 4)

        assert client.ask("start", name="bad")["type"] == "failed"
        assert client.ask("start", name="two")["type"] == "started"
        pids = {vmd.child(title) for title in ("vm/two", "vm/one", "disk/one")}
        assert _procs(_group_of(vmd.child("vm/two")) / "guest") == {vmd.child("vm/two")}
        assert client.ask("stop", name="two", force=True, wait=True)["type"] == "terminated"
        assert client.ask("stop", name="one", force=True, wait=True)["type"] == "terminated"
        _eventually(lambda: len(_groups(group)) == 2 and not pids & _waiting(group))
    assert _groups(group) == {"vmd"}


def _waiting(group: Path) -> set[int]:
    """Return the processes of all VMs, and of the next one."""
    folders = [path for path in group.iterdir() if path.name.startswith("vm-")]
    return {pid for each in folders for name in BELOW for pid in _procs(each / name)}


def test_another_vmm_has_another_group(tmp_path: Path, group: Path) -> None:
    """When vmm is killed, what waited in a group is gone, and so is the group."""
    with _daemon(tmp_path, group, vm_block("one")) as vmd, vmd.client() as client:
        _eventually(lambda: len(_waiting(group)) == 2)
        before = _groups(group)
        os.kill(vmd.child("vmd: vmm"), signal.SIGKILL)
        _eventually(lambda: _groups(group) != before and len(_waiting(group)) == 2)
        assert client.ask("start", name="one")["type"] == "started"
        assert _group_of(vmd.child("vm/one")).parent == group
        _eventually(lambda: len(_groups(group)) == 3)
    assert _groups(group) == {"vmd"}


def test_what_a_killed_daemon_has_left(tmp_path: Path, group: Path) -> None:
    """The next daemon removes the groups of a killed one, and makes others."""
    with _daemon(tmp_path, group, vm_block("one", enabled=True)) as vmd:
        with vmd.client() as client:
            client.wait_for_state("one", "running")
        below = descendants(vmd.process.pid)
        os.kill(vmd.process.pid, signal.SIGKILL)
        vmd.process.wait()
        _eventually(lambda: not any(map(is_alive, below)))
    left = _groups(group) - {"vmd"}
    assert left
    with _daemon(tmp_path, group / "vmd", "") as vmd:
        # One exists for its first VM; a number that was free then may be the same.
        _eventually(lambda: len(_groups(group) - {"vmd"}) == 1)
        assert vmd.process.pid in _procs(group / "vmd")


def test_a_group_with_others_is_not_taken(tmp_path: Path, group: Path) -> None:
    """A group with other processes is left alone, and the log says that nothing is limited."""
    pid = os.fork()
    if pid == 0:
        while True:
            signal.pause()
    try:
        (group / "cgroup.procs").write_text(str(pid))
        with _daemon(tmp_path, group, vm_block("one")) as vmd, vmd.client() as client:
            assert client.ask("start", name="one")["type"] == "started"
            assert [path for path in group.iterdir() if path.is_dir()] == []
            assert "vmd: VMs have no limits of their own: the daemon's cgroup has other" in (
                vmd.log.read_text()
            )
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def test_limits(tmp_path: Path, group: Path) -> None:
    """With the kernel's controllers, a VM's processor time, tasks and memory are limited."""
    controllers = (group / "cgroup.controllers").read_text().split()
    config = vm_block("one", "limit cpu 50%")
    with _daemon(tmp_path, group, config) as vmd, vmd.client() as client:
        answer = client.ask("start", name="one")
        if "cpu" not in controllers:
            text = "limit cpu: this host gives vmd no cgroup that limits processors, see vmd(8)"
            assert (answer["type"], answer["message"]) == ("failed", text)
            assert len(_groups(group) - {"vmd"}) <= 1, "one for the next VM"
            pytest.skip("no cpu controller in the cgroup2 of this host: the refusal was tested")
        assert answer["type"] == "started"
        one = _group_of(vmd.child("vm/one"))
        assert (one / "cpu.max").read_text() == f"{cpu_max(50)}\n"
        assert (one / "pids.max").read_text() == f"{TASKS_MAX}\n"
        assert (one / "guest" / "memory.max").read_text() == f"{memory_max(64 * MIB)}\n"


def _child_in(group: Path, work: Callable[[], None]) -> int:
    """Run a function in a child in a control group; returns its pid."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            (group / "cgroup.procs").write_text("0")
            work()
            status = 0
        finally:
            os._exit(status)
    return pid


def _burn() -> None:
    end = time.monotonic() + 3
    while time.monotonic() < end:
        pass


def _counted(path: Path, key: str) -> int:
    """Return a number of a file of pairs."""
    return int(dict(line.split() for line in path.read_text().splitlines())[key])


def test_limits_at_work(tmp_path: Path, group: Path) -> None:
    """Processes in a VM's groups are throttled, refused or killed, at the VM's limits."""
    if missing := {"cpu", "memory", "pids"} - set(
        (group / "cgroup.controllers").read_text().split()
    ):
        pytest.skip(f"no {', '.join(sorted(missing))} controller in the cgroup2 of this host")
    config = vm_block("one", "limit cpu 50%", memory="16M")
    with _daemon(tmp_path, group, config) as vmd, vmd.client() as client:
        assert client.ask("start", name="one")["type"] == "started"
        one = _group_of(vmd.child("vm/one"))
        begun = os.times().children_user + os.times().children_system
        assert os.waitpid(_child_in(one / "guest", _burn), 0)[1] == 0
        used = os.times().children_user + os.times().children_system - begun
        assert used < 2.25, "of 3 seconds, half are the limit"
        assert _counted(one / "cpu.stat", "nr_throttled") > 0

        def allocate() -> None:
            held = bytearray()
            while True:
                held += b"x" * MIB

        waited = os.waitpid(_child_in(one / "guest", allocate), 0)[1]
        assert os.waitstatus_to_exitcode(waited) == -signal.SIGKILL
        assert _counted(one / "guest" / "memory.events", "oom_kill") == 1

        def fork() -> None:
            os.setpgid(0, 0)
            with suppress(BlockingIOError):
                for _ in range(TASKS_MAX):
                    if os.fork() == 0:
                        signal.pause()
                os._exit(2)

        forker = _child_in(one / "guest", fork)
        assert os.waitstatus_to_exitcode(os.waitpid(forker, 0)[1]) == 0, "no fork was refused"
        assert _counted(one / "pids.events", "max") > 0
        os.killpg(forker, signal.SIGKILL)
        assert client.vm("one")["state"] == "running"
