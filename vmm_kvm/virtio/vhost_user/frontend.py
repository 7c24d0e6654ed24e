"""A dataplane in another process: a device whose queues a vhost-user server serves.

The server maps guest memory, takes notifications from the guest's eventfds and interrupts the guest
by writing others, so that nothing passes through here while the guest does I/O; `ring_events`
handles the other events.

When the server is gone the device fails and stays failed; the VM goes on.

Locks: `_lock` is held while the server is asked for something about a ring; within it `_lost_lock`,
innermost, decides who reports that the server is gone. The transport calls one method at a time.
"""

import threading
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, Protocol, TypeVar

from vmm_kvm.errors import HaltError, StateError
from vmm_kvm.limits import DISK_QUEUES_MAX
from vmm_kvm.log import Log
from vmm_kvm.memory import Region
from vmm_kvm.state import Part
from vmm_kvm.virtio.abi import (
    VIRTIO_BLK_F_CONFIG_WCE,
    VIRTIO_BLK_F_MQ,
    VIRTIO_CONFIG_S_NEEDS_RESET,
    VIRTIO_F_RING_RESET,
    VIRTIO_F_VERSION_1,
    VIRTIO_ID_BLOCK,
    VIRTIO_ID_NET,
    VIRTIO_NET_F_CSUM,
    VIRTIO_NET_F_CTRL_MAC_ADDR,
    VIRTIO_NET_F_CTRL_VQ,
    VIRTIO_NET_F_GUEST_ANNOUNCE,
    VIRTIO_NET_F_GUEST_TSO4,
    VIRTIO_NET_F_GUEST_USO4,
    VIRTIO_NET_F_HOST_TSO4,
    VIRTIO_NET_F_MQ,
    VIRTIO_NET_F_MRG_RXBUF,
    VIRTIO_RING_F_EVENT_IDX,
    VIRTIO_RING_F_INDIRECT_DESC,
)
from vmm_kvm.virtio.device import Frontend
from vmm_kvm.virtio.queue import Ring, Virtqueue
from vmm_kvm.virtio.ring_events import RingEvents
from vmm_kvm.virtio.vhost_user.client import Client
from vmm_kvm.virtio.vhost_user.messages import (
    FEATURE_LOG_ALL,
    HALT_SHIFT,
    ImageChange,
    ImageCopy,
    MemoryRegion,
    VhostUserError,
    VringAddress,
)
from vmm_kvm.write_log import SharedLog, WriteLog

log = Log(__name__)

QUEUE_SIZE = 256
"""Largest size offered; servers do not tell theirs, and all take this."""

USER_BASE = 1 << 44
"""The user address that stands for guest-physical address 0; none is a real address."""

_T = TypeVar("_T")

_RING_FEATURES = 1 << VIRTIO_RING_F_INDIRECT_DESC | 1 << VIRTIO_RING_F_EVENT_IDX
_INDEXES = 1 << 16  # of split rings
_VERSION_1 = 1 << VIRTIO_F_VERSION_1

# virtio 1.2 §5.2.4: of the configuration of a block device, what ends before secure erase, and
# the features that say something about that part.
_BLK_CONFIG_SIZE = 60
_BLK_NUM_QUEUES = slice(34, 36)
# A cache mode in the configuration (CONFIG_WCE) is not among them: qemu-storage-daemon 10.0 says
# write-through there and does not flush, so a driver would never ask it to.
_BLK_FEATURES = ((1 << 15) - 1) & ~(1 << VIRTIO_BLK_F_CONFIG_WCE)
# virtio 1.2 §5.1.4: up to the MTU.
_NET_CONFIG_SIZE = 12
_NET_PAIRS = slice(8, 10)
_NET_OFFLOADS = (
    0b11 << VIRTIO_NET_F_CSUM
    | 0b1111 << VIRTIO_NET_F_GUEST_TSO4
    | 0b1111 << VIRTIO_NET_F_HOST_TSO4
    | 1 << VIRTIO_NET_F_MRG_RXBUF
    | 0b111 << VIRTIO_NET_F_GUEST_USO4
)


class SharedMemory(Protocol):
    """Guest memory that another process can map; GuestMemory is one."""

    fd: int
    regions: tuple[Region, ...]

    @property
    def writes(self) -> WriteLog:
        """The log in which writes are marked."""

    def view(self, gpa: int, size: int) -> memoryview:
        """Return a view of `size` bytes at `gpa`; raises GuestMemoryError."""


def _blk_queues(features: int, config: bytes) -> int:
    if features >> VIRTIO_BLK_F_MQ & 1:
        return int.from_bytes(config[_BLK_NUM_QUEUES], "little")
    return 1


def _net_queues(features: int, config: bytes) -> int:
    pairs = 1
    if features >> VIRTIO_NET_F_MQ & 1:
        pairs = int.from_bytes(config[_NET_PAIRS], "little")
    return 2 * pairs + (features >> VIRTIO_NET_F_CTRL_VQ & 1)


class DeviceKind(NamedTuple):
    """The needed properties of a device type."""

    device_id: int
    features: int
    """Features that the driver may be offered, a mask: without those that need parts that are
    missing here."""
    config_size: int
    """Bytes of configuration space that the server has."""
    queues: Callable[[int, bytes], int]
    """How many queues there are, from features and configuration space."""
    pairs: int = 1
    """The least that the server must have, in its own count of queues."""


BLOCK = DeviceKind(VIRTIO_ID_BLOCK, _BLK_FEATURES, _BLK_CONFIG_SIZE, _blk_queues)
NET = DeviceKind(
    VIRTIO_ID_NET,
    ((1 << VIRTIO_NET_F_CTRL_MAC_ADDR + 1) - 1 | _NET_OFFLOADS)
    & ~(1 << VIRTIO_NET_F_GUEST_ANNOUNCE),
    _NET_CONFIG_SIZE,
    _net_queues,
)
"""An interface whose server has everything, the control queue too: our own.

But not the status, which may ask the driver to announce itself."""


def net_data(pairs: int) -> DeviceKind:
    """Return an interface of which the server has the queue pairs alone."""
    return DeviceKind(VIRTIO_ID_NET, _NET_OFFLOADS, 0, lambda *_: 2 * pairs, pairs)


class VhostUser:
    """The `Dataplane` of a device that a vhost-user server has; owns its connection."""

    def __init__(
        self,
        client: Client,
        memory: SharedMemory,
        name: str,
        kind: DeviceKind = BLOCK,
        *,
        may_halt: bool = False,
    ) -> None:
        """Take ownership of `client`; `name` is for the thread and the log.

        With `may_halt` the server is ours, and may have a request wait for the host.

        Raises:
            VhostUserError: the server has no modern device of this kind, or the connection failed.
            OSError: the host has no descriptors left.
        """
        self.device_id = kind.device_id
        self._client = client
        self._memory = memory
        self._name = name
        self._may_halt = may_halt
        self._frontend: Frontend | None = None
        self._started: dict[int, Ring] = {}
        self._is_suspended = False
        self._bases: dict[int, int] | None = None  # while the server has no rings of ours
        self._served = DISK_QUEUES_MAX
        self._lock = threading.Lock()
        self._lost: str | None = None
        self._lost_lock = threading.Lock()
        self._override = 0, b""
        self._driver_features = 0
        self._log_flag = 0
        try:
            self.features = _offered(client.features, kind)
            self._config = client.config(kind.config_size) if kind.config_size else b""
            # Features of another part of the device do not concern the server.
            self._features_known = self.features & ~(1 << VIRTIO_F_RING_RESET) | _VERSION_1
            queues = _queue_count(kind, self.features, self._config)
            _check_pairs(kind, client)
            self.queue_sizes = (QUEUE_SIZE,) * queues
            self._events = RingEvents(queues, name)
        except BaseException:
            client.close()
            raise

    # The transport's side

    def attach(self, frontend: Frontend) -> None:
        """Remember `frontend`; called once, before everything else."""
        self._frontend = frontend

    def config(self) -> bytes:
        """Return the configuration space as it was at its last change."""
        offset, data = self._override
        return self._config[:offset] + data + self._config[offset + len(data) :]

    def override(self, offset: int, data: bytes) -> None:
        """Show the driver `data` at `offset` from now on, instead of the server's.

        For fields that this side decides. The driver is notified of a change; any thread.
        """
        before = self.config()
        self._override = offset, data
        if self._frontend and self.config() != before:
            self._frontend.config_changed()

    def write_config(self, offset: int, data: bytes) -> None:
        """Pass on the driver's write; `config` then has the server's result."""
        if self._lost is not None or offset + len(data) > len(self._config):
            return
        with self._lock:
            try:
                self._client.write_config(offset, data)
                self._config = self._client.config(len(self._config))
            except VhostUserError as err:
                self._lose(err)

    def serve_first(self, count: int) -> None:
        """Have no queues served but the first `count`, as far as they are started; any thread."""
        with self._lock:
            before, self._served = self._served, count
            if self._lost is not None or self._bases is not None:
                return
            try:
                for index in sorted(self._started):
                    if (index < before) != (index < count):
                        self._client.enable(index, index < count)
            except VhostUserError as err:
                self._lose(err)

    def start(self, features: int, rings: Mapping[int, Ring]) -> None:
        """Have the enabled queues served from now on, with the negotiated features.

        Raises:
            GuestError: a ring is impossible; nothing is served.
        """
        self.stop()
        for ring in rings.values():
            self._check(ring)
        if self._lost is not None:
            self._fail(self._lost)
            return
        with self._lock:
            try:
                self._set_up(features)
                for index, ring in rings.items():
                    self._start_ring(index, ring)
            except VhostUserError as err:
                self._lose(err)
                return
        self._watch()

    def _set_up(self, features: int) -> None:
        self._driver_features = features & self._features_known
        self._client.set_features(self._driver_features | self._log_flag)
        table = _region_table(self._memory.regions)
        self._client.set_memory(table, [self._memory.fd] * len(table))

    def start_queue(self, index: int, ring: Ring) -> None:
        """Have one more queue served, between `start` and `stop`.

        Raises:
            GuestError: the ring is impossible; the others continue.
        """
        self._check(ring)
        if self._lost is not None:
            return
        self._events.unwatch()
        with self._lock:
            try:
                self._start_ring(index, ring)
            except VhostUserError as err:
                self._lose(err)
                return
        self._watch()

    def stop_queue(self, index: int) -> None:
        """Have one queue served less; its memory is not touched any more when this returns."""
        with self._lock:
            if index not in self._started:
                return
            del self._started[index]
            if self._lost is None:
                try:
                    self._client.enable(index, False)
                    self._client.stop(index)
                except VhostUserError as err:
                    self._lose(err)

    def stop(self) -> None:
        """Have every request finished; guest memory is not touched any more when this returns."""
        self._events.unwatch()
        for index in sorted(self._started):
            self.stop_queue(index)
        self._is_suspended = False
        self._bases = None

    def suspend(self) -> None:
        """End the thread; the server keeps its rings until `positions` asks. Idempotent."""
        if self._started:
            self._events.unwatch()
            self._is_suspended = True

    def resume(self) -> None:
        """Continue after `suspend` or `restore`, and have every ring processed once; idempotent."""
        was_suspended, self._is_suspended = self._is_suspended, False
        bases, self._bases = self._bases, None
        if not was_suspended:
            return
        with self._lock:
            if self._lost is None and bases is not None:
                try:
                    for index, ring in list(self._started.items()):
                        self._start_ring(index, ring, bases.get(index, 0))
                except VhostUserError as err:
                    self._lose(err)
        if self._lost is None:
            self._watch()
            # A request that waited for the host is tried again.
            for index in list(self._started):
                self.kick(index)

    def positions(self) -> Mapping[int, int]:
        """Have the server finish its requests and release the rings; return their positions.

        Only on demand: a server without rings forgets its driver's settings.
        """
        if self._is_suspended and self._bases is None:
            bases = {}
            with self._lock:
                if self._lost is None:
                    try:
                        for index in self._started:
                            self._client.enable(index, False)
                            bases[index] = self._client.stop(index) % _INDEXES
                    except VhostUserError as err:
                        self._lose(err)
            self._bases = bases
        return self._bases or {}

    def restore(
        self, features: int, rings: Mapping[int, Ring], positions: Mapping[int, int]
    ) -> None:
        """Become like a suspended dataplane that served `rings`, each from its position on.

        Raises:
            GuestError: a ring is impossible.
            StateError: the server does not accept the negotiated features.
        """
        self.stop()
        for ring in rings.values():
            self._check(ring)
        with self._lock:
            try:
                self._set_up(features)
            except VhostUserError as err:
                raise StateError(f"vhost-user: {err}") from err
        self._started = dict(rings)
        self._bases = {index: positions.get(index, 0) for index in rings}
        self._is_suspended = True

    def lend(self, is_lent: bool) -> None:
        """Have the server lend its resource to another process, or take it back; suspended.

        Raises:
            VhostUserError: it is not a server of ours, or cannot.
        """
        if not self._may_halt:
            raise VhostUserError(f"{self._name}: its server cannot lend it")
        with self._lock:
            if self._lost is not None:
                raise VhostUserError(f"{self._name}: {self._lost}")
            try:
                has_done = self._client.lend(is_lent)
            except VhostUserError as err:
                self._lose(err)
                raise
        if not has_done:
            why = "cannot be written back" if is_lent else "in use by another process"
            raise VhostUserError(f"{self._name}: {why}")

    def log_writes(self, log: SharedLog | None) -> bool:
        """Have the server mark its writes in `log`; None: no more. False if it cannot."""
        if not self._client.has_log:
            return False
        with self._lock:
            if self._lost is not None:  # it writes nothing any more
                return True
            try:
                if log is not None:
                    self._client.set_log(log.size, log.fd)
                self._log_flag = FEATURE_LOG_ALL if log is not None else 0
                self._client.set_features(self._driver_features | self._log_flag)
            except VhostUserError as err:
                self._lose(err)
        return True

    def parts(self, name: str) -> list[Part]:  # noqa: ARG002 - there are none
        """Return nothing: the server keeps its own state."""
        return []

    def settle(self) -> None:
        """Return when the server has served all available chains; no vCPU runs.

        A server with one thread, such as ours, has seen every notification from before the first
        question when it answers the second.
        """
        with self._lock:
            if self._lost is not None or not self._started:
                return
            try:
                for _ in range(2):
                    self._client.ping()
            except VhostUserError as err:
                self._lose(err)

    @property
    def disk_size(self) -> int:
        """Bytes of a disk, by its configuration space; 0 of another device."""
        sectors = int.from_bytes(self._config[:8], "little")
        return sectors * 512 if self.device_id == BLOCK.device_id else 0

    def copy_image(self, fd: int, part: ImageCopy) -> None:
        """Have a part of a disk of ours copied into a file; it is paused.

        Raises:
            OSError: it cannot be read, or the file cannot be written.
            VhostUserError: the server is gone.
        """
        self._ask_disk(lambda client: client.copy_image(fd, part))

    def log_changes(self, *, is_on: bool) -> None:
        """Have the changes of a disk of ours marked, from all of it on, or no more; any thread.

        Raises:
            VhostUserError: the server is gone.
        """
        self._ask_disk(lambda client: client.log_changes(is_on=is_on))

    def copy_changes(self, fd: int) -> ImageChange:
        """Have the next changed part of a disk of ours copied into a file; any thread.

        Raises:
            OSError: it cannot be read, or the file cannot be written.
            VhostUserError: the server is gone.
        """
        return self._ask_disk(lambda client: client.copy_changes(fd))

    def _ask_disk(self, ask: Callable[[Client], _T]) -> _T:
        with self._lock:
            if self._lost is not None:
                raise VhostUserError(f"{self._name}: {self._lost}")
            try:
                return ask(self._client)
            except VhostUserError as err:
                self._lose(err)
                raise

    def kick(self, index: int) -> None:
        """Look at queue `index`; any thread."""
        self._events.kick(index)

    def kick_fd(self, index: int) -> int:
        """Return the eventfd that does the same when written."""
        return self._events.kick_fd(index)

    def close(self) -> None:
        """Stop, and close the connection; idempotent."""
        self.stop()
        self._client.close()
        self._lost = "closed"
        self._events.close()

    # Rings

    def _attached(self) -> Frontend:
        assert self._frontend is not None, "attach() comes first"
        return self._frontend

    def _check(self, ring: Ring) -> None:
        """Raise GuestError for a ring that would make the server end the connection."""
        Virtqueue(self._memory, ring, 0)

    def _start_ring(self, index: int, ring: Ring, base: int = 0) -> None:
        client, events = self._client, self._events
        client.set_size(index, ring.size)
        client.set_base(index, base)
        client.set_address(
            VringAddress(
                *(index, 0, USER_BASE + ring.descriptors),
                *(USER_BASE + ring.used, USER_BASE + ring.available, 0),
            )
        )
        client.set_error(index, events.error_fd)
        client.set_call(index, events.call_fd(self._attached(), index))
        self._started[index] = ring
        client.set_kick(index, events.kick_fd(index))
        client.enable(index, index < self._served)
        # Requests may be there already, and older servers wait for the first notification.
        self.kick(index)

    # Failures

    def _watch(self) -> None:
        self._events.watch(
            self._attached(),
            self._ring_failed,
            self._client.fileno(),
            lambda: self._lose(VhostUserError("the server closed the connection")),
        )

    def _ring_failed(self) -> None:
        """Find out why the server stopped serving a ring, on the thread that watches it."""
        status = self._server_status() if self._may_halt else VIRTIO_CONFIG_S_NEEDS_RESET
        if errno := status >> HALT_SHIFT:
            self._attached().halt(HaltError(self._name, errno))
        elif status & VIRTIO_CONFIG_S_NEEDS_RESET:
            self._fail("the server gave up a ring")

    def _server_status(self) -> int:
        """Return the status of a server of ours, 0 if it is lost."""
        with self._lock:
            if self._lost is not None:
                return 0
            try:
                return self._client.status()
            except VhostUserError as err:
                self._lose(err)
                return 0

    def _lose(self, err: VhostUserError) -> None:
        """Give the server up, once; its later messages are ignored."""
        with self._lost_lock:
            if self._lost is not None:
                return
            self._lost = str(err)
        self._client.shut_down()
        self._fail(self._lost)

    def _fail(self, reason: str) -> None:
        if self._frontend:
            self._frontend.fail(f"vhost-user: {reason}")
        else:
            log.warning("%s: vhost-user: %s", self._name, reason)


def _offered(features: int, kind: DeviceKind) -> int:
    """Return the server's features that the driver is offered; VERSION_1 is the transport's."""
    if not features >> VIRTIO_F_VERSION_1 & 1:
        raise VhostUserError("the server offers legacy virtio only")
    # Stopping one queue needs no feature of the server.
    return features & (kind.features | _RING_FEATURES) | 1 << VIRTIO_F_RING_RESET


def _queue_count(kind: DeviceKind, features: int, config: bytes) -> int:
    count = kind.queues(features, config)
    if not 0 < count <= DISK_QUEUES_MAX:
        raise VhostUserError(f"the server has {count} queues, not 1 to {DISK_QUEUES_MAX}")
    return count


def _check_pairs(kind: DeviceKind, client: Client) -> None:
    if kind.pairs > 1 and (count := client.queue_count()) < kind.pairs:
        raise VhostUserError(f"the server has {count} of {kind.pairs} queue pairs")


def _region_table(regions: Sequence[Region]) -> list[MemoryRegion]:
    """Return the regions of guest memory as a server is told them."""
    return [MemoryRegion(one.gpa, one.size, USER_BASE + one.gpa, one.offset) for one in regions]
