"""The control process's clients: limits of each user, and whose request is next.

At a limit the client gets an error text, or is not read until it is below the limit again. Each
limit bounds one user's share of common resources: the parent's time, memory and descriptors of the
control process, and of the kernel.
"""

from collections import deque
from collections.abc import Callable, Iterator

from vmd.wire.ancillary import Credentials
from vmd.wire.channel import Channel, Received
from vmd.wire.internal import UNANSWERED_MAX
from vmd.wire.messages import AnyAnswer, AnyRequest, Console, ParentRequest
from vmd.wire.ports import Connect, Debug
from vmd.wire.transfers import OpenSnapshot

CLIENTS_PER_USER = 256
"""Connections of an ordinary user: each costs descriptors and memory, here and in the kernel."""
UNANSWERED_PER_USER = 1024
"""Unanswered requests of a user: the parent keeps each until its VM has reacted."""
IN_WORK_MAX = 16
"""Requests that the parent is working on, or has yet to read: another user's waits for no more."""
IN_WORK_PER_CLIENT = 4
"""Of one connection, which may get as many answers before it has read the first."""
WAITING_BYTES_PER_USER = 2 << 20
"""Of requests that wait for their turn."""
WAITING_FDS_PER_USER = 128
"""Descriptors that came with them: control may have as many open as its resource limit says."""
UNREAD_PER_USER = 4 << 20
"""Bytes of unread answers on a user's connections; beyond them none of its requests has its
turn."""
STREAMS_UNREAD_PER_USER = 32
"""Unread answers with a stream or file: the kernel counts descriptors in flight, and refuses more
of them to all processes of control's user."""
WITH_DESCRIPTORS = (Console, Connect, Debug, OpenSnapshot)
"""Requests whose answers have descriptors."""
EVENTS_UNREAD_MAX = 64 << 10
"""Bytes of events that wait for one connection; beyond them it is closed, as it would miss some."""


class User:
    """The pending requests and answers of one user's connections."""

    __slots__ = ("clients", "unanswered", "waiting_bytes", "waiting_fds")

    def __init__(self) -> None:
        self.clients: dict[int, Client] = {}
        self.unanswered = self.waiting_bytes = self.waiting_fds = 0

    @property
    def unread(self) -> int:
        """Bytes that could not be sent yet because the user does not read."""
        return sum(client.channel.backlog_size for client in self.clients.values())

    @property
    def streams_unread(self) -> int:
        """Streams that were sent, or may be, and are unread."""
        return sum(client.streams_unread() for client in self.clients.values())


class Client:
    """A connection."""

    def __init__(
        self,
        number: int,
        channel: Channel[AnyAnswer, AnyRequest],
        peer: Credentials,
        user: User,
        on_room: Callable[[], None],
    ) -> None:
        """`on_room` is called when all answers have been read."""
        self.number = number
        self.channel = channel
        self.peer = peer
        self.user = user
        self.has_come = False
        """The parent has seen the connection."""
        self.unanswered = 0
        self.in_work = 0
        self.events: int | None = None
        """The serial of the request for events, if there was one."""
        self.waiting: Received[ParentRequest] | None = None
        """Its waiting request; it is not read meanwhile."""
        self._on_room = on_room
        self._streams = 0

    # A source of its own channel: nothing is read while answers wait.

    def hold(self, reason: object) -> None:
        """Read no more."""
        self.channel.hold(reason)

    def release(self, reason: object) -> None:
        """Read on."""
        self.channel.release(reason)
        self._on_room()

    # Requests

    def refusal(self, received: Received[ParentRequest]) -> str | None:
        """Return the reason why a request cannot wait for its turn, if there is one."""
        user = self.user
        if received.fds.are_lost:
            return "too many descriptors, or the daemon has none left"
        if user.waiting_bytes + received.size > WAITING_BYTES_PER_USER:
            return "your requests that wait are too large together"
        if user.waiting_fds + len(received.fds) > WAITING_FDS_PER_USER:
            return "your requests that wait have too many descriptors together"
        if user.unanswered >= UNANSWERED_PER_USER:
            return "too many of your requests are not answered yet"
        has_stream = isinstance(received.message, WITH_DESCRIPTORS)
        if has_stream and user.streams_unread >= STREAMS_UNREAD_PER_USER:
            return "you have not taken the streams or files that you asked for"
        return None

    def wait(self, received: Received[ParentRequest]) -> None:
        """Let a request wait for its turn; takes ownership of its descriptors."""
        self.waiting = received
        self.user.waiting_bytes += received.size
        self.user.waiting_fds += len(received.fds)
        self.channel.hold(self)

    def take(self) -> Received[ParentRequest]:
        """Return the request that waits, whose turn it is."""
        received = self.waiting
        assert received is not None
        self.waiting = None
        self.user.waiting_bytes -= received.size
        self.user.waiting_fds -= len(received.fds)
        return received

    def given(self, request: ParentRequest) -> None:
        """Note that the parent has a request."""
        self.in_work += 1
        self.unanswered += 1
        self.user.unanswered += 1
        self._streams += isinstance(request, WITH_DESCRIPTORS)
        self.read_on()

    def considered(self) -> None:
        """Note that the parent is done with a request."""
        self.in_work -= 1
        self.read_on()

    def answered(self) -> None:
        """Note that a request has been answered."""
        self.unanswered -= 1
        self.user.unanswered -= 1
        self.read_on()

    def read_on(self) -> None:
        """Read the next request, if there may be another one."""
        if (
            self.waiting is None
            and self.in_work < IN_WORK_PER_CLIENT
            and self.unanswered < UNANSWERED_MAX
        ):
            self.channel.release(self)

    def streams_unread(self) -> int:
        """Return how many streams may be under way."""
        if self._streams and not self.unanswered and self.channel.is_read:
            self._streams = 0
        return self._streams

    def close(self) -> None:
        """Close the connection; unread answers are lost."""
        self.channel.close()
        self.user.unanswered -= self.unanswered
        if self.waiting:
            self.take().fds.close()


class Turns:
    """Clients with waiting requests: users take turns, and so do the connections of each."""

    def __init__(self) -> None:
        self._of_users: dict[User, deque[Client]] = {}  # whose turn it is comes first

    def add(self, client: Client) -> None:
        """Put a client behind the others of its user."""
        self._of_users.setdefault(client.user, deque()).append(client)

    def remove(self, client: Client) -> None:
        """Take a client out, if it is there."""
        clients = self._of_users.get(client.user, deque())
        if client in clients:
            clients.remove(client)
            if not clients:
                del self._of_users[client.user]

    def take(self) -> Client | None:
        """Return the client whose turn it is; None if none that waits may have it."""
        user = next(self._ready(), None)
        if user is None:
            return None
        clients = self._of_users.pop(user)
        client = clients.popleft()
        if clients:
            self._of_users[user] = clients
        return client

    def _ready(self) -> Iterator[User]:
        return (user for user in self._of_users if user.unread < UNREAD_PER_USER)
