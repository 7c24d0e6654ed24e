"""The header of a bzImage, and whether it can be believed.

Source: the Linux/x86 boot protocol, versions 2.06 to 2.15.
"""

from typing import NamedTuple

from vmm_kvm.arch.x86.layout import COMMAND_LINE_MAX, HIGH_MEMORY_START
from vmm_kvm.bits import GIB, PAGE_SIZE
from vmm_kvm.boot.source import FileSource
from vmm_kvm.errors import BootError

SECTOR_SIZE = 512
HEADER_OFFSET = 0x1F1
NEEDS_BIOS = "needs a BIOS, which kernels do not have here: boot it from a disk or CD"
HEADER_END_MAX = 0x290
"""boot_params has no room for a longer header."""
SIGNATURE_OFFSET = 0x202
SIGNATURE = b"HdrS"
BOOT_FLAG = 0xAA55

LOADED_HIGH = 1 << 0
KASLR_FLAG = 1 << 1
XLF_KERNEL_64 = 1 << 0

_VERSION_MIN = 0x206
_VERSION_PAYLOAD = 0x208
_VERSION_INIT_SIZE = 0x20A
_VERSION_XLOADFLAGS = 0x20C
_ENTRY64_OFFSET = 0x200
_INIT_SIZE_MAX = GIB
_PARAGRAPH = 16
_INIT_SIZE_FACTOR = 4
"""Kernels before 2.10 do not say how much memory they need: they unpack to less than this."""
_SETUP_SECTORS_DEFAULT = 4

# Offsets of fields
_SETUP_SECTS = 0x1F1
_SYSSIZE = 0x1F4
_BOOT_FLAG = 0x1FE
_JUMP = 0x200
_VERSION = 0x206
_LOADFLAGS = 0x211
_CODE32_START = 0x214
_INITRD_ADDR_MAX = 0x22C
_KERNEL_ALIGNMENT = 0x230
_RELOCATABLE_KERNEL = 0x234
_XLOADFLAGS = 0x236
_CMDLINE_SIZE = 0x238
_PAYLOAD_OFFSET = 0x248
_PAYLOAD_LENGTH = 0x24C
_PREF_ADDRESS = 0x258
_INIT_SIZE = 0x260

# The first byte behind the fields that each version added
_HEADER_ENDS = ((0x206, 0x23C), (_VERSION_PAYLOAD, 0x250), (_VERSION_INIT_SIZE, 0x264))


class SetupHeader(NamedTuple):
    """The loader's part of the header; offsets are in the file, all checked."""

    raw: bytes
    """The header from 0x1f1 to its own end, for boot_params."""
    version: int
    kernel_offset: int
    """The start of the protected-mode part."""
    kernel_size: int
    """Its bytes."""
    payload_offset: int
    payload_size: int
    """Bytes; 0 if the header names no payload."""
    load_address: int
    """The kernel's preferred address, above 1 MiB."""
    init_size: int
    """Bytes that it needs from there on until it knows its memory."""
    alignment: int
    is_relocatable: bool
    is_64: bool
    """It has a 64-bit entry point."""
    command_line_max: int
    """Bytes, without the NUL."""
    initrd_max: int
    """The highest address that an initrd may occupy."""

    @property
    def entry_offset(self) -> int:
        """Its entry in the protected-mode part."""
        return _ENTRY64_OFFSET if self.is_64 else 0


def is_bzimage(head: bytes) -> bool:
    """Tell whether a file that begins with `head` is meant to be a bzImage."""
    return head[SIGNATURE_OFFSET : SIGNATURE_OFFSET + 4] == SIGNATURE


def read_header(source: FileSource) -> SetupHeader:
    """Read and check the header of a bzImage.

    Raises:
        BootError: a field is out of range or contradicts the file, or the kernel is too old.
    """
    name = f"{source.name}: Linux header"
    if source.size < HEADER_END_MAX:
        raise BootError(f"{name}: truncated")
    head = source.read(0, HEADER_END_MAX)

    def u8(at: int) -> int:
        return head[at]

    def u16(at: int) -> int:
        return int.from_bytes(head[at : at + 2], "little")

    def u32(at: int) -> int:
        return int.from_bytes(head[at : at + 4], "little")

    if u16(_BOOT_FLAG) != BOOT_FLAG:
        raise BootError(f"{name}: boot flag is {u16(_BOOT_FLAG):#x}, not {BOOT_FLAG:#x}")
    version = u16(_VERSION)
    if not _VERSION_MIN <= version < 0x300:
        raise BootError(
            f"{name}: boot protocol {version >> 8}.{version & 0xFF:02}, 2.06 or later is needed"
        )
    header_end = SIGNATURE_OFFSET + u8(_JUMP + 1)
    needed = max(end for since, end in _HEADER_ENDS if version >= since)
    if u8(_JUMP) != 0xEB or not needed <= header_end <= HEADER_END_MAX:
        raise BootError(f"{name}: ends at {header_end:#x}, not {needed:#x} or behind")
    if not u8(_LOADFLAGS) & LOADED_HIGH:
        raise BootError(f"{name}: a zImage, which is loaded below 1 MiB, is not supported")
    if not u32(_CODE32_START):  # as iPXE's has it: only its real-mode code can be entered
        raise BootError(f"{source.name}: no Linux kernel, but a program that {NEEDS_BIOS}")

    kernel_offset = ((u8(_SETUP_SECTS) or _SETUP_SECTORS_DEFAULT) + 1) * SECTOR_SIZE
    claimed = u32(_SYSSIZE) * _PARAGRAPH
    # The size is rounded up, the file need not be.
    kernel_size = min(claimed, source.size - kernel_offset)
    if claimed == 0 or kernel_size <= claimed - _PARAGRAPH:
        raise BootError(
            f"{name}: truncated: {claimed:#x} bytes at {kernel_offset:#x} of {source.size:#x}"
        )
    is_64 = version >= _VERSION_XLOADFLAGS and bool(u16(_XLOADFLAGS) & XLF_KERNEL_64)
    if kernel_size <= _ENTRY64_OFFSET:
        raise BootError(f"{name}: {kernel_size:#x} bytes are no kernel")

    payload_offset = payload_size = 0
    if version >= _VERSION_PAYLOAD:
        payload_offset, payload_size = u32(_PAYLOAD_OFFSET), u32(_PAYLOAD_LENGTH)
        if payload_offset + payload_size > kernel_size:
            raise BootError(
                f"{name}: payload: {payload_size:#x} bytes at {payload_offset:#x}"
                f" of {kernel_size:#x}"
            )

    is_relocatable = u8(_RELOCATABLE_KERNEL) != 0
    alignment = u32(_KERNEL_ALIGNMENT) if is_relocatable else PAGE_SIZE
    if alignment.bit_count() != 1 or not PAGE_SIZE <= alignment <= GIB:
        raise BootError(f"{name}: kernel alignment is {alignment:#x}")
    load_address, init_size = HIGH_MEMORY_START, _INIT_SIZE_FACTOR * kernel_size
    if version >= _VERSION_INIT_SIZE:
        load_address = int.from_bytes(head[_PREF_ADDRESS : _PREF_ADDRESS + 8], "little")
        init_size = u32(_INIT_SIZE)
        if not kernel_size - _PARAGRAPH < init_size <= _INIT_SIZE_MAX:
            raise BootError(
                f"{name}: needs {init_size:#x} bytes to start a kernel of {kernel_size:#x}"
            )
        if not HIGH_MEMORY_START <= load_address < 4 * GIB or load_address % alignment:
            raise BootError(f"{name}: preferred address is {load_address:#x}")

    return SetupHeader(
        raw=head[HEADER_OFFSET:header_end],
        version=version,
        kernel_offset=kernel_offset,
        kernel_size=kernel_size,
        payload_offset=kernel_offset + payload_offset,
        payload_size=payload_size,
        load_address=load_address,
        init_size=max(init_size, kernel_size),
        alignment=alignment,
        is_relocatable=is_relocatable,
        is_64=is_64,
        command_line_max=min(u32(_CMDLINE_SIZE), COMMAND_LINE_MAX),
        initrd_max=u32(_INITRD_ADDR_MAX),
    )
