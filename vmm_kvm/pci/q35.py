"""The parts of Intel's Q35 and ICH9 that UEFI firmware needs to recognise the machine.

OVMF knows a few host bridges and stops at any other. This one has the IDs, the register with ECAM's
address, and an ISA bridge, which has the address of power management and behind which OVMF looks
for a serial port. Nothing else of the chips is here; drivers that look for it find it absent.

Source: Intel 3 Series datasheet (316966) §5; ICH9 datasheet (316972) §13; EDK II OvmfPkg
"""

from collections.abc import Callable

from vmm_kvm.arch.x86 import layout
from vmm_kvm.bus import Bus, BusDevice
from vmm_kvm.errors import BusError
from vmm_kvm.log import Log
from vmm_kvm.pci.config import PciFunction
from vmm_kvm.pci.ids import CLASS_HOST_BRIDGE, CLASS_ISA_BRIDGE, VENDOR_INTEL

log = Log(__name__)

LPC_SLOT = 31
"""The slot of the ISA bridge."""

_DEVICE_MCH = 0x29C0
_DEVICE_LPC = 0x2918
_PCIEXBAR = 0x60
_PCIEXBAR_ENABLE = 1 << 0
_PCIEXBAR_LENGTH = 0b11 << 1  # 0: 256 buses
_PCIEXBAR_ADDRESS = 0xF_F000_0000
_PCIEXBAR_WRITABLE = _PCIEXBAR_ADDRESS | _PCIEXBAR_LENGTH | _PCIEXBAR_ENABLE
_PMBASE = 0x40
_PMBASE_IO = 1 << 0
_ACPI_CNTL = 0x44
_ACPI_ENABLE = 1 << 7


class MovableWindow:
    """A device on a bus, at a place that the guest chooses, or at none."""

    __slots__ = ("_base", "_bus", "_size", "device")

    def __init__(self, bus: Bus, size: int) -> None:
        """Begin without a place; `size` is in addresses."""
        self._bus = bus
        self._size = size
        self.device: BusDevice | None = None
        """Set it before the guest runs."""
        self._base: int | None = None

    def move(self, base: int | None) -> None:
        """Put the device at `base`; if the range is taken, at no place."""
        if base == self._base:
            return
        if self._base is not None:
            self._bus.remove(self._base)
            self._base = None
        if base is None or self.device is None:
            return
        try:
            self._bus.insert(base, self._size, self.device)
        except BusError as err:
            log.debug("q35: ECAM: %s", err)
        else:
            self._base = base


def host_bridge(on_ecam: Callable[[int | None], None]) -> PciFunction:
    """Return the host bridge.

    `on_ecam` is called with ECAM's new address, or None for none, with the PCI host's lock held.
    """
    function = PciFunction(
        vendor_id=VENDOR_INTEL, device_id=_DEVICE_MCH, class_code=CLASS_HOST_BRIDGE
    )

    def written(_offset: int, _size: int) -> None:
        value = function.peek(_PCIEXBAR, 8)
        on_ecam(value & _PCIEXBAR_ADDRESS if value & _PCIEXBAR_ENABLE else None)

    function.add_registers(
        _PCIEXBAR, bytes(8), writable=_PCIEXBAR_WRITABLE.to_bytes(8, "little"), on_write=written
    )
    return function


def isa_bridge() -> PciFunction:
    """Return the ISA bridge, for `LPC_SLOT`; power management is on, where the layout has it."""
    function = PciFunction(
        vendor_id=VENDOR_INTEL, device_id=_DEVICE_LPC, class_code=CLASS_ISA_BRIDGE, revision_id=2
    )
    function.add_registers(_PMBASE, (layout.PORT_PM1A_EVENT | _PMBASE_IO).to_bytes(4, "little"))
    function.add_registers(_ACPI_CNTL, bytes((_ACPI_ENABLE,)))
    return function
