"""Boot images: finding the kind of a file, and loading it into guest memory.

`open_image` decides by contents, in this order:

1. gzip data is unpacked, and must be an ELF executable;
2. an ELF executable is, by the first that it has: a PVH kernel by its note, a Multiboot kernel by
   its header, Linux or OpenBSD by their marks, and without any of these Linux if it is 64-bit and
   entered at a physical address within a segment, else OpenBSD;
3. the signature HdrS makes a Linux bzImage; any other PE executable is refused;
4. a Multiboot header makes a Multiboot kernel that says where to load it;
5. code at the reset vector makes firmware.

All checks that need no machine are done here; `load` checks sizes against its memory.
"""

from typing import NamedTuple, assert_never

from vmm_kvm.arch.x86.bios import FirmwareImage, load_firmware, probe_firmware, read_firmware
from vmm_kvm.arch.x86.boot_config import BootConfig, place_smbios
from vmm_kvm.arch.x86.bzimage import NEEDS_BIOS, is_bzimage
from vmm_kvm.arch.x86.entry import Entry
from vmm_kvm.arch.x86.linux import ElfImage, LinuxImage, load_linux, load_vmlinux, probe_linux
from vmm_kvm.arch.x86.multiboot import SEARCH_SIZE, MultibootImage, load_multiboot, probe_multiboot
from vmm_kvm.arch.x86.openbsd import OpenbsdImage, is_openbsd, load_openbsd, probe_openbsd
from vmm_kvm.arch.x86.pvh import PvhImage, load_pvh, pvh_entry
from vmm_kvm.bits import MIB
from vmm_kvm.boot.elf import EM_X86_64, MAGIC, Elf, check_high, read_elf, read_notes
from vmm_kvm.boot.payload import payload_format, unpack
from vmm_kvm.boot.source import BytesSource, FileSource, Source
from vmm_kvm.errors import BootError
from vmm_kvm.memory import GuestMemory

__all__ = [
    "BootConfig",
    "BootImage",
    "ElfImage",
    "FirmwareImage",
    "LinuxImage",
    "MultibootImage",
    "OpenbsdImage",
    "PvhImage",
    "RestoredImage",
    "load",
    "open_firmware",
    "open_image",
    "probe_image",
    "read_firmware",
]


class RestoredImage(NamedTuple):
    """Image of a restored guest without firmware, which continues from its saved state."""

    name: str
    """The file that it was booted from; for messages."""


BootImage = (
    LinuxImage | PvhImage | ElfImage | MultibootImage | OpenbsdImage | FirmwareImage | RestoredImage
)

_UNPACKED_MAX = 256 * MIB
"""A gzipped kernel says how large it is; more than this is not believed."""
_ARM64_MAGIC = b"ARM\x64"
_ARM64_MAGIC_AT = 56
_LINUX_NOTE_OWNER = b"Linux"
_GNU_NOTE_OWNER, _NT_GNU_ABI_TAG = b"GNU", 1
_XEN_BANNER = b"Xen version %d.%d"
"""Xen's first output; entered by Multiboot, it calls the BIOS from its very beginning."""
_DOS_MAGIC, _PE_OFFSET_AT, _PE_MAGIC = b"MZ", 0x3C, b"PE\0\0"


def open_image(path: str) -> BootImage:
    """Open the file at `path`, recognise its kind, and check it.

    The image keeps the file open, save for firmware, until it is collected.

    Raises:
        BootError: the file cannot be read, or is damaged, or nothing that boots here.
    """
    return probe_image(FileSource.open(path))


def open_firmware(path: str) -> FirmwareImage:
    """Open the file at `path` as firmware, at the user's word, without recognising its kind.

    Raises:
        BootError: the file cannot be read, or has a size that no firmware has.
    """
    return read_firmware(FileSource.open(path))


def probe_image(source: FileSource) -> BootImage:
    """Find out what `source` is, and check it; the image keeps `source`, save for firmware.

    Raises:
        BootError: it cannot be read, or is damaged, or nothing that boots here.
    """
    head = source.read(0, min(source.size, SEARCH_SIZE))
    if payload_format(head) == "gzip":
        unpacked = unpack(source.name, source.read(0, source.size), _UNPACKED_MAX)
        if not unpacked.startswith(MAGIC):
            raise BootError(f"{source.name}: gzip data, but not an ELF executable inside")
        return _probe_elf(BytesSource(source.name, unpacked))
    if head.startswith(MAGIC):
        return _probe_elf(source)
    if is_bzimage(head):
        return probe_linux(source)
    if _is_pe(head):
        advice = "boot it from a disk, with UEFI firmware"
        raise BootError(f"{source.name}: a program for EFI or Windows (PE): {advice}")
    if (image := probe_multiboot(source, None)) is not None:
        return image
    if head[_ARM64_MAGIC_AT : _ARM64_MAGIC_AT + len(_ARM64_MAGIC)] == _ARM64_MAGIC:
        raise BootError(f"{source.name}: built for AArch64, not x86")
    return probe_firmware(source)


def _is_pe(head: bytes) -> bool:
    """Tell whether a file begins as a PE executable does.

    Source: Microsoft PE format, "MS-DOS Stub" and "Signature".
    """
    if not head.startswith(_DOS_MAGIC) or len(head) < _PE_OFFSET_AT + 4:
        return False
    at = int.from_bytes(head[_PE_OFFSET_AT : _PE_OFFSET_AT + 4], "little")
    return head[at : at + len(_PE_MAGIC)] == _PE_MAGIC


def _probe_elf(source: Source) -> BootImage:
    elf = read_elf(source)
    notes = read_notes(elf)
    # Every program of GNU systems says which kernel it needs; kernels need none.
    if any(note.owner == _GNU_NOTE_OWNER and note.type == _NT_GNU_ABI_TAG for note in notes):
        raise BootError(f"{source.name}: a program for Linux, not a kernel")
    entry = pvh_entry(elf, notes)
    if entry is None and (image := probe_multiboot(source, elf)) is not None:
        if _XEN_BANNER in source.read(0, source.size):
            raise BootError(f"{source.name}: Xen {NEEDS_BIOS}")
        return image
    check_high(elf)
    if entry is not None:
        return PvhImage(elf, entry)
    if any(note.owner == _LINUX_NOTE_OWNER for note in notes):
        return _probe_vmlinux(elf)
    if not is_openbsd(elf, notes) and elf.is_64 and elf.holds_physical(elf.entry):
        return _probe_vmlinux(elf)
    return probe_openbsd(elf)


def _probe_vmlinux(elf: Elf) -> ElfImage:
    if not elf.is_64 or elf.machine != EM_X86_64:
        raise BootError(f"{elf.source.name}: a 32-bit vmlinux without a PVH entry is not supported")
    if not elf.holds_physical(elf.entry):
        raise BootError(f"{elf.source.name}: entry {elf.entry:#x}: outside the kernel")
    return ElfImage(elf)


def load(image: BootImage, memory: GuestMemory, config: BootConfig) -> Entry:
    """Place `image` and all that `config` names into `memory`; return how to enter it.

    `memory` is fresh: all of it is zero. It has to be made anew if this raises.

    Raises:
        BootError: something does not fit, cannot be read, or is of no use to this kind of image.
    """
    if not isinstance(image, FirmwareImage):
        place_smbios(memory, config)
    match image:
        case LinuxImage():
            return load_linux(image, memory, config)
        case ElfImage():
            return load_vmlinux(image, memory, config)
        case PvhImage():
            return load_pvh(image, memory, config)
        case MultibootImage():
            return load_multiboot(image, memory, config)
        case OpenbsdImage():
            return load_openbsd(image, memory, config)
        case FirmwareImage():
            return load_firmware(image, memory, config)
        case RestoredImage(name):
            raise BootError(f"{name}: not in the snapshot: the guest cannot be booted again")
        case _:
            assert_never(image)
