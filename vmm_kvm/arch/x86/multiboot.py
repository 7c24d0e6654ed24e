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
from vmm_kvm.bits import KIB, PAGE_SIZE, align_up
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
_LOADER_NAME_OFFSET = 0x800  # in the page of the information
_LOADER_NAME = b"vmm_kvm\0"
_MODULES_MAX = 64


class Load(NamedTuple):
    """One piece of a file and where it goes."""

    address: int
    offset: int
    file_size: int
    memory_size: int


class _Places(NamedTuple):
    """Guest-physical addresses of the loader's data for the kernel."""

    gdt: int
    info: int
    memory_map: int
    command_line: int
    modules: int
    end: int


_LOW = _Places(*(BOOT_GDT, BOOT_INFO, BOOT_SETUP_DATA, BOOT_COMMAND_LINE, BOOT_MODULES, EBDA_START))


class MultibootImage(NamedTuple):
    """A Multiboot kernel; `elf` is None if its header says where to load it."""

    source: Source
    elf: Elf | None
    load: Load | None
    entry: int
    """Physical address."""

    @property
    def ranges(self) -> tuple[tuple[int, int], ...]:
        """Address and size of all that the kernel occupies."""
        if self.load is not None:
            return ((self.load.address, self.load.memory_size),)
        loads = self.elf.loads if self.elf else ()
        return tuple((segment.paddr, segment.memory_size) for segment in loads)

    @property
    def is_low(self) -> bool:
        """Whether any of it lies in the first MiB."""
        return any(size and address < HIGH_MEMORY_START for address, size in self.ranges)


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
    at = _LOW
    if image.is_low:
        # The kernel occupies our usual place, so our data go behind it.
        at = _moved(_LOW, align_up(end, PAGE_SIZE))
        end = at.end
        if not memory.contains(at.gdt, at.end - at.gdt):
            raise BootError(f"{name}: no room for boot information behind the kernel")
    lines = at.modules + len(files) * _MODULE.size
    modules = place_modules(memory, files, end, lines, at.end)
    for index, module in enumerate(modules):
        memory.write(
            at.modules + index * _MODULE.size,
            _MODULE.pack(module.address, module.address + module.size, module.command_line, 0),
        )
    place_acpi(memory, config)
    table = b"".join(
        _MEMORY_MAP_ENTRY.pack(_MEMORY_MAP_ENTRY.size - 4, e.address, e.size, e.type)
        for e in memory_map(memory, config)
    )
    memory.write(at.memory_map, table)
    memory.write(at.command_line, command_line)
    memory.write(at.info + _LOADER_NAME_OFFSET, _LOADER_NAME)
    low = memory.regions[0]
    memory.write(
        at.info,
        _INFO.pack(
            _INFO_MEMORY
            | _INFO_COMMAND_LINE
            | _INFO_MODULES
            | _INFO_MEMORY_MAP
            | _INFO_LOADER_NAME,
            EBDA_START // KIB,
            (low.end - HIGH_MEMORY_START) // KIB,
            0,
            at.command_line,
            len(modules),
            at.modules if modules else 0,
            bytes(16),
            len(table),
            at.memory_map,
            0,
            0,
            0,
            at.info + _LOADER_NAME_OFFSET,
        ),
    )
    limit = write_gdt(memory, at.gdt, (FLAT_CODE32, FLAT_DATA, TASK64))
    return Entry(
        rip=image.entry,
        gdt_base=at.gdt,
        gdt_limit=limit,
        registers={"rax": _LOADER_MAGIC, "rbx": at.info},
    )


def _moved(places: _Places, base: int) -> _Places:
    """Return the same places, from `base` up, which is page-aligned."""
    distance = base - places.gdt // PAGE_SIZE * PAGE_SIZE
    return _Places(*(address + distance for address in places))


def _place_kernel(image: MultibootImage, memory: GuestMemory) -> int:
    """Place the kernel, each piece in conventional memory or above 1 MiB; return its end."""
    for address, size in image.ranges:
        kernel = f"{image.source.name}: kernel of {size:#x} bytes at {address:#x}"
        if address < HIGH_MEMORY_START and address + size > EBDA_START:
            raise BootError(f"{kernel}: reaches beyond conventional memory, {EBDA_START:#x}")
        if not memory.contains(address, size):
            raise BootError(f"{kernel}: does not fit between 1 MiB and {memory.size >> 20} MiB")
    if image.elf is not None:
        return place_loads(image.elf, memory)
    load = image.load
    assert load is not None
    image.source.place(memory, load.address, load.offset, load.file_size)
    return load.address + load.memory_size
