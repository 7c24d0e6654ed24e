"""Copying a machine while it runs: in rounds, each of what changed during the last.

The first round has all of RAM. The machine stands still for the last one, which is due when what is
left takes no longer than the caller allows, by the speed at which the stream has gone; or, unless
the caller wants to wait, when a round has not made it shorter by a quarter.
"""

import time
from collections.abc import Callable, Iterator
from typing import NamedTuple, Protocol

from vmm_kvm.snapshot.manifest import Manifest
from vmm_kvm.snapshot.ram import Ram, place, runs, runs_of
from vmm_kvm.snapshot.stream import LiveWriter, Sink

_SPEED_MIN = 1 << 20  # bytes a second: assumed before anything is sent
_SAMPLE = 1 << 20  # bytes that are sent before the speed is known
_STORAGE_STEP = 64 << 20  # bytes of disks, after which the limits are looked at
_LOOK_S = 0.5  # of copying RAM, after which they are looked at
_STORAGE_ROUNDS = 3


class Dirty(Protocol):
    """The pages that change; a `DirtyPages` that has begun."""

    def begin_all(self) -> None:
        """Begin with every page."""

    def find(self, *, is_still: bool = False) -> int:
        """Find changed pages; returns the number of bytes to copy."""

    def take(self) -> Iterator[tuple[int, int]]:
        """Yield ranges to copy: offset in RAM and number of bytes."""


class Writer(Protocol):
    """Writes a machine: a `LiveWriter` or a `FileWriter`."""

    @property
    def written(self) -> int:
        """Bytes, so far."""

    def write_run(self, offset: int, data: bytes) -> None:
        """Write the present RAM at `offset`: whole pages, at most 1 MiB of them."""

    def finish(self, state: bytes) -> None:
        """Write the state and the end."""


class Storage(Protocol):
    """Disks that are copied along; all marked as changed in the beginning."""

    @property
    def written(self) -> int:
        """Bytes, so far."""

    def find(self) -> int:
        """Return how many bytes of disks are to be copied now."""

    def copy(self, size: int) -> None:
        """Copy about `size` bytes of them, or all if there are fewer."""

    def finish(self) -> None:
        """Copy the rest, of disks that nobody uses now, and write that this was all."""


class NoStorage:
    """No disks are copied along."""

    written = 0

    def find(self) -> int:
        """Return 0."""
        return 0

    def copy(self, size: int) -> None:
        """Do nothing."""

    def finish(self) -> None:
        """Do nothing."""


class Plan(NamedTuple):
    """The time for which a machine may be paused."""

    downtime_s: float = 0.3
    """For the last round, in seconds; it is hoped for, and not promised."""
    waits: bool = False
    """The pause may not be longer: if too much is left, continue until it is less."""


class Progress(NamedTuple):
    """How far it is."""

    round: int
    """1 for the first."""
    written: int
    """Bytes of the stream, so far."""
    left: int
    """Bytes that are to be copied in this round."""


_NO_STORAGE = NoStorage()


def copy_running(
    sink: Sink,
    manifest: Manifest,
    ram: Ram,
    dirty: Dirty,
    halt: Callable[[], bytes],
    *,
    plan: Callable[[], Plan] = Plan,
    on_progress: Callable[[Progress], None] = lambda _progress: None,
) -> None:
    """Write a machine that runs into a stream, as `copy_into` does.

    Raises:
        SnapshotError, OSError: of `sink`, or the machine cannot be described.
        KvmError: of `dirty`.
    """
    writer = LiveWriter(sink, manifest)
    copy_into(writer, ram, dirty, halt, plan=plan, on_progress=on_progress)


def copy_into(
    writer: Writer,
    ram: Ram,
    dirty: Dirty,
    halt: Callable[[], bytes],
    *,
    plan: Callable[[], Plan] = Plan,
    on_progress: Callable[[Progress], None] = lambda _progress: None,
    storage: Storage = _NO_STORAGE,
) -> None:
    """Write a machine that runs, and stop it for the end.

    Args:
        writer: where to.
        ram: its memory.
        dirty: its log.
        halt: pauses the machine and returns its state, as `state.encode` does.
        plan: gives the limits before each round; looked at inside it, too, where it may raise.
        on_progress: is told at the beginning of each round.
        storage: its disks, if they are copied; all of them before the first round.

    Raises:
        SnapshotError, OSError: of `writer`.
        KvmError: of `dirty`.
    """
    _copy_storage(storage, plan)
    dirty.begin_all()
    left, before, rounds, speed = dirty.find() + storage.find(), 0, 0, float(_SPEED_MIN)
    sent, took = 0, 0.0
    while True:
        wanted = plan()
        is_stuck = 4 * left > 3 * before and not wanted.waits
        if rounds and (left <= speed * wanted.downtime_s or is_stuck):
            break
        rounds += 1
        on_progress(Progress(rounds, writer.written, left))
        began, written = time.monotonic(), writer.written + storage.written
        _copy_storage(storage, plan)
        _copy(writer, ram, dirty, plan, is_first=rounds == 1)
        sent += writer.written + storage.written - written
        took += time.monotonic() - began
        if sent > _SAMPLE and took > 0:
            speed = sent / took
            sent, took = 0, 0.0
        before, left = left, dirty.find() + storage.find()
    on_progress(Progress(rounds + 1, writer.written, left))
    state = halt()
    storage.finish()
    dirty.find(is_still=True)
    _copy(writer, ram, dirty, Plan, is_first=False)
    writer.finish(state)


def copy_still(
    writer: Writer,
    ram: Ram,
    halt: Callable[[], bytes],
    *,
    plan: Callable[[], Plan] = Plan,
    storage: Storage = _NO_STORAGE,
) -> None:
    """Write a machine that stands still for its RAM, while it runs for most of its disks.

    Raises:
        SnapshotError, OSError: of `writer`.
    """
    for _ in range(_STORAGE_ROUNDS):
        _copy_storage(storage, plan)
    state = halt()
    storage.finish()
    for offset, data in runs(ram):
        writer.write_run(offset, data)
    writer.finish(state)


def _copy_storage(storage: Storage, plan: Callable[[], Plan]) -> None:
    """Copy as much as is to be copied now; what changes meanwhile is for the next time."""
    left = storage.find()
    while left > 0:
        plan()
        storage.copy(min(left, _STORAGE_STEP))
        left -= _STORAGE_STEP


def _copy(
    writer: Writer, ram: Ram, dirty: Dirty, plan: Callable[[], Plan], *, is_first: bool
) -> None:
    look_s = time.monotonic() + _LOOK_S
    for offset, size in dirty.take():
        if time.monotonic() >= look_s:
            plan()
            look_s = time.monotonic() + _LOOK_S
        if is_first:
            for run in runs_of(ram, offset, size):
                writer.write_run(*run)
            continue
        view = place(ram, offset, size)
        assert view is not None, "runs are inside of one region"
        writer.write_run(offset, bytes(view))
