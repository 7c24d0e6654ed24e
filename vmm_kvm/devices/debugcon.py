"""The debug console: one port that firmware writes its log to, byte by byte."""

import threading
from collections.abc import Callable
from typing import Literal

from vmm_kvm.bits import all_ones
from vmm_kvm.log import Log
from vmm_kvm.state import PartState

log = Log(__name__)

READBACK = 0xE9
"""The port's value at reads, by which firmware detects it."""
_LINE_MAX = 1024


class DebugconState(PartState):
    """A Debugcon has no state."""

    version: Literal[1] = 1


class Debugcon:
    """A debug console; a BusDevice of one port.

    `transmit` takes what the guest writes, with the lock held, on a vCPU thread; it must not wait.
    """

    __slots__ = ("_transmit", "lock")

    def __init__(self, transmit: Callable[[bytes], None]) -> None:
        self.lock = threading.Lock()
        self._transmit = transmit

    def read(self, offset: int, size: int) -> int:
        """Return the mark in the first byte; nothing drives the others."""
        ones = all_ones(size)
        return ones if offset else ones & ~0xFF | READBACK

    def write(self, offset: int, size: int, value: int) -> None:
        """Transmit the byte written to the port."""
        if offset == 0 and size:
            self._transmit(bytes((value & 0xFF,)))

    def reset(self) -> None:
        """Do nothing: there is no state."""

    def save(self) -> DebugconState:
        """Return a snapshot."""
        return DebugconState()

    def restore(self, state: DebugconState) -> None:
        """Continue from a snapshot."""


class DebugLog:
    """Firmware's output on its debug port, logged line by line."""

    def __init__(self, name: str) -> None:
        """Log for the VM of this name."""
        self._name = name
        self._line = bytearray()

    def write(self, data: bytes) -> None:
        """Collect `data`; called under the device's lock."""
        self._line += data
        if data == b"\n" or len(self._line) >= _LINE_MAX:
            log.debug("%s: firmware: %s", self._name, self._line.decode("latin-1").rstrip())
            self._line.clear()
