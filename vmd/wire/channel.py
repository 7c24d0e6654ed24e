"""Messages with descriptors over a UNIX SOCK_SEQPACKET socket: one packet is one message.

Every descriptor has one owner at each moment. Those that are sent are the channel's from the call
of `send` on; those that arrive are the `Fds` of their message, which closes the ones not taken. A
peer that sends a malformed message is disconnected.

`send` never blocks and drops nothing: messages that the peer has no room for wait here. A channel
where too many wait is full, which is no error. It holds its sources, the channels whose messages
make
this end send: nothing is read from a source that is held, until the peer has read most of
what waits.

Source: unix(7)
"""

import errno
import fcntl
import os
import select
import socket
import struct
import termios
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Generic, NamedTuple, Protocol, Self, TypeVar
from weakref import WeakSet

from vmd.wire.ancillary import (
    CREDENTIALS_SIZE,
    FDS_MAX,
    RIGHTS_SIZE,
    descriptors,
    rights,
    sender_pid,
)
from vmd.wire.encoding import Wire, WireError
from vmm_kvm.clock import NANOSECONDS

Sent = TypeVar("Sent")
Taken = TypeVar("Taken")

MESSAGE_MAX = 256 << 10
"""Bytes of one message."""
HIGH_WATER = 1 << 20
"""Waiting bytes from which on a channel is full. Messages that its sources sent before they were
held may add to them."""
BURST = 32
"""Messages of one peer that are read in a row, while others wait."""
_LOW_WATER_SHARE = 4  # of the high water, which is the low one
_RETRY_NS = 10_000_000
_PASSING = frozenset({errno.ENOBUFS, errno.ENOMEM, errno.ETOOMANYREFS})
"""Temporary errors: the host is short of memory, or has too many of our user's descriptors in
flight."""

_INT = struct.Struct("=i")


class ChannelError(Exception):
    """The channel is of no further use; `str()` is one line."""


class ChannelClosedError(ChannelError):
    """The peer has closed its end, or its process is gone."""


class MalformedError(ChannelError):
    """The peer sent something that is no message for this end."""


class DescriptorsLostError(ChannelError):
    """A message came without its descriptors; this is no fault of its sender or the channel."""


class PeerHangsError(ChannelError):
    """The peer does not read, or answer, in the time that it has."""


class OversizeError(Exception):
    """A message of ours is too large to send; the channel stays usable. One line."""


class Source(Protocol):
    """Anything that makes a channel's owner send on it."""

    def hold(self, reason: object) -> None:
        """Stop until `reason`, which is compared by identity, is released."""

    def release(self, reason: object) -> None:
        """Continue, unless held for other reasons; releasing an unknown one is harmless."""


class Timer(Protocol):
    """Calls back once, some time after it was armed."""

    def arm(self, deadline_ns: int) -> None:
        """Fire at `deadline_ns` on the loop's clock."""

    def cancel(self) -> None:
        """Do not fire."""


class Loop(Protocol):
    """The event loop, as far as a channel needs it."""

    def monotonic_ns(self) -> int:
        """Return nanoseconds on the loop's clock."""

    def timer(self, callback: Callable[[], None]) -> Timer:
        """Make a timer that is not armed."""

    def add_reader(self, fd: int, callback: Callable[[], None]) -> bool:
        """Call `callback` while `fd` is readable."""

    def add_writer(self, fd: int, callback: Callable[[], None]) -> bool:
        """Call `callback` while `fd` is writable."""

    def remove_reader(self, fd: int) -> None:
        """Forget the reader of `fd`, if there is one."""

    def remove_writer(self, fd: int) -> None:
        """Forget the writer of `fd`, if there is one."""


class Fds:
    """Descriptors of a message; a context manager that closes those that were not taken."""

    __slots__ = ("_fds", "are_lost")

    def __init__(self, fds: Sequence[int] = (), *, are_lost: bool = False) -> None:
        """Take ownership of `fds`."""
        self._fds: list[int | None] = list(fds)
        self.are_lost = are_lost
        """The message had more descriptors than allowed, or than this process has room for: none
        was kept."""

    def __len__(self) -> int:
        """Return how many came, taken or not."""
        return len(self._fds)

    def take(self, index: int) -> int:
        """Hand a descriptor over to the caller, who closes it.

        Raises:
            MalformedError: there is none of that index, or it has been taken: the message that
                names it is wrong.
            DescriptorsLostError: they are lost.
        """
        self.check()
        fd = self._fds[index] if 0 <= index < len(self._fds) else None
        if fd is None:
            raise MalformedError(f"descriptor {index} of {len(self._fds)} is missing")
        self._fds[index] = None
        return fd

    def add(self, fd: int) -> int:
        """Take ownership of another one; returns it."""
        self._fds.append(fd)
        return fd

    def check(self) -> None:
        """Go on, unless they are lost.

        Raises:
            DescriptorsLostError: they are.
        """
        if self.are_lost:
            text = f"more than {FDS_MAX} descriptors, or this process has none left"
            raise DescriptorsLostError(text)

    def spread(self, places: Sequence[int]) -> None:
        """Renumber them: from now on only their indices in `places` are valid.

        Raises:
            MalformedError: there are not as many places as descriptors that nobody has taken, or
                one is no index of a descriptor.
            DescriptorsLostError: they are lost.
        """
        self.check()
        if len(self.left) != len(places) or not all(0 <= place < FDS_MAX for place in places):
            raise MalformedError(f"{len(self.left)} descriptors for {len(places)} places")
        found = dict(zip(places, self.take_all(), strict=True))
        self._fds = [found.get(place) for place in range(FDS_MAX)]

    @property
    def places(self) -> list[int]:
        """The indices of those that have not been taken."""
        return [index for index, fd in enumerate(self._fds) if fd is not None]

    @property
    def left(self) -> list[int]:
        """Those that have not been taken, in order; they stay this object's."""
        return [fd for fd in self._fds if fd is not None]

    def take_all(self) -> list[int]:
        """Hand over, in order, all that have not been taken."""
        left = self.left
        self._fds = [None] * len(self._fds)
        return left

    def close(self) -> None:
        """Close the remaining ones; idempotent."""
        for fd in self.take_all():
            os.close(fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


class Received(NamedTuple, Generic[Taken]):
    """A message; the receiver closes `fds`, by using them as a context manager."""

    message: Taken
    fds: Fds
    size: int = 0
    """Bytes of the message."""


class Channel(Generic[Sent, Taken]):
    """One end of a connection; owns its socket, which does not block. For one thread.

    With `watch`, the loop sends waiting messages when the peer has room.
    """

    def __init__(
        self,
        connection: socket.socket,
        wire: Wire[Sent, Taken],
        *,
        high_water: int = HIGH_WATER,
        sent_max: int = MESSAGE_MAX,
        asks_pids: bool = False,
        take_fds: Callable[[Sequence[int]], list[int] | None] | None = None,
    ) -> None:
        """Take ownership of `connection`, a connected UNIX SOCK_SEQPACKET socket.

        The channel is full from `high_water` bytes on that wait for the peer. Messages of up to
        `sent_max` bytes can be sent; the kernel keeps some for a peer that does not read. With
        `asks_pids`, the kernel tells which process has sent a message, from now on. `take_fds`
        takes over the descriptors that arrive, and returns what is to be in their place; None if
        they are lost.
        """
        connection.setblocking(False)
        # The kernel refuses a packet larger than the send buffer, whose size it doubles.
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, sent_max)
        self.sender_pid = 0
        """The process that sent the last message; 0 without `asks_pids`."""
        self._ancillary_size = RIGHTS_SIZE
        if asks_pids:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
            self._ancillary_size += CREDENTIALS_SIZE
        self._sent_max = sent_max
        self._take_fds = take_fds
        self._socket = connection
        self._wire = wire
        self._high_water = high_water
        self._backlog: deque[tuple[bytes, Fds]] = deque()
        self._backlog_size = 0
        self._is_full = False
        self._sources: WeakSet[Source] = WeakSet()
        self._loop: Loop | None = None
        self._retry: Timer | None = None
        self._is_short = False
        self._read: Callable[[], None] | None = None
        self._holds: list[object] = []
        self._closes_when_sent = False

    def fileno(self) -> int:
        """Return the socket's descriptor, to wait for; -1 once closed."""
        return self._socket.fileno()

    @property
    def is_closed(self) -> bool:
        """Whether `close` has been called."""
        return self._socket.fileno() < 0

    @property
    def backlog_size(self) -> int:
        """Bytes that wait for the peer to read."""
        return self._backlog_size

    def close(self) -> None:
        """Leave the loop, close the socket, drop unsent messages; idempotent."""
        if self.is_closed:
            return
        self._read = None
        if self._loop:
            self._loop.remove_reader(self.fileno())
            self._loop.remove_writer(self.fileno())
            self._loop = None
        if self._retry:
            self._retry.cancel()
        self._socket.close()
        self._forget_backlog()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    # Back-pressure

    @property
    def is_read(self) -> bool:
        """Whether the peer has read everything.

        Source: unix(7), "SIOCOUTQ".
        """
        if self.is_closed or self._backlog:
            return False
        (size,) = _INT.unpack(fcntl.ioctl(self.fileno(), termios.TIOCOUTQ, bytes(_INT.size)))
        return bool(size == 0)

    @property
    def is_full(self) -> bool:
        """Whether too much waits for the peer to produce more for it."""
        return self._is_full

    def add_source(self, source: Source) -> None:
        """Hold `source` whenever this channel is full; it may be this channel.

        A source that is closed or unreferenced need not be removed.
        """
        self._sources.add(source)
        if self._is_full:
            source.hold(self)

    def hold(self, reason: object) -> None:
        """Read no messages until `reason` is released; the peer's end is not noticed either."""
        if not any(one is reason for one in self._holds):
            self._holds.append(reason)
            self._listen()

    def release(self, reason: object) -> None:
        """Read on, unless held for other reasons; releasing an unknown one is harmless."""
        self._holds = [one for one in self._holds if one is not reason]
        self._listen()

    def _look_how_full(self) -> None:
        if self._is_full:
            is_full = self._backlog_size > self._high_water // _LOW_WATER_SHARE
        else:
            is_full = self._backlog_size >= self._high_water
        if is_full == self._is_full:
            return
        self._is_full = is_full
        for source in tuple(self._sources):
            if is_full:
                source.hold(self)
            else:
                source.release(self)

    # Sending

    def send(self, message: Sent, fds: Sequence[int] = ()) -> None:
        """Send a message, now or as soon as the peer has room; takes ownership of `fds`.

        Raises:
            OversizeError: the message is too large; nothing is sent.
            ChannelClosedError: the peer is gone.
        """
        with ExitStack() as stack:
            owned = stack.enter_context(Fds(fds))
            data = self._wire.encode(message)
            if self.is_closed:
                raise ChannelClosedError("the channel is closed")
            if len(data) > self._sent_max or len(fds) > FDS_MAX:
                raise OversizeError(f"a message of {len(data)} bytes, {len(fds)} descriptors")
            if not self._backlog and self._transmit(data, fds):
                return
            stack.pop_all()
            self._backlog.append((data, owned))
            self._backlog_size += len(data)
            if self._loop and len(self._backlog) == 1:
                self._loop.add_writer(self.fileno(), self._send_backlog)
            self._look_how_full()

    def flush(self) -> bool:
        """Send waiting messages as far as the peer has room; returns whether none is left.

        Raises:
            ChannelError: the peer is gone, or cannot be sent to.
        """
        while self._backlog:
            data, fds = self._backlog[0]
            if not self._transmit(data, fds.left):
                break
            self._backlog.popleft()
            self._backlog_size -= len(data)
            fds.close()
        self._look_how_full()
        return not self._backlog

    def send_all(self, timeout_s: float) -> None:
        """Send waiting messages, within `timeout_s` seconds; for a trusted peer.

        Raises:
            PeerHangsError: the peer has not made room in time.
            ChannelError: the peer is gone, or cannot be sent to.
        """
        deadline = time.monotonic() + timeout_s
        while not self.flush():
            if self._is_short:
                time.sleep(_RETRY_NS / NANOSECONDS)
            if not self._wait_for(0 if self._is_short else select.POLLOUT, deadline):
                raise PeerHangsError(f"has not read for {timeout_s:g} s")

    def close_when_sent(self) -> None:
        """Close as soon as everything is sent; read no more."""
        self._closes_when_sent = True
        if not self._backlog:
            self.close()
        else:
            self._listen()

    def _send_backlog(self) -> None:
        assert self._loop is not None
        try:
            if not self.flush():
                if self._is_short:  # the peer has room, and the loop would call back at once
                    self._loop.remove_writer(self.fileno())
                    self._retry = self._retry or self._loop.timer(self._retry_backlog)
                    self._retry.arm(self._loop.monotonic_ns() + _RETRY_NS)
                return
        except ChannelError:
            # The reader of this channel finds its end.
            self._forget_backlog()
        if self._loop is not None:  # a source that was released may have closed it
            self._loop.remove_writer(self.fileno())
        if self._closes_when_sent:
            self.close()

    def _retry_backlog(self) -> None:
        if self._loop and self._backlog:
            self._loop.add_writer(self.fileno(), self._send_backlog)

    def _forget_backlog(self) -> None:
        for _, fds in self._backlog:
            fds.close()
        self._backlog.clear()
        self._backlog_size = 0
        self._look_how_full()

    def _transmit(self, data: bytes, fds: Sequence[int]) -> bool:
        """Send one packet; False if there is no room for it now, or the host is short of it."""
        try:
            self._socket.sendmsg([data], rights(fds), socket.MSG_NOSIGNAL)
        except BlockingIOError:
            self._is_short = False
            return False
        except ConnectionError as err:
            raise ChannelClosedError(f"cannot send: {err.strerror}") from err
        except OSError as err:
            if err.errno in _PASSING:
                self._is_short = True
                return False
            raise ChannelError(f"cannot send: {err.strerror}") from err
        return True

    # Receiving

    def receive(self) -> Received[Taken]:
        """Return the next message; its descriptors may be lost.

        Raises:
            BlockingIOError: there is none yet.
            MalformedError: there is no message for this end; its descriptors are closed.
            ChannelClosedError: the peer is gone.
        """
        try:
            data, ancillary, flags = self._receive_packet()
        except BlockingIOError:
            raise
        except OSError as err:
            raise ChannelClosedError(f"cannot receive: {err.strerror}") from err
        with ExitStack() as stack:
            fds = stack.enter_context(self._arrived(descriptors(ancillary)))
            if not data:  # the end; or an empty packet, which is no message either
                raise ChannelClosedError("the peer has closed the connection")
            if flags & socket.MSG_TRUNC:
                raise MalformedError(f"a message of more than {MESSAGE_MAX} bytes")
            if flags & socket.MSG_CTRUNC:
                # How many have come depends on this process's open files.
                fds.close()
                fds.are_lost = True
            try:
                message = self._wire.decode(data)
            except WireError as err:
                raise MalformedError(f"not a message: {err}") from err
            stack.pop_all()
        self.sender_pid = sender_pid(ancillary)
        return Received(message, fds, len(data))

    def _arrived(self, fds: list[int]) -> Fds:
        taken = fds if self._take_fds is None else self._take_fds(fds)
        return Fds(are_lost=True) if taken is None else Fds(taken)

    def wait(self, timeout_s: float | None = None) -> Received[Taken]:
        """Return the next message, within `timeout_s` seconds; None for however long it takes.

        Raises:
            PeerHangsError: there is none in time.
            MalformedError, ChannelClosedError: as `receive` does.
        """
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        while self._wait_for(select.POLLIN, deadline):
            try:
                return self.receive()
            except BlockingIOError:  # another process has read it
                continue
        raise PeerHangsError(f"has not answered for {timeout_s:g} s")

    def _wait_for(self, events: int, deadline: float | None) -> bool:
        """Wait until the socket is ready for one of `events`, if any; False after `deadline`."""
        left_ms = None if deadline is None else (deadline - time.monotonic()) * 1000
        if left_ms is not None and left_ms <= 0:
            return False
        if not events:
            return True
        poll = select.poll()
        poll.register(self.fileno(), events)
        return bool(poll.poll(left_ms))

    def _receive_packet(self) -> tuple[bytes, list[tuple[int, int, bytes]], int]:
        size = MESSAGE_MAX, self._ancillary_size, socket.MSG_CMSG_CLOEXEC
        try:
            # Not socket.recv_fds, which ignores its flags (python/cpython#107898).
            return self._socket.recvmsg(*size)[:3]
        except ConnectionResetError:
            # The peer closed without reading everything; its own messages are still there.
            return self._socket.recvmsg(*size)[:3]

    def watch(
        self,
        loop: Loop,
        on_message: Callable[[Received[Taken]], None],
        on_end: Callable[[ChannelError], None],
        *,
        burst: int = BURST,
    ) -> None:
        """Let `loop` call `on_message` for each message, and `on_end` once when there is no more.

        At most `burst` messages are taken in a row, while others wait. `on_message` owns the
        message's descriptors. Before `on_end`, the channel leaves the loop; it is not closed: an
        answer to a malformed message may still be sent.
        """
        self._loop = loop
        self._read = lambda: self._receive_some(on_message, on_end, burst)
        self._listen()
        if self._backlog:
            loop.add_writer(self.fileno(), self._send_backlog)

    def _listen(self) -> None:
        """Register for messages with the loop, unless held."""
        if self._loop is None:
            return
        if self._read and not self._holds and not self._closes_when_sent:
            self._loop.add_reader(self.fileno(), self._read)
        else:
            self._loop.remove_reader(self.fileno())

    def _receive_some(
        self,
        on_message: Callable[[Received[Taken]], None],
        on_end: Callable[[ChannelError], None],
        burst: int,
    ) -> None:
        for _ in range(burst):
            # The last message's handler may have closed or held this channel.
            if self.is_closed or self._closes_when_sent or self._holds:
                return
            try:
                received = self.receive()
            except BlockingIOError:
                return
            except ChannelError as err:
                self._read = None
                self._listen()
                on_end(err)
                return
            on_message(received)


def channel_pair(
    one: Wire[Sent, Taken], other: Wire[Taken, Sent]
) -> tuple[Channel[Sent, Taken], Channel[Taken, Sent]]:
    """Make two connected channels; the caller closes both."""
    left, right = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    return Channel(left, one), Channel(right, other)
