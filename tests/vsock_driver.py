"""The driver's side of virtio-vsock: packets through its queues, honest or not."""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Callable, Mapping
from typing import NamedTuple

from tests.virtio_driver import DriverQueue
from vmm_kvm.virtio.vsock import EVENT_QUEUE, RECEIVE_QUEUE, TRANSMIT_QUEUE
from vmm_kvm.virtio.vsock_packet import HEADER_SIZE, HOST_CID, STREAM, Header, Op, Shutdown

CID = 3
ROOM = 1 << 20
"""The guest's receive space in these tests, unless they choose another."""
BUFFER = HEADER_SIZE + 4096
_LARGE_SIZE, _LARGE_MAX = 0x11000, 3
_SMALL, _SMALL_MAX = 64, 256
_AREA = 0x40000
"""Bytes of memory that a driver uses for packets, twice."""


class Got(NamedTuple):
    """A packet from the device."""

    header: Header
    data: bytes

    @property
    def op(self) -> int:
        """The packet's operation."""
        return self.header.op


class VsockDriver:
    """A driver with its three queues, whose packets lie in memory from `base` on."""

    def __init__(
        self,
        queues: Mapping[int, DriverQueue],
        base: int,
        notify: Callable[[int], None],
        *,
        buffers: int = 16,
    ) -> None:
        self._queues = queues
        self._memory = queues[RECEIVE_QUEUE].memory
        self._base = base
        self._notify = notify
        self._sent = self._taken = 0
        self._free = deque(range(base, base + buffers * 0x1100, 0x1100))
        self._places: dict[int, int] = {}
        """The addresses of the offered buffers, by head."""
        self._events: dict[int, int] = {}

    def copied(self, memory: memoryview, notify: Callable[[int], None]) -> VsockDriver:
        """Return the same driver for a copy of the memory."""
        other = copy.copy(self)
        other._memory, other._notify = memory, notify
        other._queues = {index: copy.copy(queue) for index, queue in self._queues.items()}
        for queue in other._queues.values():
            queue.memory = memory
        other._free, other._places = self._free.copy(), self._places.copy()
        other._events = self._events.copy()
        return other

    @property
    def free(self) -> int:
        """The number of receive buffers that the device does not have."""
        return len(self._free)

    def offer(self, count: int | None = None) -> None:
        """Give the device this many of the free receive buffers, all by default."""
        for _ in range(len(self._free) if count is None else count):
            place = self._free.popleft()
            self._places[self._queues[RECEIVE_QUEUE].add((place, BUFFER, True))] = place
        self._notify(RECEIVE_QUEUE)

    def offer_event(self) -> None:
        """Give the device a buffer for an event."""
        place = self._base + _AREA - 64
        self._events[self._queues[EVENT_QUEUE].add((place, 4, True))] = place
        self._notify(EVENT_QUEUE)

    def events(self) -> list[int]:
        """Return the events since the last call."""
        found = []
        for head, size in self._queues[EVENT_QUEUE].used():
            place = self._events.pop(head)
            assert size == 4
            found.append(int.from_bytes(self._memory[place : place + 4], "little"))
        return found

    def packets(self) -> list[Got]:
        """Return the packets since the last call; their buffers are free."""
        found = []
        for head, size in self._queues[RECEIVE_QUEUE].used():
            place = self._places.pop(head)
            header = Header.read([memoryview(self._memory)[place : place + HEADER_SIZE]])
            assert header is not None
            assert size == HEADER_SIZE + header.length
            found.append(Got(header, bytes(self._memory[place + HEADER_SIZE : place + size])))
            self._free.append(place)
        return found

    def send(self, op: int, ports: tuple[int, int], data: bytes = b"", **fields: int) -> None:
        """Send a packet from the first port, the guest's, with any `fields` of its header."""
        header = Header(
            CID, HOST_CID, ports[0], ports[1], len(data), STREAM, op, 0, ROOM, 0
        )._replace(**fields)
        self.send_raw(header.pack() + data)

    def send_raw(self, data: bytes) -> None:
        """Send any bytes."""
        place = self._base + _AREA
        if len(data) <= _SMALL:
            place += _LARGE_MAX * _LARGE_SIZE + self._sent % _SMALL_MAX * _SMALL
        else:
            place += self._sent % _LARGE_MAX * _LARGE_SIZE
        self._sent += 1
        self._memory[place : place + len(data)] = data
        head = min(len(data), HEADER_SIZE)
        buffers = [(place, head, False)]
        if len(data) > head:
            buffers.append((place + head, len(data) - head, False))
        self._queues[TRANSMIT_QUEUE].add(*buffers)
        self._notify(TRANSMIT_QUEUE)

    def taken(self) -> int:
        """Return how many of the guest's packets the device has returned since the last call."""
        count = len(self._queues[TRANSMIT_QUEUE].used())
        self._taken += count
        return count

    def can_send(self) -> bool:
        """Tell whether there is room for a large packet."""
        self.taken()
        return self._sent - self._taken < _LARGE_MAX


class GuestStream:
    """A guest's socket that keeps the rules, on an open connection."""

    def __init__(self, driver: VsockDriver, ports: tuple[int, int], room: int = ROOM) -> None:
        self._driver = driver
        self.ports = ports
        self._room = room
        self._credit_end = 0
        self._sent = 0
        self.received = bytearray()
        self._told = 0
        self.ended = Shutdown.NONE
        """Directions that the host's side has shut down."""
        self.is_reset = False

    def credit(self) -> int:
        """Bytes that may be sent."""
        return self._credit_end - self._sent

    def take(self, got: Got) -> None:
        """Take a packet of this connection."""
        header = got.header
        assert (header.dst_port, header.src_port) == self.ports
        self._credit_end = header.fwd_cnt + header.buf_alloc
        self.received += got.data
        assert len(self.received) - self._told <= self._room, "more than there is room for"
        match got.op:
            case Op.SHUTDOWN:
                self.ended |= Shutdown(header.flags)
            case Op.RST:
                self.is_reset = True
            case Op.CREDIT_REQUEST:
                self.update()
            case Op.RW if len(self.received) - self._told > self._room // 2:
                self.update()

    def _send(self, op: Op, data: bytes = b"", **fields: int) -> None:
        self._told = len(self.received)
        self._driver.send(
            op, self.ports, data, buf_alloc=self._room, fwd_cnt=self._told & 0xFFFF_FFFF, **fields
        )

    def update(self) -> None:
        """Tell the device how much room there is."""
        self._send(Op.CREDIT_UPDATE)

    def write(self, data: bytes) -> int:
        """Send as much as there is credit for; returns the number of bytes."""
        count = min(len(data), self.credit(), 0x10000) if self._driver.can_send() else 0
        if count:
            self._sent += count
            self._send(Op.RW, data[:count])
        return count

    def shut(self, flags: Shutdown) -> None:
        """Shut down directions of the guest's side."""
        self._send(Op.SHUTDOWN, flags=flags)
