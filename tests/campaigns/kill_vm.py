"""Campaign: a whole VM, killed at random moments while its guest writes to a disk.

The guest is a boot sector, which any /dev/kvm runs: by SeaBIOS it writes 4 KiB of its own number at
one place after the other, and prints a byte for each write that the BIOS reports done. SeaBIOS does
not flush, so each write must be durable by then. SIGKILL ends `vmctl run` and, in every other
round, its device process. Afterwards we and `qemu-img check` find nothing but leaks in the image;
and each sector has the last acknowledged write, or a later one. The next round continues with the
image.

Any deviation is printed, and the exit status is 1. The same --seed gives the same writes, but not
the same moments.
"""

from __future__ import annotations

import random
import signal
import struct
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from tests import artifacts  # noqa: E402 - found by the line above
from tests.campaigns.image_rounds import (  # noqa: E402
    SECTOR,
    Round,
    examine,
    run_campaign,
    run_rounds,
)
from tests.vmctl_driver import ConsoleProcess, vmctl_run  # noqa: E402
from vmm_kvm.block.image import Format, Image  # noqa: E402
from vmm_kvm.images.opening import open_image  # noqa: E402

WRITE_SECTORS = 8
FIRST_SECTOR = 64
PLACES = 1 << 14
SIZE = 16 << 20
DELAY_S = 1.5
LATER = 1 << 14
"""The number of writes that a guest may be ahead of its console's output."""
_START_S = 180.0
_END_S = 120.0
"""20 s can be too short on a machine with four times as much to do as it has processors."""

_CODE = b"".join(
    (
        bytes.fromhex("fa"),  # cli
        bytes.fromhex("31c0"),  # xor %ax, %ax
        bytes.fromhex("8ed8"),  # mov %ax, %ds
        bytes.fromhex("8ec0"),  # mov %ax, %es
        bytes.fromhex("8ed0"),  # mov %ax, %ss
        bytes.fromhex("bc007c"),  # mov $0x7c00, %sp
        bytes.fromhex("fb"),  # sti
        bytes.fromhex("fc"),  # cld
        bytes.fromhex("8816f47d"),  # mov %dl, drive
        bytes.fromhex("baf803"),  # mov $0x3f8, %dx
        bytes.fromhex("b001"),  # mov $1, %al
        bytes.fromhex("ee"),  # out %al, %dx: it begins
        bytes.fromhex("66ff06f07d"),  # next: incl number
        bytes.fromhex("66a1f07d"),  # mov number, %eax
        bytes.fromhex("bf0080"),  # mov $0x8000, %di
        bytes.fromhex("b90004"),  # mov $1024, %cx
        bytes.fromhex("66f3ab"),  # rep stosl
        bytes.fromhex("a1f67d"),  # mov place, %ax
        bytes.fromhex("69c05562"),  # imul $25173, %ax
        bytes.fromhex("051936"),  # add $13849, %ax
        bytes.fromhex("a3f67d"),  # mov %ax, place
        bytes.fromhex("25ff3f"),  # and $0x3fff, %ax
        bytes.fromhex("83c040"),  # add $64, %ax
        bytes.fromhex("a3e87d"),  # mov %ax, packet + 8
        bytes.fromhex("bee07d"),  # mov $packet, %si
        bytes.fromhex("8a16f47d"),  # mov drive, %dl
        bytes.fromhex("b80043"),  # mov $0x4300, %ax: extended write
        bytes.fromhex("cd13"),  # int $0x13
        bytes.fromhex("b003"),  # mov $3, %al: an error
        bytes.fromhex("7202"),  # jc tell
        bytes.fromhex("b002"),  # mov $2, %al: done
        bytes.fromhex("baf803"),  # tell: mov $0x3f8, %dx
        bytes.fromhex("ee"),  # out %al, %dx
        bytes.fromhex("ebc0"),  # jmp next
    )
)
_PACKET = struct.Struct("<BBHIQIBBH")  # INT 13h's packet at 0x7de0; number; drive, unused, place
_PACKET_AT = 0x1E0
# The guest's output. No text of SeaBIOS's has these bytes: its last line appears when the guest
# already runs.
_BEGINS, _DONE, _FAILED = b"\1", b"\2", b"\3"


def boot_sector(number: int, place: int) -> bytes:
    """Return the guest that continues after write `number`, at the place that follows `place`."""
    variables = _PACKET.pack(16, 0, WRITE_SECTORS, 0x8000, 0, number, 0, 0, place)
    return (_CODE.ljust(_PACKET_AT, b"\0") + variables).ljust(SECTOR - 2, b"\0") + b"\x55\xaa"


def places(place: int) -> Iterator[int]:
    """Yield the state of the guest's generator for each write, from the one after `place`."""
    while True:
        place = (place * 25173 + 13849) & 0xFFFF
        yield place


class Disk:
    """The required contents of each sector: the number of the write, 0 for none."""

    def __init__(self) -> None:
        """Begin with an empty disk."""
        self.number = 0
        self.place = 1
        self._durable: dict[int, int] = {}

    def settle(self, acknowledged: int, found: bytes) -> list[str]:
        """Compare with a disk on which at least so many more writes were done."""
        wrong = []
        later: dict[int, set[int]] = {}
        last = self.number
        for count, state in zip(range(1, acknowledged + LATER), places(self.place), strict=False):
            number = self.number + count
            first = FIRST_SECTOR + state % PLACES
            for sector in range(first, first + WRITE_SECTORS):
                if count <= acknowledged:
                    self._durable[sector] = number
                else:
                    later.setdefault(sector, set()).add(number)
        for sector in range(FIRST_SECTOR, FIRST_SECTOR + PLACES + WRITE_SECTORS):
            data = found[sector * SECTOR : (sector + 1) * SECTOR]
            number = int.from_bytes(data[:4], "little")
            durable = self._durable.get(sector, 0)
            is_whole = data == number.to_bytes(4, "little") * (SECTOR // 4)
            if not is_whole or number not in {durable, *later.get(sector, ())}:
                wrong.append(f"sector {sector} holds {number}, not {durable} or a later one")
            self._durable[sector] = number
            last = max(last, number)
        # Later writes that were done, but not acknowledged, count too.
        last = max(last, self.number + acknowledged)
        for _, state in zip(range(last - self.number), places(self.place), strict=False):
            self.place = state
        self.number = last
        return wrong


def opened(path: str) -> Image:
    """Open the image for writing once the processes of a dead VM have released it."""
    deadline = time.monotonic() + _END_S
    while True:
        try:
            return open_image(path, Format.QCOW2, False)
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.01)


def run_round(path: str, disk: Disk, chance: random.Random, number: int) -> Round:
    """Kill one VM; every other one has a device process."""
    option = ",process" if number % 2 else ""
    image = opened(path)
    image.writev(0, [memoryview(boot_sector(disk.number, disk.place))])
    image.close()
    arguments = vmctl_run("-m", "64M", "-b", artifacts.seabios(), "-d", f"qcow2:{path}{option}")
    with ConsoleProcess(arguments) as guest:
        guest.expect(_BEGINS.decode(), _START_S)
        time.sleep(chance.uniform(0, DELAY_S))
        guest.signal(signal.SIGKILL)
        guest.wait(_END_S)
        said = guest.output.partition(_BEGINS)[2]
    acknowledged = said.count(_DONE)
    wrong = ["the BIOS reported an error"] if _FAILED in said else []
    opened(path).close()  # as soon as no process has it open any more
    found, unsound = examine(path, SIZE)
    return Round(acknowledged, [*wrong, *unsound, *disk.settle(acknowledged, found)])


def campaign(count: int, seed: int) -> tuple[int, list[str]]:
    """Kill `count` VMs; return the number of acknowledged writes, and the deviations."""
    return run_rounds(count, seed, SIZE, Disk, run_round)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the campaign; returns the exit status."""
    assert __doc__ is not None
    return run_campaign(__doc__, "writes", campaign, arguments)


if __name__ == "__main__":
    sys.exit(main())
