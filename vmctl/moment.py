"""Times as commands print them, in this host's zone, to the second; and as they read them."""

import math
import time

_SECONDS_MAX = 1e9
"""As good as for ever, and few enough for every call that waits."""


def seconds_in(text: str) -> float | None:
    """Read a number of seconds, 0 or more, at most some 30 years; None if it is no such number."""
    try:
        seconds = float(text)
    except ValueError:
        return None
    return min(seconds, _SECONDS_MAX) if 0 <= seconds < math.inf else None


def moment(at: float) -> str:
    """Return a time, in seconds since 1970-01-01 UTC, as `2026-11-30T04:05:06+0100`."""
    return time.strftime("%Y-%m-%dT%H:%M:%S%z", time.localtime(at))


def span(seconds: float) -> str:
    """Return a time that has passed, in its two largest units, as `3d 4h` or `12s`."""
    left = max(0, int(seconds))
    parts = []
    for unit, size in (("d", 86400), ("h", 3600), ("m", 60), ("s", 1)):
        count, left = divmod(left, size)
        parts.append(f"{count}{unit}")
    first = next((at for at, part in enumerate(parts) if not part.startswith("0")), len(parts) - 1)
    return " ".join(parts[first : first + 2])
