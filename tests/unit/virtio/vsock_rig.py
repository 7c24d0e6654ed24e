"""A vsock device without a machine: its queues in plain memory, and a host that listens."""

from __future__ import annotations

import socket

from tests.virtio_driver import DriverQueue, PlainMemory
from tests.vsock_driver import CID, GuestStream, VsockDriver
from vmm_kvm.net.host_stream import HostStream
from vmm_kvm.virtio.queue import Virtqueue
from vmm_kvm.virtio.vsock import RECEIVE_QUEUE, VirtioVsock, VsockSpec
from vmm_kvm.virtio.vsock_packet import Op

PORTS = (1024, 7)
"""The guest's port, and the host's port that the guest connects to."""


class Rig:
    """A started device, a driver, and a host that listens on the ports 7 to 9."""

    def __init__(self, *, is_started: bool = True, buffers: int = 16) -> None:
        self.memory = PlainMemory()
        self.queues = {
            index: DriverQueue(self.memory, 256, 0x4000 * (index + 1)) for index in range(3)
        }
        self.sides = {index: queue.device(self.memory) for index, queue in self.queues.items()}
        self.dialled: list[socket.socket] = []
        """The host's ends of the guest's connections."""
        self.opened: list[socket.socket] = []
        self.device = VirtioVsock(VsockSpec(CID, self._dial))
        self.device.attach(self)
        self._is_due = False
        self._is_serving = False
        self.rounds = 0
        self.driver = VsockDriver(self.queues, 0x20000, self.notify, buffers=buffers)
        if is_started:
            self.device.start(0)

    def close(self) -> None:
        """Close the device, and the host's ends."""
        self.device.close()
        for sock in (*self.dialled, *self.opened):
            sock.close()

    def _dial(self, port: int) -> HostStream | None:
        if port not in {7, 8, 9}:
            return None
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        self.dialled.append(ours)
        return HostStream(theirs)

    # The transport

    def notify(self, _index: int) -> None:
        """Serve all queues, as a worker's thread would, until none asks for more."""
        self._is_due = True
        if self._is_serving:
            return
        self._is_serving = True
        try:
            while self._is_due:
                self._is_due = False
                self.rounds += 1
                for index, queue in self.sides.items():
                    self.process(index, queue)
        finally:
            self._is_serving = False

    def process(self, index: int, queue: Virtqueue) -> None:
        """Have the device serve a queue."""
        self.device.process(index, queue)

    def serve(self) -> None:
        """Serve the sockets, as at their events."""
        self.notify(RECEIVE_QUEUE)

    def config_changed(self) -> None:
        """Nothing in the configuration changes."""
        raise AssertionError

    def watch(self, _fd: int, _index: int) -> None:
        """Ignore it: tests call `serve`."""

    def unwatch(self, _fd: int) -> None:
        """Ignore it."""

    # First steps of tests

    def connect(self, port: int = 22) -> socket.socket:
        """Connect to the guest; returns the host's end."""
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        self.opened.append(ours)
        self.device.connect(HostStream(theirs), port)
        return ours

    def from_guest(self, ports: tuple[int, int] = PORTS) -> tuple[GuestStream, socket.socket]:
        """Open a connection from the guest; returns both ends."""
        self.driver.send(Op.REQUEST, ports)
        (response,) = self.driver.packets()
        assert response.op == Op.RESPONSE
        stream = GuestStream(self.driver, ports)
        stream.take(response)
        return stream, self.dialled[-1]

    def from_host(self, port: int = 22) -> tuple[GuestStream, socket.socket]:
        """Open a connection from the host; returns both ends."""
        sock = self.connect(port)
        (request,) = self.driver.packets()
        assert request.op == Op.REQUEST
        stream = GuestStream(self.driver, (port, request.header.src_port))
        stream.take(request)
        self.driver.send(Op.RESPONSE, stream.ports)
        assert sock.recv(64) == b"OK %d\n" % request.header.src_port
        return stream, sock
