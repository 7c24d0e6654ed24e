"""Events of rings that another process serves: the calls, and their end."""

from __future__ import annotations

import os
import queue
import socket

import pytest

from vmm_kvm.errors import HaltError
from vmm_kvm.virtio.ring_events import RingEvents

BROKEN = "the server gave up a ring"
_WAIT_S = 20.0


class Transport:
    """A Frontend that has an eventfd for ring 0 alone, and records calls."""

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self.told: queue.SimpleQueue[object] = queue.SimpleQueue()

    def interrupt(self, index: int) -> None:
        """Record it."""
        self.told.put(index)

    def interrupt_fd(self, index: int) -> int | None:
        """Return the eventfd of ring 0."""
        return None if index else self.fd

    def config_changed(self) -> None:
        """Never called by a server's events."""
        raise AssertionError

    def fail(self, reason: str) -> None:
        """Record the reason."""
        self.told.put(reason)

    def halt(self, err: HaltError) -> None:
        """Never called by a server's events."""
        raise err


@pytest.fixture
def events() -> RingEvents:
    """Events of two rings; the test closes them."""
    return RingEvents(2, "disk0")


def test_a_notification_reaches_its_own_ring(events: RingEvents) -> None:
    """A kick writes the eventfd of the ring's server, and no other."""
    events.kick(1)
    assert os.eventfd_read(events.kick_fd(1)) == 1
    with pytest.raises(BlockingIOError):
        os.eventfd_read(events.kick_fd(0))
    events.close()


def test_interrupts_take_the_shortest_way(events: RingEvents) -> None:
    """A ring with an eventfd of the transport's needs no call for interrupts; others have one."""
    transport = Transport(os.eventfd(0))
    assert events.call_fd(transport, 0) == transport.fd
    own = events.call_fd(transport, 1)
    assert own == events.call_fd(transport, 1)
    events.watch(transport, lambda: transport.fail(BROKEN))
    os.eventfd_write(own, 1)
    assert transport.told.get(timeout=_WAIT_S) == 1
    events.close()
    os.close(transport.fd)


def test_a_broken_ring_fails_the_device(events: RingEvents) -> None:
    """A write of the server to the error descriptor is a failure with the given reason."""
    transport = Transport(-1)
    events.watch(transport, lambda: transport.fail(BROKEN))
    os.eventfd_write(events.error_fd, 1)
    assert transport.told.get(timeout=_WAIT_S) == BROKEN
    events.close()


def test_the_end_of_the_connection_is_told_once(events: RingEvents) -> None:
    """A server's end is reported once, and other descriptors are watched further."""
    transport = Transport(-1)
    ours, theirs = socket.socketpair()
    events.watch(
        transport, lambda: transport.fail(BROKEN), ours.fileno(), lambda: transport.told.put("gone")
    )
    theirs.close()
    assert transport.told.get(timeout=_WAIT_S) == "gone"
    os.eventfd_write(events.error_fd, 1)
    assert transport.told.get(timeout=_WAIT_S) == BROKEN
    events.close()
    assert transport.told.empty()
    ours.close()


def test_nobody_is_told_after_unwatch(events: RingEvents) -> None:
    """Events between two watches are reported by the second."""
    transport = Transport(-1)
    events.watch(transport, lambda: transport.fail(BROKEN))
    events.unwatch()
    os.eventfd_write(events.error_fd, 1)
    assert transport.told.empty()
    events.watch(transport, lambda: transport.fail(BROKEN))
    assert transport.told.get(timeout=_WAIT_S) == BROKEN
    events.close()
    events.close()
