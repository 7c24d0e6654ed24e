"""Kernels with a PVH entry point: 32-bit protected mode, without paging.

Linux, FreeBSD, NetBSD, Xen's mini-os and others name it in an ELF note. What they learn about the
machine is in `hvm_start_info`, version 1.

Source: Xen docs/misc/pvh.pandoc, public/arch-x86/hvm/start_info.h, public/elfnote.h.
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
)
from vmm_kvm.arch.x86.modules import place_modules
from vmm_kvm.arch.x86.tables import write_gdt
from vmm_kvm.boot.elf import Elf, Note, place_loads
from vmm_kvm.errors import BootError
from vmm_kvm.memory import GuestMemory

_NOTE_OWNER = b"Xen"
_XEN_ELFNOTE_PHYS32_ENTRY = 18

_START_MAGIC = 0x336E_C578
_START_INFO = struct.Struct("<IIIIQQQQII")
_START_VERSION = 1
_MODULE = struct.Struct("<QQQQ")
_MEMORY_MAP_ENTRY = struct.Struct("<QQII")
_MODULES_MAX = 64


class PvhImage(NamedTuple):
    """A kernel with its PVH entry point."""

    elf: Elf
    entry: int
    """Physical address, below 4 GiB."""


def pvh_entry(elf: Elf, notes: list[Note]) -> int | None:
    """Return the PVH entry point among `notes`, or None if there is none.

    Raises:
        BootError: it is outside the kernel.
    """
    for note in notes:
        if note.owner == _NOTE_OWNER and note.type == _XEN_ELFNOTE_PHYS32_ENTRY:
            entry = int.from_bytes(note.description, "little")
            if len(note.description) not in (4, 8) or entry >> 32 or not elf.holds_physical(entry):
                raise BootError(f"{elf.source.name}: PVH entry {entry:#x}: outside the kernel")
            return entry
    return None


def load_pvh(image: PvhImage, memory: GuestMemory, config: BootConfig) -> Entry:
    """Place a PVH kernel, its modules and start info into fresh guest memory.

    Raises:
        BootError: something does not fit, or cannot be read.
    """
    elf = image.elf
    name = elf.source.name
    command_line = command_line_bytes(name, config, COMMAND_LINE_MAX)
    files = open_modules(config)
    if len(files) > _MODULES_MAX:
        raise BootError(f"{name}: {len(files)} modules, {_MODULES_MAX} at most")
    end = place_loads(elf, memory)
    modules = place_modules(memory, files, end, BOOT_MODULES + len(files) * _MODULE.size)
    for index, module in enumerate(modules):
        memory.write(
            BOOT_MODULES + index * _MODULE.size,
            _MODULE.pack(module.address, module.size, module.command_line, 0),
        )
    entries = memory_map(memory, config)
    table = b"".join(_MEMORY_MAP_ENTRY.pack(e.address, e.size, e.type, 0) for e in entries)
    memory.write(BOOT_SETUP_DATA, table)
    memory.write(BOOT_COMMAND_LINE, command_line)
    memory.write(
        BOOT_INFO,
        _START_INFO.pack(
            _START_MAGIC,
            _START_VERSION,
            0,
            len(modules),
            BOOT_MODULES if modules else 0,
            BOOT_COMMAND_LINE,
            place_acpi(memory, config),
            BOOT_SETUP_DATA,
            len(entries),
            0,
        ),
    )
    limit = write_gdt(memory, BOOT_GDT, (FLAT_CODE32, FLAT_DATA, TASK64))
    return Entry(rip=image.entry, gdt_base=BOOT_GDT, gdt_limit=limit, registers={"rbx": BOOT_INFO})
