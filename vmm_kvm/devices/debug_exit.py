"""The debug exit port: a test guest writes a value and the VM ends with it."""

import threading
from collections.abc import Callable
from typing import Literal

from vmm_kvm.bits import all_ones
from vmm_kvm.state import PartState


class DebugExitState(PartState):
    """A DebugExit has no state."""

    version: Literal[1] = 1


class DebugExit:
    """A debug exit port; a BusDevice of 1, 2 or 4 ports.

    `on_exit` is given the value as written, 0 to 2**(8 * size) - 1, with the lock held, on a vCPU
    thread; it must not wait. It decides the exit status.
    """

    __slots__ = ("_on_exit", "lock")

    def __init__(self, on_exit: Callable[[int], None]) -> None:
        self.lock = threading.Lock()
        self._on_exit = on_exit

    def read(self, offset: int, size: int) -> int:
        """Return zero in the first byte; nothing drives the others."""
        ones = all_ones(size)
        return ones if offset else ones & ~0xFF

    def write(self, offset: int, size: int, value: int) -> None:
        """Report the exit value; a write that misses the first port is ignored."""
        if offset == 0:
            self._on_exit(value & all_ones(size))

    def reset(self) -> None:
        """Do nothing: there is no state."""

    def save(self) -> DebugExitState:
        """Return a snapshot."""
        return DebugExitState()

    def restore(self, state: DebugExitState) -> None:
        """Continue from a snapshot."""
