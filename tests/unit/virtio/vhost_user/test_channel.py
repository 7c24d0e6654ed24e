"""Messages over a real socket pair: pieces, descriptors, and a broken peer."""

from __future__ import annotations

import array
import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from vmm_kvm.virtio.vhost_user.channel import Channel, Fds
from vmm_kvm.virtio.vhost_user.messages import Header, VhostUserError, pack_u64


@contextmanager
def channels() -> Iterator[tuple[Channel, Channel]]:
    """Yield two ends of a connection that do not block."""
    one, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    one.setblocking(False)
    other.setblocking(False)
    left, right = Channel(one), Channel(other)
    try:
        yield left, right
    finally:
        left.close()
        right.close()


@pytest.fixture
def null() -> Iterator[int]:
    """A descriptor that may be sent."""
    fd = os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC)
    yield fd
    os.close(fd)


def _with_fds(fds: list[int]) -> list[tuple[int, int, array.array[int]]]:
    return [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))]


def test_a_message_arrives_with_its_descriptors() -> None:
    """Request, flags, payload and descriptors arrive; the descriptors are close-on-exec."""
    with channels() as (left, right):
        read_end, write_end = os.pipe()
        left.send(12, pack_u64(3), flags=8, fds=[read_end, write_end])
        message = right.receive()
        assert message is not None
        with message.fds as fds:
            assert (message.request, message.flags, message.payload) == (12, 9, pack_u64(3))
            assert len(fds) == 2
            taken = fds.take()
            assert os.fstat(taken).st_ino == os.fstat(read_end).st_ino
            assert fcntl.fcntl(taken, fcntl.F_GETFD) & fcntl.FD_CLOEXEC
        for fd in (taken, read_end, write_end):
            os.close(fd)


def test_descriptors_belong_to_their_message(null: int) -> None:
    """Messages that wait in the socket together keep their descriptors apart."""
    with channels() as (left, right):
        left.send(1)
        left.send(2, fds=[null])
        left.send(3)
        counts = []
        for _ in range(3):
            message = right.receive()
            assert message is not None
            with message.fds as fds:
                counts.append((message.request, len(fds)))
        assert counts == [(1, 0), (2, 1), (3, 0)]


def test_a_message_may_arrive_byte_by_byte(null: int) -> None:
    """Reception continues where it was interrupted; descriptors may come with any part."""
    data = Header(5, 1, 8).pack() + pack_u64(7)
    with channels() as (left, right):
        for number, byte in enumerate(data):
            with pytest.raises(BlockingIOError):
                right.receive()
            fds = _with_fds([null]) if number in {0, 15} else []
            left.socket.sendmsg([bytes([byte])], fds)
        message = right.receive()
        assert message is not None
        with message.fds as received:
            assert (message.payload, len(received)) == (pack_u64(7), 2)


def test_the_end_between_messages_is_orderly() -> None:
    """A peer that closes its socket between messages has ended the connection."""
    with channels() as (left, right):
        left.send(1)
        left.close()
        message = right.receive()
        assert message is not None
        assert right.receive() is None


@pytest.mark.parametrize("size", [1, 11, 12, 19])
def test_the_end_within_a_message_is_an_error(size: int) -> None:
    """A message cut short is not taken for an orderly end."""
    data = Header(5, 1, 8).pack() + pack_u64(7)
    with channels() as (left, right):
        left.socket.sendall(data[:size])
        left.close()
        with pytest.raises(VhostUserError, match="the connection ended in"):
            right.receive()


def test_too_many_descriptors_are_refused_and_closed(null: int) -> None:
    """Nine descriptors are an error; those that were installed are closed with the channel."""
    with channels() as (left, right):
        fds = _with_fds([null] * 9)
        left.socket.sendmsg([Header(5, 1, 0).pack()], fds)
        with pytest.raises(VhostUserError, match="more than 8 descriptors"):
            right.receive()


def test_descriptors_in_pieces_are_counted_together(null: int) -> None:
    """A message in pieces cannot carry more descriptors than a whole one."""
    with channels() as (left, right):
        data = Header(5, 1, 8).pack() + pack_u64(7)
        for byte in data:
            left.socket.sendmsg([bytes([byte])], _with_fds([null] * 4))
        with pytest.raises(VhostUserError, match="more than 8 descriptors"):
            right.receive()


def test_unclaimed_descriptors_of_an_unfinished_message_are_closed(null: int) -> None:
    """Closing the channel closes descriptors of a partial message."""
    with channels() as (left, right):
        left.socket.sendmsg([b"\x05"], _with_fds([null]))
        with pytest.raises(BlockingIOError):
            right.receive()


def test_a_peer_that_does_not_read_is_an_error() -> None:
    """Unread replies do not make this side wait."""

    def flood(channel: Channel) -> None:
        for _ in range(1 << 20):
            channel.send(1, pack_u64(1))

    with channels() as (left, _), pytest.raises(VhostUserError, match="does not read"):
        flood(left)


def test_a_socket_is_refused() -> None:
    """A socket is refused: it could be the connection's own other end, and keep it open."""
    with channels() as (left, right):
        left.send(5, fds=[left.fileno()])
        with pytest.raises(VhostUserError, match="a socket among the descriptors"):
            right.receive()


def test_taking_a_missing_descriptor_is_an_error() -> None:
    """A message that lacks its descriptor is the peer's fault."""
    with Fds() as fds, pytest.raises(VhostUserError, match="a descriptor is missing"):
        fds.take()
