"""One connection between a guest's port and a stream socket of the host.

Both directions have credit. The guest may send as much as `WINDOW` has room for; what the host's
socket does not take at once waits there, and no more than that. To the guest goes no more than it
says to have room for, straight from the socket into its buffers.

Each direction ends by itself. What a side does no more is told to the other once: the host's by
end of file or a broken pipe, the guest's by a SHUTDOWN packet.

Source: virtio 1.3 §5.10.6.3, §5.10.6.5
"""

from collections.abc import Sequence
from enum import IntFlag

from vmm_kvm.net.host_stream import HostStream
from vmm_kvm.scatter import total
from vmm_kvm.virtio.buffers import split
from vmm_kvm.virtio.vsock_packet import Header, Op, Packet, Shutdown

WINDOW = 128 << 10
"""Bytes that a guest may have on their way to a socket that does not take them."""
UPDATE = WINDOW // 2
"""Bytes after which a guest is told that they have left."""

_PIECE = 64 << 10  # bytes written at once from the buffer
_MODULUS = 1 << 32


class Owed(IntFlag):
    """Packets that the guest has to get."""

    NONE = 0
    REQUEST = 1
    RESPONSE = 2
    CREDIT_UPDATE = 4
    SHUTDOWN = 8


class Connection:
    """A connection, open or being opened; on the device's thread only.

    Owns the stream.
    """

    __slots__ = (
        "_buffer",
        "_forwarded",
        "_has_asked",
        "_has_ended_output",
        "_owed",
        "_peer_alloc",
        "_peer_forwarded",
        "_received",
        "_sent",
        "_told",
        "can_read",
        "can_write",
        "ended",
        "greeting",
        "guest_ended",
        "guest_port",
        "host_port",
        "is_active",
        "is_connecting",
        "is_hung_up",
        "is_listed",
        "stream",
    )

    def __init__(
        self, stream: HostStream, guest_port: int, host_port: int, *, is_from_guest: bool
    ) -> None:
        """Connect `stream` with the guest, which has asked for it or is to be asked."""
        self.stream = stream
        self.guest_port = guest_port
        self.host_port = host_port
        self.greeting = b"" if is_from_guest else b"OK %d\n" % host_port
        """The client's line once the guest has accepted."""
        self.is_connecting = not is_from_guest
        """Whether the guest has still to accept."""
        self.is_active = False
        """Whether the device looks at it in turn."""
        self.is_listed = True
        """Whether the device finds it by its ports: it exists for the guest."""
        self.can_read = is_from_guest
        self.can_write = True
        self.is_hung_up = False
        """Whether the other end of the socket is gone."""
        self.ended = Shutdown.NONE
        """Directions that the host's side has shut down."""
        self.guest_ended = Shutdown.NONE
        """Directions that the guest has shut down."""
        self._has_ended_output = False
        self._owed = Owed.RESPONSE if is_from_guest else Owed.REQUEST
        self._buffer = bytearray()
        self._received = self._forwarded = self._told = 0
        self._sent = self._peer_alloc = self._peer_forwarded = 0
        self._has_asked = False

    def close(self) -> None:
        """Close the socket; idempotent."""
        self.stream.close()
        self._buffer.clear()
        self.can_read = self.can_write = False

    @property
    def is_closed(self) -> bool:
        """Whether the socket is closed: the guest alone has still to hear of it."""
        return self.stream.is_closed

    @property
    def buffered(self) -> int:
        """Bytes that wait for the host's socket."""
        return len(self._buffer)

    @property
    def has_requested(self) -> bool:
        """Whether the guest knows of the connection."""
        return not self._owed & Owed.REQUEST

    # From the guest

    def note_credit(self, header: Header) -> None:
        """Learn how much room the guest has; any values are possible."""
        if (header.buf_alloc, header.fwd_cnt) != (self._peer_alloc, self._peer_forwarded):
            self._peer_alloc, self._peer_forwarded = header.buf_alloc, header.fwd_cnt
            self._has_asked = False

    def accept(self) -> bool:
        """Begin: the guest has accepted. False if the client does not take the greeting."""
        self.is_connecting = False
        self.can_read = True
        try:
            return self.stream.write([self.greeting]) == len(self.greeting)
        except OSError:
            return False

    def take(self, data: Sequence[memoryview], size: int) -> bool:
        """Pass on `size` bytes from the guest; False if it had no right to send them."""
        has_credit = size <= WINDOW - (self._received - self._forwarded)
        if self.is_connecting or self.guest_ended & Shutdown.SEND or not has_credit:
            return False
        self._received += size
        if self.ended & Shutdown.RECEIVE or not size:
            self._forwarded += size
            return True
        if self.can_write and not self._buffer:
            done = self._write(data)
            if done == size or self.ended & Shutdown.RECEIVE:
                return True
            data = split(data, done)[1]
        for piece in data:
            self._buffer += piece
        self.flush()
        return True

    def flush(self) -> None:
        """Write what waits, as much as the socket takes; then its end, if the guest has ended."""
        while self._buffer and self.can_write:
            with memoryview(self._buffer) as view, view[:_PIECE] as piece:
                done = self._write([piece])
            del self._buffer[:done]
        if self.ended & Shutdown.RECEIVE:
            self._buffer.clear()
        is_ending = self.guest_ended & Shutdown.SEND and not self._has_ended_output
        if is_ending and not self._buffer and not self.is_closed:
            self._has_ended_output = True
            self.stream.end_output()
            if self.ended & Shutdown.SEND:
                self.end(Shutdown.BOTH)

    def _write(self, pieces: Sequence[memoryview]) -> int:
        """Write to the socket; returns how many bytes it took."""
        try:
            done = self.stream.write(pieces)
        except OSError:  # there is no reader any more
            self.end(Shutdown.RECEIVE)
            return 0
        if not done:
            self.can_write = False
        self._forwarded += done
        return done

    def note_end(self, flags: int) -> None:
        """Learn that the guest sends or receives no more; for good."""
        new = Shutdown(flags & Shutdown.BOTH) & ~self.guest_ended
        self.guest_ended |= new
        if new & Shutdown.RECEIVE and not self.is_closed:
            self.can_read = False
            self.stream.end_input()
        self.flush()

    def ask_for_update(self) -> None:
        """Have the guest told how much room there is."""
        self._owed |= Owed.CREDIT_UPDATE

    # From the host

    def end(self, what: Shutdown) -> None:
        """Note that the host's side receives or sends no more, and have the guest told."""
        if what & ~self.ended:
            self.ended |= what
            self._owed |= Owed.SHUTDOWN
        if self.ended & Shutdown.RECEIVE:
            self._forwarded = self._received
            self.can_write = False
        if self.ended & Shutdown.SEND:
            self.can_read = False

    def note_events(self, *, can_read: bool, can_write: bool, is_hung_up: bool) -> None:
        """Learn what can be done with the socket."""
        is_reading = not (self.ended & Shutdown.SEND or self.guest_ended & Shutdown.RECEIVE)
        self.can_read |= can_read and is_reading
        self.can_write |= can_write and not self.ended & Shutdown.RECEIVE
        self.is_hung_up |= is_hung_up
        self.flush()
        if is_hung_up and not is_reading:
            self.end(Shutdown.BOTH)

    # To the guest

    @property
    def has_work(self) -> bool:
        """Whether `packet` may have something to say."""
        if self._owed or self._forwarded - self._told >= UPDATE:
            return True
        return (
            self.can_read and not self.is_connecting and bool(self._credit or not self._has_asked)
        )

    @property
    def _credit(self) -> int:
        """Bytes that the guest has room for."""
        under_way = (self._sent - self._peer_forwarded) % _MODULUS
        return max(self._peer_alloc - under_way, 0)

    def packet(self, room: Sequence[memoryview]) -> Packet | None:
        """Return the next packet for the guest, whose data have been read into `room`, or None."""
        if self._owed & (Owed.REQUEST | Owed.RESPONSE):
            op = Op.REQUEST if self._owed & Owed.REQUEST else Op.RESPONSE
            self._owed &= ~(Owed.REQUEST | Owed.RESPONSE)
            return Packet(op)
        if self.is_connecting:
            return None
        if self.can_read:
            credit = self._credit
            if not credit and not self._has_asked:
                self._has_asked = True
                return Packet(Op.CREDIT_REQUEST)
            if credit and (size := self._read(room, credit)):
                self._sent += size
                return Packet(Op.RW, length=size)
        if self._owed & Owed.CREDIT_UPDATE or self._forwarded - self._told >= UPDATE:
            self._owed &= ~Owed.CREDIT_UPDATE
            return Packet(Op.CREDIT_UPDATE)
        if self._owed & Owed.SHUTDOWN:
            self._owed &= ~Owed.SHUTDOWN
            return Packet(Op.SHUTDOWN, self.ended)
        return None

    def _read(self, room: Sequence[memoryview], credit: int) -> int:
        """Read into the guest's buffer; returns the number of bytes."""
        if credit < total(room):
            room = split(room, credit)[0]
        try:
            size = self.stream.read(room)
        except OSError:  # the other end went away without reading everything
            self.end(Shutdown.BOTH)
            return 0
        if size is None:
            self.can_read = False
        elif not size:
            self.end(Shutdown.BOTH if self.is_hung_up or self._has_ended_output else Shutdown.SEND)
        return size or 0

    def header(self, packet: Packet, cid: int, host_cid: int, kind: int) -> Header:
        """Return the header of a packet, which also tells the guest how much room there is."""
        self._told = self._forwarded
        return Header(
            host_cid,
            cid,
            self.host_port,
            self.guest_port,
            packet.length,
            kind,
            packet.op,
            packet.flags,
            WINDOW,
            self._forwarded % _MODULUS,
        )
