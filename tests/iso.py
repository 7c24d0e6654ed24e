"""Bootable CD-ROM images of a few sectors, without a file system."""

from __future__ import annotations

import struct

SECTOR = 2048
_BOOT_RECORD, _TERMINATOR, _CATALOG = 17, 18, 19
BOOT_IMAGE = 20
"""The number of the boot image's sector."""
_X86, _NO_EMULATION, _BOOTABLE = 0, 0, 0x88
_SYSTEM = b"EL TORITO SPECIFICATION"
_LOADED_SECTORS = 4  # of 512 bytes


def bootable_iso(code: bytes, *further: bytes) -> bytes:
    """Return an image that boots `code`, at most 2048 bytes, at 0x7c00.

    `further` sectors follow from number 21 on.

    Source: El Torito 1.0 §2, figures 2, 3 and 7
    """
    validation = bytearray(struct.pack("<BBxx24sH2s", 1, _X86, b"test", 0, b"\x55\xaa"))
    total = sum(struct.unpack("<16H", validation))
    struct.pack_into("<H", validation, 28, -total & 0xFFFF)
    entry = struct.pack("<BBHBxHI", _BOOTABLE, _NO_EMULATION, 0, 0, _LOADED_SECTORS, BOOT_IMAGE)
    sectors = {
        _BOOT_RECORD: struct.pack("<B5sB32s32xI", 0, b"CD001", 1, _SYSTEM, _CATALOG),
        _TERMINATOR: struct.pack("<B5sB", 255, b"CD001", 1),
        _CATALOG: bytes(validation) + entry,
        BOOT_IMAGE: code,
    }
    sectors.update(enumerate(further, BOOT_IMAGE + 1))
    image = bytearray(SECTOR * (max(sectors) + 1))
    for number, data in sectors.items():
        image[number * SECTOR : number * SECTOR + len(data)] = data
    return bytes(image)
