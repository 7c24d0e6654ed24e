"""Files by name: those that are opened, the rights used, and no other effects."""

from __future__ import annotations

import errno
import os
import select
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from vmd.shared.files import FileError, FileKindError, check_open_file, open_file


def _open(path: str | Path, *, writes: bool = False) -> bytes:
    """Open a file and return its first bytes."""
    fd = open_file(str(path), writes=writes, allows_devices=False)
    try:
        return os.pread(fd, 16, 0)
    finally:
        os.close(fd)


def test_a_regular_file(tmp_path: Path) -> None:
    """A regular file opens by its name or by a symbolic link, to be read, or read and written."""
    path = tmp_path / "file"
    path.write_bytes(b"contents")
    (tmp_path / "link").symlink_to(path)
    assert _open(path) == _open(tmp_path / "link") == b"contents"
    fd = open_file(str(path), writes=True, allows_devices=False)
    assert os.write(fd, b"C") == 1
    assert not os.get_inheritable(fd)
    os.close(fd)
    fd = open_file(str(path), writes=False, allows_devices=False)
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.write(fd, b"C")
    os.close(fd)


@pytest.mark.parametrize(
    "name", ["/proc/self/fd/{}", "/dev/fd/{}", "/proc/thread-self/fd/{}", "link"]
)
def test_no_link_to_an_open_file(tmp_path: Path, name: str) -> None:
    """An open file of a process cannot be named, in any way."""
    fd = os.memfd_create("secret")
    (tmp_path / "link").symlink_to(f"/proc/self/fd/{fd}")
    with pytest.raises(FileError, match="a link of /proc to an open file"):
        _open(name.format(fd) if name != "link" else tmp_path / name)
    os.close(fd)


@pytest.mark.parametrize("path", ["/proc/self/root/etc/passwd", "/proc/self/cwd/pyproject.toml"])
def test_no_way_through_another_process(path: str) -> None:
    """Directories of a process lead nowhere either."""
    with pytest.raises(FileError) as caught:
        _open(path)
    assert caught.value.errno == errno.ELOOP


@pytest.mark.parametrize("path", ["/proc/self/mem", "/proc/version", "/sys/power/state"])
def test_no_file_of_the_kernels(path: str) -> None:
    """Files of the kernel are refused: a write could do anything to the host."""
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
    """Each bad name is one error of ours, with any characters in it."""
    with pytest.raises(FileError) as caught:
        _open(f"{tmp_path}/{name}")
    assert caught.value.errno == number


@pytest.mark.parametrize(
    ("flags", "writes", "why"),
    [
        (os.O_RDONLY, False, None),
        (os.O_RDWR, True, None),
        (os.O_RDWR, False, None),
        (os.O_RDONLY, True, "not open for writing"),
        (os.O_WRONLY, False, "not open for reading"),
        (os.O_WRONLY, True, "not open for reading"),
        (os.O_PATH, False, "not open for reading"),
        (os.O_RDWR | os.O_APPEND, True, "open for appending"),
    ],
)
def test_what_others_have_opened(tmp_path: Path, flags: int, writes: bool, why: str | None) -> None:
    """A passed file is accepted if it was opened for its use."""
    path = tmp_path / "file"
    path.write_bytes(b"contents")
    fd = os.open(path, flags)
    try:
        if why is None:
            check_open_file(fd, writes=writes, allows_devices=False)
        else:
            with pytest.raises(FileError, match=why):
                check_open_file(fd, writes=writes, allows_devices=False)
    finally:
        os.close(fd)


def test_what_others_have_opened_that_is_no_file(tmp_path: Path) -> None:
    """Passed pipes, devices, directories and files of the kernel are refused too."""
    reader, writer = os.pipe()
    fds = [reader, writer]
    fds += [os.open(path, os.O_RDONLY) for path in ("/dev/null", tmp_path, "/proc/version")]
    for fd in fds:
        with pytest.raises(FileError):
            check_open_file(fd, writes=False, allows_devices=False)
        os.close(fd)


_IN_A_UNIT = """
import subprocess, sys
from vmd.shared.files import FileError, open_file
subprocess.run(["sh", "-euc", sys.argv[1]], check=True)  # the interpreter may be where it mounts
try:
    open_file(sys.argv[2], writes=True, allows_devices=False)
except FileError as err:
    print(err)
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="mounts need root")
@pytest.mark.parametrize("is_service", [True, False])
def test_what_the_unit_forbids_is_told(tmp_path: Path, is_service: bool) -> None:
    """Its mounts, which a shell outside does not see, are named as the cause; elsewhere not."""
    mounts = "mount -t tmpfs disks /mnt; touch /mnt/disk; mount -o remount,ro /mnt"
    if is_service:
        for place in ("/var/tmp", "/tmp"):
            own = tmp_path / "systemd-private-1" / place[1:]
            own.mkdir(parents=True)
            mounts += f"; mount --bind {own} {place}"
    said = []
    for path in ("/mnt/disk", "/tmp/none", "/var/tmp/none", "/mnt/none"):
        environ = {**os.environ, "NOTIFY_SOCKET": "/run/systemd/notify"}
        if not is_service:
            del environ["NOTIFY_SOCKET"]
        command = ("unshare", "-m", sys.executable, "-c", _IN_A_UNIT, mounts, path)
        said.append(subprocess.check_output(command, env=environ, text=True).rstrip("\n"))
    lines = ["Read-only file system", *["No such file or directory"] * 3]
    if is_service:
        lines[0] += ": for other directories the unit of vmd needs ReadWritePaths="
        lines[1] += ": the unit of vmd has a directory of its own there"
        lines[2] += ": the unit of vmd has a directory of its own there"
    assert said == lines
