"""The MC146818 real-time clock and its battery-backed memory.

Guest time is the host's real time plus an offset that changes when the guest sets its clock.
Nothing ticks: time registers, interrupt flags and UIP are computed when they are read, and a host
timer runs only while an enabled interrupt is still to come. The periodic rate counts from the last
divider reset on the monotonic clock, so it does not drift; periods that pass before the guest reads
register C coalesce.

Left out: daylight saving (register B bit 0 is stored), the square-wave output, and oscillators of
other frequencies than the divider setting says.
"""

import threading
from typing import Annotated, Literal

from vmm_kvm.arch.x86.layout import PCI_HOLE_END, ram_ranges
from vmm_kvm.bits import KIB, MIB, all_ones
from vmm_kvm.clock import NANOSECONDS, Clock
from vmm_kvm.errors import SpecError
from vmm_kvm.irq import IrqLine
from vmm_kvm.state import U8, Length, PartState, Range

SIZE = 2
"""I/O ports: index and data."""
NVRAM_SIZE = 128


class Register:
    """Indices (MC146818 figure 11; the century where the ACPI FADT says)."""

    SECONDS = 0x00
    SECONDS_ALARM = 0x01
    MINUTES = 0x02
    MINUTES_ALARM = 0x03
    HOURS = 0x04
    HOURS_ALARM = 0x05
    DAY_OF_WEEK = 0x06
    DAY_OF_MONTH = 0x07
    MONTH = 0x08
    YEAR = 0x09
    A = 0x0A
    B = 0x0B
    C = 0x0C
    D = 0x0D
    CENTURY = 0x32


class RegisterA:
    """Register A; bits 4 to 6 are the divider DV, bits 0 to 3 the periodic rate RS."""

    UIP = 1 << 7


class RegisterB:
    """Register B."""

    DSE = 1 << 0
    H24 = 1 << 1
    DM = 1 << 2
    SQWE = 1 << 3
    UIE = 1 << 4
    AIE = 1 << 5
    PIE = 1 << 6
    SET = 1 << 7


class RegisterC:
    """Register C: flags, at the bits of their enables in B; reading clears them."""

    UF = 1 << 4
    AF = 1 << 5
    PF = 1 << 6
    IRQF = 1 << 7


VRT = 0x80
"""Register D: the battery is good."""
PM = 0x80
"""In an hours register of the 12-hour mode."""
OSCILLATOR_HZ = 32_768

_TIME = (
    Register.SECONDS,
    Register.MINUTES,
    Register.HOURS,
    Register.DAY_OF_WEEK,
    Register.DAY_OF_MONTH,
    Register.MONTH,
    Register.YEAR,
    Register.CENTURY,
)
_UIE, _AIE, _PIE = RegisterB.UIE, RegisterB.AIE, RegisterB.PIE
_UF, _AF, _PF, _IRQF = RegisterC.UF, RegisterC.AF, RegisterC.PF, RegisterC.IRQF
_FLAGS = _UF | _AF | _PF
_DONT_CARE = 0xC0  # an alarm byte with both bits matches every value
_DIVIDER_RUNS_MAX = 2  # DV 0 to 2 select an oscillator; higher values hold the divider in reset
_DIVIDER_32KHZ = 2
_RESET_A = 0x26  # 32.768 kHz, 1024 Hz: what firmware traditionally sets
_UPDATE_WARNING_NS = 244_000  # UIP is set this long before an update
# The first update comes half a second after the divider leaves reset.
_DIVIDER_PHASE_NS = NANOSECONDS // 2
_DAY_S = 86_400
_MINUTE_S = 60
_HOUR_S = 3_600
# A year can be up to 16665, which BCD cannot show: guest time may be that far from the host's.
_FAR_NS = 1 << 70
# Real time can be stepped while a timer for an alarm waits on the monotonic clock.
_LONGEST_WAIT_NS = 60 * NANOSECONDS

_EQUIPMENT = {0x15: 0x80, 0x16: 0x02}  # 640 KiB of conventional memory
_EXTENDED_KIB = (0x17, 0x30)  # two copies, low byte first; KiB above 1 MiB
_ABOVE_16M = 0x34  # 64 KiB units between 16 MiB and the PCI hole
_ABOVE_4G = 0x5B  # 64 KiB units above 4 GiB, three bytes
_EXTRA_CPUS = 0x5F


class Mc146818State(PartState):
    """Everything that a guest can observe of a Mc146818."""

    selected: Annotated[int, Range(0, NVRAM_SIZE - 1)]
    memory: Annotated[bytes, Length(NVRAM_SIZE, NVRAM_SIZE)]
    """All 128 bytes; those of the time are valid only while updates are held."""
    flags: U8
    """Register C without IRQF."""
    offset_ns: Annotated[int, Range(-_FAR_NS, _FAR_NS)]
    """Guest time minus the host's real time."""
    weekday_offset: Annotated[int, Range(0, 6)]
    """Days, 0 to 6, by which the guest's day of the week is ahead of the date's."""
    updated_s: Annotated[int, Range(-_FAR_NS // NANOSECONDS, _FAR_NS // NANOSECONDS)]
    """Guest time of the last update that is in the flags, seconds since 1970."""
    divider_ns: Annotated[int, Range(0, _FAR_NS)]
    """Since the divider left reset."""
    periods: Annotated[int, Range(0, _FAR_NS)]
    """Periodic ticks since then that are in the flags."""
    version: Literal[1] = 1


class Mc146818:
    """A real-time clock; a BusDevice of 2 ports.

    `irq` rises with IRQF and falls when the guest reads register C. `memory_size` (bytes of guest
    RAM) and `vcpu_count` are told to firmware through the bytes that SeaBIOS reads.

    Source: MC146818 data sheet; OpenBSD vmd/mc146818.c
    """

    def __init__(
        self, irq: IrqLine, clock: Clock, *, memory_size: int, vcpu_count: int = 1
    ) -> None:
        """Make a clock that shows the host's time in UTC, BCD, 24-hour mode.

        Raises:
            SpecError: the memory is smaller than 1 MiB, or there are not 1 to 256 vCPUs.
        """
        if memory_size < MIB or not 1 <= vcpu_count <= 256:
            raise SpecError(f"rtc: {memory_size} bytes of memory, {vcpu_count} vCPUs")
        self.lock = threading.Lock()
        self._irq = irq
        self._clock = clock
        self._index = 0
        self._memory = bytearray(NVRAM_SIZE)
        self._memory[Register.A] = _RESET_A
        self._memory[Register.B] = RegisterB.H24
        _describe_machine(self._memory, memory_size, vcpu_count)
        self._flags = 0
        self._is_irq_high = False
        self._offset_ns = 0
        self._weekday_offset = 0
        self._updated_s = self._now_ns() // NANOSECONDS
        self._divider_start_ns = clock.monotonic_ns()
        self._periods = 0
        self._timer = clock.timer(self._tick)

    # The guest's side; the bus holds the lock

    def read(self, offset: int, size: int) -> int:
        """Read the selected register at offset 1; the index port is write-only."""
        value = all_ones(size)
        shift = 8 * (1 - offset)
        if 0 <= shift < 8 * size:
            value = value & ~(0xFF << shift) | self._read_register() << shift
        return value

    def write(self, offset: int, size: int, value: int) -> None:
        """Select a register at offset 0 (bit 7, the NMI mask, is ignored), write it at 1."""
        if offset == 0:
            self._index = value & 0x7F
        shift = 8 * (1 - offset)
        if 0 <= shift < 8 * size:
            self._write_register(value >> shift & 0xFF)

    def _read_register(self) -> int:
        match self._index:
            case Register.A:
                return self._memory[Register.A] | (RegisterA.UIP if self._is_updating() else 0)
            case Register.C:
                return self._read_c()
            case Register.D:
                return VRT
            case index if index in _TIME and not self._is_held():
                return self._time()[_TIME.index(index)]
            case index:
                return self._memory[index]

    def _write_register(self, value: int) -> None:
        match self._index:
            case Register.A:
                self._write_a(value & ~RegisterA.UIP)
            case Register.B:
                self._write_b(value)
            case Register.C | Register.D:
                pass
            case Register.SECONDS_ALARM | Register.MINUTES_ALARM | Register.HOURS_ALARM as index:
                self._collect()
                self._memory[index] = value
                self._update()
            case index if index in _TIME and not self._is_held():
                self._collect()
                self._store_time()
                self._memory[index] = value
                self._load_time()
                self._update()
            case index:
                self._memory[index] = value

    def _write_a(self, value: int) -> None:
        self._collect()
        was_held, was_reset = self._is_held(), self._is_divider_reset()
        if not was_held:
            self._store_time()
        self._memory[Register.A] = value
        if was_reset and not self._is_divider_reset():
            self._divider_start_ns = self._clock.monotonic_ns()
            self._offset_ns += (_DIVIDER_PHASE_NS - self._now_ns()) % NANOSECONDS
        if was_held and not self._is_held():
            self._load_time()
        period = self._period()
        self._periods = self._divider_ticks() // period if period else 0
        self._update()

    def _write_b(self, value: int) -> None:
        self._collect()
        was_held = self._is_held()
        if not was_held:
            self._store_time()
        if value & RegisterB.SET:
            value &= ~_UIE
        self._memory[Register.B] = value
        if was_held and not self._is_held():
            self._load_time()
        self._update()

    def _read_c(self) -> int:
        self._collect()
        flags = self._flags
        if flags & self._memory[Register.B]:
            flags |= _IRQF
        self._flags = 0
        self._update()
        return flags

    # Time

    def _now_ns(self) -> int:
        return self._clock.realtime_ns() + self._offset_ns

    def _is_divider_reset(self) -> bool:
        return self._memory[Register.A] >> 4 & 7 > _DIVIDER_RUNS_MAX

    def _is_held(self) -> bool:
        """Tell whether updates are held, so that the bytes in `_memory` are the time."""
        return bool(self._memory[Register.B] & RegisterB.SET) or self._is_divider_reset()

    def _is_updating(self) -> bool:
        return (
            not self._is_held() and self._now_ns() % NANOSECONDS >= NANOSECONDS - _UPDATE_WARNING_NS
        )

    def _encode(self, value: int) -> int:
        if self._memory[Register.B] & RegisterB.DM:
            return value & 0xFF
        return (value // 10 % 10) << 4 | value % 10

    def _decode(self, byte: int) -> int:
        return byte if self._memory[Register.B] & RegisterB.DM else (byte >> 4) * 10 + (byte & 0xF)

    def _encode_hour(self, hour: int) -> int:
        if self._memory[Register.B] & RegisterB.H24:
            return self._encode(hour)
        return self._encode(hour % 12 or 12) | (PM if hour >= 12 else 0)

    def _decode_hour(self, byte: int) -> int:
        if self._memory[Register.B] & RegisterB.H24:
            return self._decode(byte)
        return self._decode(byte & ~PM) % 12 + (12 if byte & PM else 0)

    def _time(self) -> tuple[int, ...]:
        """Return the bytes of the running clock, in the order of `_TIME`."""
        days, second = divmod(self._now_ns() // NANOSECONDS, _DAY_S)
        year, month, day = _civil(days)
        return (
            self._encode(second % _MINUTE_S),
            self._encode(second // _MINUTE_S % 60),
            self._encode_hour(second // _HOUR_S),
            self._encode((_weekday(days) + self._weekday_offset) % 7 + 1),
            self._encode(day),
            self._encode(month),
            self._encode(year % 100),
            self._encode(year // 100),
        )

    def _store_time(self) -> None:
        for index, byte in zip(_TIME, self._time(), strict=True):
            self._memory[index] = byte

    def _load_time(self) -> None:
        """Let the clock run from the bytes in `_memory`; the phase within a second stays."""
        second, minute, hour, weekday, day, month, year, century = (
            self._memory[index] for index in _TIME
        )
        days = _days(
            self._decode(century) * 100 + self._decode(year),
            self._decode(month),
            self._decode(day),
        )
        self._weekday_offset = (self._decode(weekday) - 1 - _weekday(days)) % 7
        seconds = (
            days * _DAY_S
            + self._decode_hour(hour) * _HOUR_S
            + self._decode(minute) * _MINUTE_S
            + self._decode(second)
        )
        now_ns = self._now_ns()
        self._offset_ns += seconds * NANOSECONDS + now_ns % NANOSECONDS - now_ns
        self._updated_s = seconds

    def _next_alarm(self, after_s: int) -> int | None:
        """Return the first second later than `after_s` that matches the alarm, None if none."""
        hours = self._alarm(Register.HOURS_ALARM, [self._encode_hour(h) for h in range(24)])
        sixty = [self._encode(value) for value in range(60)]
        minutes = self._alarm(Register.MINUTES_ALARM, sixty)
        seconds = self._alarm(Register.SECONDS_ALARM, sixty)
        if not (hours and minutes and seconds):
            return None
        midnight, first = divmod(after_s + 1, _DAY_S)
        for hour in hours:
            if hour < first // _HOUR_S:
                continue
            for minute in minutes:
                if hour * 60 + minute < first // _MINUTE_S:
                    continue
                for second in seconds:
                    at = hour * _HOUR_S + minute * _MINUTE_S + second
                    if at >= first:
                        return midnight * _DAY_S + at
        return (midnight + 1) * _DAY_S + hours[0] * _HOUR_S + minutes[0] * _MINUTE_S + seconds[0]

    def _alarm(self, index: int, codes: list[int]) -> list[int]:
        byte = self._memory[index]
        if byte & _DONT_CARE == _DONT_CARE:
            return list(range(len(codes)))
        return [value for value, code in enumerate(codes) if code == byte]

    # Interrupts

    def _divider_ticks(self) -> int:
        """Return cycles of 32768 Hz since the divider left reset."""
        elapsed_ns = self._clock.monotonic_ns() - self._divider_start_ns
        return elapsed_ns * OSCILLATOR_HZ // NANOSECONDS

    def _period(self) -> int:
        """Return the periodic interval in cycles of 32768 Hz; 0 for none (MC146818 table 5)."""
        rate = self._memory[Register.A] & 0xF
        if rate == 0 or self._is_divider_reset():
            return 0
        if self._memory[Register.A] >> 4 == _DIVIDER_32KHZ and rate <= 2:
            rate += 7
        return 1 << (rate - 1)

    def _collect(self) -> None:
        """Set the flags of everything that happened since the last call."""
        period = self._period()
        if period:
            periods = self._divider_ticks() // period
            if periods != self._periods:
                self._periods = periods
                self._flags |= _PF
        if not self._is_held():
            now_s = self._now_ns() // NANOSECONDS
            if now_s != self._updated_s:
                self._flags |= _UF
                alarm_s = self._next_alarm(self._updated_s)
                if alarm_s is not None and alarm_s <= now_s:
                    self._flags |= _AF
                self._updated_s = now_s

    def _update(self) -> None:
        """Drive the line; while it is low, set a timer for the next interrupt."""
        enabled = self._memory[Register.B] & _FLAGS
        level = bool(self._flags & enabled)
        if level != self._is_irq_high:
            self._is_irq_high = level
            self._irq.set(level)
        deadline_ns = None if level else self._next_interrupt(enabled)
        if deadline_ns is None:
            self._timer.cancel()
        else:
            self._timer.arm(deadline_ns)

    def _next_interrupt(self, enabled: int) -> int | None:
        """Return when to look for an enabled interrupt again, on the monotonic clock."""
        deadlines = []
        period = self._period()
        if enabled & _PIE and period:
            ticks = (self._periods + 1) * period
            deadlines.append(self._divider_start_ns - (-ticks * NANOSECONDS // OSCILLATOR_HZ))
        if not self._is_held():
            next_s = [self._updated_s + 1] if enabled & _UIE else []
            alarm_s = self._next_alarm(self._updated_s) if enabled & _AIE else None
            if alarm_s is not None:
                next_s.append(alarm_s)
            if next_s:
                wait_ns = min(next_s) * NANOSECONDS - self._now_ns()
                deadlines.append(self._clock.monotonic_ns() + min(wait_ns, _LONGEST_WAIT_NS))
        return min(deadlines, default=None)

    # The outside; these take the lock

    def _tick(self) -> None:
        with self.lock:
            self._collect()
            self._update()

    def reset(self) -> None:
        """Act as at the reset pin: disable and clear interrupts; time and memory stay.

        Source: MC146818 data sheet, signal description of RESET
        """
        with self.lock:
            self._collect()
            self._index = 0
            self._memory[Register.B] &= ~(_PIE | _AIE | _UIE | RegisterB.SQWE)
            self._flags = 0
            self._update()

    def save(self) -> Mc146818State:
        """Return a snapshot, of what happened up to now; any thread."""
        with self.lock:
            self._collect()
            self._update()
            return Mc146818State(
                selected=self._index,
                memory=bytes(self._memory),
                flags=self._flags,
                offset_ns=self._offset_ns,
                weekday_offset=self._weekday_offset,
                updated_s=self._updated_s,
                divider_ns=self._clock.monotonic_ns() - self._divider_start_ns,
                periods=self._periods,
            )

    def restore(self, state: Mc146818State) -> None:
        """Continue from a snapshot; guest time keeps its distance from real time."""
        with self.lock:
            self._index = state.selected
            self._memory[:] = state.memory
            self._flags = state.flags & _FLAGS
            self._offset_ns = state.offset_ns
            self._weekday_offset = state.weekday_offset
            self._updated_s = state.updated_s
            self._divider_start_ns = self._clock.monotonic_ns() - state.divider_ns
            self._periods = state.periods
            self._collect()
            self._update()


def _describe_machine(memory: bytearray, size: int, vcpu_count: int) -> None:
    """Fill in the sizes that firmware reads (OpenBSD vmd/mc146818.c; SeaBIOS src/hw/rtc.h)."""
    ranges = ram_ranges(size)
    low = ranges[0][1]
    high = sum(length for gpa, length in ranges if gpa >= PCI_HOLE_END)
    for index, byte in _EQUIPMENT.items():
        memory[index] = byte
    extended = min((low - MIB) // KIB, 0xFFFF).to_bytes(2, "little")
    for index in _EXTENDED_KIB:
        memory[index : index + 2] = extended
    above_16m = max(low - 16 * MIB, 0) // (64 * KIB)
    memory[_ABOVE_16M : _ABOVE_16M + 2] = min(above_16m, 0xFFFF).to_bytes(2, "little")
    above_4g = min(high // (64 * KIB), 0xFF_FFFF)
    memory[_ABOVE_4G : _ABOVE_4G + 3] = above_4g.to_bytes(3, "little")
    memory[_EXTRA_CPUS] = vcpu_count - 1


def _weekday(days: int) -> int:
    """Return the day of the week, 0 for Sunday, of a day counted from 1970-01-01."""
    return (days + 4) % 7


def _days(year: int, month: int, day: int) -> int:
    """Return days from 1970-01-01; months and days beyond the calendar's count on.

    Years are counted from March, so that the leap day is the last of its year.
    """
    years, months = divmod(month - 3, 12)
    year += years
    return (
        365 * year + year // 4 - year // 100 + year // 400 + (153 * months + 2) // 5 + day - 719_469
    )


def _civil(days: int) -> tuple[int, int, int]:
    """Return year, month (1 to 12) and day of a day counted from 1970-01-01."""
    # An estimate that is at most one too high, then count down.
    year = days * 400 // 146_097 + 1971
    while _days(year, 1, 1) > days:
        year -= 1
    month = 12
    while _days(year, month, 1) > days:
        month -= 1
    return year, month, days - _days(year, month, 1) + 1
