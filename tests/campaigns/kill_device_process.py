"""Campaign: a disk's device process, killed at random moments while a driver writes.

Each round a device process serves a qcow2 image, and a driver in this process has it write, zero,
discard and flush, up to four requests at a time. SIGKILL ends the device process. Afterwards the
image opens, we and `qemu-img check` find nothing but leaks, and each sector has its contents at the
last acknowledged flush, or those of a later write. The next round continues with the image.

Any deviation is printed, and the exit status is 1. The same --seed gives the same requests, but not
the same moments.
"""

from __future__ import annotations

import logging
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
from tests.campaigns.kill_disk import (  # noqa: E402
    DISCARD,
    FLUSH,
    FLUSHED,
    SIZE,
    WRITE,
    ZERO,
    Disk,
    stamp,
)
from tests.unit.virtio.vhost_user.rig import VERSION_1, Driver, driver  # noqa: E402
from vmm_kvm.block.image import Format  # noqa: E402
from vmm_kvm.images.opening import open_image  # noqa: E402
from vmm_kvm.virtio.blk import VirtioBlk  # noqa: E402
from vmm_kvm.virtio.vhost_user.client import Client  # noqa: E402
from vmm_kvm.virtio.vhost_user.process import DeviceProcess, spawn_device_process  # noqa: E402

FEATURES = VERSION_1 | 1 << 9 | 1 << 13 | 1 << 14  # FLUSH, DISCARD, WRITE_ZEROES
DEPTH = 4
DELAY_S = 0.4
# The size of a slot in the driver's memory, and of a range.
LENGTHS = (512, 1024, 4096, 7680)
RANGES = (512, 4096, 65536, 1 << 20)
_TYPES = {WRITE: 1, FLUSH: 4, DISCARD: 11, ZERO: 13}


class Load:
    """A driver that keeps a device process busy until the process is killed."""

    def __init__(self, guest: Driver, disk: Disk, chance: random.Random) -> None:
        """Begin with the disk's next operation; `disk` notes operations begun and durable ones."""
        self._guest = guest
        self._disk = disk
        self._chance = chance
        self.wrong: list[str] = []

    def run(self, process: DeviceProcess, delay_s: float) -> None:
        """Have the device process write, and kill it after `delay_s` seconds."""
        chance = self._chance
        pid = process._pid
        assert pid is not None
        deadline = time.monotonic() + delay_s
        while time.monotonic() < deadline:
            slots = [self._offer(self._pick()) for _ in range(chance.randint(1, DEPTH))]
            if not self._finish(slots, deadline):
                break
            if chance.random() < 0.3:
                flush = self._disk.number
                slots = [self._offer(FLUSH)]
                if not self._finish(slots, deadline):
                    break
                self._disk.note(FLUSHED, flush, 0, 0)
        os.kill(pid, signal.SIGKILL)

    def _pick(self) -> int:
        return self._chance.choices((WRITE, ZERO, DISCARD), (12, 2, 3))[0]

    def _offer(self, what: int) -> int:
        """Make a request available, and note that it has begun."""
        chance, number = self._chance, self._disk.number
        self._disk.number += 1
        sector = chance.randrange(SIZE // SECTOR)
        offset = sector * SECTOR
        size = min(chance.choice(LENGTHS if what == WRITE else RANGES), SIZE - offset)
        self._disk.note(what, number, offset, size)
        data = b""
        if what == WRITE:
            data = b"".join(stamp(number, sector + n) for n in range(size // SECTOR))
        elif what != FLUSH:
            unmaps = number % 2 if what == ZERO else 0
            data = struct.pack("<QII", sector, size // SECTOR, unmaps)
        header = struct.pack("<IIQ", _TYPES[what], 0, sector if what == WRITE else 0)
        return self._guest.offer(header + data, room=1)

    def _finish(self, slots: Sequence[int], deadline: float) -> bool:
        """Notify, and wait until all requests are done; False if the time is over before."""
        guest = self._guest
        guest.notify()
        while guest.used() != guest.available[0]:
            left_s = deadline - time.monotonic()
            if left_s <= 0 or not select.select([guest.call[0]], [], [], left_s)[0]:
                return False
            os.eventfd_read(guest.call[0])
        failed = [slot for slot in slots if guest.answer(slot, 1) != b"\0"]
        if failed:
            self.wrong.append(f"requests before {self._disk.number} failed")
        return True


def run_round(path: str, disk: Disk, chance: random.Random, _number: int) -> Round:
    """Kill one device process."""
    first = disk.number

    def backend() -> VirtioBlk:
        return VirtioBlk(open_image(path, Format.QCOW2, False), name="disk")

    with (
        driver() as guest,
        spawn_device_process(backend, "disk") as process,
        Client(process.connection) as client,
    ):
        guest.start(client, FEATURES)
        load = Load(guest, disk, chance)
        load.run(process, chance.uniform(0.005, DELAY_S))
    found, unsound = examine(path, SIZE)
    return Round(disk.number - first, [*load.wrong, *unsound, *disk.settle(found)])


def campaign(count: int, seed: int) -> tuple[int, list[str]]:
    """Kill `count` device processes; return the number of requests, and the deviations."""
    logging.getLogger("vmm_kvm.virtio.vhost_user.process").setLevel(logging.CRITICAL)
    return run_rounds(count, seed, SIZE, Disk, run_round)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the campaign; returns the exit status."""
    assert __doc__ is not None
    return run_campaign(__doc__, "requests", campaign, arguments)


if __name__ == "__main__":
    sys.exit(main())
