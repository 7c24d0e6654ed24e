"""Watchdog of Intel's 6300ESB: a guest that hangs is reset.

Two timers run one after the other. The driver loads both and starts them, and has to reload them
before the second one ends; else the machine is reset. Linux has a driver, i6300esb, as QEMU has
this device. The interrupt after the first timer goes to nobody, as in QEMU: drivers switch it off.

The timers stand still while the machine does, for any reason: the guest cannot reload them then.
After the reset, a register says that they have ended, until the driver clears that: the watchdog of
the next machine is made with it.

Locks: `lock`, taken by the bus and by every public method, also with the host bridge's lock held.

Source: Intel 6300ESB I/O Controller Hub Datasheet (300641) §16; Linux drivers/watchdog/i6300esb.c
"""

import threading
from collections.abc import Callable
from enum import IntEnum, IntFlag
from typing import Annotated, Literal, NamedTuple

from vmm_kvm.bits import all_ones
from vmm_kvm.clock import NANOSECONDS, Clock
from vmm_kvm.log import Log
from vmm_kvm.pci.config import BarKind, PciFunction
from vmm_kvm.pci.ids import CLASS_SYSTEM_OTHER, VENDOR_INTEL
from vmm_kvm.state import PartState, Range

log = Log(__name__)

DEVICE_ID = 0x25AB
SIZE = 16
"""Bytes of registers in memory."""
PRELOAD_MAX = 0xFFFFF
"""Of a timer, in ticks."""
PAUSED = "paused"
"""Why the timers stand still after `restore`."""
CONFIG, CONTROL = 0x60, 0x68
"""Offsets of its registers in configuration space."""

_PCI_HZ = 33_000_000
_TICK_SHIFT, _SHORT_TICK_SHIFT = 15, 5  # a tick in cycles of the PCI bus, as a power of two
_UNLOCK = (0x80, 0x86)
LEFT_MAX_NS = (PRELOAD_MAX << _TICK_SHIFT) * NANOSECONDS // _PCI_HZ
"""The longest that a timer can run."""
_LEFT_MIN_NS = NANOSECONDS // 1000  # a guest may not keep our event loop busy


class Config(IntFlag):
    """The register at `CONFIG`, 16 bits."""

    INTERRUPT_TYPE = 0b11
    SHORT_TICKS = 1 << 2
    NO_RESET = 1 << 5


class Control(IntFlag):
    """The register at `CONTROL`, 8 bits."""

    LOCKED = 1 << 0
    """It cannot be changed before the next reset."""
    ENABLED = 1 << 1
    FREE_RUNNING = 1 << 2
    """The timers begin again after the second one."""


class Register(IntEnum):
    """Offsets in memory."""

    TIMER1 = 0x0
    TIMER2 = 0x4
    INTERRUPT_STATUS = 0x8
    RELOAD = 0xC


class Reload(IntFlag):
    """The register `RELOAD`, 16 bits."""

    RELOAD = 1 << 8
    TIMEOUT = 1 << 9
    """A second timer has ended, without a reset; cleared by a one."""


class WatchdogSpec(NamedTuple):
    """A watchdog of a machine."""

    kind: Literal["watchdog"] = "watchdog"
    has_timed_out: bool = False
    """It has reset the machine before this one, and no driver has looked yet."""


class WatchdogState(PartState):
    """Everything that a guest can observe; `config` and `control` as the registers have them."""

    preloads: tuple[Annotated[int, Range(0, PRELOAD_MAX)], Annotated[int, Range(0, PRELOAD_MAX)]]
    """Of both timers, in ticks."""
    config: Annotated[int, Range(0, sum(map(int, Config)))]
    control: Annotated[int, Range(0, sum(map(int, Control)))]
    unlocked: Annotated[int, Range(0, len(_UNLOCK))]
    """Steps towards a change of a register that have been taken."""
    has_timed_out: bool
    stage: Annotated[int, Range(0, 1)]
    """The timer that runs."""
    left_ns: Annotated[int, Range(0, LEFT_MAX_NS)] | None
    """Until it ends; None while none runs."""
    version: Literal[1] = 1


class Watchdog:
    """A watchdog; a BusDevice of 16 bytes, behind BAR 0 of its PCI function.

    `on_bite` is called, on the clock's thread, when the guest has not reloaded in time.
    """

    def __init__(
        self, clock: Clock, on_bite: Callable[[], None], *, has_timed_out: bool = False
    ) -> None:
        """Make one that is not enabled; `has_timed_out` is from before a reset."""
        self.lock = threading.Lock()
        self._clock = clock
        self._on_bite = on_bite
        self._timer = clock.timer(self._expire)
        self._deadline_ns: int | None = None
        self._left_ns: int | None = None  # while the machine is paused
        self._still: set[str] = set()
        self._preloads = [PRELOAD_MAX, PRELOAD_MAX]
        self._config = Config(0)
        self._control = Control(0)
        self._unlocked = 0
        self._has_timed_out = has_timed_out
        self._stage = 0
        self.function = PciFunction(
            vendor_id=VENDOR_INTEL, device_id=DEVICE_ID, class_code=CLASS_SYSTEM_OTHER
        )
        self.function.add_bar(0, BarKind.MEMORY32, SIZE, self)
        self.function.add_registers(
            CONFIG,
            bytes(2),
            writable=sum(map(int, Config)).to_bytes(2, "little"),
            on_write=lambda _offset, _size: self._configure(),
        )
        self.function.add_registers(
            CONTROL,
            bytes(1),
            writable=sum(map(int, Control)).to_bytes(1, "little"),
            on_write=lambda _offset, _size: self._take_control(),
        )

    # Time

    def suspend(self, reason: str = PAUSED) -> None:
        """Stop the timers; again changes nothing."""
        with self.lock:
            if not self._still:
                left_ns = self._left()
                self._disarm()
                self._left_ns = left_ns
            self._still.add(reason)

    def resume(self, reason: str = PAUSED) -> None:
        """Let the timers continue, unless there is another reason; again changes nothing."""
        with self.lock:
            if reason not in self._still:
                return
            self._still.remove(reason)
            if not self._still and self._left_ns is not None:
                self._arm(self._left_ns)
                self._left_ns = None

    @property
    def has_timed_out(self) -> bool:
        """Whether it has ended, and no driver has cleared that; any thread."""
        return self._has_timed_out

    def close(self) -> None:
        """Stop the timers for good."""
        with self.lock:
            self._disarm()

    def _left(self) -> int | None:
        if self._still:
            return self._left_ns
        if self._deadline_ns is None:
            return None
        return min(max(0, self._deadline_ns - self._clock.monotonic_ns()), LEFT_MAX_NS)

    def _arm(self, left_ns: int) -> None:
        if self._still:  # a vCPU's last access on its way out of the guest
            self._left_ns = left_ns
            return
        self._deadline_ns = self._clock.monotonic_ns() + left_ns
        self._timer.arm(self._deadline_ns)

    def _disarm(self) -> None:
        self._deadline_ns = self._left_ns = None
        self._timer.cancel()

    def _begin(self, stage: int) -> None:
        """Start one of the timers, if the watchdog is enabled."""
        if not self._control & Control.ENABLED:
            return
        self._stage = stage
        shift = _SHORT_TICK_SHIFT if self._config & Config.SHORT_TICKS else _TICK_SHIFT
        left_ns = (self._preloads[stage] << shift) * NANOSECONDS // _PCI_HZ
        self._arm(max(left_ns, _LEFT_MIN_NS))

    def _expire(self) -> None:
        with self.lock:
            # A deadline that moved while this was on its way has a timer of its own.
            if self._deadline_ns is None or self._clock.monotonic_ns() < self._deadline_ns:
                return
            self._deadline_ns = None
            if self._stage == 0:
                self._begin(1)
                return
            self._has_timed_out = True
            bites = not self._config & Config.NO_RESET
            if not bites and self._control & Control.FREE_RUNNING:
                self._begin(0)
        if bites:
            log.warning("watchdog: the guest hangs, and is reset")
            self._on_bite()

    # The guest's side: configuration space, with the host bridge's lock held

    def _configure(self) -> None:
        with self.lock:
            self._config = Config(self.function.peek(CONFIG, 2))

    def _take_control(self) -> None:
        with self.lock:
            if self._control & Control.LOCKED:
                self.function.poke(CONTROL, 1, self._control)
                return
            before, self._control = self._control, Control(self.function.peek(CONTROL, 1))
            if not self._control & Control.ENABLED:
                self._disarm()
            elif not before & Control.ENABLED:
                self._begin(0)

    # Memory; the bus holds the lock

    def read(self, offset: int, size: int) -> int:
        """Read registers; those that cannot be read, and what lies between them, are 0."""
        if offset + size > SIZE:
            return all_ones(size)
        image = bytearray(SIZE)
        for at, value in zip((Register.TIMER1, Register.TIMER2), self._preloads, strict=True):
            image[at : at + 4] = value.to_bytes(4, "little")
        if self._has_timed_out:
            image[Register.RELOAD : Register.RELOAD + 2] = Reload.TIMEOUT.to_bytes(2, "little")
        return int.from_bytes(image[offset : offset + size], "little")

    def write(self, offset: int, size: int, value: int) -> None:
        """Take a step of unlocking, or change one register after both."""
        value &= all_ones(size)
        if self._unlocked < len(_UNLOCK):
            # The first value begins anew at any step.
            if offset == Register.RELOAD and value == _UNLOCK[self._unlocked]:
                self._unlocked += 1
            elif not (offset == Register.RELOAD and value == _UNLOCK[0]):
                self._unlocked = 0
            return
        if offset == Register.RELOAD and value == _UNLOCK[0]:
            self._unlocked = 1
            return
        self._unlocked = 0
        match offset:
            case Register.TIMER1 | Register.TIMER2 if size == 4:
                self._preloads[offset // 4] = value & PRELOAD_MAX
            case Register.RELOAD if size >= 2:
                if value & Reload.TIMEOUT:
                    self._has_timed_out = False
                if value & Reload.RELOAD:
                    self._begin(0)
            case _:
                pass

    # Snapshots

    def save(self) -> WatchdogState:
        """Return a snapshot."""
        with self.lock:
            return WatchdogState(
                preloads=(self._preloads[0], self._preloads[1]),
                config=int(self._config),
                control=int(self._control),
                unlocked=self._unlocked,
                has_timed_out=self._has_timed_out,
                stage=self._stage,
                left_ns=self._left(),
            )

    def restore(self, state: WatchdogState) -> None:
        """Continue from a snapshot once the machine resumes; the PCI function has its own."""
        with self.lock:
            self._disarm()
            self._preloads[:] = state.preloads
            self._config = Config(state.config)
            self._control = Control(state.control)
            self._unlocked = state.unlocked
            self._has_timed_out = state.has_timed_out
            self._stage = state.stage
            self._still.add(PAUSED)
            self._left_ns = state.left_ns
