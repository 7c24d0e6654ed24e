"""Locks on disks that another VM holds until it has been sent completely.

A VM that is received needs the disks of the VM that is sent, which keeps them until the last byte
has gone out, because it may have to go on. So the receiver opens them early, and locks them late.
"""

import time
from collections.abc import Callable

from vmm_kvm.block.locks import lock
from vmm_kvm.errors import ImageError

LOCK_PATIENCE_S = 30
"""How long the sender may take to end, from the end of its stream."""
_PAUSE_S = 0.02


def lock_when_free(
    fd: int,
    name: str,
    *,
    writes: bool,
    is_needed: Callable[[], bool] = lambda: True,
    patience_s: float = LOCK_PATIENCE_S,
) -> None:
    """Lock the image open at `fd` as `vmm_kvm.block.locks.lock` does, as soon as that is possible.

    `is_needed` is called now and then; False ends the waiting.

    Raises:
        ImageError: another process has used it all the time, or the lock is needed no more.
    """
    deadline = time.monotonic() + patience_s
    while True:
        try:
            lock(fd, name, writes=writes)
        except ImageError:
            if time.monotonic() > deadline or not is_needed():
                raise
            time.sleep(_PAUSE_S)
        else:
            return
