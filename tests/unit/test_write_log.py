"""Devices' writes to guest memory are marked, all of them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.virtio_driver import DriverQueue
from vmm_kvm.bits import MIB, PAGE_SIZE
from vmm_kvm.memory import GuestMemory
from vmm_kvm.virtio.queue import Virtqueue
from vmm_kvm.write_log import SharedLog, log_size

HIGH = 4 << 30
GROUP = 8 * PAGE_SIZE
"""Pages are marked in groups of this size."""


@pytest.fixture
def log() -> Iterator[SharedLog]:
    """Make a log for memory that ends above 4 GiB."""
    shared = SharedLog(HIGH + MIB)
    yield shared
    shared.close()


@pytest.fixture
def memory() -> Iterator[GuestMemory]:
    """Make memory below the hole and above."""
    with GuestMemory(((0, MIB), (HIGH, MIB)), is_private=True) as made:
        yield made


def test_marks(log: SharedLog, memory: GuestMemory) -> None:
    """Whole groups are marked, once; views are found in both regions, and nowhere else."""
    assert log_size(HIGH + MIB) == log.size
    memory.log_writes(log.view)
    memory.writes.mark(5, 1)
    memory.writes.mark(3 * GROUP - 1, 2)
    memory.writes.mark_views([memory.view(HIGH + 7 * GROUP, 1), memoryview(bytearray(8))])
    memory.writes.mark(HIGH << 8, 4096)
    end = HIGH + 8 * GROUP
    assert list(log.take()) == [(0, GROUP), (2 * GROUP, 4 * GROUP), (HIGH + 7 * GROUP, end)]
    assert list(log.take()) == []
    memory.writes.turn_off()
    memory.writes.mark(0, 1)
    assert list(log.take()) == []


@pytest.mark.parametrize("together", [False, True])
def test_a_chain_that_is_given_back(log: SharedLog, memory: GuestMemory, together: bool) -> None:
    """A returned chain marks all its writable buffers, and the ring, but no readable one."""
    driver = DriverQueue(memory.view(0, MIB), base=0x1000)
    queue = Virtqueue(memory, driver.ring, 0)
    driver.add((2 * GROUP, 16, False), (4 * GROUP, 16, True), (6 * GROUP + 8, GROUP, True))
    chain = queue.pop()
    assert chain is not None
    memory.log_writes(log.view)
    if together:
        queue.push_together([(chain, 16)])
    else:
        queue.push(chain, 16)
    assert list(log.take()) == [(0, GROUP), (4 * GROUP, 5 * GROUP), (6 * GROUP, 8 * GROUP)]
