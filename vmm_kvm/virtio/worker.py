"""A dataplane in this process: one thread that serves all queues of a device.

The thread lives from `start` to `stop`, so a device that no driver uses costs nothing. It waits
for one eventfd, which all queues of the device share: checking an empty queue costs less than
waiting for several descriptors. It waits for further descriptors only if the backend's input comes
from them.

Locks: none. `start`, `stop` and what changes a queue come from one thread at a time, under the
transport's lock; they talk with the worker through `_orders`. The worker never takes that lock, so
it can be waited for with the lock held.
"""

import os
import select
import threading
from collections import deque
from collections.abc import Callable, Mapping

from vmm_kvm.errors import GuestError, HaltError
from vmm_kvm.log import Log
from vmm_kvm.state import Part
from vmm_kvm.virtio.abi import (
    VIRTIO_F_RING_RESET,
    VIRTIO_RING_F_EVENT_IDX,
    VIRTIO_RING_F_INDIRECT_DESC,
)
from vmm_kvm.virtio.chain import Memory
from vmm_kvm.virtio.device import Backend, Frontend
from vmm_kvm.virtio.queue import Ring, Virtqueue
from vmm_kvm.write_log import SharedLog

log = Log(__name__)

QUEUE_FEATURES = (
    1 << VIRTIO_RING_F_INDIRECT_DESC | 1 << VIRTIO_RING_F_EVENT_IDX | 1 << VIRTIO_F_RING_RESET
)
"""Features of our queues and workers, for every device type."""
ROUNDS_MAX = 8
"""Rounds of service for one queue before others have their turn."""


class Worker:
    """A `Dataplane` for a backend in this process, and the `InputTransport` that the backend asks.

    Owns the backend and an eventfd.
    """

    def __init__(self, backend: Backend, memory: Memory, name: str) -> None:
        """Serve `backend` with queues in `memory`; `name` is for the thread and the log.

        Raises:
            OSError: the host has no descriptors left.
        """
        self.device_id = backend.device_id
        self.features = backend.features | QUEUE_FEATURES
        self.queue_sizes = backend.queue_sizes
        self._backend = backend
        self._memory = memory
        self._name = name
        self._frontend: Frontend | None = None
        self._kick_fd = os.eventfd(0, os.EFD_CLOEXEC)
        self._thread: threading.Thread | None = None
        self._queues: dict[int, Virtqueue] = {}
        self._features = 0
        self._is_stopping = False
        self._is_suspended = False
        self._is_started = False  # whether the backend is
        self._has_failed = False
        self._orders: deque[tuple[Callable[[], None], threading.Event]] = deque()
        self._epoll: select.epoll | None = None  # while a descriptor is watched
        self._watched: set[int] = set()

    # The transport's side

    def attach(self, frontend: Frontend) -> None:
        """Remember `frontend`; called once, before everything else."""
        self._frontend = frontend

    def config(self) -> bytes:
        """Return the configuration space as it is now."""
        return self._backend.config()

    def write_config(self, offset: int, data: bytes) -> None:
        """Take the driver's write to the configuration space."""
        self._backend.write_config(offset, data)

    def start(self, features: int, rings: Mapping[int, Ring]) -> None:
        """Serve the enabled queues from now on, with the negotiated features.

        Raises:
            GuestError: a ring is impossible; nothing is served.
        """
        self.stop()
        self._features = features
        self._queues = {index: self._queue(ring) for index, ring in rings.items()}
        self._is_started = self._has_failed = False
        self._run_thread()

    def start_queue(self, index: int, ring: Ring) -> None:
        """Serve one more queue, between `start` and `stop`.

        Raises:
            GuestError: the ring is impossible; the others continue.
        """
        queue = self._queue(ring)
        self._order(lambda: self._queues.update({index: queue}))

    def stop_queue(self, index: int) -> None:
        """Serve one queue less; its memory is not touched any more when this returns."""
        queue = self._queues.get(index)
        if queue:
            queue.stop()
            self._order(lambda: self._forget(index))

    def stop(self) -> None:
        """Forget every request; guest memory is not touched any more when this returns."""
        for queue in self._queues.values():
            queue.stop()
        self._end_thread()
        self._is_suspended = False
        if self._is_started:
            self._is_started = False
            self._backend.reset()
        self._queues = {}

    def suspend(self) -> None:
        """Stop the thread; nothing is forgotten. Idempotent."""
        if self._end_thread():
            self._is_suspended = True

    def resume(self) -> None:
        """Go on after `suspend` or `restore`; idempotent."""
        if self._is_suspended:
            self._is_suspended = False
            self._run_thread()

    def positions(self) -> Mapping[int, int]:
        """Return each queue's position: that of the oldest chain that was not given back."""
        return {index: queue.next_used for index, queue in self._queues.items()}

    def restore(
        self, features: int, rings: Mapping[int, Ring], positions: Mapping[int, int]
    ) -> None:
        """Become like a suspended dataplane that served `rings`, each from its position on.

        Raises:
            GuestError: a ring is impossible.
        """
        self.stop()
        self._features = features
        self._queues = {
            index: Virtqueue(
                self._memory,
                ring,
                features,
                next_available=positions.get(index, 0),
                next_used=positions.get(index, 0),
            )
            for index, ring in rings.items()
        }
        self._has_failed = False
        self._is_started = self._is_suspended = True
        self._backend.start(features)

    def log_writes(self, log: SharedLog | None) -> bool:  # noqa: ARG002 - this process's have one
        """Return True: the queues mark returned chains."""
        return True

    def parts(self, name: str) -> list[Part]:
        """Return what of the backend has a state."""
        return self._backend.parts(name)

    def _run_thread(self) -> None:
        self._is_stopping = False
        self._thread = threading.Thread(target=self._run, name=self._name)
        self._thread.start()
        os.eventfd_write(self._kick_fd, 1)  # for chains that were available before

    def _end_thread(self) -> bool:
        """End the thread between two rounds; False if there is none."""
        thread, self._thread = self._thread, None
        if thread is None:
            return False
        self._is_stopping = True
        os.eventfd_write(self._kick_fd, 1)
        thread.join()
        return True

    def settle(self) -> None:
        """Return when all queues were empty; no vCPU runs."""
        # A round begins with the orders and ends with empty queues, so a complete round lies before
        # the second order.
        self._order(lambda: None)
        self._order(lambda: None)

    def kick(self, _index: int) -> None:
        """Process the queues; any thread, also when nothing is served, or never again."""
        fd = self._kick_fd
        if fd >= 0:
            os.eventfd_write(fd, 1)

    def kick_fd(self, _index: int) -> int:
        """Return the eventfd that does the same when written."""
        return self._kick_fd

    def close(self) -> None:
        """Stop, and close the backend and the eventfd; idempotent."""
        self.stop()
        fd, self._kick_fd = self._kick_fd, -1
        if fd >= 0:
            self._backend.close()
            os.close(fd)

    def _queue(self, ring: Ring) -> Virtqueue:
        return Virtqueue(self._memory, ring, self._features)

    def _order(self, order: Callable[[], None]) -> None:
        """Have the worker execute an order between two rounds, and wait for it."""
        if self._thread is None:
            return
        done = threading.Event()
        self._orders.append((order, done))
        os.eventfd_write(self._kick_fd, 1)
        done.wait()

    # The backend's side

    def notify(self, index: int) -> None:
        """Have the backend process queue `index` soon; any thread."""
        self.kick(index)

    def config_changed(self) -> None:
        """Tell the driver that the configuration space has changed; any thread."""
        if self._frontend:
            self._frontend.config_changed()

    def watch(self, fd: int, index: int) -> None:  # noqa: ARG002 - all queues are looked at
        """Process the queues whenever input arrives at `fd`; on the worker's thread."""
        if self._epoll is None:
            self._epoll = select.epoll()
            self._epoll.register(self._kick_fd, select.EPOLLIN)
        self._watched.add(fd)
        self._epoll.register(fd, select.EPOLLIN | select.EPOLLOUT | select.EPOLLET)

    def unwatch(self, fd: int) -> None:
        """Stop it; on the worker's thread."""
        if self._epoll is None or fd not in self._watched:
            return
        self._watched.discard(fd)
        self._epoll.unregister(fd)
        if not self._watched:
            self._epoll.close()
            self._epoll = None

    # The worker

    def _wait(self) -> None:
        """Return when there may be something to do."""
        if self._epoll is None:
            os.eventfd_read(self._kick_fd)
            return
        for fd, _ in self._epoll.poll():
            if fd == self._kick_fd:
                os.eventfd_read(fd)

    def _run(self) -> None:
        backend, frontend = self._backend, self._frontend
        assert frontend is not None, "attach() comes first"
        while not self._is_stopping:
            self._wait()
            while self._orders:
                order, done = self._orders.popleft()
                order()
                done.set()
            if self._has_failed:
                continue
            try:
                if not self._is_started:
                    self._is_started = True
                    backend.start(self._features)
                for index, queue in self._queues.items():
                    self._serve(backend, frontend, index, queue)
            except HaltError as err:  # nothing is served before the next kick
                frontend.halt(err)
            except GuestError as err:
                self._has_failed = True
                frontend.fail(str(err))
            except Exception:
                self._has_failed = True
                log.exception("%s", self._name)
                frontend.fail("internal error")

    def _serve(self, backend: Backend, frontend: Frontend, index: int, queue: Virtqueue) -> None:
        """Serve a queue until it is empty, or others have waited long enough."""
        queue.disable_kicks()
        for _ in range(ROUNDS_MAX):
            backend.process(index, queue)
            if queue.needs_interrupt():
                frontend.interrupt(index)
            if queue.is_streaming:
                # The guest asks for more now, if it has to share this processor with us: then it
                # need not notify.
                os.sched_yield()
            if not queue.enable_kicks():
                return
        self.kick(index)

    def _forget(self, index: int) -> None:
        self._queues.pop(index, None)
