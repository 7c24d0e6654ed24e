"""Virtqueues against drivers that write anything: in-bounds buffers, or an error, and an end."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from ctypes import addressof, c_char

from hypothesis import given
from hypothesis import strategies as st

from tests.virtio_driver import EVENT_IDX, INDIRECT, DriverQueue, PlainMemory
from vmm_kvm.errors import GuestError
from vmm_kvm.virtio.abi import VRING_DESC_F_INDIRECT, VRING_DESC_F_NEXT, VRING_DESC_F_WRITE
from vmm_kvm.virtio.chain import INDIRECT_MAX, Chain
from vmm_kvm.virtio.queue import Virtqueue

NEXT, WRITE = VRING_DESC_F_NEXT, VRING_DESC_F_WRITE
SIZE = 8
TABLE_AT = 0x4000
MEMORY_SIZE = 0x8000
POPS = 3 * SIZE
FEATURES = st.sampled_from([0, INDIRECT, EVENT_IDX, INDIRECT | EVENT_IDX])
# Addresses that matter: the queue itself, the end of memory, none at all.
ADDRESSES = st.one_of(
    st.integers(0, MEMORY_SIZE + 0x100),
    st.sampled_from([0x1000, MEMORY_SIZE - 1, MEMORY_SIZE, (1 << 64) - 1]),
)
LENGTHS = st.one_of(st.integers(0, 64), st.sampled_from([0, 16, 128, 1 << 31, (1 << 32) - 1]))
DESCRIPTORS = st.tuples(ADDRESSES, LENGTHS, st.integers(0, 15), st.integers(0, SIZE + 1))
TABLES = st.lists(DESCRIPTORS, min_size=SIZE, max_size=SIZE)


def hostile(
    features: int, table: list[tuple[int, int, int, int]], heads: list[int], index: int
) -> tuple[PlainMemory, DriverQueue, Virtqueue]:
    """Return a queue whose table, ring and index are as given."""
    memory = PlainMemory(MEMORY_SIZE)
    driver = DriverQueue(memory, SIZE)
    for number, descriptor in enumerate(table):
        driver.describe(number, descriptor)
    for at, head in enumerate(heads):
        driver.put(driver.ring.available + 4 + 2 * at, "H", head)
    driver.put(driver.ring.available + 2, "H", index)
    return memory, driver, driver.device(memory, features)


def check(chain: Chain) -> None:
    """A chain has a bounded number of buffers, none of them empty."""
    buffers = chain.readable + chain.writable
    assert 0 < len(buffers) <= SIZE + INDIRECT_MAX
    assert all(0 < len(buffer) <= MEMORY_SIZE for buffer in buffers)


@given(
    FEATURES,
    TABLES,
    st.lists(st.integers(0, SIZE), min_size=SIZE, max_size=SIZE),
    st.one_of(st.integers(0, SIZE + 1), st.integers(0, 0xFFFF)),
)
def test_any_ring(
    features: int, table: list[tuple[int, int, int, int]], heads: list[int], index: int
) -> None:
    """With any ring the buffers are in bounds, and the queue comes to an end."""
    _, _, queue = hostile(features, table, heads, index)
    try:
        for _ in range(POPS):
            chain = queue.pop()
            if chain is None:
                break
            check(chain)
            queue.push(chain, 0)
            queue.needs_interrupt()
        else:
            raise AssertionError("more chains than the driver made available")
        queue.enable_kicks()
    except GuestError:
        return


@given(FEATURES, st.binary(min_size=512, max_size=512), st.data())
def test_rings_that_change(features: int, noise: bytes, data: st.DataObject) -> None:
    """A driver that rewrites its ring between two reads causes in-bounds buffers or an error."""
    memory, driver, queue = hostile(features, [(0x4000, 16, 0, 0)] * SIZE, [0] * SIZE, 1)
    for _ in range(POPS):
        offset = data.draw(st.integers(0, 256))
        start = driver.ring.descriptors + offset
        memory.bytes[start : start + 256] = noise[offset : offset + 256]
        try:
            chain = queue.pop()
        except GuestError:
            return
        if chain is not None:
            check(chain)
            queue.push(chain, 1)
        queue.enable_kicks()


@given(TABLES, st.binary(min_size=16 * 16, max_size=16 * 16))
def test_any_indirect_table(table: list[tuple[int, int, int, int]], noise: bytes) -> None:
    """A table of random bytes does no more harm than a table of random descriptors."""
    memory, driver, queue = hostile(INDIRECT, table, [0] * SIZE, 1)
    memory.bytes[TABLE_AT : TABLE_AT + len(noise)] = noise
    driver.describe(0, (TABLE_AT, len(noise), VRING_DESC_F_INDIRECT, 0))
    try:
        chain = queue.pop()
    except GuestError:
        return
    assert chain is not None
    check(chain)
    assert struct.unpack_from("<Q", noise)[0] < MEMORY_SIZE


@given(
    st.lists(
        st.tuples(st.integers(0, MEMORY_SIZE - 64), st.integers(1, 64)),
        min_size=SIZE,
        max_size=SIZE,
    ),
    st.integers(0, SIZE),
    st.none() | st.tuples(st.integers(0, SIZE - 1), DESCRIPTORS),
    st.integers(1, SIZE - 1),
    st.integers(1, SIZE - 1),
)
def test_a_table_in_any_order(
    buffers: list[tuple[int, int]],
    readable: int,
    fault: tuple[int, tuple[int, int, int, int]] | None,
    one: int,
    other: int,
) -> None:
    """Entries one after the other give the same as the same entries in other places."""
    entries = [
        (address, length, 0 if number < readable else WRITE)
        for number, (address, length) in enumerate(buffers)
    ]
    if fault:
        number, (address, length, flags, _) = fault
        entries[number] = address, length, flags & ~NEXT
    places = list(range(SIZE))  # a chain begins with the first entry
    places[one], places[other] = other, one
    assert _taken(entries, range(SIZE)) == _taken(entries, places)


def _taken(entries: list[tuple[int, int, int]], places: Sequence[int]) -> object:
    """Return offsets and sizes of the buffers of a chain of `entries`, or its error."""
    memory, driver, queue = hostile(INDIRECT, [(0, 0, 0, 0)] * SIZE, [0] * SIZE, 1)
    driver.describe(0, (TABLE_AT, 16 * SIZE, VRING_DESC_F_INDIRECT, 0))
    followers = [*places[1:], None]
    for place, (address, length, flags), following in zip(places, entries, followers, strict=True):
        link = (flags, 0) if following is None else (flags | NEXT, following)
        driver.put(TABLE_AT + 16 * place, "QIHH", address, length, *link)
    try:
        chain = queue.pop()
    except GuestError as err:
        return str(err)
    assert chain is not None
    start = addressof(c_char.from_buffer(memory.bytes))
    return [
        [(addressof(c_char.from_buffer(one)) - start, len(one)) for one in part]
        for part in (chain.readable, chain.writable)
    ]
