"""Start programs with some of descriptors 0 to 2 closed, as a shell's `<&-` and `>&-` do.

Also a guest for them: a disk that SeaBIOS boots, which writes to itself and then much to COM1.
"""

from __future__ import annotations

import subprocess
from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import NamedTuple

from tests.vmctl_driver import ROOT

COMBINATIONS = tuple(
    "".join(fds) for size in range(1, 4) for fds in combinations(("0", "1", "2"), size)
)
"""Every choice of descriptors to close except none, such as `02`."""

DISK_SIZE = 1 << 20
PACKET = 0x60  # offset in the boot sector: the parameters of INT 13h
LBA = 128
SECTORS = 64
PATTERN = b"U" * (SECTORS << 9)
PRINTED = 200_000

_REDIRECTIONS = {"0": "<&-", "1": ">&-", "2": "2>&-"}


class Ended(NamedTuple):
    """A program's exit status, and its output on open descriptors."""

    status: int
    output: str
    errors: str


def closing(closed: str, arguments: Sequence[str | Path]) -> list[str]:
    """Return the argument vector that runs `arguments` with the descriptors in `closed` closed."""
    redirections = " ".join(_REDIRECTIONS[fd] for fd in closed)
    words = [str(argument) for argument in arguments]
    return ["/bin/sh", "-c", f'exec "$@" {redirections}', "sh", *words]


def run_closed(
    closed: str,
    arguments: Sequence[str | Path],
    *,
    cwd: Path = ROOT,
    environment: Mapping[str, str] | None = None,
    timeout_s: float = 90,
) -> Ended:
    """Run a program to its end; open descriptors are /dev/null to read, and pipes to write."""
    done = subprocess.run(
        closing(closed, arguments),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        encoding="utf-8",
        errors="surrogateescape",
        check=False,
        cwd=cwd,
        env=environment,
        timeout=timeout_s,
    )
    return Ended(done.returncode, done.stdout, done.stderr)


def sector() -> bytes:
    """Return a boot sector that writes PATTERN to its disk at LBA, and then much to COM1."""
    code = b"".join(
        (
            bytes.fromhex("fa"),  # cli
            bytes.fromhex("31c0"),  # xor %ax, %ax
            bytes.fromhex("8ed8"),  # mov %ax, %ds
            bytes.fromhex("8ed0"),  # mov %ax, %ss
            bytes.fromhex("bc007c"),  # mov $0x7c00, %sp
            # Interrupts stay off: SeaBIOS prints its buffered output at ticks of its clock.
            bytes.fromhex("90"),  # nop
            bytes.fromhex("b80020"),  # mov $0x2000, %ax
            bytes.fromhex("8ec0"),  # mov %ax, %es
            bytes.fromhex("31ff"),  # xor %di, %di
            bytes.fromhex("b90080"),  # mov $0x8000, %cx
            bytes.fromhex("b85555"),  # mov $'UU', %ax
            bytes.fromhex("fc"),  # cld
            bytes.fromhex("f3ab"),  # rep stosw
            b"\xbe" + (0x7C00 + PACKET).to_bytes(2, "little"),  # mov $packet, %si
            bytes.fromhex("b80043"),  # mov $0x4300, %ax
            bytes.fromhex("cd13"),  # int $0x13; %dl is the disk that we come from
            bytes.fromhex("b001"),  # mov $1, %al
            bytes.fromhex("7219"),  # jc report
            bytes.fromhex("b80020"),  # mov $0x2000, %ax
            bytes.fromhex("8ed8"),  # mov %ax, %ds
            bytes.fromhex("baf803"),  # mov $0x3f8, %dx
            bytes.fromhex("bb0500"),  # mov $5, %bx
            bytes.fromhex("31f6"),  # 1: xor %si, %si
            bytes.fromhex("b9409c"),  # mov $40000, %cx
            bytes.fromhex("f36e"),  # rep outsb
            bytes.fromhex("4b"),  # dec %bx
            bytes.fromhex("75f6"),  # jnz 1b
            bytes.fromhex("b02a"),  # mov $42, %al
            bytes.fromhex("9090"),  # nop; nop
            bytes.fromhex("e6f4"),  # report: out %al, $0xf4
            bytes.fromhex("f4ebfd"),  # hlt; jmp . - 1
        )
    )
    packet = b"\x10\x00" + SECTORS.to_bytes(2, "little")
    packet += (0x2000 << 16).to_bytes(4, "little") + LBA.to_bytes(8, "little")
    return (code.ljust(PACKET, b"\0") + packet).ljust(510, b"\0") + b"\x55\xaa"


def image(path: Path) -> tuple[Path, bytes]:
    """Write a disk that boots the sector; returns it, and its expected contents afterwards."""
    before = sector().ljust(DISK_SIZE, b"\0")
    path.write_bytes(before)
    at = LBA * 512
    return path, before[:at] + PATTERN + before[at + len(PATTERN) :]
