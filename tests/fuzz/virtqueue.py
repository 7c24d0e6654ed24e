"""Fuzz target: virtqueues whose driver writes anything, anywhere, between any two calls.

A model of the specification, which follows one descriptor after the other, gives each chain's
buffers: on each of its paths the queue takes the same buffers, or refuses if the model refuses.
"""

from __future__ import annotations

import ctypes
import struct
from collections import deque

from tests.fuzz.inputs import Input, check_line
from vmm_kvm.errors import GuestError, GuestMemoryError
from vmm_kvm.virtio.abi import (
    VIRTIO_RING_F_EVENT_IDX,
    VIRTIO_RING_F_INDIRECT_DESC,
    VRING_DESC_F_INDIRECT,
    VRING_DESC_F_NEXT,
    VRING_DESC_F_WRITE,
)
from vmm_kvm.virtio.chain import INDIRECT_MAX, Chain
from vmm_kvm.virtio.queue import Ring, Virtqueue
from vmm_kvm.write_log import WriteLog

LOW_SIZE, HIGH_SIZE = 0x8000, 0x4000
HIGH = 1 << 32
FEATURES = tuple(
    indirect << VIRTIO_RING_F_INDIRECT_DESC | event << VIRTIO_RING_F_EVENT_IDX
    for indirect in (1, 0)
    for event in (0, 1)
)
SIZES = (8, 1, 2, 16, 64, 256, 3, 0, 65536)
STEPS_MAX = 400
_DESCRIPTOR = struct.Struct("<QIHH")
_NEXT, _WRITE, _INDIRECT = VRING_DESC_F_NEXT, VRING_DESC_F_WRITE, VRING_DESC_F_INDIRECT
_TABLE_MAX = 300

Buffer = tuple[int, int, bool]
"""Guest-physical address, bytes, whether the device may write."""


class RefusedError(Exception):
    """The specification allows no such chain."""


class Memory:
    """Guest memory in two pieces, as a PC has it: from 0, and from 4 GiB."""

    def __init__(self) -> None:
        self.writes = WriteLog()
        self._pieces = [(0, bytearray(LOW_SIZE)), (HIGH, bytearray(HIGH_SIZE))]
        self._places = [
            (ctypes.addressof(ctypes.c_char.from_buffer(data)), start, len(data))
            for start, data in self._pieces
        ]

    def view(self, gpa: int, size: int) -> memoryview:
        """Return a view of `size` bytes at `gpa`."""
        for start, data in self._pieces:
            if start <= gpa <= gpa + size <= start + len(data):
                return memoryview(data)[gpa - start : gpa - start + size]
        raise GuestMemoryError(gpa, size)

    def put(self, gpa: int, data: bytes) -> None:
        """Write the bytes that fit."""
        for start, piece in self._pieces:
            if start <= gpa <= start + len(piece) - len(data):
                piece[gpa - start : gpa - start + len(data)] = data

    def word(self, gpa: int, size: int) -> int:
        """Read a number."""
        return int.from_bytes(self.view(gpa, size), "little")

    def buffer(self, view: memoryview, is_writable: bool) -> Buffer:
        """Return the buffer of a view."""
        assert len(view), "an empty buffer"
        at = ctypes.addressof(ctypes.c_char.from_buffer(view))
        for address, start, size in self._places:
            if address <= at <= at + len(view) <= address + size:
                return start + at - address, len(view), is_writable
        raise AssertionError("a buffer that is nowhere in guest memory")


class Reference:
    """A model of the specification: the chains that a queue takes."""

    def __init__(self, memory: Memory, ring: Ring, features: int, next_available: int) -> None:
        self._memory = memory
        self._ring = ring
        self._has_indirect = bool(features >> VIRTIO_RING_F_INDIRECT_DESC & 1)
        self._at = self._seen = next_available

    def take(self) -> list[Buffer] | None:
        """Return the next chain's buffers; None if there is none. Source: virtio 1.2 §2.7.5."""
        ring, memory = self._ring, self._memory
        if self._at == self._seen:
            seen = memory.word(ring.available + 2, 2)
            if (seen - self._at) & 0xFFFF > ring.size:
                raise RefusedError
            self._seen = seen
            if self._at == seen:
                return None
        head = memory.word(ring.available + 4 + 2 * (self._at % ring.size), 2)
        self._at = (self._at + 1) & 0xFFFF
        return self._follow(head)

    def _follow(self, link: int) -> list[Buffer]:
        found: list[Buffer] = []
        table, limit = self._memory.view(self._ring.descriptors, 16 * self._ring.size), 0
        limit = left = self._ring.size
        is_indirect = False
        while True:
            if not left or link >= limit:
                raise RefusedError
            left -= 1
            address, length, flags, following = _DESCRIPTOR.unpack_from(table, 16 * link)
            if flags & _INDIRECT:
                if is_indirect or not self._has_indirect or flags & _NEXT or length % 16:
                    raise RefusedError
                if not 0 < length <= 16 * INDIRECT_MAX:
                    raise RefusedError
                table, is_indirect, link = self._view(address, length), True, 0
                limit = left = length // 16
                continue
            is_writable = bool(flags & _WRITE)
            if not length or (found and found[-1][2] and not is_writable):
                raise RefusedError
            self._view(address, length)
            found.append((address, length, is_writable))
            if not flags & _NEXT:
                return found
            link = following

    def _view(self, address: int, length: int) -> memoryview:
        try:
            return self._memory.view(address, length)
        except GuestMemoryError as err:
            raise RefusedError from err


class Session:
    """One queue, its driver and its device."""

    def __init__(self, given: Input) -> None:
        """Read the queue's place; GuestError if it cannot be there."""
        self.memory = Memory()
        features = given.choice(FEATURES)
        size = given.choice(SIZES)
        places = given.number(1)
        next_available = given.number(2) if places & 4 else 0
        base = HIGH if places & 1 else 0x1000
        available = base + 16 * size
        ring = Ring(size, base, available, available + (4 + 2 * size + 2 + 3 & ~3))
        if places & 2:
            ring = Ring(size, given.number(5), given.number(5), given.number(5))
        self.ring = ring
        self.queue = Virtqueue(self.memory, ring, features, next_available=next_available)
        self.reference = Reference(self.memory, ring, features, next_available)
        self.added = next_available
        self.taken: deque[Chain] = deque()

    def step(self, given: Input) -> bool:
        """Do one thing; False once the queue has refused an action of the driver."""
        queue, memory, ring = self.queue, self.memory, self.ring
        match given.number(1) % 12:
            case 0 | 1:
                memory.put(ring.descriptors + 16 * given.number(1), self._descriptor(given))
            case 2:
                memory.put(self._address(given), self._descriptor(given))
            case 3:
                self._publish(given.number(1))
            case 4:
                return self._pop(with_pieces=bool(given.number(1) & 1))
            case 5:
                if self.taken:
                    self._push(given.number(2))
            case 6:
                queue.push_together([(chain, 1) for chain in self.taken])
                self.taken.clear()
            case 7:
                queue.needs_interrupt()
            case 8:
                if given.number(1) & 1:
                    queue.enable_kicks()
                else:
                    queue.disable_kicks()
            case 9:
                memory.put(ring.available + given.number(1) * 2, given.piece(2))
            case 10:
                self._honest_table(given)
            case _:
                memory.put(self._address(given), given.piece(given.number(1)))
        return True

    def _publish(self, head: int) -> None:
        place = self.ring.available + 4 + 2 * (self.added % self.ring.size)
        self.memory.put(place, head.to_bytes(2, "little"))
        self.added = (self.added + 1) & 0xFFFF
        self.memory.put(self.ring.available + 2, self.added.to_bytes(2, "little"))

    def _pop(self, *, with_pieces: bool) -> bool:
        expected: list[Buffer] | None = []
        is_legal = True
        try:
            expected = self.reference.take()
        except RefusedError:
            is_legal = False
        chain, refusal = None, ""
        try:
            chain = self.queue.pop(with_pieces=with_pieces)
        except GuestError as err:
            refusal = str(err)
            check_line(refusal)
        assert bool(refusal) != is_legal, f"{expected}: {chain}, {refusal!r}"
        if refusal:
            return False
        found: list[Buffer] | None = None
        if chain is not None:
            chain.spread()
            self.taken.append(chain)
            found = [self.memory.buffer(view, False) for view in chain.readable]
            found += [self.memory.buffer(view, True) for view in chain.writable]
        assert expected == found
        return True

    def _push(self, written: int) -> None:
        before = self.queue.next_used
        chain = self.taken.popleft()
        self.queue.push(chain, written)
        element = self.ring.used + 4 + 8 * (before % self.ring.size)
        assert self.memory.word(element, 8) == chain.head | written << 32
        assert self.memory.word(self.ring.used + 2, 2) == (before + 1) & 0xFFFF

    def _address(self, given: Input) -> int:
        kind = given.number(1)
        if kind < 8:
            return given.number(8)
        return given.number(2) + (HIGH if kind & 1 else 0)

    def _descriptor(self, given: Input) -> bytes:
        address = self._address(given)
        length = given.number(4 if given.number(1) == 255 else 2)
        flags, following = given.number(1), given.number(1)
        return _DESCRIPTOR.pack(address, length, flags, following)

    def _honest_table(self, given: Input) -> None:
        """Write a table as drivers do: header, pieces one after the other, status."""
        table, buffers = self._address(given), self._address(given)
        count, length = 1 + given.number(2) % _TABLE_MAX, given.number(1)
        middle = _NEXT | _WRITE * (given.number(1) & 1)
        for number in range(count):
            flags = _NEXT if number == 0 else middle if number < count - 1 else _WRITE
            address = buffers + length * number & 2**64 - 1
            entry = _DESCRIPTOR.pack(address, length, flags, number + 1)
            self.memory.put(table + 16 * number, entry)
        head = given.number(1)
        indirect = _DESCRIPTOR.pack(table, 16 * count, _INDIRECT, 0)
        self.memory.put(self.ring.descriptors + 16 * head, indirect)
        self._publish(head)


def run(data: bytes) -> None:
    """Feed a queue."""
    given = Input(data)
    try:
        session = Session(given)
    except GuestError as err:
        check_line(str(err))
        return
    for _ in range(STEPS_MAX):
        if given.is_over or not session.step(given):
            return


def seeds() -> list[bytes]:
    """Return inputs that reach each path: direct, indirect in order, pieces, in both memories."""
    low, high = bytes([8]), bytes([9])
    data = low + b"\x00\x50"
    direct = bytes([0, 0]) + data + b"\x00\x20\x00" + bytes([_NEXT, 1])
    direct += (
        bytes([0, 1]) + data + b"\x00\x20\x00" + bytes([_WRITE, 0]) + bytes([3, 0, 4, 0, 5, 9])
    )
    found = [bytes([0, 0, 0]) + direct + bytes([5, 7, 0, 7, 8, 1, 8, 0])]
    for memory in (low, high):
        for count in (2, 3, 40, 200):
            for is_writable in (0, 1):
                table = bytes([10]) + memory + b"\x00\x20" + memory + b"\x00\x00"
                table += count.to_bytes(2, "little") + bytes([16, is_writable, 0])
                for pieces in (0, 1):
                    again = table + bytes([4, pieces, 4, pieces, 5, 8, 0])
                    found.append(bytes([0, 0, memory[0] & 1]) + again * 2)
    return found
