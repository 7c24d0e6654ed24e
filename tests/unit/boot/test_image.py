"""Recognising the kind of a file."""

from __future__ import annotations

import gzip
from collections.abc import Callable
from dataclasses import replace

import pytest

from tests.unit.boot.images import (
    CODE,
    EM_386,
    KERNEL_ADDRESS,
    BzImage,
    ElfSpec,
    Section,
    Segment,
    firmware,
    multiboot_elf,
    multiboot_flat,
    multiboot_header,
    note,
    note_segment,
    openbsd_kernel,
    pvh_kernel,
    vmlinux,
)
from vmm_kvm.arch.x86.image import (
    BootImage,
    FirmwareImage,
    LinuxImage,
)
from vmm_kvm.arch.x86.linux import ElfImage
from vmm_kvm.arch.x86.multiboot import MultibootImage
from vmm_kvm.arch.x86.openbsd import OpenbsdImage
from vmm_kvm.arch.x86.pvh import PvhImage
from vmm_kvm.errors import BootError

Open = Callable[[bytes], BootImage]

PVH_NOTE = note(b"Xen", 18, KERNEL_ADDRESS.to_bytes(4, "little"))
LINUX_NOTE = note(b"Linux", 0, b"6.1\0")
OPENBSD_NOTE = note(b"OpenBSD", 1, bytes(4))
SECTIONS = (Section(b".strtab", 3, b"\0"),)


def _elf(*notes: bytes, spec: ElfSpec | None = None) -> bytes:
    spec = spec or ElfSpec(sections=SECTIONS)
    return replace(spec, segments=(Segment(CODE), note_segment(*notes))).build()


@pytest.mark.parametrize(
    ("data", "kind"),
    [
        (BzImage().build(), LinuxImage),
        (vmlinux(), ElfImage),
        (pvh_kernel(), PvhImage),
        (multiboot_elf(), MultibootImage),
        (multiboot_elf(is_64=True), MultibootImage),
        (multiboot_flat(), MultibootImage),
        (openbsd_kernel(), OpenbsdImage),
        (openbsd_kernel(is_64=False), OpenbsdImage),
        (firmware(), FirmwareImage),
    ],
)
def test_kinds(open_bytes: Open, data: bytes, kind: type) -> None:
    """Each kind of image is recognised by its contents."""
    assert kind is type(open_bytes(data))


@pytest.mark.parametrize(
    ("data", "kind"),
    [
        (_elf(LINUX_NOTE, PVH_NOTE), PvhImage),
        (
            _elf(PVH_NOTE, spec=ElfSpec(prefix=multiboot_header(), sections=SECTIONS)),
            PvhImage,
        ),
        (
            _elf(LINUX_NOTE, spec=ElfSpec(prefix=multiboot_header(), sections=SECTIONS)),
            MultibootImage,
        ),
        (_elf(LINUX_NOTE, OPENBSD_NOTE), ElfImage),
        (_elf(OPENBSD_NOTE), OpenbsdImage),
        (_elf(), ElfImage),
        (_elf(spec=ElfSpec(entry=0xFFFF_FFFF_8100_0000, sections=SECTIONS)), OpenbsdImage),
        (_elf(spec=ElfSpec(is_64=False, machine=EM_386, sections=SECTIONS)), OpenbsdImage),
    ],
)
def test_order_of_marks(open_bytes: Open, data: bytes, kind: type) -> None:
    """The first mark of an executable with several decides; one without any is guessed."""
    assert kind is type(open_bytes(data))


@pytest.mark.parametrize(
    ("data", "kind"),
    [(pvh_kernel(), PvhImage), (vmlinux(), ElfImage), (openbsd_kernel(), OpenbsdImage)],
)
def test_gzipped_executables(open_bytes: Open, data: bytes, kind: type) -> None:
    """Any executable may be gzipped."""
    assert kind is type(open_bytes(gzip.compress(data)))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (gzip.compress(firmware()), "image: gzip data, but not an ELF executable inside"),
        (gzip.compress(vmlinux())[:-100], "image: gzip payload: "),
        (b"\x1f\x8b", "image: gzip payload: truncated"),
        (ElfSpec(machine=183).build(), "image: built for AArch64, not x86"),
        (
            bytes(56) + b"ARM\x64" + bytes(100),
            "image: built for AArch64, not x86",
        ),
        (
            ElfSpec(
                is_64=False, machine=EM_386, segments=(Segment(CODE), note_segment(LINUX_NOTE))
            ).build(),
            "image: a 32-bit vmlinux without a PVH entry is not supported",
        ),
        (_elf(LINUX_NOTE, spec=ElfSpec(entry=0x1234)), "image: entry 0x1234: outside the kernel"),
    ],
)
def test_nothing_that_boots(open_bytes: Open, data: bytes, message: str) -> None:
    """A file that is almost an image is reported by its real kind."""
    with pytest.raises(BootError) as caught:
        open_bytes(data)
    assert message in str(caught.value)


def test_gzip_bomb(open_bytes: Open) -> None:
    """A small file that claims to unpack to more than any kernel is refused by that claim."""
    packed = gzip.compress(bytes(100))[:-4] + b"\xff" * 4
    with pytest.raises(BootError, match="unpacks to 0xffffffff bytes, not 0x10000000 or less"):
        open_bytes(packed)
