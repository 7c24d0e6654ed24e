"""Every device type with drivers that offer any ring: answers, or the device stops."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.fakes import FakeClock
from tests.virtio_driver import EVENT_IDX, INDIRECT, DriverQueue, PlainMemory
from vmm_kvm.block.file import HostFile
from vmm_kvm.block.raw import RawImage
from vmm_kvm.errors import GuestError
from vmm_kvm.fs.server import FuseServer
from vmm_kvm.fs.tree import Tree, open_root
from vmm_kvm.memory import GuestMemory
from vmm_kvm.virtio.balloon import VirtioBalloon
from vmm_kvm.virtio.blk import VirtioBlk
from vmm_kvm.virtio.console import VirtioConsole
from vmm_kvm.virtio.device import Backend
from vmm_kvm.virtio.fs import VirtioFs
from vmm_kvm.virtio.pmem import VirtioPmem
from vmm_kvm.virtio.rng import VirtioRng
from vmm_kvm.virtio.scsi import VirtioScsi
from vmm_kvm.virtio.vsock import VirtioVsock, VsockSpec

SIZE = 8
MEMORY_SIZE = 0x8000
DATA, DATA_SIZE = 0x4000, 0x400
IMAGE_SIZE = 64 << 10
FEATURES = st.sampled_from([0, INDIRECT, EVENT_IDX, INDIRECT | EVENT_IDX])
# Requests are small numbers, and most buffers have the size of some part of one.
BYTES = st.lists(st.sampled_from([0, 1, 2, 4, 8, 11, 13, 0x12, 0x28, 0x43, 0xFF]), max_size=64)
LENGTHS = st.sampled_from([0, 1, 4, 5, 8, 16, 24, 51, 108, 512, 4096, MEMORY_SIZE, (1 << 32) - 1])
DESCRIPTORS = st.tuples(
    st.one_of(st.integers(DATA, DATA + DATA_SIZE), st.integers(0, MEMORY_SIZE + 0x100)),
    LENGTHS,
    st.integers(0, 7),
    st.integers(0, SIZE),
)


class Transport:
    """A transport that ignores the device's calls."""

    def notify(self, index: int) -> None:
        """Ignore it."""

    def config_changed(self) -> None:
        """Ignore it."""

    def watch(self, fd: int, index: int) -> None:
        """Ignore it."""

    def unwatch(self, fd: int) -> None:
        """Ignore it."""


def image() -> RawImage:
    """Return an empty disk in memory; the caller closes it."""
    fd = os.memfd_create("disk")
    os.ftruncate(fd, IMAGE_SIZE)
    return RawImage(HostFile(fd, "disk", is_read_only=False), is_probed=False)


def rng() -> Backend:
    """Return an entropy source whose bucket never fills again."""
    device = VirtioRng(FakeClock(), bytes)
    device.attach(Transport())
    return device


def console() -> Backend:
    """Return a console that drops output, with some input waiting."""
    device = VirtioConsole(lambda _: None, on_receive_room=lambda: None)
    device.attach(Transport())
    device.receive(bytes(100))
    return device


def vsock() -> Backend:
    """Return a socket device without listeners on the host."""
    device = VirtioVsock(VsockSpec())
    device.attach(Transport())
    return device


class SharedFolder(VirtioFs):
    """A file system that owns its root too."""

    def __init__(self) -> None:
        self._root = open_root("/usr/share")
        super().__init__(FuseServer(Tree(self._root), is_writable=False), b"tag")

    def close(self) -> None:
        """Close it."""
        super().close()
        os.close(self._root)


DEVICES: dict[str, Callable[[], Backend]] = {
    "blk": lambda: VirtioBlk(image(), name="disk0", queues=2),
    "scsi": lambda: VirtioScsi(image()),
    "scsi without a disc": lambda: VirtioScsi(None),
    "rng": rng,
    "console": console,
    "pmem": lambda: VirtioPmem(0, IMAGE_SIZE, lambda: None, name="pmem0"),
    "vsock": vsock,
    "balloon": lambda: VirtioBalloon(GuestMemory(((0, MEMORY_SIZE),))),
    "fs": SharedFolder,
}


@contextmanager
def started(make: Callable[[], Backend], features: int) -> Iterator[Backend]:
    """Yield a device whose driver is ready."""
    device = make()
    try:
        device.start(device.features | features)
        yield device
        device.reset()
    finally:
        device.close()


@pytest.mark.parametrize("make", DEVICES.values(), ids=DEVICES)
@given(
    FEATURES,
    st.lists(DESCRIPTORS, min_size=SIZE, max_size=SIZE),
    st.lists(st.integers(0, SIZE), min_size=SIZE, max_size=SIZE + 1),
    st.lists(BYTES, min_size=4, max_size=4),
)
def test_any_ring(
    make: Callable[[], Backend],
    features: int,
    table: list[tuple[int, int, int, int]],
    heads: list[int],
    data: list[list[int]],
) -> None:
    """Only GuestError is raised, and only taken chains are returned."""
    with started(make, features) as device:
        for number in range(len(device.queue_sizes)):
            memory = PlainMemory(MEMORY_SIZE)
            for at, piece in enumerate(data):
                start = DATA + at * DATA_SIZE // len(data)
                memory.bytes[start : start + len(piece)] = bytes(piece)
            driver = DriverQueue(memory, SIZE)
            for slot, descriptor in enumerate(table):
                driver.describe(slot, descriptor)
            for head in heads:
                driver.make_available(head)
            queue = driver.device(memory, features)
            with suppress(GuestError):
                device.process(number, queue)
            # By the device's own count: its writes may have hit the rings.
            assert queue.next_used <= queue.next_available
