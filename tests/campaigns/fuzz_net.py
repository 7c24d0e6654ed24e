"""Campaign: hostile drivers against virtio-net's queues, frames, header and commands.

COUNT drivers, each with three rings in memory of its own: descriptors, indirect tables, indices and
contents are random, biased towards values that nearly work; frames of random sizes arrive
meanwhile, and the driver changes frames while they are sent. Then:

- the device raises nothing but GuestError, and returns no more chains than were offered;
- from a locked address no frame with another source leaves, and none to another station arrives;
- frames that the driver gets are frames that arrived, whole and in order.

Any deviation is printed, and the exit status is 1. The same --seed gives the same drivers.
"""

from __future__ import annotations

import argparse
import logging
import random
import struct
import sys
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from tests.frame_port import FakePort  # noqa: E402 - found by the line above
from tests.virtio_driver import EVENT_IDX, INDIRECT, DriverQueue, PlainMemory  # noqa: E402
from vmm_kvm.errors import GuestError  # noqa: E402
from vmm_kvm.virtio import abi  # noqa: E402
from vmm_kvm.virtio.net import VirtioNet  # noqa: E402

MAC, OTHER = bytes.fromhex("fee1bb000001"), bytes.fromhex("fee1bb000002")
GROUP = bytes.fromhex("01005e000001")
MEMORY_SIZE = 1 << 18
QUEUE_SIZE = 16
RINGS_END = 0x8000
TABLES, COMMANDS = 0x9000, 0xC000
ROUNDS = 12
_HEADER = 12
_SIZES = (
    0,
    1,
    2,
    9,
    10,
    11,
    12,
    13,
    25,
    26,
    60,
    64,
    1514,
    1526,
    2000,
    4096,
    65562,
    1 << 17,
    2**32 - 1,
)
_MERGEABLE = 1 << abi.VIRTIO_NET_F_MRG_RXBUF
_COMMANDS = 1 << abi.VIRTIO_NET_F_CTRL_VQ | 1 << abi.VIRTIO_NET_F_CTRL_VLAN


class Port(FakePort):
    """Frames in, frames out; the driver changes a frame just before it is sent."""

    def __init__(self, chance: random.Random, *, has_filter: bool) -> None:
        super().__init__(has_filter=has_filter)
        self._chance = chance

    def send(self, _queue: int, buffers: Sequence[memoryview | bytes]) -> bool:
        """Keep a frame, after the driver has had a last chance to change it."""
        if self._chance.random() < 0.5:
            for buffer in buffers:
                if isinstance(buffer, memoryview) and not buffer.readonly:
                    buffer[: len(buffer)] = self._chance.randbytes(len(buffer))
        super().send(_queue, buffers)
        return self._chance.random() < 0.9


class Driver:
    """A random driver; `chance` alone decides its actions."""

    def __init__(self, chance: random.Random) -> None:
        self.chance = chance
        self.is_locked = chance.random() < 0.5
        self.port = Port(chance, has_filter=chance.random() < 0.5)
        self.device = VirtioNet(self.port, MAC, name="nic0", is_locked=self.is_locked)
        self.features = chance.choice((0, _MERGEABLE)) | chance.choice((0, _COMMANDS))
        self.features |= chance.choice((0, EVENT_IDX)) | chance.choice((0, INDIRECT))
        self.memory = PlainMemory(MEMORY_SIZE)
        self.memory.bytes[RINGS_END:] = chance.randbytes(MEMORY_SIZE - RINGS_END)
        self.queues = [
            DriverQueue(self.memory, QUEUE_SIZE, base) for base in (0x1000, 0x2000, 0x3000)
        ]
        self.sides = [queue.device(self.memory, self.features) for queue in self.queues]
        self.device.attach(self)
        self.device.start(self.features)
        self.arrived: list[bytes] = []
        self.offered: list[tuple[int, int]] = []

    def notify(self, index: int) -> None:
        """Ignore it: every queue is served in every round."""

    def config_changed(self) -> None:
        """Ignore it."""

    def watch(self, fd: int, index: int) -> None:
        """Ignore it."""

    def unwatch(self, fd: int) -> None:
        """Ignore it."""

    def act(self) -> None:
        """Do something to the rings, and let frames arrive."""
        chance = self.chance
        for queue in self.queues:
            for _ in range(chance.randrange(4)):
                self._offer(queue)
            if chance.random() < 0.02:
                queue.put(queue.ring.available + 2, "H", chance.randrange(1 << 16))
        for _ in range(chance.randrange(4)):
            target = chance.choice((MAC, OTHER, GROUP))
            size = chance.choice((14, 60, 1514, 9014, 65549))
            frame = bytes(_HEADER) + (target + OTHER).ljust(size, bytes((chance.randrange(256),)))
            self.arrived.append(frame)
            self.port.arrived.append(frame)

    def _offer(self, queue: DriverQueue) -> None:
        chance = self.chance
        is_odd = chance.random() < 0.1
        count = chance.choice((1, 1, 2, 3, 5))
        buffers = []
        for number in range(count):
            size = chance.choice(_SIZES) if is_odd else chance.choice((12, 60, 1526, 4096))
            address = chance.randrange(0x10000, MEMORY_SIZE - 0x2000)
            if is_odd:
                address = chance.choice((address, 0, MEMORY_SIZE - 1, 1 << 40, 2**64 - 1))
            is_writable = queue is self.queues[0] or (
                queue is self.queues[2] and number == count - 1
            )
            buffers.append((address, size, is_writable if not is_odd else chance.random() < 0.5))
        if queue is self.queues[1] and not is_odd and chance.random() < 0.5:
            head = bytes(_HEADER) + OTHER + chance.choice((MAC, OTHER))
            address, size, _ = buffers[0]
            if size >= len(head):
                self.memory.bytes[address : address + len(head)] = head
        if queue is self.queues[2] and not is_odd:
            command = struct.pack("<BB", chance.randrange(7), chance.randrange(6))
            command += chance.randbytes(chance.choice((0, 1, 2, 6, 8, 40)))
            self.memory.bytes[COMMANDS : COMMANDS + len(command)] = command
            buffers = [(COMMANDS, len(command), False), buffers[-1]]
        self.offered += [(address, size) for address, size, is_writable in buffers if is_writable]
        if chance.random() < 0.2:
            queue.add_indirect(TABLES + 0x100 * chance.randrange(16), *buffers)
        else:
            queue.add(*buffers)
        if is_odd and chance.random() < 0.3:
            queue.describe(
                chance.randrange(QUEUE_SIZE),
                (
                    chance.getrandbits(64),
                    chance.getrandbits(32),
                    chance.randrange(8),
                    chance.randrange(20),
                ),
            )

    def run(self) -> str | None:
        """Act and be served; return the deviation."""
        for _ in range(ROUNDS):
            self.act()
            for index, side in enumerate(self.sides):
                try:
                    self.device.process(index, side)
                except GuestError:
                    self.device.reset()
                    return self._check()
        return self._check()

    def _check(self) -> str | None:
        for side in self.sides:
            kept = (side.next_available - side.next_used) & 0xFFFF
            if kept > 2 * QUEUE_SIZE:  # a negative number, modulo 65536
                return f"{side.next_used} chains came back of {side.next_available}"
        if self.is_locked:
            for frame in self.port.sent:
                if frame[_HEADER + 6 : _HEADER + 12] != MAC:
                    return f"a frame from {frame[18:24].hex(':')} left a locked interface"
        return None


class Honest:
    """A driver with good buffers of odd sizes: frames come whole, in order, or not at all."""

    def __init__(self, chance: random.Random) -> None:
        self.chance = chance
        self.port = Port(chance, has_filter=chance.random() < 0.5)
        self.is_locked = chance.random() < 0.5
        self.device = VirtioNet(self.port, MAC, name="nic0", is_locked=self.is_locked)
        self.memory = PlainMemory(1 << 20)
        self.queue = DriverQueue(self.memory, 64)
        self.side = self.queue.device(self.memory, EVENT_IDX)
        self.device.start(_MERGEABLE | EVENT_IDX)

    def run(self) -> str | None:
        """Receive frames; return the deviation."""
        chance, queue = self.chance, self.queue
        arrived: list[bytes] = []
        places: dict[int, tuple[int, int]] = {}
        got = bytearray()
        for _ in range(ROUNDS):
            for _ in range(chance.randrange(5)):
                target = chance.choice(
                    (MAC, GROUP) if self.port.has_filter else (MAC, OTHER, GROUP)
                )
                body = target + OTHER + chance.randbytes(chance.choice((2, 48, 1500, 9000)))
                frame = bytes(_HEADER) + body
                self.port.arrived.append(frame)
                if target != OTHER or not self.is_locked:
                    arrived.append(frame)
            while queue.added - queue.seen < 60 and chance.random() < 0.9:
                slot = queue.added % 64
                size = chance.choice((13, 100, 1000, 2000, 4096))
                head = queue.add((0x10000 + 0x2000 * slot, size, True))
                places[head] = 0x10000 + 0x2000 * slot, size
            self.device.process(0, self.side)
            for head, written in queue.used():
                address, size = places[head]
                if written > size:
                    return f"{written} bytes in a buffer of {size}"
                got += self.memory.bytes[address : address + written]
        at = 0
        for number, frame in enumerate(arrived):
            piece = bytes(got[at : at + len(frame)])
            if len(piece) < len(frame):
                break  # it waits for buffers
            if piece[:10] + piece[_HEADER:] != frame[:10] + frame[_HEADER:]:
                return f"frame {number}: of {len(frame)} bytes, not what arrived"
            at += len(frame)
        return None if at == len(got) else f"{len(got) - at} bytes that never arrived"


def campaign(count: int, seed: int) -> list[str]:
    """Run `count` drivers of each kind; return the deviations, a line each."""
    chance = random.Random(seed)
    deviations = []
    for number in range(count):
        for kind in (Driver, Honest):
            own = random.Random(chance.getrandbits(64))
            try:
                wrong = kind(own).run()
            except Exception as err:  # noqa: BLE001 - whatever it is, it is reported
                wrong = f"{type(err).__name__}: {err}"
            if wrong is not None:
                deviations.append(f"{kind.__name__} {number}: {wrong}")
    return deviations


def main(arguments: Sequence[str]) -> int:
    """Run the campaign and print its summary."""
    parser = argparse.ArgumentParser(
        prog="fuzz_net", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--count", type=int, default=10_000, help="drivers of each kind")
    parser.add_argument("--seed", type=int, default=1)
    given = parser.parse_args(arguments)
    logging.disable(logging.WARNING)  # the device logs dropped frames
    begun = time.monotonic()
    deviations = campaign(given.count, given.seed)
    for line in deviations:
        print(line, flush=True)
    taken = time.monotonic() - begun
    print(f"{2 * given.count:,} drivers in {taken:.0f} s: {len(deviations)} deviated")
    return 1 if deviations else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
