"""virtio-net's data queues: frames between a port and guest memory, with any guest."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.frame_port import FakePort
from tests.virtio_driver import Buffer, DriverQueue, PlainMemory
from vmm_kvm.errors import GuestError
from vmm_kvm.virtio import abi
from vmm_kvm.virtio.net import BUDGET, VirtioNet

MAC = bytes.fromhex("fee1bb000001")
OTHER = bytes.fromhex("fee1bb000002")
GROUP = bytes.fromhex("01005e000001")
MERGEABLE = 1 << abi.VIRTIO_NET_F_MRG_RXBUF
COMMANDS = 1 << abi.VIRTIO_NET_F_CTRL_VQ
DATA = 0x10000
HEADER = bytes(range(10)) + bytes(2)
RECEIVE, TRANSMIT = 0, 1


class Rig:
    """An interface with both queues of its driver; the test calls `serve`."""

    def __init__(
        self, *, features: int = MERGEABLE, is_locked: bool = False, has_filter: bool = True
    ) -> None:
        self.port = FakePort(has_filter=has_filter)
        self.device = VirtioNet(self.port, MAC, name="nic0", is_locked=is_locked)
        self.memory = PlainMemory()
        self.queues = [DriverQueue(self.memory, 64, base) for base in (0x1000, 0x4000)]
        self.sides = [queue.device(self.memory) for queue in self.queues]
        self.asked: list[int] = []
        self.watched: set[int] = set()
        self.device.attach(self)
        self.device.start(features)

    def notify(self, index: int) -> None:
        """Note that the device wants to continue."""
        self.asked.append(index)

    def config_changed(self) -> None:
        """Ignore it."""

    def watch(self, fd: int, index: int) -> None:
        """Note it."""
        assert index == RECEIVE
        self.watched.add(fd)

    def unwatch(self, fd: int) -> None:
        """Note it."""
        self.watched.discard(fd)

    def offer(self, *sizes: int) -> list[int]:
        """Make a chain of one buffer available for each size; returns the buffers' addresses."""
        places = []
        for size in sizes:
            places.append(DATA + 0x1000 * (self.queues[RECEIVE].added % 128))
            self.queues[RECEIVE].add((places[-1], size, True))
        return places

    def serve(self, index: int = RECEIVE) -> list[int]:
        """Serve a queue; returns the sizes of the returned chains."""
        self.device.process(index, self.sides[index])
        return [written for _, written in self.queues[index].used()]

    def send(self, data: bytes, *cuts: int) -> None:
        """Make a frame available, cut at these places."""
        self.memory.bytes[DATA : DATA + len(data)] = data
        ends = [*cuts, len(data)]
        buffers: list[Buffer] = []
        at = 0
        for end in ends:
            buffers.append((DATA + at, end - at, False))
            at = end
        self.queues[TRANSMIT].add(*buffers)
        self.serve(TRANSMIT)

    def read(self, place: int, size: int) -> bytes:
        """Return guest memory."""
        return bytes(self.memory.bytes[place : place + size])


def frame(size: int, target: bytes = MAC, source: bytes = OTHER) -> bytes:
    """Return a frame of `size` bytes with a header before it."""
    return HEADER + (target + source + bytes(i % 251 for i in range(size)))[:size]


def test_what_it_is() -> None:
    """The device offers a queue pair and commands, and the offloads of its port."""
    device = Rig().device
    assert (device.device_id, device.queue_sizes) == (1, (256, 256, 64))
    offered = {number for number in range(64) if device.features >> number & 1}
    assert {abi.VIRTIO_NET_F_CSUM, abi.VIRTIO_NET_F_HOST_TSO4} <= offered
    assert not offered & {abi.VIRTIO_NET_F_HOST_TSO6, abi.VIRTIO_NET_F_MQ}


def test_a_frame_that_fits() -> None:
    """A frame that fits is in one buffer, which says that it is the only one."""
    rig = Rig()
    (place,) = rig.offer(1526)
    rig.port.arrived.append(frame(60))
    assert rig.serve() == [72]
    assert rig.read(place, 72) == HEADER[:10] + b"\1\0" + frame(60)[12:]


def test_a_frame_in_several_buffers() -> None:
    """A longer frame is spread over as many buffers as it needs, and the first has the number."""
    rig = Rig()
    places = rig.offer(1000, 1000, 1000, 1000)
    data = frame(2500)
    rig.port.arrived.append(data)
    assert rig.serve() == [1000, 1000, 512]
    parts = [rig.read(place, size) for place, size in zip(places, (1000, 1000, 512), strict=False)]
    assert b"".join(parts) == data[:10] + b"\3\0" + data[12:]


def test_a_frame_that_has_to_wait() -> None:
    """A frame waits until there are enough buffers, and arrives before later ones."""
    rig = Rig()
    first = rig.offer(1000)
    data = frame(1500)
    rig.port.arrived += [data, frame(60)]
    assert rig.serve() == []
    second = rig.offer(1000, 1000)
    assert rig.serve() == [1000, 512, 72]
    assert rig.read(first[0], 1000) + rig.read(second[0], 512) == data[:10] + b"\2\0" + data[12:]


def test_without_merging_a_frame_that_is_too_long_is_lost() -> None:
    """Without merging a frame that is too long is lost, and the next one that fits arrives."""
    rig = Rig(features=0)
    rig.offer(100)
    rig.port.arrived += [frame(200), frame(60)]
    assert rig.serve() == [72]
    assert (rig.device.counters.dropped, rig.device.counters.received) == (1, 1)


def test_a_frame_that_never_fits_is_lost() -> None:
    """A frame larger than all buffers of the queue is lost, and the next one arrives."""
    rig = Rig()
    rig.offer(*[20] * 64)
    rig.port.arrived += [frame(2000), frame(8)]
    assert rig.serve() == [20]
    assert rig.device.counters.dropped == 1


@pytest.mark.parametrize("first", [1, 9, 10, 11, 12])
def test_headers_cut_anywhere(first: int) -> None:
    """The header may be split at any place."""
    rig = Rig()
    rig.queues[RECEIVE].add((DATA, first, True), (DATA + first, 1000, True))
    rig.port.arrived.append(frame(60))
    assert rig.serve() == [72]
    assert rig.read(DATA, 72) == HEADER[:10] + b"\1\0" + frame(60)[12:]


def test_a_share_of_the_thread() -> None:
    """After its budget a queue waits for the others, and asks to be served again."""
    rig = Rig()
    rig.port.arrived += [frame(60)] * (BUDGET + 1)
    rig.offer(*[100] * 64)
    assert len(rig.serve()) == BUDGET
    assert rig.asked == [RECEIVE]
    rig.offer(100)
    assert len(rig.serve()) == 1


def test_sending() -> None:
    """The port gets the driver's frame unchanged, header included, however it is cut."""
    rig = Rig()
    for cuts in ((), (12,), (5, 12, 30)):
        rig.send(frame(60), *cuts)
    assert rig.port.sent == [frame(60)] * 3


def test_a_port_that_takes_nothing() -> None:
    """If the port is full frames are lost, and the driver gets its buffers back."""
    rig = Rig()
    rig.port.is_full = True
    rig.send(frame(60))
    assert (rig.device.counters.sent, rig.device.counters.dropped) == (0, 1)
    assert rig.queues[TRANSMIT].used_index == 1


@pytest.mark.parametrize("cuts", [(), (12,), (3, 13, 20)])
def test_a_locked_address(cuts: tuple[int, ...]) -> None:
    """Frames from the locked address are sent; those from another, and short ones, are not."""
    rig = Rig(is_locked=True)
    rig.send(frame(60, OTHER, MAC), *cuts)
    rig.send(frame(60, OTHER, OTHER), *cuts)
    rig.send(frame(60)[:20])
    assert rig.port.sent == [frame(60, OTHER, MAC)]
    assert rig.device.counters.dropped == 2


def test_filtering_what_arrives() -> None:
    """If the port does not filter, the device drops unwanted frames before the guest sees them."""
    rig = Rig(is_locked=True, has_filter=False)
    (place,) = rig.offer(1526)
    rig.port.arrived += [frame(60, OTHER)]
    assert rig.serve() == []
    assert rig.read(place, 72) == bytes(72)
    rig.port.arrived += [frame(60, MAC), frame(61, GROUP)]
    rig.offer(1526)
    assert rig.serve() == [72, 73]


def test_a_reset_forgets_everything() -> None:
    """A reset forgets waiting buffers and frames, and watches nothing any more."""
    rig = Rig()
    assert rig.watched == {77}
    rig.offer(100)
    rig.port.arrived.append(frame(500))
    assert rig.serve() == []
    rig.device.reset()
    assert rig.watched == set()
    rig.queues[RECEIVE] = DriverQueue(rig.memory, 64, 0x8000)
    rig.sides[RECEIVE] = rig.queues[RECEIVE].device(rig.memory)
    rig.device.start(MERGEABLE)
    rig.offer(1000)
    assert rig.serve() == []


_DESCRIPTORS = st.lists(
    st.tuples(
        st.sampled_from((0, DATA, DATA + 5, 0xFF000, 1 << 40, (1 << 64) - 1)),
        st.sampled_from((0, 1, 11, 12, 13, 1000, 70000, 1 << 20, (1 << 32) - 1)),
        st.integers(0, 7),
        st.integers(0, 70),
    ),
    min_size=1,
    max_size=64,
)


@given(
    descriptors=_DESCRIPTORS,
    heads=st.lists(st.integers(0, 70), max_size=70),
    sizes=st.lists(st.integers(14, 66000), max_size=4),
    index=st.sampled_from((RECEIVE, TRANSMIT)),
    features=st.sampled_from((0, MERGEABLE)),
    is_locked=st.booleans(),
    has_filter=st.booleans(),
)
def test_hostile_queues(  # noqa: PLR0917 - what is varied
    descriptors: list[tuple[int, int, int, int]],
    heads: list[int],
    sizes: list[int],
    index: int,
    features: int,
    is_locked: bool,
    has_filter: bool,
) -> None:
    """With any contents of the rings only GuestError is raised, and all memory is the guest's.

    No more chains are given back than were offered.
    """
    rig = Rig(features=features, is_locked=is_locked, has_filter=has_filter)
    queue = rig.queues[index]
    for number, descriptor in enumerate(descriptors):
        queue.describe(number, descriptor)
    for head in heads:
        queue.make_available(head)
    rig.port.arrived += [frame(size) for size in sizes]
    try:
        for _ in range(3):
            rig.device.process(index, rig.sides[index])
    except GuestError:
        return
    assert queue.used_index <= len(heads)


@pytest.mark.parametrize(
    ("features", "served", "expected"),
    [(0, {0, 1, 2, 3}, 2), (0, {0, 1}, 1), (0, set(), 1), (COMMANDS, {0, 1, 2, 3}, 1)],
)
def test_pairs_that_a_front_end_serves(features: int, served: set[int], expected: int) -> None:
    """Frames arrive on the served pairs, unless the driver's commands choose others."""
    port = FakePort(pairs=2)
    device = VirtioNet(port, MAC, name="nic0")
    device.start(features)
    device.serving(served)
    assert port.queues == expected
