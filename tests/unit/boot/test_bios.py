"""Firmware: the place of a flat image, and files that are none."""

from __future__ import annotations

import bz2
import gzip
import lzma
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.unit.boot.images import firmware, multiboot_header
from vmm_kvm.arch.x86.acpi import AcpiConfig, build_tables
from vmm_kvm.arch.x86.entry import RESET_VECTOR
from vmm_kvm.arch.x86.image import (
    BootConfig,
    BootImage,
    FirmwareImage,
    load,
    open_firmware,
    open_image,
)
from vmm_kvm.arch.x86.layout import ram_ranges
from vmm_kvm.arch.x86.multiboot import MultibootImage
from vmm_kvm.bits import GIB, KIB, MIB
from vmm_kvm.errors import BootError
from vmm_kvm.memory import GuestMemory

Open = Callable[[bytes], BootImage]


def _open(open_bytes: Open, data: bytes) -> FirmwareImage:
    image = open_bytes(data)
    assert isinstance(image, FirmwareImage)
    return image


@pytest.mark.parametrize("size", [16, 4095, 4096, 4097, 64 * KIB, 256 * KIB, 16 * MIB])
def test_ends_at_4_gib(open_bytes: Open, size: int) -> None:
    """An image of any size ends at 4 GiB, padded at its front to whole pages of erased flash."""
    data = firmware(size)
    image = _open(open_bytes, data)
    padding = -size % 4096
    assert (b"\xff" * padding + data, 4 * GIB - size - padding) == (image.rom, image.rom_base)


@pytest.mark.parametrize(("size", "low"), [(100, 100), (64 * KIB,) * 2, (MIB, 256 * KIB)])
def test_copy_below_1_mib(open_bytes: Open, memory: GuestMemory, size: int, low: int) -> None:
    """The end of the image, at most 256 KiB, also ends at 1 MiB; nothing is before it."""
    data = firmware(size)
    entry = load(_open(open_bytes, data), memory, BootConfig())
    assert entry == RESET_VECTOR
    assert bytes(16) + data[-low:] == memory.read(MIB - low - 16, low + 16)


def test_acpi_tables_are_left_to_firmware(open_bytes: Open, memory: GuestMemory) -> None:
    """Firmware installs the tables itself: none are placed in its way."""
    load(_open(open_bytes, firmware()), memory, BootConfig(acpi=build_tables(AcpiConfig())))
    assert bytes(64) == memory.read(0xE_0000, 64)


def test_smallest_machine(open_bytes: Open) -> None:
    """1 MiB of RAM is enough."""
    with GuestMemory(ram_ranges(MIB)) as memory:
        assert load(_open(open_bytes, firmware()), memory, BootConfig()) == RESET_VECTOR


def test_too_large(open_bytes: Open) -> None:
    """More than 16 MiB would cover other parts below 4 GiB, and is refused."""
    with pytest.raises(BootError) as caught:
        open_bytes(firmware(16 * MIB + 1))
    assert str(caught.value).endswith(
        "image: firmware: 0x1000001 bytes, at most 16 MiB are possible"
    )


@pytest.mark.parametrize(
    "data",
    [
        b"x",
        b"\xea" * 15,
        bytes(4096),
        b"\xff" * 4096,
        b"#/bin/sh\n" * 100,
        b"\x0f\x0b" * 100,
    ],
)
def test_anything_else(open_bytes: Open, data: bytes) -> None:
    """A file without code at the reset vector is refused as nothing that boots."""
    with pytest.raises(BootError) as caught:
        open_bytes(data)
    assert str(caught.value).endswith("image: not a kernel or firmware image")


@pytest.mark.parametrize(
    ("data", "hint"),
    [
        (b"QFI\xfb" + bytes(4096), "a qcow2 image, which is a disk"),
        (bytes(0x8001) + b"CD001" + bytes(4096), "a disc image, for the CD-ROM drive"),
        (bytes(510) + b"\x55\xaa" + bytes(4096), "it begins as a disk does"),
        (b"\x55\xaa\x40\xeb\x10" + bytes(4096), "an option ROM of a card"),
        (b"070701" + bytes(4096), "an initial RAM disk: use --initrd, with a kernel"),
        (b"#!/bin/sh\n", "a script"),
        (lzma.compress(bytes(4096)), "compressed by xz: unpack it first"),
        (bz2.compress(bytes(4096)), "compressed by bzip2: unpack it first"),
        (b"PK\x03\x04" + bytes(4096), "a zip archive: unpack it first"),
        (b"!<arch>\ndebian-binary   ", "a package or library: unpack it first"),
        (b"\x27\x05\x19\x56" + bytes(4096), "an image for U-Boot"),
        (b"\xd0\x0d\xfe\xed" + bytes(4096), "a device tree, or an image for U-Boot"),
        (b"ANDROID!" + bytes(4096), "an Android boot image"),
        (b"\xcf\xfa\xed\xfe" + bytes(4096), "a program for macOS"),
        (b"\xd6\x50\x52\xe8" + bytes(4096), "a Multiboot 2 kernel, which is not supported"),
        (
            bytes(40) + b"_FVH" + bytes(4096),
            "the variables of UEFI firmware: use --firmware uefi, with --nvram",
        ),
    ],
)
def test_a_disk_is_no_kernel(open_bytes: Open, data: bytes, hint: str) -> None:
    """A disk or disc given as a kernel is refused with the option to use."""
    with pytest.raises(BootError) as caught:
        open_bytes(data)
    assert str(caught.value).endswith(f"image: not a kernel or firmware image: {hint}")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (BootConfig(command_line="quiet"), "image: firmware takes no command line: 'quiet'"),
        (BootConfig(initrd=("rd", "more")), "image: firmware takes no initrd: rd"),
        (BootConfig(modules=(("m", ""),)), "image: firmware takes no modules: m"),
    ],
)
def test_options_of_no_use(
    open_bytes: Open, memory: GuestMemory, config: BootConfig, message: str
) -> None:
    """Options that firmware cannot use are refused, naming both."""
    with pytest.raises(BootError) as caught:
        load(open_bytes(firmware()), memory, config)
    assert str(caught.value).endswith(message)


def test_empty_command_line(open_bytes: Open, memory: GuestMemory) -> None:
    """An empty command line is accepted."""
    assert load(open_bytes(firmware()), memory, BootConfig(command_line="")) == RESET_VECTOR


def test_selftest_image() -> None:
    """The self-test guest of this project is firmware."""
    path = Path(__file__).parents[3] / "bios" / "selftest.bin"
    assert isinstance(open_image(str(path)), FirmwareImage)


BUILDS = (
    *Path("/usr/share/OVMF").glob("OVMF*CODE*.fd"),
    *Path("/usr/share/ovmf").glob("OVMF*.fd"),
    *Path("/usr/share/qemu").glob("OVMF*.fd"),
)


@pytest.mark.parametrize("path", sorted(BUILDS), ids=str)
def test_builds_of_ovmf(path: Path) -> None:
    """Each build that Debian ships is firmware, even one that starts in another mode."""
    for image in (open_image(str(path)), open_firmware(str(path))):
        assert isinstance(image, FirmwareImage)
        assert image.is_uefi


@pytest.mark.parametrize(
    "path",
    [
        "/usr/share/seabios/bios.bin",
        "/usr/share/seabios/bios-256k.bin",
        "/usr/share/seabios/bios-microvm.bin",
        "/usr/share/qemu/qboot.rom",
    ],
)
def test_builds_of_other_firmware(path: str) -> None:
    """SeaBIOS, also for a machine without PCI, and qboot are firmware, and no UEFI firmware."""
    if not Path(path).exists():
        pytest.skip(f"{path} is not installed")
    for image in (open_image(path), open_firmware(path)):
        assert isinstance(image, FirmwareImage)
        assert not image.is_uefi


@pytest.mark.parametrize(
    "data",
    [
        bytes(16),
        bytes(64 * KIB),  # nothing but zeros
        b"\xff" * MIB,  # erased flash
        bytes(5000),  # no whole pages
        bytes(16 * MIB),  # as large as possible
        gzip.compress(firmware()),
        b"\x7fELF\x02\x01\x01".ljust(64 * KIB, b"\0"),
        b"MZ".ljust(64 * KIB, b"\0"),
        b"QFI\xfb".ljust(64 * KIB, b"\0"),
        (bytes(40) + b"_FVH").ljust(64 * KIB, b"\0"),
        b"\x55\xaa\x40\xeb".ljust(64 * KIB, b"\0"),
        b"#!/bin/sh\n" * 100,
        bytes(64 * KIB - 16) + b"\xf4".ljust(16, b"\0"),  # begins with hlt
        bytes(64 * KIB - 16) + b"\x31\xc0".ljust(16, b"\0"),  # xor %eax, %eax
    ],
)
def test_nothing_is_guessed_of_firmware(data: bytes, tmp_path: Path) -> None:
    """What `--firmware` names lies below 4 GiB as it is, whatever it looks like."""
    path = tmp_path / "rom"
    path.write_bytes(data)
    image = open_firmware(str(path))
    assert bytes(image.rom).endswith(data)
    assert image.rom_base + len(image.rom) == 4 * GIB
    assert image.rom_base % (4 * KIB) == 0
    assert set(bytes(image.rom)[: -len(data)]) <= {0xFF}


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (lambda path: path.write_bytes(b""), "empty file"),
        (lambda path: path.write_bytes(bytes(15)), "15 bytes, too few for a reset vector"),
        (lambda path: path.write_bytes(bytes(16 * MIB + 1)), "at most 16 MiB are possible"),
        (lambda path: path.mkdir(), "is a directory"),
        (os.mkfifo, "not a regular file"),
        (lambda path: path.symlink_to(path), "Too many levels of symbolic links"),
        (lambda path: path.symlink_to("/dev/zero"), "not a regular file"),
        (lambda _: None, "No such file or directory"),
    ],
)
def test_what_no_firmware_is_in(make: Callable[[Path], object], why: str, tmp_path: Path) -> None:
    """A file of no possible size, or none at all, is refused."""
    path = tmp_path / "rom"
    make(path)
    with pytest.raises(BootError) as caught:
        open_firmware(str(path))
    assert str(caught.value).endswith(why)


def test_firmware_that_starts_in_another_way(open_bytes: Open) -> None:
    """An image that could be firmware, but starts in an unknown way, is told to need --firmware."""
    with pytest.raises(BootError) as caught:
        open_bytes(bytes(128 * KIB - 16) + b"\x31\xc0".ljust(16, b"\0"))
    assert str(caught.value).endswith(
        "image: not a kernel or firmware image: firmware that starts in another way needs"
        " --firmware"
    )


def test_what_is_said_to_be_firmware_is_not_guessed(tmp_path: Path) -> None:
    """With --firmware a ROM with a Multiboot header, or with any reset vector, is firmware."""
    path = tmp_path / "rom"
    path.write_bytes(multiboot_header(0x1_0000, (MIB, MIB, 0, 0, MIB)).ljust(64 * KIB, b"\0"))
    assert isinstance(open_image(str(path)), MultibootImage)
    assert isinstance(open_firmware(str(path)), FirmwareImage)
    path.write_bytes(bytes(15))
    with pytest.raises(BootError, match="rom: firmware: 15 bytes, too few for a reset vector"):
        open_firmware(str(path))


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("/bin/ls", "a program or library of an operating system, not a kernel"),
        ("/bin/busybox", "a program for Linux, not a kernel"),
    ],
)
def test_programs_are_named_as_what_they_are(path: str, message: str) -> None:
    """A program of the host, dynamic or static, is no kernel."""
    with pytest.raises(BootError) as caught:
        open_image(path)
    assert message in str(caught.value)


def test_an_efi_program_is_named_as_what_it_is(open_bytes: Open) -> None:
    """A PE executable that is no Linux kernel is for EFI, or Windows; MZ alone means nothing."""
    header = b"MZ".ljust(0x3C, b"\0") + (0x80).to_bytes(4, "little")
    with pytest.raises(BootError, match="a program for EFI or Windows") as caught:
        open_bytes((header.ljust(0x80, b"\0") + b"PE\0\0").ljust(4096, b"\0"))
    assert str(caught.value).endswith("(PE): boot it from a disk, with UEFI firmware")
    with pytest.raises(BootError, match="not a kernel or firmware image"):
        open_bytes(header.ljust(4096, b"\0"))
