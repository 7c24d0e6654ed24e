"""A guest that writes to the disk that it boots from for ever, and verifies it.

The boot sector goes round blocks of 32 KiB by the BIOS: it reads one, compares its first word with
what it has written there a round before, fills it with the next number, and writes it back. Each
round is reported on COM1, and so is a block that is not as it was written, after which it halts.
"""

from __future__ import annotations

from pathlib import Path

from tests import boot_sector
from tests.boot_sector import BLOCK_SIZE, BLOCKS, FIRST, sector_of
from vmm_kvm.block.image import Format
from vmm_kvm.images.opening import open_image

_PACKET = 0x100  # offset in the boot sector: the parameters of INT 13h
_LBA = 0x7C00 + _PACKET + 8


def _code() -> bytes:
    """Return the boot sector's instructions; the number of the next block is in %bp."""
    report = bytes.fromhex("baf803") + b"".join(
        b"\xb0" + bytes([letter]) + b"\xee" for letter in b"=go="
    )
    refuse = bytes.fromhex("baf803") + b"".join(
        b"\xb0" + bytes([letter]) + b"\xee" for letter in b"=no="
    )
    begin = b"".join(
        (
            bytes.fromhex("fa31c08ed88ed0bc007cfb"),  # cli; %ds = %ss = 0; %sp = 0x7c00; sti
            bytes.fromhex("b800208ec0fc31ed"),  # %es = 0x2000; cld; %bp = 0
        )
    )
    block = [
        bytes.fromhex("45"),  # next: inc %bp
        bytes.fromhex("89e84883e03f"),  # %ax = (%bp - 1) & 63
        bytes.fromhex("c1e006"),  # shl $6, %ax
        bytes.fromhex("83c040"),  # add $64, %ax
        b"\xa3" + _LBA.to_bytes(2, "little"),  # mov %ax, packet + 8
        b"\xbe" + (0x7C00 + _PACKET).to_bytes(2, "little"),  # mov $packet, %si
        bytes.fromhex("b8004252cd135a"),  # %ax = 0x4200; push %dx; int $0x13; pop %dx
    ]
    # jc refuse; is it the first round? then no comparison
    compare = [
        bytes.fromhex("31db"),  # xor %bx, %bx
        bytes.fromhex("83fd40"),  # cmp $64, %bp
        bytes.fromhex("7605"),  # jbe same (over the next two instructions)
        bytes.fromhex("89eb"),  # mov %bp, %bx
        bytes.fromhex("83eb40"),  # sub $64, %bx
        bytes.fromhex("26391e0000"),  # same: cmp %bx, %es:0
    ]
    fill = [
        bytes.fromhex("31ffb9004089e8f3ab"),  # %di = 0; %cx = 0x4000; %ax = %bp; rep stosw
        b"\xbe" + (0x7C00 + _PACKET).to_bytes(2, "little"),  # mov $packet, %si
        bytes.fromhex("b8004352cd135a"),  # %ax = 0x4300; push %dx; int $0x13; pop %dx
    ]
    again = bytes.fromhex("f7c53f00")  # test $63, %bp
    head, middle, tail = b"".join(block), b"".join(compare), b"".join(fill)
    # The jumps, all of which are near: jc and jne to `refuse`, jnz and jmp to `next`.
    size = len(head) + 4 + len(middle) + 4 + len(tail) + 4 + len(again) + 4
    whole = size + 0 + _SAVE_SIZE + len(report) + _SAVE_SIZE + 3
    loop = head
    loop += b"\x0f\x82" + (whole - len(loop) - 4).to_bytes(2, "little")
    loop += middle
    loop += b"\x0f\x85" + (whole - len(loop) - 4).to_bytes(2, "little")
    loop += tail
    loop += b"\x0f\x82" + (whole - len(loop) - 4).to_bytes(2, "little")
    loop += again
    loop += b"\x0f\x85" + (-len(loop) - 4 & 0xFFFF).to_bytes(2, "little")
    loop += b"\x52" + report + b"\x5a"  # push %dx; …; pop %dx
    loop += b"\xe9" + (-len(loop) - 3 & 0xFFFF).to_bytes(2, "little")
    assert len(loop) == whole
    return begin + loop + refuse + bytes.fromhex("f4ebfd")  # hlt; jmp . - 1


_SAVE_SIZE = 1  # push or pop


def make_disk(path: Path, disk_format: Format) -> None:
    """Make a disk whose guest writes to it."""
    boot_sector.make_disk(path, disk_format, sector_of(_code(), _PACKET))


def written(path: Path, disk_format: Format) -> int:
    """Return the number of the last block that a guest has written; fail if an earlier one lacks.

    A guest that was stopped may have been in the middle of one.
    """
    image = open_image(str(path), disk_format, True)
    data = bytearray(BLOCKS * BLOCK_SIZE)
    image.readv(FIRST * 512, [memoryview(data)])
    image.close()
    numbers = []
    for at in range(0, len(data), BLOCK_SIZE):
        words = {
            int.from_bytes(data[word : word + 2], "little")
            for word in range(at, at + BLOCK_SIZE, 2)
        }
        assert len(words) <= 2, f"block {at // BLOCK_SIZE}: {sorted(words)}"
        numbers.append(max(words))
    last = max(numbers)
    for number in range(max(1, last - BLOCKS + 1), last):
        assert numbers[(number - 1) % BLOCKS] == number, f"{last} is there, {number} is not"
    return last
