"""ACPI fixed hardware: PM1 event and control registers, the power button, the PM timer.

The machine is ACPI-only: SCI_EN is always set, there is no SMI command port and no legacy mode.
The timer counts 32 bits (the FADT says TMR_VAL_EXT). Its carry is computed when a register is read;
a host timer runs only while the guest asked for the carry's interrupt. There is no sleep button and
no RTC wake-up: their bits can be set and cleared but never come by themselves.
"""

import threading
from collections.abc import Callable
from typing import Annotated, Literal

from vmm_kvm.bits import all_ones
from vmm_kvm.clock import NANOSECONDS, Clock
from vmm_kvm.irq import IrqLine
from vmm_kvm.state import U16, PartState, Range

SIZE = 12
"""I/O ports: PM1 event block 4, PM1 control block 4, PM timer 4."""
TIMER_HZ = 3_579_545
TIMER_BITS = 32


class Register:
    """Offsets; the ports of the three blocks are contiguous."""

    PM1_STS = 0
    PM1_EN = 2
    PM1_CNT = 4
    PM_TMR = 8


class Pm1Status:
    """PM1 status register (ACPI 6.5 §4.8.3.1.1); written ones clear."""

    TMR = 1 << 0
    BM = 1 << 4
    GBL = 1 << 5
    PWRBTN = 1 << 8
    SLPBTN = 1 << 9
    RTC = 1 << 10
    WAK = 1 << 15


class Pm1Enable:
    """PM1 enable register (ACPI 6.5 §4.8.3.1.2)."""

    TMR = 1 << 0
    GBL = 1 << 5
    PWRBTN = 1 << 8
    SLPBTN = 1 << 9
    RTC = 1 << 10


class Pm1Control:
    """PM1 control register (ACPI 6.5 §4.8.3.2.1); SLP_TYP is bits 10 to 12."""

    SCI_EN = 1 << 0
    BM_RLD = 1 << 1
    GBL_RLS = 1 << 2
    SLP_EN = 1 << 13


SLP_TYP_SHIFT = 10
SLP_TYP_MASK = 0b111

_TMR = Pm1Status.TMR
_STATUS_BITS = (
    Pm1Status.TMR
    | Pm1Status.BM
    | Pm1Status.GBL
    | Pm1Status.PWRBTN
    | Pm1Status.SLPBTN
    | Pm1Status.RTC
    | Pm1Status.WAK
)
_ENABLE_BITS = Pm1Enable.TMR | Pm1Enable.GBL | Pm1Enable.PWRBTN | Pm1Enable.SLPBTN | Pm1Enable.RTC
# GBL_RLS and SLP_EN are commands and read as zero; SCI_EN is read-only here.
_CONTROL_STORED = Pm1Control.BM_RLD | SLP_TYP_MASK << SLP_TYP_SHIFT
_CARRY_TICKS = 1 << (TIMER_BITS - 1)  # TMR_STS is set when the highest bit changes either way


class AcpiPmState(PartState):
    """Everything that a guest can observe of an AcpiPm."""

    status: U16
    enable: U16
    control: U16
    """Without the bits that are constant or commands."""
    elapsed_ns: Annotated[int, Range(0, 1 << 63)]
    """Since the timer stood at zero."""
    carries: Annotated[int, Range(0, 1 << 63)]
    """Changes of the timer's highest bit that TMR_STS has reported."""
    version: Literal[1] = 1


class AcpiPm:
    """ACPI fixed hardware; a BusDevice of 12 ports, at any access size.

    `sci` is a level-triggered line. `on_sleep` is given SLP_TYP, 0 to 7, when the guest sets
    SLP_EN, with the lock held, on a vCPU thread; it must not wait.

    Source: ACPI 6.5 §4.8
    """

    __slots__ = (
        "_carries",
        "_clock",
        "_control",
        "_enable",
        "_is_sci_high",
        "_on_sleep",
        "_sci",
        "_start_ns",
        "_status",
        "_timer",
        "lock",
    )

    def __init__(self, sci: IrqLine, clock: Clock, on_sleep: Callable[[int], None]) -> None:
        self.lock = threading.Lock()
        self._sci = sci
        self._clock = clock
        self._on_sleep = on_sleep
        self._is_sci_high = False
        self._status = self._enable = self._control = self._carries = 0
        self._start_ns = clock.monotonic_ns()
        self._timer = clock.timer(self._carry)

    # The guest's side; the bus holds the lock

    def read(self, offset: int, size: int) -> int:
        """Read any bytes of the registers; behind them nothing drives the bus."""
        if offset == Register.PM_TMR and size == 4:
            return self._ticks() & 0xFFFF_FFFF
        self._collect()
        image = (
            -1 << (8 * SIZE)
            | (self._ticks() & 0xFFFF_FFFF) << (8 * Register.PM_TMR)
            | (self._control | Pm1Control.SCI_EN) << (8 * Register.PM1_CNT)
            | self._enable << (8 * Register.PM1_EN)
            | self._status
        )
        return image >> (8 * offset) & all_ones(size)

    def write(self, offset: int, size: int, value: int) -> None:
        """Write any bytes of the registers; the bytes of one register take effect together."""
        data = (value & all_ones(size)) << (8 * offset)
        mask = all_ones(size) << (8 * offset)
        self._collect()
        self._status &= ~(data & _STATUS_BITS)
        enable_mask = mask >> (8 * Register.PM1_EN) & _ENABLE_BITS
        self._enable = self._enable & ~enable_mask | data >> (8 * Register.PM1_EN) & enable_mask
        control_mask = mask >> (8 * Register.PM1_CNT) & _CONTROL_STORED
        control = data >> (8 * Register.PM1_CNT)
        self._control = self._control & ~control_mask | control & control_mask
        self._update()
        if control & Pm1Control.SLP_EN:
            self._on_sleep(self._control >> SLP_TYP_SHIFT & SLP_TYP_MASK)

    def _ticks(self) -> int:
        return (self._clock.monotonic_ns() - self._start_ns) * TIMER_HZ // NANOSECONDS

    def _collect(self) -> None:
        """Note carries that happened since the last call."""
        carries = self._ticks() // _CARRY_TICKS
        if carries != self._carries:
            self._carries = carries
            self._status |= _TMR

    def _update(self) -> None:
        """Drive SCI, and let a host timer run if a carry is to interrupt."""
        level = bool(self._status & self._enable)
        if level != self._is_sci_high:
            self._is_sci_high = level
            self._sci.set(level)
        if self._enable & _TMR and not self._status & _TMR:
            ticks = (self._carries + 1) * _CARRY_TICKS
            self._timer.arm(self._start_ns - (-ticks * NANOSECONDS // TIMER_HZ))
        else:
            self._timer.cancel()

    # The outside; these take the lock

    def _carry(self) -> None:
        with self.lock:
            self._collect()
            self._update()

    def press_power_button(self) -> bool:
        """Set PWRBTN_STS; returns whether that interrupts the guest. Any thread."""
        with self.lock:
            self._status |= Pm1Status.PWRBTN
            self._update()
            return bool(self._enable & Pm1Enable.PWRBTN)

    def is_button_pressed(self) -> bool:
        """Tell whether the guest has yet to notice the power button. Any thread."""
        with self.lock:
            return bool(self._status & Pm1Status.PWRBTN)

    def wake(self) -> None:
        """Set WAK_STS: the machine returned from a sleeping state. Any thread."""
        with self.lock:
            self._status |= Pm1Status.WAK

    def reset(self) -> None:
        """Clear the registers; the timer starts from zero."""
        with self.lock:
            self._status = self._enable = self._control = self._carries = 0
            self._start_ns = self._clock.monotonic_ns()
            self._update()

    def save(self) -> AcpiPmState:
        """Return a snapshot, of what happened up to now; any thread."""
        with self.lock:
            self._collect()
            self._update()
            return AcpiPmState(
                status=self._status,
                enable=self._enable,
                control=self._control,
                elapsed_ns=self._clock.monotonic_ns() - self._start_ns,
                carries=self._carries,
            )

    def restore(self, state: AcpiPmState) -> None:
        """Continue from a snapshot; the timer continues from its value."""
        with self.lock:
            self._status = state.status & _STATUS_BITS
            self._enable = state.enable & _ENABLE_BITS
            self._control = state.control & _CONTROL_STORED
            self._start_ns = self._clock.monotonic_ns() - state.elapsed_ns
            self._carries = state.carries
            self._update()
