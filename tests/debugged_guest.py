"""A guest for debuggers: two processors that count for ever, at known addresses.

Real mode; the code is copied to low RAM, so that RIP is the linear address.
"""

from __future__ import annotations

from tests.guests import ENABLE_X2APIC

MAIN = 0x5000
AFTER_COUNTING = MAIN + 5
AFTER_NOP = MAIN + 6
JUMP = MAIN + 8
END = 0x5040
"""Code that ends the VM; the guest itself never reaches it."""
END_STATUS = 0x07 << 1 | 1
SECOND = 0x6009
SECOND_JUMP = 0x600E
COUNTER = 0x3000
SECOND_COUNTER = 0x3004

_SIZE = 64 << 10
_RESET = bytes.fromhex("ea000000f0")  # ljmp $0xf000, $0
_FIRST_AT, _END_AT, _SECOND_AT = 0x200, 0x240, 0x300

_START = b"".join(
    (
        bytes.fromhex("fa"),  # cli
        bytes.fromhex("31c0"),  # xor %ax, %ax
        bytes.fromhex("8ed8"),  # mov %ax, %ds
        bytes.fromhex("8ec0"),  # mov %ax, %es
        bytes.fromhex("8ed0"),  # mov %ax, %ss
        bytes.fromhex("bc0070"),  # mov $0x7000, %sp
        bytes.fromhex("fc"),  # cld
        bytes.fromhex("be0002"),  # mov $0x200, %si
        bytes.fromhex("bf0050"),  # mov $0x5000, %di
        bytes.fromhex("b90001"),  # mov $0x100, %cx
        bytes.fromhex("2ef3a4"),  # rep movsb %cs:(%si), (%di)
        bytes.fromhex("be0003"),  # mov $0x300, %si
        bytes.fromhex("bf0060"),  # mov $0x6000, %di
        bytes.fromhex("b94000"),  # mov $0x40, %cx
        bytes.fromhex("2ef3a4"),  # rep movsb %cs:(%si), (%di)
        ENABLE_X2APIC,
        bytes.fromhex("66b930080000"),  # mov $0x830, %ecx
        bytes.fromhex("66b800450c00"),  # mov $0xc4500, %eax
        bytes.fromhex("0f30"),  # wrmsr
        bytes.fromhex("66b806460c00"),  # mov $0xc4606, %eax
        bytes.fromhex("0f30"),  # wrmsr
        bytes.fromhex("ea00500000"),  # ljmp $0, $0x5000
    )
)
_FIRST = b"".join(
    (
        bytes.fromhex("66ff060030"),  # main: incl 0x3000
        bytes.fromhex("90"),  # nop
        bytes.fromhex("6643"),  # inc %ebx
        bytes.fromhex("ebf6"),  # jmp main
    )
)
_END = bytes.fromhex("b007e6f4")  # mov $7, %al; out %al, $0xf4
_SECOND = b"".join(
    (
        bytes.fromhex("ea05600000"),  # ljmp $0, $0x6005
        bytes.fromhex("31c0"),  # xor %ax, %ax
        bytes.fromhex("8ed8"),  # mov %ax, %ds
        bytes.fromhex("66ff060430"),  # second: incl 0x3004
        bytes.fromhex("ebf9"),  # jmp second
    )
)


def make() -> bytes:
    """Return the guest as a flat firmware image."""
    image = bytearray(_SIZE)
    for at, code in (
        (0, _START),
        (_FIRST_AT, _FIRST),
        (_END_AT, _END),
        (_SECOND_AT, _SECOND),
        (_SIZE - 16, _RESET),
    ):
        image[at : at + len(code)] = code
    return bytes(image)
