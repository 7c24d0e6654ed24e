"""ACPI tables: sums, pointers, contents; and the result of firmware's loader script."""

from __future__ import annotations

import shutil
import struct
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from vmm_kvm.arch.x86.acpi import AcpiConfig, AcpiTables, build_tables, loader_files
from vmm_kvm.bits import GIB

CONFIGS = (
    AcpiConfig(),
    AcpiConfig(cpus=4, memory_end=6 * GIB),
    AcpiConfig(cpus=64),
    AcpiConfig(is_q35=True),
)


def _at(tables: AcpiTables, address: int, size: int) -> bytes:
    offset = address - tables.base
    assert 0 <= offset <= len(tables.blob) - size
    return tables.blob[offset : offset + size]


def _u(tables: AcpiTables, address: int, size: int) -> int:
    return int.from_bytes(_at(tables, address, size), "little")


def _table(tables: AcpiTables, address: int) -> bytes:
    return _at(tables, address, _u(tables, address + 4, 4))


def _walk(tables: AcpiTables) -> dict[str, bytes]:
    """Return all tables by signature, found by an operating system's way."""
    found = {}
    xsdt = _table(tables, _u(tables, tables.rsdp + 24, 8))
    rsdt = _table(tables, _u(tables, tables.rsdp + 16, 4))
    addresses = [address for (address,) in struct.iter_unpack("<Q", xsdt[36:])]
    assert [address for (address,) in struct.iter_unpack("<I", rsdt[36:])] == addresses
    for address in addresses:
        table = _table(tables, address)
        found[table[:4].decode()] = table
    fadt = found["FACP"]
    dsdt, facs = struct.unpack_from("<I", fadt, 40)[0], struct.unpack_from("<I", fadt, 36)[0]
    assert struct.unpack_from("<Q", fadt, 140)[0] == dsdt
    return found | {
        "XSDT": xsdt,
        "RSDT": rsdt,
        "DSDT": _table(tables, dsdt),
        "FACS": _table(tables, facs),
    }


@pytest.mark.parametrize("config", CONFIGS)
def test_check_sums(config: AcpiConfig) -> None:
    """Every table, and both parts of the RSDP, sum up to zero."""
    tables = build_tables(config)
    assert (sum(tables.blob[:20]) & 0xFF, sum(tables.blob[:36]) & 0xFF) == (0, 0)
    sums = {name: sum(table) & 0xFF for name, table in _walk(tables).items() if name != "FACS"}
    assert dict.fromkeys(("FACP", "APIC", "XSDT", "RSDT", "DSDT"), 0) == {
        name: total for name, total in sums.items() if name != "MCFG"
    }
    assert sums.get("MCFG", 0) == 0


@pytest.mark.parametrize("config", CONFIGS)
def test_tables_are_disjoint_and_fit(config: AcpiConfig) -> None:
    """All tables lie in the BIOS area, the FACS on a multiple of 64."""
    tables = build_tables(config)
    assert (tables.base, tables.rsdp) == (0xE_0000, 0xE_0000)
    assert tables.base + len(tables.blob) <= 0x10_0000
    assert struct.unpack_from("<I", _walk(tables)["FACP"], 36)[0] % 64 == 0


def test_fixed_hardware() -> None:
    """The FADT names the machine's registers, twice, and a reset register."""
    fadt = _walk(build_tables(AcpiConfig()))["FACP"]
    event, control, timer = (struct.unpack_from("<I", fadt, at)[0] for at in (56, 64, 76))
    assert (
        len(fadt),
        struct.unpack_from("<H", fadt, 46)[0],
        struct.unpack_from("<I", fadt, 48)[0],
        event,
        control,
        timer,
    ) == (276, 9, 0, 0x600, 0x604, 0x608)
    assert [
        (fadt[at], fadt[at + 1], struct.unpack_from("<Q", fadt, at + 4)[0])
        for at in (148, 172, 208)
    ] == [(1, 32, 0x600), (1, 16, 0x604), (1, 32, 0x608)]
    assert (
        fadt[116],
        fadt[117],
        struct.unpack_from("<Q", fadt, 120)[0],
        fadt[128],
    ) == (1, 8, 0xCF9, 6)


def test_what_the_machine_has_not() -> None:
    """The FADT reports no 8042, no VGA, no sleep button; the power button is in fixed hardware."""
    fadt = _walk(build_tables(AcpiConfig()))["FACP"]
    boot_arch = struct.unpack_from("<H", fadt, 109)[0]
    flags = struct.unpack_from("<I", fadt, 112)[0]
    assert (boot_arch & 2, boot_arch & 4) == (0, 4)
    assert (
        flags & 1 << 4,
        flags & 1 << 5,
        flags & 1 << 8,
        flags & 1 << 10,
    ) == (0, 1 << 5, 1 << 8, 1 << 10)


@pytest.mark.parametrize("cpus", [1, 2, 64])
def test_interrupt_controllers(cpus: int) -> None:
    """One local APIC per vCPU, one IOAPIC, the timer's and the SCI's override, and NMI."""
    madt = _walk(build_tables(AcpiConfig(cpus=cpus)))["APIC"]
    entries = []
    at = 44
    while at < len(madt):
        entries.append((madt[at], madt[at + 2 : at + madt[at + 1]]))
        at += madt[at + 1]
    assert [struct.pack("<BBI", i, i, 1) for i in range(cpus)] == [e for t, e in entries if t == 0]
    assert [struct.pack("<BBII", 0, 0, 0xFEC0_0000, 0)] == [e for t, e in entries if t == 1]
    assert [struct.pack("<BBIH", 0, 0, 2, 0), struct.pack("<BBIH", 0, 9, 9, 0xD)] == [
        e for t, e in entries if t == 2
    ]
    assert [struct.pack("<BHB", 0xFF, 0, 1)] == [e for t, e in entries if t == 4]


def test_ecam() -> None:
    """MCFG names one bus of ECAM."""
    mcfg = _walk(build_tables(AcpiConfig()))["MCFG"]
    assert struct.pack("<QHBBI", 0xE000_0000, 0, 0, 0, 0) == mcfg[44:]


def test_ecam_that_firmware_places() -> None:
    """Without a place for ECAM there is no MCFG."""
    assert "MCFG" not in _walk(build_tables(AcpiConfig(is_q35=True)))


@pytest.mark.parametrize(
    ("memory_end", "start"),
    [(0, 4 * GIB), (256 << 20, 4 * GIB), (6 * GIB, 6 * GIB), (6 * GIB + 4096, 7 * GIB)],
)
def test_window_for_64_bit_bars(memory_end: int, start: int) -> None:
    """The window for 64-bit BARs begins above 4 GiB and all RAM."""
    assert start == AcpiConfig(memory_end=memory_end).mmio64_start


def _tables_in_files(tables: AcpiTables, directory: Path) -> Iterator[Path]:
    for name, table in _walk(tables).items():
        path = directory / f"{name.lower()}.dat"
        path.write_bytes(table)
        yield path


@pytest.mark.skipif(shutil.which("iasl") is None, reason="iasl is not installed")
@pytest.mark.parametrize("config", CONFIGS)
def test_iasl_has_nothing_to_say(config: AcpiConfig, tmp_path: Path) -> None:
    """Each table disassembles and compiles by iasl without errors, warnings or remarks."""
    for path in list(_tables_in_files(build_tables(config), tmp_path)):
        shown = subprocess.run(
            ["iasl", "-d", path], check=True, capture_output=True, text=True, cwd=tmp_path
        )
        assert not [
            line
            for line in (shown.stdout + shown.stderr).splitlines()
            if "rror" in line or "arning" in line
        ], path.name
        compiled = subprocess.run(
            ["iasl", "-tc", path.with_suffix(".dsl")],
            check=True,
            capture_output=True,
            text=True,
            cwd=tmp_path,
        )
        assert "0 Errors, 0 Warnings, 0 Remarks" in compiled.stdout, path.name


@pytest.mark.skipif(shutil.which("iasl") is None, reason="iasl is not installed")
def test_namespace(tmp_path: Path) -> None:
    """The DSDT names each device, and the routing of the last slot."""
    tables = build_tables(AcpiConfig(cpus=3, memory_end=5 * GIB))
    paths = {path.name: path for path in _tables_in_files(tables, tmp_path)}
    subprocess.run(["iasl", "-d", paths["dsdt.dat"]], check=True, capture_output=True)
    source = " ".join((tmp_path / "dsdt.dsl").read_text().split())
    for text in (
        "Name (\\_S5, Package (0x04) // _S5_: S5 System State { 0x05, Zero, Zero, Zero })",
        "Device (C002)",
        'EisaId ("PNP0A08")',
        'EisaId ("PNP0C02")',
        'EisaId ("PNP0501")',
        'EisaId ("PNP0B00")',
        '"QEMU0001"',
        '"QEMU0002"',
        "Package (0x04) { 0x001FFFFF, 0x03, Zero, 0x12 }",
        "Package (0x04) { 0x001FFFFF, 0x03, Zero, 0x0B }",
    ):
        assert text in source


_END_TAG = bytes.fromhex("7900")


@pytest.mark.skipif(shutil.which("iasl") is None, reason="iasl is not installed")
@pytest.mark.parametrize(
    "resource",
    [
        "Memory32Fixed (ReadWrite, 0xE0000000, 0x00100000)",
        (
            "DWordMemory (ResourceProducer, PosDecode, MinFixed, MaxFixed, NonCacheable, ReadWrite,"
            " 0, 0xC0000000, 0xDFFFFFFF, 0, 0x20000000)"
        ),
        (
            "QWordMemory (ResourceProducer, PosDecode, MinFixed, MaxFixed, NonCacheable, ReadWrite,"
            " 0, 0x0000000140000000, 0x000000113FFFFFFF, 0, 0x0000001000000000)"
        ),
        (
            "WordIO (ResourceProducer, MinFixed, MaxFixed, PosDecode, EntireRange,"
            " 0, 0x1000, 0xFFFF, 0, 0xF000)"
        ),
        "IRQNoFlags () {4}",
        "IRQNoFlags () {8}",
        "Interrupt (ResourceConsumer, Edge, ActiveHigh, Exclusive) {20}",
        "IO (Decode16, 0x0510, 0x0510, 0x01, 0x0C)",
    ],
    ids=lambda resource: resource.partition(",")[0],
)
def test_resources(resource: str, tmp_path: Path) -> None:
    """The DSDT has each resource in iasl's encoding.

    The test does not disassemble it: the iasl of 2026 shows resources as plain buffers, even its
    own.
    """
    template = f"Name (R000, ResourceTemplate () {{ {resource} }})"
    (tmp_path / "one.asl").write_text(
        f'DefinitionBlock ("", "DSDT", 2, "A", "B", 1) {{ {template} }}'
    )
    subprocess.run(["iasl", tmp_path / "one.asl"], check=True, capture_output=True)
    compiled = (tmp_path / "one.aml").read_bytes()
    assert compiled.endswith(_END_TAG)
    # After the name: an opcode, the buffer's length, and its size in bytes as an integer.
    descriptor = compiled[compiled.index(b"R000") + 8 : -len(_END_TAG)]
    assert descriptor in _walk(build_tables(AcpiConfig(cpus=3, memory_end=5 * GIB)))["DSDT"]


class Firmware:
    """Firmware that obeys a loader script, as SeaBIOS does."""

    def __init__(self, files: Mapping[str, bytes], addresses: dict[str, int]) -> None:
        self.files = {name: bytearray(data) for name, data in files.items()}
        self.addresses = addresses
        script = files["etc/table-loader"]
        for at in range(0, len(script), 128):
            self._obey(script[at : at + 128])

    def _obey(self, command: bytes) -> None:
        name = command[4:60].rstrip(b"\0").decode()
        match int.from_bytes(command[:4], "little"):
            case 1:
                align, zone = struct.unpack_from("<IB", command, 60)
                assert (0, zone) == (self.addresses[name] % align, 2 if "rsdp" in name else 1)
            case 2:
                source = command[60:116].rstrip(b"\0").decode()
                offset, size = struct.unpack_from("<IB", command, 116)
                data = self.files[name]
                value = int.from_bytes(data[offset : offset + size], "little")
                assert value < len(self.files[source])
                value += self.addresses[source]
                data[offset : offset + size] = value.to_bytes(size, "little")
            case 3:
                offset, start, size = struct.unpack_from("<III", command, 60)
                data = self.files[name]
                data[offset] = (data[offset] - sum(data[start : start + size])) & 0xFF
            case other:
                pytest.fail(f"command {other}")


@pytest.mark.parametrize("config", CONFIGS)
def test_firmware_installs_the_same_tables(config: AcpiConfig) -> None:
    """The script makes the same tables as a direct boot, at the same addresses."""
    tables = build_tables(config)
    files = loader_files(tables)
    addresses = {"etc/acpi/rsdp": tables.base, "etc/acpi/tables": tables.base + 64}
    firmware = Firmware(files, addresses)
    assert tables.blob[:36] == firmware.files["etc/acpi/rsdp"]
    assert tables.blob[64:] == firmware.files["etc/acpi/tables"]


def test_firmware_installs_tables_anywhere() -> None:
    """At other addresses pointers and sums are right too."""
    files = loader_files(build_tables(AcpiConfig()))
    rsdp, at = 0xF_5A40, 0x0BFF_E000
    firmware = Firmware(files, {"etc/acpi/rsdp": rsdp, "etc/acpi/tables": at})
    moved = build_tables(AcpiConfig(), at - 64)
    assert moved.blob[64:] == firmware.files["etc/acpi/tables"]
    assert moved.blob[:36] == firmware.files["etc/acpi/rsdp"]


def test_loader_files_fit_the_format() -> None:
    """Commands have 128 bytes, and names end with a NUL."""
    files = loader_files(build_tables(AcpiConfig()))
    assert {"etc/acpi/rsdp", "etc/acpi/tables", "etc/table-loader"} == set(files)
    assert (len(files["etc/table-loader"]) % 128, len(files["etc/acpi/rsdp"])) == (0, 36)
