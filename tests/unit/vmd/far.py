"""The other end of a channel, in the test's own event loop."""

from __future__ import annotations

import socket
from collections.abc import Callable, Sequence
from typing import Generic, Self, TypeVar

from vmd.wire.channel import Channel, ChannelError, Fds, Received
from vmd.wire.encoding import Wire
from vmm_kvm.loop import EventLoop

Sent = TypeVar("Sent")
Taken = TypeVar("Taken")
Kind = TypeVar("Kind")

_PATIENCE_NS = 20_000_000_000


def run_until(loop: EventLoop, is_so: Callable[[], bool]) -> None:
    """Run a loop until a condition holds, for some seconds at most."""
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


class Far(Generic[Sent, Taken]):
    """Sends and records messages of a channel; a context manager that closes all."""

    def __init__(self, loop: EventLoop, wire: Wire[Sent, Taken]) -> None:
        self.near, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.loop = loop
        self.channel = Channel(theirs, wire)
        self.channel.watch(loop, self._hear, self._end)
        self.heard: list[Taken] = []
        self.fds: list[Fds] = []
        self.has_ended = False

    def _hear(self, received: Received[Taken]) -> None:
        self.heard.append(received.message)
        self.fds.append(received.fds)

    def _end(self, _err: ChannelError) -> None:
        self.has_ended = True

    def say(self, message: Sent, fds: Sequence[int] = ()) -> None:
        """Send a message."""
        self.channel.send(message, fds)

    def of(self, kind: type[Kind]) -> list[Kind]:
        """Return the received messages of one kind."""
        return [one for one in self.heard if isinstance(one, kind)]

    def wait(self, kind: type[Kind], count: int = 1) -> Kind:
        """Run until `count` messages of a kind have arrived; returns the last of those."""
        run_until(self.loop, lambda: len(self.of(kind)) >= count)
        return self.of(kind)[count - 1]

    def fds_of(self, message: object) -> Fds:
        """Return the descriptors of a message."""
        return next(fds for one, fds in zip(self.heard, self.fds, strict=True) if one is message)

    def close(self) -> None:
        """Close the channel, its near end, and descriptors that were not taken; idempotent."""
        self.channel.close()
        self.near.close()
        for fds in self.fds:
            fds.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()
