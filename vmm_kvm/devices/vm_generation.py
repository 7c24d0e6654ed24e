"""The VM's generation identifier: sixteen random bytes that change when the VM becomes another one.

The next random numbers of a guest that was cloned, or restored from a snapshot, are also another
guest's. Its kernel reads the identifier, and mixes it in when an interrupt says that it changed.

Source: Microsoft, "Virtual Machine Generation ID"; QEMU docs/specs/vmgenid
"""

import mmap
from collections.abc import Callable
from typing import Annotated, Literal

from vmm_kvm.bits import PAGE_SIZE
from vmm_kvm.irq import IrqLine
from vmm_kvm.state import Length, PartState

SIZE = 16
"""Bytes of the identifier, at the beginning of its page."""


class VmGenerationState(PartState):
    """The page for the guest."""

    identifier: Annotated[bytes, Length(SIZE, SIZE)]
    version: Literal[1] = 1


class VmGeneration:
    """The identifier in a page that the machine maps for reading.

    `random` returns that many random bytes.
    """

    __slots__ = ("_irq", "_random", "memory")

    def __init__(self, random: Callable[[int], bytes]) -> None:
        # Private: a clone by fork has its own.
        self.memory = mmap.mmap(-1, PAGE_SIZE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self._random = random
        self._irq: IrqLine | None = None
        self.memory[:SIZE] = random(SIZE)

    def attach(self, irq: IrqLine) -> None:
        """Use `irq`, edge-triggered, to say that the identifier has changed."""
        self._irq = irq

    def renew(self) -> None:
        """Change the identifier and interrupt the guest; while no vCPU runs."""
        self.memory[:SIZE] = self._random(SIZE)
        if self._irq:
            self._irq.set(True)
            self._irq.set(False)

    def save(self) -> VmGenerationState:
        """Return a snapshot."""
        return VmGenerationState(identifier=self.memory[:SIZE])

    def restore(self, state: VmGenerationState) -> None:
        """Be the same VM; `renew` makes it another one."""
        self.memory[:SIZE] = state.identifier
