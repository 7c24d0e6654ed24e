"""Taps of this host's kernel: frames, filters, queues, and the device that sits on them.

Each test has a network namespace of its own; the host's network is not touched.
"""

from __future__ import annotations

import ctypes
import os
import select
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from tests.unit.virtio.vhost_user.rig import serving
from tests.virtio_driver import DriverQueue, PlainMemory
from vmm_kvm.errors import SpecError
from vmm_kvm.net.ethernet import Filter, locked_filter
from vmm_kvm.net.tap import HEADER_SIZE, Tap, open_tap
from vmm_kvm.virtio import abi
from vmm_kvm.virtio.net import VirtioNet
from vmm_kvm.virtio.vhost_user.client import Client
from vmm_kvm.virtio.vhost_user.frontend import NET, VhostUser
from vmm_kvm.virtio.worker import Worker

pytestmark = [pytest.mark.root]

NAME = "tap0"
MAC = bytes.fromhex("fee1bb000001")
OTHER = bytes.fromhex("fee1bb000002")
GROUP = bytes.fromhex("01005e000001")
TYPE = b"\x88\xb5"  # for experiments on one's own network
HEADER = bytes(HEADER_SIZE)
WAIT_S = 10.0
_CLONE_NEWNET = 0x40000000
_libc = ctypes.CDLL(None, use_errno=True)


@pytest.fixture(autouse=True)
def namespace() -> Iterator[None]:
    """Have the main thread in a network namespace of its own, without IPv6's own chatter."""
    before = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    try:
        if _libc.unshare(_CLONE_NEWNET):
            pytest.skip("no network namespaces here")
        with suppress(FileNotFoundError):  # a kernel without IPv6
            Path("/proc/sys/net/ipv6/conf/default/disable_ipv6").write_text("1")
        yield
        assert _libc.setns(before, _CLONE_NEWNET) == 0
    finally:
        os.close(before)


@contextmanager
def tap(queues: int = 1) -> Iterator[tuple[Tap, socket.socket]]:
    """Make a tap that is up, and a socket at its other end."""
    fds = open_tap(NAME, queues)
    try:
        subprocess.run(["ip", "link", "set", NAME, "up"], check=True)
        outside = socket.socket(
            socket.AF_PACKET, socket.SOCK_RAW, socket.htons(int.from_bytes(TYPE, "big"))
        )
        with outside:
            outside.bind((NAME, int.from_bytes(TYPE, "big")))
            outside.settimeout(WAIT_S)
            yield Tap(fds, NAME), outside
    finally:
        for fd in fds:
            os.close(fd)


def frame(target: bytes, source: bytes = OTHER, size: int = 60) -> bytes:
    """Return a frame of `size` bytes."""
    return (target + source + TYPE).ljust(size, b"\xaa")


def arrived(device: Tap, queue: int = 0) -> list[bytes]:
    """Return the frames that wait in a queue, without their headers."""
    buffer = memoryview(bytearray(70000))
    found = []
    while size := device.receive(queue, [buffer]):
        found.append(bytes(buffer[HEADER_SIZE:size]))
    return found


def test_frames_pass_both_ways() -> None:
    """A frame that is sent comes out at the other end, either way."""
    with tap() as (device, outside):
        outside.send(frame(MAC))
        assert arrived(device) == [frame(MAC)]
        assert device.send(0, [HEADER, frame(OTHER, MAC)])
        assert outside.recv(2000) == frame(OTHER, MAC)


def test_the_kernel_checks_what_a_guest_says() -> None:
    """A header that makes no sense loses its frame, and nothing else."""
    with tap() as (device, outside):
        nonsense = b"\1\xff" + b"\xff" * (HEADER_SIZE - 2)
        assert not device.send(0, [nonsense, frame(OTHER, MAC)])
        assert not device.send(0, [b"short"])
        assert device.send(0, [HEADER, frame(OTHER, MAC)])
        assert outside.recv(2000) == frame(OTHER, MAC)


@pytest.mark.parametrize(
    ("wanted", "targets"),
    [
        (None, [MAC, OTHER, GROUP]),
        (Filter(MAC), [MAC, OTHER, GROUP]),
        (Filter(MAC, is_promiscuous=False), [MAC]),
        (Filter(MAC, is_promiscuous=False, group=frozenset({GROUP})), [MAC, GROUP]),
        (Filter(MAC, is_promiscuous=False, unicast=frozenset({OTHER})), [MAC, OTHER]),
        (locked_filter(MAC), [MAC, GROUP]),
    ],
)
def test_the_kernel_filters(wanted: Filter | None, targets: list[bytes]) -> None:
    """Frames that the guest does not want are dropped before anyone sees them."""
    with tap() as (device, outside):
        device.set_filter(wanted)
        for target in (MAC, OTHER, GROUP):
            outside.send(frame(target))
        assert arrived(device) == [frame(target) for target in targets]
        device.close()
        outside.send(frame(OTHER))
        assert arrived(device) == [frame(OTHER)]


def test_queues_come_and_go() -> None:
    """Only queues that are in use get frames, and saying so twice does no harm."""
    with tap(2) as (device, outside):
        for _ in range(2):
            device.set_queues(1)
        for _ in range(50):
            outside.send(frame(MAC))
        assert (len(arrived(device, 0)), arrived(device, 1)) == (50, [])
        for _ in range(2):
            device.set_queues(2)
        assert device.send(1, [HEADER, frame(OTHER, MAC)])
        assert outside.recv(2000) == frame(OTHER, MAC)


def test_what_is_no_tap() -> None:
    """Other descriptors, and taps of another kind, are refused with one line."""
    with Path("/dev/null").open("rb") as file, pytest.raises(SpecError, match="not a tap"):
        Tap([file.fileno()], NAME)
    with pytest.raises(SpecError, match="not the name of an interface"):
        open_tap("x" * 16)
    with tap(), pytest.raises(SpecError, match=f"{NAME}: "):
        open_tap(NAME)


class RecordingFrontend:
    """A Frontend that interrupts by eventfds of the test."""

    def __init__(self, calls: list[int]) -> None:
        self._calls = calls
        self.failures: list[str] = []

    def interrupt(self, index: int) -> None:
        """Write what the test waits for."""
        os.eventfd_write(self._calls[index], 1)

    def interrupt_fd(self, _index: int) -> int | None:
        """Have it done by hand."""
        return None

    def config_changed(self) -> None:
        """Ignore it."""

    def fail(self, reason: str) -> None:
        """Remember why."""
        self.failures.append(reason)


def wait(fd: int) -> None:
    """Wait for an interrupt."""
    ready, _, _ = select.select([fd], [], [], WAIT_S)
    assert ready, "no interrupt"
    os.eventfd_read(fd)


@pytest.mark.parametrize("is_locked", [False, True])
def test_a_device_on_a_tap(is_locked: bool) -> None:
    """Frames reach the driver's buffers and leave them; each arrival wakes the device's thread."""
    memory = PlainMemory()
    queues = [DriverQueue(memory, 8, base) for base in (0x1000, 0x2000)]
    calls = [os.eventfd(0, os.EFD_CLOEXEC) for _ in queues]
    frontend = RecordingFrontend(calls)
    features = 1 << abi.VIRTIO_NET_F_MRG_RXBUF
    try:
        with tap() as (port, outside):
            backend = VirtioNet(port, MAC, name=NAME, is_locked=is_locked)
            worker = Worker(backend, memory, NAME)
            backend.attach(worker)
            worker.attach(frontend)
            for _ in range(2):  # a driver may come back
                worker.start(features, {at: queue.ring for at, queue in enumerate(queues)})
                for number in range(20):
                    at = 0x10000 + 0x1000 * (number % 8)
                    queues[0].add((at, 1500, True))
                    worker.kick(0)
                    outside.send(frame(MAC, size=60 + number))
                    wait(calls[0])
                    ((_, written),) = queues[0].used()
                    received = bytes(memory.bytes[at + HEADER_SIZE : at + written])
                    assert received == frame(MAC, size=60 + number)
                    memory.bytes[at : at + 72] = HEADER + frame(OTHER, MAC)
                    queues[1].add((at, 72, False))
                    worker.kick(1)
                    wait(calls[1])
                    assert outside.recv(2000) == frame(OTHER, MAC)
                    assert len(queues[1].used()) == 1
                worker.stop()
                queues = [DriverQueue(memory, 8, base) for base in (0x1000, 0x2000)]
                memory.bytes[:0x4000] = bytes(0x4000)
            worker.close()
    finally:
        for fd in calls:
            os.close(fd)
    assert frontend.failures == []
