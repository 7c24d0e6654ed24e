"""A process that the parent talks to, across its restarts: one class for every kind.

While there is no such process, messages to it are lost; `on_start` tells the next one the current
state. While too much waits for a process to read it, its sources are held.
"""

import socket
from collections.abc import Callable, Sequence
from typing import Generic, Protocol, TypeVar

from vmd.parent.patience import Patience
from vmd.wire.channel import (
    Channel,
    ChannelError,
    Fds,
    Loop,
    MalformedError,
    OversizeError,
    Received,
    Source,
)
from vmd.wire.encoding import Wire
from vmd.wire.internal import SetVerbosity
from vmm_kvm.log import Log

log = Log(__name__)

Sent = TypeVar("Sent")
Taken = TypeVar("Taken")


def _nothing() -> None:
    """Do nothing."""


class AnyPeer(Source, Protocol):
    """A peer with any messages, for starting, restarting and ending processes."""

    def started(self, connection: socket.socket, kill: Callable[[], None]) -> None:
        """Talk to a new process, which `kill` ends; takes ownership of `connection`."""

    def ended(self) -> None:
        """Note the end of the process; another may be started."""

    def give_up(self) -> None:
        """Account for there being no other process."""

    def close(self) -> None:
        """Let the process end; idempotent."""

    def set_verbosity(self, level: int) -> None:
        """Set the verbosity of the process and its successors."""

    def add_source(self, source: Source) -> None:
        """Hold `source` while too much waits for the process to read it."""


class Peer(Generic[Sent, Taken]):
    """The parent's side of one kind of process. For one thread."""

    def __init__(
        self,
        name: str,
        wire: Wire[Sent | SetVerbosity, Taken],
        loop: Loop,
        on_message: Callable[[Taken, Fds], None],
        *,
        on_start: Callable[[], None] = _nothing,
        on_end: Callable[[], None] = _nothing,
        on_give_up: Callable[[], None] = _nothing,
        patience_ns: int | None = None,
    ) -> None:
        """Begin without a process.

        `on_message` may take the descriptors that came along; the others are closed. `on_start` is
        called when a process can be sent to, `on_end` when it is gone, `on_give_up` when there will
        be no other. A process that sends a malformed message is killed; so is one that leaves the
        channel to it full for `patience_ns`. `on_message` may raise MalformedError for both.
        """
        self._name = name
        self._wire = wire
        self._loop = loop
        self._on_message = on_message
        self._on_start = on_start
        self._on_end = on_end
        self._on_give_up = on_give_up
        self._patience = Patience(loop, patience_ns, self._lose_patience)
        self._kill = _nothing
        self._channel: Channel[Sent | SetVerbosity, Taken] | None = None
        self._sources: list[Source] = []
        self._holds: list[object] = []
        self._verbosity = 0

    @property
    def is_there(self) -> bool:
        """Whether there is a process."""
        return self._channel is not None

    def started(self, connection: socket.socket, kill: Callable[[], None]) -> None:
        """Talk to a new process, which `kill` ends; takes ownership of `connection`."""
        channel = self._channel = Channel(connection, self._wire)
        self._kill = kill
        for source in (self._patience, *self._sources):
            channel.add_source(source)
        for reason in self._holds:
            channel.hold(reason)
        channel.watch(self._loop, self._take, self._cut)
        self.send(SetVerbosity(level=self._verbosity))
        self._on_start()

    def ended(self) -> None:
        """Note the end of the process; another may be started."""
        self.close()
        self._on_end()

    def give_up(self) -> None:
        """Account for there being no other process."""
        self._on_give_up()

    def close(self) -> None:
        """Let the process end; idempotent."""
        if self._channel:
            channel, self._channel = self._channel, None
            channel.close()

    def set_verbosity(self, level: int) -> None:
        """Set the verbosity of the process and its successors."""
        self._verbosity = level
        self.send(SetVerbosity(level=level))

    def send(self, message: Sent | SetVerbosity, fds: Sequence[int] = ()) -> bool:
        """Send a message; takes ownership of `fds`. Returns whether there is a process to read it.

        A message that is too large is logged, and lost.
        """
        try:
            return self.send_or_raise(message, fds)
        except OversizeError as err:
            log.warning("%s: %s", self._name, err)
            return False

    def send_or_raise(self, message: Sent | SetVerbosity, fds: Sequence[int] = ()) -> bool:
        """Send a message as `send` does, for a caller who can send a smaller one instead.

        Raises:
            OversizeError: the message is too large.
        """
        if self._channel is None:
            Fds(fds).close()
            return False
        try:
            self._channel.send(message, fds)
        except ChannelError as err:  # the process has ended; its parent is about to be told
            log.warning("%s: %s", self._name, err)
            return False
        return True

    # Back-pressure

    def add_source(self, source: Source) -> None:
        """Hold `source` while too much waits for the process to read it."""
        self._sources.append(source)
        if self._channel:
            self._channel.add_source(source)

    def hold(self, reason: object) -> None:
        """Stop reading from the process until `reason` is released."""
        self._holds.append(reason)
        if self._channel:
            self._channel.hold(reason)

    def release(self, reason: object) -> None:
        """Read on, unless there are other reasons not to."""
        self._holds = [one for one in self._holds if one is not reason]
        if self._channel:
            self._channel.release(reason)

    # Messages

    def _take(self, received: Received[Taken]) -> None:
        with received.fds as fds:
            try:
                self._on_message(received.message, fds)
            except MalformedError as err:
                self._cut(err)

    def _cut(self, err: ChannelError) -> None:
        """The channel has ended with the process, or a malformed message: then kill it."""
        if isinstance(err, MalformedError) and self._channel:
            log.error("%s: %s", self._name, err)
            self._channel.close()
            self._kill()

    def _lose_patience(self) -> None:
        log.error("%s does not read: killed", self._name)
        self._kill()
