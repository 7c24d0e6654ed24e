"""Numbers of PCI: vendors, devices, classes, capabilities, and the type 0 configuration header."""

VENDOR_INTEL = 0x8086
VENDOR_OPENBSD = 0x0B5D
"""OpenBSD's vmm(4)."""
VENDOR_QUMRANET = 0x1AF4
"""virtio's."""
DEVICE_OPENBSD_PCHB = 0x0666
DEVICE_OPENBSD_VMMCI = 0x0777

CLASS_HOST_BRIDGE = 0x06_00_00
CLASS_ISA_BRIDGE = 0x06_01_00
CLASS_MASS_STORAGE_SCSI = 0x01_00_00
CLASS_MASS_STORAGE_OTHER = 0x01_80_00
CLASS_NETWORK_ETHERNET = 0x02_00_00
CLASS_COMMUNICATIONS_OTHER = 0x07_80_00
CLASS_SYSTEM_OTHER = 0x08_80_00
CLASS_OTHER = 0x00_FF_00

CONFIG_SIZE = 256
"""Bytes of configuration space of a conventional PCI function."""
SLOTS = 32
"""Devices on a bus."""
BARS = 6


class Register:
    """Offsets in a type 0 header (PCI LB 3.0 §6.1, figure 6-1)."""

    VENDOR_ID = 0x00
    DEVICE_ID = 0x02
    COMMAND = 0x04
    STATUS = 0x06
    REVISION_ID = 0x08
    CLASS_CODE = 0x09
    CACHE_LINE_SIZE = 0x0C
    LATENCY_TIMER = 0x0D
    HEADER_TYPE = 0x0E
    BIST = 0x0F
    BAR0 = 0x10
    SUBSYSTEM_VENDOR_ID = 0x2C
    SUBSYSTEM_ID = 0x2E
    EXPANSION_ROM = 0x30
    CAPABILITIES = 0x34
    INTERRUPT_LINE = 0x3C
    INTERRUPT_PIN = 0x3D
    END = 0x40


class Command:
    """Command register (PCI LB 3.0 §6.2.2)."""

    IO_SPACE = 1 << 0
    MEMORY_SPACE = 1 << 1
    BUS_MASTER = 1 << 2
    PARITY_ERROR_RESPONSE = 1 << 6
    SERR_ENABLE = 1 << 8
    INTERRUPT_DISABLE = 1 << 10


class Status:
    """Status register (PCI LB 3.0 §6.2.3); the error bits are cleared by writing ones."""

    INTERRUPT = 1 << 3
    CAPABILITIES = 1 << 4
    MASTER_PARITY_ERROR = 1 << 8
    SIGNALED_TARGET_ABORT = 1 << 11
    RECEIVED_TARGET_ABORT = 1 << 12
    RECEIVED_MASTER_ABORT = 1 << 13
    SIGNALED_SYSTEM_ERROR = 1 << 14
    PARITY_ERROR = 1 << 15


class CapabilityId:
    """Capabilities (PCI Code and ID Assignment §2)."""

    VENDOR_SPECIFIC = 0x09
    MSI_X = 0x11
