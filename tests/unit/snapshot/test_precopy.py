"""A machine is copied in rounds: their number, and the resulting stream."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Callable, Iterator

import pytest

from tests.unit.snapshot.samples import (
    MANIFEST,
    PAGES,
    STATE_BYTES,
    Buffer,
    contents,
    empty,
    filled,
)
from vmm_kvm.bits import MIB, PAGE_SIZE
from vmm_kvm.errors import SnapshotError
from vmm_kvm.memory import GuestMemory
from vmm_kvm.snapshot import precopy
from vmm_kvm.snapshot.precopy import Plan, Progress, copy_running
from vmm_kvm.snapshot.stream import LiveWriter, StreamReader

RECORD = struct.Struct("<BxxxIQQ")
RAW, ZERO, STATE = 1, 3, 4


class Dirty:
    """A log in which each round finds the pages that a test wants."""

    def __init__(self, memory: GuestMemory, rounds: list[int]) -> None:
        """`rounds`: the numbers of pages changed in each, from the first on; the last for ever."""
        self._memory = memory
        self._rounds = rounds
        self._found: list[tuple[int, int]] = []
        self.finds = 0

    def begin_all(self) -> None:
        """Begin with every page."""
        self._found = [(at, MIB) for at in range(0, self._memory.size, MIB)]

    def find(self, *, is_still: bool = False) -> int:
        """Return the changed pages, and change their contents."""
        if self.finds and not is_still:
            count = self._rounds.pop(0) if len(self._rounds) > 1 else self._rounds[0]
            for page in range(count):
                self._memory.write(page * PAGE_SIZE, bytes([self.finds % 256]) * PAGE_SIZE)
            self._found = [(page * PAGE_SIZE, PAGE_SIZE) for page in range(count)]
        self.finds += 1
        return sum(size for _, size in self._found)

    def take(self) -> Iterator[tuple[int, int]]:
        """Yield it."""
        yield from self._found


def copied(rounds: list[int], plan: Callable[[], Plan]) -> list[Progress]:
    """Copy the sample; fail unless it arrives. Returns the rounds."""
    progress: list[Progress] = []
    buffer = Buffer()
    with filled() as memory, empty() as arrived:
        dirty = Dirty(memory, rounds)
        copy_running(
            buffer,
            MANIFEST,
            memory,
            dirty,
            lambda: STATE_BYTES,
            plan=plan,
            on_progress=progress.append,
        )
        reader = StreamReader(buffer)
        assert reader.manifest.is_live
        assert reader.read_machine(arrived) == STATE_BYTES
        assert contents(arrived) == contents(memory)
    return progress


def test_little_is_left_after_the_first_round() -> None:
    """With little left after the first round, the machine is paused for the second."""
    assert [one.round for one in copied([1], lambda: Plan(1.0))] == [1, 2]


def test_a_machine_that_writes_too_much_is_stopped() -> None:
    """If a round does not reduce the rest by a quarter, the machine is paused for all of it."""
    left = [one.left for one in copied([256, 128, 100, 1], lambda: Plan(0))]
    assert left == [3 * MIB, MIB, MIB // 2, 100 * PAGE_SIZE]


def test_a_machine_that_is_not_to_be_stopped() -> None:
    """With a limit the copy waits until the machine writes less, or the caller gives up."""
    assert len(copied([256] * 50 + [0], lambda: Plan(0, waits=True))) == 52
    plans = [Plan(0, waits=True)] * 40 + [Plan(0)]
    assert len(copied([256], lambda: plans.pop(0))) == 41


def test_the_speed_of_small_rounds_is_known() -> None:
    """Rounds of less than a megabyte show how fast the way is, if each for itself cannot."""
    plans = iter([Plan(0.2, waits=True)] * 100)
    rounds = copied([100], lambda: next(plans))
    assert rounds[-1].left == 100 * PAGE_SIZE
    assert len(rounds) < 50


def test_limits_count_inside_a_round(monkeypatch: pytest.MonkeyPatch) -> None:
    """A caller who gives up is heard before all memory has been copied once."""
    monkeypatch.setattr(precopy, "_LOOK_S", 0.0)
    plans = iter([Plan(), Plan()])

    def plan() -> Plan:
        if (found := next(plans, None)) is None:
            raise SnapshotError("too long")
        return found

    with pytest.raises(SnapshotError, match="too long"):
        copied([1], plan)


def test_a_page_that_becomes_zeros() -> None:
    """A page that becomes zeros arrives as zeros."""
    buffer = Buffer()
    writer = LiveWriter(buffer, MANIFEST)
    writer.write_run(0, PAGES[0])
    writer.write_run(0, bytes(PAGE_SIZE))
    writer.finish(STATE_BYTES)
    with empty() as memory:
        assert StreamReader(buffer).read_machine(memory) == STATE_BYTES
        assert contents(memory) == [bytes(2 * MIB), bytes(MIB)]


def record(kind: int, offset: int, size: int, body: bytes = b"") -> bytes:
    """Return a record of a stream."""
    return RECORD.pack(kind, len(body), offset, size) + body


@pytest.mark.parametrize(
    ("records", "message"),
    [
        (record(RAW, 1, PAGE_SIZE, PAGES[0]), "bytes at 0x1: no pages"),
        (record(RAW, 3 * MIB, PAGE_SIZE, PAGES[0]), "outside RAM"),
        (record(ZERO, 0, PAGE_SIZE, b"x"), "a record that is none"),
        (record(ZERO, 0, 2 * MIB), "out of place"),
        (record(STATE, 1, 4, b"late"), "state: a record of 4 bytes at 0x1"),
        (record(STATE, 0, 4, b"bad"), "state: a record of 4 bytes at 0x0"),
        (record(STATE, 0, 2, b"{}") + record(ZERO, 0, PAGE_SIZE), "a record behind the state"),
        (record(9, 0, PAGE_SIZE), "a record that is none"),
        (b"", "the stream ends too early"),
    ],
)
def test_what_is_no_live_stream(records: bytes, message: str) -> None:
    """Each fault of a live stream is one line."""
    buffer = Buffer()
    LiveWriter(buffer, MANIFEST)
    buffer.data += records
    with empty() as memory, pytest.raises(SnapshotError, match=message):
        StreamReader(buffer).read_machine(memory)


def test_its_checksum() -> None:
    """A stream that is damaged on the way is refused by its checksum."""
    buffer = Buffer()
    writer = LiveWriter(buffer, MANIFEST)
    writer.write_run(0, PAGES[0])
    writer.finish(STATE_BYTES)
    assert buffer.data[-32:] == hashlib.sha256(buffer.data[:-32]).digest()
    buffer.data[-200] ^= 1
    with empty() as memory, pytest.raises(SnapshotError, match="the checksum is wrong"):
        StreamReader(buffer).read_machine(memory)
