"""ELF executables as far as a boot loader needs them: segments, notes and sections.

Reads both classes, little-endian x86 only, and copies nothing but headers. Every offset, size and
count comes from an untrusted file: all are checked before use, and loops over them are bounded.
"""

import struct
from collections.abc import Sequence
from typing import NamedTuple

from vmm_kvm.bits import MIB
from vmm_kvm.boot.source import Source
from vmm_kvm.errors import BootError
from vmm_kvm.memory import GuestMemory

MAGIC = b"\x7fELF"
EM_386 = 3
EM_X86_64 = 62
ET_EXEC = 2
ET_DYN = 3
PT_LOAD = 1
PT_INTERP = 3
PT_NOTE = 4
PT_OPENBSD_RANDOMIZE = 0x65A3_DBE6
SHT_SYMTAB = 2
SHT_STRTAB = 3

_EHDR32 = struct.Struct("<16sHHIIIIIHHHHHH")
_EHDR64 = struct.Struct("<16sHHIQQQIHHHHHH")
_PHDR32 = struct.Struct("<IIIIIIII")
_PHDR64 = struct.Struct("<IIQQQQQQ")
_SHDR32 = struct.Struct("<IIIIIIIIII")
_SHDR64 = struct.Struct("<IIQQQQIIQQ")
_NOTE = struct.Struct("<III")

_SEGMENTS_MAX = 256
_SECTIONS_MAX = 4096
_NOTES_MAX = 1 << 20

_ARCHITECTURES = {
    2: "SPARC",
    8: "MIPS",
    20: "PowerPC",
    21: "64-bit PowerPC",
    22: "S/390",
    40: "ARM",
    42: "SuperH",
    43: "64-bit SPARC",
    50: "IA-64",
    183: "AArch64",
    243: "RISC-V",
    258: "LoongArch",
    0x9026: "Alpha",
}


class ElfSegment(NamedTuple):
    """A program header."""

    type: int
    flags: int
    offset: int
    vaddr: int
    paddr: int
    file_size: int
    """Bytes in the file, at `offset`; all of them are there."""
    memory_size: int
    """Bytes in memory, at least `file_size`; the rest is zero."""
    align: int


class ElfSection(NamedTuple):
    """A section header; whether its contents are there is for the user to check."""

    name: int
    type: int
    flags: int
    address: int
    offset: int
    size: int
    link: int
    info: int
    align: int
    entry_size: int


class Note(NamedTuple):
    """A note: its owner, its type, and its contents."""

    owner: bytes
    type: int
    description: bytes


class Elf(NamedTuple):
    """The headers of an executable."""

    source: Source
    is_64: bool
    machine: int
    type: int
    entry: int
    segments: tuple[ElfSegment, ...]
    header: bytes
    """The ELF header itself."""
    section_offset: int
    section_count: int
    section_entry_size: int
    section_names: int
    """Index of the section with the names of sections."""

    @property
    def word(self) -> int:
        """Bytes in an address of this class."""
        return 8 if self.is_64 else 4

    @property
    def loads(self) -> list[ElfSegment]:
        """The segments that occupy memory."""
        return [s for s in self.segments if s.type == PT_LOAD and s.memory_size]

    def physical(self, address: int) -> int | None:
        """Return where the virtual `address` is loaded, or None if it is in no segment."""
        for segment in self.loads:
            if segment.vaddr <= address < segment.vaddr + segment.memory_size:
                return address - segment.vaddr + segment.paddr
        return None

    def holds_physical(self, address: int) -> bool:
        """Tell whether a segment occupies the physical `address`."""
        return any(s.paddr <= address < s.paddr + s.memory_size for s in self.loads)


def read_elf(source: Source) -> Elf:
    """Read and check the headers of an ELF executable.

    Raises:
        BootError: it is not one for x86, or a header or segment does not fit in the file.
        Source: System V ABI, chapters 4 and 5.
    """
    name = source.name
    ident = source.read(0, min(16, source.size))
    if len(ident) < 16 or not ident.startswith(MAGIC):
        raise BootError(f"{name}: not an ELF executable")
    if ident[4] not in (1, 2):
        raise BootError(f"{name}: ELF header: class {ident[4]} is neither 32-bit nor 64-bit")
    if ident[5] == 2:
        raise BootError(f"{name}: ELF header: big-endian, built for another processor, not x86")
    if ident[5] != 1 or ident[6] != 1:
        raise BootError(f"{name}: ELF header: unknown data encoding or version")
    is_64 = ident[4] == 2
    ehdr, phdr = (_EHDR64, _PHDR64) if is_64 else (_EHDR32, _PHDR32)
    if source.size < ehdr.size:
        raise BootError(f"{name}: ELF header: truncated")
    header = source.read(0, ehdr.size)
    (_, kind, machine, _, entry, phoff, shoff, _, _, phentsize, phnum, shentsize, shnum, names) = (
        ehdr.unpack(header)
    )
    if machine not in (EM_386, EM_X86_64):
        built_for = _ARCHITECTURES.get(machine, f"machine {machine}")
        raise BootError(f"{name}: built for {built_for}, not x86")
    if is_64 and machine == EM_386:
        raise BootError(f"{name}: ELF header: 64-bit class with a 32-bit machine")
    if kind not in (ET_EXEC, ET_DYN):
        raise BootError(f"{name}: ELF header: type {kind} is not an executable")
    if not 0 < phnum <= _SEGMENTS_MAX:
        raise BootError(f"{name}: ELF header: {phnum} program headers")
    if phentsize != phdr.size:
        raise BootError(f"{name}: ELF header: program headers of {phentsize} bytes")
    if phoff + phnum * phentsize > source.size:
        raise BootError(f"{name}: program headers: beyond the end of the file")
    table = source.read(phoff, phnum * phentsize)
    if any(values[0] == PT_INTERP for values in phdr.iter_unpack(table)):
        raise BootError(f"{name}: a program or library of an operating system, not a kernel")
    segments = tuple(
        _segment(source, is_64, index, values)
        for index, values in enumerate(phdr.iter_unpack(table))
    )
    elf = Elf(source, is_64, machine, kind, entry, segments, header, shoff, shnum, shentsize, names)
    if not elf.loads:
        raise BootError(f"{name}: program headers: nothing to load")
    return elf


def check_high(elf: Elf) -> None:
    """Check that a kernel leaves the first MiB alone, where boot loaders have their own things.

    Raises:
        BootError: a segment belongs there.
    """
    for index, segment in enumerate(elf.segments):
        if segment.type == PT_LOAD and segment.memory_size and segment.paddr < MIB:
            raise BootError(
                f"{elf.source.name}: segment {index}: at {segment.paddr:#x}, below 1 MiB"
            )


def _segment(source: Source, is_64: bool, index: int, values: tuple[int, ...]) -> ElfSegment:
    if is_64:
        kind, flags, offset, vaddr, paddr, file_size, memory_size, align = values
    else:
        kind, offset, vaddr, paddr, file_size, memory_size, flags, align = values
    if kind in (PT_LOAD, PT_NOTE):
        if offset + file_size > source.size:
            raise BootError(f"{source.name}: segment {index}: beyond the end of the file")
        if kind == PT_LOAD and file_size > memory_size:
            raise BootError(f"{source.name}: segment {index}: larger in the file than in memory")
        if paddr + memory_size > 1 << 64 or vaddr + memory_size > 1 << 64:
            raise BootError(f"{source.name}: segment {index}: beyond the end of the address space")
    return ElfSegment(kind, flags, offset, vaddr, paddr, file_size, memory_size, align)


def read_notes(elf: Elf) -> list[Note]:
    """Return the notes of all note segments; a malformed one ends its segment.

    Source: System V ABI, chapter 5, "Note Section"; 8-byte alignment as GNU ld writes it.
    """
    notes = []
    for segment in elf.segments:
        if segment.type != PT_NOTE or segment.file_size > _NOTES_MAX:
            continue
        data = elf.source.read(segment.offset, segment.file_size)
        align = 8 if segment.align == 8 else 4
        at = 0
        while at + _NOTE.size <= len(data):
            owner_size, size, kind = _NOTE.unpack_from(data, at)
            owner_at = at + _NOTE.size
            start = -(-(owner_at + owner_size) // align) * align
            end = start + size
            if end > len(data):
                break
            notes.append(
                Note(data[owner_at : owner_at + owner_size].rstrip(b"\0"), kind, data[start:end])
            )
            at = -(-end // align) * align
    return notes


def read_sections(elf: Elf) -> list[ElfSection]:
    """Return the section headers, none if the file has none.

    Raises:
        BootError: the table does not fit in the file.
    """
    name = elf.source.name
    shdr = _SHDR64 if elf.is_64 else _SHDR32
    if elf.section_count == 0:
        return []
    if elf.section_entry_size != shdr.size or elf.section_count > _SECTIONS_MAX:
        raise BootError(
            f"{name}: ELF header: {elf.section_count} section headers"
            f" of {elf.section_entry_size} bytes"
        )
    size = elf.section_count * shdr.size
    if elf.section_offset + size > elf.source.size:
        raise BootError(f"{name}: section headers: beyond the end of the file")
    table = elf.source.read(elf.section_offset, size)
    return [ElfSection(*values) for values in shdr.iter_unpack(table)]


def section_name(names: bytes, section: ElfSection) -> bytes:
    """Return the name of `section` out of the contents of the section with the names."""
    end = names.find(b"\0", section.name)
    return names[section.name : end] if 0 <= section.name <= end else b""


def check_loads(name: str, loads: Sequence[ElfSegment], memory: GuestMemory) -> None:
    """Check that all segments can be placed in RAM, and do not cover each other many times over.

    Raises:
        BootError: they cannot, or do.
    """
    total = sum(segment.file_size for segment in loads)
    if total > memory.size:
        raise BootError(
            f"{name}: segments: {total:#x} bytes do not fit in {memory.size >> 20} MiB of memory"
        )
    for segment in loads:
        if not memory.contains(segment.paddr, segment.memory_size):
            raise BootError(
                f"{name}: segment at {segment.paddr:#x}: {segment.memory_size:#x} bytes"
                f" do not fit in {memory.size >> 20} MiB of memory"
            )


def place_loads(elf: Elf, memory: GuestMemory) -> int:
    """Copy all segments to their physical addresses; return the end of the highest.

    Memory of a segment beyond its file contents is left alone: fresh guest memory is zero. It is
    looked at, for a `RecordedMemory` to know of it.

    Raises:
        BootError: a segment does not fit, or the file changed while it was read.
    """
    check_loads(elf.source.name, elf.loads, memory)
    for segment in elf.loads:
        memory.view(segment.paddr, segment.memory_size)
        if segment.file_size:
            elf.source.place(memory, segment.paddr, segment.offset, segment.file_size)
    return max(s.paddr + s.memory_size for s in elf.loads)
