"""The control process: accepts clients, reads what they ask, and passes it to the parent.

It has no privileges. A client that sends what is no message is told so and cut off. The parent
works on few requests at a time; the others wait for their turn: users take turns, and so do the
connections of each. Control does not read from a client whose request waits, or that has not read
its answers. So no client holds up another, or makes memory grow.

Source: section 6 of OpenBSD's behaviour.
"""

import socket
from collections import Counter, deque
from contextlib import suppress
from itertools import count
from typing import Protocol, assert_never

from vmd.shared import log as logging
from vmd.wire.channel import (
    Channel,
    ChannelError,
    Credentials,
    Fds,
    Loop,
    MalformedError,
    OversizeError,
    Received,
    peer_credentials,
)
from vmd.wire.internal import (
    ClientAnswer,
    ClientGone,
    ClientRequest,
    Considered,
    ControlToParent,
    ParentToControl,
    SetVerbosity,
)
from vmd.wire.messages import (
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
"""Of one client; it is not read on before there are fewer."""
_CONSIDERED_MAX = 16
"""Requests that the parent works on, or has yet to read: another user's waits for as many at most,
and as many answers may come for clients that read none."""
_CLIENT_BACKLOG_MAX = 4 << 20
"""Bytes that a client has not read, beyond which it is cut off: events, and the answers to requests
from before the first answer had to wait."""
_ACCEPTED_AT_ONCE = 16


class _Client:
    """A connection."""

    __slots__ = ("channel", "number", "peer", "unanswered", "waiting")

    def __init__(
        self, number: int, channel: Channel[AnyAnswer, AnyRequest], peer: Credentials
    ) -> None:
        self.number = number
        self.channel = channel
        self.peer = peer
        self.unanswered = 0
        self.waiting: Received[AnyRequest] | None = None
        """What it asks once it is its turn; it is not read meanwhile."""


class _Turns:
    """Clients whose requests wait: users take turns, and the connections of each."""

    def __init__(self) -> None:
        self._of_users: dict[int, deque[_Client]] = {}  # whose turn it is comes first

    def add(self, client: _Client) -> None:
        self._of_users.setdefault(client.peer.uid, deque()).append(client)

    def remove(self, client: _Client) -> None:
        clients = self._of_users[client.peer.uid]
        clients.remove(client)
        if not clients:
            del self._of_users[client.peer.uid]

    def take(self) -> _Client | None:
        uid = next(iter(self._of_users), None)
        if uid is None:
            return None
        clients = self._of_users.pop(uid)
        client = clients.popleft()
        if clients:
            self._of_users[uid] = clients
        return client


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
        self._turns = _Turns()
        self._in_work = 0
        listener.setblocking(False)
        loop.add_reader(listener.fileno(), self._accept)
        parent.watch(loop, self._take, lambda _: loop.stop())

    def close(self) -> None:
        """End all connections and stop listening; the listening socket stays the caller's."""
        self._loop.remove_reader(self._listener.fileno())
        for client in self._clients.values():
            client.channel.close()
            if client.waiting:
                client.waiting.fds.close()
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
            # Whatever waits for a client holds its requests.
            channel = Channel(connection, DAEMON_TO_CLIENT, high_water=1)
            channel.add_source(channel)
            client = _Client(next(self._numbers), channel, peer)
            self._clients[client.number] = client
            self._per_user[peer.uid] += 1
            self._read(client)

    def _read(self, client: _Client) -> None:
        client.channel.watch(
            self._loop,
            lambda received: self._asked(client, received),
            lambda err: self._ended(client, err),
            burst=1,
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
        client.waiting = received
        client.channel.hold(client)
        self._turns.add(client)
        self._pass_on()

    def _pass_on(self) -> None:
        """Pass on the requests whose turn it is."""
        while self._in_work < _CONSIDERED_MAX and (client := self._turns.take()):
            assert client.waiting is not None
            request, fds = client.waiting
            client.waiting = None
            message = ClientRequest(
                client=client.number,
                uid=client.peer.uid,
                gid=client.peer.gid,
                pid=client.peer.pid,
                request=request,
            )
            try:
                self._parent.send(message, fds.take_all())
            except OversizeError as err:  # once it is wrapped
                client.channel.release(client)
                self._refuse(client, request.serial, ErrorCode.EINVAL, str(err))
                continue
            except ChannelError:  # the parent is gone, and the loop about to stop
                return
            self._in_work += 1
            client.unanswered += 1
            if client.unanswered < _UNANSWERED_MAX:
                client.channel.release(client)

    def _refuse(self, client: _Client, serial: int, code: ErrorCode, message: str) -> None:
        self._send(client, Failed(serial=serial, code=code, message=message), [])

    def _send(self, client: _Client, answer: AnyAnswer, fds: list[int]) -> None:
        if client.channel.backlog_size > _CLIENT_BACKLOG_MAX:
            Fds(fds).close()
            self._close(client)
            return
        try:
            client.channel.send(answer, fds)
        except (ChannelError, OversizeError):
            self._close(client)

    def _ended(self, client: _Client, err: ChannelError) -> None:
        if isinstance(err, MalformedError):
            self._refuse(client, 0, ErrorCode.EINVAL, str(err))
        self._close(client)

    def _close(self, client: _Client) -> None:
        """Forget a client; what it has not read is lost."""
        if self._clients.pop(client.number, None) is None:
            return
        self._per_user[client.peer.uid] -= 1
        if not self._per_user[client.peer.uid]:
            del self._per_user[client.peer.uid]
        client.channel.close()
        if client.waiting:
            client.waiting.fds.close()
            self._turns.remove(client)
        with suppress(ChannelError):  # the parent is gone, and the loop about to stop
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
                case Considered():
                    self._in_work -= 1
                    self._pass_on()
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
        if client.waiting is None:
            client.channel.release(client)


def _without_descriptors(answer: AnyAnswer) -> AnyAnswer:
    text = "the daemon has no descriptors left"
    return Failed(serial=answer.serial, code=ErrorCode.EAGAIN, message=text)
