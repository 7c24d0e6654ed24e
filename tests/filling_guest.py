"""A guest that writes much to the disk that it boots from, and a file system that it fills.

The boot sector writes blocks of 32 KiB one after the other by the BIOS, each full of its number,
and reports each result on COM1.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests import boot_sector
from tests.boot_sector import BLOCK_SIZE, BLOCKS, DISK_SIZE, FIRST, sector_of
from vmm_kvm.block.image import Format
from vmm_kvm.images.opening import open_image

HAS_WRITTEN, WAS_REFUSED = b"=w=", b"=r="
_PACKET = 0x80  # offset in the boot sector: the parameters of INT 13h

_CODE = b"".join(
    (
        bytes.fromhex("fa"),  # cli
        bytes.fromhex("31c0"),  # xor %ax, %ax
        bytes.fromhex("8ed8"),  # mov %ax, %ds
        bytes.fromhex("8ed0"),  # mov %ax, %ss
        bytes.fromhex("bc007c"),  # mov $0x7c00, %sp
        bytes.fromhex("fb"),  # sti
        bytes.fromhex("b80020"),  # mov $0x2000, %ax
        bytes.fromhex("8ec0"),  # mov %ax, %es
        bytes.fromhex("fc"),  # cld
        bytes.fromhex("31ed"),  # xor %bp, %bp
        bytes.fromhex("45"),  # next: inc %bp
        bytes.fromhex("31ff"),  # xor %di, %di
        bytes.fromhex("b90040"),  # mov $0x4000, %cx
        bytes.fromhex("89e8"),  # mov %bp, %ax
        bytes.fromhex("f3ab"),  # rep stosw
        bytes.fromhex("be807c"),  # mov $packet, %si
        bytes.fromhex("b80043"),  # mov $0x4300, %ax
        bytes.fromhex("52"),  # push %dx
        bytes.fromhex("cd13"),  # int $0x13; %dl is the disk that we come from
        bytes.fromhex("5a"),  # pop %dx
        bytes.fromhex("b072"),  # mov $'r', %al
        bytes.fromhex("720d"),  # jc report
        bytes.fromhex("8306887c40"),  # addw $64, packet + 8
        b"\x81\xfd" + BLOCKS.to_bytes(2, "little"),  # cmp $BLOCKS, %bp
        bytes.fromhex("75dd"),  # jne next
        bytes.fromhex("b077"),  # mov $'w', %al
        bytes.fromhex("baf803"),  # report: mov $0x3f8, %dx
        bytes.fromhex("89c1"),  # mov %ax, %cx
        bytes.fromhex("b03d"),  # mov $'=', %al
        bytes.fromhex("ee"),  # out %al, %dx
        bytes.fromhex("89c8"),  # mov %cx, %ax
        bytes.fromhex("ee"),  # out %al, %dx
        bytes.fromhex("b03d"),  # mov $'=', %al
        bytes.fromhex("ee"),  # out %al, %dx
        bytes.fromhex("f4ebfd"),  # hlt; jmp . - 1
    )
)


def make_disk(path: Path, disk_format: Format) -> None:
    """Make a disk whose guest fills an eighth of it."""
    boot_sector.make_disk(path, disk_format, sector_of(_CODE, _PACKET))


def is_filled(path: Path, disk_format: Format) -> bool:
    """Tell whether the disk has all that the guest wrote, and nothing else."""
    image = open_image(str(path), disk_format, True)
    data = bytearray(DISK_SIZE)
    image.readv(0, [memoryview(data)])
    image.close()
    blocks = b"".join(
        number.to_bytes(2, "little") * (BLOCK_SIZE // 2) for number in range(1, BLOCKS + 1)
    )
    expected = sector_of(_CODE, _PACKET).ljust(FIRST * 512, b"\0") + blocks
    return bytes(data) == expected.ljust(DISK_SIZE, b"\0")


class SmallFileSystem:
    """A file system with less room than the guest needs, most of which a ballast takes."""

    def __init__(self, place: Path) -> None:
        """Take up the room in the file system at `place`."""
        self.place = place
        self._ballast = place / "ballast"
        self.fill()

    def fill(self) -> None:
        """Leave room for a quarter of the guest's writes."""
        status = os.statvfs(self.place)
        free = status.f_bavail * status.f_frsize
        with self._ballast.open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, free - BLOCKS * BLOCK_SIZE // 4)

    def free(self) -> None:
        """Make room for all of them."""
        self._ballast.unlink()


@contextmanager
def small_file_system(place: Path) -> Iterator[SmallFileSystem]:
    """Mount one; skip the test if it cannot be mounted."""
    if os.geteuid() != 0:
        pytest.skip("mounting needs root")
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=24m,mode=755", "tmpfs", str(place)]
    mounted = subprocess.run(command, check=False, capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"no tmpfs: {mounted.stderr.strip()}")
    try:
        yield SmallFileSystem(place)
    finally:
        subprocess.run(["umount", "--lazy", str(place)], check=True)
