"""Fuzz target: our end of vhost-user with a server that answers anything.

The input is the server's answers, as messages or as bytes. The device is made, or refused in
one line; the driver finds it working or failed. Nothing waits for an answer that cannot come.
"""

from __future__ import annotations

import os
import socket

from tests.fuzz.inputs import Input, check_line
from tests.unit.virtio.vhost_user.rig import QUEUE_SIZE, VERSION_1, Driver, driver
from vmm_kvm.errors import GuestError, HaltError
from vmm_kvm.virtio.queue import Ring
from vmm_kvm.virtio.vhost_user.client import Client
from vmm_kvm.virtio.vhost_user.frontend import BLOCK, NET, VhostUser, net_data
from vmm_kvm.virtio.vhost_user.messages import (
    FEATURE_PROTOCOL_FEATURES,
    ConfigAccess,
    Header,
    Request,
    VhostUserError,
    VringState,
    pack_u64,
)

KINDS = (BLOCK, NET, net_data(2))
ANSWERS_MAX = 64
STEPS_MAX = 16
_FEATURES = VERSION_1 | FEATURE_PROTOCOL_FEATURES | 1 << 12 | 1 << 22 | 1 << 17


class Frontend:
    """Receives the device's calls for its driver."""

    def __init__(self, guest: Driver) -> None:
        self._guest = guest
        self.failures: list[str] = []

    def interrupt(self, index: int) -> None:
        """Interrupt."""
        os.eventfd_write(self._guest.call[index], 1)

    def interrupt_fd(self, index: int) -> int | None:
        """Return no eventfd for odd queues: the device then calls `interrupt`."""
        return None if index & 1 else self._guest.call[index % len(self._guest.call)]

    def config_changed(self) -> None:
        """Ignore it."""

    def fail(self, reason: str) -> None:
        """Record the reason."""
        self.failures.append(reason)

    def halt(self, err: HaltError) -> None:
        """Record the reason."""
        self.failures.append(str(err))


def _answer(given: Input) -> bytes:
    """Return one answer of the server, mostly a right one."""
    kind = given.number(1)
    match kind % 8:
        case 0:
            return _message(Request.GET_FEATURES, pack_u64(_FEATURES | given.number(2) << 5))
        case 1:
            features = 0x209 if kind & 0x80 else given.number(4)
            return _message(Request.GET_PROTOCOL_FEATURES, pack_u64(features))
        case 2:
            return _message(Request.GET_QUEUE_NUM, pack_u64(given.number(2)))
        case 3:
            size = 12 if kind & 0x40 else 60
            data = given.piece(size).ljust(size, b"\0")
            return _message(Request.GET_CONFIG, ConfigAccess(0, 0, data).pack())
        case 4:
            payload = VringState(given.number(1), given.number(4)).pack()
            return _message(Request.GET_VRING_BASE, payload)
        case 5:  # the answer that FLAG_NEED_REPLY asks for
            return _message(given.number(1), pack_u64(given.number(1)))
        case 6:
            return _message(given.number(1), given.piece(given.number(1)), given.number(1))
        case _:
            return given.piece(given.number(1))


def _message(request: int, payload: bytes, flags: int = 5) -> bytes:
    return Header(request, flags, len(payload)).pack() + payload


def run(data: bytes) -> None:
    """Be a driver of a device of such a server."""
    given = Input(data)
    kind = given.choice(KINDS)
    steps = Input(given.piece(given.number(1) % (STEPS_MAX + 1)))
    answers = b"".join(_answer(given) for _ in range(ANSWERS_MAX) if not given.is_over)
    theirs, ours = socket.socketpair()
    with driver() as guest, theirs:
        theirs.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, len(answers) + 4096)
        theirs.sendall(answers)
        theirs.shutdown(socket.SHUT_WR)
        try:
            device = VhostUser(Client(ours), guest, "disk", kind)
        except VhostUserError as err:
            check_line(str(err))
            return
        frontend = Frontend(guest)
        try:
            _drive(device, guest, frontend, steps)
        finally:
            device.close()
        for reason in frontend.failures:
            check_line(reason)


def _drive(device: VhostUser, guest: Driver, frontend: Frontend, steps: Input) -> None:
    count = min(len(device.queue_sizes), 2)
    rings = {index: guest.ring(index) for index in range(count)}
    device.attach(frontend)
    while not steps.is_over:
        try:
            match steps.number(1) % 8:
                case 0 | 1:
                    device.start(device.features | VERSION_1, rings)
                case 2:
                    device.stop()
                case 3:
                    device.write_config(steps.number(1) % 80, b"\1")
                case 4:
                    device.stop_queue(0)
                    device.start_queue(0, rings[0])
                case 5:
                    device.settle()
                    device.serve_first(steps.number(1) % 3)
                case 6:
                    device.start(0, {0: Ring(QUEUE_SIZE, steps.number(1), 0, 0)})
                case _:
                    device.override(steps.number(1) % 12, b"\2")
        except GuestError as err:
            check_line(str(err))
    assert len(device.config()) <= 256


def seeds() -> list[bytes]:
    """Return servers of each kind that work, and one that answers nothing."""
    common = bytes([0, 0, 0, 0x81])
    acknowledged = b"".join(bytes([5, request, 0]) for request in (5, 8, 10, 9, 14, 13, 12, 18))
    first = bytes([5, Request.SET_OWNER, 0])
    found = [bytes([0]), bytes([0, 1, 0])]
    for kind, config in ((0, bytes([3]) + bytes(34) + b"\2" + bytes(25)), (1, b"\x43" + bytes(12))):
        for steps in (bytes([0, 2]), bytes([0, 4, 5, 1, 3, 2]), bytes([6, 0, 7, 1, 2])):
            begin = bytes([kind, len(steps)]) + steps + common + first + config
            ring = bytes([5, Request.SET_FEATURES, 0]) + acknowledged * 2
            stop = bytes([5, 18, 0, 4, 0]) + bytes(4) + bytes([5, 18, 0, 4, 1]) + bytes(4)
            found.append(begin + ring + stop)
    found.append(bytes([2, 2, 0, 2]) + common + first + bytes([2, 2, 0]) + acknowledged)
    return found
