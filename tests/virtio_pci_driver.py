"""The driver's side of virtio over PCI: how a guest's kernel finds and starts a device."""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field

from tests.fakes import RecordingIrqLine
from tests.virtio_driver import DriverQueue
from vmm_kvm.arch.x86 import layout
from vmm_kvm.bits import PAGE_SIZE
from vmm_kvm.bus import Bus
from vmm_kvm.errors import HaltError
from vmm_kvm.pci.host import PciHost
from vmm_kvm.pci.ids import CapabilityId, Command, Register
from vmm_kvm.pci.msix import CONTROL_ENABLE, MsixMessage
from vmm_kvm.virtio import abi
from vmm_kvm.virtio.device import Dataplane
from vmm_kvm.virtio.pci import VirtioPci

DEADLINE_S = 10.0
READY = (
    abi.VIRTIO_CONFIG_S_ACKNOWLEDGE
    | abi.VIRTIO_CONFIG_S_DRIVER
    | abi.VIRTIO_CONFIG_S_FEATURES_OK
    | abi.VIRTIO_CONFIG_S_DRIVER_OK
)
MMIO_SIZE = 1 << 40
_ENABLED = Command.IO_SPACE | Command.MEMORY_SPACE | Command.BUS_MASTER


class FakeLine:
    """An MsiLine whose messages go into its host's list."""

    def __init__(self, host: FakeHost) -> None:
        self.fd = -1
        self._host = host
        self.message: MsixMessage | None = None
        self.held = 0

    def route(self, message: MsixMessage | None) -> None:
        """Send messages from now on, and a pending one at once."""
        self.message = message
        if message and self.held:
            self.held = 0
            self._host.deliver(message)

    def signal(self) -> None:
        """Send, or hold back, a message."""
        if self.message:
            self._host.deliver(self.message)
        else:
            self.held += 1

    def is_pending(self) -> bool:
        """Tell whether a message is held back."""
        return self.held > 0


class PinLine(RecordingIrqLine):
    """An IrqLine on which one can wait for the next rise."""

    def __init__(self) -> None:
        super().__init__()
        self.rose = threading.Semaphore(0)

    def set(self, level: bool) -> None:
        """Record the level, and wake waiting threads."""
        was_high = self.level
        super().set(level)
        if level and not was_high:
            self.rose.release()


@dataclass
class FakeHost:
    """A `Host` that records calls; waiting threads read `delivered` interrupt messages."""

    bound: dict[int, int] = field(default_factory=dict)
    """Eventfd by port."""
    messages: list[MsixMessage] = field(default_factory=list)
    delivered: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))

    def bind_notification(self, fd: int, port: int) -> None:
        """Record the eventfd."""
        assert port not in self.bound
        self.bound[port] = fd

    def unbind_notification(self, fd: int, port: int) -> None:
        """Remove the record, which must exist."""
        assert self.bound.pop(port) == fd

    def msi_line(self) -> FakeLine:
        """Make a line whose messages arrive here."""
        return FakeLine(self)

    def send_msi(self, address: int, data: int) -> None:
        """Deliver a message."""
        self.deliver(MsixMessage(address, data))

    def deliver(self, message: MsixMessage) -> None:
        """Record a message, and wake threads that wait for one."""
        self.messages.append(message)
        self.delivered.release()


class BusDriver:
    """A driver of the virtio function in a slot, reached over the machine's buses."""

    def __init__(self, pio: Bus, mmio: Bus, slot: int) -> None:
        self.pio, self.mmio, self.slot = pio, mmio, slot
        self.structures = self._find_structures()
        self.notify_multiplier = self.config_read(self.notify_capabilities[0] + 16)

    # Configuration space

    def config_read(self, register: int, size: int = 4) -> int:
        """Read configuration space."""
        self.pio.write(layout.PORT_PCI_CONFIG, 4, 1 << 31 | self.slot << 11 | register & 0xFC)
        return self.pio.read(layout.PORT_PCI_CONFIG + 4 + (register & 3), size)

    def config_write(self, register: int, value: int, size: int = 4) -> None:
        """Write configuration space."""
        self.pio.write(layout.PORT_PCI_CONFIG, 4, 1 << 31 | self.slot << 11 | register & 0xFC)
        self.pio.write(layout.PORT_PCI_CONFIG + 4 + (register & 3), size, value)

    def bar(self, index: int) -> int:
        """Return a BAR's address."""
        value = self.config_read(Register.BAR0 + 4 * index)
        return value & ~(0x3 if value & 1 else 0xF)

    def capabilities(self, wanted: int) -> list[int]:
        """Return the offsets of the capabilities of one ID."""
        found, at = [], self.config_read(Register.CAPABILITIES, 1)
        while at:
            if self.config_read(at, 1) == wanted:
                found.append(at)
            at = self.config_read(at + 1, 1)
        return found

    def _find_structures(self) -> Mapping[int, int]:
        """Return the address of each structure on the memory bus, by its type.

        Notification addresses are ports as well, and that capability comes first.
        """
        structures = {}
        self.notify_capabilities = []
        for at in self.capabilities(CapabilityId.VENDOR_SPECIFIC):
            kind = self.config_read(at + 3, 1)
            if kind == abi.VIRTIO_PCI_CAP_PCI_CFG:
                self.window = at
                continue
            if kind == abi.VIRTIO_PCI_CAP_NOTIFY_CFG:
                self.notify_capabilities.append(at)
            structures[kind] = self.bar(self.config_read(at + 4, 1)) + self.config_read(at + 8)
        return structures

    # The structures

    def read(self, register: int, size: int) -> int:
        """Read the common configuration."""
        return self.mmio.read(self.structures[abi.VIRTIO_PCI_CAP_COMMON_CFG] + register, size)

    def write(self, register: int, size: int, value: int) -> None:
        """Write the common configuration."""
        self.mmio.write(self.structures[abi.VIRTIO_PCI_CAP_COMMON_CFG] + register, size, value)

    @property
    def status(self) -> int:
        """The device status."""
        return self.read(abi.VIRTIO_PCI_COMMON_STATUS, 1)

    @status.setter
    def status(self, value: int) -> None:
        self.write(abi.VIRTIO_PCI_COMMON_STATUS, 1, value)

    def isr(self) -> int:
        """Read, and thereby clear, the interrupt status."""
        return self.mmio.read(self.structures[abi.VIRTIO_PCI_CAP_ISR_CFG], 1)

    def device_config(self, offset: int, size: int) -> int:
        """Read the device's configuration space."""
        return self.mmio.read(self.structures[abi.VIRTIO_PCI_CAP_DEVICE_CFG] + offset, size)

    def offered(self) -> int:
        """Return the offered features."""
        features = 0
        for half in range(2):
            self.write(abi.VIRTIO_PCI_COMMON_DFSELECT, 4, half)
            features |= self.read(abi.VIRTIO_PCI_COMMON_DF, 4) << (32 * half)
        return features

    def accept(self, features: int) -> None:
        """Write the features that the driver wants."""
        for half in range(2):
            self.write(abi.VIRTIO_PCI_COMMON_GFSELECT, 4, half)
            self.write(abi.VIRTIO_PCI_COMMON_GF, 4, features >> (32 * half) & 0xFFFF_FFFF)

    def place(self, index: int, queue: DriverQueue, vector: int | None = None) -> None:
        """Write a queue's addresses, and enable it."""
        ring = queue.ring
        self.write(abi.VIRTIO_PCI_COMMON_Q_SELECT, 2, index)
        self.write(abi.VIRTIO_PCI_COMMON_Q_SIZE, 2, ring.size)
        for register, address in (
            (abi.VIRTIO_PCI_COMMON_Q_DESCLO, ring.descriptors),
            (abi.VIRTIO_PCI_COMMON_Q_AVAILLO, ring.available),
            (abi.VIRTIO_PCI_COMMON_Q_USEDLO, ring.used),
        ):
            self.write(register, 4, address & 0xFFFF_FFFF)
            self.write(register + 4, 4, address >> 32)
        if vector is not None:
            self.write(abi.VIRTIO_PCI_COMMON_Q_MSIX, 2, vector)
        self.write(abi.VIRTIO_PCI_COMMON_Q_ENABLE, 2, 1)

    def start(
        self, queues: Mapping[int, DriverQueue], *, features: int | None = None, msix: bool = True
    ) -> None:
        """Reset, negotiate, place the queues with a vector each, set DRIVER_OK."""
        self.config_write(Register.COMMAND, _ENABLED, 2)
        self.status = 0
        self.status = abi.VIRTIO_CONFIG_S_ACKNOWLEDGE | abi.VIRTIO_CONFIG_S_DRIVER
        self.accept(self.offered() if features is None else features)
        self.status |= abi.VIRTIO_CONFIG_S_FEATURES_OK
        if msix:
            self.enable_msix()
            self.write(abi.VIRTIO_PCI_COMMON_MSIX, 2, 0)
        for index, queue in queues.items():
            self.place(index, queue, index + 1 if msix else None)
        self.status |= abi.VIRTIO_CONFIG_S_DRIVER_OK

    # Interrupts and notifications

    def enable_msix(self) -> None:
        """Enable MSI-X and unmask every vector; vector n sends the number n."""
        (capability,) = self.capabilities(CapabilityId.MSI_X)
        control = self.config_read(capability + 2, 2)
        for vector in range((control & 0x7FF) + 1):
            self.mask(vector, is_masked=False)
        self.config_write(capability + 2, control | CONTROL_ENABLE, 2)

    def mask(self, vector: int, *, is_masked: bool) -> None:
        """Write a vector's entry, masked or not."""
        entry = self.bar(1) + 16 * vector
        self.mmio.write(entry, 4, 0xFEE0_0000)
        self.mmio.write(entry + 8, 4, vector)
        self.mmio.write(entry + 12, 4, int(is_masked))

    def notify_port(self, index: int) -> int:
        """Return the port to which a write notifies queue `index`."""
        ports = self.config_read(self.notify_capabilities[0] + 4, 1)
        return self.bar(ports) + self.notify_address(index) % PAGE_SIZE

    def notify_address(self, index: int) -> int:
        """Return the memory address to which a write notifies queue `index`."""
        self.write(abi.VIRTIO_PCI_COMMON_Q_SELECT, 2, index)
        offset = self.read(abi.VIRTIO_PCI_COMMON_Q_NOFF, 2)
        return self.structures[abi.VIRTIO_PCI_CAP_NOTIFY_CFG] + offset * self.notify_multiplier


class PciDriver(BusDriver):
    """The same, with buses of its own that have the function in slot 1, and nothing else."""

    SLOT = 1

    def __init__(
        self, dataplane: Dataplane, class_code: int = 0xFF00, *, is_restricted: bool = False
    ) -> None:
        pio, mmio = Bus(0x10000), Bus(MMIO_SIZE)
        self.pci = PciHost(pio, mmio, on_reset=lambda: None)
        pio.insert(layout.PORT_PCI_CONFIG, 8, self.pci)
        self.host = FakeHost()
        self.intx = PinLine()
        self.halts: list[HaltError] = []
        self.halted = threading.Semaphore(0)
        self.device = VirtioPci(
            dataplane,
            self.host,
            self.intx,
            class_code=class_code,
            name="device",
            on_halt=self._note_halt,
            is_restricted=is_restricted,
        )
        assert self.pci.add(self.device.function) == self.SLOT
        self.pci.assign_bars()
        super().__init__(pio, mmio, self.SLOT)

    def _note_halt(self, err: HaltError) -> None:
        self.halts.append(err)
        self.halted.release()

    def notify(self, index: int) -> None:
        """Notify as the machine's kernel would: by the eventfd where one is bound."""
        port = self.notify_port(index)
        fd = self.host.bound.get(port)
        if fd is None:
            self.pio.write(port, 2, index)
        else:
            os.eventfd_write(fd, 1)

    def interrupted(self) -> int:
        """Wait for the next message; returns its data, the vector."""
        assert self.host.delivered.acquire(timeout=DEADLINE_S)
        return self.host.messages.pop(0).data

    def pin_rose(self) -> bool:
        """Wait for the interrupt pin to be asserted."""
        return self.intx.rose.acquire(timeout=DEADLINE_S)
