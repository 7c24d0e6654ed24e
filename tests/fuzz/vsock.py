"""Fuzz target: the vsock device, between a driver and clients of the host that do anything.

Data of a guest arrive in order or not at all; packets to it are well-formed, and never more than it
has room for if it keeps the rules; all queues are bounded, and the device comes to rest after each
step.
"""

from __future__ import annotations

import socket
from contextlib import suppress

from tests.fuzz.inputs import Input, check_line
from tests.unit.virtio.vsock_rig import Rig
from tests.vsock_driver import CID
from vmm_kvm.errors import GuestError
from vmm_kvm.virtio.vsock import CONNECTIONS_MAX, REPLIES_MAX, VsockState
from vmm_kvm.virtio.vsock_connection import WINDOW
from vmm_kvm.virtio.vsock_packet import HOST_CID, STREAM, Header, Op

STEPS_MAX = 200
ROUNDS_MAX = 64
"""Rounds in which the device must finish a step's work."""
_GUEST_PORTS = (1, 2, 3, 0xFFFF_FFFF)
_HOST_PORTS = (7, 8, 9, 10, 1 << 30, (1 << 30) + 1)
_EXTREMES = (0, 1, 0x1000, 0x2_0000, 0x8000_0000, 0xFFFF_F000, 0xFFFF_FFFF)
_PATTERN = bytes(number * 7 % 251 for number in range(251)) * 600
_ROOM = 1 << 20


class Opened:
    """A connection that the guest has opened: the data that it sent, and those that arrived."""

    def __init__(self, ports: tuple[int, int], sock: socket.socket) -> None:
        self.ports = ports
        self.sock = sock
        self.said = bytearray()
        self.read = bytearray()


class Session:
    """A device, its driver, and the host's side."""

    def __init__(self) -> None:
        self.rig = Rig()
        self.opened: list[Opened] = []
        self.by_ports: dict[tuple[int, int], Opened] = {}
        self._pattern_at = 0

    def step(self, given: Input) -> None:
        """Do one thing."""
        rig, before = self.rig, self.rig.rounds
        match given.number(1) % 16:
            case 0 | 1:
                rig.driver.offer(min(given.number(1), rig.driver.free))
            case 2 | 3 | 4:
                self._send(given, _honest(given))
            case 5 | 6:
                self._send(given, _any(given))
            case 7:
                rig.driver.send_raw(given.piece(given.number(1) % 80 + 1) or b"\0")
            case 8:
                if len(rig.opened) < CONNECTIONS_MAX + 8:
                    rig.connect(_GUEST_PORTS[given.number(1) % 4])
            case 9 | 10:
                self._write(given)
            case 11:
                self._read(given)
            case 12:
                self._end(given)
            case 13:
                rig.driver.offer_event()
            case 14:
                self._change(given)
            case _:
                rig.serve()
        assert rig.rounds - before <= ROUNDS_MAX, "the device does not come to rest"
        self.check()

    def _send(self, given: Input, header: Header) -> None:
        size = given.number(2) if header.op == Op.RW else given.number(1) % 8
        data = _PATTERN[self._pattern_at : self._pattern_at + size]
        self._pattern_at = (self._pattern_at + size) % 251
        if not given.number(1) % 8:
            header = header._replace(length=given.choice(_EXTREMES))
        else:
            header = header._replace(length=len(data))
        ports = header.src_port, header.dst_port
        known = self.by_ports.get(ports)
        is_addressed = header[:2] == (CID, HOST_CID) and header.type == STREAM
        if known and is_addressed and header.op == Op.RW and header.length <= len(data):
            known.said += data[: header.length]
        count = len(self.rig.dialled)
        self.rig.driver.send_raw(header.pack() + data)
        for sock in self.rig.dialled[count:]:
            one = Opened(ports, sock)
            self.opened.append(one)
            self.by_ports[ports] = one

    def _ours(self, given: Input) -> socket.socket | None:
        socks = (*self.rig.dialled, *self.rig.opened)
        return socks[given.number(1) % len(socks)] if socks else None

    def _write(self, given: Input) -> None:
        sock, size = self._ours(given), given.number(2)
        if sock and sock.fileno() >= 0:
            with suppress(OSError):  # full, or reset
                sock.send(_PATTERN[:size])
            self.rig.serve()

    def _read(self, given: Input) -> None:
        size = given.number(3) or 1
        if not self.opened:
            return
        one = self.opened[given.number(1) % len(self.opened)]
        if one.sock.fileno() >= 0:
            with suppress(OSError):  # nothing there, or reset
                one.read += one.sock.recv(size)
            self.rig.serve()

    def _end(self, given: Input) -> None:
        sock, how = self._ours(given), given.number(1) % 4
        if sock and sock.fileno() >= 0:
            if how == 3:
                sock.close()
            else:
                with suppress(OSError):  # it has ended
                    sock.shutdown((socket.SHUT_RD, socket.SHUT_WR, socket.SHUT_RDWR)[how])
            self.rig.serve()

    def _change(self, given: Input) -> None:
        if given.number(1) % 8:
            return
        self.rig.device.become_another()
        self.rig.device.restore(VsockState(cid=CID))
        self.by_ports.clear()
        self.rig.serve()

    def check(self) -> None:
        """Check the device's promises."""
        for packet in self.rig.driver.packets():
            header = packet.header
            assert header.dst_cid == CID
            assert header.op in set(Op)
            assert header.length == len(packet.data)
            assert header.op == Op.RW or not packet.data
            assert header.op == Op.RST or (header.src_cid, header.type) == (HOST_CID, STREAM)
        replies, buffered = self.rig.device.waiting
        assert replies <= REPLIES_MAX + 2 * CONNECTIONS_MAX
        assert len(buffered) <= CONNECTIONS_MAX
        assert max(buffered, default=0) <= WINDOW
        for one in self.opened:
            assert one.said.startswith(one.read), "what the guest has not sent"

    def close(self) -> None:
        """End everything."""
        self.rig.close()


def _honest(given: Input) -> Header:
    """Return a header as a guest's kernel makes them."""
    op = given.choice((Op.REQUEST, Op.RESPONSE, Op.RW, Op.RW, *Op))
    ports = given.choice(_GUEST_PORTS[:3]), given.choice(_HOST_PORTS)
    flags = given.number(1) % 4 if op == Op.SHUTDOWN else 0
    room = given.choice(_EXTREMES) if not given.number(1) % 4 else _ROOM
    return Header(CID, HOST_CID, *ports, 0, STREAM, op, flags, room, given.number(2))


def _any(given: Input) -> Header:
    """Return any header."""
    return Header(
        src_cid=CID if given.number(1) % 8 else given.number(8),
        dst_cid=HOST_CID if given.number(1) % 4 else given.number(8),
        src_port=given.choice(_GUEST_PORTS),
        dst_port=given.choice(_HOST_PORTS) if given.number(1) % 4 else given.number(4),
        length=0,
        type=STREAM if given.number(1) % 4 else given.number(2),
        op=given.number(1) % 10 if given.number(1) % 8 else given.number(2),
        flags=given.number(4),
        buf_alloc=given.choice(_EXTREMES),
        fwd_cnt=given.choice(_EXTREMES),
    )


def run(data: bytes) -> None:
    """Run a session."""
    given = Input(data)
    session = Session()
    try:
        for _ in range(STEPS_MAX):
            if given.is_over:
                return
            session.step(given)
    except GuestError as err:
        check_line(str(err))
    finally:
        session.close()


def seeds() -> list[bytes]:
    """Return sessions that open, use and end connections of both directions."""
    offer = bytes([0, 16])
    request = bytes([2, 0, 0, 0, 1, 0, 0, 0, 1])
    data = bytes([2, 2, 0, 0, 1, 0, 0, 0, 8, 1])
    shut = bytes([2, 7, 0, 0, 3, 1, 0, 0, 0, 1])
    write, read = bytes([9, 0, 0, 16]), bytes([11, 0, 16, 0, 0])
    large, drain = bytes([2, 2, 0, 0, 1, 0, 0, 255, 255, 1]), bytes([11, 255, 255, 0, 0])
    response = bytes([2, 1, 0, 4, 1, 0, 0, 0, 1])
    return [
        offer + request + data + read + write + offer + shut + offer,
        offer + bytes([8, 0]) + response + write + offer + bytes([12, 0, 3]) + offer,
        offer + request + data * 8 + shut + read * 4,
        offer + request + (large + offer) * 5 + drain * 6 + offer + large + shut + drain * 4,
        offer + request + (large + offer) * 8 + drain * 9,
        offer + request + (large + offer) * 5 + bytes([12, 0, 1]) + bytes([12, 0, 3]) + offer,
        request * 3 + bytes([13, 14, 1, 13]) + offer + request + bytes([14, 0]) + offer,
        offer + bytes([5]) + bytes(range(1, 60)) + offer + bytes([7, 43]) + bytes(44) + offer,
        offer + request + bytes([9, 0, 255, 255]) * 6 + (offer + bytes([15])) * 6,
        bytes([2, 0, 0, 10, 1, 0, 0, 0, 1]) * 40 + offer * 4,
    ]
