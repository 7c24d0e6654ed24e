"""Times as commands print them: in this host's zone, to the second."""

import time


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
