"""Files of clients in parcels: their owners, their lifetime, their number."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from vmd.control import files as module
from vmd.control.files import ClientFiles
from vmd.wire.channel import Fds
from vmd.wire.parcels import opened, unwrap, wrap
from vmm_kvm.loop import EventLoop

ROOT_USER, ALICE, BOB = 0, 1000, 1001
_PATIENCE_NS = 10_000_000_000


@pytest.fixture
def loop() -> Iterator[EventLoop]:
    """Return an event loop."""
    with EventLoop() as made:
        yield made


@pytest.fixture
def told() -> list[int]:
    """Return the users whose files have been closed, as a list that grows."""
    return []


@pytest.fixture
def files(loop: EventLoop, told: list[int]) -> ClientFiles:
    """Return control's files."""
    return ClientFiles(loop, {ROOT_USER}, told.append)


@contextmanager
def _pipe() -> Iterator[tuple[int, int]]:
    """Return a pipe's ends; the receiver owns the second one."""
    read_fd, write_fd = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        yield read_fd, write_fd
    finally:
        os.close(read_fd)


def _is_open(read_fd: int) -> bool:
    """Tell whether the other end of a pipe is open."""
    try:
        return os.read(read_fd, 1) != b""
    except BlockingIOError:
        return True


def _run_until(loop: EventLoop, is_so: Callable[[], bool]) -> None:
    deadline = loop.monotonic_ns() + _PATIENCE_NS

    def look() -> None:
        if is_so() or loop.monotonic_ns() > deadline:
            loop.stop()
        else:
            timer.arm(loop.monotonic_ns() + 1_000_000)

    timer = loop.timer(look)
    loop.call_soon(look)
    loop.run()
    assert is_so()


def test_a_parcel_gives_the_same_open_file_again_and_again(tmp_path: Path) -> None:
    """All descriptors from a parcel share one position; the keeper reports the parcel's end."""
    path = tmp_path / "file"
    path.write_bytes(b"abc")
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    parcel, keeper = wrap(fd)
    os.close(fd)
    for expected in (b"a", b"b"):
        (file,) = opened([os.dup(parcel)])
        assert os.read(file, 1) == expected
        os.close(file)
    os.close(parcel)
    with socket.socket(fileno=keeper) as end, pytest.raises(ConnectionError):
        end.recv(1, socket.MSG_DONTWAIT)


def test_what_is_no_parcel_stays_as_it_is() -> None:
    """A file, or a socket of another kind, is no parcel; a parcel without a file is an error."""
    one, other = socket.socketpair()
    with one, other, _pipe() as (read_fd, write_fd):
        assert unwrap(read_fd) is None
        assert unwrap(one.fileno()) is None
        assert opened([write_fd]) == [write_fd]
        os.close(write_fd)
    one, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with one, other:
        one.send(b"\0")
        with pytest.raises(OSError, match="no file in a parcel"):
            unwrap(other.fileno())


def test_a_file_is_kept_as_long_as_its_parcel(
    loop: EventLoop, files: ClientFiles, told: list[int]
) -> None:
    """The control process closes a user's file after its last reference, on another thread."""
    with _pipe() as (read_fd, write_fd):
        parcels = files.take(ALICE, [write_fd])
        assert parcels
        assert os.get_inheritable(write_fd) is False  # it is still open
        Fds(parcels).close()
        _run_until(loop, lambda: told == [ALICE])
        assert not _is_open(read_fd)


def test_a_file_of_an_administrators(loop: EventLoop, files: ClientFiles, told: list[int]) -> None:
    """The control process closes such a file at once: a lock on it ends with the VM."""
    with _pipe() as (read_fd, write_fd):
        parcels = files.take(ROOT_USER, [write_fd])
        _run_until(loop, lambda: told == [ROOT_USER])
        assert parcels
        assert _is_open(read_fd)
        Fds(parcels).close()
        assert not _is_open(read_fd)


def test_a_file_that_an_opener_has_opened(
    loop: EventLoop, files: ClientFiles, told: list[int]
) -> None:
    """The control process keeps an opened file by the parcel and the keeper that it gets."""
    with _pipe() as (read_fd, write_fd):
        parcel, keeper = wrap(write_fd)
        os.close(write_fd)
        files.keep(ALICE, os.dup(parcel), keeper)
        os.close(parcel)
        assert _is_open(read_fd)
        _run_until(loop, lambda: told == [ALICE])
        assert not _is_open(read_fd)


def test_a_user_has_so_many(
    loop: EventLoop, files: ClientFiles, told: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A message with one file too many is lost; other users' are not, nor later ones."""
    monkeypatch.setattr(module, "FILES_PER_USER", 2)
    kept = files.take(ALICE, [os.open(os.devnull, os.O_RDONLY) for _ in range(2)])
    assert kept
    assert files.take(ALICE, [os.open(os.devnull, os.O_RDONLY)]) is None
    others = files.take(BOB, [os.open(os.devnull, os.O_RDONLY)])
    assert others
    Fds(kept).close()
    Fds(others).close()
    _run_until(loop, lambda: sorted(told) == [ALICE] * 3 + [BOB])
    again = files.take(ALICE, [os.open(os.devnull, os.O_RDONLY)])
    assert again
    Fds(again).close()
    _run_until(loop, lambda: len(told) == 5)
