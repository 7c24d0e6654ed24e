"""Interrupt lines that lead into KVM's interrupt controllers."""

import threading
from collections.abc import Iterable

from vmm_kvm.kvm.vm import Irqchip, Vm

_PIC_INPUTS = 8


def set_level_triggered(vm: Vm, irqs: Iterable[int]) -> None:
    """Let the PICs take `irqs`, numbers from 0 to 15, by level: lines that devices share.

    Firmware does it through the ELCR ports; without it a second device on a line cannot interrupt
    while the first still does.

    Raises:
        KvmError: there is no irqchip.
    """
    levels = sum(1 << irq for irq in irqs)
    for chip, shift in ((Irqchip.PIC_MASTER, 0), (Irqchip.PIC_SLAVE, _PIC_INPUTS)):
        state = vm.get_irqchip(chip)
        state.chip.pic.elcr = levels >> shift & state.chip.pic.elcr_mask
        vm.set_irqchip(state)


class KvmIrqLine:
    """An `IrqLine` that drives one GSI of a VM; any thread. Only changes go to the kernel."""

    __slots__ = ("_gsi", "_level", "_lock", "_vm")

    def __init__(self, vm: Vm, gsi: int) -> None:
        """Drive `gsi` of `vm`, which stays the caller's; the line is low at first."""
        self._vm = vm
        self._gsi = gsi
        self._level = False
        self._lock = threading.Lock()  # so that the kernel sees the levels in their order

    def drive_again(self) -> None:
        """Tell the level to a VM that replaces the one before.

        Raises:
            KvmError: the VM has no irqchip, or is closed.
        """
        if self._level:
            self._vm.irq_line(self._gsi, 1)

    def set(self, level: bool) -> None:
        """Drive the line.

        Raises:
            KvmError: the VM has no irqchip, or is closed.
        """
        if level == self._level:
            return
        with self._lock:
            if level != self._level:
                self._vm.irq_line(self._gsi, int(level))
                self._level = level
