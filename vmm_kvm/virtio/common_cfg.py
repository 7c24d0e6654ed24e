"""The common configuration structure: registers, status, feature negotiation, queue set-up.

All of a driver's set-up passes here; an `Actions` carries out its effects. An access may have any
width: it acts on each field that it touches.

Not a BusDevice of its own: its owner's lock is held around everything except `needs_reset`.

Source: virtio 1.2 §2.1, §2.2, §3.1.1, §4.1.4.3
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

from vmm_kvm.bits import all_ones
from vmm_kvm.errors import StateError
from vmm_kvm.state import U8, U16, U32, U64, PartState
from vmm_kvm.virtio import abi
from vmm_kvm.virtio.queue import Ring

SIZE = 60
"""Bytes, up to and including queue_reset."""

_DRIVER_STATUS = (
    abi.VIRTIO_CONFIG_S_ACKNOWLEDGE
    | abi.VIRTIO_CONFIG_S_DRIVER
    | abi.VIRTIO_CONFIG_S_DRIVER_OK
    | abi.VIRTIO_CONFIG_S_FEATURES_OK
    | abi.VIRTIO_CONFIG_S_FAILED
)
_VERSION_1 = 1 << abi.VIRTIO_F_VERSION_1
_ACCESS_PLATFORM = 1 << abi.VIRTIO_F_ACCESS_PLATFORM
_RING_RESET = 1 << abi.VIRTIO_F_RING_RESET

_FIELDS = {
    abi.VIRTIO_PCI_COMMON_DFSELECT: 4,
    abi.VIRTIO_PCI_COMMON_DF: 4,
    abi.VIRTIO_PCI_COMMON_GFSELECT: 4,
    abi.VIRTIO_PCI_COMMON_GF: 4,
    abi.VIRTIO_PCI_COMMON_MSIX: 2,
    abi.VIRTIO_PCI_COMMON_NUMQ: 2,
    abi.VIRTIO_PCI_COMMON_STATUS: 1,
    abi.VIRTIO_PCI_COMMON_CFGGENERATION: 1,
    abi.VIRTIO_PCI_COMMON_Q_SELECT: 2,
    abi.VIRTIO_PCI_COMMON_Q_SIZE: 2,
    abi.VIRTIO_PCI_COMMON_Q_MSIX: 2,
    abi.VIRTIO_PCI_COMMON_Q_ENABLE: 2,
    abi.VIRTIO_PCI_COMMON_Q_NOFF: 2,
    abi.VIRTIO_PCI_COMMON_Q_DESCLO: 8,
    abi.VIRTIO_PCI_COMMON_Q_AVAILLO: 8,
    abi.VIRTIO_PCI_COMMON_Q_USEDLO: 8,
    abi.VIRTIO_PCI_COMMON_Q_NDATA: 2,
    abi.VIRTIO_PCI_COMMON_Q_RESET: 2,
}
# Of each byte, the field that it belongs to and the field's width.
_FIELD_AT = {
    at: (start, width) for start, width in _FIELDS.items() for at in range(start, start + width)
}


class Actions(Protocol):
    """The consequences of the driver's writes."""

    def start(self, features: int, rings: Mapping[int, Ring]) -> None:
        """The driver is ready: serve the enabled queues."""

    def start_queue(self, index: int, ring: Ring) -> None:
        """The driver enabled one more queue of a device that works."""

    def stop_queue(self, index: int) -> None:
        """The driver resets one queue of a device that works."""

    def stop(self) -> None:
        """The driver resets the device."""

    def fail(self, reason: str) -> None:
        """The driver broke a rule; `needs_reset` is to be set."""


class QueueState(PartState):
    """The driver's settings of one queue."""

    size: U16
    vector: U16
    is_enabled: bool
    descriptors: U64
    available: U64
    used: U64


class CommonCfgState(PartState):
    """Everything that a driver can observe of the registers, or has set."""

    status: U8
    device_select: U32
    driver_select: U32
    queue_select: U16
    driver_features: U64
    config_vector: U16
    needs_reset: bool
    queues: tuple[QueueState, ...]


class QueueRegisters:
    """The driver's settings of one queue."""

    __slots__ = ("available", "descriptors", "is_enabled", "size", "size_max", "used", "vector")

    def __init__(self, size_max: int) -> None:
        self.size_max = size_max
        self.reset()

    def reset(self) -> None:
        """Return to the state after a reset."""
        self.size = self.size_max
        self.vector = abi.VIRTIO_MSI_NO_VECTOR
        self.is_enabled = False
        self.descriptors = self.available = self.used = 0

    @property
    def ring(self) -> Ring:
        """The place of the queue."""
        return Ring(self.size, self.descriptors, self.available, self.used)


class CommonCfg:
    """The registers of one device, and the state that follows from them."""

    __slots__ = (
        "_actions",
        "_device_select",
        "_driver_select",
        "_features",
        "_generation",
        "_queue_select",
        "_required",
        "_status",
        "_vectors",
        "config_vector",
        "driver_features",
        "needs_reset",
        "queues",
    )

    def __init__(
        self,
        features: int,
        queue_sizes: Sequence[int],
        vectors: int,
        actions: Actions,
        generation: Callable[[], int],
        *,
        is_restricted: bool = False,
    ) -> None:
        """Make the registers of a device that was just reset.

        Args:
            features: offered, a mask; VERSION_1 is added and required.
            queue_sizes: of each queue the largest size.
            vectors: how many MSI-X vectors there are.
            actions: what to do.
            generation: returns the generation of the configuration space, 0 to 255.
            is_restricted: ACCESS_PLATFORM is offered and required too: the device reaches only
            what the driver shares with it (virtio 1.2 §6).
        """
        self._required = _VERSION_1 | (_ACCESS_PLATFORM if is_restricted else 0)
        self._features = features | self._required
        self.queues = tuple(QueueRegisters(size) for size in queue_sizes)
        self._vectors = vectors
        self._actions = actions
        self._generation = generation
        self.needs_reset = False
        """Whether the device has stopped for the driver's fault; set on any thread."""
        self._clear()

    def _clear(self) -> None:
        self._status = 0
        self._device_select = self._driver_select = self._queue_select = 0
        self.driver_features = 0
        """The features that the driver has accepted, a mask; negotiated once `is_started`."""
        self.config_vector = abi.VIRTIO_MSI_NO_VECTOR
        """The MSI-X vector for changes of the configuration space."""
        for queue in self.queues:
            queue.reset()
        self.needs_reset = False

    @property
    def is_started(self) -> bool:
        """Whether the driver has set DRIVER_OK; any thread."""
        return bool(self._status & abi.VIRTIO_CONFIG_S_DRIVER_OK)

    def reset(self) -> None:
        """Do what writing 0 to the status does."""
        self._actions.stop()
        self._clear()

    # Snapshots

    def save(self) -> CommonCfgState:
        """Return a snapshot."""
        return CommonCfgState(
            status=self._status,
            device_select=self._device_select,
            driver_select=self._driver_select,
            queue_select=self._queue_select,
            driver_features=self.driver_features,
            config_vector=self.config_vector,
            needs_reset=self.needs_reset,
            queues=tuple(
                QueueState(
                    size=queue.size,
                    vector=queue.vector,
                    is_enabled=queue.is_enabled,
                    descriptors=queue.descriptors,
                    available=queue.available,
                    used=queue.used,
                )
                for queue in self.queues
            ),
        )

    def restore(self, state: CommonCfgState) -> None:
        """Continue from a snapshot; no action follows from it.

        Raises:
            StateError: it cannot be one of a device with these queues and features.
        """
        if len(state.queues) != len(self.queues):
            raise StateError(f"{len(state.queues)} queues, not {len(self.queues)}")
        if state.status & ~_DRIVER_STATUS:
            raise StateError(f"status: {state.status:#x}")
        self._status = state.status
        self._device_select = state.device_select
        self._driver_select = state.driver_select
        self._queue_select = state.queue_select
        self.driver_features = state.driver_features
        if state.status & abi.VIRTIO_CONFIG_S_FEATURES_OK and not self._is_acceptable():
            missing = state.driver_features & ~self._features
            raise StateError(f"features {missing:#x} are missing, or VERSION_1")
        self.config_vector = self._vector(state.config_vector)
        self.needs_reset = state.needs_reset
        for number, (queue, saved) in enumerate(zip(self.queues, state.queues, strict=True)):
            if not 0 < saved.size <= queue.size_max or saved.size & (saved.size - 1):
                raise StateError(f"queue {number}: size {saved.size}")
            queue.size = saved.size
            queue.vector = self._vector(saved.vector)
            queue.is_enabled = saved.is_enabled
            queue.descriptors = saved.descriptors
            queue.available = saved.available
            queue.used = saved.used

    # Accesses

    def read(self, offset: int, size: int) -> int:
        """Read `size` bytes at `offset`; bytes after the structure read as zero."""
        value, at, end = 0, offset, offset + size
        while at < end:
            start, width = _FIELD_AT.get(at, (at, 1))
            value |= self._get(start) >> (8 * (at - start)) << (8 * (at - offset))
            at = start + width
        return value & all_ones(size)

    def write(self, offset: int, size: int, value: int) -> None:
        """Write `size` bytes at `offset`; read-only fields keep their values."""
        at, end = offset, offset + size
        while at < end:
            start, width = _FIELD_AT.get(at, (at, 1))
            stop = min(end, start + width)
            new = value >> (8 * (at - offset)) & all_ones(stop - at)
            if stop - at < width:  # half of an address, as a rule
                kept = self._get(start) & ~(all_ones(stop - at) << (8 * (at - start)))
                new = kept | new << (8 * (at - start))
            self._set(start, new)
            at = stop

    def _selected(self) -> QueueRegisters | None:
        select = self._queue_select
        return self.queues[select] if select < len(self.queues) else None

    def _get(self, field: int) -> int:
        match field:
            case abi.VIRTIO_PCI_COMMON_DFSELECT:
                return self._device_select
            case abi.VIRTIO_PCI_COMMON_DF:
                return _half(self._features, self._device_select)
            case abi.VIRTIO_PCI_COMMON_GFSELECT:
                return self._driver_select
            case abi.VIRTIO_PCI_COMMON_GF:
                return _half(self.driver_features, self._driver_select)
            case abi.VIRTIO_PCI_COMMON_MSIX:
                return self.config_vector
            case abi.VIRTIO_PCI_COMMON_NUMQ:
                return len(self.queues)
            case abi.VIRTIO_PCI_COMMON_STATUS:
                return self._status | (abi.VIRTIO_CONFIG_S_NEEDS_RESET if self.needs_reset else 0)
            case abi.VIRTIO_PCI_COMMON_CFGGENERATION:
                return self._generation()
            case abi.VIRTIO_PCI_COMMON_Q_SELECT:
                return self._queue_select
            case _:
                queue = self._selected()
                return self._get_queue(field, queue) if queue else 0

    def _get_queue(self, field: int, queue: QueueRegisters) -> int:
        match field:
            case abi.VIRTIO_PCI_COMMON_Q_SIZE:
                return queue.size
            case abi.VIRTIO_PCI_COMMON_Q_MSIX:
                return queue.vector
            case abi.VIRTIO_PCI_COMMON_Q_ENABLE:
                return int(queue.is_enabled)
            case abi.VIRTIO_PCI_COMMON_Q_NOFF | abi.VIRTIO_PCI_COMMON_Q_NDATA:
                return self._queue_select
            case abi.VIRTIO_PCI_COMMON_Q_DESCLO:
                return queue.descriptors
            case abi.VIRTIO_PCI_COMMON_Q_AVAILLO:
                return queue.available
            case abi.VIRTIO_PCI_COMMON_Q_USEDLO:
                return queue.used
            case _:  # queue_reset: a reset is over before the driver can look
                return 0

    def _set(self, field: int, value: int) -> None:
        match field:
            case abi.VIRTIO_PCI_COMMON_DFSELECT:
                self._device_select = value
            case abi.VIRTIO_PCI_COMMON_GFSELECT:
                self._driver_select = value
            case abi.VIRTIO_PCI_COMMON_GF:
                self._accept(value)
            case abi.VIRTIO_PCI_COMMON_MSIX:
                self.config_vector = self._vector(value)
            case abi.VIRTIO_PCI_COMMON_STATUS:
                self._set_status(value)
            case abi.VIRTIO_PCI_COMMON_Q_SELECT:
                self._queue_select = value
            case _:
                queue = self._selected()
                if queue:
                    self._set_queue(field, value, queue)

    def _set_queue(self, field: int, value: int, queue: QueueRegisters) -> None:
        match field:
            case abi.VIRTIO_PCI_COMMON_Q_MSIX:
                queue.vector = self._vector(value)
            case abi.VIRTIO_PCI_COMMON_Q_RESET:
                if value == 1 and self.driver_features & _RING_RESET:
                    self._reset_queue(queue)
            case _ if queue.is_enabled:
                pass  # an enabled queue stays as it is until it is reset
            case abi.VIRTIO_PCI_COMMON_Q_SIZE:
                if 0 < value <= queue.size_max and not value & (value - 1):
                    queue.size = value
                else:
                    self._actions.fail(f"queue {self._queue_select}: size {value}")
            case abi.VIRTIO_PCI_COMMON_Q_ENABLE:
                if value == 1:
                    self._enable_queue(queue)
            case abi.VIRTIO_PCI_COMMON_Q_DESCLO:
                queue.descriptors = value
            case abi.VIRTIO_PCI_COMMON_Q_AVAILLO:
                queue.available = value
            case abi.VIRTIO_PCI_COMMON_Q_USEDLO:
                queue.used = value
            case _:
                pass

    def _vector(self, value: int) -> int:
        """Return the vector that takes effect: none, if it does not exist."""
        return value if value < self._vectors else abi.VIRTIO_MSI_NO_VECTOR

    # Negotiation

    def _accept(self, value: int) -> None:
        if self._status & abi.VIRTIO_CONFIG_S_FEATURES_OK or self._driver_select > 1:
            return
        shift = 32 * self._driver_select
        kept = self.driver_features & ~(all_ones(4) << shift)
        self.driver_features = kept | value << shift

    def _set_status(self, value: int) -> None:
        if value == 0:
            self.reset()
            return
        # A driver must not clear bits, so bits missing from `value` mean nothing.
        new = value & ~self._status & _DRIVER_STATUS
        if new & abi.VIRTIO_CONFIG_S_FEATURES_OK and not self._is_acceptable():
            new &= ~abi.VIRTIO_CONFIG_S_FEATURES_OK
        if new & abi.VIRTIO_CONFIG_S_DRIVER_OK:
            if not (self._status | new) & abi.VIRTIO_CONFIG_S_FEATURES_OK:
                new &= ~abi.VIRTIO_CONFIG_S_DRIVER_OK
                self._actions.fail("driver is ready without having negotiated features")
            elif self.needs_reset:
                new &= ~abi.VIRTIO_CONFIG_S_DRIVER_OK
        self._status |= new
        if new & abi.VIRTIO_CONFIG_S_DRIVER_OK:
            rings = {i: queue.ring for i, queue in enumerate(self.queues) if queue.is_enabled}
            self._actions.start(self.driver_features, rings)

    def _is_acceptable(self) -> bool:
        accepted = self.driver_features
        return not accepted & ~self._features and not self._required & ~accepted

    def _enable_queue(self, queue: QueueRegisters) -> None:
        queue.is_enabled = True
        if self.is_started and not self.needs_reset:
            self._actions.start_queue(self._queue_select, queue.ring)

    def _reset_queue(self, queue: QueueRegisters) -> None:
        if queue.is_enabled and self.is_started:
            self._actions.stop_queue(self._queue_select)
        queue.reset()


def _half(features: int, select: int) -> int:
    return features >> (32 * select) & all_ones(4) if select < 2 else 0
