"""Kernels that are no bzImage: which of them a file is, and how each gets into guest memory."""

from typing import assert_never

from vmm_kvm.arch.x86.boot_config import BootConfig
from vmm_kvm.arch.x86.bzimage import NEEDS_BIOS
from vmm_kvm.arch.x86.entry import Entry
from vmm_kvm.arch.x86.linux import ElfImage, load_vmlinux
from vmm_kvm.arch.x86.multiboot import MultibootImage, load_multiboot, probe_multiboot
from vmm_kvm.arch.x86.openbsd import OpenbsdImage, is_openbsd, load_openbsd, probe_openbsd
from vmm_kvm.arch.x86.pvh import PvhImage, load_pvh, pvh_entry
from vmm_kvm.boot.elf import EM_X86_64, Elf, check_high, read_elf, read_notes
from vmm_kvm.boot.source import Source
from vmm_kvm.errors import BootError
from vmm_kvm.memory import GuestMemory

KernelImage = ElfImage | PvhImage | MultibootImage | OpenbsdImage

_LINUX_NOTE_OWNER = b"Linux"
_GNU_NOTE_OWNER, _NT_GNU_ABI_TAG = b"GNU", 1
_XEN_BANNER = b"Xen version %d.%d"
"""Xen's first output; entered by Multiboot, it calls the BIOS from its very beginning."""


def probe_elf(source: Source) -> KernelImage:
    """Find out what kernel an ELF executable is, and check it; the image keeps `source`.

    Raises:
        BootError: it is damaged, or none that boots here.
    """
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


def why_not_encrypted(image: KernelImage) -> str | None:
    """Return why a kernel cannot run in encrypted memory, if it cannot."""
    match image:
        case ElfImage():
            return None
        case OpenbsdImage(elf):
            return None if elf.is_64 else f"{elf.source.name}: a 32-bit kernel, without SEV"
        case PvhImage(elf):
            return f"{elf.source.name}: its PVH entry knows no encrypted memory: boot a bzImage"
        case MultibootImage():
            return f"{image.source.name}: a Multiboot kernel knows no encrypted memory"
        case _:
            assert_never(image)


def load_kernel(image: KernelImage, memory: GuestMemory, config: BootConfig) -> Entry:
    """Place `image` and all that `config` names into `memory`; return how to enter it.

    Raises:
        BootError: something does not fit, cannot be read, or is of no use to this kind of image.
    """
    match image:
        case ElfImage():
            return load_vmlinux(image, memory, config)
        case PvhImage():
            return load_pvh(image, memory, config)
        case MultibootImage():
            return load_multiboot(image, memory, config)
        case OpenbsdImage():
            return load_openbsd(image, memory, config)
        case _:
            assert_never(image)
