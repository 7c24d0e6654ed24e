"""Time as devices see it; the event loop provides the real one, tests a fake one."""

from collections.abc import Callable
from typing import Protocol

NANOSECONDS = 1_000_000_000


class Timer(Protocol):
    """A one-shot timer; arming it again replaces the earlier deadline."""

    def arm(self, deadline_ns: int) -> None:
        """Fire once at `deadline_ns` of the clock's `monotonic_ns`; a past deadline fires soon."""

    def cancel(self) -> None:
        """Forget the deadline; a callback that already runs is not waited for."""


class Clock(Protocol):
    """A source of time and timers."""

    def monotonic_ns(self) -> int:
        """Return nanoseconds since an arbitrary start; it advances while the VM is paused."""

    def realtime_ns(self) -> int:
        """Return nanoseconds since 1970-01-01 UTC."""

    def timer(self, callback: Callable[[], None]) -> Timer:
        """Make a disarmed timer.

        `callback` runs on the event-loop thread with no device lock held; it takes its own.
        """
