"""Linux by the 64-bit boot protocol: bzImage, and vmlinux without a better way in.

A bzImage is a real-mode part, which firmware would need, and a decompressor with the kernel as its
payload. The host unpacks the payload and enters the kernel itself, which saves the guest a quarter
of a small boot. Nothing then relocates the kernel, so its text runs at the address it was linked
for, as with `nokaslr`; to have the text at a random place, use the kernel's own decompressor
(`BootConfig.unpack`). The decompressor's other duties are done here: it tells the kernel by
KASLR_FLAG that it may randomise its other regions (direct map, vmalloc, vmemmap, modules), which
the kernel does by itself, and it finds the RSDP. Five-level paging stays off. In encrypted memory
the kernel finds its C-bit by CPUID, as after its decompressor; the page tables here have it.

For a payload that the host cannot unpack the decompressor is loaded and entered: at its 64-bit
entry, or for a 32-bit kernel at its 32-bit entry.

Source: the Linux/x86 boot protocol 2.15, §1.12 and §1.13; arch/x86/kernel/head_64.S.
"""

import os
import struct
from typing import NamedTuple

from vmm_kvm.arch.x86.boot_config import (
    BootConfig,
    command_line_bytes,
    memory_map,
    place_acpi,
    refuse,
)
from vmm_kvm.arch.x86.bzimage import (
    BOOT_FLAG,
    HEADER_OFFSET,
    KASLR_FLAG,
    SIGNATURE,
    SetupHeader,
    read_header,
)
from vmm_kvm.arch.x86.e820 import encode
from vmm_kvm.arch.x86.entry import (
    CR0_ET,
    CR0_PE,
    CR0_PG,
    CR4_PAE,
    EFER_LMA,
    EFER_LME,
    FLAT_CODE32,
    FLAT_CODE64,
    FLAT_DATA,
    TASK64,
    Entry,
)
from vmm_kvm.arch.x86.layout import (
    BOOT_COMMAND_LINE,
    BOOT_GDT,
    BOOT_INFO,
    BOOT_PAGE_TABLES,
    BOOT_SETUP_DATA,
    HIGH_MEMORY_START,
)
from vmm_kvm.arch.x86.tables import write_gdt, write_identity_map
from vmm_kvm.bits import GIB, MIB, PAGE_SIZE, align_down, align_up
from vmm_kvm.boot.cache import KernelCache
from vmm_kvm.boot.elf import Elf, place_loads
from vmm_kvm.boot.source import FileSource
from vmm_kvm.boot.vmlinux import find_vmlinux
from vmm_kvm.errors import BootError
from vmm_kvm.memory import GuestMemory

# The protocol names these selectors.
BOOT_CODE64 = FLAT_CODE64._replace(selector=0x10)
BOOT_CODE32 = FLAT_CODE32._replace(selector=0x10)
BOOT_DATA = FLAT_DATA._replace(selector=0x18)
BOOT_TASK = TASK64._replace(selector=0x20)

# struct boot_params
_ACPI_RSDP_ADDR = 0x070
_E820_ENTRIES = 0x1E8
_VID_MODE = 0x1FA
_TYPE_OF_LOADER = 0x210
_LOADFLAGS = 0x211
_CODE32_START = 0x214
_RAMDISK_IMAGE = 0x218
_CMD_LINE_PTR = 0x228
_SETUP_DATA = 0x250
_E820_TABLE = 0x2D0

_VID_MODE_NORMAL = 0xFFFF
_LOADER_UNDEFINED = 0xFF
_VERSION_SETUP_DATA = 0x209
_SETUP_RNG_SEED = 9
_RNG_SEED_SIZE = 32
_IDENTITY_MAP_SIZE = 4 * GIB
_INITRD_ALIGNMENT = 4


class LinuxImage(NamedTuple):
    """A bzImage whose header has been checked; keeps its file open."""

    source: FileSource
    header: SetupHeader


class ElfImage(NamedTuple):
    """A 64-bit vmlinux that is entered like an unpacked bzImage."""

    elf: Elf


# What a bootloader must make up for a vmlinux, which has no header: version 2.12, as far as the
# command line, and room for it as COMMAND_LINE_SIZE of arch/x86/include/asm/setup.h.
_VMLINUX_VERSION = 0x20C
_VMLINUX_COMMAND_LINE_MAX = 2047
_VMLINUX_INITRD_MAX = 0x7FFF_FFFF
_VMLINUX_ALIGNMENT = 16 * MIB


def probe_linux(source: FileSource) -> LinuxImage:
    """Check a bzImage as far as that goes without a machine.

    Raises:
        BootError: its header is damaged, or the file is truncated.
    """
    return LinuxImage(source, read_header(source))


def load_linux(image: LinuxImage, memory: GuestMemory, config: BootConfig) -> Entry:
    """Place a bzImage's kernel, its initrd and boot_params into fresh guest memory.

    Raises:
        BootError: something does not fit, is damaged, or cannot be read.
    """
    header, source = image.header, image.source
    refuse(source.name, "a Linux kernel", config, modules=True)
    command_line = command_line_bytes(source.name, config, header.command_line_max)
    vmlinux = _unpacked(image, config)
    raw = bytearray(header.raw)
    if vmlinux is not None:
        kernel_end = place_loads(vmlinux, memory)
        entry, start = vmlinux.entry, header.load_address
        if b"nokaslr" not in command_line.rstrip(b"\0").split():
            raw[_LOADFLAGS - HEADER_OFFSET] |= KASLR_FLAG
    else:
        start = _load_address(image, memory)
        source.place(memory, start, header.kernel_offset, header.kernel_size)
        kernel_end = start + header.init_size
        entry = start + header.entry_offset
    params = _boot_params(bytes(raw), start)
    _place_initrd(params, memory, config, kernel_end, header.initrd_max)
    if config.seed and header.version >= _VERSION_SETUP_DATA:
        _place_seed(params, memory)
    return _enter(params, memory, config, command_line, entry, is_64=header.is_64)


def load_vmlinux(image: ElfImage, memory: GuestMemory, config: BootConfig) -> Entry:
    """Place a vmlinux, its initrd and boot_params into fresh guest memory.

    Raises:
        BootError: something does not fit, or cannot be read.
    """
    elf = image.elf
    name = elf.source.name
    refuse(name, "a Linux kernel", config, modules=True)
    command_line = command_line_bytes(name, config, _VMLINUX_COMMAND_LINE_MAX)
    kernel_end = place_loads(elf, memory)
    raw = bytearray(0x26C - HEADER_OFFSET)
    struct.pack_into("<H", raw, 0x1FE - HEADER_OFFSET, BOOT_FLAG)
    struct.pack_into("<4sH", raw, 0x202 - HEADER_OFFSET, SIGNATURE, _VMLINUX_VERSION)
    struct.pack_into("<I", raw, 0x230 - HEADER_OFFSET, _VMLINUX_ALIGNMENT)
    params = _boot_params(bytes(raw), elf.entry)
    _place_initrd(params, memory, config, kernel_end, _VMLINUX_INITRD_MAX)
    if config.seed:
        _place_seed(params, memory)
    return _enter(params, memory, config, command_line, elf.entry, is_64=True)


def _unpacked(image: LinuxImage, config: BootConfig) -> Elf | None:
    """Return the kernel to enter directly, or None if its decompressor has to run."""
    header = image.header
    if not (config.unpack and header.is_64):
        return None
    cache = config.kernels
    if cache is None and config.cache_directory is not None:
        cache = KernelCache(config.cache_directory)
    elf = find_vmlinux(
        image.source, header.payload_offset, header.payload_size, header.init_size, cache
    )
    if elf is None:
        return None
    start = min(s.paddr for s in elf.loads)
    end = max(s.paddr + s.memory_size for s in elf.loads)
    # The decompressor would move such a kernel from where it is linked: let it.
    is_at_home = start == header.load_address and end <= start + header.init_size
    return elf if is_at_home else None


def _load_address(image: LinuxImage, memory: GuestMemory) -> int:
    """Return where the decompressor goes: where it prefers to be, or as low as it may be moved."""
    header = image.header
    places = [header.load_address]
    if header.is_relocatable:
        places.append(align_up(HIGH_MEMORY_START, header.alignment))
    for address in places:
        if memory.contains(address, header.init_size):
            return address
    raise BootError(
        f"{image.source.name}: needs {align_up(header.init_size, MIB) >> 20} MiB"
        f" at {places[-1]:#x}: does not fit in {memory.size >> 20} MiB of memory"
    )


def _boot_params(header: bytes, start: int) -> bytearray:
    """Return a zero page with the setup header in its place.

    Source: Linux Documentation/arch/x86/zero-page.rst.
    """
    params = bytearray(PAGE_SIZE)
    params[HEADER_OFFSET : HEADER_OFFSET + len(header)] = header
    struct.pack_into("<H", params, _VID_MODE, _VID_MODE_NORMAL)
    params[_TYPE_OF_LOADER] = _LOADER_UNDEFINED
    struct.pack_into("<I", params, _CODE32_START, start & 0xFFFF_FFFF)
    struct.pack_into("<II", params, _RAMDISK_IMAGE, 0, 0)
    struct.pack_into("<Q", params, _SETUP_DATA, 0)
    return params


def _place_initrd(
    params: bytearray,
    memory: GuestMemory,
    config: BootConfig,
    kernel_end: int,
    highest: int,
) -> None:
    """Put the initrd as high as the kernel allows; several files follow each other.

    Raises:
        BootError: it does not fit above the kernel, or cannot be read.
    """
    files = [FileSource.of(file) for file in config.initrd]
    if not files:
        return
    size = sum(align_up(file.size, _INITRD_ALIGNMENT) for file in files)
    low = next(r for r in memory.regions if r.gpa <= HIGH_MEMORY_START < r.end)
    address = align_down(min(low.end, highest + 1) - size, PAGE_SIZE)
    if address < align_up(kernel_end, PAGE_SIZE):
        raise BootError(
            f"{files[0].name}: initrd: {size:#x} bytes do not fit between the kernel, which ends"
            f" at {kernel_end:#x}, and {min(low.end, highest + 1):#x}"
        )
    at = address
    for file in files:
        file.place(memory, at, 0, file.size)
        at += align_up(file.size, _INITRD_ALIGNMENT)
    struct.pack_into("<II", params, _RAMDISK_IMAGE, address, size)


def _place_seed(params: bytearray, memory: GuestMemory) -> None:
    """Give the kernel randomness before it has any of its own; it wipes the seed itself."""
    data = struct.pack("<QII", 0, _SETUP_RNG_SEED, _RNG_SEED_SIZE) + os.urandom(_RNG_SEED_SIZE)
    memory.write(BOOT_SETUP_DATA, data)
    struct.pack_into("<Q", params, _SETUP_DATA, BOOT_SETUP_DATA)


def _enter(
    params: bytearray,
    memory: GuestMemory,
    config: BootConfig,
    command_line: bytes,
    entry: int,
    *,
    is_64: bool,
) -> Entry:
    """Write the tables that every kernel gets, and return the processor's state."""
    entries = memory_map(memory, config)
    params[_E820_ENTRIES] = len(entries)
    table = encode(entries)
    params[_E820_TABLE : _E820_TABLE + len(table)] = table
    struct.pack_into("<Q", params, _ACPI_RSDP_ADDR, place_acpi(memory, config))
    memory.write(BOOT_COMMAND_LINE, command_line)
    struct.pack_into("<I", params, _CMD_LINE_PTR, BOOT_COMMAND_LINE)
    memory.write(BOOT_INFO, params)
    code = BOOT_CODE64 if is_64 else BOOT_CODE32
    limit = write_gdt(memory, BOOT_GDT, (code, BOOT_DATA, BOOT_TASK))
    state = Entry(
        rip=entry,
        code=code,
        data=BOOT_DATA,
        task=BOOT_TASK,
        gdt_base=BOOT_GDT,
        gdt_limit=limit,
        registers={"rsi": BOOT_INFO},
    )
    if not is_64:
        return state
    write_identity_map(memory, BOOT_PAGE_TABLES, _IDENTITY_MAP_SIZE, config.encrypted)
    return state._replace(
        cr0=CR0_PE | CR0_ET | CR0_PG,
        cr3=BOOT_PAGE_TABLES,
        cr4=CR4_PAE,
        efer=EFER_LME | EFER_LMA,
    )
