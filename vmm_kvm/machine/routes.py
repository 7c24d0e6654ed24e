"""The inputs of the interrupt controllers that the machine's interrupt lines lead to."""

from collections.abc import Iterator

from vmm_kvm.arch.x86 import layout
from vmm_kvm.kvm.vm import Irqchip, IrqchipRoute

_ISA_IRQS = 16
_CASCADE_IRQ = 2
_TIMER_PIN = 2  # of the IOAPIC, as the MADT's override says


def interrupt_routes() -> Iterator[IrqchipRoute]:
    """Lead GSIs to interrupt controller inputs as docs/architecture.md says."""
    for gsi in range(_ISA_IRQS):
        yield _pic_route(gsi, gsi)
        if gsi != _CASCADE_IRQ:
            pin = _TIMER_PIN if gsi == 0 else gsi
            yield IrqchipRoute(gsi, Irqchip.IOAPIC, pin)
    yield IrqchipRoute(layout.GSI_VM_GENERATION, Irqchip.IOAPIC, layout.GSI_VM_GENERATION)
    for gsi, irq in zip(layout.GSI_PCI_INTX, layout.PIC_PCI_INTX, strict=True):
        yield _pic_route(gsi, irq)
        yield IrqchipRoute(gsi, Irqchip.IOAPIC, gsi)


def _pic_route(gsi: int, irq: int) -> IrqchipRoute:
    chip = Irqchip.PIC_SLAVE if irq >= 8 else Irqchip.PIC_MASTER
    return IrqchipRoute(gsi, chip, irq % 8)
