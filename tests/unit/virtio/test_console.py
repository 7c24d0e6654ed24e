"""virtio-console: bytes in both directions, none lost, and each side can hold the other."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.virtio_driver import DriverQueue, PlainMemory
from vmm_kvm.virtio.console import RECEIVE_QUEUE, TRANSMIT_QUEUE, VirtioConsole
from vmm_kvm.virtio.device import Backend

INPUT, OUTPUT = 0x10000, 0x20000


class Rig:
    """A started console with its two queues; it is served as soon as it asks."""

    def __init__(self, *, is_started: bool = True) -> None:
        self.memory = PlainMemory()
        self.queues = [DriverQueue(self.memory, base=base) for base in (0x1000, 0x2000)]
        self.sides = [queue.device(self.memory) for queue in self.queues]
        self.output = b""
        self.rooms = 0
        self.changes = 0
        self.written = OUTPUT
        """The address of the guest's next output."""
        self.device = VirtioConsole(self._transmit, on_receive_room=self._room, size=(80, 25))
        self.device.attach(self)
        if is_started:
            self.device.start(0)

    def _transmit(self, data: bytes) -> None:
        self.output += data

    def _room(self) -> None:
        self.rooms += 1

    def notify(self, index: int) -> None:
        """Serve a queue, as a transport would on the device's thread."""
        self.device.process(index, self.sides[index])

    def config_changed(self) -> None:
        """Count."""
        self.changes += 1

    def write(self, *parts: bytes) -> None:
        """Let the guest write one chain."""
        buffers = []
        for part in parts:
            self.memory.bytes[self.written : self.written + len(part)] = part
            buffers.append((self.written, len(part), False))
            self.written += len(part)
        self.queues[TRANSMIT_QUEUE].add(*buffers)
        self.notify(TRANSMIT_QUEUE)

    def offer(self, size: int) -> None:
        """Let the guest offer room for input, at most 256 bytes."""
        queue = self.queues[RECEIVE_QUEUE]
        queue.add((INPUT + 0x100 * queue.next_descriptor, size, True))
        self.notify(RECEIVE_QUEUE)

    def typed(self) -> list[bytes]:
        """Return the returned chains' contents since the last call."""
        starts = [
            (INPUT + 0x100 * head, written) for head, written in self.queues[RECEIVE_QUEUE].used()
        ]
        return [bytes(self.memory.bytes[start : start + size]) for start, size in starts]


@pytest.fixture
def rig() -> Rig:
    """A started console."""
    return Rig()


def test_what_it_is(rig: Rig) -> None:
    """The device is a console with a size and emergency output, one port, two queues."""
    backend: Backend = rig.device
    assert (backend.device_id, backend.features, len(backend.queue_sizes)) == (3, 0b101, 2)
    assert struct.unpack("<HHII", backend.config()) == (80, 25, 1, 0)
    backend.close()


def test_output_is_one_chain(rig: Rig) -> None:
    """Output is all buffers of a chain in order; the chain returns with nothing written."""
    rig.write(b"hello, ", b"world\n")
    assert rig.output == b"hello, world\n"
    assert rig.queues[TRANSMIT_QUEUE].used() == [(0, 0)]


def test_large_output_comes_in_pieces(rig: Rig) -> None:
    """No single piece of output is larger than 64 KiB."""
    data = bytes(range(256)) * 700
    rig.write(data)
    assert rig.output == data


def test_output_waits_for_a_slow_reader(rig: Rig) -> None:
    """While held, output stays in the guest's memory; after release all of it comes."""
    rig.device.throttle(hold=True)
    rig.write(b"one")
    rig.write(b"two")
    assert rig.output == b""
    assert rig.queues[TRANSMIT_QUEUE].used() == []
    rig.device.throttle(hold=False)
    assert rig.output == b"onetwo"
    assert len(rig.queues[TRANSMIT_QUEUE].used()) == 2


def test_a_hold_within_a_chain() -> None:
    """A reader that holds during a large chain gets the rest of it later, once."""

    class Slow(Rig):
        def _transmit(self, data: bytes) -> None:
            super()._transmit(data)
            self.device.throttle(hold=True)

    rig = Slow()
    data = bytes(range(256)) * 700
    rig.write(data)
    pieces = [len(rig.output)]
    while len(rig.output) < len(data):
        rig.device.throttle(hold=False)
        pieces.append(len(rig.output))
    assert rig.output == data
    assert pieces == [1 << 16, 2 << 16, len(data)]
    assert rig.queues[TRANSMIT_QUEUE].used() == []
    rig.device.throttle(hold=False)
    assert rig.queues[TRANSMIT_QUEUE].used() == [(0, 0)]


def test_a_queue_that_was_reset_begins_anew() -> None:
    """A pending chain of the old queue is neither finished nor returned in the new one."""
    rig = Rig()
    rig.device.throttle(hold=True)
    rig.write(b"old")
    rig.queues[TRANSMIT_QUEUE] = DriverQueue(rig.memory, base=0x3000)
    rig.sides[TRANSMIT_QUEUE] = rig.queues[TRANSMIT_QUEUE].device(rig.memory)
    rig.device.throttle(hold=False)
    rig.write(b"new")
    assert rig.output == b"new"
    assert rig.queues[TRANSMIT_QUEUE].used() == [(0, 0)]


def test_emergency_output_needs_no_queue() -> None:
    """A byte written to the configuration is output, before any driver is ready."""
    rig = Rig(is_started=False)
    rig.device.write_config(8, b"!\0\0\0")
    rig.device.write_config(0, b"\0\0")
    rig.device.write_config(8, b"")
    assert rig.output == b"!"


def test_input_fills_what_the_guest_offers(rig: Rig) -> None:
    """Input fills the next chain, and its rest goes into the one after."""
    rig.offer(4)
    assert rig.device.receive(b"hello") == 5
    assert rig.typed() == [b"hell"]
    rig.offer(4)
    assert rig.typed() == [b"o"]


def test_input_waits_outside_until_there_is_room(rig: Rig) -> None:
    """Input that does not fit is not taken; `on_receive_room` says when to offer it again."""
    taken = rig.device.receive(bytes(10_000))
    assert 0 < taken < 10_000
    assert rig.device.receive(b"x") == 0
    rooms = rig.rooms
    rig.offer(1)
    assert rig.rooms == rooms + 1
    assert rig.device.receive(b"xy") == 1


def test_no_input_before_the_driver_is_ready() -> None:
    """Before DRIVER_OK and after a reset no input is taken; a start announces room."""
    rig = Rig(is_started=False)
    assert rig.device.receive(b"early") == 0
    rig.device.start(0)
    assert rig.rooms == 1
    assert rig.device.receive(b"early") == 5
    rig.device.reset()
    assert rig.device.receive(b"late") == 0
    rig.device.start(0)
    rig.offer(8)
    assert rig.typed() == []


def test_a_chain_without_room_comes_back_empty(rig: Rig) -> None:
    """A buffer that the guest wrote takes no input; the next one does."""
    rig.device.receive(b"a")
    rig.queues[RECEIVE_QUEUE].add((INPUT, 8, False))
    rig.queues[RECEIVE_QUEUE].add((INPUT, 8, True))
    rig.notify(RECEIVE_QUEUE)
    assert [written for _, written in rig.queues[RECEIVE_QUEUE].used()] == [0, 1]


def test_the_guest_learns_of_a_new_size(rig: Rig) -> None:
    """A new size is a change of the configuration; the same size is none."""
    rig.device.resize(80, 25)
    assert rig.changes == 0
    rig.device.resize(132, 50)
    assert rig.changes == 1
    assert struct.unpack_from("<HH", rig.device.config()) == (132, 50)


@given(
    st.lists(
        st.one_of(
            st.binary(min_size=1, max_size=40),
            st.integers(1, 40),
        ),
        max_size=60,
    )
)
def test_no_byte_of_input_is_lost(steps: list[bytes | int]) -> None:
    """In any order of typing and room, the guest reads the taken input, in order."""
    rig = Rig()
    taken, read = b"", b""
    for step in steps:
        if isinstance(step, bytes):
            taken += step[: rig.device.receive(step)]
        elif rig.queues[0].added - rig.queues[0].seen < rig.queues[0].ring.size:
            rig.offer(step)
        read += b"".join(rig.typed())
    while read != taken:
        rig.offer(40)
        found = rig.typed()
        assert found
        read += b"".join(found)
