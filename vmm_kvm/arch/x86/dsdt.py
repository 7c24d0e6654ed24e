r"""What the machine's devices are, in ACPI's words: the contents of the DSDT.

\_S5            how to power off
\_PIC           remembers whether interrupts go through the APICs
\_SB.Cnnn       processors
\_SB.PCI0       the PCI host bridge: windows, interrupt routing
\_SB.MBRD       what nothing else may claim: ECAM, power management
\_SB.COM1, RTC, FWCF, PVPN
\_SB.VGEN       where the VM's generation identifier lies
\_SB.VCLK       the page of the VM's clock
\_SB.GED        the interrupt that says that one of both has changed
\_SB.TPM        where the TPM's registers lie, if there is one
"""

from collections.abc import Sequence

from vmm_kvm.arch.x86 import aml
from vmm_kvm.arch.x86.layout import (
    ACPI_S5_SLEEP_TYPE,
    ECAM_BUSES,
    ECAM_SIZE,
    ECAM_START,
    GSI_COM1,
    GSI_PCI_INTX,
    GSI_RTC,
    GSI_VM_GENERATION,
    IOAPIC_ADDRESS,
    PCI_IO_SIZE,
    PCI_IO_START,
    PCI_MMIO32_HIGH_SIZE,
    PCI_MMIO32_HIGH_START,
    PCI_MMIO32_SIZE,
    PCI_MMIO32_START,
    PCI_MMIO64_SIZE,
    PIC_PCI_INTX,
    PINS,
    PORT_COM1,
    PORT_FW_CFG,
    PORT_FW_CFG_SIZE,
    PORT_PCI_CONFIG,
    PORT_PM1A_EVENT,
    PORT_PVPANIC,
    PORT_RTC,
    TPM_ADDRESS,
    TPM_SIZE,
    UEFI_HOLE_START,
    VM_CLOCK_ADDRESS,
    VM_GENERATION_ADDRESS,
    line_index,
)
from vmm_kvm.bits import PAGE_SIZE

# Windows for 32-bit BARs: (address, size).
_WINDOWS = (
    (PCI_MMIO32_START, PCI_MMIO32_SIZE),
    (PCI_MMIO32_HIGH_START, PCI_MMIO32_HIGH_SIZE),
)
_Q35_WINDOWS = ((UEFI_HOLE_START, IOAPIC_ADDRESS - UEFI_HOLE_START),)
_PCI_SLOTS = 32
_ANY_FUNCTION = 0xFFFF
_PM_SIZE = 16
_OSC_PCI = "33DB4D5B-1FF7-401C-9657-7441C03DD766"
_OSC_UNKNOWN_UUID = 1 << 2
_CHANGED = 0x80
_PRESENT = 0x0F  # present, enabled, shown, working


def dsdt_body(
    cpus: int, mmio64_start: int, *, is_q35: bool = False, has_tpm: bool = False
) -> bytes:
    """Return the AML of the DSDT, without the table's header.

    `cpus` is 1 to 64; `mmio64_start` is where 64-bit BARs may go, above all RAM. With `is_q35`
    UEFI firmware has placed BARs from 2 GiB on, and ECAM somewhere.
    """
    zero = aml.integer(0)
    return b"".join(
        (
            aml.name("\\_S5", aml.package(aml.integer(ACPI_S5_SLEEP_TYPE), zero, zero, zero)),
            aml.name("\\PICM", zero),
            aml.method("\\_PIC", 1, aml.store(aml.ARG0, aml.name_string("\\PICM"))),
            aml.scope(
                "\\_SB",
                *(_processor(index) for index in range(cpus)),
                _pci_host(mmio64_start, _Q35_WINDOWS if is_q35 else _WINDOWS),
                _board(has_ecam=not is_q35),
                _isa_device("COM1", "PNP0501", aml.io_ports(PORT_COM1, 8), aml.isa_irq(GSI_COM1)),
                _isa_device("RTC", "PNP0B00", aml.io_ports(PORT_RTC, 2), aml.isa_irq(GSI_RTC)),
                _emulated("FWCF", "QEMU0002", aml.io_ports(PORT_FW_CFG, PORT_FW_CFG_SIZE)),
                _emulated("PVPN", "QEMU0001", aml.io_ports(PORT_PVPANIC, 1)),
                _generation(),
                _clock(),
                _generic_events(),
                *((_tpm(),) if has_tpm else ()),
            ),
        )
    )


def _processor(index: int) -> bytes:
    return aml.device(
        f"C{index:03X}",
        aml.name("_HID", aml.string("ACPI0007")),
        aml.name("_UID", aml.integer(index)),
    )


def _pci_host(mmio64_start: int, windows: Sequence[tuple[int, int]]) -> bytes:
    return aml.device(
        "PCI0",
        aml.name("_HID", aml.eisa_id("PNP0A08")),
        aml.name("_CID", aml.eisa_id("PNP0A03")),
        aml.name("_UID", aml.integer(0)),
        aml.name("_SEG", aml.integer(0)),
        aml.name("_BBN", aml.integer(0)),
        aml.name(
            "_CRS",
            aml.resources(
                aml.bus_numbers(0, ECAM_BUSES - 1),
                aml.io_ports(PORT_PCI_CONFIG, 8),
                aml.io_window(PCI_IO_START, PCI_IO_SIZE),
                *(aml.memory_window32(start, size) for start, size in windows),
                aml.memory_window64(mmio64_start, PCI_MMIO64_SIZE),
            ),
        ),
        _osc(),
        aml.name("PRTA", _routing(GSI_PCI_INTX)),
        aml.name("PRTP", _routing(PIC_PCI_INTX)),
        aml.method(
            "_PRT",
            0,
            aml.if_(aml.name_string("\\PICM"), aml.return_(aml.name_string("PRTA"))),
            aml.return_(aml.name_string("PRTP")),
        ),
    )


def _osc() -> bytes:
    """Grant the operating system all features that it asks for: firmware uses none of them."""
    capabilities = aml.name_string("CDW1")
    return aml.method(
        "_OSC",
        4,
        aml.create_dword_field(aml.ARG3, 0, "CDW1"),
        aml.if_(aml.equal(aml.ARG0, aml.uuid(_OSC_PCI)), aml.return_(aml.ARG3)),
        aml.bit_or(capabilities, aml.integer(_OSC_UNKNOWN_UUID), capabilities),
        aml.return_(aml.ARG3),
        is_serialized=True,
    )


def _routing(lines: Sequence[int]) -> bytes:
    """Return the routing table: (slot, pin, no link device, GSI) for all slots and pins."""
    none = aml.integer(0)
    # All but the slot number repeats every few slots: encode it once, in a third of the time.
    rest = [[aml.integer(pin) + none + aml.integer(line) for line in lines] for pin in range(PINS)]
    entries = []
    for slot in range(_PCI_SLOTS):
        address = aml.integer(slot << 16 | _ANY_FUNCTION)
        for pin in range(PINS):
            entry = address + rest[pin][line_index(slot, pin + 1)]
            entries.append(aml.encoded_package(4, entry))
    return aml.package(*entries)


def _board(*, has_ecam: bool) -> bytes:
    ecam = (aml.fixed_memory(ECAM_START, ECAM_SIZE),) if has_ecam else ()
    return aml.device(
        "MBRD",
        aml.name("_HID", aml.eisa_id("PNP0C02")),
        aml.name("_UID", aml.integer(0)),
        aml.name(
            "_CRS",
            aml.resources(*ecam, aml.io_ports(PORT_PM1A_EVENT, _PM_SIZE)),
        ),
    )


def _generation() -> bytes:
    """Source: Microsoft, "Virtual Machine Generation ID"; QEMU docs/specs/vmgenid."""
    counter = aml.string("VM_Gen_Counter")
    return aml.device(
        "VGEN",
        aml.name("_HID", aml.string("VMMK0001")),
        aml.name("_CID", counter),
        aml.name("_DDN", counter),
        aml.name("ADDR", aml.package(aml.integer(VM_GENERATION_ADDRESS), aml.integer(0))),
    )


def _clock() -> bytes:
    """Source: UAPI.13 VMClock; for its identifiers Linux drivers/ptp/ptp_vmclock.c."""
    clock = aml.string("VMCLOCK")
    return aml.device(
        "VCLK",
        aml.name("_HID", aml.string("AMZNC10C")),
        aml.name("_CID", clock),
        aml.name("_DDN", clock),
        aml.name("_CRS", aml.resources(aml.fixed_memory(VM_CLOCK_ADDRESS, PAGE_SIZE))),
    )


def _tpm() -> bytes:
    """Source: TCG ACPI Specification 1.4 §6."""
    return aml.device(
        "TPM",
        aml.name("_HID", aml.string("MSFT0101")),
        aml.name("_CRS", aml.resources(aml.fixed_memory(TPM_ADDRESS, TPM_SIZE))),
        aml.name("_STA", aml.integer(_PRESENT)),
    )


def _generic_events() -> bytes:
    """Source: ACPI 6.5 §5.6.9."""
    return aml.device(
        "GED",
        aml.name("_HID", aml.string("ACPI0013")),
        aml.name("_UID", aml.integer(0)),
        aml.name("_CRS", aml.resources(aml.edge_interrupt(GSI_VM_GENERATION))),
        aml.method(
            "_EVT",
            1,
            aml.notify("\\_SB.VCLK", _CHANGED),
            aml.notify("\\_SB.VGEN", _CHANGED),
            is_serialized=True,
        ),
    )


def _isa_device(path: str, identifier: str, *descriptors: bytes) -> bytes:
    return aml.device(
        path,
        aml.name("_HID", aml.eisa_id(identifier)),
        aml.name("_UID", aml.integer(0)),
        aml.name("_CRS", aml.resources(*descriptors)),
    )


def _emulated(path: str, identifier: str, *descriptors: bytes) -> bytes:
    return aml.device(
        path,
        aml.name("_HID", aml.string(identifier)),
        aml.name("_STA", aml.integer(_PRESENT)),
        aml.name("_CRS", aml.resources(*descriptors)),
    )
