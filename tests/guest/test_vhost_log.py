"""vhost-net of this host's kernel, where it has one: what it writes is seen while a VM is copied.

Each test has a network namespace of its own.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from tests.system.test_taps import (
    MAC,
    NAME,
    RecordingFrontend,
    SharedMemory,
    frame,
    namespace,
    tap,
    wait,
)
from tests.unit.snapshot.samples import MANIFEST, STATE_BYTES, Buffer
from tests.virtio_driver import DriverQueue
from vmm_kvm.kvm.system import Kvm
from vmm_kvm.machine.dirty import DirtyPages
from vmm_kvm.memory import GuestMemory
from vmm_kvm.net.tap import HEADER_SIZE
from vmm_kvm.net.vhost import VhostNet
from vmm_kvm.snapshot.precopy import Progress, copy_into
from vmm_kvm.snapshot.stream import LiveWriter, StreamReader
from vmm_kvm.virtio import abi
from vmm_kvm.virtio.vhost import Vhost
from vmm_kvm.write_log import SharedLog

pytestmark = [pytest.mark.guest, pytest.mark.root]

__all__ = ["namespace"]  # a fixture

SIZE = 4 << 20
FEATURES = 1 << abi.VIRTIO_F_VERSION_1 | 1 << abi.VIRTIO_NET_F_MRG_RXBUF
BUFFER = 0x200000


class Driver:
    """A driver of an interface that vhost-net serves, which receives frames."""

    def __init__(self, device: Vhost, memory: SharedMemory, call: int, send: object) -> None:
        self.device, self.memory, self._call = device, memory, call
        self._send = send
        self.start()

    def start(self) -> None:
        """Start the rings, from the beginning."""
        self.memory.bytes[0x1000:0x4000] = bytes(0x3000)
        self.queues = [DriverQueue(self.memory, 8, base) for base in (0x1000, 0x2000)]
        self.device.start(FEATURES, {at: queue.ring for at, queue in enumerate(self.queues)})

    def receive(self, at: int, size: int = 60) -> bytes:
        """Let a frame of `size` bytes arrive at an address; return it."""
        sent = frame(MAC, size=size)
        self.queues[0].add((at, 1500, True))
        self.device.kick(0)
        self._send(sent)  # type: ignore[operator]
        while not self.queues[0].used():
            wait(self._call)
        assert bytes(self.memory.bytes[at + HEADER_SIZE : at + HEADER_SIZE + size]) == sent
        return sent


@contextmanager
def driver(guest: GuestMemory) -> Iterator[Driver]:
    """Have vhost-net serve a tap."""
    try:
        fd = os.open("/dev/vhost-net", os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        pytest.skip("no /dev/vhost-net")
    calls = [os.eventfd(0, os.EFD_CLOEXEC) for _ in range(2)]
    frontend = RecordingFrontend(calls)
    try:
        with tap() as (port, outside):
            device = Vhost([VhostNet(fd)], port, guest, NAME, features=0)
            device.attach(frontend)
            yield Driver(device, SharedMemory(guest), calls[0], outside.send)
            device.close()
    finally:
        for each in (fd, *calls):
            os.close(each)
    assert frontend.failures == []


def test_vhost_net_marks_its_writes() -> None:
    """While a log is wanted, pages with frames are marked in it, also of rings started later."""
    with GuestMemory([(0, SIZE)]) as guest, driver(guest) as one:
        log = SharedLog(SIZE)
        marked = [(BUFFER, BUFFER + 0x8000)]
        one.receive(BUFFER)
        assert list(log.take()) == []
        assert one.device.log_writes(log)
        one.receive(BUFFER)
        assert list(log.take()) == marked
        one.device.stop()
        one.start()
        one.receive(BUFFER + 0x7000)
        assert list(log.take()) == marked
        one.device.suspend()
        one.device.resume()
        one.receive(BUFFER + 0x7F00, 600)  # over the end of a page
        assert list(log.take()) == [(BUFFER, BUFFER + 0x10000)]
        assert one.device.log_writes(None)
        one.receive(BUFFER)
        assert list(log.take()) == []
        log.close()
        one.receive(BUFFER)
        del one.queues, one.memory


class Devices:
    """The devices of a machine that has only this interface."""

    def __init__(self, device: Vhost) -> None:
        self._device = device

    def log_writes(self, log: SharedLog | None) -> list[str]:
        """Log its writes."""
        return [] if self._device.log_writes(log) else [NAME]

    def used_rings(self) -> list[tuple[int, int]]:
        """Return none: the test's rings are not copied."""
        return []


def test_a_frame_reaches_the_copy() -> None:
    """A frame that arrives after its page was copied is in what the receiver reads."""
    manifest = MANIFEST._replace(memory_size=SIZE, regions=((0, SIZE),))
    sent = []
    with (
        GuestMemory([(0, SIZE)]) as guest,
        GuestMemory([(0, SIZE)]) as target,
        Kvm() as kvm,
        kvm.create_vm() as vm,
        driver(guest) as one,
    ):
        for slot, region in enumerate(guest.regions):
            vm.set_memory_region(slot, region.gpa, region.size, guest.hva + region.offset)
        dirty = DirtyPages(vm, guest, Devices(one.device))  # type: ignore[arg-type]
        stream = Buffer()

        def arrive(progress: Progress) -> None:
            if progress.round == 2:  # all has been copied once
                sent.append(one.receive(BUFFER))

        def halt() -> bytes:
            one.device.suspend()
            return STATE_BYTES

        assert dirty.begin() == []
        copy_into(LiveWriter(stream, manifest), guest, dirty, halt, on_progress=arrive)
        dirty.end()
        assert StreamReader(stream).read_machine(target) == STATE_BYTES
        start = BUFFER + HEADER_SIZE
        assert [bytes(target.view(start, len(sent[0])))] == sent
        one.device.stop()
        del one.queues, one.memory
