"""Split virtqueues: chains are taken as offered, interrupts and notifications are right."""

from __future__ import annotations

import pytest

from tests.virtio_driver import EVENT_IDX, INDIRECT, Buffer, DriverQueue, PlainMemory
from vmm_kvm.errors import GuestMemoryError, VirtqueueError
from vmm_kvm.virtio.abi import (
    VRING_AVAIL_F_NO_INTERRUPT,
    VRING_DESC_F_INDIRECT,
    VRING_DESC_F_NEXT,
    VRING_DESC_F_WRITE,
    VRING_USED_F_NO_NOTIFY,
)
from vmm_kvm.virtio.chain import INDIRECT_MAX, Chain
from vmm_kvm.virtio.queue import Ring, Virtqueue

NEXT, WRITE, TABLE = VRING_DESC_F_NEXT, VRING_DESC_F_WRITE, VRING_DESC_F_INDIRECT
DATA = 0x10000
BUFFERS: tuple[Buffer, ...] = ((DATA, 16, False), (DATA + 0x1000, 4096, True), (DATA, 1, True))


@pytest.fixture
def memory() -> PlainMemory:
    """A megabyte of guest memory."""
    return PlainMemory()


@pytest.fixture
def driver(memory: PlainMemory) -> DriverQueue:
    """A queue of eight descriptors."""
    return DriverQueue(memory)


def pop(queue: Virtqueue) -> Chain:
    """Take a chain, which must exist."""
    chain = queue.pop()
    assert chain is not None
    return chain


def sizes(chain: Chain) -> tuple[list[int], list[int]]:
    """Return the sizes of the readable and of the writable buffers."""
    return [len(buffer) for buffer in chain.readable], [len(buffer) for buffer in chain.writable]


def test_an_empty_queue_has_no_chain(memory: PlainMemory, driver: DriverQueue) -> None:
    """A queue is empty until the driver makes a chain available."""
    assert driver.device(memory).pop() is None


@pytest.mark.parametrize("is_indirect", [False, True])
def test_a_chain_holds_the_buffers_in_order(
    memory: PlainMemory, driver: DriverQueue, is_indirect: bool
) -> None:
    """Readable and writable buffers come out in order, as views of guest memory."""
    queue = driver.device(memory)
    memory.bytes[DATA : DATA + 16] = b"sixteen bytes..."
    head = driver.add_indirect(0x8000, *BUFFERS) if is_indirect else driver.add(*BUFFERS)
    chain = pop(queue)
    assert chain.head == head
    assert sizes(chain) == ([16], [4096, 1])
    assert bytes(chain.readable[0]) == b"sixteen bytes..."
    chain.writable[0][:2] = b"ok"
    assert memory.bytes[DATA + 0x1000 : DATA + 0x1002] == b"ok"
    assert queue.pop() is None


def test_direct_descriptors_may_lead_to_a_table(memory: PlainMemory, driver: DriverQueue) -> None:
    """A chain may begin with direct descriptors and end in an indirect table."""
    queue = driver.device(memory)
    driver.describe(3, (DATA, 16, NEXT, 5))
    driver.describe(5, (0x8000, 32, TABLE | WRITE, 0))  # WRITE means nothing here
    driver.put(0x8000, "QIHH", DATA, 4, NEXT, 1)
    driver.put(0x8010, "QIHH", DATA, 8, WRITE, 0)
    driver.make_available(3)
    assert sizes(pop(queue)) == ([16, 4], [8])


def test_used_chains_are_published_in_order(memory: PlainMemory, driver: DriverQueue) -> None:
    """Each pushed chain appears with its length, over more than 65536 of them."""
    queue = driver.device(memory)
    for i in range(70_000):
        head = driver.add((DATA, 1, True))
        queue.push(pop(queue), i)
        assert driver.used() == [(head, i)]
    assert (queue.next_available, queue.next_used) == (70_000 & 0xFFFF, 70_000 & 0xFFFF)


def test_chains_may_be_used_out_of_order(memory: PlainMemory, driver: DriverQueue) -> None:
    """A device may finish the second request first."""
    queue = driver.device(memory)
    heads = [driver.add((DATA, 1, True)) for _ in range(2)]
    first, second = pop(queue), pop(queue)
    queue.push(second, 1)
    queue.push(first, 1)
    assert driver.used() == [(heads[1], 1), (heads[0], 1)]


def test_a_queue_goes_on_where_another_stopped(memory: PlainMemory, driver: DriverQueue) -> None:
    """A queue that gets both indices of another continues with the next chain."""
    queue = driver.device(memory)
    driver.add((DATA, 1, True))
    queue.push(pop(queue), 1)
    second = driver.add((DATA, 1, True))
    successor = Virtqueue(
        memory,
        driver.ring,
        INDIRECT | EVENT_IDX,
        next_available=queue.next_available,
        next_used=queue.next_used,
    )
    successor.push(pop(successor), 7)
    assert driver.used() == [(0, 1), (second, 7)]


def test_a_stopped_queue_is_empty(memory: PlainMemory, driver: DriverQueue) -> None:
    """After stop, chains made available are not taken any more, and no interrupt is due."""
    queue = driver.device(memory)
    queue.stop()
    driver.add((DATA, 1, True))
    assert queue.pop() is None
    assert not queue.enable_kicks()


# Interrupts


def test_no_interrupt_without_a_push(memory: PlainMemory, driver: DriverQueue) -> None:
    """An interrupt is not repeated without a new push."""
    queue = driver.device(memory, INDIRECT)
    assert not queue.needs_interrupt()
    driver.add((DATA, 1, True))
    queue.push(pop(queue), 1)
    assert queue.needs_interrupt()
    assert not queue.needs_interrupt()


def test_the_driver_suppresses_interrupts_by_a_flag(
    memory: PlainMemory, driver: DriverQueue
) -> None:
    """Without EVENT_IDX the available ring's flag decides."""
    queue = driver.device(memory, INDIRECT)
    driver.set_no_interrupt(VRING_AVAIL_F_NO_INTERRUPT)
    driver.add((DATA, 1, True))
    queue.push(pop(queue), 1)
    assert not queue.needs_interrupt()


@pytest.mark.parametrize(
    ("start", "event", "pushes", "expected"),
    [
        (0, 0, 1, True),
        (0, 1, 1, False),
        (0, 1, 2, True),
        (5, 4, 1, False),
        (5, 5, 3, True),
        (5, 7, 3, True),
        (5, 8, 3, False),
        (0xFFFF, 0xFFFF, 1, True),
        (0xFFFE, 0, 2, False),
        (0xFFFE, 0, 3, True),
    ],
)
def test_the_driver_asks_for_an_interrupt_at_an_index(
    start: int, event: int, pushes: int, expected: bool
) -> None:
    """With EVENT_IDX an interrupt comes once the used index has passed the event, not before."""
    memory = PlainMemory()
    driver = DriverQueue(memory)
    driver.added = start
    queue = Virtqueue(
        memory, driver.ring, INDIRECT | EVENT_IDX, next_available=start, next_used=start
    )
    driver.set_no_interrupt(VRING_AVAIL_F_NO_INTERRUPT)  # means nothing with EVENT_IDX
    driver.set_used_event(event)
    for _ in range(pushes):
        driver.add((DATA, 1, True))
        queue.push(pop(queue), 1)
    assert queue.needs_interrupt() is expected


# Notifications


def test_notifications_are_suppressed_by_a_flag(memory: PlainMemory, driver: DriverQueue) -> None:
    """Without EVENT_IDX the used ring's flag tells whether the driver must notify."""
    queue = driver.device(memory, INDIRECT)
    queue.disable_kicks()
    assert driver.used_flags == VRING_USED_F_NO_NOTIFY
    assert not queue.enable_kicks()
    assert driver.used_flags == 0


def test_notifications_are_asked_for_at_an_index(memory: PlainMemory, driver: DriverQueue) -> None:
    """With EVENT_IDX the device asks for the next chain, once it has taken all."""
    queue = driver.device(memory)
    driver.add((DATA, 1, True))
    queue.disable_kicks()
    queue.push(pop(queue), 1)
    assert driver.avail_event == 0
    assert not queue.enable_kicks()
    assert (driver.avail_event, driver.used_flags) == (1, 0)


@pytest.mark.parametrize("features", [INDIRECT, INDIRECT | EVENT_IDX])
def test_a_chain_that_came_without_notification_is_seen(
    memory: PlainMemory, driver: DriverQueue, features: int
) -> None:
    """Chains made available before notifications were enabled are not lost."""
    queue = driver.device(memory, features)
    queue.disable_kicks()
    assert queue.pop() is None
    driver.add((DATA, 1, True))
    assert queue.enable_kicks()
    pop(queue)
    assert not queue.enable_kicks()


# Errors of drivers


@pytest.mark.parametrize(
    ("ring", "message"),
    [
        (Ring(0, 0, 0x100, 0x200), "queue size 0: not a power of two up to 32768"),
        (Ring(12, 0, 0x100, 0x200), "queue size 12: not a power of two up to 32768"),
        (Ring(65536, 0, 0x100, 0x200), "queue size 65536: not a power of two up to 32768"),
        (Ring(8, 8, 0x100, 0x200), "queue at 0x8, 0x100, 0x200: misaligned"),
        (Ring(8, 0, 0x101, 0x200), "queue at 0x0, 0x101, 0x200: misaligned"),
        (Ring(8, 0, 0x100, 0x202), "queue at 0x0, 0x100, 0x202: misaligned"),
    ],
)
def test_impossible_rings_are_refused(memory: PlainMemory, ring: Ring, message: str) -> None:
    """Sizes and alignments are the specification's."""
    with pytest.raises(VirtqueueError) as caught:
        Virtqueue(memory, ring, 0)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    "ring",
    [
        Ring(8, 0xFFFF0, 0x100, 0x200),
        Ring(8, 0, 0xFFFF0, 0x200),
        Ring(8, 0, 0x100, 0xFFFE0),
        Ring(8, 0, 1 << 63, 0x200),
    ],
)
def test_rings_outside_memory_are_refused(memory: PlainMemory, ring: Ring) -> None:
    """A ring that leaves RAM is refused."""
    with pytest.raises(GuestMemoryError):
        Virtqueue(memory, ring, 0)


@pytest.mark.parametrize(
    ("descriptors", "message"),
    [
        ([(DATA, 0, 0, 0)], "descriptor 0: an empty buffer"),
        ([(DATA, 1, NEXT, 0)], "descriptor 0: a chain of more than 8"),
        ([(DATA, 1, NEXT, 1), (DATA, 1, NEXT, 0)], "descriptor 0: a chain of more than 8"),
        ([(DATA, 1, NEXT, 8)], "descriptor 0: leads to 8 of 8"),
        (
            [(DATA, 1, WRITE | NEXT, 1), (DATA, 1, 0, 0)],
            "descriptor 0: a readable buffer after a writable one",
        ),
        ([(DATA, 16, TABLE | NEXT, 1)], "an indirect descriptor that has a next one"),
        ([(DATA, 0, TABLE, 0)], "an indirect table of 0 bytes"),
        ([(DATA, 24, TABLE, 0)], "an indirect table of 24 bytes"),
        (
            [(DATA, 16 * INDIRECT_MAX + 16, TABLE, 0)],
            f"an indirect table of {16 * INDIRECT_MAX + 16} bytes",
        ),
    ],
)
def test_malformed_chains_are_refused(
    memory: PlainMemory,
    driver: DriverQueue,
    descriptors: list[tuple[int, int, int, int]],
    message: str,
) -> None:
    """Loops, empty buffers, wrong links, orders and tables have an error that names them."""
    queue = driver.device(memory)
    for number, descriptor in enumerate(descriptors):
        driver.describe(number, descriptor)
    driver.make_available(0)
    with pytest.raises(VirtqueueError) as caught:
        queue.pop()
    assert str(caught.value) == message


def test_a_table_in_a_table_is_refused(memory: PlainMemory, driver: DriverQueue) -> None:
    """Indirect tables have one level: a table in a table is refused."""
    queue = driver.device(memory)
    driver.describe(0, (0x8000, 16, TABLE, 0))
    driver.put(0x8000, "QIHH", 0x9000, 16, TABLE, 0)
    driver.make_available(0)
    with pytest.raises(VirtqueueError, match=r"^descriptor 0: an indirect table in another$"):
        queue.pop()


def test_a_loop_in_a_table_ends(memory: PlainMemory, driver: DriverQueue) -> None:
    """A table of two that leads in circles is a chain of more than two."""
    queue = driver.device(memory)
    driver.describe(0, (0x8000, 32, TABLE, 0))
    driver.put(0x8000, "QIHH", DATA, 1, NEXT, 1)
    driver.put(0x8010, "QIHH", DATA, 1, NEXT, 0)
    driver.make_available(0)
    with pytest.raises(VirtqueueError, match=r"^descriptor 0: a chain of more than 2$"):
        queue.pop()


def test_tables_have_to_be_negotiated(memory: PlainMemory, driver: DriverQueue) -> None:
    """Without INDIRECT_DESC an indirect descriptor is an error."""
    queue = driver.device(memory, EVENT_IDX)
    driver.add_indirect(0x8000, (DATA, 1, True))
    with pytest.raises(VirtqueueError, match=r"^an indirect descriptor, which was not negotiated$"):
        queue.pop()


@pytest.mark.parametrize(("address", "length"), [(0xFFFFF, 2), (1 << 63, 1), ((1 << 64) - 1, 2)])
def test_buffers_outside_memory_are_refused(
    memory: PlainMemory, driver: DriverQueue, address: int, length: int
) -> None:
    """A buffer must be RAM from its first byte to its last."""
    queue = driver.device(memory)
    driver.add((address, length, True))
    with pytest.raises(GuestMemoryError):
        queue.pop()


def test_a_head_outside_the_table_is_refused(memory: PlainMemory, driver: DriverQueue) -> None:
    """A head in the available ring that is no descriptor's number is refused."""
    queue = driver.device(memory)
    driver.make_available(8)
    with pytest.raises(VirtqueueError, match=r"^descriptor 8 of 8$"):
        queue.pop()


def test_an_index_that_leaps_is_refused(memory: PlainMemory, driver: DriverQueue) -> None:
    """An index that makes more chains available than descriptors is refused."""
    queue = driver.device(memory)
    driver.put(driver.ring.available + 2, "H", 9)
    with pytest.raises(
        VirtqueueError, match=r"^available index 9 after 0: more than the queue has$"
    ):
        queue.pop()


class HolyMemory(PlainMemory):
    """Memory with a hole from HOLE to HOLE_END."""

    HOLE, HOLE_END = 0x2_3000, 0x4_0000

    def view(self, gpa: int, size: int) -> memoryview:
        """Return a view of a range that does not touch the hole."""
        if gpa < self.HOLE_END and gpa + size > self.HOLE:
            raise GuestMemoryError(gpa, size)
        return super().view(gpa, size)


@pytest.mark.parametrize(
    ("address", "length", "is_ram"),
    [
        (0, 0x2_3000, True),
        (0x2_2FFF, 1, True),
        (0x2_2FFF, 2, False),
        (0x3_0000, 16, False),
        (0x3_FFFF, 2, False),
        (0x4_0000, 16, True),
        (0, 0x4_0000, False),
    ],
)
def test_memory_with_a_hole(address: int, length: int, is_ram: bool) -> None:
    """Buffers may be on either side of a hole, but not in it or across it."""
    memory = HolyMemory()
    driver = DriverQueue(memory)
    queue = driver.device(memory)
    driver.add((address, length, True))
    if is_ram:
        assert sizes(pop(queue)) == ([], [length])
    else:
        with pytest.raises(GuestMemoryError):
            queue.pop()


def test_memory_without_address_zero() -> None:
    """A queue works in memory without a region at 0."""
    memory = HolyMemory()
    memory.HOLE = 0
    driver = DriverQueue(memory, base=0x5_0000)
    queue = driver.device(memory)
    driver.add((0x6_0000, 5, False))
    assert sizes(pop(queue)) == ([5], [])
