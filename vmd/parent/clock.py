"""The clock that the rules are handed."""

import time


class SystemClock:
    """The registry's clock."""

    def monotonic_s(self) -> float:
        """Return seconds on a clock that does not jump."""
        return time.monotonic()

    def realtime_s(self) -> float:
        """Return seconds since 1970-01-01 UTC."""
        return time.time()
