"""Measure the vsock device alone: its processor time for bytes in each direction.

At the root of the tree: `python -m bench.vsock [MIB]`. The driver of the tests is in this process,
and its time does not count: no guest, no interrupts, no KVM.
"""

from __future__ import annotations

import sys
import time
from contextlib import suppress

from tests.unit.virtio.vsock_rig import Rig
from tests.vsock_driver import GuestStream
from vmm_kvm.virtio.queue import Virtqueue

ROUNDS = 3
_PIECE = bytes(64 << 10)


class TimedRig(Rig):
    """A rig that measures the time of its device."""

    def __init__(self) -> None:
        self.spent = 0.0
        super().__init__(buffers=64)

    def process(self, index: int, queue: Virtqueue) -> None:
        """Have the device serve a queue."""
        began = time.thread_time()
        super().process(index, queue)
        self.spent += time.thread_time() - began


def _take(rig: Rig, stream: GuestStream) -> None:
    for packet in rig.driver.packets():
        stream.take(packet)
    rig.driver.offer()


def to_guest(size: int) -> float:
    """Return the seconds for `size` bytes in packets of 4 KiB, as Linux has room for them."""
    rig = TimedRig()
    rig.driver.offer()
    stream, sock = rig.from_guest()
    while len(stream.received) < size:
        with suppress(BlockingIOError):
            sock.send(_PIECE)
        rig.serve()
        _take(rig, stream)
    rig.close()
    return rig.spent


def from_guest(size: int) -> float:
    """Return the seconds for `size` bytes in packets of 64 KiB, as Linux sends them."""
    rig = TimedRig()
    rig.driver.offer()
    stream, sock = rig.from_guest()
    received = 0
    while received < size:
        stream.write(_PIECE)
        _take(rig, stream)
        with suppress(BlockingIOError):
            received += len(sock.recv(1 << 20))
    rig.close()
    return rig.spent


def main() -> None:
    """Print the best of some rounds."""
    mib = int(sys.argv[1]) if len(sys.argv) > 1 else 64
    for name, measure in (("to the guest", to_guest), ("from the guest", from_guest)):
        best = min(measure(mib << 20) for _ in range(ROUNDS))
        print(f"{name}: {best * 1000 / mib:.2f} ms of a processor for 1 MiB")


if __name__ == "__main__":
    main()
