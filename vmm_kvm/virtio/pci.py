"""virtio over PCI: one function that shows a dataplane's device to its driver.

Modern only (VERSION_1), as QEMU's `disable-legacy=on`. BAR 4 holds the structures, a page each;
BAR 1 the MSI-X table; BAR 2 the notification addresses once more, as ports: KVM understands a port
access without decoding the guest's instruction, so that capability comes first. Notifications go
from the guest straight to the dataplane's eventfd and interrupts straight from an eventfd to the
guest, wherever the machine can arrange that; where it cannot, both go through this module.

Locks: `lock` is taken by the bus for accesses to BARs 2 and 4, and within the PCI host's lock when
BAR 2 moves or the guest reaches BAR 4 through configuration space. With it held the dataplane may
be waited for, so the dataplane's threads never take it: what they call (`interrupt`,
`config_changed`, `fail`, `halt`) takes only `_isr_lock` and the MSI-X lock, which are innermost.

Source: virtio 1.2 §4.1
"""

import struct
import threading
from collections.abc import Callable, Mapping
from typing import Annotated, Literal, Protocol

from vmm_kvm.bits import PAGE_SIZE, all_ones
from vmm_kvm.errors import GuestError, HaltError, StateError
from vmm_kvm.irq import IrqLine
from vmm_kvm.log import Log
from vmm_kvm.pci.config import BarKind, PciFunction
from vmm_kvm.pci.ids import VENDOR_OPENBSD, VENDOR_QUMRANET, CapabilityId
from vmm_kvm.pci.msix import Msix, MsixMessage, MsixState
from vmm_kvm.state import U8, U16, Length, Part, PartState, Range
from vmm_kvm.virtio import abi
from vmm_kvm.virtio.common_cfg import CommonCfg, CommonCfgState
from vmm_kvm.virtio.device import Dataplane
from vmm_kvm.virtio.queue import USED_ELEMENT_SIZE, USED_RING_SIZE, Ring
from vmm_kvm.write_log import SharedLog

log = Log(__name__)

DEVICE_ID_BASE = 0x1040
"""Plus the device type: the PCI device ID (virtio 1.2 §4.1.2.1)."""
BAR_MSIX, BAR_NOTIFY, BAR_STRUCTURES = 1, 2, 4
COMMON, ISR, DEVICE, NOTIFY = (page * PAGE_SIZE for page in range(4))
"""The places of the structures in the BAR."""
BAR_SIZE = 4 * PAGE_SIZE
NOTIFY_MULTIPLIER = 4
"""Bytes, or ports, between the notification addresses of two queues."""
NOTIFY_PORTS = 256
QUEUES_MAX = NOTIFY_PORTS // NOTIFY_MULTIPLIER

_ISR_QUEUE = 1 << 0
_REVISION = 1
_CAPACITY_SIZE, _SECTOR_SIZE = 8, 512  # of a disk's configuration
_PIN_INTA = 1
_CAPABILITY = struct.Struct("<BBBBHII")  # cap_len, cfg_type, bar, id, padding, offset, length
_CAPABILITY_SIZE = 2 + _CAPABILITY.size
_WINDOW_BAR, _WINDOW_OFFSET, _WINDOW_LENGTH, _WINDOW_DATA = 4, 8, 12, 16
_FAILURES_LOGGED = 5  # per function: a guest can fail as often as it likes


class VirtioPciState(PartState):
    """Everything that a driver can observe of the function besides its configuration space."""

    msix: MsixState
    registers: CommonCfgState
    isr: U8
    config: Annotated[bytes, Length(0, PAGE_SIZE)]
    """The device's configuration, as the driver may have read it."""
    generation: U8
    positions: tuple[tuple[Annotated[int, Range(0, QUEUES_MAX - 1)], U16], ...]
    """The next position in both rings, for each queue that is served."""
    version: Literal[1] = 1


class MsiLine(Protocol):
    """An eventfd that sends messages into the guest without a thread of ours."""

    fd: int
    """Writing it sends the message; writes while it has none are not lost."""

    def route(self, message: MsixMessage | None) -> None:
        """Send `message` from now on; None holds interrupts back."""

    def signal(self) -> None:
        """Write the eventfd; any thread."""

    def is_pending(self) -> bool:
        """Tell whether it was written while it had no message; while nothing runs."""


class Host(Protocol):
    """A function's requests to the machine. No method may wait or call back."""

    def bind_notification(self, fd: int, port: int) -> None:
        """Let guest writes of any size to `port` signal the eventfd `fd`, instead of an access.

        If that is impossible, writes stay exits.
        """

    def unbind_notification(self, fd: int, port: int) -> None:
        """Undo it; the arguments are the same."""

    def msi_line(self) -> MsiLine:
        """Make another line, which belongs to the machine."""

    def send_msi(self, address: int, data: int) -> None:
        """Send a message now."""


class VirtioPci:
    """A virtio device as a PCI function: `function` is what the PCI host takes.

    Owns the dataplane; is its `Frontend`, the `Actions` of its registers, and the BusDevice of
    BAR 4.
    """

    def __init__(
        self,
        dataplane: Dataplane,
        host: Host,
        intx: IrqLine,
        *,
        class_code: int,
        name: str,
        on_halt: Callable[[HaltError], None] = lambda _err: None,
        is_restricted: bool = False,
    ) -> None:
        """Make the function of `dataplane`.

        Args:
            dataplane: serves the queues, at most 64.
            host: the machine.
            intx: where INTA of the function's slot leads.
            class_code: 24 bits, as for PciFunction.
            name: for the log.
            on_halt: pauses the VM, because a request waits for the host; called on the device's
            thread with no lock held; it may not wait for the pause.
            is_restricted: the driver has to use memory that it shares with the device.
        """
        self.lock = threading.Lock()
        self.name = name
        self._on_halt = on_halt
        self._dataplane = dataplane
        self._host = host
        queues = len(dataplane.queue_sizes)
        assert queues <= QUEUES_MAX
        self._msix = Msix(queues + 1, host.send_msi, on_route_change=self._route)
        self._lines: list[MsiLine | None] = [None] * (queues + 1)
        self._routed = [False] * (queues + 1)
        self._registers = CommonCfg(
            dataplane.features,
            dataplane.queue_sizes,
            queues + 1,
            actions=self,
            generation=self._config_generation,
            is_restricted=is_restricted,
        )
        self._config = dataplane.config()
        self._generation = 0
        self._isr_lock = threading.Lock()
        self._isr = 0
        self._failures = 0
        self._base: int | None = None
        self._serving: set[int] = set()
        self._is_restored = False
        self._bound: dict[int, tuple[int, int]] = {}
        self.function = self._function(dataplane.device_id, class_code, intx)
        dataplane.attach(self)

    def settle(self) -> None:
        """Return when the device has completed the driver's requests; when no vCPU runs."""
        with self.lock:
            self._dataplane.settle()

    def suspend(self) -> None:
        """Stop all threads; nothing is forgotten; when no vCPU runs."""
        with self.lock:
            self._dataplane.suspend()

    def resume(self) -> None:
        """Go on after `suspend` or `restore`, before a vCPU runs."""
        with self.lock:
            self._dataplane.resume()
            was_restored, self._is_restored = self._is_restored, False
            config = self._config
        if not was_restored:
            return
        # A spurious interrupt is legal, a lost one is not.
        for index in self._serving:
            self.interrupt(index)
        if self._dataplane.config() != config:
            self.config_changed()

    # Dirty pages

    def log_writes(self, log: SharedLog | None) -> bool:
        """Have other processes mark their writes for the device; see `Dataplane`."""
        with self.lock:
            return self._dataplane.log_writes(log)

    def used_rings(self) -> list[tuple[int, int]]:
        """Return guest-physical address and bytes of each used ring, which the device writes to."""
        return [
            (ring.used, USED_RING_SIZE + USED_ELEMENT_SIZE * ring.size)
            for ring in (self._registers.queues[index].ring for index in self._serving)
        ]

    # Snapshots; while it is paused

    def parts(self, name: str) -> list[Part]:
        """Return the function and its device's parts; their names begin with `name`."""
        return [Part(name, self), *self._dataplane.parts(name)]

    def save(self) -> VirtioPciState:
        """Return a snapshot without configuration space and the device's own state."""
        with self.lock:
            msix = self._msix.save()
            pending = {
                vector
                for vector, line in enumerate(self._lines)
                if line and not self._routed[vector] and line.is_pending()
            }
            return VirtioPciState(
                msix=msix.but(pending=msix.pending | pending),
                registers=self._registers.save(),
                isr=self._isr,
                config=self._config,
                generation=self._generation,
                positions=tuple(sorted(self._dataplane.positions().items())),
            )

    def restore(self, state: VirtioPciState) -> None:
        """Continue from a snapshot, in a new machine; `resume` lets the device work.

        Raises:
            StateError: it is of another device, or its queues cannot be.
        """
        positions = dict(state.positions)
        if max(positions, default=0) >= len(self._registers.queues):
            raise StateError(f"positions: no queue {max(positions)}")
        self._check_capacity(state.config)
        with self.lock:
            self._registers.restore(state.registers)
            self._msix.restore(state.msix)
            self._isr = state.isr
            self._config = state.config
            self._generation = state.generation
            self._is_restored = True
            if not self._registers.is_started or self._registers.needs_reset:
                return
            rings = {i: q.ring for i, q in enumerate(self._registers.queues) if q.is_enabled}
            try:
                self._dataplane.restore(self._registers.driver_features, rings, positions)
            except GuestError as err:
                raise StateError(str(err)) from err
            self._serving.update(rings)
            self._bind()

    def _check_capacity(self, config: bytes) -> None:
        """Refuse a disk of another size than the driver knows; virtio 1.2 §5.2.4."""
        if self._dataplane.device_id != abi.VIRTIO_ID_BLOCK:
            return
        told, own = (
            int.from_bytes(one[:_CAPACITY_SIZE], "little") * _SECTOR_SIZE
            for one in (config, self._dataplane.config())
        )
        if told != own:
            raise StateError(f"a disk of {told} bytes, not of {own}")

    def bind_again(self) -> None:
        """Bind all notifications again, in a VM that replaces the machine's one before."""
        with self.lock:
            for fd, port in self._bound.values():
                self._host.bind_notification(fd, port)
            self._is_restored = True

    def close(self) -> None:
        """Stop the device and close its dataplane; when no vCPU runs."""
        self._dataplane.close()

    def _function(self, device_id: int, class_code: int, intx: IrqLine) -> PciFunction:
        function = PciFunction(
            vendor_id=VENDOR_QUMRANET,
            device_id=DEVICE_ID_BASE + device_id,
            class_code=class_code,
            revision_id=_REVISION,
            subsystem_vendor_id=VENDOR_OPENBSD,
            # OpenBSD's vmd has the type alone here; below 0x40 OVMF takes no modern device.
            subsystem_id=DEVICE_ID_BASE + device_id,
            interrupt_pin=_PIN_INTA,
            intx=intx,
        )
        self._msix.attach(function, BAR_MSIX)
        function.add_bar(
            BAR_NOTIFY,
            BarKind.IO,
            NOTIFY_PORTS,
            _NotifyPorts(self),
            on_decode=self._on_decode,
        )
        function.add_bar(BAR_STRUCTURES, BarKind.MEMORY32, BAR_SIZE, self)
        multiplier = NOTIFY_MULTIPLIER.to_bytes(4, "little")
        for kind, bar, offset, size, extra in (
            (abi.VIRTIO_PCI_CAP_COMMON_CFG, BAR_STRUCTURES, COMMON, PAGE_SIZE, b""),
            (abi.VIRTIO_PCI_CAP_ISR_CFG, BAR_STRUCTURES, ISR, PAGE_SIZE, b""),
            (abi.VIRTIO_PCI_CAP_DEVICE_CFG, BAR_STRUCTURES, DEVICE, PAGE_SIZE, b""),
            (abi.VIRTIO_PCI_CAP_NOTIFY_CFG, BAR_NOTIFY, 0, NOTIFY_PORTS, multiplier),
            (abi.VIRTIO_PCI_CAP_NOTIFY_CFG, BAR_STRUCTURES, NOTIFY, PAGE_SIZE, multiplier),
        ):
            body = _capability(kind, bar, offset, size, extra)
            function.add_capability(CapabilityId.VENDOR_SPECIFIC, body)
        writable = bytearray(_CAPABILITY.size + 4)
        writable[_WINDOW_BAR - 2] = 0xFF
        writable[_WINDOW_OFFSET - 2 :] = b"\xff" * (len(writable) + 2 - _WINDOW_OFFSET)
        self._window = function.add_capability(
            CapabilityId.VENDOR_SPECIFIC,
            _capability(abi.VIRTIO_PCI_CAP_PCI_CFG, 0, 0, 0, bytes(4)),
            writable=bytes(writable),
            on_read=self._read_window,
            on_write=self._write_window,
        )
        return function

    # BAR 4; the bus holds the lock

    def read(self, offset: int, size: int) -> int:
        """Read from one of the structures."""
        page, at = offset & -PAGE_SIZE, offset % PAGE_SIZE
        if page == COMMON:
            return self._registers.read(at, size)
        if page == ISR:
            return self._take_isr() if at == 0 else 0
        if page == DEVICE:
            return int.from_bytes(self._current_config()[at : at + size], "little")
        return 0

    def write(self, offset: int, size: int, value: int) -> None:
        """Write to one of the structures."""
        page, at = offset & -PAGE_SIZE, offset % PAGE_SIZE
        if page == NOTIFY:
            self.notify(at // NOTIFY_MULTIPLIER)
        elif page == COMMON:
            self._registers.write(at, size, value)
        elif page == DEVICE:
            data = (value & all_ones(size)).to_bytes(size, "little")
            self._dataplane.write_config(at, data)

    def notify(self, index: int) -> None:
        """Hand on a notification that came as an access; nothing for queues that are not served."""
        if index in self._serving:
            self._dataplane.kick(index)

    def _current_config(self) -> bytes:
        config = self._dataplane.config()
        if config != self._config:
            self._config = config
            self._generation = self._generation + 1 & 0xFF
        return config

    def _config_generation(self) -> int:
        """Return a number that changes when the configuration does after the driver read it."""
        self._current_config()
        return self._generation

    # The window in configuration space (virtio 1.2 §4.1.4.9); the PCI host's lock is held

    def _read_window(self, offset: int, _size: int) -> None:
        access = self._window_access(offset)
        if access:
            at, length = access
            with self.lock:
                value = self.read(at, length)
            self.function.poke(self._window + _WINDOW_DATA, length, value)

    def _write_window(self, offset: int, _size: int) -> None:
        access = self._window_access(offset)
        if access:
            at, length = access
            with self.lock:
                self.write(at, length, self.function.peek(self._window + _WINDOW_DATA, length))

    def _window_access(self, offset: int) -> tuple[int, int] | None:
        """Return where in BAR 4, and how many bytes, an access at `offset` of the window means."""
        if offset < _WINDOW_DATA:
            return None
        bar = self.function.peek(self._window + _WINDOW_BAR, 1)
        at = self.function.peek(self._window + _WINDOW_OFFSET, 4)
        length = self.function.peek(self._window + _WINDOW_LENGTH, 4)
        is_valid = bar == BAR_STRUCTURES and length in {1, 2, 4} and at + length <= BAR_SIZE
        return (at, length) if is_valid and at % length == 0 else None

    # Actions of the registers; `lock` is held

    def start(self, features: int, rings: Mapping[int, Ring]) -> None:
        """The driver is ready: serve the enabled queues."""
        try:
            self._dataplane.start(features, rings)
        except GuestError as err:
            self.fail(str(err))
            return
        self._serving.update(rings)
        self._bind()

    def start_queue(self, index: int, ring: Ring) -> None:
        """The driver enabled one more queue."""
        try:
            self._dataplane.start_queue(index, ring)
        except GuestError as err:
            self.fail(str(err))
            return
        self._serving.add(index)
        self._bind()

    def stop_queue(self, index: int) -> None:
        """The driver resets one queue."""
        self._serving.discard(index)
        self._unbind()
        self._dataplane.stop_queue(index)

    def stop(self) -> None:
        """The driver resets the device."""
        self._serving.clear()
        self._unbind()
        self._dataplane.stop()
        self._take_isr()

    # Notifications; `lock` is held

    def _on_decode(self, base: int | None) -> None:
        with self.lock:
            self._base = base
            self._unbind(everything=True)
            self._bind()

    def _bind(self) -> None:
        """Let KVM deliver notifications of the served queues to the dataplane."""
        if self._base is None:
            return
        for index in self._serving - self._bound.keys():
            fd = self._dataplane.kick_fd(index)
            port = self._base + index * NOTIFY_MULTIPLIER
            self._host.bind_notification(fd, port)
            self._bound[index] = fd, port

    def _unbind(self, *, everything: bool = False) -> None:
        for index in list(self._bound):
            if everything or index not in self._serving:
                self._host.unbind_notification(*self._bound.pop(index))

    # Interrupts (Frontend); any thread

    def interrupt(self, index: int) -> None:
        """Tell the driver that queue `index` has used chains that it wants to hear of."""
        if self._msix.is_enabled:
            self._signal(self._registers.queues[index].vector)
        else:
            self._raise_isr(_ISR_QUEUE)

    def interrupt_fd(self, index: int) -> int | None:
        """Return an eventfd that does the same when written; None where `interrupt` has to."""
        vector = self._registers.queues[index].vector
        if not self._msix.is_enabled or vector == abi.VIRTIO_MSI_NO_VECTOR:
            return None
        with self._msix.lock:  # against a guest that unmasks the vector at this moment
            return self._line(vector).fd

    def config_changed(self) -> None:
        """Tell the driver that the configuration space has changed."""
        if not self._registers.is_started:
            return
        if self._msix.is_enabled:
            with self._isr_lock:
                self._isr |= abi.VIRTIO_PCI_ISR_CONFIG
            self._signal(self._registers.config_vector)
        else:
            self._raise_isr(abi.VIRTIO_PCI_ISR_CONFIG)

    def fail(self, reason: str) -> None:
        """Stop the device until the driver resets it."""
        self._failures += 1
        if self._failures <= _FAILURES_LOGGED:
            log.warning("%s: needs reset: %s", self.name, reason)
        self._registers.needs_reset = True
        self.config_changed()

    def halt(self, err: HaltError) -> None:
        """Pause the VM: a request waits for the host."""
        self._on_halt(err)

    def _signal(self, vector: int) -> None:
        if vector == abi.VIRTIO_MSI_NO_VECTOR:
            return
        line = self._lines[vector]
        if line and self._routed[vector]:
            line.signal()
        else:
            self._msix.notify(vector)

    def _raise_isr(self, bit: int) -> None:
        with self._isr_lock:
            self._isr |= bit
            self.function.set_intx(is_asserted=True)

    def _take_isr(self) -> int:
        with self._isr_lock:
            isr, self._isr = self._isr, 0
            self.function.set_intx(is_asserted=False)
            return isr

    # MSI-X; its lock is held

    def _route(self, vector: int, message: MsixMessage | None) -> None:
        self._routed[vector] = False
        if message is not None or self._lines[vector]:
            self._line(vector).route(message)
        self._routed[vector] = message is not None

    def _line(self, vector: int) -> MsiLine:
        line = self._lines[vector]
        if line is None:
            line = self._lines[vector] = self._host.msi_line()
        return line


class _NotifyPorts:
    """The BusDevice of BAR 2, for notifications that the machine could not bind."""

    __slots__ = ("_owner", "lock")

    def __init__(self, owner: VirtioPci) -> None:
        self.lock = owner.lock
        self._owner = owner

    def read(self, _offset: int, _size: int) -> int:
        """Read nothing."""
        return 0

    def write(self, offset: int, _size: int, _value: int) -> None:
        """Notify."""
        self._owner.notify(offset // NOTIFY_MULTIPLIER)


def _capability(kind: int, bar: int, offset: int, length: int, extra: bytes) -> bytes:
    """Return the body of a virtio_pci_cap, behind the ID and the link."""
    size = _CAPABILITY_SIZE + len(extra)
    return _CAPABILITY.pack(size, kind, bar, 0, 0, offset, length) + extra
