"""Frames on a stream socket: whole ones, however the stream is cut."""

from __future__ import annotations

import os
import select
import socket
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.virtio_driver import DriverQueue, PlainMemory
from vmm_kvm.errors import HaltError
from vmm_kvm.net.paths import Traffic
from vmm_kvm.net.stream import FRAME_MAX, Stream
from vmm_kvm.virtio.net import VirtioNet
from vmm_kvm.virtio.worker import Worker

MAC = bytes.fromhex("fee1bb000001")
OTHER = bytes.fromhex("fee1bb000002")
HEADER = bytes(12)
WAIT_S = 10.0


def packed(frame: bytes) -> bytes:
    """Return a frame as it is on the stream."""
    return len(frame).to_bytes(4, "big") + frame


@pytest.fixture
def wire() -> Iterator[tuple[Stream, socket.socket]]:
    """Return a stream and the socket at its other end."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.settimeout(WAIT_S)
        yield Stream(ours.fileno(), "nic0", Traffic()), theirs


def arrived(stream: Stream) -> list[bytes]:
    """Return the received frames, without their headers."""
    buffer = memoryview(bytearray(FRAME_MAX + 12))
    found = []
    while size := stream.receive(0, [buffer]):
        found.append(bytes(buffer[12:size]))
    return found


def test_frames_pass_both_ways(wire: tuple[Stream, socket.socket]) -> None:
    """A frame's length precedes it on the stream; the virtio header does not appear there."""
    stream, other = wire
    other.sendall(packed(b"one") + packed(b"two"))
    assert arrived(stream) == [b"one", b"two"]
    assert stream.send(0, [HEADER, b"th", b"ree"])
    assert other.recv(100) == packed(b"three")


def test_what_goes_through_is_counted() -> None:
    """Bytes of sent and received frames count, those of a lost one do not."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        traffic = Traffic()
        stream = Stream(ours.fileno(), "nic0", traffic)
        theirs.sendall(packed(b"one") + packed(b"four"))
        assert arrived(stream) == [b"one", b"four"]
        assert stream.send(0, [HEADER, b"three"])
        assert (traffic.received, traffic.sent) == (7, 5)
        theirs.close()
        assert not stream.send(0, [HEADER, b"lost"])
        assert (traffic.received, traffic.sent) == (7, 5)


@given(frames=st.lists(st.binary(min_size=1, max_size=40), max_size=5), data=st.data())
def test_frames_in_pieces(frames: list[bytes], data: st.DataObject) -> None:
    """A frame may be cut at any place of the stream."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        stream = Stream(ours.fileno(), "nic0", Traffic())
        rest, found = b"".join(map(packed, frames)), []
        while rest:
            size = data.draw(st.integers(1, len(rest)))
            theirs.sendall(rest[:size])
            rest = rest[size:]
            found += arrived(stream)
        assert found == frames


def test_a_length_that_is_none(wire: tuple[Stream, socket.socket]) -> None:
    """An impossible length ends the reading, and takes no memory."""
    stream, other = wire
    other.sendall(b"\xff" * 1000)
    assert arrived(stream) == []


def test_a_reader_that_is_slow(wire: tuple[Stream, socket.socket]) -> None:
    """A slow reader loses frames, but never a part of one."""
    stream, other = wire
    frames = [bytes((number % 256,)) * 9000 for number in range(200)]
    sent = [frame for frame in frames if stream.send(0, [HEADER, frame])]
    assert 0 < len(sent) < len(frames)
    got = bytearray()
    while len(got) < sum(map(len, sent)) + 4 * len(sent):
        got += other.recv(1 << 20)
        stream.receive(0, [])  # which sends the rest of the last frame
    assert bytes(got) == b"".join(map(packed, sent))


def test_an_end(wire: tuple[Stream, socket.socket]) -> None:
    """A peer that is gone counts as an unplugged link."""
    stream, other = wire
    other.close()
    assert arrived(stream) == []
    assert not stream.send(0, [HEADER, b"frame"])


class Calls:
    """A Frontend that writes an eventfd."""

    def __init__(self) -> None:
        self.fds = [os.eventfd(0, os.EFD_CLOEXEC) for _ in range(2)]

    def interrupt(self, index: int) -> None:
        """Write to the test's eventfd."""
        os.eventfd_write(self.fds[index], 1)

    def interrupt_fd(self, _index: int) -> int | None:
        """Return none: the device then calls `interrupt`."""
        return None

    def config_changed(self) -> None:
        """Ignore it."""

    def fail(self, reason: str) -> None:
        """Fail: it must never be called."""
        raise AssertionError(reason)

    def halt(self, err: HaltError) -> None:
        """Fail: it must never be called."""
        raise err


def test_a_device_on_a_stream(wire: tuple[Stream, socket.socket]) -> None:
    """Each frame that arrives wakes the device, also if several come at once, or late."""
    stream, other = wire
    memory, calls = PlainMemory(), Calls()
    queues = [DriverQueue(memory, 8, base) for base in (0x1000, 0x2000)]
    backend = VirtioNet(stream, MAC, name="nic0")
    worker = Worker(backend, memory, "nic0")
    backend.attach(worker)
    worker.attach(calls)
    worker.start(0, {at: queue.ring for at, queue in enumerate(queues)})
    try:
        got = 0
        for number in range(30):
            frame = (MAC + OTHER).ljust(60 + number, b"x")
            other.sendall(packed(frame) * 2)
            for slot in range(2):
                queues[0].add((0x10000 + 0x1000 * slot, 1500, True))
            worker.kick(0)
            used: list[tuple[int, int]] = []
            while len(used) < 2:
                assert select.select([calls.fds[0]], [], [], WAIT_S)[0], "no interrupt"
                os.eventfd_read(calls.fds[0])
                used += queues[0].used()
            assert [size for _, size in used] == [len(frame) + 12] * 2
            got += 2
            memory.bytes[0x20000 : 0x20000 + 72] = HEADER + (OTHER + MAC).ljust(60, b"y")
            queues[1].add((0x20000, 72, False))
            worker.kick(1)
            assert other.recv(100) == packed((OTHER + MAC).ljust(60, b"y"))
        assert backend.counters.received == got
    finally:
        worker.close()
        for fd in calls.fds:
            os.close(fd)
