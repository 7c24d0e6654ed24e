"""A dataplane in the kernel: queue pairs that vhost-net serves.

Frames go between guest memory and the tap in the kernel's thread, so that no process of ours takes
part; `ring_events` has the rest. The transport calls one method at a time.
"""

from collections.abc import Mapping, Sequence
from typing import Protocol

from vmm_kvm.errors import StateError, VirtqueueError
from vmm_kvm.memory import Region
from vmm_kvm.net.vhost import LOG_ALL, VhostNet, VhostRegion, VhostRing
from vmm_kvm.state import Part
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
from vmm_kvm.virtio.ring_events import RingEvents
from vmm_kvm.write_log import SharedLog, WriteLog

QUEUE_SIZES = (256, 1024)
"""Largest sizes offered, to receive and to send.

A frame to the guest waits behind all earlier ones, so the receive ring is no larger than QEMU's
default and that of our other data paths.
"""

_FEATURES = (
    1 << VIRTIO_NET_F_MRG_RXBUF | 1 << VIRTIO_RING_F_INDIRECT_DESC | 1 << VIRTIO_RING_F_EVENT_IDX
)
_VERSION_1 = 1 << VIRTIO_F_VERSION_1


class MappedMemory(Protocol):
    """Guest memory of this process; GuestMemory is one."""

    hva: int
    regions: tuple[Region, ...]

    @property
    def writes(self) -> WriteLog:
        """The log in which writes are marked."""

    def view(self, gpa: int, size: int) -> memoryview:
        """Return a view of `size` bytes at `gpa`; raises GuestMemoryError."""


class Queues(Protocol):
    """A tap, as far as the kernel needs it."""

    fds: tuple[int, ...]
    """Its queues."""

    def close(self) -> None:
        """Leave the tap as it was found; idempotent."""


class Vhost:
    """The `Dataplane` of queue pairs that the kernel serves; owns events and the tap's state."""

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
        # Stopping one queue needs no feature of the kernel.
        self.features = known | features | 1 << VIRTIO_F_RING_RESET
        self.queue_sizes = QUEUE_SIZES * len(vhosts)
        self._vhosts = tuple(vhosts)
        self._tap = tap
        self._memory = memory
        self._frontend: Frontend | None = None
        self._started: dict[int, Ring] = {}
        self._bases: dict[int, int] | None = None  # while suspended
        self._features: int | None = None  # of the driver, once the kernel knows guest memory
        self._log: int | None = None  # address of the log in which the kernel marks its writes
        try:
            rings = len(self.queue_sizes)
            self._events = RingEvents(rings, name)
        except BaseException:
            tap.close()
            raise

    def attach(self, frontend: Frontend) -> None:
        """Remember `frontend`; called once, before everything else."""
        self._frontend = frontend

    def config(self) -> bytes:
        """Return no configuration space: it belongs to the part with the control queue."""
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
        try:
            self._set_up(features)
            for index, ring in rings.items():
                self._start_ring(index, ring)
        except OSError as err:
            self._stop_rings()
            raise VirtqueueError(f"vhost: {err.strerror}") from err
        self._watch()

    def _set_up(self, features: int) -> None:
        memory = self._memory
        regions = [
            VhostRegion(one.gpa, one.size, memory.hva + one.offset) for one in memory.regions
        ]
        self._features = features & self._known | _VERSION_1
        for vhost in self._vhosts:
            vhost.set_up(self._features, regions)
        if self._log is not None:
            self._log_on()

    def start_queue(self, index: int, ring: Ring) -> None:
        """Serve one more queue, between `start` and `stop`.

        Raises:
            GuestError: the ring is impossible; the others continue.
        """
        self._check(ring)
        self._events.unwatch()
        try:
            self._start_ring(index, ring)
        except OSError as err:
            raise VirtqueueError(f"vhost: {err.strerror}") from err
        finally:
            self._watch()

    def stop_queue(self, index: int) -> None:
        """Serve one queue less; its memory is not touched any more when this returns."""
        if self._started.pop(index, None):
            self._vhosts[index >> 1].stop_ring(index & 1)

    def stop(self) -> None:
        """Serve nothing; guest memory is not touched any more when this returns."""
        self._events.unwatch()
        self._stop_rings()
        self._bases = None

    def settle(self) -> None:
        """Return at once: frames in flight belong to the network, and may arrive late."""

    def suspend(self) -> None:
        """Stop; nothing is forgotten. Idempotent."""
        if not self._started or self._bases is not None:
            return
        self._events.unwatch()
        self._bases = {
            index: self._vhosts[index >> 1].stop_ring(index & 1) for index in self._started
        }

    def resume(self) -> None:
        """Go on after `suspend` or `restore`; idempotent."""
        bases, self._bases = self._bases, None
        if bases is None:
            return
        try:
            for index, ring in list(self._started.items()):
                self._start_ring(index, ring, bases.get(index, 0))
        except OSError as err:
            self._attached().fail(f"vhost: {err.strerror}")
            return
        self._watch()

    def positions(self) -> Mapping[int, int]:
        """Return the next position of each ring."""
        return self._bases or {}

    def restore(
        self, features: int, rings: Mapping[int, Ring], positions: Mapping[int, int]
    ) -> None:
        """Become like a suspended dataplane that served `rings`, each from its position on.

        Raises:
            GuestError: a ring is impossible.
            StateError: the kernel refuses the negotiated features.
        """
        self.stop()
        for ring in rings.values():
            self._check(ring)
        try:
            self._set_up(features)
        except OSError as err:
            raise StateError(f"vhost: {err.strerror}") from err
        self._started = dict(rings)
        self._bases = {index: positions.get(index, 0) for index in rings}

    def log_writes(self, log: SharedLog | None) -> bool:
        """Have the kernel mark its writes in `log`; None: no more. False if it cannot.

        Used rings are not marked.
        """
        if log is None:
            self._log = None
            self._log_on()
            return True
        if not all(vhost.features & LOG_ALL for vhost in self._vhosts):
            return False
        self._log = log.address
        try:
            self._log_on()
        except OSError:
            self.log_writes(None)
            return False
        return True

    def _log_on(self) -> None:
        """Tell the kernel about the log, if it knows guest memory."""
        if self._features is not None:
            for vhost in self._vhosts:
                vhost.log_writes(self._features, self._log)

    def parts(self, name: str) -> list[Part]:  # noqa: ARG002 - there are none
        """Return nothing: the kernel keeps no state of the driver outside the rings."""
        return []

    def kick(self, index: int) -> None:
        """Look at queue `index`; any thread."""
        self._events.kick(index)

    def kick_fd(self, index: int) -> int:
        """Return the eventfd that does the same when written."""
        return self._events.kick_fd(index)

    def close(self) -> None:
        """Stop, close the eventfds, and leave the tap as it was; idempotent."""
        self.stop()
        self._events.close()
        self._tap.close()

    # Rings

    def _attached(self) -> Frontend:
        assert self._frontend is not None, "attach() comes first"
        return self._frontend

    def _watch(self) -> None:
        frontend = self._attached()
        self._events.watch(frontend, lambda: frontend.fail("vhost: the kernel gave up a ring"))

    def _check(self, ring: Ring) -> None:
        """Raise GuestError for a ring that cannot be served."""
        Virtqueue(self._memory, ring, 0)

    def _start_ring(self, index: int, ring: Ring, base: int = 0) -> None:
        call_fd = self._events.call_fd(self._attached(), index)
        vhost = self._vhosts[index >> 1]
        self._started[index] = ring
        vhost.start(
            index & 1,
            VhostRing(
                ring.size,
                self._hva(ring.descriptors),
                self._hva(ring.available),
                self._hva(ring.used),
                self._events.kick_fd(index),
                call_fd,
                self._events.error_fd,
                base,
            ),
            self._tap.fds[index >> 1],
        )
        self.kick(index)  # for chains that were available before the driver was ready

    def _stop_rings(self) -> None:
        for index in sorted(self._started):
            self.stop_queue(index)

    def _hva(self, gpa: int) -> int:
        for region in self._memory.regions:
            if region.gpa <= gpa < region.end:
                return self._memory.hva + region.offset + gpa - region.gpa
        raise VirtqueueError(f"vhost: a ring at {gpa:#x}, which is not in RAM")
