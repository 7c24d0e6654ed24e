"""The process of a daemon's share: its user's rights in its tree, and no others."""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from tests.fs_driver import Guest
from vmd.children import share_plan
from vmd.config.shares import ShareOption
from vmd.parent.errors import ResourceError
from vmd.parent.shares import HELD_MAX, Shares
from vmd.wire.channel import Fds
from vmd.wire.parcels import wrap
from vmm_kvm.fs import abi
from vmm_kvm.virtio.vhost_user.fs import RemoteFsSpec
from vmm_kvm.virtio.vhost_user.readiness import READY

USER = 65534
VM_ID = 7

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="another user's rights need root")


class Host:
    """The parent's shares."""

    def __init__(self) -> None:
        self.shares = Shares(lambda order: share_plan(order, is_user=os.geteuid() != 0))
        self.crashes: list[tuple[int, str]] = []
        self.shares.crashed = lambda vm_id, why: self.crashes.append((vm_id, why))

    def start(
        self, option: ShareOption, uid: int = USER, directory: int | None = None
    ) -> tuple[int, bytes]:
        """Start a process; returns its connection, and what it says of itself."""
        connection, status = self.shares.start(VM_ID, "web", option, uid, directory=directory)
        with os.fdopen(status, "rb") as told:
            return connection, told.read()

    def refused(self, option: ShareOption, directory: int | None = None) -> str:
        """Return why a process does not serve a directory; it has ended."""
        connection, told = self.start(option, directory=directory)
        os.close(connection)
        self.reap()
        assert self.crashes == []
        return told.decode()

    def reap(self) -> None:
        """Wait for all processes."""
        for pid in tuple(self.shares.pids):
            _, waited = os.waitpid(pid, 0)
            self.shares.ended(pid, os.waitstatus_to_exitcode(waited))


@contextmanager
def guest_of(
    host: Host, option: ShareOption, uid: int = USER, directory: int | None = None
) -> Iterator[Guest]:
    """Have a driver use a share, until its connection ends."""
    connection, told = host.start(option, uid, directory)
    assert told == READY
    with ExitStack() as stack:
        spec = RemoteFsSpec(lambda: socket.socket(fileno=connection), b"tag", "share")
        guest = Guest(spec, stack)
        guest.start()
        guest.begin()
        yield guest
    host.reap()


@pytest.fixture
def host() -> Host:
    """Return the parent's shares."""
    return Host()


@pytest.fixture
def folder() -> Iterator[Path]:
    """Return a directory of the user's, which every user can reach."""
    with TemporaryDirectory(prefix="vmd-") as directory:
        outer = Path(directory)
        outer.chmod(0o711)
        shared = outer / "shared"
        shared.mkdir(0o700)
        (shared / "file").write_bytes(b"contents")
        (shared / "roots").write_bytes(b"secret")
        (shared / "roots").chmod(0o600)
        (outer / "beside").write_bytes(b"secret")
        if os.geteuid() == 0:
            for path in (shared, shared / "file"):
                os.chown(path, USER, USER)
        yield shared


def rights(pid: int) -> tuple[str, str, int, str, str]:
    """Return the user, the group, capabilities, and the two flags of a process."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    status = dict(line.split(":\t", 1) for line in lines)
    return (
        status["Uid"].split("\t")[0],
        status["Gid"].split("\t")[0],
        int(status["CapPrm"], 16),
        status["Seccomp"].strip(),
        status["NoNewPrivs"].strip(),
    )


@needs_root
def test_it_acts_as_its_user(host: Host, folder: Path) -> None:
    """The user's files are read and made; those of others in the tree are closed."""
    option = ShareOption(str(folder), "tag")
    with guest_of(host, option) as guest:
        (pid,) = host.shares.pids
        assert rights(pid) == (str(USER), str(USER), 0, "2", "1")
        for name in ("mnt", "net"):
            ours, its = (Path(f"/proc/{each}/ns/{name}") for each in ("self", pid))
            assert ours.readlink() != its.readlink()
        assert guest.content(guest.look_up(b"file").node) == b"contents"
        with pytest.raises(PermissionError):
            guest.content(guest.look_up(b"roots").node)
        _, handle = guest.create(b"new", mode=0o4755)
        assert guest.write(handle, b"x" * 5000) == 5000
        made = (folder / "new").stat()
        assert (made.st_uid, made.st_gid, made.st_mode & 0o7777) == (USER, USER, 0o755)
    assert (host.shares.pids, host.crashes) == (set(), [])


@needs_root
def test_roots_share(host: Host, folder: Path) -> None:
    """Root's reads and writes what belongs to others, by capabilities for files alone."""
    with guest_of(host, ShareOption(str(folder), "tag"), uid=0) as guest:
        (pid,) = host.shares.pids
        uid, _, capabilities, *confined = rights(pid)
        assert (uid, capabilities & ~0b11110, confined) == ("0", 0, ["2", "1"])
        assert guest.content(guest.look_up(b"roots").node) == b"secret"


def test_a_hostile_guest(host: Host, folder: Path) -> None:
    """No name, link or renaming leads out of the tree, and a read-only share stays as it is."""
    (folder / "out").symlink_to(folder.parent / "beside")
    (folder / "up").symlink_to("..")
    before = sorted(path.name for path in folder.iterdir())
    with guest_of(host, ShareOption(str(folder), "tag", is_read_only=True)) as guest:
        for name in (b"..", b".", b"", b"../beside", b"/etc/passwd", b"a\0b", b"n" * 256):
            with pytest.raises(OSError, match=r"Invalid|long|No such"):
                guest.look_up(name)
        for name in (b"out", b"up"):
            node = guest.look_up(name).node
            with pytest.raises(OSError, match=r"Permission|Not a directory"):
                guest.content(node)
            with pytest.raises(OSError, match=r"Not a directory|Invalid"):
                guest.look_up(b"beside", node)
        for change in (
            lambda: guest.create(b"new"),
            lambda: guest.unlink(b"file"),
            lambda: guest.rename(b"file", b"moved"),
            lambda: guest.make_directory(b"d"),
            lambda: guest.set_attributes(guest.look_up(b"file").node, abi.FATTR_SIZE, size=0),
        ):
            with pytest.raises(OSError, match="Read-only"):
                change()
    assert sorted(path.name for path in folder.iterdir()) == before
    assert (folder / "file").read_bytes() == b"contents"
    assert host.crashes == []


def test_a_clients_directory(host: Host, folder: Path) -> None:
    """The directory that a client has opened is served, in a parcel too, whatever the path says."""
    fd = os.open(folder, os.O_PATH | os.O_DIRECTORY)
    parcel, keeper = wrap(fd)
    with Fds([fd, parcel, keeper]):
        for passed in (fd, parcel):
            with guest_of(host, ShareOption("/gone", "tag"), directory=passed) as guest:
                assert guest.content(guest.look_up(b"file").node) == b"contents"


def test_what_cannot_be_served(host: Host, folder: Path) -> None:
    """One line says why: it is missing, no directory, or not for this user."""
    for path, why in (
        (f"{folder}/gone", "No such file or directory"),
        (f"{folder}/file", "Not a directory"),
        ("shared", "not an absolute path"),
        *(((f"{folder.parent}/closed"), "Permission denied") for _ in range(os.geteuid() == 0)),
    ):
        (folder.parent / "closed").mkdir(0o700, exist_ok=True)
        (folder.parent / "closed" / "in").mkdir(exist_ok=True)
        place = f"{path}/in" if path.endswith("closed") else path
        assert host.refused(ShareOption(place, "tag")) == f"share {place}: {why}"
    with (folder / "file").open("rb") as file:
        told = host.refused(ShareOption("/x", "tag"), directory=file.fileno())
    assert told == "share /x: Not a directory"


def test_one_that_crashes(host: Host, folder: Path) -> None:
    """Its VM is told of; one whose VM is gone is killed, and nobody is told."""
    for is_released in (False, True):
        connection, told = host.start(ShareOption(str(folder), "tag"))
        assert told == READY
        (pid,) = host.shares.pids
        if is_released:
            host.shares.release(VM_ID)
        else:
            os.kill(pid, signal.SIGKILL)
        host.reap()
        os.close(connection)
    assert host.crashes == [(VM_ID, "share tag: its process was killed by signal 9")]


@needs_root
def test_processes_that_do_not_end_are_limited(tmp_path: Path) -> None:
    """A user whose file systems let no process end gets no more of them; others do."""
    host = Host()
    host.shares = Shares(lambda order: share_plan(order, is_user=False), held_s=0.0)
    option = ShareOption(str(tmp_path), "t")

    def start(uid: int) -> None:
        os.close(host.start(option, uid)[0])

    for _ in range(HELD_MAX + 1):
        start(USER)
    host.shares.release(VM_ID)  # nobody reaps them, as if the kernel did not let them end
    with pytest.raises(ResourceError, match="hold up too many processes of your shares"):
        start(USER)
    start(USER - 1)
    host.reap()
    start(USER)
    host.reap()
