"""Boot images: finding the kind of a file, and loading it into guest memory.

`open_image` decides by contents, in this order:

1. gzip data is unpacked, and must be an ELF executable;
2. an ELF executable is, by the first that it has: a PVH kernel by its note, a Multiboot kernel by
   its header, Linux or OpenBSD by their marks, and without any of these Linux if it is 64-bit and
   entered at a physical address within a segment, else OpenBSD;
3. the signature HdrS makes a Linux bzImage; any other PE executable is refused;
4. a Multiboot header makes a Multiboot kernel that says where to load it;
5. code at the reset vector makes firmware.

All checks that need no machine are done here; `load` checks sizes against its memory. `kernels`
tells kernels that are no bzImage apart, 1, 2 and 4; few machines need it.
"""

from typing import TYPE_CHECKING, NamedTuple, TypeAlias

from vmm_kvm.arch.x86.bios import FirmwareImage, load_firmware, probe_firmware, read_firmware
from vmm_kvm.arch.x86.boot_config import BootConfig, place_smbios
from vmm_kvm.arch.x86.bzimage import is_bzimage
from vmm_kvm.arch.x86.entry import Entry
from vmm_kvm.arch.x86.linux import LinuxImage, load_linux, probe_linux
from vmm_kvm.bits import MIB
from vmm_kvm.boot.elf import MAGIC
from vmm_kvm.boot.payload import payload_format, unpack
from vmm_kvm.boot.source import BytesSource, FileSource, Source
from vmm_kvm.errors import BootError
from vmm_kvm.memory import GuestMemory

if TYPE_CHECKING:
    from vmm_kvm.arch.x86.kernels import KernelImage

__all__ = [
    "BootConfig",
    "BootImage",
    "FirmwareImage",
    "LinuxImage",
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


BootImage: TypeAlias = "LinuxImage | KernelImage | FirmwareImage | RestoredImage"

_HEAD_SIZE = 8192
"""Bytes from the start of a file that tell what it is."""
_UNPACKED_MAX = 256 * MIB
"""A gzipped kernel says how large it is; more than this is not believed."""
_ARM64_MAGIC = b"ARM\x64"
_ARM64_MAGIC_AT = 56
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
    head = source.read(0, min(source.size, _HEAD_SIZE))
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
    from vmm_kvm.arch.x86.multiboot import probe_multiboot  # noqa: PLC0415 - few are none of these

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


def load(image: BootImage, memory: GuestMemory, config: BootConfig) -> Entry:
    """Place `image` and all that `config` names into `memory`; return how to enter it.

    `memory` is fresh: all of it is zero. It has to be made anew if this raises.

    Raises:
        BootError: something does not fit, cannot be read, or is of no use to this kind of image.
    """
    if config.encrypted:
        _check_encryptable(image)
    if not isinstance(image, FirmwareImage):
        place_smbios(memory, config)
    match image:
        case LinuxImage():
            return load_linux(image, memory, config)
        case FirmwareImage():
            return load_firmware(image, memory, config)
        case RestoredImage(name):
            raise BootError(f"{name}: not in the snapshot: the guest cannot be booted again")
    from vmm_kvm.arch.x86.kernels import load_kernel  # noqa: PLC0415 - for few machines

    return load_kernel(image, memory, config)


def _check_encryptable(image: BootImage) -> None:
    """Refuse an image that knows nothing of the C-bit, which its page tables would have to have.

    Raises:
        BootError: it does not, as far as that can be told.
    """
    match image:
        case FirmwareImage(name):
            if not image.is_uefi:
                text = "its disks could not reach encrypted memory: use UEFI firmware"
                raise BootError(f"{name}: {text}")
        case LinuxImage(source, header):
            if not header.is_64:
                raise BootError(f"{source.name}: a 32-bit kernel knows no encrypted memory")
        case RestoredImage():
            pass  # `load` refuses it
        case _:
            from vmm_kvm.arch.x86.kernels import why_not_encrypted  # noqa: PLC0415 - for few machines

            if (reason := why_not_encrypted(image)) is not None:
                raise BootError(reason)


def _probe_elf(source: Source) -> "KernelImage":
    from vmm_kvm.arch.x86.kernels import probe_elf  # noqa: PLC0415 - for few machines

    return probe_elf(source)
