"""OpenBSD kernels: what boot(8) does on a PC, as vmd(8) does it.

The kernel, random bytes for its random data, and its symbols behind it; boot arguments in a page of
their own; a stack with the words that the kernel reads from it. Addresses are taken modulo 256 MiB,
as the kernel's linker places it in the last 2 GiB of virtual memory.

Source: OpenBSD vmd/loadfile_elf.c, sys/arch/amd64/include/biosvar.h.
"""

import os
import struct
from array import array
from typing import NamedTuple

from vmm_kvm.arch.x86.boot_config import BootConfig, memory_map, place_acpi, refuse
from vmm_kvm.arch.x86.e820 import E820Entry, encode
from vmm_kvm.arch.x86.entry import (
    CR0_ET,
    CR0_PE,
    CR0_PG,
    CR4_PAE,
    CR4_PSE,
    EFER_LMA,
    EFER_LME,
    FLAT_CODE32,
    FLAT_CODE64,
    FLAT_DATA,
    Entry,
)
from vmm_kvm.arch.x86.layout import HIGH_MEMORY_START, PORT_COM1
from vmm_kvm.arch.x86.tables import (
    PTE_LARGE,
    PTE_PRESENT,
    PTE_WRITE,
    write_gdt,
    write_identity_map,
)
from vmm_kvm.bits import GIB, MIB, align_up
from vmm_kvm.boot.elf import (
    PT_OPENBSD_RANDOMIZE,
    SHT_STRTAB,
    SHT_SYMTAB,
    Elf,
    ElfSection,
    Note,
    place_loads,
    read_sections,
    section_name,
)
from vmm_kvm.boot_device import BootDevice
from vmm_kvm.errors import BootError
from vmm_kvm.memory import GuestMemory

_ADDRESS_MASK = 0x0FFF_FFFF

_BOOTARGS = 0x2000
_STACK_END = 0x1_0000
_GDT = 0x1_0000
_PML4 = 0x1_1000
_PAGE_DIRECTORY32 = 0x1_2000

# Boot arguments
_BOOTARG_HEADER = struct.Struct("<III")
_BOOTARG_MEMMAP = 0
_BOOTARG_CONSDEV = 5
_BOOTARG_BOOTMAC = 7
_BOOTARG_END = 0xFFFF_FFFF
_CONSDEV = struct.Struct("<iiQiIii")
_COM_DEVICE = 8 << 8
_COM_SPEED = 115200

# The stack, from its end down
_API_VERSION = 0x0E
_BOOT_DEVICE_SD0A = 0xA000_0004
_HOWTO = 0
_RETURN_ADDRESS_SIZE = 4

_NOTE_OWNER = b"OpenBSD"
_SHF_ALLOC = 2
_RANDOM_MAX = MIB
_NAMES_MAX = MIB


class OpenbsdImage(NamedTuple):
    """An OpenBSD kernel, 32-bit or 64-bit."""

    elf: Elf
    sections: tuple[ElfSection, ...]


def is_openbsd(elf: Elf, notes: list[Note]) -> bool:
    """Tell whether `elf` shows OpenBSD's marks: random data, or its note."""
    return any(s.type == PT_OPENBSD_RANDOMIZE for s in elf.segments) or any(
        note.owner == _NOTE_OWNER for note in notes
    )


def probe_openbsd(elf: Elf) -> OpenbsdImage:
    """Check an OpenBSD kernel as far as that goes without a machine.

    Raises:
        BootError: it has no section headers, which its symbols need, or they are damaged, or its
            entry is outside.
    """
    name = elf.source.name
    sections = tuple(read_sections(elf))
    if not sections:
        raise BootError(f"{name}: no section headers: not an OpenBSD kernel, nor of another known")
    if not elf.holds_physical(elf.entry & _ADDRESS_MASK):
        raise BootError(f"{name}: entry {elf.entry:#x}: outside the kernel")
    return OpenbsdImage(elf, sections)


def load_openbsd(image: OpenbsdImage, memory: GuestMemory, config: BootConfig) -> Entry:
    """Place an OpenBSD kernel, its symbols, boot arguments and stack into fresh guest memory.

    Raises:
        BootError: something does not fit, or cannot be read.
    """
    elf = image.elf
    name = elf.source.name
    refuse(name, "an OpenBSD kernel", config, command_line=True, initrd=True, modules=True)
    end = place_loads(elf, memory)
    _place_random(elf, memory)
    end = _place_symbols(image, memory, align_up(end, elf.word))
    place_acpi(memory, config)
    lladdr = config.lladdr if config.boot_device is BootDevice.NET else None
    arguments = _boot_arguments(memory_map(memory, config), lladdr)
    memory.write(_BOOTARGS, arguments)
    stack = struct.pack(
        "<8I",
        _HOWTO,
        _BOOT_DEVICE_SD0A,
        _API_VERSION,
        end & _ADDRESS_MASK,
        0,
        0,
        len(arguments),
        _BOOTARGS,
    )
    memory.write(_STACK_END - len(stack), stack)
    registers = {"rsp": _STACK_END - len(stack) - _RETURN_ADDRESS_SIZE}
    entry = elf.entry & _ADDRESS_MASK
    code = FLAT_CODE64 if elf.is_64 else FLAT_CODE32
    limit = write_gdt(memory, _GDT, (code, FLAT_DATA))
    if elf.is_64:
        write_identity_map(memory, _PML4, GIB, config.encrypted)
        return Entry(
            rip=entry,
            cr0=CR0_PE | CR0_ET | CR0_PG,
            cr3=_PML4,
            cr4=CR4_PAE | CR4_PSE,
            efer=EFER_LME | EFER_LMA,
            code=code,
            gdt_base=_GDT,
            gdt_limit=limit,
            registers=registers,
        )
    leaf = PTE_PRESENT | PTE_WRITE | PTE_LARGE
    pages = array("I", range(leaf, 4 * GIB, 4 * MIB))
    memory.write(_PAGE_DIRECTORY32, pages.tobytes())
    return Entry(
        rip=entry,
        cr0=CR0_PE | CR0_ET | CR0_PG,
        cr3=_PAGE_DIRECTORY32,
        cr4=CR4_PSE,
        code=code,
        gdt_base=_GDT,
        gdt_limit=limit,
        registers=registers,
    )


def _boot_arguments(entries: tuple[E820Entry, ...], lladdr: bytes | None) -> bytes:
    """Return the list of boot arguments; each says its own size twice."""
    consdev = _CONSDEV.pack(_COM_DEVICE, _COM_SPEED, PORT_COM1, 0, 0, 0, 0)
    records = [
        (_BOOTARG_MEMMAP, encode(entries) + bytes(20)),
        (_BOOTARG_CONSDEV, consdev),
    ]
    if lladdr is not None:
        records.append((_BOOTARG_BOOTMAC, lladdr.ljust(8, b"\0")))
    packed = b""
    for kind, payload in records:
        size = _BOOTARG_HEADER.size + len(payload)
        packed += _BOOTARG_HEADER.pack(kind, size, size) + payload
    return packed + _BOOTARG_END.to_bytes(4, "little")


def _place_random(elf: Elf, memory: GuestMemory) -> None:
    """Fill the kernel's random data: its stack protector cookies and the like."""
    for segment in elf.segments:
        if segment.type != PT_OPENBSD_RANDOMIZE or not segment.memory_size:
            continue
        size = segment.memory_size
        if (
            size > _RANDOM_MAX
            or segment.paddr < HIGH_MEMORY_START
            or not memory.contains(segment.paddr, size)
        ):
            raise BootError(
                f"{elf.source.name}: random data: {size:#x} bytes at {segment.paddr:#x}"
                " do not fit in memory"
            )
        memory.write(segment.paddr, os.urandom(size))


def _place_symbols(image: OpenbsdImage, memory: GuestMemory, start: int) -> int:
    """Put a copy of the ELF header, the section headers and the symbols at `start`.

    Returns the end, in whole words. Only headers go there if the kernel is stripped.
    """
    elf, sections = image.elf, image.sections
    name = elf.source.name
    headers_size = align_up(elf.section_count * elf.section_entry_size, elf.word)
    header = bytearray(elf.header)
    # e_phoff and e_shoff, then e_phentsize and e_phnum
    if elf.is_64:
        struct.pack_into("<QQ", header, 32, 0, len(header))
        struct.pack_into("<HH", header, 54, 0, 0)
    else:
        struct.pack_into("<II", header, 28, 0, len(header))
        struct.pack_into("<HH", header, 42, 0, 0)
    table = bytearray(
        elf.source.read(elf.section_offset, elf.section_count * elf.section_entry_size)
    )
    has_symbols = any(s.type == SHT_SYMTAB for s in sections)
    names = _section_names(image)
    offset = align_up(len(header), elf.word) + headers_size
    end = start + offset
    if not memory.contains(start, offset):
        raise BootError(f"{name}: symbols at {start:#x}: do not fit in memory")
    for index, section in enumerate(sections):
        if not _is_symbolic(elf, names, section):
            continue
        if not memory.contains(end, align_up(section.size, elf.word)):
            raise BootError(
                f"{name}: symbols: {section.size:#x} bytes at {end:#x} do not fit in memory"
            )
        if has_symbols and section.size:
            elf.source.place(memory, end, section.offset, section.size)
        at = index * elf.section_entry_size
        if elf.is_64:
            struct.pack_into("<Q", table, at + 8, section.flags | _SHF_ALLOC)
            struct.pack_into("<Q", table, at + 24, offset)
        else:
            struct.pack_into("<I", table, at + 8, section.flags | _SHF_ALLOC)
            struct.pack_into("<I", table, at + 16, offset)
        offset += align_up(section.size, elf.word)
        end = start + offset
    memory.write(start, header)
    memory.write(start + len(header), table)
    return end


def _section_names(image: OpenbsdImage) -> bytes:
    """Return the contents of the section with the names of sections; empty if there is none."""
    index = image.elf.section_names
    if index >= len(image.sections) or image.sections[index].size > _NAMES_MAX:
        return b""
    section = image.sections[index]
    return image.elf.source.read(section.offset, section.size)


def _is_symbolic(elf: Elf, names: bytes, section: ElfSection) -> bool:
    """Tell whether the kernel's debugger wants this section."""
    if section.type in (SHT_SYMTAB, SHT_STRTAB):
        return True
    name = section_name(names, section)
    return name == b".debug_line" or (elf.is_64 and name == b".SUNW_ctf")
