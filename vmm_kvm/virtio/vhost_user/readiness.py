"""How a device's process tells, by a pipe, that it can serve, or why it cannot."""

import os

READY = b"\0"
"""Told when the device can be used; else the reason is."""
_REASON_MAX = 4096


def tell_ready(fd: int) -> bool:
    """Tell that the device can be used, and close the pipe; returns whether anybody still waits."""
    return _tell(fd, READY)


def tell_failure(fd: int, reason: str) -> None:
    """Tell why the device cannot be used, and close the pipe."""
    _tell(fd, reason.encode(errors="replace")[:_REASON_MAX])


def await_ready(fd: int) -> str | None:
    """Wait for either, and close the pipe; returns the reason, None if the device can be used.

    The reason is empty if the process has ended without a word.
    """
    with open(fd, "rb", buffering=0) as pipe:
        told = pipe.read(_REASON_MAX)
    return None if told == READY else told.decode(errors="replace")


def _tell(fd: int, told: bytes) -> bool:
    try:
        os.write(fd, told)
    except BrokenPipeError:  # the VM was ended meanwhile
        return False
    finally:
        os.close(fd)
    return True
