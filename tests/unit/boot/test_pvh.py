"""PVH kernels: start info, modules, and the state of the processor."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.unit.boot.images import CODE, KERNEL_ADDRESS, pvh_kernel
from vmm_kvm.arch.x86.acpi import AcpiConfig, build_tables
from vmm_kvm.arch.x86.e820 import e820_map
from vmm_kvm.arch.x86.entry import CR0_ET, CR0_PE
from vmm_kvm.arch.x86.image import BootConfig, BootImage, load
from vmm_kvm.arch.x86.layout import ram_ranges
from vmm_kvm.arch.x86.pvh import PvhImage
from vmm_kvm.bits import MIB
from vmm_kvm.errors import BootError
from vmm_kvm.memory import GuestMemory

Open = Callable[[bytes], BootImage]


def _start_info(memory: GuestMemory, address: int) -> tuple[int, ...]:
    return struct.unpack("<IIIIQQQQII", memory.read(address, 56))


def test_entry(open_bytes: Open, memory: GuestMemory) -> None:
    """The kernel is entered at its note's address: protected mode, no paging, EBX as promised."""
    image = open_bytes(pvh_kernel())
    entry = load(image, memory, BootConfig())
    assert isinstance(image, PvhImage)
    assert (
        entry.rip,
        entry.cr0,
        entry.cr4,
        entry.efer,
        entry.rflags,
    ) == (KERNEL_ADDRESS + 8, CR0_PE | CR0_ET, 0, 0, 2)
    assert list(entry.registers) == ["rbx"]
    assert memory.read(KERNEL_ADDRESS, len(CODE)) == CODE


def test_start_info(open_bytes: Open, memory: GuestMemory) -> None:
    """Start info leads to the command line, the memory map and the RSDP."""
    tables = build_tables(AcpiConfig())
    entry = load(open_bytes(pvh_kernel()), memory, BootConfig(command_line="verbose", acpi=tables))
    info = _start_info(memory, entry.registers["rbx"])
    magic, version, flags, modules, modules_at, line, rsdp, map_at, count, reserved = info
    assert (magic, version, flags, modules, modules_at, reserved) == (0x336E_C578, 1, 0, 0, 0, 0)
    assert (b"verbose\0", tables.base) == (memory.read(line, 8), rsdp)
    map_ = e820_map(memory.regions)
    assert [(e.address, e.size, e.type, 0) for e in map_] == list(
        struct.iter_unpack("<QQII", memory.read(map_at, 24 * count))
    )


def test_modules(open_bytes: Open, memory: GuestMemory, tmp_path: Path) -> None:
    """The initrd is the first module, others follow with their command lines."""
    (tmp_path / "initrd").write_bytes(b"ramdisk")
    (tmp_path / "module").write_bytes(b"more")
    config = BootConfig(
        initrd=(f"{tmp_path}/initrd",), modules=((f"{tmp_path}/module", "with arguments"),)
    )
    entry = load(open_bytes(pvh_kernel()), memory, config)
    info = _start_info(memory, entry.registers["rbx"])
    assert info[3] == 2
    first, second = struct.iter_unpack("<QQQQ", memory.read(info[4], 64))
    assert memory.read(first[0], first[1]) == b"ramdisk"
    assert memory.read(first[2], 1) == b"\0"
    assert memory.read(second[0], second[1]) == b"more"
    assert memory.read(second[2], 15) == b"with arguments\0"
    assert KERNEL_ADDRESS + len(CODE) <= first[0]
    assert first[0] % 4096 == second[0] % 4096 == 0


def test_module_too_large(open_bytes: Open, tmp_path: Path) -> None:
    """A module that does not fit behind the kernel is refused by name."""
    path = tmp_path / "initrd"
    path.write_bytes(bytes(MIB))
    with GuestMemory(ram_ranges(17 * MIB)) as memory, pytest.raises(BootError) as caught:
        load(open_bytes(pvh_kernel()), memory, BootConfig(initrd=(str(path),)))
    assert f"{path}: module: 0x100000 bytes at 0x1003000 do not fit in 17 MiB of memory" == str(
        caught.value
    )


def test_too_many_modules(open_bytes: Open, memory: GuestMemory, tmp_path: Path) -> None:
    """A list with too many modules is refused."""
    path = tmp_path / "module"
    path.write_bytes(b"m")
    with pytest.raises(BootError, match="image: 65 modules, 64 at most"):
        load(open_bytes(pvh_kernel()), memory, BootConfig(initrd=(str(path),) * 65))


def test_long_module_command_lines(open_bytes: Open, memory: GuestMemory, tmp_path: Path) -> None:
    """Command lines that do not fit in low memory are refused."""
    path = tmp_path / "module"
    path.write_bytes(b"m")
    with pytest.raises(BootError, match="module: 0x1 bytes at"):
        load(open_bytes(pvh_kernel()), memory, BootConfig(modules=((str(path), "x" * 600_000),)))


@pytest.mark.parametrize("entry", [0, KERNEL_ADDRESS - 1, KERNEL_ADDRESS + len(CODE), 1 << 40])
def test_entry_outside(open_bytes: Open, entry: int) -> None:
    """A note whose entry is outside the kernel is an error."""
    with pytest.raises(BootError) as caught:
        open_bytes(pvh_kernel(entry))
    assert str(caught.value).endswith(f"image: PVH entry {entry:#x}: outside the kernel")
