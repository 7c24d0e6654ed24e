"""OpenBSD kernels: symbols, boot arguments, stack, and both ways of paging."""

from __future__ import annotations

import gzip
import struct
from collections.abc import Callable

import pytest

from tests.unit.boot.images import CODE, ElfSpec, openbsd_kernel
from vmm_kvm.arch.x86.acpi import AcpiConfig, build_tables
from vmm_kvm.arch.x86.e820 import e820_map, encode
from vmm_kvm.arch.x86.entry import CR0_ET, CR0_PE, CR0_PG, CR4_PAE, CR4_PSE, EFER_LMA, EFER_LME
from vmm_kvm.arch.x86.image import BootConfig, BootImage, load
from vmm_kvm.arch.x86.layout import ram_ranges
from vmm_kvm.arch.x86.openbsd import OpenbsdImage
from vmm_kvm.bits import GIB, MIB
from vmm_kvm.boot_device import BootDevice
from vmm_kvm.errors import BootError
from vmm_kvm.memory import GuestMemory

Open = Callable[[bytes], BootImage]

START = 2 * MIB
KERNEL_END = START + len(CODE) + 0x123
MAC = b"\xfe\xe1\xbb\xd1\x00\x07"


def _words(memory: GuestMemory, at: int, count: int) -> tuple[int, ...]:
    return struct.unpack(f"<{count}I", memory.read(at, 4 * count))


def _arguments(memory: GuestMemory) -> list[tuple[int, bytes]]:
    size = _words(memory, 0xFFF8, 1)[0]
    data = memory.read(0x2000, size)
    records = []
    at = 0
    while (kind := int.from_bytes(data[at : at + 4], "little")) != 0xFFFF_FFFF:
        length, following = struct.unpack_from("<II", data, at + 4)
        assert length == following
        records.append((kind, data[at + 12 : at + length]))
        at += length
    assert at + 4 == size
    return records


def test_64_bit_entry(open_bytes: Open, memory: GuestMemory) -> None:
    """A 64-bit kernel starts in long mode at its entry modulo 256 MiB."""
    image = open_bytes(openbsd_kernel())
    entry = load(image, memory, BootConfig())
    assert isinstance(image, OpenbsdImage)
    assert (
        entry.rip,
        entry.cr0,
        entry.cr3,
        entry.cr4,
    ) == (START + 0x10, CR0_PE | CR0_ET | CR0_PG, 0x1_1000, CR4_PAE | CR4_PSE)
    assert (
        entry.efer,
        entry.registers["rsp"],
        entry.gdt_base,
        entry.gdt_limit,
    ) == (EFER_LME | EFER_LMA, 0x1_0000 - 36, 0x1_0000, 0x17)


def test_64_bit_paging(open_bytes: Open, memory: GuestMemory) -> None:
    """One GiB is mapped to itself: PML4, PDPT and directory on pages of their own."""
    load(open_bytes(openbsd_kernel()), memory, BootConfig())
    (pml4,) = struct.unpack("<Q", memory.read(0x1_1000, 8))
    pdpt = struct.unpack("<512Q", memory.read(0x1_2000, 4096))
    directory = struct.unpack("<512Q", memory.read(0x1_3000, 4096))
    assert (pml4 & ~0xFFF, pdpt[0] & ~0xFFF) == (0x1_2000, 0x1_3000)
    assert pdpt[1:] == (0,) * 511
    assert list(range(0, GIB, 2 * MIB)) == [item & ~0xFFF for item in directory]
    assert {0x83} == {item & 0xFDF for item in directory}


def test_32_bit_entry(open_bytes: Open, memory: GuestMemory) -> None:
    """A 32-bit kernel starts with 4 MiB pages that map all memory to itself."""
    entry = load(open_bytes(openbsd_kernel(is_64=False)), memory, BootConfig())
    assert (
        entry.rip,
        entry.cr0,
        entry.cr3,
        entry.cr4,
        entry.efer,
    ) == (START + 0x10, CR0_PE | CR0_ET | CR0_PG, 0x1_2000, CR4_PSE, 0)
    assert list(range(0x83, 4 * GIB, 4 * MIB)) == list(_words(memory, 0x1_2000, 1024))


def test_stack(open_bytes: Open, memory: GuestMemory) -> None:
    """The kernel finds howto, boot device, API version, its end, and the arguments."""
    load(open_bytes(openbsd_kernel()), memory, BootConfig())
    howto, device, version, end, extended, base, size, arguments = _words(memory, 0xFFE0, 8)
    assert (
        howto,
        device,
        version,
        extended,
        base,
        arguments,
    ) == (0, 0xA000_0004, 0x0E, 0, 0, 0x2000)
    assert (KERNEL_END < end < KERNEL_END + 2000, end % 8) == (True, 0)
    assert size == len(b"".join(data for _, data in _arguments(memory))) + 2 * 12 + 4


def test_boot_arguments(open_bytes: Open, memory: GuestMemory) -> None:
    """The memory map with an empty entry at its end, and the first serial port."""
    load(open_bytes(openbsd_kernel()), memory, BootConfig(lladdr=MAC))
    map_ = encode(e820_map(memory.regions)) + bytes(20)
    console = struct.pack("<iiQiIii", 0x800, 115200, 0x3F8, 0, 0, 0, 0)
    assert [(0, map_), (5, console)] == _arguments(memory)


def test_boot_from_the_network(open_bytes: Open, memory: GuestMemory) -> None:
    """The first NIC's address is given only to a kernel that boots from it."""
    config = BootConfig(boot_device=BootDevice.NET, lladdr=MAC)
    load(open_bytes(openbsd_kernel()), memory, config)
    assert _arguments(memory)[-1] == (7, MAC + b"\0\0")


@pytest.mark.parametrize("is_64", [True, False])
def test_symbols(open_bytes: Open, memory: GuestMemory, is_64: bool) -> None:
    """After the kernel follow its ELF header, section headers, and sections for the debugger."""
    load(open_bytes(openbsd_kernel(is_64=is_64)), memory, BootConfig())
    word = 8 if is_64 else 4
    start = -(-KERNEL_END // word) * word
    form = "<16sHHIQQQIHHHHHH" if is_64 else "<16sHHIIIIIHHHHHH"
    size = struct.calcsize(form)
    ehdr = struct.unpack(form, memory.read(start, size))
    phoff, shoff, phentsize, phnum, shentsize, shnum, names = (
        *ehdr[5:7],
        *ehdr[9:13],
        ehdr[13],
    )
    assert (0, size, 0, 0) == (phoff, shoff, phentsize, phnum)
    shdr = "<IIQQQQIIQQ" if is_64 else "<IIIIIIIIII"
    table = memory.read(start + shoff, shentsize * shnum)
    sections = list(struct.iter_unpack(shdr, table))
    placed = {s[0]: memory.read(start + s[4], s[5]) for s in sections if s[2] & 2}
    strings = memory.read(start + sections[names][4], sections[names][5])
    contents = {strings[at : strings.find(b"\0", at)]: data for at, data in placed.items()}
    expected = {
        b".strtab": b"\0start\0end\0",
        b".symtab": bytes(range(48)),
        b".debug_line": b"line numbers",
        b".shstrtab": strings,
    }
    assert (expected | {b".SUNW_ctf": b"types"} if is_64 else expected) == contents
    assert all(s[4] % word == 0 for s in sections if s[2] & 2)


def test_stripped_kernel_has_only_headers(open_bytes: Open, memory: GuestMemory) -> None:
    """Without a symbol table no contents are placed, but room for them is kept."""
    load(open_bytes(openbsd_kernel(symbols=False)), memory, BootConfig())
    start = -(-KERNEL_END // 8) * 8
    end = _words(memory, 0xFFEC, 1)[0]
    after_headers = start + 64 + 4 * 64
    assert end > after_headers
    assert bytes(end - after_headers) == memory.read(after_headers, end - after_headers)


def test_random_data(open_bytes: Open) -> None:
    """The segment for random data is filled, with different bytes each time."""
    image = open_bytes(openbsd_kernel())
    seen = set()
    for _ in range(2):
        with GuestMemory(ram_ranges(8 * MIB)) as memory:
            load(image, memory, BootConfig())
            seen.add(memory.read(START + 64, 64))
            assert CODE[:64] == memory.read(START, 64)
    assert len(seen - {bytes(64), CODE[64:128]}) == 2


def test_gzipped(open_bytes: Open, memory: GuestMemory) -> None:
    """A gzipped kernel loads as the unpacked one does."""
    plain = openbsd_kernel()
    entry = load(open_bytes(gzip.compress(plain)), memory, BootConfig())
    assert (START + 0x10, CODE[:64]) == (entry.rip, memory.read(START, 64))


def test_acpi_tables(open_bytes: Open, memory: GuestMemory) -> None:
    """The tables lie where the kernel looks for the RSDP."""
    tables = build_tables(AcpiConfig())
    load(open_bytes(openbsd_kernel()), memory, BootConfig(acpi=tables))
    assert memory.read(0xE_0000, 8) == b"RSD PTR "


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (BootConfig(command_line="-s"), "an OpenBSD kernel takes no command line: '-s'"),
        (BootConfig(initrd=("rd",)), "an OpenBSD kernel takes no initrd: rd"),
        (BootConfig(modules=(("m", ""),)), "an OpenBSD kernel takes no modules: m"),
    ],
)
def test_options_of_no_use(
    open_bytes: Open, memory: GuestMemory, config: BootConfig, message: str
) -> None:
    """Options that an OpenBSD kernel cannot use are refused, naming both."""
    with pytest.raises(BootError, match=message):
        load(open_bytes(openbsd_kernel()), memory, config)


def test_no_sections(open_bytes: Open) -> None:
    """Section headers are mandatory."""
    spec = ElfSpec(is_64=False, machine=3)
    with pytest.raises(BootError, match="no section headers: not an OpenBSD kernel"):
        open_bytes(spec.build())


def test_entry_outside(open_bytes: Open) -> None:
    """A kernel with its entry outside its segments is refused."""
    kernel = bytearray(openbsd_kernel())
    struct.pack_into("<Q", kernel, 24, 0xFFFF_FFFF_8000_0000)
    with pytest.raises(BootError, match="entry 0xffffffff80000000: outside the kernel"):
        open_bytes(bytes(kernel))


@pytest.mark.parametrize("size", [1 << 40, (1 << 64) - 1, 64 * MIB])
@pytest.mark.parametrize("symbols", [True, False])
def test_section_of_impossible_size(
    open_bytes: Open, memory: GuestMemory, size: int, symbols: bool
) -> None:
    """A section that leaves memory is refused, even one that would not be copied."""
    kernel = bytearray(openbsd_kernel(symbols=symbols))
    shoff = int.from_bytes(kernel[40:48], "little")
    struct.pack_into("<Q", kernel, shoff + 2 * 64 + 32, size)
    with pytest.raises(BootError, match="do not fit in memory"):
        load(open_bytes(bytes(kernel)), memory, BootConfig())


def test_random_data_outside_memory(open_bytes: Open, memory: GuestMemory) -> None:
    """Random data are written only inside RAM above 1 MiB."""
    kernel = bytearray(openbsd_kernel())
    struct.pack_into("<Q", kernel, 64 + 56 + 24, 0x1000)
    with pytest.raises(BootError, match="random data: 0x40 bytes at 0x1000"):
        load(open_bytes(bytes(kernel)), memory, BootConfig())


def test_needs_room_for_symbols(open_bytes: Open) -> None:
    """Symbols that do not fit after the kernel are an error of their own."""
    image = open_bytes(openbsd_kernel())
    assert isinstance(image, OpenbsdImage)
    segment = image.elf.segments[0]._replace(memory_size=2 * MIB - 64)
    tight = image._replace(elf=image.elf._replace(segments=(segment,)))
    with GuestMemory(ram_ranges(4 * MIB)) as memory, pytest.raises(BootError, match="symbols at"):
        load(tight, memory, BootConfig())
