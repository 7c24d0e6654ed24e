"""The ends of a stream: no wait is endless, with any kind of descriptor."""

from __future__ import annotations

import os
import socket
import threading
from pathlib import Path

import pytest

from vmm_kvm.errors import SnapshotError
from vmm_kvm.snapshot.fds import FdSink, FdSource

SIZE = 1 << 20
AT_ONCE_S = 0.01
PATIENT_S = 30.0


def read_all(fd: int) -> bytes:
    """Read from a descriptor to its end."""
    with FdSource(fd, PATIENT_S) as source:
        found = bytearray()
        piece = bytearray(65536)
        while count := source.readinto(memoryview(piece)):
            found += piece[:count]
    return bytes(found)


def through(read_fd: int, write_fd: int) -> bytes:
    """Send much through a pipe or socket; return the received data."""
    found: list[bytes] = []
    reader = threading.Thread(target=lambda: found.append(read_all(read_fd)))
    reader.start()
    with FdSink(write_fd, PATIENT_S) as sink:
        sink.write(bytes(range(256)) * (SIZE // 256))
        sink.finish()
    reader.join()
    return found[0]


def test_all_goes_through_a_pipe_and_a_socket() -> None:
    """More data than a pipe holds arrive, as they are read."""
    wanted = bytes(range(256)) * (SIZE // 256)
    one, other = socket.socketpair()
    assert through(*os.pipe()) == wanted
    assert through(one.detach(), other.detach()) == wanted


def test_a_file_is_written_and_read(tmp_path: Path) -> None:
    """A stream may go into a file, and come from it."""
    path = tmp_path / "stream"
    with FdSink(os.open(path, os.O_WRONLY | os.O_CREAT), AT_ONCE_S) as sink:
        sink.write(b"machine")
        sink.finish()
    assert read_all(os.open(path, os.O_RDONLY)) == b"machine"


def test_one_that_does_not_read_is_not_waited_for() -> None:
    """An unread pipe or socket fails at the time-out."""
    for read_fd, write_fd in (os.pipe(), [end.detach() for end in socket.socketpair()]):
        stalled = pytest.raises(SnapshotError, match=r"the other end has not read for 0\.01 s")
        with FdSink(write_fd, AT_ONCE_S) as sink, stalled:
            sink.write(bytes(64 << 20))
        os.close(read_fd)


def test_one_that_sends_nothing_is_not_waited_for() -> None:
    """A pipe without a sender's data fails at the time-out."""
    read_fd, write_fd = os.pipe()
    stalled = pytest.raises(SnapshotError, match=r"has not sent anything for 0\.01 s")
    with FdSource(read_fd, AT_ONCE_S) as source, stalled:
        source.readinto(memoryview(bytearray(1)))
    os.close(write_fd)


def test_a_broken_pipe_is_an_error() -> None:
    """A peer that has closed is noticed."""
    read_fd, write_fd = os.pipe()
    os.close(read_fd)
    with FdSink(write_fd, AT_ONCE_S) as sink, pytest.raises(BrokenPipeError):
        sink.write(b"machine")


def test_a_full_disk_is_an_error() -> None:
    """/dev/full is no file, and refused; so is a directory."""
    for path, flags in (("/dev/full", os.O_WRONLY), ("/", os.O_RDONLY)):
        with pytest.raises(SnapshotError, match="not a pipe, socket or file"):
            FdSink(os.open(path, flags), AT_ONCE_S)


def test_one_end_of_a_pipe_is_not_the_other(tmp_path: Path) -> None:
    """The wrong end of a pipe, or a file opened for the other direction, is refused at once."""
    path = tmp_path / "file"
    path.write_bytes(b"")
    read_fd, write_fd = os.pipe()
    for fd in (read_fd, os.open(path, os.O_RDONLY), os.open(path, os.O_PATH)):
        with pytest.raises(SnapshotError, match="not open for writing"):
            FdSink(fd, AT_ONCE_S)
    for fd in (write_fd, os.open(path, os.O_WRONLY), os.open(path, os.O_PATH)):
        with pytest.raises(SnapshotError, match="not open for reading"):
            FdSource(fd, AT_ONCE_S)
