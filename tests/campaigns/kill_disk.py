"""Campaign: a process that writes to a qcow2 image, killed at random moments.

Each round a child opens the image and writes, discards and flushes at random, and reports through a
pipe each operation that it begins or has done; SIGKILL ends it. Afterwards we and `qemu-img check`
find nothing but leaks, and each sector has its contents at the last flush, or those of a later
write. The next round continues with the image that a kill has left.

Any deviation is printed, and the exit status is 1. The same --seed gives the same writes, but not
the same moments.
"""

from __future__ import annotations

import os
import random
import select
import signal
import struct
import sys
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from tests.campaigns.image_rounds import (  # noqa: E402 - found by the line above
    SECTOR,
    Round,
    examine,
    run_campaign,
    run_rounds,
)
from vmm_kvm.block.image import Format  # noqa: E402
from vmm_kvm.images.opening import open_image  # noqa: E402

SIZE = 64 << 20
LENGTHS = (512, 4096, 65536, 1 << 20)
DELAY_S = 0.4
_RECORD = struct.Struct("<BIQQ")  # kind, round and number of the operation, offset, size
WRITE, ZERO, DISCARD, FLUSH, FLUSHED = range(5)


def stamp(number: int, sector: int) -> bytes:
    """Return the sector that operation `number` writes at `sector`: no other equals it."""
    return struct.pack("<QQ", number, sector) * (SECTOR // 16)


def load(path: str, pipe: int, chance: random.Random, number: int) -> None:
    """Write to the image until killed; `number` is that of the first operation."""
    image = open_image(path, Format.QCOW2, False)
    while True:
        what = chance.choices((WRITE, ZERO, DISCARD, FLUSH), (12, 2, 3, 3))[0]
        offset = chance.randrange(SIZE // SECTOR) * SECTOR
        size = min(chance.choice(LENGTHS), SIZE - offset)
        os.write(pipe, _RECORD.pack(what, number, offset, size))
        match what:
            case 0:
                first = offset // SECTOR
                data = b"".join(stamp(number, first + n) for n in range(size // SECTOR))
                image.writev(offset, [memoryview(data)])
            case 1:
                image.write_zeroes(offset, size, may_unmap=bool(number % 2))
            case 2:
                image.discard(offset, size)
            case _:
                image.flush()
                os.write(pipe, _RECORD.pack(FLUSHED, number, 0, 0))
        number += 1


class Disk:
    """The possible contents of each sector: numbers of operations, 0 for zeros."""

    def __init__(self) -> None:
        """Begin with an empty disk."""
        self.number = 1
        """The number of the next operation."""
        self._versions: dict[int, list[int]] = {}

    def note(self, what: int, number: int, offset: int, size: int) -> None:
        """Note an operation that has begun, or (FLUSHED) one that is done."""
        if what == FLUSHED:
            for sector, versions in self._versions.items():
                self._versions[sector] = versions[self._durable(versions) :]
            return
        if what == FLUSH:
            return
        for sector in range(offset // SECTOR, (offset + size) // SECTOR):
            versions = self._versions.setdefault(sector, [0])
            # A discarded sector reads as before, or as zero; a later flush does not decide which.
            versions.append({WRITE: number, ZERO: 0, DISCARD: -1}[what])

    def _durable(self, versions: list[int]) -> int:
        last = len(versions) - 1
        while last and versions[last] == -1:
            last -= 1
        return last

    def settle(self, found: bytes) -> list[str]:
        """Compare with the disk's contents, which count from now on."""
        wrong = []
        for sector, versions in self._versions.items():
            data = found[sector * SECTOR : (sector + 1) * SECTOR]
            if not any(data):
                number = 0
                is_right = 0 in versions or -1 in versions
            else:
                number = struct.unpack_from("<Q", data)[0]
                is_right = number in versions and data == stamp(number, sector)
            if not is_right:
                wrong.append(f"sector {sector} holds {number}, not one of {versions}")
            self._versions[sector] = [number]
        return wrong


def run_round(path: str, disk: Disk, chance: random.Random, _number: int) -> Round:
    """Let a child write, and kill it."""
    first = disk.number
    read_end, write_end = os.pipe()
    seed = chance.random()
    delay_s = chance.uniform(0.02, DELAY_S)
    child = os.fork()
    if child == 0:
        try:
            os.close(read_end)
            load(path, write_end, random.Random(seed), first)
        finally:
            os._exit(1)
    os.close(write_end)
    told = bytearray()
    deadline = time.monotonic() + delay_s
    is_killed = False
    while True:
        wait_s = max(deadline - time.monotonic(), 0)
        if not is_killed and not wait_s:
            os.kill(child, signal.SIGKILL)
            is_killed = True
        if select.select([read_end], [], [], None if is_killed else wait_s)[0]:
            part = os.read(read_end, 1 << 16)
            if not part:
                break
            told += part
    os.close(read_end)
    _, status = os.waitpid(child, 0)
    wrong = []
    if os.waitstatus_to_exitcode(status) != -signal.SIGKILL:
        wrong.append(f"the child ended by itself: {status:#x}")
    whole = len(told) // _RECORD.size * _RECORD.size
    for what, operation, offset, size in _RECORD.iter_unpack(told[:whole]):
        disk.note(what, operation, offset, size)
        disk.number = operation + 1
    found, unsound = examine(path, SIZE)
    return Round(disk.number - first, [*wrong, *unsound, *disk.settle(found)])


def campaign(count: int, seed: int) -> tuple[int, list[str]]:
    """Kill `count` writers; return the number of operations, and the deviations."""
    return run_rounds(count, seed, SIZE, Disk, run_round)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the campaign; returns the exit status."""
    assert __doc__ is not None
    return run_campaign(__doc__, "operations", campaign, arguments)


if __name__ == "__main__":
    sys.exit(main())
