"""Time, as the rules see it."""

from typing import Protocol


class Clock(Protocol):
    """The present time."""

    def monotonic_s(self) -> float:
        """Return seconds on a clock that does not jump."""

    def realtime_s(self) -> float:
        """Return seconds since 1970-01-01 UTC."""
