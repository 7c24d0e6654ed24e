"""ACPI tables that describe the machine.

RSDP, FACS, DSDT, FADT, MADT, MCFG, RSDT and XSDT, one behind the other. A direct boot finds them in
guest memory; firmware installs them itself, from fw_cfg, by `loader_files`.

Source: ACPI 6.5 chapter 5; PCI Firmware 3.3 §4.1.2 (MCFG).
"""

import struct
from collections.abc import Mapping
from functools import lru_cache
from typing import NamedTuple

from vmm_kvm.arch.x86.dsdt import dsdt_body
from vmm_kvm.arch.x86.layout import (
    BIOS_AREA_START,
    ECAM_BUSES,
    ECAM_START,
    GSI_SCI,
    IOAPIC_ADDRESS,
    LOCAL_APIC_ADDRESS,
    PCI_HOLE_END,
    PORT_PM1A_CONTROL,
    PORT_PM1A_EVENT,
    PORT_PM_TIMER,
    PORT_RESET,
    TPM_ADDRESS,
    TPM_CONTROL_AREA,
)
from vmm_kvm.bits import GIB, align_up

_OEM_ID = b"VMMKVM"
_OEM_TABLE_ID = b"VMMKVM  "
_CREATOR_ID = b"VMMK"
_HEADER = struct.Struct("<4sIBB6s8sI4sI")
_CHECKSUM_AT = 9

_RSDP = struct.Struct("<8sB6sBIIQB3x")
_RSDP_V1_SIZE = 20
_RSDP_CHECKSUM_AT = 8
_RSDP_EXTENDED_CHECKSUM_AT = 32

_TABLES_AT = 64
_FACS_SIZE = 64
_FACS_ALIGNMENT = 64
_TABLE_ALIGNMENT = 16

# FADT
_FADT_MINOR_VERSION = 5
_FADT_WBINVD = 1 << 0
_FADT_PROC_C1 = 1 << 2
_FADT_SLP_BUTTON = 1 << 5  # there is no sleep button in fixed hardware; the power button is
_FADT_FIX_RTC = 1 << 6  # the RTC's wake status is not in fixed hardware
_FADT_TMR_VAL_EXT = 1 << 8
_FADT_RESET_REG_SUP = 1 << 10
_BOOT_ARCH_LEGACY_DEVICES = 1 << 0
_BOOT_ARCH_NO_VGA = 1 << 2
_RESET_VALUE = 6
_RTC_CENTURY = 0x32
_C2_UNSUPPORTED = 101
_C3_UNSUPPORTED = 1001
_GAS_IO = 1

# MADT
_MADT_PCAT_COMPAT = 1 << 0
_MADT_ENABLED = 1 << 0
_IOAPIC_ID = 0
_ALL_PROCESSORS = 0xFF
_ACTIVE_HIGH = 1
_LEVEL = 3 << 2
_PIT_GSI = 2

# TPM2: class of the platform, and how a command is started
_TPM_CLIENT = 0
_TPM_BY_CRB = 7

# Files for firmware, and the commands of the script among them
_RSDP_FILE = "etc/acpi/rsdp"
_TABLES_FILE = "etc/acpi/tables"
_SCRIPT_FILE = "etc/table-loader"

_REMEMBERED = 8
_COMMAND_SIZE = 128
_ALLOCATE = struct.Struct("<I56sIB")
_ADD_POINTER = struct.Struct("<I56s56sIB")
_ADD_CHECKSUM = struct.Struct("<I56sIII")
_COMMAND_ALLOCATE = 1
_COMMAND_ADD_POINTER = 2
_COMMAND_ADD_CHECKSUM = 3
_ZONE_HIGH = 1
_ZONE_FSEG = 2
_RSDP_ALIGNMENT = 16
_TABLES_ALIGNMENT = 64


class AcpiConfig(NamedTuple):
    """The differences between machines."""

    cpus: int = 1
    """1 to 64; local APIC IDs count from 0."""
    memory_end: int = 0
    """The first guest-physical address behind RAM: 64-bit BARs go above it."""
    is_q35: bool = False
    """Whether UEFI firmware places devices: BARs from 2 GiB up, and ECAM where it chooses."""
    has_tpm: bool = False

    @property
    def mmio64_start(self) -> int:
        """The start of the window for 64-bit BARs: a multiple of 1 GiB above 4 GiB."""
        return align_up(max(self.memory_end, PCI_HOLE_END), GIB)


class AcpiTables(NamedTuple):
    """All tables as they are in guest memory."""

    base: int
    """Guest-physical address of `blob`, a multiple of 64."""
    blob: bytes
    """The RSDP, then the tables it leads to."""
    pointers: tuple[tuple[int, int], ...]
    """(offset in `blob`, bytes) of each address in it."""
    checksums: tuple[tuple[int, int, int], ...]
    """(offset in `blob` of the checksum, offset and bytes of the range that it covers)."""

    @property
    def rsdp(self) -> int:
        """Guest-physical address of the RSDP."""
        return self.base


def build_tables(config: AcpiConfig, base: int = BIOS_AREA_START) -> AcpiTables:
    """Build the tables for guest-physical address `base`, a multiple of 64 below 4 GiB."""
    return _build(
        config.cpus, config.mmio64_start, base, is_q35=config.is_q35, has_tpm=config.has_tpm
    )


# VM processes are forked from one that has made machines, and inherit the parts common to all.
@lru_cache(_REMEMBERED)
def _build(cpus: int, mmio64_start: int, base: int, *, is_q35: bool, has_tpm: bool) -> AcpiTables:
    layout = _Layout(base)
    layout.skip(_TABLES_AT)  # the RSDP is written last
    facs = layout.add(_facs(), alignment=_FACS_ALIGNMENT)
    body = dsdt_body(cpus, mmio64_start, is_q35=is_q35, has_tpm=has_tpm)
    dsdt = layout.add_table(b"DSDT", 2, body)
    fadt = layout.add_table(b"FACP", 6, _fadt(facs, dsdt), pointers=((36, 4), (40, 4), (140, 8)))
    madt = layout.add_table(b"APIC", 5, _madt(cpus))
    tables = [fadt, madt]
    if not is_q35:
        tables.append(layout.add_table(b"MCFG", 1, _mcfg()))
    if has_tpm:
        tables.append(layout.add_table(b"TPM2", 4, _tpm2()))
    rsdt = layout.add_table(
        b"RSDT",
        1,
        struct.pack(f"<{len(tables)}I", *tables),
        pointers=tuple((_HEADER.size + 4 * i, 4) for i in range(len(tables))),
    )
    xsdt = layout.add_table(
        b"XSDT",
        1,
        struct.pack(f"<{len(tables)}Q", *tables),
        pointers=tuple((_HEADER.size + 8 * i, 8) for i in range(len(tables))),
    )
    layout.put_rsdp(rsdt, xsdt)
    return layout.finish()


class _Layout:
    """Consecutive tables, and a record of the fields that depend on their addresses."""

    def __init__(self, base: int) -> None:
        self._base = base
        self._blob = bytearray()
        self._pointers: list[tuple[int, int]] = []
        self._checksums: list[tuple[int, int, int]] = []

    def skip(self, size: int) -> None:
        self._blob += bytes(size)

    def add(self, data: bytes, alignment: int = _TABLE_ALIGNMENT) -> int:
        """Append `data`; return its address."""
        self._blob += bytes(-len(self._blob) % alignment)
        offset = len(self._blob)
        self._blob += data
        return self._base + offset

    def add_table(
        self,
        signature: bytes,
        revision: int,
        body: bytes,
        pointers: tuple[tuple[int, int], ...] = (),
    ) -> int:
        """Append a table with its header; return its address."""
        header = _HEADER.pack(
            signature,
            _HEADER.size + len(body),
            revision,
            0,
            _OEM_ID,
            _OEM_TABLE_ID,
            1,
            _CREATOR_ID,
            1,
        )
        address = self.add(header + body)
        at = address - self._base
        self._pointers += [(at + offset, size) for offset, size in pointers]
        self._sum(at + _CHECKSUM_AT, at, len(header) + len(body))
        return address

    def put_rsdp(self, rsdt: int, xsdt: int) -> None:
        _RSDP.pack_into(self._blob, 0, b"RSD PTR ", 0, _OEM_ID, 2, rsdt, _RSDP.size, xsdt, 0)
        self._pointers += [(16, 4), (24, 8)]
        self._sum(_RSDP_CHECKSUM_AT, 0, _RSDP_V1_SIZE)
        self._sum(_RSDP_EXTENDED_CHECKSUM_AT, 0, _RSDP.size)

    def _sum(self, at: int, start: int, size: int) -> None:
        self._checksums.append((at, start, size))
        self._blob[at] = -sum(self._blob[start : start + size]) & 0xFF

    def finish(self) -> AcpiTables:
        return AcpiTables(
            self._base, bytes(self._blob), tuple(self._pointers), tuple(self._checksums)
        )


def _facs() -> bytes:
    return struct.pack("<4sI", b"FACS", _FACS_SIZE).ljust(32, b"\0") + b"\x02".ljust(32, b"\0")


def _gas_io(port: int, size: int) -> bytes:
    """Return a generic address structure for `size` bytes of I/O ports; none if `port` is 0."""
    width = {0: 0, 1: 1, 2: 2, 4: 3}[size]
    return struct.pack("<BBBBQ", _GAS_IO if size else 0, 8 * size, 0, width, port)


def _fadt(facs: int, dsdt: int) -> bytes:
    """Return the FADT behind its header. Source: ACPI 6.5 table 5.9."""
    flags = (
        _FADT_WBINVD
        | _FADT_PROC_C1
        | _FADT_SLP_BUTTON
        | _FADT_FIX_RTC
        | _FADT_TMR_VAL_EXT
        | _FADT_RESET_REG_SUP
    )
    body = struct.pack(
        "<IIBBHIBBBB",
        facs,
        dsdt,
        0,  # reserved
        0,  # preferred power management profile: unspecified
        GSI_SCI,
        0,  # SMI command port: none, ACPI is always on
        0,
        0,
        0,
        0,
    )
    # PM1a event, PM1b event, PM1a control, PM1b control, PM2, PM timer, GPE0, GPE1
    body += struct.pack("<8I", PORT_PM1A_EVENT, 0, PORT_PM1A_CONTROL, 0, 0, PORT_PM_TIMER, 0, 0)
    # Their sizes, then GPE1's base and the C-state command
    body += struct.pack("<8B", 4, 2, 0, 4, 0, 0, 0, 0)
    body += struct.pack(
        "<HHHHBBBBBHBI",
        _C2_UNSUPPORTED,
        _C3_UNSUPPORTED,
        0,  # flush size and stride: WBINVD works
        0,
        0,  # duty cycle
        0,
        0,  # alarm day and month
        0,
        _RTC_CENTURY,
        _BOOT_ARCH_LEGACY_DEVICES | _BOOT_ARCH_NO_VGA,
        0,
        flags,
    )
    body += _gas_io(PORT_RESET, 1) + struct.pack("<BHB", _RESET_VALUE, 0, _FADT_MINOR_VERSION)
    body += struct.pack("<QQ", 0, dsdt)  # the FACS has its 32-bit address
    for port, size in (
        (PORT_PM1A_EVENT, 4),
        (0, 0),
        (PORT_PM1A_CONTROL, 2),
        (0, 0),
        (0, 0),
        (PORT_PM_TIMER, 4),
        (0, 0),
        (0, 0),
        (0, 0),  # sleep control and status: only for reduced hardware
        (0, 0),
    ):
        body += _gas_io(port, size)
    return body + _OEM_TABLE_ID  # hypervisor vendor


def _madt(cpus: int) -> bytes:
    """Return the MADT behind its header. Source: ACPI 6.5 §5.2.12."""
    body = struct.pack("<II", LOCAL_APIC_ADDRESS, _MADT_PCAT_COMPAT)
    for index in range(cpus):
        body += struct.pack("<BBBBI", 0, 8, index, index, _MADT_ENABLED)
    body += struct.pack("<BBBBII", 1, 12, _IOAPIC_ID, 0, IOAPIC_ADDRESS, 0)
    body += struct.pack("<BBBBIH", 2, 10, 0, 0, _PIT_GSI, 0)
    body += struct.pack("<BBBBIH", 2, 10, 0, GSI_SCI, GSI_SCI, _ACTIVE_HIGH | _LEVEL)
    return body + struct.pack("<BBBHB", 4, 6, _ALL_PROCESSORS, 0, 1)


def _tpm2() -> bytes:
    """Return the TPM2 table behind its header. Source: TCG ACPI Specification 1.4 §8."""
    return struct.pack("<HHQI", _TPM_CLIENT, 0, TPM_ADDRESS + TPM_CONTROL_AREA, _TPM_BY_CRB)


def _mcfg() -> bytes:
    return struct.pack("<8xQHBB4x", ECAM_START, 0, 0, ECAM_BUSES - 1)


@lru_cache(_REMEMBERED)
def loader_files(tables: AcpiTables) -> Mapping[str, bytes]:
    """Return the fw_cfg files, by name, from which firmware installs `tables`.

    Firmware allocates memory for each file, adds its address to the pointers that lead to it, which
    count from the start of the file, and corrects the checksums.

    Source: QEMU hw/acpi/bios-linker-loader.c; SeaBIOS src/fw/romfile_loader.c.
    """
    split = _TABLES_AT
    blob = bytearray(tables.blob)
    script = [
        _ALLOCATE.pack(_COMMAND_ALLOCATE, _RSDP_FILE.encode(), _RSDP_ALIGNMENT, _ZONE_FSEG),
        _ALLOCATE.pack(_COMMAND_ALLOCATE, _TABLES_FILE.encode(), _TABLES_ALIGNMENT, _ZONE_HIGH),
    ]

    def file_of(offset: int) -> tuple[bytes, int]:
        if offset < split:
            return _RSDP_FILE.encode(), offset
        return _TABLES_FILE.encode(), offset - split

    for offset, size in tables.pointers:
        address = int.from_bytes(blob[offset : offset + size], "little")
        relative = address - tables.base - split if address else 0
        blob[offset : offset + size] = relative.to_bytes(size, "little")
        name, at = file_of(offset)
        script.append(
            _ADD_POINTER.pack(_COMMAND_ADD_POINTER, name, _TABLES_FILE.encode(), at, size)
        )
    for offset, start, size in tables.checksums:
        # Firmware subtracts the sum from the checksum byte, which must be zero before.
        blob[offset] = 0
        name, at = file_of(offset)
        script.append(_ADD_CHECKSUM.pack(_COMMAND_ADD_CHECKSUM, name, at, file_of(start)[1], size))
    return {
        _RSDP_FILE: bytes(blob[: _RSDP.size]),
        _TABLES_FILE: bytes(blob[split:]),
        _SCRIPT_FILE: b"".join(command.ljust(_COMMAND_SIZE, b"\0") for command in script),
    }
