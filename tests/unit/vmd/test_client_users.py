"""Users of clients, by the kernel's word: the control process is not believed."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from vmd.parent.client_users import ClientUsers
from vmd.wire.channel import Fds, MalformedError
from vmd.wire.internal import CLIENTS_MAX, CLIENTS_OF_ROOT, UNANSWERED_MAX

NOBODY = 65534


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    """Listen as the daemon does, for all users."""
    with (
        TemporaryDirectory(prefix="vmd-") as directory,
        socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as made,
    ):
        path = Path(directory)
        path.chmod(0o711)
        made.bind(str(path / "s"))
        (path / "s").chmod(0o666)
        made.listen()
        yield made


def _accepted(listener: socket.socket, stack: ExitStack) -> int:
    client = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET))
    client.connect(listener.getsockname())
    return listener.accept()[0].detach()


def test_the_kernel_says_who_connected(listener: socket.socket) -> None:
    """A client's user is known from its connection, until it has gone."""
    peers = ClientUsers(listener.getsockname())
    with ExitStack() as stack:
        peers.came(7, Fds([_accepted(listener, stack)]))
        assert peers.asks(7) == os.geteuid()
        peers.gone(7)
        with pytest.raises(MalformedError, match="client 7 has not come"):
            peers.asks(7)
        peers.came(8, Fds([_accepted(listener, stack)]))
        assert peers.forget_all() == (8,)


@pytest.mark.skipif(os.geteuid() != 0, reason="another user's connection needs root")
def test_another_user(listener: socket.socket) -> None:
    """The user that has connected counts, not the one that holds the connection."""
    peers = ClientUsers(listener.getsockname())
    with ExitStack() as stack:
        os.seteuid(NOBODY)
        try:
            fd = _accepted(listener, stack)
        finally:
            os.seteuid(0)
        peers.came(1, Fds([fd]))
        assert peers.asks(1) == NOBODY


def test_what_is_no_connection_of_ours(listener: socket.socket, tmp_path: Path) -> None:
    """Sockets whose peer is root by their making prove nothing, nor do other descriptors."""
    peers = ClientUsers(listener.getsockname())
    with ExitStack() as stack:
        pair = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        other = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET))
        other.bind(str(tmp_path / "other"))
        other.listen()
        client = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET))
        client.connect(listener.getsockname())
        for fd in (
            *(each.detach() for each in pair),
            os.dup(listener.fileno()),
            os.dup(client.fileno()),
            _accepted(other, stack),
            os.open("/dev/null", os.O_RDWR),
        ):
            with pytest.raises(MalformedError, match="client 1 is no"):
                peers.came(1, Fds([fd]))
            with pytest.raises(MalformedError, match="has not come"):
                peers.asks(1)


def test_a_number_is_one_connection(listener: socket.socket) -> None:
    """A known client's number cannot stand for another connection."""
    peers = ClientUsers(listener.getsockname())
    with ExitStack() as stack:
        peers.came(1, Fds([_accepted(listener, stack)]))
        with Fds([_accepted(listener, stack)]) as second, pytest.raises(MalformedError):
            peers.came(1, second)


def test_a_connection_that_is_lost(listener: socket.socket) -> None:
    """Without room for its descriptor, the user of a client is unknown."""
    peers = ClientUsers(listener.getsockname())
    peers.came(1, Fds(are_lost=True))
    assert peers.asks(1) is None


def test_what_a_client_waits_for_is_counted(listener: socket.socket) -> None:
    """Too many clients, or too many waiting requests of one, show a compromised control."""
    peers = ClientUsers(listener.getsockname())
    with ExitStack() as stack:
        peers.came(7, Fds([_accepted(listener, stack)]))
        for _ in range(UNANSWERED_MAX):
            peers.asks(7)
        with pytest.raises(MalformedError, match="client 7 has too many requests unanswered"):
            peers.asks(7)
        peers.answered(7)
        peers.asks(7)
        for client in range(100, 100 + CLIENTS_MAX + CLIENTS_OF_ROOT - 1):
            peers.came(client, Fds())
        with pytest.raises(MalformedError, match="too many clients"):
            peers.came(8, Fds())
