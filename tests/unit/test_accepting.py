"""Accepting connections when descriptors run out."""

from __future__ import annotations

import os
import resource
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from vmm_kvm.accepting import RETRY_NS, Acceptor
from vmm_kvm.loop import EventLoop

TURNS = 50


class Listener(socket.socket):
    """A listening socket that counts calls of accept."""

    tries = 0

    def accept(self) -> tuple[socket.socket, object]:
        """Count, and accept."""
        self.tries += 1
        return super().accept()


class Rig:
    """An acceptor on an event loop, and its accepted connections."""

    def __init__(self, loop: EventLoop, path: Path, burst: int) -> None:
        """Listen at `path`."""
        self.loop = loop
        self.listener = Listener(socket.AF_UNIX)
        self.listener.bind(str(path))
        self.listener.listen(8)
        self.listener.setblocking(False)
        self.accepted: list[socket.socket] = []
        self.acceptor = Acceptor(loop, self.listener, self.accepted.append, burst=burst)
        self.clients: list[socket.socket] = []

    def connect(self) -> None:
        """Connect another client."""
        client = socket.socket(socket.AF_UNIX)
        client.connect(self.listener.getsockname())
        self.clients.append(client)

    def turn(self, count: int = TURNS) -> None:
        """Run `count` rounds of the loop, without waiting."""
        for _ in range(count):
            self.loop.call_soon(self.loop.stop)
            self.loop.run()

    def close(self) -> None:
        """Close everything."""
        self.acceptor.stop()
        for each in (self.listener, *self.accepted, *self.clients):
            each.close()


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[Rig]:
    """Return a started acceptor."""
    with EventLoop() as loop:
        made = Rig(loop, tmp_path / "socket", burst=2)
        made.acceptor.start()
        yield made
        made.close()


@contextmanager
def no_descriptors() -> Iterator[None]:
    """Keep this process from opening any more descriptors."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    lowest = os.dup(0)
    os.close(lowest)
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_connections_are_accepted(rig: Rig) -> None:
    """All waiting connections are accepted, and later ones too."""
    for count in (1, 5):
        for _ in range(count):
            rig.connect()
        rig.turn()
        assert len(rig.accepted) == len(rig.clients)


def test_a_stopped_one_lets_them_wait(rig: Rig) -> None:
    """Connections stay in the backlog until it is started again, also if it is stopped twice."""
    rig.acceptor.stop()
    rig.acceptor.stop()
    rig.connect()
    rig.turn()
    assert rig.accepted == []
    rig.acceptor.has_room()
    rig.turn()
    assert rig.accepted == []
    rig.acceptor.start()
    rig.acceptor.start()
    rig.turn()
    assert len(rig.accepted) == 1


def test_without_descriptors_it_does_not_spin(rig: Rig) -> None:
    """A connection that cannot be accepted is tried once, and again when something is closed."""
    rig.connect()
    with no_descriptors():
        rig.turn()
        assert (rig.listener.tries, rig.accepted) == (1, [])
        rig.acceptor.has_room()
        rig.turn()
        assert (rig.listener.tries, rig.accepted) == (2, [])
    rig.acceptor.has_room()
    rig.turn()
    assert len(rig.accepted) == 1


def test_without_descriptors_time_helps(rig: Rig) -> None:
    """If other processes use up the host's descriptors, it tries again after a while."""
    begin = rig.loop.monotonic_ns()
    rig.connect()
    with no_descriptors():
        rig.turn()
    timer = rig.loop.timer(rig.loop.stop)
    while not rig.accepted:
        timer.arm(rig.loop.monotonic_ns() + RETRY_NS)
        rig.loop.run()
    assert rig.loop.monotonic_ns() - begin >= RETRY_NS
    assert rig.listener.tries <= 4


def test_the_owner_may_stop_within_a_burst(rig: Rig) -> None:
    """The owner may stop the acceptor after one connection; no other is taken."""
    rig.acceptor.stop()
    taken: list[socket.socket] = []

    def take(connection: socket.socket) -> None:
        taken.append(connection)
        one.stop()

    one = Acceptor(rig.loop, rig.listener, take, burst=2)
    for _ in range(2):
        rig.connect()
    one.start()
    rig.turn()
    assert len(taken) == 1
    taken[0].close()
