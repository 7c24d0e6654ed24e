"""Clients' files on file systems that hang: the daemon's other clients do not notice."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from tests.fuse import Call, FuseMount
from tests.system.vmd.conftest import needs_separation
from tests.system.vmd.daemon import Daemon, descendants, vm_block
from tests.system.vmd.users import USER, being, connection

pytestmark = [
    pytest.mark.kvm,
    pytest.mark.root,
    needs_separation,
]

_ANSWER_S = 30.0
"""A busy machine answers within this time; a hanging file system never does."""
_IMPATIENT = (
    "from vmd.vmm import process as vmm; vmm._DEVICE_GRACE_NS = vmm._HELD_NS = 1_000_000_000"
)
_RUN = "import runpy; runpy.run_module('vmd', run_name='__main__', alter_sys=True)"
_OTHER = 65533
"""A third user, neither root nor the first."""


@pytest.fixture
def fuse(reachable: Path) -> Iterator[FuseMount]:
    """Mount a user's file system with some files."""
    folder = reachable / "mount"
    folder.mkdir()
    files = {name: bytes(1 << 20) for name in ("disk", "other")}
    with FuseMount(folder, files, USER) as mount:
        yield mount


@pytest.fixture
def vmd(reachable: Path, fuse: FuseMount) -> Iterator[Daemon]:  # noqa: ARG001 - it ends later
    """Run a daemon whose socket every user may use, and where the user may make instances."""
    config = (
        vm_block("one")
        + vm_block("template", f"allow instance {{ boot, disk, owner {USER} }}")
        + vm_block("another", f"allow instance {{ boot, disk, owner {_OTHER} }}")
    )
    with Daemon(reachable, config, is_user=False) as daemon:
        daemon.socket.chmod(0o666)
        yield daemon


def _open(folder: Path, name: str = "disk") -> int:
    with being(USER):
        return os.open(folder / "mount" / name, os.O_RDWR | os.O_CLOEXEC)


def _wait_for(fuse: FuseMount, call: Call) -> None:
    deadline = time.monotonic() + _ANSWER_S
    while not fuse.unanswered(call):
        assert time.monotonic() < deadline, f"nobody waits for {call.name}"
        time.sleep(0.02)


def _has_files(pid: int, folder: Path) -> bool:
    """Tell whether a process has files below a folder open."""
    found = []
    for link in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(FileNotFoundError):  # closed meanwhile
            found.append(str(link.readlink()))
    return any(path.startswith(str(folder)) for path in found)


def _close(fd: int) -> None:
    with suppress(OSError):  # the server is gone
        os.close(fd)


def _others_are_served(vmd: Daemon, folder: Path) -> None:
    """Have root and another user send requests, with files of their own."""
    disk = folder / "others.raw"
    disk.write_bytes(bytes(1 << 20))
    disk.chmod(0o666)
    chain = [{"path": str(disk), "format": "raw", "chain": [0]}]
    for uid, instance in ((0, "template"), (_OTHER, "another")):
        name = f"of{uid}"
        fd = os.open(disk, os.O_RDWR | os.O_CLOEXEC)
        with connection(vmd, uid) as client:
            client._socket.settimeout(_ANSWER_S)
            asked = {"name": name, "instance": instance, "disks": chain}
            assert client.ask("start", (fd,), **asked)["type"] == "started"
            assert client.vm(name)["state"] == "running"
            stopped = client.ask("stop", name=name, force=True, wait=True)
            assert stopped["type"] == "terminated"
        os.close(fd)


def test_a_file_that_is_never_closed(vmd: Daemon, fuse: FuseMount, reachable: Path) -> None:
    """A user without rights passes files that hang at close and write-back: all are served."""
    fds = [_open(reachable, name) for name in ("disk", "other")]
    os.pwrite(fds[0], b"not written back", 0)
    try:
        fuse.hang(Call.FLUSH, Call.WRITE, Call.RELEASE, Call.GETATTR, Call.STATFS)
        with connection(vmd, USER) as client:
            client.send("start", tuple(fds), name="one", kernel=0, initrd=[1])
            assert client.receive()[0]["type"] == "failed"
            _wait_for(fuse, Call.WRITE)
            for _ in range(100):  # again and again, until reads stop
                client.send("start", tuple(fds), name="one", kernel=0, initrd=[1])
            with connection(vmd, USER) as again:
                again.send("status")
                _others_are_served(vmd, reachable)
        _others_are_served(vmd, reachable)
    finally:
        fuse.end()
        for fd in fds:
            _close(fd)
    control = vmd.child("vmd: control")
    deadline = time.monotonic() + _ANSWER_S
    while _has_files(control, reachable / "mount"):
        assert time.monotonic() < deadline, "control has files of a client that has gone"
        time.sleep(0.1)


def test_the_end_of_a_vm_that_the_kernel_holds(reachable: Path, fuse: FuseMount) -> None:
    """Whoever waits for the end of a VM whose disk hangs is told so; it ends when it can."""
    program = ("-c", f"{_IMPATIENT}\n{_RUN}")
    disk = f'disk "{reachable}/mount/disk" format raw'
    config = vm_block("one", disk, enabled=True) + vm_block("two", enabled=True)
    with (
        Daemon(reachable, config, is_user=False, program=program) as vmd,
        vmd.client(_ANSWER_S) as client,
        vmd.client(_ANSWER_S) as waiter,
    ):
        client.wait_for_state("one", "running")
        waiter.send("wait", name="one")
        try:
            fuse.hang(Call.FLUSH, Call.WRITE, Call.RELEASE, Call.GETATTR)
            answer = client.ask("stop", name="one", force=True, wait=True)
            assert (answer["type"], answer["code"]) == ("failed", "EBUSY")
            text = answer["message"]
            assert isinstance(text, str)
            assert "the kernel does not let processes end: disk0 (pid " in text
            assert waiter.receive()[0]["message"] == text
            vmd.wait_for_log(f"vm/one: {text}")
            vm = client.vm("one")
            assert (vm["state"], vm["pause_reason"]) == ("stopping", "held by the kernel")
            for request in ({"kind": "wait"}, {"kind": "stop", "force": True, "wait": True}):
                assert client.ask(name="one", **request)["message"] == text
            assert client.ask("stop", name="two", force=True, wait=True)["type"] == "terminated"
            assert client.ask("start", name="two")["type"] == "started"
        finally:
            fuse.end()
        client.wait_for_state("one", "stopped")
        assert client.vm("one")["pause_reason"] == ""


@pytest.mark.parametrize("is_passed", [True, False], ids=["passed", "named"])
def test_a_vm_whose_disk_hangs(
    vmd: Daemon, fuse: FuseMount, reachable: Path, *, is_passed: bool
) -> None:
    """A user's VM runs from a hanging disk, and cannot end; other VMs and the daemon can."""
    fds = (_open(reachable),) if is_passed else ()
    disk: dict[str, object] = {"path": str(reachable / "mount" / "disk"), "format": "raw"}
    if is_passed:
        disk["chain"] = [0]
    try:
        with connection(vmd, USER) as client:
            asked = {"name": "mine", "instance": "template", "disks": [disk]}
            assert client.ask("start", fds, **asked)["type"] == "started"
            fuse.hang(Call.FLUSH, Call.WRITE, Call.RELEASE, Call.GETATTR)
            client.send("stop", name="mine", force=True)
            _wait_for(fuse, Call.FLUSH)
            _others_are_served(vmd, reachable)
        left = descendants(vmd.process.pid)
        vmd.process.send_signal(signal.SIGTERM)
        time.sleep(0.5)
        vmd.process.send_signal(signal.SIGTERM)
        assert vmd.process.wait(2 * _ANSWER_S) == 0
    finally:
        fuse.end()
        for fd in fds:
            _close(fd)
    deadline = time.monotonic() + _ANSWER_S
    while alive := [pid for pid in left if Path(f"/proc/{pid}").exists()]:
        assert time.monotonic() < deadline, alive
        time.sleep(0.1)
