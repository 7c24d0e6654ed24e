"""The ring of a console's output: positions, wrapping, and the end of its process."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmd.shared.ring import CAPACITY, REPLAY, OutputRing, make_ring


@pytest.fixture
def ring_fd() -> Iterator[int]:
    """Return the descriptor of an empty ring."""
    fd = make_ring("test")
    yield fd
    os.close(fd)


def _read_all(ring: OutputRing, position: int) -> bytes:
    data = b""
    while position < ring.total:
        position, part = ring.read(position, 5000)
        data += part
    return data


def test_what_is_written_can_be_read(ring_fd: int) -> None:
    """Bytes come back in order, for every reader from its own position."""
    ring = OutputRing(ring_fd)
    ring.append(b"one ")
    ring.append(b"two")
    assert _read_all(ring, 0) == b"one two"
    assert ring.read(4, 2) == (6, b"tw")
    ring.close()


def test_another_process_finds_what_was_written(ring_fd: int) -> None:
    """A second mapping of the same memory continues at the first one's position."""
    first = OutputRing(ring_fd)
    first.append(b"before the reboot, ")
    first.close()
    second = OutputRing(ring_fd)
    second.append(b"after it")
    assert _read_all(second, 0) == b"before the reboot, after it"
    second.close()


def test_a_late_reader_begins_64_kib_back(ring_fd: int) -> None:
    """A late reader starts at the last 64 KiB, a slow one at the start of the ring."""
    ring = OutputRing(ring_fd)
    ring.append(b"a" * CAPACITY)
    ring.append(b"b" * REPLAY)
    assert _read_all(ring, ring.late()) == b"b" * REPLAY
    assert len(_read_all(ring, 0)) == CAPACITY
    ring.close()


def test_the_ring_cannot_be_made_smaller(ring_fd: int) -> None:
    """No holder of the descriptor can take the memory away under a reader."""
    with pytest.raises(PermissionError):
        os.ftruncate(ring_fd, 0)


@given(st.lists(st.integers(0, 2 * CAPACITY), max_size=8))
def test_the_ring_is_the_end_of_all_that_was_written(sizes: list[int]) -> None:
    """With writes of any size, the ring holds the last bytes and their total number."""
    fd = make_ring("test")
    ring = OutputRing(fd)
    written = b""
    for index, size in enumerate(sizes):
        data = bytes([index]) * size
        ring.append(data)
        written += data
    assert ring.total == len(written)
    assert _read_all(ring, 0) == written[-CAPACITY:]
    ring.close()
    os.close(fd)
