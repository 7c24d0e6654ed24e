"""Disks with a boot sector that moves blocks by the BIOS: what their guests have in common."""

from __future__ import annotations

from pathlib import Path

from vmm_kvm.block.image import Format
from vmm_kvm.images.create import create_image
from vmm_kvm.images.opening import open_image

BLOCKS = 64
BLOCK_SIZE = 32 << 10
DISK_SIZE = 16 << 20
FIRST = 64
"""The sector of the first block."""


def sector_of(code: bytes, packet: int) -> bytes:
    """Return a boot sector.

    At offset `packet` are the parameters of INT 13h: those of the first block, whose contents are
    at 2000:0000.
    """
    assert len(code) <= packet
    parameters = b"\x10\x00\x40\x00" + (0x2000 << 16).to_bytes(4, "little")
    parameters += FIRST.to_bytes(8, "little")
    return (code.ljust(packet, b"\0") + parameters).ljust(510, b"\0") + b"\x55\xaa"


def make_disk(path: Path, disk_format: Format, sector: bytes) -> None:
    """Make a disk that boots."""
    create_image(str(path), disk_format, DISK_SIZE)
    image = open_image(str(path), disk_format, False)
    image.writev(0, [memoryview(sector)])
    image.close()
