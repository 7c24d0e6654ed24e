"""A guest that has its TPM execute commands, and writes the responses to COM1."""

from __future__ import annotations

import struct
from collections.abc import Sequence

from tests import guests, tpm_commands

SECRET = b"swordfish"
READY = b"selftest: done"
"""Written behind the last response; the next byte of input resets the machine."""

_SIZE, _GDT_AT, _TABLE_AT, _READY_AT = 64 << 10, 0x100, 0x400, 0x200
_BASE = (1 << 32) - _SIZE
_SHOW = b"".join(
    (
        bytes.fromhex("baf803"),  # mov $0x3f8, %dx
        bytes.fromhex("678a03"),  # 1: mov (%ebx), %al
        bytes.fromhex("ee"),  # out %al, %dx
        bytes.fromhex("6643"),  # inc %ebx
        bytes.fromhex("6649"),  # dec %ecx
        bytes.fromhex("75f6"),  # jnz 1b
    )
)
_RUN = b"".join(
    (
        bytes.fromhex("66bf0000d4fe"),  # mov $0xfed40000, %edi
        bytes.fromhex("6766c7470801000000"),  # movl $1, 8(%edi): locality 0
        b"\x66\xbe" + struct.pack("<I", _BASE + _TABLE_AT),  # mov $table, %esi
        bytes.fromhex("67668b0e"),  # next: mov (%esi), %ecx
        bytes.fromhex("6683c604"),  # add $4, %esi
        bytes.fromhex("6685c9"),  # test %ecx, %ecx
        bytes.fromhex("744b"),  # jz end
        bytes.fromhex("67668d9f80000000"),  # lea 0x80(%edi), %ebx
        bytes.fromhex("678a06"),  # copy: mov (%esi), %al
        bytes.fromhex("678803"),  # mov %al, (%ebx)
        bytes.fromhex("6646"),  # inc %esi
        bytes.fromhex("6643"),  # inc %ebx
        bytes.fromhex("6649"),  # dec %ecx
        bytes.fromhex("75f2"),  # jnz copy
        bytes.fromhex("6766c7474c01000000"),  # movl $1, 0x4c(%edi): start
        bytes.fromhex("67668b474c"),  # poll: mov 0x4c(%edi), %eax
        bytes.fromhex("6685c0"),  # test %eax, %eax
        bytes.fromhex("75f6"),  # jnz poll
        bytes.fromhex("67668b8f82000000"),  # mov 0x82(%edi), %ecx: the response's size
        bytes.fromhex("660fc9"),  # bswap %ecx
        bytes.fromhex("67668d9f80000000"),  # lea 0x80(%edi), %ebx
        _SHOW,
        bytes.fromhex("eba8"),  # jmp next
        b"\x66\xbb" + struct.pack("<I", _BASE + _READY_AT),  # end: mov $ready, %ebx
        b"\x66\xb9" + struct.pack("<I", len(READY)),  # mov $size, %ecx
        _SHOW,
        bytes.fromhex("bafd03"),  # mov $0x3fd, %dx
        bytes.fromhex("ec"),  # wait: in %dx, %al
        bytes.fromhex("a801"),  # test $1, %al
        bytes.fromhex("74fb"),  # jz wait
        bytes.fromhex("b0fe"),  # mov $0xfe, %al
        bytes.fromhex("e664"),  # out %al, $0x64: reset
        bytes.fromhex("f4"),  # hlt
    )
)


def keeper() -> bytes:
    """Return a guest that keeps a secret in its TPM."""
    return _guest((tpm_commands.define(len(SECRET)), tpm_commands.write(SECRET)))


def reader() -> bytes:
    """Return a guest that reads the secret, and shows it if the TPM has it."""
    return _guest((tpm_commands.read(len(SECRET)),))


def _guest(commands: Sequence[bytes]) -> bytes:
    code = guests.REACH_ALL + _RUN
    gdt = struct.pack("<HI2x", 0x17, _BASE + _GDT_AT) + bytes(8) + bytes.fromhex("ffff00000093cf00")
    table = b"".join(
        struct.pack("<I", len(command)) + command for command in (tpm_commands.STARTUP, *commands)
    )
    image = bytearray(_SIZE)
    for at, part in ((0, code), (_GDT_AT, gdt), (_READY_AT, READY), (_TABLE_AT, table)):
        image[at : at + len(part)] = part
    image[-16:-13] = b"\xe9\x0d\x00"  # jmp 0, around 64 KiB
    return bytes(image)
