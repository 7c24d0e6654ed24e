"""A dataplane in the kernel: queue pairs that vhost-net serves.

Notifications of the guest reach the kernel's thread by eventfd and its interrupts the guest by
another, so that no process of ours has a part in it. Between `start` and `stop` a thread of ours
waits for what else may happen: a ring breaks, or interrupts need a hand because the guest has no
MSI-X. It sleeps otherwise.

The transport calls one method at a time; what the thread watches does not change while it runs.
"""

import os
import select
import threading
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Protocol

from vmm_kvm.errors import VirtqueueError
from vmm_kvm.memory import Region
from vmm_kvm.net.vhost import VhostNet, VhostRegion, VhostRing
from vmm_kvm.virtio.abi import (
    VIRTIO_F_RING_RESET,
    VIRTIO_F_VERSION_1,
    VIRTIO_ID_NET,
    VIRTIO_NET_F_MRG_RXBUF,
    VIRTIO_RING_F_EVENT_IDX,
    VIRTIO_RING_F_INDIRECT_DESC,
)
from vmm_kvm.virtio.device import Frontend
from vmm_kvm.virtio.queue import Ring, Virtqueue

QUEUE_SIZE = 1024
"""Largest size offered."""

_FEATURES = (
    1 << VIRTIO_NET_F_MRG_RXBUF | 1 << VIRTIO_RING_F_INDIRECT_DESC | 1 << VIRTIO_RING_F_EVENT_IDX
)
_VERSION_1 = 1 << VIRTIO_F_VERSION_1


class MappedMemory(Protocol):
    """Guest memory of this process; GuestMemory is one."""

    hva: int
    regions: tuple[Region, ...]

    def view(self, gpa: int, size: int) -> memoryview:
        """Return a view of `size` bytes at `gpa`; raises GuestMemoryError."""


class Queues(Protocol):
    """A tap, as far as the kernel needs it."""

    fds: tuple[int, ...]
    """Its queues."""

    def close(self) -> None:
        """Leave the tap as it was found; idempotent."""


class Vhost:
    """The `Dataplane` of queue pairs that the kernel serves; owns eventfds and the tap's state."""

    device_id = VIRTIO_ID_NET

    def __init__(
        self,
        vhosts: Sequence[VhostNet],
        tap: Queues,
        memory: MappedMemory,
        name: str,
        *,
        features: int,
    ) -> None:
        """Let each of `vhosts` move the frames of one of the tap's queues.

        `features` are those that the tap adds to the kernel's; `name` is for the thread.

        Raises:
            OSError: the host has no descriptors left.
        """
        known = _FEATURES
        for vhost in vhosts:
            known &= vhost.features
        self._known = known
        # To stop one queue takes no feature of the kernel's.
        self.features = known | features | 1 << VIRTIO_F_RING_RESET
        self.queue_sizes = (QUEUE_SIZE,) * (2 * len(vhosts))
        self._vhosts = tuple(vhosts)
        self._tap = tap
        self._memory = memory
        self._name = name
        self._frontend: Frontend | None = None
        self._thread: threading.Thread | None = None
        self._started: set[int] = set()
        self._fds: list[int] = []
        self._call_fds: dict[int, int] = {}
        try:
            self._stop_fd = self._eventfd()
            self._kick_fds = [self._eventfd() for _ in self.queue_sizes]
            self._error_fds = [self._eventfd() for _ in self.queue_sizes]
        except BaseException:
            self.close()
            raise

    def attach(self, frontend: Frontend) -> None:
        """Learn whom to tell; called once, before everything else."""
        self._frontend = frontend

    def config(self) -> bytes:
        """Return no configuration space: whoever has the control queue has it."""
        return b""

    def write_config(self, offset: int, data: bytes) -> None:
        """Ignore it."""

    def start(self, features: int, rings: Mapping[int, Ring]) -> None:
        """Serve the enabled queues from now on, with the negotiated features.

        Raises:
            GuestError: a ring is impossible; nothing is served.
        """
        self.stop()
        for ring in rings.values():
            self._check(ring)
        memory = self._memory
        regions = [
            VhostRegion(one.gpa, one.size, memory.hva + one.offset) for one in memory.regions
        ]
        try:
            for vhost in self._vhosts:
                vhost.set_up(features & self._known | _VERSION_1, regions)
            for index, ring in rings.items():
                self._start_ring(index, ring)
        except OSError as err:
            self._stop_rings()
            raise VirtqueueError(f"vhost: {err.strerror}") from err
        self._watch()

    def start_queue(self, index: int, ring: Ring) -> None:
        """Serve one more queue, between `start` and `stop`.

        Raises:
            GuestError: the ring is impossible; the others go on.
        """
        self._check(ring)
        self._unwatch()
        try:
            self._start_ring(index, ring)
        except OSError as err:
            raise VirtqueueError(f"vhost: {err.strerror}") from err
        finally:
            self._watch()

    def stop_queue(self, index: int) -> None:
        """Serve one queue less; its memory is not touched any more when this returns."""
        if index in self._started:
            self._started.discard(index)
            self._vhosts[index >> 1].stop_ring(index & 1)

    def stop(self) -> None:
        """Serve nothing; guest memory is not touched any more when this returns."""
        self._unwatch()
        self._stop_rings()

    def settle(self) -> None:
        """Return at once: frames under way are the network's, and may come late."""

    def kick(self, index: int) -> None:
        """Look at queue `index`; any thread."""
        os.eventfd_write(self._kick_fds[index], 1)

    def kick_fd(self, index: int) -> int:
        """Return the eventfd that does the same when written."""
        return self._kick_fds[index]

    def close(self) -> None:
        """Stop, close the eventfds, and leave the tap as it was; idempotent."""
        self.stop()
        if self._fds:
            self._tap.close()
        while self._fds:
            os.close(self._fds.pop())

    # Rings

    def _check(self, ring: Ring) -> None:
        """Raise GuestError for a ring that nobody can serve."""
        Virtqueue(self._memory, ring, 0)

    def _start_ring(self, index: int, ring: Ring) -> None:
        frontend = self._frontend
        assert frontend is not None, "attach() comes first"
        call_fd = frontend.interrupt_fd(index)
        if call_fd is None:
            call_fd = self._call_fds.get(index)
            if call_fd is None:
                call_fd = self._call_fds[index] = self._eventfd()
        vhost = self._vhosts[index >> 1]
        self._started.add(index)
        vhost.start(
            index & 1,
            VhostRing(
                ring.size,
                self._hva(ring.descriptors),
                self._hva(ring.available),
                self._hva(ring.used),
                self._kick_fds[index],
                call_fd,
                self._error_fds[index],
            ),
            self._tap.fds[index >> 1],
        )
        self.kick(index)  # what was available before the driver was ready

    def _stop_rings(self) -> None:
        for index in sorted(self._started):
            self.stop_queue(index)

    def _hva(self, gpa: int) -> int:
        for region in self._memory.regions:
            if region.gpa <= gpa < region.end:
                return self._memory.hva + region.offset + gpa - region.gpa
        raise VirtqueueError(f"vhost: a ring at {gpa:#x}, which is not in RAM")

    def _eventfd(self) -> int:
        fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._fds.append(fd)
        return fd

    # The thread

    def _watch(self) -> None:
        frontend = self._frontend
        assert frontend is not None, "attach() comes first"
        watched: dict[int, Callable[[], None]] = {
            fd: partial(frontend.interrupt, index) for index, fd in self._call_fds.items()
        }
        for fd in self._error_fds:
            watched[fd] = lambda: frontend.fail("vhost: the kernel gave up a ring")
        self._thread = threading.Thread(target=self._run, args=(watched,), name=self._name)
        self._thread.start()

    def _unwatch(self) -> None:
        thread, self._thread = self._thread, None
        if thread is not None:
            os.eventfd_write(self._stop_fd, 1)
            thread.join()
            os.eventfd_read(self._stop_fd)

    def _run(self, watched: Mapping[int, Callable[[], None]]) -> None:
        poll = select.poll()
        for fd in (self._stop_fd, *watched):
            poll.register(fd, select.POLLIN)
        while True:
            for fd, _ in poll.poll():
                if fd == self._stop_fd:
                    return
                os.eventfd_read(fd)
                watched[fd]()
