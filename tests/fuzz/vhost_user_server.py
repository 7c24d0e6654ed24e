"""Fuzz target: a vhost-user server whose front-end sends anything and breaks its rings.

It uses the test suite's front-end: its memory, eventfds and rings are right, and the input chooses
the order of messages and their faults. After each step the server does all its pending work. The
connection ends with one line, or continues; the server leaks nothing.
"""

from __future__ import annotations

import array
import os
import socket

from tests.fuzz.inputs import Input, check_line
from tests.unit.virtio.vhost_user.rig import GPA, USER, VERSION_1, Driver, driver
from vmm_kvm.block.file import HostFile
from vmm_kvm.block.raw import RawImage
from vmm_kvm.loop import EventLoop
from vmm_kvm.virtio.blk import VirtioBlk
from vmm_kvm.virtio.vhost_user.channel import Channel
from vmm_kvm.virtio.vhost_user.messages import (
    FEATURE_PROTOCOL_FEATURES,
    ConfigAccess,
    Header,
    MemoryRegion,
    Request,
    VringAddress,
    VringState,
    pack_region,
    pack_regions,
    pack_u64,
)
from vmm_kvm.virtio.vhost_user.session import Session

DISK_SIZE = 64 << 10
STEPS_MAX = 64
REQUESTS = tuple(Request)
_RING_REQUESTS = (Request.SET_VRING_KICK, Request.SET_VRING_CALL, Request.SET_VRING_ERR)
_NUMBERS = (0, 1, 2, 8, 256, 0x1A209, VERSION_1 | FEATURE_PROTOCOL_FEATURES, GPA, USER)
_RINGS_SIZE = 0x6000


class FrontEnd:
    """Sends the messages of an input; the server works after each step."""

    def __init__(self, guest: Driver, connection: socket.socket) -> None:
        self._guest = guest
        self._socket = connection
        connection.setblocking(False)
        self._null = os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC)

    def close(self) -> None:
        """Close the connection."""
        self._socket.close()
        os.close(self._null)

    def step(self, given: Input) -> None:
        """Send or do one thing."""
        match given.number(1) % 6:
            case 0 | 1:
                request = given.choice(REQUESTS)
                self._say(request, self._payload(request, given), given.number(1))
            case 2:
                self._start_ring(given.number(1) & 1)
            case 3:
                gpa = given.number(8) if given.number(1) == 255 else None
                size = given.number(2) % 2048
                ring = given.number(1) & 1
                header = given.number(1).to_bytes(8, "little") + given.piece(8).ljust(8, b"\0")
                self._guest.offer(header + bytes(size), ring, room=given.number(2) % 4096, gpa=gpa)
                self._guest.notify(ring)
            case 4:
                at = given.number(2) % _RINGS_SIZE
                piece = given.piece(given.number(1))
                self._guest.memory[at : at + len(piece)] = piece
                self._guest.notify(given.number(1) & 1)
            case _:
                self._send(given.piece(given.number(1)), 0)

    def _start_ring(self, ring: int) -> None:
        """Send all messages that start a ring, as an honest front-end does."""
        guest = self._guest
        self._say(Request.SET_FEATURES, pack_u64(VERSION_1 | FEATURE_PROTOCOL_FEATURES), 0)
        self._say(Request.SET_MEM_TABLE, pack_regions([guest.region]), 1)
        self._say(Request.SET_VRING_NUM, VringState(ring, 8).pack(), 0)
        self._say(Request.SET_VRING_ADDR, guest.address(ring).pack(), 0)
        for request in _RING_REQUESTS[1:] + _RING_REQUESTS[:1]:
            self._say(request, pack_u64(ring), 1)
        self._say(Request.SET_VRING_ENABLE, VringState(ring, 1).pack(), 0)

    def _number(self, given: Input) -> int:
        kind = given.number(1)
        if kind == 255:
            return given.number(8)
        return _NUMBERS[kind % len(_NUMBERS)] + (given.number(2) if kind & 0x40 else 0)

    def _region(self, given: Input) -> MemoryRegion:
        region = self._guest.region
        fields = given.number(1)
        for bit, name in enumerate(MemoryRegion._fields):
            if fields >> bit & 1:
                region = region._replace(**{name: self._number(given) & 2**64 - 1})
        return region

    def _payload(self, request: Request, given: Input) -> bytes:
        number = self._number(given) & 2**64 - 1
        small = number & 2**32 - 1
        match request:
            case Request.SET_MEM_TABLE:
                return pack_regions([self._region(given) for _ in range(given.number(1) % 9)])
            case Request.ADD_MEM_REG | Request.REM_MEM_REG:
                return pack_region(self._region(given))
            case Request.SET_VRING_ADDR:
                address: VringAddress = self._guest.address(given.number(1) & 1)
                fields = given.number(1)
                if fields & 1:
                    address = address._replace(descriptor=number)
                if fields & 2:
                    address = address._replace(used=number)
                if fields & 4:
                    address = address._replace(available=number)
                if fields & 8:
                    address = address._replace(ring=small, flags=small)
                return address.pack()
            case (
                Request.SET_VRING_NUM
                | Request.SET_VRING_BASE
                | Request.GET_VRING_BASE
                | Request.SET_VRING_ENABLE
            ):
                return VringState(given.number(1) % 4, small).pack()
            case Request.GET_CONFIG | Request.SET_CONFIG:
                data = given.piece(given.number(1))
                return ConfigAccess(small, given.number(1), data).pack()
            case _:
                return pack_u64(number) if given.number(1) & 1 else b""

    def _say(self, request: Request, payload: bytes, how: int) -> None:
        """Send a message; `how` gives the number of descriptors, and chooses them."""
        size = len(payload) + (1 if how & 0x40 else 0)
        flags = 1 | (8 if how & 0x20 else 0) | (4 if how & 0x80 else 0)
        self._send(Header(request, flags, size).pack() + payload, how & 0xF, is_memory=how & 0x10)

    def _send(self, data: bytes, count: int, *, is_memory: int = 0) -> None:
        guest = self._guest
        request = data[0] if data else 0
        wants_memory = request in {Request.SET_MEM_TABLE, Request.ADD_MEM_REG}
        fd = guest.fd if wants_memory != bool(is_memory) else guest.kick[0]
        fds = [fd, self._null, *guest.call, *guest.kick, *guest.error][:count]
        ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        try:
            if data:
                self._socket.sendmsg([data], ancillary, socket.MSG_NOSIGNAL)
            self._socket.recv(4096)
        except OSError:  # nothing was sent, or the server has ended the connection
            return


def run(data: bytes) -> None:
    """Run a conversation."""
    given = Input(data)
    image = os.memfd_create("disk", os.MFD_CLOEXEC)
    os.ftruncate(image, DISK_SIZE)
    ended: list[str | None] = []
    theirs, ours = socket.socketpair()
    ours.setblocking(False)
    backend = VirtioBlk(
        RawImage(HostFile(image, "disk", is_read_only=False), is_probed=True),
        name="disk",
        queues=2,
    )
    with driver() as guest, EventLoop() as loop:
        front_end = FrontEnd(guest, theirs)
        session = Session(Channel(ours), backend, loop, ended.append)
        try:
            for _ in range(STEPS_MAX):
                if given.is_over or ended:
                    break
                front_end.step(given)
                _turn(loop)
        finally:
            front_end.close()
        for _ in range(2 if not ended else 0):
            _turn(loop)
        session.close()
        backend.close()
        assert len(ended) <= 1
        for reason in ended:
            if reason is not None:
                check_line(reason)


def _turn(loop: EventLoop) -> None:
    """Run the loop until it is idle, for at most a few rounds."""
    for _ in range(3):
        loop.call_soon(loop.stop)
        loop.run()


def seeds() -> list[bytes]:
    """Return conversations of each kind: rings started and served, each request alone."""
    started = bytes([2, 0, 2, 1])
    read, write = bytes([3, 0, 0, 2, 0, 0]) + bytes(8), bytes([3, 0, 0, 2, 0, 1]) + bytes(8)
    served = started + (read + b"\x01\x02" + write + b"\x01\x00") * 2
    found = [started, served, served + bytes([4, 2, 0x10, 4, 9, 9, 9, 9, 0]), bytes([5, 20]) * 12]
    for number in range(len(REQUESTS)):
        found.append(bytes([0, number, 1, 1, 0]))
        found.append(started + bytes([0, number, 5, 0, 1, 0]) + bytes([0, number, 6, 1, 1, 0x21]))
    return found
