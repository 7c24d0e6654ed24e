"""The real-time clock: time in all its formats, interrupts without drift, and sleep when idle."""

from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.fakes import REALTIME_NS, FakeClock, Operation, RecordingIrqLine, exercise
from vmm_kvm.bits import GIB, KIB, MIB
from vmm_kvm.clock import NANOSECONDS
from vmm_kvm.devices.mc146818 import Mc146818, Register, RegisterA, RegisterB, RegisterC
from vmm_kvm.errors import SpecError

MS = 1_000_000
RESET_DIVIDER = 0x70
RATE_1024_HZ = 0x26


class Rig:
    """A clock chip, its time source, and its interrupt line."""

    def __init__(self, memory_size: int = 256 * MIB, realtime_ns: int = REALTIME_NS) -> None:
        self.irq = RecordingIrqLine()
        self.clock = FakeClock(realtime_ns)
        self.rtc = Mc146818(self.irq, self.clock, memory_size=memory_size)

    def __getitem__(self, index: int) -> int:
        with self.rtc.lock:
            self.rtc.write(0, 1, index)
            return self.rtc.read(1, 1)

    def __setitem__(self, index: int, value: int) -> None:
        with self.rtc.lock:
            self.rtc.write(0, 1, index)
            self.rtc.write(1, 1, value)

    @property
    def time(self) -> tuple[int, ...]:
        """Century, year, month, day, hours, minutes, seconds, day of the week; as registers."""
        return tuple(
            self[index]
            for index in (
                Register.CENTURY,
                Register.YEAR,
                Register.MONTH,
                Register.DAY_OF_MONTH,
                Register.HOURS,
                Register.MINUTES,
                Register.SECONDS,
                Register.DAY_OF_WEEK,
            )
        )

    def set_time(self, *values: int) -> None:
        """Set what `time` returns, as drivers do: between setting and clearing SET."""
        b = self[Register.B]
        self[Register.B] = b | RegisterB.SET
        for index, value in zip(
            (
                Register.CENTURY,
                Register.YEAR,
                Register.MONTH,
                Register.DAY_OF_MONTH,
                Register.HOURS,
                Register.MINUTES,
                Register.SECONDS,
                Register.DAY_OF_WEEK,
            ),
            values,
            strict=True,
        ):
            self[index] = value
        self[Register.B] = b

    def alarm(self, hours: int, minutes: int, seconds: int) -> None:
        """Set the alarm registers."""
        self[Register.HOURS_ALARM] = hours
        self[Register.MINUTES_ALARM] = minutes
        self[Register.SECONDS_ALARM] = seconds

    def enable(self, bits: int) -> None:
        """Enable interrupts, and clear pending flags."""
        self[Register.B] = RegisterB.H24 | bits
        _ = self[Register.C]


@pytest.fixture
def rig() -> Rig:
    """A clock chip at 2023-11-14 22:13:20 UTC, a Tuesday."""
    return Rig()


# Time


def test_power_on_time_is_the_hosts(rig: Rig) -> None:
    """At power-on the clock shows the host's UTC, in BCD and 24 hours; Tuesday is day 3."""
    assert rig[Register.B] == RegisterB.H24
    assert rig.time == (0x20, 0x23, 0x11, 0x14, 0x22, 0x13, 0x20, 3)


@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        (RegisterB.H24, (0x20, 0x23, 0x11, 0x14, 0x22, 0x13, 0x20, 3)),
        (RegisterB.H24 | RegisterB.DM, (20, 23, 11, 14, 22, 13, 20, 3)),
        (0, (0x20, 0x23, 0x11, 0x14, 0x90, 0x13, 0x20, 3)),
        (RegisterB.DM, (20, 23, 11, 14, 0x8A, 13, 20, 3)),
    ],
)
def test_formats(rig: Rig, mode: int, expected: tuple[int, ...]) -> None:
    """Times are BCD or binary, in 24 hours or 12 with the PM bit, as register B says."""
    rig[Register.B] = mode
    assert expected == rig.time


@pytest.mark.parametrize(
    ("hour", "register"),
    [(0, 0x12), (1, 0x01), (11, 0x11), (12, 0x92), (13, 0x81), (23, 0x91)],
)
def test_twelve_hour_mode(hour: int, register: int) -> None:
    """Midnight and noon are 12, and afternoon has the PM bit, in reads and writes."""
    midnight = datetime(2024, 2, 29, tzinfo=UTC)
    rig = Rig(realtime_ns=int((midnight + timedelta(hours=hour)).timestamp()) * NANOSECONDS)
    rig[Register.B] = 0
    assert register == rig[Register.HOURS]
    rig[Register.HOURS] = 0x05
    rig[Register.HOURS] = register
    rig[Register.B] = RegisterB.H24 | RegisterB.DM
    assert hour == rig[Register.HOURS]


def test_time_passes(rig: Rig) -> None:
    """Seconds carry into minutes, hours, days, months, years."""
    rig.set_time(0x20, 0x23, 0x12, 0x31, 0x23, 0x59, 0x59, 1)
    rig.clock.advance(NANOSECONDS)
    assert rig.time == (0x20, 0x24, 0x01, 0x01, 0x00, 0x00, 0x00, 2)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ((0x20, 0x24, 0x02, 0x28), (0x20, 0x24, 0x02, 0x29)),
        ((0x20, 0x23, 0x02, 0x28), (0x20, 0x23, 0x03, 0x01)),
        ((0x21, 0x00, 0x02, 0x28), (0x21, 0x00, 0x03, 0x01)),
        ((0x20, 0x00, 0x02, 0x28), (0x20, 0x00, 0x02, 0x29)),
        ((0x19, 0x99, 0x12, 0x31), (0x20, 0x00, 0x01, 0x01)),
    ],
)
def test_calendar(rig: Rig, before: tuple[int, ...], after: tuple[int, ...]) -> None:
    """The calendar knows leap years, also of centuries."""
    rig.set_time(*before, 0x23, 0x59, 0x59, 7)
    rig.clock.advance(NANOSECONDS)
    assert (*after, 0, 0, 0, 1) == rig.time


@given(st.datetimes(datetime(1, 1, 1), datetime(9999, 12, 30)))  # noqa: DTZ001 - UTC is meant
def test_any_date_is_kept(when: datetime) -> None:
    """A date that the guest sets reads back, and a day later the next date."""
    rig = Rig()
    rig[Register.B] = RegisterB.H24 | RegisterB.DM
    for expected in (when, when + timedelta(days=1)):
        registers = (
            *divmod(expected.year, 100),
            expected.month,
            expected.day,
            expected.hour,
            expected.minute,
            expected.second,
            expected.isoweekday() % 7 + 1,
        )
        if expected is when:
            rig.set_time(*registers)
        assert registers == rig.time
        rig.clock.advance(86_400 * NANOSECONDS)


def test_guest_time_is_an_offset(rig: Rig) -> None:
    """A time set by the guest keeps its distance from the host's, even when that is stepped."""
    rig.set_time(0x20, 0x30, 0x01, 0x01, 0x00, 0x00, 0x00, 3)
    rig.clock.step_realtime(3_600 * NANOSECONDS)
    assert rig.time == (0x20, 0x30, 0x01, 0x01, 0x01, 0x00, 0x00, 3)


def test_writing_a_running_clock(rig: Rig) -> None:
    """Without SET a register can be written too; the others continue."""
    rig[Register.MINUTES] = 0x59
    rig.clock.advance(41 * NANOSECONDS)
    assert rig.time == (0x20, 0x23, 0x11, 0x14, 0x23, 0x00, 0x01, 3)


def test_day_of_week_is_the_guests(rig: Rig) -> None:
    """The day of the week counts on from the guest's value, whatever the date is."""
    rig[Register.DAY_OF_WEEK] = 7
    assert rig[Register.DAY_OF_WEEK] == 7
    rig.clock.advance(86_400 * NANOSECONDS)
    assert rig[Register.DAY_OF_WEEK] == 1


def test_set_holds_the_registers(rig: Rig) -> None:
    """While SET is set the registers hold their values, valid or not, and do not advance."""
    rig[Register.B] = RegisterB.H24 | RegisterB.SET
    rig[Register.SECONDS] = 0xFF
    rig.clock.advance(5 * NANOSECONDS)
    assert rig.time == (0x20, 0x23, 0x11, 0x14, 0x22, 0x13, 0xFF, 3)


def test_set_keeps_the_phase(rig: Rig) -> None:
    """Clearing SET lets the clock run on in step with the divider."""
    rig.clock.advance(300 * MS)
    rig.set_time(0x20, 0x30, 0x01, 0x01, 0x00, 0x00, 0x00, 3)
    rig.clock.advance(699 * MS)
    assert rig[Register.SECONDS] == 0
    rig.clock.advance(1 * MS)
    assert rig[Register.SECONDS] == 1


def test_divider_reset_sets_the_phase(rig: Rig) -> None:
    """After a divider reset the first update comes half a second later, as Linux relies on."""
    rig.clock.advance(300 * MS)
    rig[Register.B] = RegisterB.H24 | RegisterB.SET
    rig[Register.A] = RESET_DIVIDER
    rig[Register.SECONDS] = 0x30
    rig[Register.B] = RegisterB.H24
    rig.clock.advance(7 * NANOSECONDS)
    assert rig[Register.SECONDS] == 0x30
    rig[Register.A] = RATE_1024_HZ
    rig.clock.advance(499 * MS)
    assert rig[Register.SECONDS] == 0x30
    rig.clock.advance(1 * MS)
    assert rig[Register.SECONDS] == 0x31


def test_uip_warns_of_updates(rig: Rig) -> None:
    """UIP is set for the last 244 µs before an update, never while updates are held."""
    samples = []
    for ns in (0, NANOSECONDS - 244_001, 1, 243_999, 1):
        rig.clock.advance(ns)
        samples.append(bool(rig[Register.A] & RegisterA.UIP))
    assert samples == [False, False, True, True, False]
    rig[Register.B] = RegisterB.H24 | RegisterB.SET
    rig.clock.advance(NANOSECONDS - 1)
    assert not rig[Register.A] & RegisterA.UIP


# Registers


def test_register_d(rig: Rig) -> None:
    """The battery is good; C and D are read-only."""
    rig[Register.D] = 0
    rig[Register.C] = 0xFF
    assert rig[Register.D] == 0x80
    assert rig[Register.C] == 0


def test_register_a_keeps_rate_and_divider(rig: Rig) -> None:
    """All bits of A except UIP can be written."""
    rig[Register.A] = 0xAF
    assert rig[Register.A] == 0x2F


def test_nmi_bit_is_ignored(rig: Rig) -> None:
    """Bit 7 of the index masks NMIs on a PC; it does not select anything."""
    assert rig[0x80 | Register.D] == 0x80
    rig[0x80 | 0x40] = 0x12
    assert rig[0x40] == 0x12


def test_ports(rig: Rig) -> None:
    """The index is write-only; a two-byte write sets index and data."""
    with rig.rtc.lock:
        rig.rtc.write(0, 2, 0xA5_41)
        assert rig.rtc.read(0, 1) == 0xFF
        assert rig.rtc.read(1, 1) == 0xA5
        assert rig.rtc.read(0, 2) == 0xA5FF


def test_memory_is_kept(rig: Rig) -> None:
    """Every byte that is no register is memory, and survives a reset."""
    indices = [i for i in range(0x0E, 0x80) if i != Register.CENTURY]
    for index in indices:
        rig[index] = index ^ 0xFF
    rig.rtc.reset()
    assert [index ^ 0xFF for index in indices] == [rig[index] for index in indices]


@pytest.mark.parametrize(
    ("size", "extended", "above_16m", "above_4g"),
    [
        (MIB, 0, 0, 0),
        (8 * MIB, 7 * 1024, 0, 0),
        (256 * MIB, 0xFFFF, 240 * 16, 0),
        (3 * GIB, 0xFFFF, (3 * GIB - 16 * MIB) // (64 * KIB), 0),
        (5 * GIB, 0xFFFF, (3 * GIB - 16 * MIB) // (64 * KIB), 2 * GIB // (64 * KIB)),
        (128 * GIB, 0xFFFF, (3 * GIB - 16 * MIB) // (64 * KIB), 125 * GIB // (64 * KIB)),
    ],
)
def test_memory_sizes(size: int, extended: int, above_16m: int, above_4g: int) -> None:
    """Firmware finds the memory sizes at the places of SeaBIOS and OpenBSD's vmd."""
    rig = Rig(size)
    assert rig[0x15] | rig[0x16] << 8 == 640
    assert extended == rig[0x17] | rig[0x18] << 8
    assert extended == rig[0x30] | rig[0x31] << 8
    assert above_16m == rig[0x34] | rig[0x35] << 8
    assert above_4g == rig[0x5B] | rig[0x5C] << 8 | rig[0x5D] << 16
    assert rig[0x5F] == 0


def test_extra_vcpus() -> None:
    """Register 0x5f has the number of vCPUs besides the first."""
    rtc = Mc146818(RecordingIrqLine(), FakeClock(), memory_size=MIB, vcpu_count=4)
    with rtc.lock:
        rtc.write(0, 1, 0x5F)
        assert rtc.read(1, 1) == 3


@pytest.mark.parametrize(("size", "vcpus"), [(MIB - 1, 1), (MIB, 0), (MIB, 257)])
def test_impossible_machines(size: int, vcpus: int) -> None:
    """Sizes that do not fit their bytes are refused."""
    with pytest.raises(SpecError):
        Mc146818(RecordingIrqLine(), FakeClock(), memory_size=size, vcpu_count=vcpus)


# Interrupts


def test_idle_clock_wakes_nobody(rig: Rig) -> None:
    """Without an enabled interrupt no timer is armed, whatever accesses there are."""
    rig[Register.A] = RATE_1024_HZ
    rig.alarm(0xC0, 0xC0, 0xC0)
    rig.clock.advance(10 * NANOSECONDS)
    assert rig.time[6] == 0x30
    assert rig[Register.C] == RegisterC.PF | RegisterC.UF | RegisterC.AF
    assert rig.clock.next_deadline_ns is None
    assert rig.irq.levels == []


def test_flags_come_without_enables(rig: Rig) -> None:
    """Flags are set whether or not they interrupt; reading C clears them; IRQF needs an enable."""
    rig.clock.advance(NANOSECONDS)
    assert rig[Register.C] == RegisterC.PF | RegisterC.UF
    assert rig[Register.C] == 0


def test_update_ended_interrupt(rig: Rig) -> None:
    """UIE interrupts at each full second, once, until C is read."""
    rig.clock.advance(300 * MS)
    rig.enable(RegisterB.UIE)
    rig.clock.advance(699 * MS)
    assert rig.irq.levels == []
    rig.clock.advance(1 * MS)
    assert rig.irq.levels == [True]
    assert rig[Register.C] & (RegisterC.IRQF | RegisterC.UF) == RegisterC.IRQF | RegisterC.UF
    assert rig.irq.levels == [True, False]
    rig.clock.advance(NANOSECONDS)
    assert rig.irq.rises == 2


def test_unread_interrupts_coalesce(rig: Rig) -> None:
    """Until C is read no timer is armed, and one read acknowledges all passed interrupts."""
    rig.enable(RegisterB.UIE | RegisterB.PIE)
    rig.clock.advance(5 * NANOSECONDS)
    assert rig.clock.fired == 1
    assert rig.clock.next_deadline_ns is None
    assert rig[Register.C] == RegisterC.IRQF | RegisterC.PF | RegisterC.UF
    assert rig[Register.C] == 0
    assert rig.irq.rises == 1


def test_set_disables_update_interrupts(rig: Rig) -> None:
    """Setting SET clears UIE."""
    rig.enable(RegisterB.UIE)
    rig[Register.B] = RegisterB.H24 | RegisterB.UIE | RegisterB.SET
    assert rig[Register.B] == RegisterB.H24 | RegisterB.SET
    rig.clock.advance(5 * NANOSECONDS)
    assert rig.irq.levels == []


@pytest.mark.parametrize(
    ("a", "hertz"),
    [
        (0x21, 256),
        (0x22, 128),
        (0x23, 8192),
        (0x26, 1024),
        (0x2F, 2),
        (0x01, 32768),
        (0x12, 16384),
        (0x16, 1024),
    ],
)
def test_periodic_rates(rig: Rig, a: int, hertz: int) -> None:
    """Rates follow MC146818 table 5 for both kinds of oscillator; ten seconds have no drift."""
    rig[Register.A] = a
    rig.enable(RegisterB.PIE)
    count = 0
    start_ns = rig.clock.monotonic_ns()
    while True:
        deadline_ns = rig.clock.next_deadline_ns
        assert deadline_ns is not None
        if deadline_ns > start_ns + NANOSECONDS:
            break
        rig.clock.advance(deadline_ns - rig.clock.monotonic_ns())
        assert rig[Register.C] & RegisterC.PF
        count += 1
    assert hertz == count
    assert rig.irq.rises == count


def test_periodic_interrupt_does_not_drift(rig: Rig) -> None:
    """A guest that reads C late is late for one period only; the next ones keep the grid."""
    rig[Register.A] = 0x2F  # 2 Hz
    rig.enable(RegisterB.PIE)
    for _ in range(20):
        rig.clock.advance(500 * MS)
        assert rig.irq.level
        rig.clock.advance(123 * MS)
        _ = rig[Register.C]
        rig.clock.advance(377 * MS)
        assert rig.irq.level
        _ = rig[Register.C]
    assert rig.irq.rises == 40


@pytest.mark.parametrize("a", [0x20, 0x70, 0x60, 0x36])
def test_no_periodic_interrupt(rig: Rig, a: int) -> None:
    """Rate 0, or a divider in reset, yields no periodic interrupt."""
    rig[Register.A] = a
    rig.enable(RegisterB.PIE)
    rig.clock.advance(5 * NANOSECONDS)
    assert rig.irq.levels == []


def test_rate_change_takes_effect(rig: Rig) -> None:
    """A new rate counts from its own grid, without a tick for the change itself."""
    rig[Register.A] = 0x2F
    rig.enable(RegisterB.PIE)
    rig.clock.advance(400 * MS)
    rig[Register.A] = 0x2E  # 4 Hz
    assert rig.irq.levels == []
    rig.clock.advance(100 * MS)
    assert rig.irq.levels == [True]


@pytest.mark.parametrize(
    ("alarm", "seconds"),
    [
        ((0x22, 0x13, 0x21), 1),
        ((0x22, 0x14, 0x00), 40),
        ((0xFF, 0xFF, 0xFF), 1),
        ((0xC0, 0xC0, 0x19), 59),
        ((0xC0, 0x13, 0x00), 3_580),
        ((0x22, 0x13, 0x20), 86_400),
        ((0x00, 0x00, 0x00), 6_400),
        ((0x22, 0xFF, 0x20), 60),
    ],
)
def test_alarms(rig: Rig, alarm: tuple[int, int, int], seconds: int) -> None:
    """The alarm interrupts at the next matching second; values from 0xc0 up always match."""
    rig.alarm(*alarm)
    rig.enable(RegisterB.AIE)
    rig.clock.advance(seconds * NANOSECONDS - 1)
    assert rig.irq.levels == []
    rig.clock.advance(1)
    assert rig.irq.levels == [True]
    assert rig[Register.C] & (RegisterC.IRQF | RegisterC.AF) == RegisterC.IRQF | RegisterC.AF


@pytest.mark.parametrize(
    ("mode", "alarm"),
    [
        (RegisterB.H24 | RegisterB.DM, (22, 13, 25)),
        (RegisterB.DM, (0x8A, 13, 25)),
        (0, (0x90, 0x13, 0x25)),
    ],
)
def test_alarm_formats(rig: Rig, mode: int, alarm: tuple[int, int, int]) -> None:
    """Alarm registers have the format of the time registers."""
    rig[Register.B] = mode | RegisterB.AIE
    rig.alarm(*alarm)
    rig.clock.advance(5 * NANOSECONDS - 1)
    assert rig.irq.levels == []
    rig.clock.advance(1)
    assert rig.irq.levels == [True]


def test_impossible_alarm_never_comes(rig: Rig) -> None:
    """An alarm at an impossible time arms no timer."""
    rig.alarm(0x24, 0x00, 0x00)
    rig.enable(RegisterB.AIE)
    assert rig.clock.next_deadline_ns is None


def test_alarm_sees_a_step_of_real_time(rig: Rig) -> None:
    """If the host's clock jumps over the alarm, the alarm comes within a minute."""
    rig.alarm(0x23, 0x00, 0x00)
    rig.enable(RegisterB.AIE)
    rig.clock.step_realtime(3_600 * NANOSECONDS)
    rig.clock.advance(60 * NANOSECONDS)
    assert rig.irq.levels == [True]


def test_setting_time_does_not_ring_passed_alarms(rig: Rig) -> None:
    """Setting the time past the alarm is no match; the alarm comes at the next one."""
    rig.alarm(0x23, 0x00, 0x00)
    rig.enable(RegisterB.AIE)
    rig.set_time(0x20, 0x23, 0x11, 0x15, 0x10, 0x00, 0x00, 4)
    assert rig.irq.levels == []
    rig.clock.advance(13 * 3_600 * NANOSECONDS)
    assert rig.irq.levels == [True]


def test_enabling_a_flag_that_is_set(rig: Rig) -> None:
    """Enabling an interrupt whose flag is already set interrupts at once."""
    rig.clock.advance(NANOSECONDS)
    rig[Register.B] = RegisterB.H24 | RegisterB.UIE
    assert rig.irq.levels == [True]
    rig[Register.B] = RegisterB.H24
    assert rig.irq.levels == [True, False]


# Reset and snapshots


def test_reset(rig: Rig) -> None:
    """A reset disables and clears interrupts; the time continues."""
    rig.enable(RegisterB.UIE | RegisterB.PIE | RegisterB.AIE | RegisterB.SQWE)
    rig.clock.advance(NANOSECONDS)
    rig.rtc.reset()
    assert not rig.irq.level
    assert rig[Register.B] == RegisterB.H24
    assert rig[Register.C] == 0
    assert rig.clock.next_deadline_ns is None
    assert rig.time == (0x20, 0x23, 0x11, 0x14, 0x22, 0x13, 0x21, 3)


def test_snapshot(rig: Rig) -> None:
    """Another clock continues from a snapshot: time, phase, flags and interrupts."""
    rig[Register.A] = 0x2F
    rig.set_time(0x20, 0x30, 0x01, 0x01, 0x12, 0x00, 0x00, 5)
    rig.enable(RegisterB.PIE)
    rig.clock.advance(400 * MS)
    other = Rig(realtime_ns=rig.clock.realtime_ns())
    other.clock.advance(77 * MS)
    other.clock.step_realtime(-77 * MS)
    other.rtc.restore(rig.rtc.save())
    assert other.rtc.save() == rig.rtc.save()
    assert other.time == rig.time
    other.clock.advance(99 * MS)
    assert other.irq.levels == []
    other.clock.advance(1 * MS)
    assert other.irq.levels == [True]


def test_snapshot_of_a_pending_interrupt(rig: Rig) -> None:
    """An interrupt that was not served yet is asserted again."""
    rig.enable(RegisterB.UIE)
    rig.clock.advance(NANOSECONDS)
    other = Rig(realtime_ns=rig.clock.realtime_ns())
    other.rtc.restore(rig.rtc.save())
    assert other.irq.level


# Hostile guests


@given(
    st.lists(
        st.tuples(
            st.tuples(
                st.booleans(),
                st.integers(0, 1),
                st.sampled_from((1, 2, 4, 8)),
                st.one_of(st.integers(0, 0x33), st.integers(0, (1 << 64) - 1)),
            ),
            st.integers(0, 3 * NANOSECONDS),
            st.integers(-NANOSECONDS, NANOSECONDS),
        ),
        max_size=60,
    )
)
def test_any_access_is_survived(steps: list[tuple[Operation, int, int]]) -> None:
    """Accesses at any moment, with any steps of time, raise nothing, and never spin."""
    rig = Rig()
    for operation, passed_ns, stepped_ns in steps:
        exercise(rig.rtc, [operation])
        rig.clock.advance(passed_ns)
        rig.clock.step_realtime(stepped_ns)
    assert len(rig.time) == 8
    assert rig.rtc.save().selected < 0x80
