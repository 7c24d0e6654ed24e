"""The VMClock device: a page that says when the VM's clock, or the VM itself, became another one.

Programs map it: a changed disruption marker tells that processor counters have jumped, as after a
move to another host; a changed generation counter tells that the VM is a copy besides. No time is
told: guests have kvmclock.

Source: UAPI.13 VMClock; for the flags and the generation counter's place <linux/vmclock-abi.h>
"""

import mmap
import struct
from collections.abc import Callable
from typing import Annotated, Final, Literal

from vmm_kvm.bits import PAGE_SIZE
from vmm_kvm.irq import IrqLine
from vmm_kvm.state import PartState, Range

MAGIC: Final = 0x4B4C_4356  # "VCLK"
VERSION: Final = 1
COUNTER_INVALID: Final = 0xFF
"""No counter is told."""
FLAG_GENERATION: Final = 1 << 8
FLAG_NOTIFICATION: Final = 1 << 9

_CONSTANT = struct.Struct("<IIHBB")  # magic, size, version, counter_id, time_type
_CHANGING = struct.Struct("<QQ")  # disruption_marker, flags
_WORD, _COUNTER = struct.Struct("<I"), struct.Struct("<Q")
_AT_SEQUENCE, _AT_CHANGING, _AT_GENERATION = 0x0C, 0x10, 0x68
_SEQUENCE_MASK, _COUNTER_MAX = (1 << 32) - 1, (1 << 64) - 1


class VmClockState(PartState):
    """What a guest reads."""

    sequence: Annotated[int, Range(0, _SEQUENCE_MASK)]
    disruptions: Annotated[int, Range(0, _COUNTER_MAX)]
    generation: Annotated[int, Range(0, _COUNTER_MAX)]
    version: Literal[1] = 1


class VmClock:
    """The structure in a page that the machine maps for reading.

    Counters begin at `random` numbers: those of two copies differ.
    """

    __slots__ = ("_irq", "_random", "_state", "memory")

    def __init__(self, random: Callable[[int], bytes]) -> None:
        # Private: a clone by fork has its own.
        self.memory = mmap.mmap(-1, PAGE_SIZE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self._random = random
        self._irq: IrqLine | None = None
        constant = MAGIC, PAGE_SIZE, VERSION, COUNTER_INVALID, 0
        self.memory[: _CONSTANT.size] = _CONSTANT.pack(*constant)
        self._state = VmClockState(
            sequence=0, disruptions=self._number(), generation=self._number()
        )
        self._write()

    def attach(self, irq: IrqLine) -> None:
        """Use `irq`, edge-triggered, to say that something has changed."""
        self._irq = irq

    def disrupt(self, *, is_copy: bool = False) -> None:
        """Tell the guest that its counters have jumped, or that it is a copy; no vCPU runs."""
        old = self._state
        # Odd while the page changes: a guest's program may have been interrupted while it read.
        self.memory[_AT_SEQUENCE : _AT_SEQUENCE + 4] = _WORD.pack(old.sequence + 1 & _SEQUENCE_MASK)
        self._state = VmClockState(
            sequence=old.sequence + 2 & _SEQUENCE_MASK,
            disruptions=self._other(old.disruptions),
            generation=self._other(old.generation) if is_copy else old.generation,
        )
        self._write()
        if self._irq:
            self._irq.set(True)
            self._irq.set(False)

    def save(self) -> VmClockState:
        """Return a snapshot."""
        return self._state

    def restore(self, state: VmClockState) -> None:
        """Be as in a snapshot; `disrupt` tells the guest that it is not."""
        self._state = state.but(sequence=state.sequence & ~1)
        self._write()

    def _write(self) -> None:
        state = self._state
        flags = FLAG_GENERATION | FLAG_NOTIFICATION
        _CHANGING.pack_into(self.memory, _AT_CHANGING, state.disruptions, flags)
        _COUNTER.pack_into(self.memory, _AT_GENERATION, state.generation)
        _WORD.pack_into(self.memory, _AT_SEQUENCE, state.sequence)

    def _number(self) -> int:
        return int.from_bytes(self._random(8), "little")

    def _other(self, number: int) -> int:
        while (found := self._number()) == number:
            pass
        return found
