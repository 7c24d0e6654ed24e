"""virtio-vsock: stream connections between the guest's ports and sockets of the host.

The host's side is any stream socket: `connect` leads one to a port of the guest, and `dial`, which
the machine's owner gives, finds one for a connection that the guest opens. The device opens nothing
itself. Nothing is queued without a bound: packets of the guest stay in its queue while replies to
earlier ones have no room, and a connection has at most a window of bytes.

A connection does not leave the process: a guest that was restored or cloned is told that all are
gone (TRANSPORT_RESET), and refuses what it still sends for them.

Locks: `_lock` guards `_arrivals` and `_is_started`; nothing is called under it.

Source: virtio 1.3 §5.10
"""

import select
import struct
import threading
from collections import deque
from collections.abc import Callable
from typing import Annotated, Literal, NamedTuple

from vmm_kvm.errors import GuestError, StateError, VirtqueueError
from vmm_kvm.limits import CID_MAX, CID_MIN
from vmm_kvm.net.host_stream import HostStream
from vmm_kvm.scatter import total
from vmm_kvm.state import Part, PartState, Range
from vmm_kvm.virtio import abi
from vmm_kvm.virtio.backlog import Backlog
from vmm_kvm.virtio.buffers import scatter, split
from vmm_kvm.virtio.chain import Chain
from vmm_kvm.virtio.device import InputTransport
from vmm_kvm.virtio.queue import Virtqueue
from vmm_kvm.virtio.vsock_connection import Connection
from vmm_kvm.virtio.vsock_packet import (
    EVENT_TRANSPORT_RESET,
    HEADER_SIZE,
    HOST_CID,
    STREAM,
    Header,
    Op,
    Shutdown,
)

RECEIVE_QUEUE, TRANSMIT_QUEUE, EVENT_QUEUE = 0, 1, 2
QUEUE_SIZE = 128
CONNECTIONS_MAX = 256
"""Connections at once, of both directions."""
REPLIES_MAX = 128
"""Replies that wait for room before the guest's packets do."""
BUDGET = 64
"""Packets that a queue may have moved before the others."""

_CONFIG = struct.Struct("<Q")  # guest_cid
_EVENT = struct.Struct("<I")  # id
# Ports of the host's side: as many as there can never be connections.
_HOST_PORTS = range(1 << 30, 1 << 31)
_EVENTS = select.EPOLLIN | select.EPOLLOUT | select.EPOLLRDHUP | select.EPOLLET
_READABLE = select.EPOLLIN | select.EPOLLRDHUP | select.EPOLLHUP | select.EPOLLERR
_WRITABLE = select.EPOLLOUT | select.EPOLLHUP | select.EPOLLERR
_GONE = select.EPOLLHUP | select.EPOLLERR


class VsockSpec(NamedTuple):
    """A vsock device of a machine."""

    cid: int = CID_MIN
    """The guest's address, 3 to 4294967294; of no meaning to other VMs."""
    dial: Callable[[int], HostStream | None] | None = None
    """Returns a connected stream for a port of the host that the guest asks for, at once;
    None refuses. On the device's thread; without it everything is refused."""
    kind: Literal["vsock"] = "vsock"


class VsockState(PartState):
    """Everything that a guest can observe of the device: its connections end with the process."""

    cid: Annotated[int, Range(CID_MIN, CID_MAX)]
    version: Literal[1] = 1


class VirtioVsock:
    """A socket device; a `virtio.device.Backend`."""

    __slots__ = (
        "_active",
        "_arrivals",
        "_by_fd",
        "_by_ports",
        "_dial",
        "_event_buffers",
        "_is_reset_due",
        "_is_started",
        "_left_events",
        "_lock",
        "_next_port",
        "_offered",
        "_packets",
        "_poll",
        "_replies",
        "_transport",
        "cid",
        "device_id",
        "features",
        "queue_sizes",
    )

    def __init__(self, spec: VsockSpec) -> None:
        """Make a device without connections."""
        self.device_id = abi.VIRTIO_ID_VSOCK
        self.features = 0  # without any, there are stream sockets alone
        self.queue_sizes: tuple[int, ...] = (QUEUE_SIZE, QUEUE_SIZE, QUEUE_SIZE)
        self.cid = spec.cid
        """The guest's address."""
        self._dial = spec.dial
        self._transport: InputTransport | None = None
        self._lock = threading.Lock()
        self._is_started = False
        self._arrivals: deque[tuple[HostStream, int]] = deque()
        self._is_reset_due = False
        self._next_port = 0
        self._poll: select.epoll | None = None
        # Connections that exist for the guest, by (guest's port, host's port).
        self._by_ports: dict[tuple[int, int], Connection] = {}
        # Connections with an open socket, also those that the guest has closed and that only have
        # data left to write.
        self._by_fd: dict[int, Connection] = {}
        self._active: deque[Connection] = deque()  # connections with a packet for the guest
        self._replies: deque[Header] = deque()
        self._offered = Backlog()  # receive buffers
        self._packets = Backlog()  # packets of the guest that are not processed yet
        self._event_buffers = Backlog()
        # Buffers that were left when the guest was told of a reset, until it gives another one: it
        # has handled the event then. None while there is none to handle.
        self._left_events: int | None = None

    def attach(self, transport: InputTransport) -> None:
        """Learn whom to ask for another call of `process`; before the guest runs."""
        self._transport = transport

    # The outside; any thread

    def connect(self, stream: HostStream, port: int) -> None:
        """Lead `stream` to `port` of the guest, 0 to 4294967294.

        Takes over `stream`. Once the guest has accepted, the other end reads a line, `OK ` and the
        number of the host's port; where it refuses, or no driver is there, the end of the file.
        """
        with self._lock:
            is_taken = self._is_started and len(self._arrivals) < CONNECTIONS_MAX
            if is_taken:
                self._arrivals.append((stream, port))
        if is_taken:
            self._notify()
        else:
            stream.close()

    @property
    def waiting(self) -> tuple[int, tuple[int, ...]]:
        """Replies that wait for the guest's buffers, and of each open socket the bytes for it."""
        return len(self._replies), tuple(each.buffered for each in self._by_fd.values())

    # The backend

    def config(self) -> bytes:
        """Return the configuration space. Source: virtio 1.3 §5.10.4."""
        return _CONFIG.pack(self.cid)

    def write_config(self, offset: int, data: bytes) -> None:
        """Ignore it: nothing there can be written."""

    def start(self, features: int) -> None:  # noqa: ARG002 - there is none
        """Begin; connections are taken from now on."""
        self._is_reset_due = False
        self._left_events = None
        self._watch()
        with self._lock:
            self._is_started = True

    def process(self, index: int, queue: Virtqueue) -> None:
        """Move packets, as far as both sides have room.

        Raises:
            GuestError: the driver broke the rules; all connections have ended.
        """
        try:
            if index == RECEIVE_QUEUE:
                self._begin_arrivals()
                self._look_at_sockets()
                self._send(queue)
            elif index == TRANSMIT_QUEUE:
                self._receive(queue)
            else:
                self._send_event(queue)
        except GuestError:
            self._end_all()
            raise

    def reset(self) -> None:
        """End every connection."""
        self._end_all()
        self._unwatch()
        for backlog in (self._offered, self._packets, self._event_buffers):
            backlog.clear()

    def close(self) -> None:
        """End every connection; idempotent."""
        self.reset()

    def _end_all(self) -> None:
        with self._lock:
            self._is_started = False
            arrivals = list(self._arrivals)
            self._arrivals.clear()
        for stream, _port in arrivals:
            stream.close()
        self._forget_connections()

    def _forget_connections(self) -> None:
        """End every connection, of which the guest learns in another way."""
        for connection in list(self._by_fd.values()):
            self._close(connection)
        self._by_ports.clear()
        self._active.clear()
        self._replies.clear()

    def _watch(self) -> None:
        self._unwatch()
        self._poll = select.epoll()
        if self._transport:
            self._transport.watch(self._poll.fileno(), RECEIVE_QUEUE)

    def _unwatch(self) -> None:
        if self._poll:
            if self._transport:
                self._transport.unwatch(self._poll.fileno())
            self._poll.close()
            self._poll = None

    # Snapshots

    def parts(self, name: str) -> list[Part]:
        """Return itself."""
        return [Part(f"{name}/vsock", self)]

    def save(self) -> VsockState:
        """Return the part of it that is left elsewhere."""
        return VsockState(cid=self.cid)

    def restore(self, state: VsockState) -> None:
        """Tell the guest that its connections are gone.

        Raises:
            StateError: it is another guest's address.
        """
        if state.cid != self.cid:
            raise StateError(f"cid: {state.cid} is not this device's, {self.cid}")
        self._is_reset_due = self._is_started

    def become_another(self) -> None:
        """Leave the connections to another process, which has them too; while nothing runs."""
        with self._lock:
            arrivals = list(self._arrivals)
            self._arrivals.clear()
        for stream, _port in arrivals:
            stream.close()
        self._forget_connections()
        self._is_reset_due = self._is_started

    # Connections

    def _begin_arrivals(self) -> None:
        """Ask the guest to accept connections from outside.

        One that it accepted before it handles a reset would end by that, without a word to us.
        """
        while self._arrivals and not self._is_reset_due and self._left_events is None:
            with self._lock:
                stream, guest_port = self._arrivals.popleft()
            if self._has_room():
                port = self._free_port(guest_port)
                self._add(Connection(stream, guest_port, port, is_from_guest=False))
            else:
                stream.close()

    def _has_room(self) -> bool:
        """Tell whether there may be one more connection; at the cost of one that has ended."""
        if self._count < CONNECTIONS_MAX:
            return True
        for connection in self._by_ports.values():
            if connection.is_closed:  # the guest should have said so long ago
                self._drop(connection)
                return True
        return False

    @property
    def _count(self) -> int:
        closed = sum(connection.is_closed for connection in self._by_ports.values())
        return len(self._by_fd) + closed

    def _free_port(self, guest_port: int) -> int:
        while True:
            port = _HOST_PORTS[self._next_port]
            self._next_port = (self._next_port + 1) % len(_HOST_PORTS)
            if (guest_port, port) not in self._by_ports:
                return port

    def _add(self, connection: Connection) -> None:
        assert self._poll is not None, "the device is started"
        self._by_ports[connection.guest_port, connection.host_port] = connection
        self._by_fd[connection.stream.fd] = connection
        self._poll.register(connection.stream.fd, _EVENTS)
        self._settle(connection)

    def _close(self, connection: Connection) -> None:
        """Close the socket; the guest may still have to hear of it. Idempotent."""
        if connection.is_closed:
            return
        del self._by_fd[connection.stream.fd]
        if self._poll:  # another process may have the socket too: closing would leave it watched
            self._poll.unregister(connection.stream.fd)
        connection.close()

    def _drop(self, connection: Connection, *, is_told: bool = True) -> None:
        """End a connection at once; the guest `is_told`, if it knows of it."""
        self._unlist(connection, is_told=is_told)
        self._close(connection)

    def _unlist(self, connection: Connection, *, is_told: bool) -> None:
        """End a connection for the guest."""
        connection.is_listed = False
        del self._by_ports[connection.guest_port, connection.host_port]
        if connection.is_active:
            self._active.remove(connection)
        if is_told and connection.has_requested:
            self._refuse(HOST_CID, connection.host_port, connection.guest_port, STREAM)

    def _refuse(self, cid: int, host_port: int, guest_port: int, kind: int) -> None:
        """Have a RST sent from the port `host_port` of `cid`, which is the host's as a rule."""
        self._replies.append(Header(cid, self.cid, host_port, guest_port, 0, kind, Op.RST, 0, 0, 0))

    def _settle(self, connection: Connection) -> None:
        """Do what an event of a connection makes due."""
        if not connection.is_listed:
            if not connection.buffered:
                self._close(connection)
            return
        if connection.is_connecting and connection.is_hung_up:
            self._drop(connection)
            return
        if connection.guest_ended == Shutdown.BOTH:  # the remaining writes need no guest
            self._unlist(connection, is_told=True)
            self._settle(connection)
            return
        if connection.ended == Shutdown.BOTH:
            self._close(connection)
        if connection.has_work and not connection.is_active:
            connection.is_active = True
            self._active.append(connection)

    def _look_at_sockets(self) -> None:
        """Learn of which sockets something can be done."""
        if self._poll is None:
            return
        for fd, events in self._poll.poll(0):
            connection = self._by_fd.get(fd)
            if connection:
                connection.note_events(
                    can_read=bool(events & _READABLE),
                    can_write=bool(events & _WRITABLE),
                    is_hung_up=bool(events & _GONE),
                )
                self._settle(connection)

    # To the guest

    def _send(self, queue: Virtqueue) -> None:
        waiting = self._offered.collect(queue)
        for _ in range(BUDGET):
            if not waiting:
                return  # the driver notifies when it has more
            size = self._fill(waiting[0])
            if not size:
                return
            queue.push(waiting.popleft(), size)
        self._notify()

    def _fill(self, chain: Chain) -> int:
        """Write the next packet into a buffer; returns its bytes, 0 if there is none."""
        if self._replies:
            head, room = self._room(chain)
            return scatter(head, self._replies.popleft().pack())
        while self._active:
            connection = self._active.popleft()
            connection.is_active = False
            head, room = self._room(chain)
            packet = connection.packet(room)
            if packet:
                header = connection.header(packet, self.cid, HOST_CID, STREAM)
                scatter(head, header.pack())
            self._settle(connection)
            if packet:
                return HEADER_SIZE + packet.length
        return 0

    @staticmethod
    def _room(chain: Chain) -> tuple[list[memoryview], list[memoryview]]:
        """Return where a header goes, and where data do."""
        size = total(chain.writable)
        if size <= HEADER_SIZE:
            raise VirtqueueError(f"a receive buffer of {size} bytes")
        return split(chain.writable, HEADER_SIZE)

    def _send_event(self, queue: Virtqueue) -> None:
        waiting = self._event_buffers.collect(queue)
        if self._left_events is not None and len(waiting) > self._left_events:
            self._left_events = None
            self._notify()  # for later arrivals
        if self._is_reset_due and waiting:
            chain = waiting.popleft()
            queue.push(chain, scatter(chain.writable, _EVENT.pack(EVENT_TRANSPORT_RESET)))
            self._is_reset_due = False
            self._left_events = len(waiting)

    # From the guest

    def _receive(self, queue: Virtqueue) -> None:
        waiting = self._packets.collect(queue)
        # A packet may need a reply: while too many replies wait, packets do too.
        count = 0
        while waiting and count < BUDGET and len(self._replies) < REPLIES_MAX:
            self._take(waiting[0])
            queue.push(waiting.popleft(), 0)
            count += 1
        if count == BUDGET or (count and (self._replies or self._active)):
            self._notify()

    def _take(self, chain: Chain) -> None:
        """Obey a packet; ignore an invalid one."""
        header = Header.read(chain.readable)
        if header is None or header.src_cid != self.cid:
            return
        if header.dst_cid != HOST_CID or header.type != STREAM:
            if header.op != Op.RST:
                self._refuse(header.dst_cid, header.dst_port, header.src_port, header.type)
            return
        connection = self._by_ports.get((header.src_port, header.dst_port))
        if header.op == Op.REQUEST:
            if connection:
                self._drop(connection)
            else:
                self._open(header)
        elif connection is None:
            if header.op != Op.RST:
                self._refuse(HOST_CID, header.dst_port, header.src_port, STREAM)
        else:
            connection.note_credit(header)
            if self._obey(connection, header, chain):
                self._settle(connection)
            else:
                self._drop(connection)

    def _obey(self, connection: Connection, header: Header, chain: Chain) -> bool:
        """Obey a packet of a connection; False if it is not allowed."""
        match header.op:
            case Op.RESPONSE:
                return connection.is_connecting and connection.accept()
            case Op.RST:
                self._unlist(connection, is_told=False)
                if not connection.guest_ended & Shutdown.SEND:
                    self._close(connection)
                return True
            case Op.SHUTDOWN:
                connection.note_end(header.flags)
                return not connection.is_connecting
            case Op.RW:
                data = split(chain.readable, HEADER_SIZE)[1]
                if total(data) > header.length:
                    data = split(data, header.length)[0]
                size = total(data)
                return size == header.length and connection.take(data, size)
            case Op.CREDIT_UPDATE:
                return not connection.is_connecting
            case Op.CREDIT_REQUEST:
                connection.ask_for_update()
                return not connection.is_connecting
            case _:
                return False

    def _open(self, header: Header) -> None:
        """Connect the guest with what listens on the port that it asks for, if anything does."""
        stream = self._dial(header.dst_port) if self._dial and self._has_room() else None
        if stream is None:
            self._refuse(HOST_CID, header.dst_port, header.src_port, STREAM)
            return
        connection = Connection(stream, header.src_port, header.dst_port, is_from_guest=True)
        connection.note_credit(header)
        self._add(connection)

    def _notify(self) -> None:
        """Have the queues looked at again."""
        if self._transport:
            self._transport.notify(RECEIVE_QUEUE)
