"""Fakes for devices: interrupt lines, time, devices on a bus.

They implement the protocols of `vmm_kvm` and record or obey; they check nothing.
"""

import threading
from collections.abc import Callable, Iterable

from vmm_kvm.bits import all_ones
from vmm_kvm.bus import BusDevice

REALTIME_NS = 1_700_000_000_000_000_000
"""2023-11-14 22:13:20 UTC, a Tuesday, on a whole second."""
_FIRES_MAX = 100_000

Operation = tuple[bool, int, int, int]
"""Whether it writes, offset, size (1, 2, 4 or 8), value."""


class RecordingIrqLine:
    """An IrqLine that records the levels it is set to."""

    def __init__(self) -> None:
        self.levels: list[bool] = []

    def set(self, level: bool) -> None:
        """Remember `level`."""
        self.levels.append(level)

    @property
    def level(self) -> bool:
        """The level now; low before the first setting."""
        return bool(self.levels) and self.levels[-1]

    @property
    def rises(self) -> int:
        """The number of changes from low to high."""
        return sum(
            level and not before
            for before, level in zip([False, *self.levels], self.levels, strict=False)
        )


class FakeTimer:
    """A Timer that its clock, or a test, fires."""

    def __init__(self, callback: Callable[[], None]) -> None:
        self.callback = callback
        self.deadline_ns: int | None = None

    def arm(self, deadline_ns: int) -> None:
        """Remember the deadline."""
        self.deadline_ns = deadline_ns

    def cancel(self) -> None:
        """Forget the deadline."""
        self.deadline_ns = None


class FakeClock:
    """A Clock that only a test moves; timers fire within `advance`."""

    def __init__(self, realtime_ns: int = REALTIME_NS, monotonic_ns: int = 1_000) -> None:
        self._realtime_ns = realtime_ns
        self._monotonic_ns = monotonic_ns
        self.timers: list[FakeTimer] = []
        self.fired = 0
        """The number of timers that have fired."""

    def monotonic_ns(self) -> int:
        """Return the time that `advance` has moved."""
        return self._monotonic_ns

    def realtime_ns(self) -> int:
        """Return the time that `advance` and `step_realtime` have moved."""
        return self._realtime_ns

    def timer(self, callback: Callable[[], None]) -> FakeTimer:
        """Make a disarmed timer."""
        timer = FakeTimer(callback)
        self.timers.append(timer)
        return timer

    @property
    def next_deadline_ns(self) -> int | None:
        """The earliest deadline of an armed timer, None if none is armed."""
        deadlines = (timer.deadline_ns for timer in self.timers)
        return min((at for at in deadlines if at is not None), default=None)

    def advance(self, ns: int) -> None:
        """Let `ns` nanoseconds pass, firing each timer at its deadline."""
        end_ns = self._monotonic_ns + ns
        for _ in range(_FIRES_MAX):
            deadline_ns = self.next_deadline_ns
            if deadline_ns is None or deadline_ns > end_ns:
                self._move_to(end_ns)
                return
            self._move_to(max(deadline_ns, self._monotonic_ns))
            timer = next(t for t in self.timers if t.deadline_ns == deadline_ns)
            timer.deadline_ns = None
            self.fired += 1
            timer.callback()
        raise AssertionError(f"timers fired {_FIRES_MAX} times within {ns} ns")

    def step_realtime(self, ns: int) -> None:
        """Set the host's wall clock forward or back; no time passes."""
        self._realtime_ns += ns

    def _move_to(self, monotonic_ns: int) -> None:
        self._realtime_ns += monotonic_ns - self._monotonic_ns
        self._monotonic_ns = monotonic_ns


class RecordingDevice:
    """A BusDevice that records writes and returns `value` to reads."""

    def __init__(self, value: int = 0) -> None:
        self.lock = threading.Lock()
        self.value = value
        self.reads: list[tuple[int, int]] = []
        self.writes: list[tuple[int, int, int]] = []

    def read(self, offset: int, size: int) -> int:
        """Remember the access."""
        assert self.lock.locked()
        self.reads.append((offset, size))
        return self.value & all_ones(size)

    def write(self, offset: int, size: int, value: int) -> None:
        """Remember the access."""
        assert self.lock.locked()
        self.writes.append((offset, size, value))


def exercise(device: BusDevice, operations: Iterable[Operation]) -> None:
    """Do the accesses of a hostile guest, with the lock held; each value read must fit its size."""
    for is_write, offset, size, value in operations:
        with device.lock:
            if is_write:
                device.write(offset, size, value)
            else:
                result = device.read(offset, size)
                assert type(result) is int
                assert 0 <= result <= all_ones(size)
