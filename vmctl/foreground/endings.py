"""The ends of a VM of `vmctl run`: exit status, message and reason of each."""

import signal
from typing import NamedTuple

from vmm_kvm.machine.spec import Crash, DebugExitStatus, Ending, Outcome, TripleFault

EXIT_ERROR = 1
EXIT_KILLED = 128 + signal.SIGTERM


class Ended(NamedTuple):
    """The VM ended for an outside reason, not by the guest."""

    status: int
    message: str | None = None
    discard_output: bool = False
    reason: str = "left"
    """The line if there is no message."""


def reason_of(outcome: Outcome | Ended | None) -> str | None:
    """Return the reason of an end without a message."""
    match outcome:
        case Ending():
            return outcome.value
        case DebugExitStatus(value):
            return f"debug exit {value}"
        case Ended(message=None, reason=reason):
            return reason
        case _:
            return None


def status_of(outcome: Outcome | Ended | None) -> tuple[int, str | None]:
    """Return the exit status of an end, and its message."""
    match outcome:
        case Ended(status, message):
            return status, message
        case DebugExitStatus(value):
            return (value << 1 | 1) & 0xFF, None
        case Crash(message):
            return EXIT_ERROR, message
        case TripleFault(message):
            return EXIT_ERROR, message
        case Ending():
            return 0, None
        case None:
            raise AssertionError("the event loop stopped by itself")
