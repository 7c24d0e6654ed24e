"""ELF headers: reading them, and errors in them."""

from __future__ import annotations

import struct
from dataclasses import replace

import pytest

from tests.unit.boot.images import (
    CODE,
    EM_386,
    KERNEL_ADDRESS,
    ElfSpec,
    Section,
    Segment,
    note,
    note_segment,
)
from vmm_kvm.boot.elf import (
    check_high,
    place_loads,
    read_elf,
    read_notes,
    read_sections,
    section_name,
)
from vmm_kvm.boot.source import BytesSource
from vmm_kvm.errors import BootError
from vmm_kvm.memory import GuestMemory

SPEC = ElfSpec()
SPEC32 = ElfSpec(is_64=False, machine=EM_386)


def _error(data: bytes) -> str:
    with pytest.raises(BootError) as caught:
        read_sections(read_elf(BytesSource("k", data)))
    return str(caught.value)


def _patched(spec: ElfSpec, offset: int, data: bytes) -> bytes:
    image = bytearray(spec.build())
    image[offset : offset + len(data)] = data
    return bytes(image)


@pytest.mark.parametrize("spec", [SPEC, SPEC32])
def test_reads_both_classes(spec: ElfSpec) -> None:
    """Entry and segments are read from 32-bit and 64-bit files alike."""
    elf = read_elf(BytesSource("k", spec.build()))
    (segment,) = elf.loads
    assert (KERNEL_ADDRESS, KERNEL_ADDRESS, len(CODE)) == (
        elf.entry,
        segment.paddr,
        segment.file_size,
    )


def test_places_segments(memory: GuestMemory) -> None:
    """Each segment lies at its physical address, and the highest end is returned."""
    spec = replace(
        SPEC, segments=(Segment(CODE, memory_size=0x8000), Segment(b"data", paddr=0x20_0000))
    )
    elf = read_elf(BytesSource("k", spec.build()))
    assert place_loads(elf, memory) == KERNEL_ADDRESS + 0x8000
    assert CODE + bytes(4) == memory.read(KERNEL_ADDRESS, len(CODE) + 4)
    assert memory.read(0x20_0000, 4) == b"data"


def test_finds_physical_addresses() -> None:
    """A virtual address yields the place where its byte is loaded; others yield none."""
    spec = replace(SPEC, segments=(Segment(CODE, vaddr=0xFFFF_FFFF_8100_0000),))
    elf = read_elf(BytesSource("k", spec.build()))
    assert elf.physical(0xFFFF_FFFF_8100_0005) == KERNEL_ADDRESS + 5
    assert elf.physical(KERNEL_ADDRESS) is None


@pytest.mark.parametrize("align", [4, 8])
def test_reads_notes(align: int) -> None:
    """Notes follow each other on the alignment of their segment."""
    notes = (note(b"Xen", 18, bytes(8), align), note(b"Linux", 0, b"abcd", align))
    segment = replace(note_segment(*notes), align=align)
    spec = replace(SPEC, segments=(Segment(CODE), segment))
    found = read_notes(read_elf(BytesSource("k", spec.build())))
    assert [(n.owner, n.type) for n in found] == [(b"Xen", 18), (b"Linux", 0)]


def test_damaged_notes_end_the_list() -> None:
    """A note that leaves its segment is left out, and so are all after it."""
    broken = struct.pack("<III", 4, 1000, 18) + b"Xen\0"
    spec = replace(SPEC, segments=(Segment(CODE), note_segment(note(b"A", 1, b""), broken)))
    assert [n.owner for n in read_notes(read_elf(BytesSource("k", spec.build())))] == [b"A"]


def test_reads_sections() -> None:
    """Sections are found with their names."""
    spec = replace(SPEC, sections=(Section(b".symtab", 2, b"symbols"),))
    source = BytesSource("k", spec.build())
    elf = read_elf(source)
    sections = read_sections(elf)
    names = source.read(sections[-1].offset, sections[-1].size)
    assert [section_name(names, s) for s in sections] == [b"", b".symtab", b".shstrtab"]
    assert source.read(sections[1].offset, sections[1].size) == b"symbols"


@pytest.mark.parametrize(
    ("machine", "name"),
    [(183, "AArch64"), (243, "RISC-V"), (40, "ARM"), (22, "S/390"), (999, "machine 999")],
)
def test_other_architectures(machine: int, name: str) -> None:
    """A kernel for another processor is reported as that."""
    assert f"k: built for {name}, not x86" == _error(replace(SPEC, machine=machine).build())


@pytest.mark.parametrize(
    ("spec", "offset", "value", "message"),
    [
        (SPEC, 0, b"\x7fELG", "not an ELF executable"),
        (SPEC, 4, b"\x03", "class 3"),
        (SPEC, 5, b"\x02", "big-endian"),
        (SPEC, 6, b"\x02", "unknown data encoding or version"),
        (SPEC, 16, b"\x01\0", "type 1 is not an executable"),
        (SPEC, 18, b"\x03\0", "64-bit class with a 32-bit machine"),
        (SPEC, 32, b"\xff" * 8, "program headers: beyond the end"),
        (SPEC, 54, b"\x20\0", "program headers of 32 bytes"),
        (SPEC, 56, b"\0\0", "0 program headers"),
        (SPEC, 56, b"\xff\xff", "65535 program headers"),
        (SPEC, 64, b"\x06", "nothing to load"),
        (SPEC, 72, b"\xff" * 8, "segment 0: beyond the end of the file"),
        (SPEC, 80, b"\xff" * 8, "beyond the end of the address space"),
        (SPEC, 88, b"\xff" * 8, "beyond the end of the address space"),
        (SPEC, 96, b"\xff" * 8, "segment 0: beyond the end of the file"),
        (SPEC, 104, b"\x01" + bytes(7), "larger in the file than in memory"),
        (SPEC32, 28, b"\xff" * 4, "program headers: beyond the end"),
        (SPEC32, 56, b"\xff" * 4, "segment 0: beyond the end of the file"),
        (SPEC, 60, b"\x07\0", "7 section headers"),
    ],
)
def test_broken_fields(spec: ElfSpec, offset: int, value: bytes, message: str) -> None:
    """Each field that is out of range has an error of its own."""
    patched = _patched(spec, offset, value)
    if offset == 60:
        patched = patched[:58] + b"\x11\0" + patched[60:]
    assert message in _error(patched)


@pytest.mark.parametrize("size", [0, 1, 15, 16, 63, 64, 119])
def test_truncated_headers(size: int) -> None:
    """A file that ends within its headers is an error at any length."""
    assert "k: " in _error(SPEC.build()[:size])


def test_too_large_for_memory(memory: GuestMemory) -> None:
    """A segment that leaves RAM is named with its address before anything is copied."""
    spec = replace(SPEC, segments=(Segment(CODE, paddr=0x20_0000), Segment(CODE, paddr=64 << 20)))
    with pytest.raises(BootError) as caught:
        place_loads(read_elf(BytesSource("k", spec.build())), memory)
    assert (
        str(caught.value) == "k: segment at 0x4000000: 0x27d8 bytes do not fit in 64 MiB of memory"
    )
    assert bytes(16) == memory.read(0x20_0000, 16)


def test_segments_that_cover_each_other(memory: GuestMemory) -> None:
    """Copying a large file many times over itself is refused before it begins."""
    spec = replace(SPEC, segments=(Segment(bytes(1 << 20)),) * 65)
    with pytest.raises(BootError, match="k: segments: 0x4100000 bytes do not fit in 64 MiB"):
        place_loads(read_elf(BytesSource("k", spec.build())), memory)


def test_kernels_that_leave_the_first_mib_alone() -> None:
    """`check_high` refuses a segment below 1 MiB by its number; an empty one is allowed."""
    high = Segment(CODE, paddr=KERNEL_ADDRESS)
    for low, problem in ((Segment(CODE, paddr=0x8000), True), (Segment(b"", paddr=0), False)):
        elf = read_elf(BytesSource("k", ElfSpec(segments=(high, low)).build()))
        if problem:
            with pytest.raises(BootError, match="k: segment 1: at 0x8000, below 1 MiB"):
                check_high(elf)
        else:
            check_high(elf)
