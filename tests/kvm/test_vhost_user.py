"""Disks of other processes on real KVM: guests boot from them, and survive their ends."""

from __future__ import annotations

import os
import select
import signal
from pathlib import Path

import pytest

from tests.system.test_qemu_storage_daemon import daemon
from tests.system.test_vmm_blk import serving
from tests.system.vhost_user_guests import BOOT_MESSAGE, BOOT_STATUS, boot_disk
from tests.vmctl_driver import ConsoleProcess, vmctl_run

pytestmark = pytest.mark.kvm

BOOTED = BOOT_MESSAGE.decode().strip()
GONE = "vmctl: disk0: needs reset: vhost-user: the server closed the connection"


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """A disk that boots, and then ends the VM at the letter q."""
    path = tmp_path / "disk.img"
    path.write_bytes(boot_disk(waits=True))
    return path


def run(disk: str) -> ConsoleProcess:
    """Boot from `disk`, as `-d` takes it."""
    return ConsoleProcess(vmctl_run("-m", "64M", "-d", disk))


def leave(console: ConsoleProcess) -> None:
    """Show that the guest still runs, and end it."""
    console.send("x")
    console.expect("x")
    console.send("q")
    assert console.wait() == BOOT_STATUS


def test_a_disk_of_vmm_blk(tmp_path: Path, image: Path) -> None:
    """Firmware and guest read vmm-blk's disk, for one VM after another."""
    path = tmp_path / "disk.sock"
    with serving(path, "--socket", path, image) as server:
        for _ in range(2):
            with run(f"vhost-user:{path}") as console:
                console.expect(BOOTED)
                leave(console)
                assert console.errors == b""
        assert server.end() == 0
    assert server.errors == ""


def test_a_disk_of_qemu_storage_daemon(image: Path) -> None:
    """Firmware and guest read the disk of a server that is not ours."""
    with daemon(image) as (path, _), run(f"vhost-user:{path}") as console:
        console.expect(BOOTED)
        leave(console)
        assert console.errors == b""


def test_the_server_is_killed(tmp_path: Path, image: Path) -> None:
    """If the server dies, one line says so, and the guest runs on."""
    path = tmp_path / "disk.sock"
    with serving(path, "--socket", path, image) as server, run(f"vhost-user:{path}") as console:
        console.expect(BOOTED)
        server.process.kill()
        console.expect_errors(GONE)
        leave(console)
        assert console.errors.decode() == f"{GONE}\n"


def test_the_device_process_is_killed(image: Path) -> None:
    """If a disk's own process dies, one line names it, and the guest runs on."""
    with run(f"{image},process") as console:
        console.expect(BOOTED)
        (child,) = children(console.pid)
        os.kill(child, signal.SIGKILL)
        console.expect_errors(GONE)
        leave(console)
        killed = f"vmctl: disk0: device process {child} was killed by signal 9"
        assert console.errors.decode() == f"{GONE}\n{killed}\n"


def test_a_reboot_gets_another_device_process(image: Path) -> None:
    """After a reboot the machine has a new disk process; the image has one writer."""
    with run(f"{image},process") as console:
        console.expect(BOOTED)
        before = children(console.pid)
        console.send("r")
        console.expect(BOOTED)
        after = children(console.pid)
        assert (len(before), len(after)) == (1, 1)
        assert before != after
        leave(console)
        assert console.errors == b""


def test_a_reboot_connects_again(tmp_path: Path, image: Path) -> None:
    """A server survives one front-end's end and serves the next."""
    path = tmp_path / "disk.sock"
    with serving(path, "--socket", path, image) as server, run(f"vhost-user:{path}") as console:
        console.expect(BOOTED)
        console.send("r")
        console.expect(BOOTED)
        leave(console)
        assert console.errors == b""
        assert server.end() == 0
    assert server.errors == ""


def test_no_device_process_outlives_its_vm(image: Path) -> None:
    """When the VM is killed, its disk's process ends by itself, and releases the image."""
    with run(f"{image},process") as console:
        console.expect(BOOTED)
        (child,) = children(console.pid)
        pidfd = os.pidfd_open(child)
        console.signal(signal.SIGKILL)
        assert console.wait() == -signal.SIGKILL
        assert select.select([pidfd], [], [], 10)[0]
        os.close(pidfd)
    with run(f"{image}") as console:
        console.expect(BOOTED)
        leave(console)


def children(pid: int) -> list[int]:
    """Return the child processes of a process."""
    listed = Path(f"/proc/{pid}/task/{pid}/children").read_text()
    return [int(word) for word in listed.split()]
