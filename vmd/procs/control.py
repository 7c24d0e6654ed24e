"""The control process: accepts clients, reads what they ask, and passes it to the parent.

It has no privileges. A client that sends what is no message is told so and cut off; one that asks
faster than it is answered is not read meanwhile; one that does not read its answers is cut off. So
no client holds up another, or makes memory grow.

Source: section 6 of OpenBSD's behaviour.
"""

import socket
from collections import Counter
from itertools import count
from typing import Protocol, assert_never

from vmd import log as logging
from vmd.channel import (
    Channel,
    ChannelError,
    Credentials,
    Loop,
    MalformedError,
    Received,
    peer_credentials,
)
from vmd.internal import (
    ClientAnswer,
    ClientGone,
    ClientRequest,
    CloseClient,
    ControlToParent,
    ParentToControl,
    SetVerbosity,
)
from vmd.messages import (
    DAEMON_TO_CLIENT,
    PROTOCOL_VERSION,
    AnyAnswer,
    AnyRequest,
    ErrorCode,
    Event,
    Failed,
    Vms,
)

CLIENTS_MAX = 1024
"""Connections at a time; root may always make some more."""
CLIENTS_PER_USER = 256
"""Of an ordinary user."""
_CLIENTS_OF_ROOT = 64
_UNANSWERED_MAX = 32
_PARENT_BACKLOG_MAX = 1 << 20
_ACCEPTED_AT_ONCE = 16


class _Client:
    """A connection."""

    __slots__ = ("channel", "is_reading", "number", "peer", "unanswered")

    def __init__(
        self, number: int, channel: Channel[AnyAnswer, AnyRequest], peer: Credentials
    ) -> None:
        self.number = number
        self.channel = channel
        self.peer = peer
        self.unanswered = 0
        self.is_reading = False


class Stopper(Loop, Protocol):
    """An event loop that can be stopped."""

    def stop(self) -> None:
        """Let it return."""


class Control:
    """The control process's work, on the event loop's thread."""

    def __init__(
        self,
        loop: Stopper,
        parent: Channel[ControlToParent, ParentToControl],
        listener: socket.socket,
    ) -> None:
        """Serve clients of `listener`, a listening SOCK_SEQPACKET socket, until `parent` ends."""
        self._loop = loop
        self._parent = parent
        self._listener = listener
        self._clients: dict[int, _Client] = {}
        self._per_user: Counter[int] = Counter()
        self._numbers = count(1)
        listener.setblocking(False)
        loop.add_reader(listener.fileno(), self._accept)
        parent.watch(loop, self._take, lambda _: loop.stop())

    def close(self) -> None:
        """End all connections and stop listening; the listening socket stays the caller's."""
        self._loop.remove_reader(self._listener.fileno())
        for client in self._clients.values():
            client.channel.close()
        self._clients.clear()

    # Clients

    def _accept(self) -> None:
        for _ in range(_ACCEPTED_AT_ONCE):
            try:
                connection, _address = self._listener.accept()
            except OSError:  # there is none, or it went away again
                return
            peer = peer_credentials(connection)
            limit = CLIENTS_MAX + (_CLIENTS_OF_ROOT if peer.uid == 0 else 0)
            if len(self._clients) >= limit or (
                peer.uid != 0 and self._per_user[peer.uid] >= CLIENTS_PER_USER
            ):
                connection.close()
                continue
            client = _Client(next(self._numbers), Channel(connection, DAEMON_TO_CLIENT), peer)
            self._clients[client.number] = client
            self._per_user[peer.uid] += 1
            self._read(client)

    def _read(self, client: _Client) -> None:
        client.is_reading = True
        client.channel.watch(
            self._loop,
            lambda received: self._asked(client, received),
            lambda err: self._ended(client, err),
        )

    def _asked(self, client: _Client, received: Received[AnyRequest]) -> None:
        request = received.message
        if request.version != PROTOCOL_VERSION:
            received.fds.close()
            text = f"this daemon speaks version {PROTOCOL_VERSION}"
            self._refuse(client, request.serial, ErrorCode.VERSION, text)
            return
        if received.fds.are_lost:
            text = "too many descriptors, or the daemon has none left"
            self._refuse(client, request.serial, ErrorCode.EAGAIN, text)
            return
        if self._parent.backlog_size > _PARENT_BACKLOG_MAX:
            received.fds.close()
            self._refuse(client, request.serial, ErrorCode.EAGAIN, "the daemon is busy")
            return
        message = ClientRequest(
            client=client.number,
            uid=client.peer.uid,
            gid=client.peer.gid,
            pid=client.peer.pid,
            request=request,
        )
        try:
            self._parent.send(message, received.fds.take_all())
        except ChannelError as err:  # too large once it is wrapped, or the parent is gone
            self._refuse(client, request.serial, ErrorCode.EINVAL, str(err))
            return
        client.unanswered += 1
        if client.unanswered >= _UNANSWERED_MAX:
            client.is_reading = False
            self._loop.remove_reader(client.channel.fileno())

    def _refuse(self, client: _Client, serial: int, code: ErrorCode, message: str) -> None:
        self._send(client, Failed(serial=serial, code=code, message=message), [])

    def _send(self, client: _Client, answer: AnyAnswer, fds: list[int]) -> None:
        try:
            client.channel.send(answer, fds)
        except ChannelError:
            self._close(client)

    def _ended(self, client: _Client, err: ChannelError) -> None:
        if isinstance(err, MalformedError):
            self._refuse(client, 0, ErrorCode.EINVAL, str(err))
        self._close(client)

    def _close(self, client: _Client, *, is_sent: bool = False) -> None:
        """Forget a client; unless `is_sent`, what it has not read is lost."""
        if self._clients.pop(client.number, None) is None:
            return
        self._per_user[client.peer.uid] -= 1
        if not self._per_user[client.peer.uid]:
            del self._per_user[client.peer.uid]
        if not is_sent or not client.channel.backlog_size:
            client.channel.close()
        self._parent.send(ClientGone(client=client.number))

    # The parent

    def _take(self, received: Received[ParentToControl]) -> None:
        with received.fds as fds:
            match received.message:
                case ClientAnswer(client=number, answer=answer):
                    client = self._clients.get(number)
                    if client and fds.are_lost:
                        self._answer(client, _without_descriptors(answer), [])
                    elif client:
                        self._answer(client, answer, fds.take_all())
                case CloseClient(client=number):
                    client = self._clients.get(number)
                    if client:
                        client.channel.close_when_sent()
                        self._close(client, is_sent=True)
                case SetVerbosity(level=level):
                    logging.set_verbosity(level)
                case _:
                    assert_never(received.message)

    def _answer(self, client: _Client, answer: AnyAnswer, fds: list[int]) -> None:
        self._send(client, answer, fds)
        is_part = isinstance(answer, Event) or (isinstance(answer, Vms) and answer.has_more)
        if is_part or client.channel.is_closed:
            return
        client.unanswered -= 1
        if not client.is_reading and client.unanswered < _UNANSWERED_MAX:
            self._read(client)


def _without_descriptors(answer: AnyAnswer) -> AnyAnswer:
    text = "the daemon has no descriptors left"
    return Failed(serial=answer.serial, code=ErrorCode.EAGAIN, message=text)
