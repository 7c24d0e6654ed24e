"""Files that a user names to root's daemon: opened with that user's rights, no side effect."""

from __future__ import annotations

import os
import select
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.system.vhost_user_guests import BOOT_MESSAGE, boot_disk
from tests.system.vmd.conftest import needs_separation
from tests.system.vmd.daemon import TIMEOUT_S, Answer, Client, Daemon, vm_block
from tests.system.vmd.users import USER, connection
from vmm_kvm.images.create import create_qcow2

pytestmark = [
    pytest.mark.kvm,
    pytest.mark.root,
    needs_separation,
]


@pytest.fixture
def vmd(reachable: Path) -> Iterator[Daemon]:
    """Run a daemon with a VM of root's, where the user may make instances with own files."""
    disk = reachable / "disk"
    disk.write_bytes(bytes(1 << 20))
    config = (
        f"socket owner {USER}\n"
        # A disk has a process, which shares the guest's RAM with the VM's.
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
    """Return the memfds that a process has open: /proc's path of each, by its name."""
    found = {}
    for link in Path(f"/proc/{pid}/fd").iterdir():
        target = str(link.readlink())
        if target.startswith("/memfd:"):
            found[target] = str(link)
    return found


def test_memory_of_other_vms_cannot_be_named(vmd: Daemon, user: Client, reachable: Path) -> None:
    """No path leads to open files of the daemon's processes: guests' RAM, consoles, counters."""
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
    """Every memfd of every process of the daemon has the mode 0600, and a sealed size."""
    pid = user.vm("victim")["pid"]
    assert isinstance(pid, int)
    found = {**_memfds(pid), **_memfds(vmd.process.pid), **_memfds(vmd.child("vmd: vmm"))}
    assert any(name.startswith("/memfd:console:victim") for name in found)
    assert {path: Path(path).stat().st_mode & 0o7777 for path in found.values()} == dict.fromkeys(
        found.values(), 0o600
    )


def test_directories_on_the_way_count(user: Client, reachable: Path) -> None:
    """A world-writable file in a closed directory cannot be opened, nor is its name revealed."""
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
    """The daemon never opens a FIFO, a socket, a device or a directory, not even for a moment."""
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
    """A user's image leads to no file that the user could not read."""
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


def _passed(client: Client, fds: list[int], path: str = "passed", **disk: object) -> Answer:
    """Start an instance whose disk is passed: the image, then its bases."""
    wanted = {"path": path, "chain": list(range(len(fds))), **disk}
    return client.ask("start", tuple(fds), name="mine", instance="template", disks=[wanted])


def test_a_disk_that_is_passed_stays_over_a_reboot(user: Client, reachable: Path) -> None:
    """The daemon needs no name of a passed disk: not at the start, nor at a reboot."""
    image = reachable / "image"
    image.write_bytes(boot_disk(waits=True))
    fd = os.open(image, os.O_RDWR)
    image.unlink()
    started = user.ask(
        "start",
        (fd,),
        name="mine",
        instance="template",
        firmware="bios",
        disks=[{"path": "gone", "format": "raw", "chain": [0]}],
    )
    os.close(fd)
    assert started["type"] == "started", started
    with user.console("mine") as console:
        console.expect(BOOT_MESSAGE)
        console.type(b"r")
    deadline = time.monotonic() + TIMEOUT_S
    while user.vm("mine")["pid"] in {started["pid"], None}:
        assert time.monotonic() < deadline
    with user.console("mine") as console:
        console.expect(BOOT_MESSAGE, 2)


def test_what_is_passed_is_judged(user: Client, reachable: Path) -> None:
    """A passed disk must be a file opened for its use, with all files that it refers to."""
    base, image, disk = reachable / "base", reachable / "overlay", reachable / "raw"
    create_qcow2(str(base), 1 << 20)
    create_qcow2(str(image), 1 << 20, str(base))
    disk.write_bytes(bytes(1 << 20))
    reader, writer = os.pipe()
    opened = [
        os.open(disk, os.O_RDONLY),
        os.open(disk, os.O_RDWR),
        os.open(image, os.O_RDWR),
        os.open(base, os.O_RDONLY),
        os.open("/dev/null", os.O_RDWR),
    ]
    read_only, both, top, bottom, null = opened
    for fds, why in (
        ([read_only], "disk passed: not open for writing"),
        ([null], "disk passed: not a regular file"),
        ([reader], "disk passed: not a regular file"),
        ([top], f"passed: its base image {base} did not come along"),
        ([top, bottom, both], "passed: more base images than it refers to"),
        ([top, writer], f"base image {base}: not a regular file"),
    ):
        refused = _passed(user, fds)
        assert (refused["type"], refused.get("message")) == ("failed", why)
    assert _passed(user, [top, bottom])["type"] == "started"
    for fd in (*opened, reader, writer):
        os.close(fd)


def test_bases_that_an_owner_may_have_written(reachable: Path) -> None:
    """Files that a probed image of the configuration refers to open with its owner's rights."""
    secret, image = reachable / "secret", reachable / "image"
    create_qcow2(str(secret), 1 << 20)
    create_qcow2(str(image), 1 << 20, str(secret))
    os.chown(image, USER, USER)
    secret.chmod(0o600)
    config = (
        f"socket owner {USER}\n"
        + vm_block("probed", f'disk "{image}"', f"owner {USER}")
        + vm_block("said", f'disk "{image}" format qcow2', f"owner {USER}")
    )
    with Daemon(reachable, config, is_user=False) as vmd, connection(vmd, USER) as client:
        refused = client.ask("start", name="probed")
        assert (refused["code"], refused["message"]) == (
            "EPERM",
            f"base image {secret}: Permission denied",
        )
        started = client.ask("start", name="said")
        assert started["type"] == "started", started
        assert client.ask("stop", name="said", force=True, wait=True)["type"] == "terminated"
        os.chown(secret, USER, USER)
        started = client.ask("start", name="probed")
        assert started["type"] == "started", started
