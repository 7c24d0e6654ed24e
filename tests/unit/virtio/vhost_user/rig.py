"""Both ends of vhost-user for tests: a backend, a server thread, and a driver with its memory."""

from __future__ import annotations

import mmap
import os
import select
import socket
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from vmm_kvm.errors import GuestMemoryError, HaltError
from vmm_kvm.loop import EventLoop
from vmm_kvm.memory import Region
from vmm_kvm.state import Part
from vmm_kvm.virtio.device import Backend
from vmm_kvm.virtio.queue import Ring, Virtqueue
from vmm_kvm.virtio.vhost_user.client import Client
from vmm_kvm.virtio.vhost_user.messages import MemoryRegion, VringAddress
from vmm_kvm.virtio.vhost_user.server import Server
from vmm_kvm.write_log import WriteLog

VERSION_1 = 1 << 32
EVENT_IDX = 1 << 29
BACKEND_FEATURE = 1 << 5
QUEUE_SIZE = 8
RINGS = 4
MEMORY_SIZE = 0x4_0000
GPA = 0x10_0000
"""The guest-physical address of the driver's memory."""
USER = 0x7F00_0000_0000
"""Its address in the front-end's process, as the server learns it."""
# Each ring has a page for its descriptors and one for each ring; buffers follow all rings.
_RING_STRIDE = 0x3000
_BUFFERS = 0x2_0000
_SLOT_HALF = 0x2000
_WRITE = 2
_NEXT = 1
EVENT_TIMEOUT_MS = 10_000


class EchoBackend:
    """A device type with two queues that returns what it reads, in capitals."""

    device_id = 42
    features = BACKEND_FEATURE
    queue_sizes: tuple[int, ...] = (QUEUE_SIZE, QUEUE_SIZE)

    def __init__(self) -> None:
        self.space = bytearray(b"configuration")
        self.calls: list[str] = []
        self.served = 0
        self.fault: int | None = None

    def config(self) -> bytes:
        """Return thirteen bytes."""
        return bytes(self.space)

    def write_config(self, offset: int, data: bytes) -> None:
        """Take the part that fits."""
        if offset + len(data) <= len(self.space):
            self.space[offset : offset + len(data)] = data

    def start(self, features: int) -> None:
        """Remember the call."""
        self.calls.append(f"start {features:#x}")

    def process(self, index: int, queue: Virtqueue) -> None:
        """Answer everything in a queue."""
        assert index < len(self.queue_sizes)
        assert self.calls[-1] != "reset"
        while chain := queue.pop():
            if self.fault is not None:
                queue.unpop()
                raise HaltError("echo", self.fault)
            data = b"".join(chain.readable).upper()
            if chain.writable:
                chain.writable[0][: len(data)] = data
            queue.push(chain, len(data))
            self.served += 1

    def reset(self) -> None:
        """Remember the call."""
        self.calls.append("reset")

    def close(self) -> None:
        """Remember the call."""
        self.calls.append("close")

    def parts(self, _name: str) -> list[Part]:
        """Have no state."""
        return []


class ServerThread:
    """An event loop with a Server in a thread of its own; `ended` is set at its end."""

    def __init__(self, sock: socket.socket, backend: Backend, *, is_one_shot: bool) -> None:
        self.ended = threading.Event()
        self._loop = EventLoop()
        self._server = Server(
            sock, backend, self._loop, is_one_shot=is_one_shot, on_end=self.ended.set
        )
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        self._loop.run()
        self._server.close()

    def close(self) -> None:
        """End the server and its thread."""
        self._loop.call_soon(self._loop.stop)
        self._thread.join()
        self._loop.close()


@contextmanager
def serving(
    sock: socket.socket, backend: Backend, *, is_one_shot: bool = False
) -> Iterator[ServerThread]:
    """Serve `backend` on `sock` in a thread."""
    server = ServerThread(sock, backend, is_one_shot=is_one_shot)
    try:
        yield server
    finally:
        server.close()


def connect(path: str) -> Client:
    """Connect to the server that listens at `path`."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        sock.connect(path)
    except BaseException:
        sock.close()
        raise
    return Client(sock)


@contextmanager
def connection(backend: EchoBackend) -> Iterator[Client]:
    """Serve `backend` in a thread; yield the front-end's side of a connection to it."""
    ours, theirs = socket.socketpair()
    with serving(theirs, backend), Client(ours) as client:
        yield client


class Driver:
    """A driver with rings and buffers in a memfd of its own; one chain per descriptor pair."""

    def __init__(self) -> None:
        self.fd = os.memfd_create("driver", os.MFD_CLOEXEC)
        os.ftruncate(self.fd, MEMORY_SIZE)
        self.memory = mmap.mmap(self.fd, MEMORY_SIZE)
        self.regions: tuple[Region, ...] = (Region(GPA, MEMORY_SIZE, 0),)
        self.kick = [os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK) for _ in range(RINGS)]
        self.call = [os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK) for _ in range(RINGS)]
        self.error = [os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK) for _ in range(RINGS)]
        self.notifiers = self.kick
        self.available = [0] * RINGS
        self.writes = WriteLog()

    def close(self) -> None:
        """Close every descriptor."""
        self.memory.close()
        for fd in (self.fd, *self.kick, *self.call, *self.error):
            os.close(fd)

    def view(self, gpa: int, size: int) -> memoryview:
        """Return a view of the memory, as GuestMemory does."""
        if not GPA <= gpa <= gpa + size <= GPA + MEMORY_SIZE:
            raise GuestMemoryError(gpa, size)
        return memoryview(self.memory)[gpa - GPA : gpa - GPA + size]

    @property
    def region(self) -> MemoryRegion:
        """The driver's memory, as the front-end shares it."""
        return MemoryRegion(GPA, MEMORY_SIZE, USER, 0)

    def address(self, ring: int) -> VringAddress:
        """Return a ring's place, in user addresses."""
        base = USER + ring * _RING_STRIDE
        return VringAddress(ring, 0, base, base + 0x2000, base + 0x1000, 0)

    def ring(self, ring: int) -> Ring:
        """Return a ring's place, in guest-physical addresses."""
        base = GPA + ring * _RING_STRIDE
        return Ring(QUEUE_SIZE, base, base + 0x1000, base + 0x2000)

    def set_up(self, client: Client, ring: int, base: int = 0) -> None:
        """Describe a ring to the server and start it."""
        client.set_size(ring, QUEUE_SIZE)
        client.set_base(ring, base)
        client.set_address(self.address(ring))
        client.set_call(ring, self.call[ring])
        client.set_error(ring, self.error[ring])
        client.set_kick(ring, self.kick[ring])
        client.enable(ring, True)

    def start(self, client: Client, features: int = VERSION_1) -> None:
        """Negotiate, share the memory, and start ring 0."""
        client.set_features(features)
        client.set_memory([self.region], [self.fd])
        self.set_up(client, 0)

    def forget(self) -> None:
        """Put the rings into the state after a reset of the device."""
        self.memory[: RINGS * _RING_STRIDE] = bytes(RINGS * _RING_STRIDE)
        self.available = [0] * RINGS

    def offer(self, data: bytes, ring: int = 0, *, room: int = 64, gpa: int | None = None) -> int:
        """Make a request available without notifying; returns its slot.

        `data`, and an answer of at most `room` bytes, up to 8 KiB each. The request lies at `gpa`
        instead of in its slot, if that is given.
        """
        slot = self.available[ring] % (QUEUE_SIZE // 2)
        head = 2 * slot
        place = self._slot(ring, slot)
        self.memory[place : place + len(data)] = data
        table = ring * _RING_STRIDE
        address = GPA + place if gpa is None else gpa
        struct.pack_into(
            "<QIHHQIHH",
            *(self.memory, table + 16 * head),
            *(address, len(data), _NEXT, head + 1),
            *(GPA + place + _SLOT_HALF, room, _WRITE, 0),
        )
        entries = table + 0x1000
        at = self.available[ring] % QUEUE_SIZE
        struct.pack_into("<H", self.memory, entries + 4 + 2 * at, head)
        # With EVENT_IDX: interrupt for this request.
        struct.pack_into("<H", self.memory, entries + 4 + 2 * QUEUE_SIZE, self.available[ring])
        self.available[ring] = (self.available[ring] + 1) & 0xFFFF
        struct.pack_into("<H", self.memory, entries + 2, self.available[ring])
        return slot

    def notify(self, ring: int = 0) -> None:
        """Write the descriptor that notifies the device: by default our own."""
        os.eventfd_write(self.notifiers[ring], 1)

    def used(self, ring: int = 0) -> int:
        """Return the index of the used ring."""
        index: int = struct.unpack_from("<H", self.memory, ring * _RING_STRIDE + 0x2002)[0]
        return index

    def answer(self, slot: int, size: int, ring: int = 0) -> bytes:
        """Return the device's answer to the request in `slot`."""
        place = self.answer_place(slot, ring)
        return self.memory[place : place + size]

    def answer_place(self, slot: int, ring: int = 0) -> int:
        """Return the address at which that begins."""
        return self._slot(ring, slot) + _SLOT_HALF

    @staticmethod
    def _slot(ring: int, slot: int) -> int:
        return _BUFFERS + (ring * QUEUE_SIZE + 2 * slot) * _SLOT_HALF

    def wait(self, ring: int = 0, *, used: int) -> None:
        """Wait for interrupts until the used index has the value `used`."""
        while self.used(ring) != used:
            wait_for(self.call[ring])

    def request(self, data: bytes, ring: int = 0, *, size: int | None = None) -> bytes:
        """Send one request and return its answer of `size` bytes, by default that of `data`."""
        size = len(data) if size is None else size
        slot = self.offer(data, ring, room=size)
        self.notify(ring)
        self.wait(ring, used=self.available[ring])
        return self.answer(slot, size, ring)


@contextmanager
def driver() -> Iterator[Driver]:
    """Yield a driver that is closed afterwards."""
    one = Driver()
    try:
        yield one
    finally:
        one.close()


def wait_for(fd: int) -> None:
    """Wait until an eventfd was written, and reset it; fails after ten seconds."""
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    assert poll.poll(EVENT_TIMEOUT_MS), "nothing happened"
    os.eventfd_read(fd)


def is_set(fd: int) -> bool:
    """Tell whether an eventfd was written, and reset it."""
    try:
        os.eventfd_read(fd)
    except BlockingIOError:
        return False
    return True
