"""The control process: accepts clients, reads their requests, and passes them to the parent.

It has no privileges. A client that sends a malformed message gets an error and is disconnected. The
parent works on few requests at a time; the others wait for their turn: users take turns, and so do
the connections of each. Control does not read from a client whose request waits, or whose answers
are unread, so that no client delays another or makes memory grow.

Source: section 6 of OpenBSD's behaviour.
"""

import os
import socket
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from itertools import count
from typing import Protocol, assert_never

from vmd.control.clients import (
    CLIENTS_PER_USER,
    EVENTS_UNREAD_MAX,
    IN_WORK_MAX,
    Client,
    Turns,
    User,
)
from vmd.control.files import ClientFiles
from vmd.shared import log as logging
from vmd.wire.ancillary import peer_credentials
from vmd.wire.channel import (
    Channel,
    ChannelError,
    Fds,
    Loop,
    MalformedError,
    OversizeError,
    Received,
)
from vmd.wire.internal import (
    CLIENTS_MAX,
    CLIENTS_OF_ROOT,
    ClientAnswer,
    ClientCame,
    ClientGone,
    ClientRequest,
    Considered,
    ControlToParent,
    Happened,
    KeepFile,
    ParentToControl,
    SetVerbosity,
)
from vmd.wire.messages import (
    ANSWER_MAX,
    DAEMON_TO_CLIENT,
    AnyAnswer,
    AnyRequest,
    Done,
    ErrorCode,
    Event,
    Events,
    Failed,
    ParentRequest,
    Vms,
)
from vmd.wire.parts import PROTOCOL_VERSION
from vmm_kvm.accepting import Acceptor

_ACCEPTED_AT_ONCE = 16


class Stopper(Loop, Protocol):
    """An event loop that can be stopped."""

    def call_soon(self, callback: Callable[[], None]) -> None:
        """Run `callback` on the loop's thread; from any thread."""

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
        self._clients: dict[int, Client] = {}
        self._listening: dict[int, Client] = {}  # to events
        self._users: dict[int, User] = {}
        self._numbers = count(1)
        self._turns = Turns()
        self._in_work = 0
        # With `vmd --user`, the only user is ours.
        self._files = ClientFiles(loop, {0, os.getuid()}, self._read_on)
        listener.setblocking(False)
        self._acceptor = Acceptor(loop, listener, self._came, burst=_ACCEPTED_AT_ONCE)
        self._acceptor.start()
        parent.watch(loop, self._take, lambda _: loop.stop())

    def close(self) -> None:
        """End all connections and stop listening; the listening socket stays the caller's."""
        self._acceptor.stop()
        self._turns = Turns()
        for client in self._clients.values():
            client.close()
        self._clients.clear()
        self._listening.clear()

    # Clients

    def _came(self, connection: socket.socket) -> None:
        peer = peer_credentials(connection)
        channel = Channel(
            connection,
            DAEMON_TO_CLIENT,
            high_water=1,
            sent_max=ANSWER_MAX,
            take_fds=partial(self._files.take, peer.uid),
        )
        user = self._users.get(peer.uid) or User()
        limit = CLIENTS_MAX + (CLIENTS_OF_ROOT if peer.uid == 0 else 0)
        if len(self._clients) >= limit or (peer.uid != 0 and len(user.clients) >= CLIENTS_PER_USER):
            self._turn_away(channel, user)
            return
        client = Client(next(self._numbers), channel, peer, user, self._pass_on)
        channel.add_source(client)
        self._users[peer.uid] = user
        self._clients[client.number] = user.clients[client.number] = client
        self._read(client)

    def _turn_away(self, channel: Channel[AnyAnswer, AnyRequest], user: User) -> None:
        text = "you have too many connections" if user.clients else "too many connections"
        with channel, suppress(ChannelError):  # it may be gone by now
            channel.send(Failed(code=ErrorCode.EAGAIN, message=text))

    def _read(self, client: Client) -> None:
        client.channel.watch(
            self._loop,
            lambda received: self._asked(client, received),
            lambda err: self._ended(client, err),
            burst=1,
        )
        self._hold_if_behind(client)

    def _hold_if_behind(self, client: Client) -> None:
        """Read from no connection of a user whose files cannot be closed."""
        if self._files.is_behind(client.peer.uid):
            for one in client.user.clients.values():
                one.channel.hold(self._files)

    def _read_on(self, uid: int) -> None:
        """Read from a user's connections, now that a file of it has been closed."""
        if uid in self._users and not self._files.is_behind(uid):
            for client in tuple(self._users[uid].clients.values()):
                client.channel.release(self._files)

    def _asked(self, client: Client, received: Received[AnyRequest]) -> None:
        request, fds, size = received
        self._hold_if_behind(client)
        if request.version != PROTOCOL_VERSION:
            fds.close()
            text = f"this daemon speaks version {PROTOCOL_VERSION}"
            self._refuse(client, request.serial, ErrorCode.VERSION, text)
            return
        if isinstance(request, Events):
            fds.close()
            self._listen(client, request.serial)
            return
        waiting = Received[ParentRequest](request, fds, size)
        refusal = client.refusal(waiting)
        if refusal:
            fds.close()
            self._refuse(client, request.serial, ErrorCode.EAGAIN, refusal)
            return
        client.wait(waiting)
        self._turns.add(client)
        self._pass_on()

    def _listen(self, client: Client, serial: int) -> None:
        if client.events is not None:
            text = "this connection is told of events already"
            self._refuse(client, serial, ErrorCode.EALREADY, text)
            return
        client.events = serial
        self._listening[client.number] = client
        self._send(client, Done(serial=serial), [])

    def _pass_on(self) -> None:
        """Pass on the requests whose turn it is."""
        while self._in_work < IN_WORK_MAX and (client := self._turns.take()):
            request, fds, _size = client.take()
            message = ClientRequest(client=client.number, request=request)
            try:
                self._introduce(client)
                self._parent.send(message, fds.take_all())
            except OversizeError as err:  # once it is wrapped
                client.read_on()
                self._refuse(client, request.serial, ErrorCode.EINVAL, str(err))
                continue
            except ChannelError:  # the parent is gone, and the loop about to stop
                return
            self._in_work += 1
            client.given(request)

    def _introduce(self, client: Client) -> None:
        """Hand the connection to the parent, which asks the kernel for its user.

        Raises:
            ChannelError: the parent is gone.
        """
        if client.has_come:
            return
        client.has_come = True
        try:
            fds = [os.dup(client.channel.fileno())]
        except OSError:  # none left: the parent refuses this client's requests
            fds = []
        self._parent.send(ClientCame(client=client.number), fds)

    def _refuse(self, client: Client, serial: int, code: ErrorCode, message: str) -> None:
        self._send(client, Failed(serial=serial, code=code, message=message), [])

    def _send(self, client: Client, answer: AnyAnswer, fds: list[int]) -> None:
        try:
            client.channel.send(answer, fds)
        except OversizeError as err:
            self._refuse(client, answer.serial, ErrorCode.EIO, f"the answer would be {err}")
        except ChannelError:
            self._close(client)

    def _ended(self, client: Client, err: ChannelError) -> None:
        if isinstance(err, MalformedError):
            self._refuse(client, 0, ErrorCode.EINVAL, str(err))
        self._close(client)

    def _close(self, client: Client) -> None:
        """Forget a client; unread answers are lost."""
        if self._clients.pop(client.number, None) is None:
            return
        self._listening.pop(client.number, None)
        self._turns.remove(client)
        client.close()
        self._acceptor.has_room()
        del client.user.clients[client.number]
        if not client.user.clients:
            del self._users[client.peer.uid]
        if client.has_come:
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
                case Considered(client=number):
                    self._in_work -= 1
                    client = self._clients.get(number)
                    if client:
                        client.considered()
                    self._pass_on()
                case Happened(event=event):
                    self._tell(event)
                case KeepFile(uid=uid):
                    self._keep(uid, fds)
                case SetVerbosity(level=level):
                    logging.set_verbosity(level)
                case _:
                    assert_never(received.message)

    def _keep(self, uid: int, fds: Fds) -> None:
        if not fds.are_lost:  # else its last holder waits
            parcel, keeper = fds.take(0), fds.take(1)
            self._files.keep(uid, parcel, keeper)

    def _answer(self, client: Client, answer: AnyAnswer, fds: list[int]) -> None:
        self._send(client, answer, fds)
        is_part = isinstance(answer, Vms) and answer.has_more
        if not is_part and not client.channel.is_closed:
            client.answered()

    def _tell(self, event: Event) -> None:
        for client in tuple(self._listening.values()):
            if client.channel.backlog_size > EVENTS_UNREAD_MAX:
                self._close(client)
            else:
                told = Event(
                    serial=client.events or 0,
                    kind=event.kind,
                    id=event.id,
                    name=event.name,
                    at=event.at,
                    message=event.message,
                )
                self._send(client, told, [])


def _without_descriptors(answer: AnyAnswer) -> AnyAnswer:
    text = "the daemon has no descriptors left"
    return Failed(serial=answer.serial, code=ErrorCode.EAGAIN, message=text)
