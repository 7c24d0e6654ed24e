"""Interrupt lines that lead into KVM's interrupt controllers."""

import threading

from vmm_kvm.kvm.vm import Vm


class KvmIrqLine:
    """An `IrqLine` that drives one GSI of a VM; any thread, and the kernel hears only changes."""

    __slots__ = ("_gsi", "_level", "_lock", "_vm")

    def __init__(self, vm: Vm, gsi: int) -> None:
        """Drive `gsi` of `vm`, which stays the caller's; the line is low at first."""
        self._vm = vm
        self._gsi = gsi
        self._level = False
        self._lock = threading.Lock()  # so that the kernel sees the levels in their order

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
