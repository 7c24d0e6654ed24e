"""The pages that tell a guest whether it is still the same VM: its generation, and its clock."""

import ctypes
from collections.abc import Callable, Iterator

from vmm_kvm.arch.x86 import layout
from vmm_kvm.devices.vm_clock import VmClock
from vmm_kvm.devices.vm_generation import VmGeneration
from vmm_kvm.irq import IrqLine
from vmm_kvm.state import Part
from vmm_kvm.vm_params import Mapping


class Identity:
    """Both devices, which share an interrupt; `random` returns that many random bytes."""

    def __init__(self, random: Callable[[int], bytes]) -> None:
        self._generation, self._clock = VmGeneration(random), VmClock(random)

    def mappings(self) -> list[Mapping]:
        """Return where the guest reads the pages."""
        return [
            Mapping(
                gpa, ctypes.addressof(ctypes.c_char.from_buffer(page)), len(page), is_readonly=True
            )
            for gpa, page in (
                (layout.VM_GENERATION_ADDRESS, self._generation.memory),
                (layout.VM_CLOCK_ADDRESS, self._clock.memory),
            )
        ]

    def attach(self, irq: IrqLine) -> None:
        """Use `irq`, edge-triggered, to say that something has changed."""
        self._generation.attach(irq)
        self._clock.attach(irq)

    def parts(self) -> Iterator[Part]:
        """Yield the devices that have a state."""
        yield Part("vm_generation", self._generation)
        yield Part("vm_clock", self._clock)

    def change(self, *, is_copy: bool) -> None:
        """Tell the guest that it is a copy, or that it has moved; while it is paused."""
        self._clock.disrupt(is_copy=is_copy)
        if is_copy:
            self._generation.renew()
