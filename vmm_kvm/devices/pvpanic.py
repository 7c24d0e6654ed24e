"""pvpanic: the port through which a guest says that its kernel panicked."""

import threading
from collections.abc import Callable
from typing import Literal

from vmm_kvm.bits import all_ones
from vmm_kvm.state import PartState


class PanicEvent:
    """Events in the guest (QEMU docs/specs/pvpanic)."""

    PANICKED = 1 << 0
    CRASH_LOADED = 1 << 1


SUPPORTED_EVENTS = PanicEvent.PANICKED | PanicEvent.CRASH_LOADED


class PvpanicState(PartState):
    """A Pvpanic has no state."""

    version: Literal[1] = 1


class Pvpanic:
    """A pvpanic port; a BusDevice of one port.

    `on_event` is given the supported events of each write, if there are any, with the lock held, on
    a vCPU thread; it must not wait.

    Source: QEMU docs/specs/pvpanic
    """

    __slots__ = ("_on_event", "lock")

    def __init__(self, on_event: Callable[[int], None]) -> None:
        self.lock = threading.Lock()
        self._on_event = on_event

    def read(self, offset: int, size: int) -> int:
        """Return the supported events in the first byte; nothing drives the others."""
        ones = all_ones(size)
        return ones if offset else ones & ~0xFF | SUPPORTED_EVENTS

    def write(self, offset: int, size: int, value: int) -> None:
        """Report the events; bits that mean nothing are ignored."""
        events = SUPPORTED_EVENTS & value if offset == 0 and size else None
        if events:
            self._on_event(events)

    def reset(self) -> None:
        """Do nothing: there is no state."""

    def save(self) -> PvpanicState:
        """Return a snapshot."""
        return PvpanicState()

    def restore(self, state: PvpanicState) -> None:
        """Continue from a snapshot."""
