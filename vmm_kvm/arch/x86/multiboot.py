"""Multiboot version 1 kernels: ELF of either class, or anything that says where to load it.

Modules follow the kernel, page by page. What is left out: the symbol table and the drive table,
which are optional for the loader, and video modes, which this machine does not have.

Source: Multiboot specification 0.6.96, chapter 3.
"""

import struct
from typing import NamedTuple

from vmm_kvm.arch.x86.boot_config import (
    BootConfig,
    command_line_bytes,
    memory_map,
    open_modules,
    place_acpi,
)
from vmm_kvm.arch.x86.entry import FLAT_CODE32, FLAT_DATA, TASK64, Entry
from vmm_kvm.arch.x86.layout import (
    BOOT_COMMAND_LINE,
    BOOT_GDT,
    BOOT_INFO,
    BOOT_MODULES,
    BOOT_SETUP_DATA,
    COMMAND_LINE_MAX,
    EBDA_START,
    HIGH_MEMORY_START,
)
from vmm_kvm.arch.x86.modules import place_modules
from vmm_kvm.arch.x86.tables import write_gdt
from vmm_kvm.bits import KIB
from vmm_kvm.boot.elf import Elf, place_loads
from vmm_kvm.boot.source import Source
from vmm_kvm.errors import BootError
from vmm_kvm.memory import GuestMemory

SEARCH_SIZE = 8192
"""The header is in the first so many bytes of the file."""

_HEADER_MAGIC = 0x1BAD_B002
_LOADER_MAGIC = 0x2BAD_B002
_HEADER = struct.Struct("<III")
_ADDRESSES = struct.Struct("<IIIII")
_ADDRESSES_AT = 12

# Header flags
_PAGE_ALIGN = 1 << 0
_MEMORY_INFO = 1 << 1
_REQUIRED = 0xFFFF
_HAS_ADDRESSES = 1 << 16

# Information flags
_INFO_MEMORY = 1 << 0
_INFO_COMMAND_LINE = 1 << 2
_INFO_MODULES = 1 << 3
_INFO_MEMORY_MAP = 1 << 6
_INFO_LOADER_NAME = 1 << 9

_INFO = struct.Struct("<IIIIIII16sIIIIII")
_MODULE = struct.Struct("<IIII")
_MEMORY_MAP_ENTRY = struct.Struct("<IQQI")
_LOADER_NAME_AT = BOOT_INFO + 0x800
_LOADER_NAME = b"vmm_kvm\0"
_MODULES_MAX = 64


class Load(NamedTuple):
    """One piece of a file and where it goes."""

    address: int
    offset: int
    file_size: int
    memory_size: int


class MultibootImage(NamedTuple):
    """A Multiboot kernel; `elf` is None if its header says where to load it."""

    source: Source
    elf: Elf | None
    load: Load | None
    entry: int
    """Physical address."""


def probe_multiboot(source: Source, elf: Elf | None) -> MultibootImage | None:
    """Return the Multiboot kernel in `source`, whose ELF headers are `elf` if it has any.

    None if there is no Multiboot header.

    Raises:
        BootError: the header asks for what this loader cannot do, or contradicts the file.
    """
    name = f"{source.name}: Multiboot header"
    head = source.read(0, min(SEARCH_SIZE, source.size))
    at = _find_header(head)
    if at is None:
        return None
    flags = _HEADER.unpack_from(head, at)[1]
    if flags & _REQUIRED & ~(_PAGE_ALIGN | _MEMORY_INFO):
        raise BootError(f"{name}: requires what is not supported: flags {flags:#x}")
    if not flags & _HAS_ADDRESSES:
        if elf is None:
            raise BootError(f"{name}: neither an ELF executable nor load addresses")
        entry = elf.physical(elf.entry)
        if entry is None and elf.holds_physical(elf.entry):
            entry = elf.entry
        if entry is None or entry >> 32:
            raise BootError(f"{name}: entry {elf.entry:#x}: outside the kernel")
        return MultibootImage(source, elf, None, entry)
    if at + _ADDRESSES_AT + _ADDRESSES.size > len(head):
        raise BootError(f"{name}: truncated")
    header, start, load_end, bss_end, entry = _ADDRESSES.unpack_from(head, at + _ADDRESSES_AT)
    offset = at - (header - start)
    file_size = (load_end - start) if load_end else source.size - offset
    memory_size = max(file_size, bss_end - start)
    if header < start or offset < 0 or file_size <= 0 or offset + file_size > source.size:
        raise BootError(f"{name}: loads {file_size:#x} bytes at {offset:#x} of {source.size:#x}")
    if not start <= entry < start + memory_size:
        raise BootError(f"{name}: entry {entry:#x}: outside the kernel")
    return MultibootImage(source, None, Load(start, offset, file_size, memory_size), entry)


def _find_header(head: bytes) -> int | None:
    """Return where the header is: on a multiple of four, with the right checksum."""
    magic = _HEADER_MAGIC.to_bytes(4, "little")
    at = head.find(magic)
    while 0 <= at <= len(head) - _HEADER.size:
        if at % 4 == 0 and sum(_HEADER.unpack_from(head, at)) & 0xFFFF_FFFF == 0:
            return at
        at = head.find(magic, at + 1)
    return None


def load_multiboot(image: MultibootImage, memory: GuestMemory, config: BootConfig) -> Entry:
    """Place a Multiboot kernel, its modules and information into fresh guest memory.

    Raises:
        BootError: something does not fit, or cannot be read.
    """
    name = image.source.name
    command_line = command_line_bytes(name, config, COMMAND_LINE_MAX)
    files = open_modules(config)
    if len(files) > _MODULES_MAX:
        raise BootError(f"{name}: {len(files)} modules, {_MODULES_MAX} at most")
    end = _place_kernel(image, memory)
    modules = place_modules(memory, files, end, BOOT_MODULES + len(files) * _MODULE.size)
    for index, module in enumerate(modules):
        memory.write(
            BOOT_MODULES + index * _MODULE.size,
            _MODULE.pack(module.address, module.address + module.size, module.command_line, 0),
        )
    place_acpi(memory, config)
    table = b"".join(
        _MEMORY_MAP_ENTRY.pack(_MEMORY_MAP_ENTRY.size - 4, e.address, e.size, e.type)
        for e in memory_map(memory, config)
    )
    memory.write(BOOT_SETUP_DATA, table)
    memory.write(BOOT_COMMAND_LINE, command_line)
    memory.write(_LOADER_NAME_AT, _LOADER_NAME)
    low = memory.regions[0]
    memory.write(
        BOOT_INFO,
        _INFO.pack(
            _INFO_MEMORY
            | _INFO_COMMAND_LINE
            | _INFO_MODULES
            | _INFO_MEMORY_MAP
            | _INFO_LOADER_NAME,
            EBDA_START // KIB,
            (low.end - HIGH_MEMORY_START) // KIB,
            0,
            BOOT_COMMAND_LINE,
            len(modules),
            BOOT_MODULES if modules else 0,
            bytes(16),
            len(table),
            BOOT_SETUP_DATA,
            0,
            0,
            0,
            _LOADER_NAME_AT,
        ),
    )
    limit = write_gdt(memory, BOOT_GDT, (FLAT_CODE32, FLAT_DATA, TASK64))
    return Entry(
        rip=image.entry,
        gdt_base=BOOT_GDT,
        gdt_limit=limit,
        registers={"rax": _LOADER_MAGIC, "rbx": BOOT_INFO},
    )


def _place_kernel(image: MultibootImage, memory: GuestMemory) -> int:
    """Place the kernel; return its end."""
    if image.elf is not None:
        return place_loads(image.elf, memory)
    load = image.load
    assert load is not None
    if load.address < HIGH_MEMORY_START or not memory.contains(load.address, load.memory_size):
        raise BootError(
            f"{image.source.name}: kernel of {load.memory_size:#x} bytes at {load.address:#x}:"
            f" does not fit between 1 MiB and {memory.size >> 20} MiB"
        )
    image.source.place(memory, load.address, load.offset, load.file_size)
    return load.address + load.memory_size
