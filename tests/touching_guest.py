"""A guest that touches much of its memory, and then echoes its input on COM1."""

from __future__ import annotations

import struct

from tests import guests

READY = b"R"
_SIZE, _GDT_AT = 64 << 10, 0x100
_BASE = (1 << 32) - _SIZE
_START, _PAGE = 16 << 20, 4096


def touching_guest(size: int) -> bytes:
    """Return a flat firmware image; it touches each page of `size` bytes, from 16 MiB on."""
    code = b"".join(
        (
            guests.REACH_ALL,
            b"\x66\xbe" + struct.pack("<I", _START),  # mov $start, %esi
            b"\x66\xb9" + struct.pack("<I", size // _PAGE),  # mov $pages, %ecx
            bytes.fromhex("66678936"),  # touch: mov %esi, (%esi)
            b"\x66\x81\xc6" + struct.pack("<I", _PAGE),  # add $4096, %esi
            bytes.fromhex("67e2f2"),  # loopl touch
            bytes.fromhex("baf803"),  # mov $0x3f8, %dx
            bytes.fromhex("b052"),  # mov $'R', %al
            bytes.fromhex("ee"),  # echo: out %al, %dx
            bytes.fromhex("bafd03"),  # wait: mov $0x3fd, %dx
            bytes.fromhex("ec"),  # in %dx, %al
            bytes.fromhex("2401"),  # and $1, %al
            bytes.fromhex("74fb"),  # jz wait + 3
            bytes.fromhex("baf803"),  # mov $0x3f8, %dx
            bytes.fromhex("ec"),  # in %dx, %al
            bytes.fromhex("ebf1"),  # jmp echo
        )
    )
    gdt = struct.pack("<HI2x", 0x17, _BASE + _GDT_AT) + bytes(8) + bytes.fromhex("ffff00000093cf00")
    image = bytearray(_SIZE)
    image[: len(code)] = code
    image[_GDT_AT : _GDT_AT + len(gdt)] = gdt
    image[-16:-13] = b"\xe9\x0d\x00"  # jmp 0, around 64 KiB
    return bytes(image)
