"""Boot images made for tests: small, valid, and with any field set to anything."""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from uuid import UUID

from vmm_kvm.bits import MIB, align_up

EM_X86_64 = 62
EM_386 = 3
PT_LOAD = 1
PT_NOTE = 4
PT_OPENBSD_RANDOMIZE = 0x65A3_DBE6
KERNEL_ADDRESS = 16 * MIB
CODE = bytes(range(1, 256)) * 40


@dataclass(frozen=True, slots=True)
class Segment:
    """A segment of an executable to be made."""

    data: bytes
    paddr: int = KERNEL_ADDRESS
    vaddr: int | None = None
    memory_size: int | None = None
    type: int = PT_LOAD
    flags: int = 7
    align: int = 4


@dataclass(frozen=True, slots=True)
class Section:
    """A section of an executable to be made."""

    name: bytes
    type: int
    data: bytes
    flags: int = 0


@dataclass(frozen=True, slots=True)
class ElfSpec:
    """An executable to be made."""

    segments: Sequence[Segment] = (Segment(CODE),)
    entry: int = KERNEL_ADDRESS
    is_64: bool = True
    machine: int = EM_X86_64
    type: int = 2
    sections: Sequence[Section] = ()
    prefix: bytes = b""
    """Bytes right after the program headers: a Multiboot header, say."""

    def build(self) -> bytes:
        """Return the file."""
        ehdr_size, phdr_size = (64, 56) if self.is_64 else (52, 32)
        at = ehdr_size + phdr_size * len(self.segments)
        body = self.prefix
        headers = []
        for segment in self.segments:
            body += bytes(-(at + len(body)) % 8)
            vaddr = segment.paddr if segment.vaddr is None else segment.vaddr
            size = len(segment.data)
            memory = size if segment.memory_size is None else segment.memory_size
            offset = at + len(body)
            if self.is_64:
                headers.append(
                    struct.pack(
                        "<IIQQQQQQ",
                        *(segment.type, segment.flags, offset, vaddr, segment.paddr),
                        *(size, memory, segment.align),
                    )
                )
            else:
                headers.append(
                    struct.pack(
                        "<IIIIIIII",
                        *(segment.type, offset, vaddr, segment.paddr, size, memory),
                        *(segment.flags, segment.align),
                    )
                )
            body += segment.data
        section_at, table, names_index = 0, b"", 0
        if self.sections:
            contents, table, names_index = self._sections(at + len(body))
            body += contents
            body += bytes(-(at + len(body)) % 8)
            section_at = at + len(body)
        count = len(self.sections) + 2 if self.sections else 0
        ident = b"\x7fELF" + bytes((2 if self.is_64 else 1, 1, 1)) + bytes(9)
        head = struct.pack(
            "<16sHHIQQQIHHHHHH" if self.is_64 else "<16sHHIIIIIHHHHHH",
            *(ident, self.type, self.machine, 1, self.entry, ehdr_size, section_at, 0),
            *(ehdr_size, phdr_size, len(self.segments)),
            *(64 if self.is_64 else 40, count, names_index),
        )
        return head + b"".join(headers) + body + table

    def _sections(self, at: int) -> tuple[bytes, bytes, int]:
        """Return contents, headers, and the index of the section of names."""
        strings = b"\0" + b"".join(s.name + b"\0" for s in self.sections) + b".shstrtab\0"
        every = (*self.sections, Section(b".shstrtab", 3, strings))
        form = "<IIQQQQIIQQ" if self.is_64 else "<IIIIIIIIII"
        table = bytes(struct.calcsize(form))
        contents = b""
        for section in every:
            table += struct.pack(
                form,
                *(strings.index(section.name), section.type, section.flags, 0),
                *(at + len(contents), len(section.data), 0, 0, 1, 0),
            )
            contents += section.data
        return contents, table, len(every)


def note(owner: bytes, kind: int, description: bytes, align: int = 4) -> bytes:
    """Return an ELF note whose parts begin at multiples of `align`."""
    head = struct.pack("<III", len(owner) + 1, len(description), kind) + owner + b"\0"
    data = head.ljust(align_up(len(head), align), b"\0") + description
    return data.ljust(align_up(len(data), align), b"\0")


def note_segment(*notes: bytes) -> Segment:
    """Return a segment that holds `notes` and occupies no memory of its own."""
    return Segment(b"".join(notes), paddr=0, memory_size=0, type=PT_NOTE)


def vmlinux(code: bytes = CODE, bss: int = 0x5000) -> bytes:
    """Return the unpacked payload of a bzImage: an ELF linked for `KERNEL_ADDRESS`."""
    return ElfSpec(
        segments=(
            Segment(code, vaddr=0xFFFF_FFFF_8100_0000),
            Segment(
                code[::-1],
                paddr=KERNEL_ADDRESS + MIB,
                vaddr=0xFFFF_FFFF_8110_0000,
                memory_size=len(code) + bss,
            ),
            note_segment(note(b"Linux", 0, b"6.1\0")),
        )
    ).build()


def pvh_kernel(entry: int = KERNEL_ADDRESS + 8, code: bytes = CODE) -> bytes:
    """Return a kernel with a PVH note."""
    return ElfSpec(
        segments=(Segment(code), note_segment(note(b"Xen", 18, entry.to_bytes(8, "little"))))
    ).build()


def multiboot_header(flags: int = 3, addresses: Sequence[int] = ()) -> bytes:
    """Return a Multiboot header; five `addresses` follow if given."""
    magic = 0x1BAD_B002
    return struct.pack("<III", magic, flags, -(magic + flags) & 0xFFFF_FFFF) + struct.pack(
        f"<{len(addresses)}I", *addresses
    )


def multiboot_elf(*, is_64: bool = False, flags: int = 3, code: bytes = CODE) -> bytes:
    """Return a Multiboot kernel that is an ELF."""
    return ElfSpec(
        segments=(Segment(code),),
        is_64=is_64,
        machine=EM_X86_64 if is_64 else EM_386,
        prefix=multiboot_header(flags),
    ).build()


def multiboot_flat(size: int = 0x3000) -> bytes:
    """Return a Multiboot kernel whose header gives its load address: 2 MiB."""
    start = 2 * MIB
    header = multiboot_header(0x1_0003, (start + 16, start, start + size, start + 0x8000, start))
    return (bytes(16) + header).ljust(size, b"\xcc")


def openbsd_kernel(*, is_64: bool = True, symbols: bool = True, code: bytes = CODE) -> bytes:
    """Return an OpenBSD kernel; it is entered at a virtual address."""
    base = 0xFFFF_FFFF_8000_0000 if is_64 else 0xD000_0000
    sections = [Section(b".text", 1, b""), Section(b".strtab", 3, b"\0start\0end\0")]
    if symbols:
        sections += [
            Section(b".symtab", 2, bytes(range(48))),
            Section(b".debug_line", 1, b"line numbers"),
            Section(b".SUNW_ctf", 1, b"types"),
            Section(b".comment", 1, b"of no use"),
        ]
    address = 2 * MIB
    return ElfSpec(
        is_64=is_64,
        machine=EM_X86_64 if is_64 else EM_386,
        entry=base + address + 0x10,
        segments=(
            Segment(code, paddr=address, vaddr=base + address, memory_size=len(code) + 0x123),
            Segment(
                bytes(64), paddr=address + 64, vaddr=base + address + 64, type=PT_OPENBSD_RANDOMIZE
            ),
        ),
        sections=sections,
    ).build()


def firmware(size: int = 0x1_0000) -> bytes:
    """Return a firmware image: a far jump at the reset vector."""
    vector = b"\xea\x5b\xe0\x00\xf0".ljust(16, b"\0")
    return (bytes(range(256)) * (size // 256 + 1))[: size - 16] + vector


# Offset and format of each header field of a bzImage that a loader reads.
BZIMAGE_FIELDS: Mapping[str, tuple[int, str]] = {
    "setup_sects": (0x1F1, "<B"),
    "syssize": (0x1F4, "<I"),
    "boot_flag": (0x1FE, "<H"),
    "jump": (0x200, "<B"),
    "header_size": (0x201, "<B"),
    "header": (0x202, "<I"),
    "version": (0x206, "<H"),
    "loadflags": (0x211, "<B"),
    "code32_start": (0x214, "<I"),
    "initrd_addr_max": (0x22C, "<I"),
    "kernel_alignment": (0x230, "<I"),
    "relocatable_kernel": (0x234, "<B"),
    "xloadflags": (0x236, "<H"),
    "cmdline_size": (0x238, "<I"),
    "payload_offset": (0x248, "<I"),
    "payload_length": (0x24C, "<I"),
    "pref_address": (0x258, "<Q"),
    "init_size": (0x260, "<I"),
}


@dataclass(frozen=True, slots=True)
class BzImage:
    """A bzImage to be made; `fields` are set last, over the right values."""

    payload: bytes = b""
    setup_sects: int = 3
    entry32: bytes = b"\xfc\xfa"
    """Code at the start of the protected-mode part, at most 512 bytes."""
    entry64: bytes = b"\xfa\xf4"
    """Code after it, at most 256 bytes."""
    fields: Mapping[str, int] = field(default_factory=dict)

    def but(self, **fields: int) -> BzImage:
        """Return the same image with other values in some header fields."""
        return replace(self, fields={**self.fields, **fields})

    def build(self) -> bytes:
        """Return the file."""
        setup_size = (self.setup_sects + 1) * 512
        stub = self.entry32.ljust(0x200, b"\x90") + self.entry64.ljust(0x100, b"\x90")
        kernel = stub + self.payload
        kernel = kernel.ljust(align_up(len(kernel), 16), b"\0")
        image = bytearray(setup_size) + kernel
        fields = {
            "setup_sects": self.setup_sects,
            "syssize": len(kernel) // 16,
            "boot_flag": 0xAA55,
            "jump": 0xEB,
            "header_size": 0x6A,
            "header": 0x5372_6448,
            "version": 0x20F,
            "loadflags": 1,
            "code32_start": 1 * MIB,
            "initrd_addr_max": 0x7FFF_FFFF,
            "kernel_alignment": 2 * MIB,
            "relocatable_kernel": 1,
            "xloadflags": 0x7F,
            "cmdline_size": 2047,
            "payload_offset": len(stub) if self.payload else 0,
            "payload_length": len(self.payload),
            "pref_address": KERNEL_ADDRESS,
            "init_size": 4 * MIB,
            **self.fields,
        }
        for name, value in fields.items():
            offset, form = BZIMAGE_FIELDS[name]
            struct.pack_into(form, image, offset, value)
        return bytes(image)


def guided_table(*entries: tuple[UUID, bytes]) -> bytes:
    """Return a table of GUIDs as OVMF has it, 32 bytes before the end of its image."""
    body = b"".join(
        data + struct.pack("<H16s", len(data) + 18, name.bytes_le) for name, data in entries
    )
    footer = UUID("96b582de-1fb2-45f7-baea-a366c55a082d")
    return body + struct.pack("<H16s", len(body) + 18, footer.bytes_le)
