"""Multiboot kernels: headers, information and modules."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.unit.boot.images import (
    CODE,
    EM_386,
    KERNEL_ADDRESS,
    ElfSpec,
    Segment,
    multiboot_elf,
    multiboot_flat,
    multiboot_header,
)
from vmm_kvm.arch.x86.acpi import AcpiConfig, build_tables
from vmm_kvm.arch.x86.e820 import e820_map
from vmm_kvm.arch.x86.entry import CR0_ET, CR0_PE
from vmm_kvm.arch.x86.image import BootConfig, BootImage, load
from vmm_kvm.arch.x86.layout import ram_ranges
from vmm_kvm.arch.x86.multiboot import MultibootImage
from vmm_kvm.bits import KIB, MIB
from vmm_kvm.errors import BootError
from vmm_kvm.memory import GuestMemory

Open = Callable[[bytes], BootImage]

START = 2 * MIB
INFO = struct.Struct("<IIIIIII16sIIIIII")


@pytest.mark.parametrize("is_64", [False, True])
def test_elf(open_bytes: Open, memory: GuestMemory, is_64: bool) -> None:
    """An ELF of either class is entered in 32-bit mode with the magic in EAX."""
    image = open_bytes(multiboot_elf(is_64=is_64))
    entry = load(image, memory, BootConfig())
    assert isinstance(image, MultibootImage)
    assert (
        entry.rip,
        entry.cr0,
        entry.registers["rax"],
    ) == (KERNEL_ADDRESS, CR0_PE | CR0_ET, 0x2BAD_B002)
    assert memory.read(KERNEL_ADDRESS, len(CODE)) == CODE


def test_elf_with_virtual_entry(open_bytes: Open, memory: GuestMemory) -> None:
    """An entry at a virtual address is translated by its segment."""
    spec = ElfSpec(
        is_64=False,
        machine=EM_386,
        prefix=multiboot_header(),
        segments=(Segment(CODE, paddr=START, vaddr=0xC000_0000),),
        entry=0xC000_0010,
    )
    assert load(open_bytes(spec.build()), memory, BootConfig()).rip == START + 0x10


def test_flat(open_bytes: Open, memory: GuestMemory) -> None:
    """A file whose header gives its addresses needs no other headers."""
    data = multiboot_flat()
    entry = load(open_bytes(data), memory, BootConfig())
    assert (START, data) == (entry.rip, memory.read(START, len(data)))


def test_flat_to_the_end_of_the_file(open_bytes: Open, memory: GuestMemory) -> None:
    """A load end of 0 means all of the file, from the place of the header's address."""
    header = multiboot_header(0x1_0000, (START + 0x10, START, 0, 0, START + 4))
    data = b"skipped!" + bytes(0x10) + header + CODE
    entry = load(open_bytes(data), memory, BootConfig())
    assert (START + 4, data[8:]) == (entry.rip, memory.read(START, len(data) - 8))


def test_information(open_bytes: Open, memory: GuestMemory) -> None:
    """The kernel gets its memory, its command line, and the loader's name."""
    tables = build_tables(AcpiConfig())
    config = BootConfig(command_line="-s verbose", acpi=tables)
    entry = load(open_bytes(multiboot_elf()), memory, config)
    info = INFO.unpack(memory.read(entry.registers["rbx"], INFO.size))
    flags, lower, upper, _, line, count, modules, _, map_size, map_at, _, _, _, name = info
    assert (flags, lower, upper, count, modules) == (0x24D, 639, 63 * KIB, 0, 0)
    assert (memory.read(line, 11), memory.read(name, 8)) == (b"-s verbose\0", b"vmm_kvm\0")
    assert [(20, e.address, e.size, e.type) for e in e820_map(memory.regions)] == list(
        struct.iter_unpack("<IQQI", memory.read(map_at, map_size))
    )
    assert tables.blob == memory.read(tables.base, len(tables.blob))


def test_modules(open_bytes: Open, memory: GuestMemory, tmp_path: Path) -> None:
    """Modules are placed after the kernel and its bss, on pages, in the given order."""
    (tmp_path / "a").write_bytes(b"first")
    (tmp_path / "b").write_bytes(b"second")
    config = BootConfig(initrd=(f"{tmp_path}/a",), modules=((f"{tmp_path}/b", "-x"),))
    entry = load(open_bytes(multiboot_flat()), memory, config)
    info = INFO.unpack(memory.read(entry.registers["rbx"], INFO.size))
    assert info[5] == 2
    first, second = struct.iter_unpack("<IIII", memory.read(info[6], 32))
    assert (first[0], memory.read(first[0], first[1] - first[0])) == (START + 0x8000, b"first")
    assert (second[0], memory.read(second[0], second[1] - second[0])) == (START + 0x9000, b"second")
    assert (memory.read(first[2], 1), memory.read(second[2], 3)) == (b"\0", b"-x\0")


def _flat(*addresses: int) -> bytes:
    return (bytes(16) + multiboot_header(0x1_0000, addresses)).ljust(0x3000, b"\xcc")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (multiboot_elf(flags=4), "requires what is not supported: flags 0x4"),
        (multiboot_elf(flags=0x8003), "requires what is not supported: flags 0x8003"),
        (multiboot_header().ljust(100, b"\0"), "neither an ELF executable nor load addresses"),
        (multiboot_header(0x1_0000), "truncated"),
        (_flat(START, START + 1, 0, 0, START), "loads 0x2fef bytes at 0x11"),
        (_flat(START + 0x100, START, 0, 0, START), "loads 0x30f0 bytes at -0xf0"),
        (_flat(START, START, START + 0x4000, 0, START), "loads 0x4000 bytes at 0x10"),
        (_flat(START, START, START - 1, 0, START), "loads -0x1 bytes"),
        (_flat(START, START, 0, 0, START - 1), "entry 0x1fffff: outside the kernel"),
        (_flat(START, START, 0, START + 0x9000, START + 0x9000), "entry 0x209000: outside the"),
    ],
)
def test_broken_headers(open_bytes: Open, data: bytes, message: str) -> None:
    """A header that is impossible or contradicts the file has an error of its own."""
    with pytest.raises(BootError) as caught:
        open_bytes(data)
    assert f"image: Multiboot header: {message}" in str(caught.value)


def test_entry_outside_of_elf(open_bytes: Open) -> None:
    """An ELF that is entered outside its segments is refused."""
    spec = ElfSpec(is_64=False, machine=EM_386, prefix=multiboot_header(), entry=0x1234)
    with pytest.raises(BootError, match="entry 0x1234: outside the kernel"):
        open_bytes(spec.build())


@pytest.mark.parametrize("at", [2, 8188, 8192])
def test_header_where_none_may_be(open_bytes: Open, at: int) -> None:
    """A header off its alignment, or not wholly in the first 8192 bytes, is ignored."""
    data = (bytes(at) + multiboot_header(0x1_0000, (START, START, 0, 0, START))).ljust(9000, b"\0")
    with pytest.raises(BootError, match="not a kernel or firmware image"):
        open_bytes(data)


@pytest.mark.parametrize(
    ("address", "bss_end"), [(65 * MIB, 0), (START, 65 * MIB), (0xFFFF_0000, 0)]
)
def test_does_not_fit(open_bytes: Open, memory: GuestMemory, address: int, bss_end: int) -> None:
    """A flat kernel, with its bss, must be in RAM."""
    data = _flat(address + 16, address, 0, bss_end, address)
    with pytest.raises(BootError, match="does not fit between 1 MiB and 64 MiB"):
        load(open_bytes(data), memory, BootConfig())


def test_module_does_not_fit(open_bytes: Open, tmp_path: Path) -> None:
    """A module that leaves RAM is refused by name."""
    (tmp_path / "m").write_bytes(bytes(MIB))
    with GuestMemory(ram_ranges(17 * MIB)) as memory, pytest.raises(BootError, match="m: module: "):
        load(open_bytes(multiboot_elf()), memory, BootConfig(initrd=(f"{tmp_path}/m",)))


@pytest.mark.parametrize("address", [0x9_D000, 0xA_0000, 0xF_F000])
def test_beyond_conventional_memory(open_bytes: Open, memory: GuestMemory, address: int) -> None:
    """A kernel cannot be placed in the BIOS's areas below 1 MiB."""
    data = _flat(address + 16, address, 0, 0, address)
    with pytest.raises(BootError, match="reaches beyond conventional memory, 0x9fc00"):
        load(open_bytes(data), memory, BootConfig())


def test_low_kernels(open_bytes: Open, memory: GuestMemory, tmp_path: Path) -> None:
    """A kernel at 0x8000 is placed there; its information, line and modules follow it."""
    (tmp_path / "m").write_bytes(b"module")
    data = _flat(0x8010, 0x8000, 0, 0x9_0000, 0x8000)
    config = BootConfig(command_line="-x", modules=((f"{tmp_path}/m", "-y"),))
    entry = load(open_bytes(data), memory, config)
    assert entry.rip == 0x8000
    assert memory.read(0x8000, 0x3000 - 0x11) == data[: 0x3000 - 0x11]
    info_at = entry.registers["rbx"]
    info = INFO.unpack(memory.read(info_at, INFO.size))
    line, modules, map_at, name = info[4], info[6], info[9], info[13]
    kernel_end = 0x9_0000
    assert all(at >= kernel_end for at in (info_at, line, modules, map_at, name, entry.gdt_base))
    assert memory.read(line, 3) == b"-x\0"
    start, end, module_line, _ = struct.unpack("<IIII", memory.read(modules, 16))
    assert (memory.read(start, end - start), memory.read(module_line, 3)) == (b"module", b"-y\0")
    assert start >= entry.gdt_base + entry.gdt_limit


@pytest.mark.parametrize("is_64", [False, True])
def test_xen_needs_a_bios(open_bytes: Open, is_64: bool) -> None:
    """Xen entered by Multiboot would call a BIOS, and hang: one line says so."""
    with pytest.raises(BootError, match=r"Xen needs a BIOS, .*: boot it from a disk or CD"):
        open_bytes(multiboot_elf(is_64=is_64) + b"\0Xen version %d.%d%s\0")


def test_a_program_for_efi_with_a_multiboot_header(open_bytes: Open) -> None:
    """A program for EFI, such as xen.efi, is known as that, despite a Multiboot header."""
    pe = bytearray(0x100)
    pe[:2], pe[0x3C], pe[0x80:0x84] = b"MZ", 0x80, b"PE\0\0"
    with pytest.raises(BootError, match="a program for EFI or Windows"):
        open_bytes(bytes(pe) + multiboot_header() + bytes(64))


@pytest.mark.parametrize("order", [(0, 1), (1, 0), (0, 1, 0)])
def test_an_empty_module_is_refused(
    open_bytes: Open, memory: GuestMemory, tmp_path: Path, order: tuple[int, ...]
) -> None:
    """An empty module is refused, also beside others, at any place."""
    files = (tmp_path / "module", tmp_path / "empty")
    files[0].write_bytes(b"x")
    files[1].touch()
    config = BootConfig(initrd=tuple(str(files[index]) for index in order))
    with pytest.raises(BootError, match="empty: empty file"):
        load(open_bytes(multiboot_elf()), memory, config)
