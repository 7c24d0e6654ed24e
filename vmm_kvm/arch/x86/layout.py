"""Every guest-physical address, I/O port and interrupt of the machine, in one place.

Memory:

    0x0000_0000  RAM up to the size of the VM, at most 3 GiB; within it, for direct boots:
      0x0000_0500  GDT, then the scratch of one boot path (page tables, start info, arguments)
      0x0009_fc00  end of conventional memory (E820 type 1 ends here)
      0x000e_0000  ACPI tables of direct boots (E820 type 2 up to 1 MiB); firmware lies here instead
      0x000f_0000  SMBIOS tables of direct boots
      0x0010_0000  kernels
    0xc000_0000  PCI memory BARs, 32-bit
    0xe000_0000  PCI ECAM, one bus
    0xe010_0000  PCI memory BARs, 32-bit, that firmware places
    0xfec0_0000  IOAPIC
    0xfee0_0000  local APICs
    0xfeff_a000  the VM's clock, one page
    0xfeff_b000  the VM's generation identifier, one page
    0xfeff_c000  KVM's identity-map page and the three TSS pages behind it
    0xff00_0000  firmware ROM, ending at 4 GiB
    4 GiB        the rest of RAM, then PCI memory BARs, 64-bit

OpenBSD's vmd lets RAM reach 0xf0000000; here the hole begins at 3 GiB, which leaves room for BARs
of a useful size (17.1 of its behaviour has 254 MiB) and costs the guest nothing.
"""

from vmm_kvm.bits import GIB, KIB, MIB

# Memory
PCI_HOLE_START = 3 * GIB
UEFI_HOLE_START = 2 * GIB
"""For guests of UEFI firmware: OVMF uses all addresses from there up for devices."""
PCI_HOLE_END = 4 * GIB
PCI_MMIO32_START = PCI_HOLE_START
PCI_MMIO32_SIZE = 512 * MIB
"""The address from which this program places BARs that no firmware has placed."""
ECAM_START = 0xE000_0000
ECAM_BUSES = 1
ECAM_SIZE = ECAM_BUSES * MIB
IOAPIC_ADDRESS = 0xFEC0_0000
PCI_MMIO32_HIGH_START = ECAM_START + ECAM_SIZE
"""Firmware assigns BARs downward from the IOAPIC: here."""
PCI_MMIO32_HIGH_SIZE = IOAPIC_ADDRESS - PCI_MMIO32_HIGH_START
LOCAL_APIC_ADDRESS = 0xFEE0_0000
TPM_ADDRESS = 0xFED4_0000
TPM_SIZE = 0x5000
"""Five localities."""
TPM_CONTROL_AREA = 0x40
"""Offset of the registers that ACPI leads to."""
VM_CLOCK_ADDRESS = 0xFEFF_A000
VM_GENERATION_ADDRESS = 0xFEFF_B000
IDENTITY_MAP_ADDRESS = 0xFEFF_C000
TSS_ADDRESS = 0xFEFF_D000
FIRMWARE_END = 4 * GIB
LOW_FIRMWARE_END = MIB
LOW_FIRMWARE_MAX = 256 * KIB
"""SeaBIOS of 256 KiB runs from here and copies nothing by itself on an unknown host bridge."""
PCI_MMIO64_SIZE = 64 * GIB

# Low memory of direct boots; OpenBSD kernels have a layout of their own
BOOT_GDT = 0x500
BOOT_PAGE_TABLES = 0x1000
"""A PML4, a PDPT and four page directories, which map 4 GiB."""
BOOT_INFO = 0x7000
"""boot_params of Linux, start info of PVH, or Multiboot information: one page."""
BOOT_SETUP_DATA = 0x8000
"""Further blocks that the page above points to: one page."""
BOOT_COMMAND_LINE = 0x9000
COMMAND_LINE_MAX = 64 * KIB
"""Bytes, without the NUL."""
BOOT_MODULES = 0x1_A000
"""The list of modules and their command lines."""
EBDA_START = 0x9_FC00
BIOS_AREA_START = 0xE_0000
SMBIOS_START = 0xF_0000
"""The address from which kernels look for the anchor."""
HIGH_MEMORY_START = MIB

# I/O ports
PORT_DEBUG_EXIT = 0xF4
PORT_I8042_DATA = 0x60
PORT_I8042_COMMAND = 0x64
PORT_RTC = 0x70
PORT_SYSTEM_CONTROL_A = 0x92
PORT_COM1 = 0x3F8
PORT_DEBUGCON = 0x402
PORT_PVPANIC = 0x505
PORT_FW_CFG = 0x510
PORT_FW_CFG_SIZE = 12
PORT_PM1A_EVENT = 0x600
PORT_PM1A_CONTROL = 0x604
PORT_PM_TIMER = 0x608
PORT_PCI_CONFIG = 0xCF8
PORT_RESET = 0xCF9
"""Reset control register: bit 2 rising resets; inside the range of PCI configuration."""
PCI_IO_START = 0x1000
PCI_IO_SIZE = 0xF000

# Interrupts: GSI numbers; below 16 also PIC inputs
GSI_COM1 = 4
GSI_RTC = 8
GSI_SCI = 9
GSI_PCI_INTX = (16, 17, 18, 19)
GSI_VM_GENERATION = 20
"""An edge, at the IOAPIC alone: the VM's generation identifier or its clock has changed."""
GSI_MSI = 24
"""From here on GSIs are messages; the IOAPIC's pins end before."""
PIC_PCI_INTX = (5, 10, 11, 12)
ACPI_S5_SLEEP_TYPE = 5
"""The value that \\_S5 tells the guest to write to SLP_TYPa."""


def ram_ranges(size: int, hole_start: int = PCI_HOLE_START) -> tuple[tuple[int, int], ...]:
    """Return the (guest-physical address, bytes) pairs that `size` bytes of RAM occupy.

    `size` is a multiple of 4096. RAM is contiguous from 0 to the PCI hole; what is left lies
    from 4 GiB up.
    """
    low = min(size, hole_start)
    if size == low:
        return ((0, low),)
    return ((0, low), (PCI_HOLE_END, size - low))


PINS = 4
"""Interrupt pins of a PCI slot, and lines that they lead to."""


def line_index(slot: int, pin: int) -> int:
    """Return which of the four lines, 0 to 3, pin 1 to 4 of a slot leads to.

    ACPI's _PRT has to say the same.

    Source: PCI LB 3.0 §2.2.6, the usual rotation by slot
    """
    return (slot + pin - 1) % PINS
