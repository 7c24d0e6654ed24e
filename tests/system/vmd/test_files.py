"""Files that a user names to a daemon of root's: that user's rights, and no side effect."""

from __future__ import annotations

import os
import select
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.system.vmd.conftest import missing_separation
from tests.system.vmd.daemon import Answer, Client, Daemon, vm_block
from tests.system.vmd.users import USER, connection

pytestmark = [
    pytest.mark.kvm,
    pytest.mark.root,
    pytest.mark.skipif(missing_separation() is not None, reason=str(missing_separation())),
]


@pytest.fixture
def vmd(reachable: Path) -> Iterator[Daemon]:
    """Run a daemon where a VM of root's runs, and the user may make instances with own files."""
    disk = reachable / "disk"
    disk.write_bytes(bytes(1 << 20))
    config = (
        f"socket owner {USER}\n"
        # A disk has a process, with which the VM's shares the guest's RAM.
        + vm_block("victim", f'disk "{disk}" format raw', enabled=True)
        + vm_block(
            "template", "allow instance { boot, cdrom, disk }", f"allow instance {{ owner {USER} }}"
        )
    )
    with Daemon(reachable, config, is_user=False) as daemon:
        yield daemon


@pytest.fixture
def user(vmd: Daemon) -> Iterator[Client]:
    """Be connected as the user, once the victim runs."""
    with vmd.client() as root:
        root.wait_for_state("victim", "running")
    with connection(vmd, USER) as client:
        yield client


def _start(client: Client, **fields: object) -> Answer:
    return client.ask("start", (), name="mine", instance="template", **fields)


def _disk(client: Client, path: str | Path, *, is_read_only: bool = False) -> Answer:
    return _start(
        client, disks=[{"path": str(path), "format": "raw", "is_read_only": is_read_only}]
    )


def _memfds(pid: int) -> dict[str, str]:
    """Return the memfds that a process has open: what /proc calls each, by what it is."""
    found = {}
    for link in Path(f"/proc/{pid}/fd").iterdir():
        target = str(link.readlink())
        if target.startswith("/memfd:"):
            found[target] = str(link)
    return found


def test_memory_of_other_vms_cannot_be_named(vmd: Daemon, user: Client, reachable: Path) -> None:
    """No path leads into what the daemon's processes have open: guests' RAM, consoles, counters."""
    pid = user.vm("victim")["pid"]
    assert isinstance(pid, int)
    paths = [*_memfds(pid).values()]
    assert len(paths) >= 3, "the VM has no RAM, ring and counters"
    own = [link.rpartition("/")[2] for link in _memfds(vmd.process.pid).values()]
    assert own, "the parent has no console ring"
    paths += [f"{directory}/{fd}" for directory in ("/proc/self/fd", "/dev/fd") for fd in own]
    for number, path in enumerate(tuple(paths)):
        link = reachable / f"link{number}"
        link.symlink_to(path)
        paths.append(str(link))
    for path in paths:
        for is_read_only in (False, True):
            refused = _disk(user, path, is_read_only=is_read_only)
            assert refused["type"] == "failed", (path, refused)
        assert _start(user, cdrom=path)["type"] == "failed", path


def test_memory_is_for_its_owner_alone(vmd: Daemon, user: Client) -> None:
    """Every memfd of every process of the daemon has the mode 0600, and a size that is sealed."""
    pid = user.vm("victim")["pid"]
    assert isinstance(pid, int)
    found = {**_memfds(pid), **_memfds(vmd.process.pid), **_memfds(vmd.child("vmd: vmm"))}
    assert any(name.startswith("/memfd:console:victim") for name in found)
    assert {path: Path(path).stat().st_mode & 0o7777 for path in found.values()} == dict.fromkeys(
        found.values(), 0o600
    )


def test_directories_on_the_way_count(user: Client, reachable: Path) -> None:
    """A file that all may write, in a closed directory, is not to be had; nor is its name."""
    home = reachable / "home"
    home.mkdir(mode=0o700)
    notes = home / "notes"
    notes.write_bytes(bytes(4096))
    notes.chmod(0o666)
    told = set()
    for path in (notes, home / "missing"):
        refused = _disk(user, path)
        told.add((refused["code"], str(refused["message"]).replace(str(path), "")))
        refused = _disk(user, path, is_read_only=True)
        told.add((refused["code"], str(refused["message"]).replace(str(path), "")))
    assert told == {("EPERM", "disk : Permission denied")}
    home.chmod(0o711)
    assert _disk(user, notes)["type"] == "started"


def test_nothing_but_files_is_opened(user: Client, reachable: Path) -> None:
    """Whoever waits at a FIFO sees nobody come; sockets, devices and directories stay closed."""
    fifo = reachable / "fifo"
    os.mkfifo(fifo)
    fifo.chmod(0o666)
    device = reachable / "device"
    os.mknod(device, 0o020666, os.makedev(1, 5))
    device.chmod(0o666)
    reader = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(reachable / "socket"))
        (reachable / "socket").chmod(0o666)
        for path in (fifo, reachable / "socket", device, reachable, "/dev/null", "/dev/ptmx"):
            for is_read_only in (False, True):
                refused = _disk(user, path, is_read_only=is_read_only)
                assert (refused["type"], refused["code"]) == ("failed", "EPERM"), refused
            assert _start(user, cdrom=str(path))["code"] == "cdrom-invalid"
            assert _start(user, firmware=str(path))["code"] == "EPERM"
    poll = select.poll()
    poll.register(reader, select.POLLIN)
    assert poll.poll(0) == []
    os.close(reader)


def test_a_base_is_opened_with_the_rights_of_the_user(user: Client, reachable: Path) -> None:
    """An image of the user's leads to no file that the user could not read."""
    from vmm_kvm.images.create import create_qcow2  # noqa: PLC0415 - of this test alone

    secret, image = reachable / "secret", reachable / "image"
    secret.write_bytes(bytes(1 << 20))
    secret.chmod(0o644)
    create_qcow2(str(image), 1 << 20, str(secret))
    os.chown(image, USER, USER)
    secret.chmod(0o600)
    refused = user.ask(
        "start", name="mine", instance="template", disks=[{"path": str(image), "format": "qcow2"}]
    )
    assert refused["code"] == "EPERM", refused
    assert refused["message"] == f"base image {secret}: Permission denied"
