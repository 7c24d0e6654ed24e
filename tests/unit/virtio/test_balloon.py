"""virtio-balloon: memory that a guest does not use goes back to the host, and no other."""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.virtio_driver import EVENT_IDX, INDIRECT, DriverQueue
from vmm_kvm.bits import KIB, MIB, PAGE_SIZE
from vmm_kvm.errors import GuestError, GuestMemoryError, VirtqueueError
from vmm_kvm.memfd import make_constant
from vmm_kvm.memory import GuestMemory
from vmm_kvm.virtio import abi
from vmm_kvm.virtio.balloon import BalloonState, GuestMemoryUse, VirtioBalloon
from vmm_kvm.virtio.device import Backend
from vmm_kvm.virtio.queue import Virtqueue

INFLATE, DEFLATE, STATISTICS, REPORT = range(4)
SIZE = 16 * MIB
BUFFER = 0x20000
"""The address of the driver's page numbers or statistics."""
ALL = (
    1 << abi.VIRTIO_BALLOON_F_STATS_VQ
    | 1 << abi.VIRTIO_BALLOON_F_DEFLATE_ON_OOM
    | 1 << abi.VIRTIO_BALLOON_F_REPORTING
)


class Rig:
    """A started device, a driver, and the RAM of both."""

    def __init__(self, memory: GuestMemory, features: int = ALL) -> None:
        self.memory = memory
        self.device = VirtioBalloon(memory)
        self.device.attach(self)
        view = memory.view(0, MIB)
        self.queues = [DriverQueue(view, 64, 0x2000 * (number + 1)) for number in range(4)]
        self.sides = [Virtqueue(memory, queue.ring, INDIRECT | EVENT_IDX) for queue in self.queues]
        self.device.start(features)

    def notify(self, index: int) -> None:
        """Serve a queue, as the device's thread would."""
        self.device.process(index, self.sides[index])

    def config_changed(self) -> None:
        """Fail: it never changes by itself."""
        raise AssertionError

    def inflate(self, *numbers: int, index: int = INFLATE) -> None:
        """Put pages into the balloon, by their numbers."""
        self.memory.write(BUFFER, struct.pack(f"<{len(numbers)}I", *numbers))
        self.queues[index].add((BUFFER, 4 * len(numbers), False))
        self.notify(index)

    def report(self, *pages: tuple[int, int], index: int = REPORT) -> None:
        """Report free memory: address and bytes of each piece."""
        self.queues[index].add(*((gpa, size, True) for gpa, size in pages))
        self.notify(index)

    def tell(self, data: bytes) -> None:
        """Give the device statistics."""
        self.memory.write(BUFFER, data)
        self.queues[STATISTICS].add((BUFFER, len(data), False))
        self.notify(STATISTICS)


@contextmanager
def ram(kind: str, size: int = SIZE) -> Iterator[GuestMemory]:
    """Make guest memory of one of its kinds, full of ones."""
    ranges = ((0, size // 2), (1 << 32, size // 2))
    if kind == "mapped":
        fd = make_constant("base", (b"\2" * size,))
        try:
            memory = GuestMemory(ranges, is_private=True, mapped=(fd, 0))
        finally:
            os.close(fd)
    else:
        memory = GuestMemory(ranges, is_private=kind == "private")
    with memory:
        for region in memory.regions:
            memory.write(region.gpa, b"\1" * region.size)
        memory.write(0, bytes(MIB))  # the rings' place
        yield memory


kinds = pytest.mark.parametrize("kind", ["shared", "private", "mapped"])


def test_what_it_is() -> None:
    """The device is a balloon with four queues, and a target of zero."""
    with ram("private") as memory:
        backend: Backend = Rig(memory).device
        assert (backend.device_id, backend.features, len(backend.queue_sizes)) == (5, ALL, 4)
        assert backend.config() == bytes(8)
        backend.write_config(4, b"\3\0\0\0")
        backend.write_config(0, b"\7\0\0\0")
        backend.write_config(5, b"\7\0\0\0\0\0\0")
        assert backend.config() == bytes(4) + b"\3\0\0\0"
        backend.reset()
        assert backend.config() == bytes(8)


@kinds
def test_reported_memory_is_the_hosts_again(kind: str) -> None:
    """A report of 6 MiB frees as much of the RAM's memory; neighbouring bytes stay."""
    with ram(kind) as memory:
        rig = Rig(memory)
        before = memory.resident_size()
        rig.report((2 * MIB, 4 * MIB), (1 << 32, 2 * MIB))
        if kind != "mapped":  # its pages belong to the file, which is in memory too
            assert memory.resident_size() <= before - 6 * MIB
        content = 2 if kind == "mapped" else 0
        for gpa, value in ((2 * MIB, content), (6 * MIB - 1, content), (1 << 32, content)):
            assert memory.read(gpa, 1) == bytes((value,)), hex(gpa)
        for gpa in (2 * MIB - 1, 6 * MIB, (1 << 32) + 2 * MIB):
            assert memory.read(gpa, 1) == b"\1", hex(gpa)
        assert rig.device.given_back == 6 * MIB
        assert [written for _, written in rig.queues[REPORT].used()] == [0]


@kinds
def test_inflated_pages_are_the_hosts_again(kind: str) -> None:
    """Pages in any order, some twice, are freed; deflating them does nothing."""
    with ram(kind) as memory:
        rig = Rig(memory)
        rig.inflate(520, 513, 512, 513, 1 << 20)
        content = 2 if kind == "mapped" else 0
        gone = {512, 513, 520, 1 << 20}
        for number in (511, 512, 513, 514, 519, 520, 521, 1 << 20, (1 << 20) + 1):
            value = content if number in gone else 1
            assert memory.read(number * PAGE_SIZE, PAGE_SIZE) == bytes((value,)) * PAGE_SIZE, number
        assert rig.device.given_back == 4 * PAGE_SIZE
        rig.inflate(511, index=DEFLATE)
        assert memory.read(511 * PAGE_SIZE, 1) == b"\1"
        assert rig.device.given_back == 4 * PAGE_SIZE


def test_parts_of_pages_stay() -> None:
    """Only whole pages of a report are discarded."""
    with ram("shared") as memory:
        rig = Rig(memory)
        rig.report((2 * MIB + 1, 2 * PAGE_SIZE), (3 * MIB + 8, 100))
        assert memory.read(2 * MIB, PAGE_SIZE) == b"\1" * PAGE_SIZE
        assert memory.read(2 * MIB + PAGE_SIZE, PAGE_SIZE) == bytes(PAGE_SIZE)
        assert memory.read(2 * MIB + 2 * PAGE_SIZE, PAGE_SIZE) == b"\1" * PAGE_SIZE
        assert rig.device.given_back == PAGE_SIZE


def test_memory_that_is_no_ram_stays() -> None:
    """A report of a disk in guest memory, or with buffers to read, discards nothing."""
    with ram("shared") as memory:
        disk = bytearray(b"\5" * 64 * KIB)
        memory.attach(1 << 40, memoryview(disk))
        rig = Rig(memory)
        rig.report((1 << 40, 64 * KIB))
        assert disk == b"\5" * 64 * KIB
        rig.queues[REPORT].add((2 * MIB, MIB, False))
        rig.notify(REPORT)
        assert memory.read(2 * MIB, 1) == b"\1"
        assert rig.device.given_back == 0


def test_pages_outside_of_ram_end_the_device() -> None:
    """Page numbers beyond RAM, or too many of them, stop the device."""
    with ram("private") as memory:
        with pytest.raises(GuestMemoryError):
            Rig(memory).inflate(0xFFFF_FFFF)
        rig = Rig(memory)
        rig.queues[INFLATE].add((0x40000, 4 * 4097, False))
        with pytest.raises(VirtqueueError, match="16388 bytes of page numbers at once"):
            rig.notify(INFLATE)


@pytest.mark.parametrize(
    ("features", "index"),
    [
        (ALL & ~(1 << abi.VIRTIO_BALLOON_F_STATS_VQ), STATISTICS),
        (ALL, REPORT),
    ],
)
def test_queues_are_counted_as_linux_does(features: int, index: int) -> None:
    """Without statistics, the queue of reports has their number."""
    with ram("private") as memory:
        rig = Rig(memory, features)
        rig.report((2 * MIB, MIB), index=index)
        assert memory.read(2 * MIB, 1) == b"\0"


def test_a_queue_without_its_feature_is_dead() -> None:
    """A queue does nothing if the driver has not accepted its feature."""
    with ram("private") as memory:
        rig = Rig(memory, 0)
        rig.report((2 * MIB, MIB))
        rig.report((2 * MIB, MIB), index=STATISTICS)
        assert memory.read(2 * MIB, 1) == b"\1"
        assert rig.queues[REPORT].used() == []


def test_statistics_are_asked_for() -> None:
    """The device keeps the driver's buffer until statistics are requested."""
    with ram("private") as memory:
        rig = Rig(memory)
        rig.device.ask()  # before there is a buffer: it is returned at once
        tags = {0: 11, 1: 12, 2: 13, 3: 99, 4: 14, 5: 1 << 63, 6: 15, 7: 16, 12: 98}
        data = b"".join(struct.pack("<HQ", tag, value) for tag, value in tags.items())
        rig.tell(data + b"\6\0\1")
        wanted = GuestMemoryUse(1 << 63, 14, 15, 16, 11, 12, 13)
        assert rig.device.memory_use == wanted
        assert len(rig.queues[STATISTICS].used()) == 1
        rig.tell(struct.pack("<HQ", abi.VIRTIO_BALLOON_S_AVAIL, 5))
        assert rig.device.memory_use == GuestMemoryUse(None, None, 5, None, None, None, None)
        assert rig.queues[STATISTICS].used() == []
        rig.device.ask()
        assert len(rig.queues[STATISTICS].used()) == 1
        rig.device.reset()
        assert rig.device.memory_use is None


def test_a_second_buffer_of_statistics_ends_the_device() -> None:
    """A driver has one buffer; a second one stops the device."""
    with ram("private") as memory:
        rig = Rig(memory)
        rig.tell(b"\0")
        with pytest.raises(VirtqueueError, match="a second buffer"):
            rig.tell(b"\0")


def test_state() -> None:
    """A state has the balloon's size; the driver's buffer is taken again from its queue."""
    with ram("private") as memory:
        rig = Rig(memory)
        rig.device.write_config(4, struct.pack("<I", 1234))
        other = VirtioBalloon(memory)
        (part,), (target,) = rig.device.parts("p"), other.parts("p")
        assert rig.device.save() == BalloonState(pages=1234)
        target.restore(*part.save())
        assert other.config() == rig.device.config()


@settings(max_examples=60)
@given(
    st.lists(
        st.tuples(
            st.integers(0, 3),
            st.lists(
                st.tuples(st.integers(0, 2 * SIZE), st.integers(1, MIB), st.booleans()),
                min_size=1,
                max_size=4,
            ),
        ),
        max_size=12,
    )
)
def test_a_hostile_driver_discards_its_own_ram_alone(
    chains: list[tuple[int, list[tuple[int, int, bool]]]],
) -> None:
    """With any requests only guest errors are raised, and memory outside RAM stays unchanged."""
    with ram("shared", MIB * 4) as memory:
        beside = bytearray(b"\5" * 64 * KIB)
        memory.attach(SIZE, memoryview(beside))
        rig = Rig(memory)
        for index, buffers in chains:
            rig.queues[index].add(*buffers)
            try:
                rig.notify(index)
            except GuestError:
                break
        assert beside == b"\5" * 64 * KIB
