"""The interfaces between the parts of a virtio device.

A `Backend` is a device type: it knows requests and nothing of rings, interrupts or processes. A
`Dataplane` serves the queues of one device: `worker.Worker` does so with a Backend in a thread of
this process, a vhost-user frontend has another process do it. A `Transport` shows the device to
the driver and tells the dataplane what the driver did.

    driver ── Transport (pci) ── Dataplane ┬ Worker ── Backend
                                           └ vhost-user ── (process) ── Worker's like ── Backend
"""

from collections.abc import Collection, Mapping, Sequence
from typing import Protocol, runtime_checkable

from vmm_kvm.errors import HaltError
from vmm_kvm.state import Part
from vmm_kvm.virtio.queue import Ring, Virtqueue
from vmm_kvm.write_log import SharedLog


class Backend(Protocol):
    """A device type; the same class serves in this process and by vhost-user.

    `start`, `process` and `reset` are called on the device's own thread; `config` and
    `write_config` on any, so they touch only what needs no lock; `close`, and what `parts` has,
    when nothing runs. A state is restored after `start`, if that comes.
    Chains are given back in the order in which they were taken: those that a saved device still
    has, its successor takes again.
    """

    device_id: int
    """The device type (VIRTIO_ID_*)."""
    features: int
    """Offered feature bits of the device type, a mask: bits 0 to 23 and 50 to 63."""
    queue_sizes: tuple[int, ...]
    """Of each queue the largest size, a power of two."""

    def config(self) -> bytes:
        """Return the configuration space as it is now."""

    def write_config(self, offset: int, data: bytes) -> None:
        """Take the driver's write; ignore it if it is outside the configuration space."""

    def start(self, features: int) -> None:
        """Begin with the negotiated features, a mask: the driver is ready (DRIVER_OK)."""

    def process(self, index: int, queue: Virtqueue) -> None:
        """Serve everything that is available in queue `index`.

        Chains may be kept, to be pushed in a later call for the same queue; see `Transport.notify`.

        Raises:
            GuestError: the driver broke the rules; the device stops until it is reset.
            HaltError: the host cannot do what a request needs. The request is in the queue still,
                and tried again in the next call.
        """

    def reset(self) -> None:
        """Forget every request; `process` is not called before the next `start`."""

    def close(self) -> None:
        """Release the backend's resources; idempotent."""

    def parts(self, name: str) -> list[Part]:
        """Return its parts that have a state; their names begin with `name`."""


class Transport(Protocol):
    """The calls of a backend that acts by itself; any thread, also with locks held."""

    def notify(self, index: int) -> None:
        """Have `process(index, ...)` called soon, as if the driver had notified.

        For input that has arrived or requests that are complete. Lost while the device is not
        started, or the queue is not enabled.
        """

    def config_changed(self) -> None:
        """Tell the driver that the configuration space has changed."""


class InputTransport(Transport, Protocol):
    """The calls of a backend with input from descriptors; on the device's own thread."""

    def watch(self, fd: int, index: int) -> None:
        """Have `process(index, ...)` called whenever input arrives at `fd`, once for each arrival.

        A backend that leaves input there is not called again for it. Until `unwatch`.
        """

    def unwatch(self, fd: int) -> None:
        """Stop it; nothing happens if `fd` is not watched."""


@runtime_checkable
class ActiveBackend(Protocol):
    """A Backend that also acts by itself."""

    def attach(self, transport: InputTransport) -> None:
        """Remember `transport`; before `start`, anew for each vhost-user connection."""


@runtime_checkable
class LendingBackend(Protocol):
    """A backend that can lend its resource to another process, besides being a Backend.

    Both on the device's thread, between `reset` and `start`.
    """

    def let_go(self) -> None:
        """Write everything back, and use it no more; idempotent.

        Raises:
            VmmError, OSError: that cannot be; it is used on.
        """

    def take_back(self) -> None:
        """Use it again; idempotent.

        Raises:
            VmmError, OSError: another process has it.
        """


@runtime_checkable
class PairedBackend(Protocol):
    """A Backend that also has to know which queues are served."""

    def serving(self, queues: Collection[int]) -> None:
        """Learn which queues a front-end has enabled, by their indices; on the device's thread.

        After `start`, and at each change until `reset`.
        """


@runtime_checkable
class CopyingBackend(Protocol):
    """A Backend of a disk that can be copied."""

    def copy_image(self, fd: int, start: int, size: int, target: int) -> None:
        """Copy `size` bytes from `start` on to `target` in the file at `fd`.

        Raises:
            OSError: it cannot.
        """


@runtime_checkable
class MirroredBackend(Protocol):
    """A Backend of a disk that can be copied while it is in use; all on the device's thread."""

    def log_changes(self, *, is_on: bool) -> None:
        """Begin anew, with all of the disk as changed; or end."""

    def copy_changes(self, fd: int) -> Sequence[int]:
        """Copy the next changed part to the beginning of a file.

        Returns its start and size, 1 if it is zeros, and how much has changed besides, in bytes.

        Raises:
            OSError: it cannot; the part has still changed.
        """


class Frontend(Protocol):
    """The calls of a dataplane to its transport; any thread."""

    def interrupt(self, index: int) -> None:
        """Tell the driver that queue `index` has used chains that it wants to hear of."""

    def interrupt_fd(self, index: int) -> int | None:
        """Return an eventfd that does the same when written; None where `interrupt` has to.

        It is the transport's, and valid from `start` until `stop` of the dataplane.
        """

    def config_changed(self) -> None:
        """Tell the driver that the configuration space has changed."""

    def fail(self, reason: str) -> None:
        """Stop the device until the driver resets it; `reason` is for the log, one line."""

    def halt(self, err: HaltError) -> None:
        """Pause the VM: a request waits for the host.

        It is tried again when the driver notifies, and by `resume`.
        """


class Dataplane(Protocol):
    """Serves the queues of a device.

    The transport calls these on vCPU threads, one at a time, with its lock held: none may call a
    `Frontend` method that waits for a vCPU, and all return soon.
    """

    device_id: int
    features: int
    """Offered feature bits, a mask, with those of the queues (INDIRECT_DESC, EVENT_IDX)."""
    queue_sizes: tuple[int, ...]

    def attach(self, frontend: Frontend) -> None:
        """Remember `frontend`; called once, before everything else."""

    def config(self) -> bytes:
        """Return the configuration space as it is now."""

    def write_config(self, offset: int, data: bytes) -> None:
        """Take the driver's write to the configuration space."""

    def start(self, features: int, rings: Mapping[int, Ring]) -> None:
        """Serve the enabled queues from now on, with the negotiated features (DRIVER_OK).

        Raises:
            GuestError: a ring is impossible; nothing is served.
        """

    def start_queue(self, index: int, ring: Ring) -> None:
        """Serve one more queue, between `start` and `stop`.

        Raises:
            GuestError: the ring is impossible; the others continue.
        """

    def stop_queue(self, index: int) -> None:
        """Serve one queue less; its memory is not touched any more when this returns."""

    def stop(self) -> None:
        """Forget every request; guest memory is not touched any more when this returns.

        Idempotent, and allowed before `start`.
        """

    def settle(self) -> None:
        """Return when every earlier request of the driver is complete; no vCPU runs."""

    def suspend(self) -> None:
        """Stop all threads, so that this process changes nothing; no vCPU runs.

        Nothing is forgotten: the driver's requests are done after `resume`. Idempotent.
        """

    def resume(self) -> None:
        """Go on after `suspend` or `restore`, and look at every queue once; idempotent."""

    def positions(self) -> Mapping[int, int]:
        """Return the position of each served queue in its available ring, by index.

        After `suspend`; 0 to 65535, and the same in the used ring. From now on, not before, other
        processes do not touch the rings any more either.
        """

    def restore(
        self, features: int, rings: Mapping[int, Ring], positions: Mapping[int, int]
    ) -> None:
        """Become like a suspended dataplane that served `rings`, each from its position on.

        Nothing has been started before. The rings that `start` would have got are given, also
        those without a position, which begin at 0.

        Raises:
            GuestError: a ring is impossible.
            StateError: the host does not take it.
        """

    def log_writes(self, log: SharedLog | None) -> bool:
        """Have other processes mark in `log` their writes to guest memory; None: no more.

        False if one cannot; then nothing has changed. What this process writes is marked by the
        memory's own log.
        """

    def parts(self, name: str) -> list[Part]:
        """Return the other parts that have a state; their names begin with `name`."""

    def kick(self, index: int) -> None:
        """Process queue `index`: the driver notified; any thread."""

    def kick_fd(self, index: int) -> int:
        """Return the eventfd that does the same when written; valid from `start` until `stop`.

        It is the dataplane's. Several queues may share one.
        """

    def close(self) -> None:
        """Stop, and release everything; idempotent."""
