"""System control port A, port 0x92: the quick way to reset, and an A20 gate that gates nothing.

KVM never masks address line 20, so the gate's bit is kept for the guest to read, and does nothing.
Writing 1 to bit 0 resets; it reads as 0, since no machine survives to read a 1.

Source: Intel 82371AB §2.2.2.6, "PORT92".
"""

import threading
from collections.abc import Callable
from typing import Literal

from vmm_kvm.bits import all_ones
from vmm_kvm.state import U8, PartState


class Control:
    """The port's bits."""

    FAST_INIT = 1 << 0
    """Written as 1: reset."""
    FAST_A20 = 1 << 1
    """Let address line 20 through."""


class Port92State(PartState):
    """Everything that a guest can observe of a Port92."""

    value: U8
    version: Literal[1] = 1


class Port92:
    """The port; a BusDevice of one port, for 0x92.

    `on_reset` is called with the lock held, on a vCPU thread; it must not wait.
    """

    __slots__ = ("_on_reset", "_value", "lock")

    def __init__(self, on_reset: Callable[[], None]) -> None:
        self.lock = threading.Lock()
        self._on_reset = on_reset
        self._value = Control.FAST_A20

    def read(self, offset: int, size: int) -> int:
        """Return the last written value, without the reset bit; further bytes are not driven."""
        ones = all_ones(size)
        return ones if offset else ones & ~0xFF | self._value

    def write(self, offset: int, size: int, value: int) -> None:
        """Keep the bits, and reset if bit 0 is set."""
        if offset != 0 or not size:
            return
        self._value = value & 0xFF & ~Control.FAST_INIT
        if value & Control.FAST_INIT:
            self._on_reset()

    def reset(self) -> None:
        """Let address line 20 through, as after power-on."""
        with self.lock:
            self._value = Control.FAST_A20

    def save(self) -> Port92State:
        """Return a snapshot; any thread."""
        with self.lock:
            return Port92State(value=self._value)

    def restore(self, state: Port92State) -> None:
        """Continue from a snapshot."""
        with self.lock:
            self._value = state.value & 0xFF & ~Control.FAST_INIT
