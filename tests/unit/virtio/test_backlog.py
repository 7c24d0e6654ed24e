"""Waiting chains: in order, of one queue only, and never more than the queue has."""

from __future__ import annotations

import pytest

from tests.virtio_driver import DriverQueue, PlainMemory
from vmm_kvm.errors import VirtqueueError
from vmm_kvm.virtio.backlog import Backlog

DATA = 0x10000


def test_chains_wait_in_order() -> None:
    """Collecting again adds new chains, and keeps those that were not taken."""
    memory = PlainMemory()
    driver = DriverQueue(memory)
    queue, backlog = driver.device(memory), Backlog()
    heads = [driver.add((DATA, 1, True)) for _ in range(2)]
    waiting = backlog.collect(queue)
    assert waiting.popleft().head == heads[0]
    heads.append(driver.add((DATA, 1, True)))
    assert [chain.head for chain in backlog.collect(queue)] == heads[1:]
    backlog.clear()
    assert not backlog.collect(queue)


def test_another_queue_begins_anew() -> None:
    """Chains of a queue that was reset are forgotten."""
    memory = PlainMemory()
    old, new = DriverQueue(memory), DriverQueue(memory, base=0x2000)
    backlog = Backlog()
    old.add((DATA, 1, True))
    assert len(backlog.collect(old.device(memory))) == 1
    assert not backlog.collect(new.device(memory))


def test_a_driver_that_offers_a_chain_again_and_again() -> None:
    """More chains than descriptors are a fault, not an endless list."""
    memory = PlainMemory()
    driver = DriverQueue(memory, size=4)
    queue, backlog = driver.device(memory), Backlog()
    for _ in range(4):
        driver.add((DATA, 1, True))
    assert len(backlog.collect(queue)) == 4
    driver.make_available(0)
    with pytest.raises(VirtqueueError, match="more than 4 chains at once"):
        backlog.collect(queue)
