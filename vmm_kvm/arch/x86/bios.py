"""Firmware: a flat image that ends at 4 GiB and runs from the reset vector.

The image is read-only memory there; the machine maps it. Its last part also lies at the end of the
first MiB, in RAM, where real-mode code expects itself and may write. Images of any size are
accepted, as OpenBSD's vmd does, with a limit of 16 MiB instead of 1 MiB.
"""

from typing import NamedTuple

from vmm_kvm.arch.x86.boot_config import BootConfig, refuse
from vmm_kvm.arch.x86.entry import RESET_VECTOR, Entry
from vmm_kvm.arch.x86.layout import FIRMWARE_END, LOW_FIRMWARE_END, LOW_FIRMWARE_MAX
from vmm_kvm.bits import KIB, MIB, PAGE_SIZE, align_up
from vmm_kvm.boot.source import Source
from vmm_kvm.errors import BootError
from vmm_kvm.limits import FIRMWARE_MAX
from vmm_kvm.memory import GuestMemory

_RESET_VECTOR_SIZE = 16
# Instructions that firmware begins with: far, near and short jumps, also with an operand size
# prefix; nop, cli, cld, wbinvd, invd; mov %cr0, %eax, as OVMF's X64 builds do.
_FIRST_INSTRUCTIONS = (
    b"\xea", b"\xe9", b"\xeb", b"\x66\xea", b"\x66\xe9", b"\x90", b"\xfa", b"\xfc", b"\x0f\x09",
    b"\x0f\x08", b"\x0f\x20\xc0",
)  # fmt: skip
_ERASED = b"\xff"
# Files that are mistaken for kernels. Source: each format's own specification.
_MEDIA = (
    (0, b"QFI\xfb", "a qcow2 image, which is a disk"),
    (0x8001, b"CD001", "a disc image, for the CD-ROM drive"),
    (510, b"\x55\xaa", "it begins as a disk does"),
    (0, b"\x55\xaa", "an option ROM of a card"),
    (0, b"070701", "an initial RAM disk: use --initrd, with a kernel"),
    (0, b"#!", "a script"),
    (0, b"\xd6\x50\x52\xe8", "a Multiboot 2 kernel, which is not supported"),
    (0, b"\xfd7zXZ\0", "compressed by xz: unpack it first"),
    (0, b"\x28\xb5\x2f\xfd", "compressed by zstd: unpack it first"),
    (0, b"BZh", "compressed by bzip2: unpack it first"),
    (0, b"PK\x03\x04", "a zip archive: unpack it first"),
    (0, b"!<arch>\n", "a package or library: unpack it first"),
    (0, b"\x27\x05\x19\x56", "an image for U-Boot"),
    (0, b"\xd0\x0d\xfe\xed", "a device tree, or an image for U-Boot"),
    (0, b"ANDROID!", "an Android boot image"),
    (0, b"\xcf\xfa\xed\xfe", "a program for macOS"),
    (40, b"_FVH", "the variables of UEFI firmware: use --firmware uefi, with --nvram"),
)
_FLASH_BLOCK = 64 * KIB
"""Images of firmware are as large as a flash memory is."""
_VOLUME_SIGNATURE, _VOLUME_SIGNATURE_AT = b"_FVH", 40


class FirmwareImage(NamedTuple):
    """A firmware image as the processor sees it below 4 GiB."""

    name: str
    rom: bytes | memoryview
    """Its contents: whole pages, padded in front with 0xff as flash memory is."""
    size: int
    """Bytes of it that come from the file; they end at 4 GiB."""

    @property
    def is_uefi(self) -> bool:
        """Whether it is UEFI firmware: it begins with a firmware volume (UEFI PI 1.8 §3.2.1)."""
        start = len(self.rom) - self.size + _VOLUME_SIGNATURE_AT
        return self.rom[start : start + len(_VOLUME_SIGNATURE)] == _VOLUME_SIGNATURE

    @property
    def rom_base(self) -> int:
        """Guest-physical address of the ROM."""
        return FIRMWARE_END - len(self.rom)


def probe_firmware(source: Source) -> FirmwareImage:
    """Read an image of no other known format; it must have code at the reset vector.

    Raises:
        BootError: it has not, or is too large.
    """
    size = source.size
    start = source.read(size - _RESET_VECTOR_SIZE, 16) if size >= _RESET_VECTOR_SIZE else b""
    if not start.startswith(_FIRST_INSTRUCTIONS):
        raise BootError(f"{source.name}: not a kernel or firmware image{_hint(source)}")
    return read_firmware(source)


def _hint(source: Source) -> str:
    """Return what an image plainly is, and the probable intention; empty if nothing is known."""
    for at, mark, hint in _MEDIA:
        if source.size >= at + len(mark) and source.read(at, len(mark)) == mark:
            return f": {hint}"
    may_be_firmware = 0 < source.size <= FIRMWARE_MAX and source.size % _FLASH_BLOCK == 0
    return ": firmware that starts in another way needs --firmware" if may_be_firmware else ""


def read_firmware(source: Source) -> FirmwareImage:
    """Read an image that the user says is firmware: its contents are not looked at.

    Raises:
        BootError: it is too large, or smaller than what the reset vector points into.
    """
    name, size = source.name, source.size
    if size < _RESET_VECTOR_SIZE:
        raise BootError(f"{name}: firmware: {size} bytes, too few for a reset vector")
    if size > FIRMWARE_MAX:
        raise BootError(
            f"{name}: firmware: {size:#x} bytes, at most {FIRMWARE_MAX // MIB} MiB are possible"
        )
    return FirmwareImage(name, source.read(0, size).rjust(align_up(size, PAGE_SIZE), _ERASED), size)


def load_firmware(image: FirmwareImage, memory: GuestMemory, config: BootConfig) -> Entry:
    """Place the copy below 1 MiB; return the processor's reset state.

    UEFI firmware in encrypted memory needs no copy, and is measured without it, as by QEMU.

    Raises:
        BootError: an option is set that firmware cannot use, or RAM does not reach 1 MiB.
    """
    refuse(image.name, "firmware", config, command_line=True, initrd=True, modules=True)
    size = min(image.size, LOW_FIRMWARE_MAX)
    if not memory.contains(LOW_FIRMWARE_END - size, size):
        raise BootError(f"{image.name}: firmware: needs 1 MiB of memory")
    if not config.encrypted:
        memory.write(LOW_FIRMWARE_END - size, image.rom[-size:])
    return RESET_VECTOR
