"""Files by name: which are opened, with whose rights, and that nothing else is touched."""

from __future__ import annotations

import errno
import os
import select
import socket
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from vmd.parent.files import FileError, FileKindError, open_file

NOBODY = 65534
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="another user's rights need root")


def _open(path: str | Path, user: int | None = None, *, writes: bool = False) -> bytes:
    """Open a file and return its first bytes."""
    fd = open_file(str(path), user, writes=writes, allows_devices=False)
    try:
        return os.pread(fd, 16, 0)
    finally:
        os.close(fd)


@pytest.fixture
def reachable() -> Iterator[Path]:
    """Return a directory that every user can get to; pytest closes those that it makes."""
    with TemporaryDirectory(prefix="vmd-") as directory:
        path = Path(directory)
        path.chmod(0o711)
        yield path


def test_a_regular_file(tmp_path: Path) -> None:
    """It is opened by its name or by a symbolic link, to be read, or read and written."""
    path = tmp_path / "file"
    path.write_bytes(b"contents")
    (tmp_path / "link").symlink_to(path)
    assert _open(path) == _open(tmp_path / "link") == b"contents"
    fd = open_file(str(path), None, writes=True, allows_devices=False)
    assert os.write(fd, b"C") == 1
    assert not os.get_inheritable(fd)
    os.close(fd)
    fd = open_file(str(path), None, writes=False, allows_devices=False)
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.write(fd, b"C")
    os.close(fd)


@pytest.mark.parametrize(
    "name", ["/proc/self/fd/{}", "/dev/fd/{}", "/proc/thread-self/fd/{}", "link"]
)
def test_no_link_to_an_open_file(tmp_path: Path, name: str) -> None:
    """What a process has open cannot be named, by whatever way."""
    fd = os.memfd_create("secret")
    (tmp_path / "link").symlink_to(f"/proc/self/fd/{fd}")
    with pytest.raises(FileError, match="a link of /proc to an open file"):
        _open(name.format(fd) if name != "link" else tmp_path / name)
    os.close(fd)


@pytest.mark.parametrize("path", ["/proc/self/root/etc/passwd", "/proc/self/cwd/pyproject.toml"])
def test_no_way_through_another_process(path: str) -> None:
    """Nor do directories that a process is in lead anywhere."""
    with pytest.raises(FileError) as caught:
        _open(path)
    assert caught.value.errno == errno.ELOOP


@pytest.mark.parametrize("path", ["/proc/self/mem", "/proc/version", "/sys/power/state"])
def test_no_file_of_the_kernels(path: str) -> None:
    """To write one may do anything to the host."""
    if not Path(path).exists():
        pytest.skip(f"there is no {path}")
    with pytest.raises(FileKindError, match=r"a file of (procfs|sysfs)"):
        _open(path)


def test_nobody_notices_that_a_fifo_was_named(tmp_path: Path) -> None:
    """A FIFO is never opened: its reader sees no writer come and go."""
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    reader = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
    for writes in (False, True):
        with pytest.raises(FileKindError, match="not a regular file"):
            _open(fifo, writes=writes)
    poll = select.poll()
    poll.register(reader, select.POLLIN)
    assert poll.poll(0) == []
    os.close(reader)


def test_what_is_no_regular_file(tmp_path: Path) -> None:
    """Directories, sockets and devices are refused."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "socket"))
        for path in (tmp_path, tmp_path / "socket", "/dev/null", "/dev/kvm"):
            with pytest.raises(FileKindError, match="not a regular file"):
                _open(path)


@pytest.mark.parametrize(
    ("name", "number"),
    [
        ("missing", errno.ENOENT),
        ("x" * 4096, errno.ENAMETOOLONG),
        ("a\0b", errno.EINVAL),
        ("\ud800", errno.EINVAL),
    ],
)
def test_names_of_no_file(tmp_path: Path, name: str, number: int) -> None:
    """Each is one error of ours, whatever is in it."""
    with pytest.raises(FileError) as caught:
        _open(f"{tmp_path}/{name}")
    assert caught.value.errno == number


@needs_root
def test_the_rights_of_a_user(reachable: Path) -> None:
    """A file is opened as the kernel lets that user; afterwards this process is as before."""
    path = reachable / "file"
    path.write_bytes(b"contents")
    before = (os.getgroups(), Path("/proc/thread-self/status").read_text().split("Uid:")[1][:40])
    for mode, owner, may_read, may_write in (
        (0o644, 0, True, False),
        (0o666, 0, True, True),
        (0o600, 0, False, False),
        (0o600, NOBODY, True, True),
        (0o066, NOBODY, False, False),
    ):
        path.chmod(mode)
        os.chown(path, owner, 0)
        for writes, may in ((False, may_read), (True, may_write)):
            if may:
                assert _open(path, NOBODY, writes=writes) == b"contents"
            else:
                with pytest.raises(FileError) as caught:
                    _open(path, NOBODY, writes=writes)
                assert caught.value.errno == errno.EACCES
    after = (os.getgroups(), Path("/proc/thread-self/status").read_text().split("Uid:")[1][:40])
    assert after == before
    path.chmod(0o600)
    assert _open(path, writes=True) == b"contents"


@needs_root
def test_directories_on_the_way_count(reachable: Path) -> None:
    """Whoever may not search a directory learns not even what is in it."""
    home = reachable / "home"
    home.mkdir(mode=0o700)
    (home / "notes").write_text("mine")
    (home / "notes").chmod(0o666)
    (reachable / "link").symlink_to(home / "notes")
    told = set()
    for path in (home / "notes", home / "missing", reachable / "link"):
        with pytest.raises(FileError) as caught:
            _open(path, NOBODY)
        told.add((str(caught.value), caught.value.errno))
    assert told == {("Permission denied", errno.EACCES)}
