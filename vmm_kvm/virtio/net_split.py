"""virtio-net with its frames somewhere else: only the control queue is served here.

For frames that the kernel moves (vhost-net), or another program: both serve pairs of queues and
know nothing of commands. A thread of this process executes those.

    driver ── Transport ── SplitNet ┬ data queues ── Dataplane (vhost, vhost_user.frontend)
                                    └ control queue ── Worker ── NetControl
"""

from collections.abc import Mapping

from vmm_kvm.state import Part
from vmm_kvm.virtio.abi import VIRTIO_ID_NET
from vmm_kvm.virtio.chain import Memory
from vmm_kvm.virtio.device import Dataplane, Frontend
from vmm_kvm.virtio.net_control import CONTROL_QUEUE_SIZE, NetControl
from vmm_kvm.virtio.queue import Ring, Virtqueue
from vmm_kvm.virtio.worker import Worker
from vmm_kvm.write_log import SharedLog


class _ControlBackend:
    """The control queue as a backend of its own."""

    device_id = VIRTIO_ID_NET
    features = 0

    def __init__(self, control: NetControl, queues: int) -> None:
        self.queue_sizes: tuple[int, ...] = (CONTROL_QUEUE_SIZE,) * queues
        self._control = control

    def config(self) -> bytes:
        return self._control.config()

    def write_config(self, offset: int, data: bytes) -> None:
        """Ignore it: nothing there can be written."""

    def start(self, features: int) -> None:
        self._control.start(features)

    def process(self, _index: int, queue: Virtqueue) -> None:
        self._control.process(queue)

    def reset(self) -> None:
        self._control.reset()

    def close(self) -> None:
        """Nothing is its own."""

    def parts(self, name: str) -> list[Part]:
        return [Part(f"{name}/net", self._control)]


class SplitNet:
    """A `Dataplane` for an interface whose data queues `data` serves; owns it."""

    device_id = VIRTIO_ID_NET

    def __init__(self, data: Dataplane, control: NetControl, memory: Memory, name: str) -> None:
        """Take ownership of `data`, which has pairs of queues; `name` is for the thread.

        Raises:
            OSError: the host has no descriptors left.
        """
        self.features = data.features | control.features
        self.queue_sizes = (*data.queue_sizes, CONTROL_QUEUE_SIZE)
        self._data = data
        self._control = control
        self._worker = Worker(_ControlBackend(control, len(self.queue_sizes)), memory, name)
        self._control_queue: int | None = None
        self._frontend: Frontend | None = None

    def attach(self, frontend: Frontend) -> None:
        """Remember `frontend`; called once, before everything else."""
        self._frontend = frontend
        self._data.attach(frontend)
        self._worker.attach(frontend)

    def config(self) -> bytes:
        """Return the configuration space as it is now."""
        return self._control.config()

    def write_config(self, offset: int, data: bytes) -> None:
        """Ignore it: nothing there can be written."""

    def set_link(self, is_up: bool) -> None:
        """Plug the cable in or out; any thread."""
        self._control.set_link(is_up)
        if self._frontend:
            self._frontend.config_changed()

    def announce(self) -> None:
        """Have the driver announce itself to the network; any thread."""
        if self._control.announce() and self._frontend:
            self._frontend.config_changed()

    def start(self, features: int, rings: Mapping[int, Ring]) -> None:
        """Serve the enabled queues from now on, with the negotiated features.

        Raises:
            GuestError: a ring is impossible; nothing is served.
        """
        self.stop()
        self._control_queue = self._control.control_queue(features)
        commands = {index: ring for index, ring in rings.items() if index == self._control_queue}
        self._worker.start(features, commands)
        try:
            self._data.start(
                features, {index: ring for index, ring in rings.items() if self._is_data(index)}
            )
        except BaseException:
            self._worker.stop()
            raise

    def start_queue(self, index: int, ring: Ring) -> None:
        """Serve one more queue, between `start` and `stop`.

        Raises:
            GuestError: the ring is impossible; the others continue.
        """
        if index == self._control_queue:
            self._worker.start_queue(index, ring)
        elif self._is_data(index):
            self._data.start_queue(index, ring)

    def stop_queue(self, index: int) -> None:
        """Serve one queue less; its memory is not touched any more when this returns."""
        if index == self._control_queue:
            self._worker.stop_queue(index)
        elif self._is_data(index):
            self._data.stop_queue(index)

    def stop(self) -> None:
        """Serve nothing; guest memory is not touched any more when this returns."""
        self._worker.stop()
        self._data.stop()

    def settle(self) -> None:
        """Return when every earlier request of the driver is complete; no vCPU runs."""
        self._worker.settle()
        self._data.settle()

    def suspend(self) -> None:
        """Stop all threads; nothing is forgotten. Idempotent."""
        self._worker.suspend()
        self._data.suspend()

    def resume(self) -> None:
        """Go on after `suspend` or `restore`; idempotent."""
        self._worker.resume()
        self._data.resume()

    def positions(self) -> Mapping[int, int]:
        """Return the position of each served queue."""
        return {**self._data.positions(), **self._worker.positions()}

    def restore(
        self, features: int, rings: Mapping[int, Ring], positions: Mapping[int, int]
    ) -> None:
        """Become like a suspended dataplane that served `rings`, each from its position on.

        Raises:
            GuestError: a ring is impossible.
            StateError: the host does not take it.
        """
        self._control_queue = self._control.control_queue(features)
        commands = {index: ring for index, ring in rings.items() if index == self._control_queue}
        data = {index: ring for index, ring in rings.items() if self._is_data(index)}
        self._data.restore(features, data, positions)
        self._worker.restore(features, commands, positions)

    def log_writes(self, log: SharedLog | None) -> bool:
        """Have the mover of the frames mark its writes; see `Dataplane`."""
        return self._data.log_writes(log)

    def parts(self, name: str) -> list[Part]:
        """Return the control state, and the state of the data queues."""
        return [*self._worker.parts(name), *self._data.parts(name)]

    def kick(self, index: int) -> None:
        """Look at queue `index`; any thread."""
        if index == self._control_queue:
            self._worker.kick(index)
        elif self._is_data(index):
            self._data.kick(index)

    def kick_fd(self, index: int) -> int:
        """Return the eventfd that does the same when written."""
        is_data = index != self._control_queue and self._is_data(index)
        return self._data.kick_fd(index) if is_data else self._worker.kick_fd(index)

    def close(self) -> None:
        """Stop, and release everything; idempotent."""
        self._worker.close()
        self._data.close()

    def _is_data(self, index: int) -> bool:
        return index < len(self._data.queue_sizes) and index != self._control_queue
