"""vmmci: OpenBSD's device for asking a guest to shut down, reboot, or read its clock.

A legacy virtio device without queues: a register block in one I/O BAR, whatever the guest. The host
posts a command and interrupts; the driver reads it, writes it back as an acknowledgement, and acts.
The VM must be ended if the guest does not acknowledge within 3 s, or still runs 120 s after that.

Locks: `lock`, taken by the bus and by every public method; the interrupt pin is set under it.

Source: OpenBSD vmd/virtio.c, sys/dev/pv/vmmci.c; virtio 1.2 §4.1.4.8 (legacy interface)
"""

import struct
import threading
from collections.abc import Callable
from enum import IntEnum
from typing import Annotated, Literal, NamedTuple

from vmm_kvm.bits import all_ones
from vmm_kvm.clock import NANOSECONDS, Clock
from vmm_kvm.irq import IrqLine
from vmm_kvm.log import Log
from vmm_kvm.pci.config import BarKind, PciFunction
from vmm_kvm.pci.ids import CLASS_COMMUNICATIONS_OTHER, DEVICE_OPENBSD_VMMCI, VENDOR_OPENBSD
from vmm_kvm.state import U8, U16, U32, U64, PartState, Range
from vmm_kvm.virtio import abi

log = Log(__name__)

SIZE = 64
"""I/O ports."""
SUBSYSTEM = 0xFFFF
"""The device type, as OpenBSD's driver knows it."""
ACK_TIMEOUT_NS = 3 * NANOSECONDS
"""How long a guest may take to acknowledge, or to reboot after it said that it powers down."""
SHUTDOWN_TIMEOUT_NS = 120 * NANOSECONDS
"""How long it may take after it acknowledged."""


class Command(IntEnum):
    """The host's requests to the guest."""

    NONE = 0
    SHUTDOWN = 1
    REBOOT = 2
    SYNC_RTC = 3


_ENDINGS = (Command.SHUTDOWN, Command.REBOOT)


class Feature:
    """Feature bits."""

    TIME_SYNC = 1 << 0
    ACK = 1 << 1
    SYNC_RTC = 1 << 2


class Register:
    """Offsets of the legacy interface, without MSI-X."""

    DEVICE_FEATURES = 0
    GUEST_FEATURES = 4
    QUEUE_SELECT = 14
    STATUS = 18
    ISR = 19
    CONFIG = 20


class Config:
    """Offsets in the device's configuration, behind the registers."""

    COMMAND = 0
    SECONDS = 4
    MICROSECONDS = 12
    END = 20


_FEATURES = Feature.TIME_SYNC | Feature.ACK | Feature.SYNC_RTC
_CONFIG = struct.Struct("<IQQ")  # command, seconds and microseconds since 1970
_REGISTERS = struct.Struct("<IIIHHHBB")


class VmmciState(PartState):
    """Everything that a guest can observe of a Vmmci, and the host's pending request."""

    status: U8
    features: U32
    """That the guest accepted."""
    queue_select: U16
    isr: U8
    command: Command
    left_ns: Annotated[int, Range(0, SHUTDOWN_TIMEOUT_NS)] | None
    """Until the guest is to be ended; None while nothing is waited for."""
    time: tuple[U64, U64]
    """Seconds and microseconds, when the guest last asked."""
    version: Literal[1] = 1


class VmmciSpec(NamedTuple):
    """The device of a machine that asks an OpenBSD guest to shut down."""

    kind: Literal["vmmci"] = "vmmci"


class Vmmci:
    """A vmmci device; a BusDevice of 64 ports, behind BAR 0 of its PCI function.

    `on_expired` is called, on the clock's thread, when the guest has used up its time: with the
    command, or SHUTDOWN if the guest itself wanted to power off. The callee ends the VM.
    """

    def __init__(
        self, clock: Clock, intx: IrqLine, on_expired: Callable[[Command], None], *, pin: int = 1
    ) -> None:
        """Make a device whose interrupt `pin`, 1 to 4, leads to `intx`."""
        self.lock = threading.Lock()
        self._clock = clock
        self._on_expired = on_expired
        self._timer = clock.timer(self._expire)
        self._deadline_ns: int | None = None
        self._status = 0
        self._features = 0
        self._queue_select = 0
        self._isr = 0
        self._command = Command.NONE
        self._time = (0, 0)
        self.function = PciFunction(
            vendor_id=VENDOR_OPENBSD,
            device_id=DEVICE_OPENBSD_VMMCI,
            class_code=CLASS_COMMUNICATIONS_OTHER,
            subsystem_vendor_id=VENDOR_OPENBSD,
            subsystem_id=SUBSYSTEM,
            interrupt_pin=pin,
            intx=intx,
        )
        self.function.add_bar(0, BarKind.IO, SIZE, self)

    # The host's side; any thread

    def request(self, command: Command) -> bool:
        """Ask the guest to shut down or reboot, and start the timer.

        Returns False, and does nothing, if no driver listens: waiting is then useless. Repeating a
        request changes nothing.
        """
        with self.lock:
            if not self._status & abi.VIRTIO_CONFIG_S_DRIVER_OK:
                return False
            if command is not self._command:
                self._post(command)
                self._arm(ACK_TIMEOUT_NS)
            return True

    def sync_rtc(self) -> None:
        """Ask the guest to read its clock again, if it can and no other request is pending."""
        with self.lock:
            if self._features & Feature.SYNC_RTC and self._command is Command.NONE:
                self._post(Command.SYNC_RTC)

    def close(self) -> None:
        """Stop the timer."""
        with self.lock:
            self._disarm()

    def _post(self, command: Command) -> None:
        self._command = command
        self._isr = abi.VIRTIO_PCI_ISR_CONFIG
        self.function.set_intx(True)

    # Time

    def _arm(self, timeout_ns: int) -> None:
        self._deadline_ns = self._clock.monotonic_ns() + timeout_ns
        self._timer.arm(self._deadline_ns)

    def _disarm(self) -> None:
        self._deadline_ns = None
        self._timer.cancel()

    def _expire(self) -> None:
        with self.lock:
            # A deadline that moved while this was on its way has a timer of its own.
            if self._deadline_ns is None or self._clock.monotonic_ns() < self._deadline_ns:
                return
            self._deadline_ns = None
            command = self._command if self._command in _ENDINGS else Command.SHUTDOWN
        self._on_expired(command)

    # The guest's side; the bus holds the lock

    def read(self, offset: int, size: int) -> int:
        """Read registers or configuration; reading the ISR clears the interrupt."""
        end = offset + size
        if end > Register.CONFIG + Config.END:
            return all_ones(size)
        if offset < Register.CONFIG + Config.SECONDS + 4 and end > Register.CONFIG + Config.SECONDS:
            self._time = divmod(self._clock.realtime_ns() // 1000, 1_000_000)
        registers = _REGISTERS.pack(
            _FEATURES,
            self._features,
            0,  # a queue's address and size: there is none
            0,
            self._queue_select,
            0,
            self._status,
            self._isr,
        )
        image = registers + _CONFIG.pack(self._command, *self._time)
        if offset <= Register.ISR < end:
            self._isr = 0
            self.function.set_intx(False)
        return int.from_bytes(image[offset:end], "little")

    def write(self, offset: int, size: int, value: int) -> None:
        """Write a register, in its own width, or answer to a command."""
        match offset, size:
            case Register.GUEST_FEATURES, 4:
                self._features = value & _FEATURES
            case Register.QUEUE_SELECT, 2:
                self._queue_select = value & 0xFFFF
            case Register.STATUS, 1:
                self._status = value & 0xFF
                if not self._status:
                    self._forget_driver()
            case Register.CONFIG, 4:
                self._answer(value)
            case _:
                pass

    def _forget_driver(self) -> None:
        self._status = self._features = self._queue_select = self._isr = 0
        self.function.set_intx(False)

    def _answer(self, value: int) -> None:
        """Take an acknowledgement, or the guest's word that it powers down."""
        match value:
            case Command.NONE:
                pass
            case Command.SHUTDOWN if self._command not in _ENDINGS:
                # A halted guest would wait for a key; one that reboots is gone before.
                self._arm(ACK_TIMEOUT_NS)
            case Command.SHUTDOWN | Command.REBOOT:
                if value == self._command and self._deadline_ns is not None:
                    self._arm(SHUTDOWN_TIMEOUT_NS)
            case Command.SYNC_RTC:
                if self._command is Command.SYNC_RTC:
                    self._command = Command.NONE
            case _:
                log.debug("vmmci: illegal request %d", value)

    # Snapshots

    def reset(self) -> None:
        """Return to the state at power-on; nothing is waited for."""
        with self.lock:
            self._disarm()
            self._forget_driver()
            self._command = Command.NONE
            self._time = (0, 0)

    def save(self) -> VmmciState:
        """Return a snapshot."""
        with self.lock:
            deadline_ns = self._deadline_ns
            return VmmciState(
                status=self._status,
                features=self._features,
                queue_select=self._queue_select,
                isr=self._isr,
                command=self._command,
                left_ns=None
                if deadline_ns is None
                else max(0, deadline_ns - self._clock.monotonic_ns()),
                time=self._time,
            )

    def restore(self, state: VmmciState) -> None:
        """Continue from a snapshot; the PCI function has one of its own."""
        with self.lock:
            self._status = state.status
            self._features = state.features & _FEATURES
            self._queue_select = state.queue_select
            self._isr = state.isr
            self._command = state.command
            self._time = state.time
            self._disarm()
            if state.left_ns is not None:
                self._arm(state.left_ns)
