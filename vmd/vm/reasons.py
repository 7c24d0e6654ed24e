"""Codes for a VM's end, and for failures to make or write it, as its process reports them."""

import errno
from typing import assert_never

from vmd.vm.shutdown import Shutdown
from vmd.wire.internal import EndReason, VmEnding
from vmd.wire.messages import ErrorCode
from vmd.wire.parts import TEXT_MAX
from vmm_kvm.errors import (
    BootError,
    ImageError,
    Refusal,
    RefusedError,
    SnapshotError,
    StateError,
    VmmError,
)
from vmm_kvm.machine.spec import Crash, DebugExitStatus, Ending, Outcome, TripleFault


def error_code(err: Exception) -> ErrorCode:
    """Return the code for a machine that cannot be made."""
    match err:
        case ImageError():
            return ErrorCode.DISK_MISSING
        case SnapshotError() | StateError():
            return ErrorCode.ENOENT  # OpenBSD's answer to an unacceptable stream
        case BootError() | RefusedError(refusal=Refusal.EINVAL):
            return ErrorCode.EINVAL
        case MemoryError() | RefusedError(refusal=Refusal.ENOMEM):
            return ErrorCode.ENOMEM
    return ErrorCode.EIO


def send_code(err: Exception) -> ErrorCode:
    """Return the code for a machine that is not written."""
    is_full = isinstance(err, OSError) and err.errno in {errno.ENOSPC, errno.EDQUOT}
    return ErrorCode.ENOSPC if is_full else ErrorCode.EIO


def why_not_sent(failure: "VmmError | OSError") -> tuple[ErrorCode, str]:
    """Return the code and the text for a machine that is not written."""
    text = failure.strerror if isinstance(failure, OSError) else None
    return send_code(failure), (text or str(failure))[:TEXT_MAX]


def ending(outcome: Outcome | None, shutdown: Shutdown, has_timed_out: bool) -> VmEnding:
    """Return how a guest has ended, and if by a reset, whether its watchdog has timed out."""
    if shutdown.has_begun:
        if shutdown.is_over and outcome is None:
            text = "the guest did not stop in time"
            return VmEnding(reason=EndReason.OVERDUE, message=text)
        return VmEnding(reason=EndReason.STOPPED)
    match outcome:
        case Ending.REBOOT:
            return VmEnding(reason=EndReason.REBOOT, has_timed_out=has_timed_out)
        case TripleFault(message):
            reason = EndReason.REBOOT
            return VmEnding(reason=reason, message=message, has_timed_out=has_timed_out)
        case Crash(message):
            return VmEnding(reason=EndReason.CRASHED, message=message)
        case DebugExitStatus(value):
            return VmEnding(reason=EndReason.POWER_OFF, message=f"debug exit {value:#x}")
        case Ending.POWER_OFF | None:
            return VmEnding(reason=EndReason.POWER_OFF)
        case _:
            assert_never(outcome)
