"""ACPI fixed hardware: sleep, the power button, the timer and its carry, at every access size."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.fakes import FakeClock, Operation, RecordingIrqLine, exercise
from vmm_kvm.clock import NANOSECONDS
from vmm_kvm.devices.acpi_pm import TIMER_HZ, AcpiPm, Pm1Control, Pm1Enable, Pm1Status, Register

CARRY_NS = -(-(1 << 31) * NANOSECONDS // TIMER_HZ)  # ten minutes
ENABLE_BITS = int(
    Pm1Enable.TMR | Pm1Enable.GBL | Pm1Enable.PWRBTN | Pm1Enable.SLPBTN | Pm1Enable.RTC
)


class Rig:
    """The registers, the SCI, time, and the sleep types that the guest has entered."""

    def __init__(self) -> None:
        self.sci = RecordingIrqLine()
        self.clock = FakeClock()
        self.sleeps: list[int] = []
        self.pm = AcpiPm(self.sci, self.clock, self.sleeps.append)

    def read(self, offset: int, size: int = 2) -> int:
        """Read as the bus does."""
        with self.pm.lock:
            return self.pm.read(offset, size)

    def write(self, offset: int, value: int, size: int = 2) -> None:
        """Write as the bus does."""
        with self.pm.lock:
            self.pm.write(offset, size, value)


@pytest.fixture
def rig() -> Rig:
    """The hardware after power-on."""
    return Rig()


def test_power_on_values(rig: Rig) -> None:
    """At power-on no event is pending or enabled, and ACPI mode is always on."""
    assert rig.read(Register.PM1_STS) == 0
    assert rig.read(Register.PM1_EN) == 0
    assert rig.read(Register.PM1_CNT) == Pm1Control.SCI_EN
    rig.write(Register.PM1_CNT, 0)
    assert rig.read(Register.PM1_CNT) == Pm1Control.SCI_EN


def test_writable_bits(rig: Rig) -> None:
    """Enables and the sleep type are kept; command and reserved bits read as zero."""
    rig.write(Register.PM1_EN, 0xFFFF)
    assert rig.read(Register.PM1_EN) == ENABLE_BITS
    rig.write(Register.PM1_CNT, 0xFFFF)
    assert rig.read(Register.PM1_CNT) == Pm1Control.SCI_EN | Pm1Control.BM_RLD | 7 << 10


# Sleep


@pytest.mark.parametrize("sleep_type", range(8))
def test_sleep(rig: Rig, sleep_type: int) -> None:
    """SLP_EN enters the state that SLP_TYP names."""
    rig.write(Register.PM1_CNT, sleep_type << 10)
    assert rig.sleeps == []
    rig.write(Register.PM1_CNT, Pm1Control.SLP_EN | sleep_type << 10)
    assert rig.sleeps == [sleep_type]


def test_sleep_by_bytes(rig: Rig) -> None:
    """A write of the upper byte alone sleeps; one of the lower byte does not."""
    rig.write(Register.PM1_CNT, 0xFF, 1)
    assert rig.sleeps == []
    rig.write(Register.PM1_CNT + 1, (Pm1Control.SLP_EN | 5 << 10) >> 8, 1)
    assert rig.sleeps == [5]


def test_sleep_by_dword(rig: Rig) -> None:
    """The control block may be written four bytes wide."""
    rig.write(Register.PM1_CNT, Pm1Control.SLP_EN | 5 << 10, 4)
    assert rig.sleeps == [5]


def test_waking_up(rig: Rig) -> None:
    """WAK_STS records a sleep until it is cleared; it does not interrupt."""
    rig.pm.wake()
    assert rig.read(Register.PM1_STS) == Pm1Status.WAK
    rig.write(Register.PM1_STS, Pm1Status.WAK)
    assert rig.read(Register.PM1_STS) == 0
    assert rig.sci.levels == []


# Power button


def test_power_button(rig: Rig) -> None:
    """The button interrupts until its status is cleared."""
    rig.write(Register.PM1_EN, Pm1Enable.PWRBTN)
    rig.pm.press_power_button()
    assert rig.read(Register.PM1_STS) == Pm1Status.PWRBTN
    assert rig.sci.levels == [True]
    rig.write(Register.PM1_STS, Pm1Status.TMR)
    assert rig.sci.levels == [True]
    rig.write(Register.PM1_STS, Pm1Status.PWRBTN)
    assert rig.sci.levels == [True, False]


def test_power_button_before_it_is_enabled(rig: Rig) -> None:
    """A press is remembered while it is disabled, and interrupts once it is enabled."""
    rig.pm.press_power_button()
    assert rig.sci.levels == []
    rig.write(Register.PM1_EN, Pm1Enable.PWRBTN)
    assert rig.sci.levels == [True]
    rig.write(Register.PM1_EN, 0)
    assert rig.sci.levels == [True, False]


def test_status_and_enable_in_one_dword(rig: Rig) -> None:
    """A dword write clears status and sets enables together, without an interrupt between."""
    rig.pm.press_power_button()
    rig.write(Register.PM1_STS, Pm1Enable.PWRBTN << 16 | Pm1Status.PWRBTN, 4)
    assert rig.read(Register.PM1_STS, 4) == Pm1Enable.PWRBTN << 16
    assert rig.sci.levels == []


def test_enable_by_bytes(rig: Rig) -> None:
    """Each byte of a register can be written alone."""
    rig.write(Register.PM1_EN + 1, Pm1Enable.PWRBTN >> 8, 1)
    rig.write(Register.PM1_EN, Pm1Enable.GBL, 1)
    assert rig.read(Register.PM1_EN) == Pm1Enable.PWRBTN | Pm1Enable.GBL
    assert rig.read(Register.PM1_EN + 1, 1) == Pm1Enable.PWRBTN >> 8


# Timer


def test_timer_frequency(rig: Rig) -> None:
    """The timer counts 3579545 per second, whenever it is read."""
    rig.clock.advance(NANOSECONDS)
    assert rig.read(Register.PM_TMR, 4) == TIMER_HZ
    assert rig.read(Register.PM_TMR, 1) == TIMER_HZ & 0xFF
    assert rig.read(Register.PM_TMR + 1, 2) == TIMER_HZ >> 8 & 0xFFFF


def test_timer_wraps_at_32_bits(rig: Rig) -> None:
    """After 2**32 counts the timer starts again."""
    rig.clock.advance(-(-(1 << 32) * NANOSECONDS // TIMER_HZ))
    assert rig.read(Register.PM_TMR, 4) == 0


def test_timer_is_read_only(rig: Rig) -> None:
    """Writing the timer changes nothing."""
    rig.clock.advance(NANOSECONDS)
    rig.write(Register.PM_TMR, 0, 4)
    assert rig.read(Register.PM_TMR, 4) == TIMER_HZ


def test_carry_status_is_lazy(rig: Rig) -> None:
    """TMR_STS is set by each change of the highest bit, and no host timer runs for it."""
    for _ in range(3):
        rig.clock.advance(CARRY_NS)
        assert rig.read(Register.PM1_STS) == Pm1Status.TMR
        rig.write(Register.PM1_STS, Pm1Status.TMR)
        assert rig.read(Register.PM1_STS) == 0
    assert rig.clock.next_deadline_ns is None
    assert rig.clock.fired == 0


def test_carry_interrupts(rig: Rig) -> None:
    """With TMR_EN the carry interrupts on time, and again once it was cleared."""
    rig.write(Register.PM1_EN, Pm1Enable.TMR)
    rig.clock.advance(CARRY_NS - 1)
    assert rig.sci.levels == []
    rig.clock.advance(1)
    assert rig.sci.levels == [True]
    assert rig.clock.next_deadline_ns is None
    rig.write(Register.PM1_STS, Pm1Status.TMR)
    rig.clock.advance(CARRY_NS)
    assert rig.sci.levels == [True, False, True]
    rig.write(Register.PM1_EN, 0)
    assert rig.clock.next_deadline_ns is None


# Reset and snapshots


def test_reset(rig: Rig) -> None:
    """A reset clears everything; the timer starts from zero."""
    rig.write(Register.PM1_EN, ENABLE_BITS)
    rig.write(Register.PM1_CNT, 5 << 10)
    rig.pm.press_power_button()
    rig.clock.advance(2 * CARRY_NS)
    rig.pm.reset()
    assert not rig.sci.level
    assert rig.clock.next_deadline_ns is None
    assert rig.read(0, 8) == Pm1Control.SCI_EN << 32
    assert rig.read(Register.PM_TMR, 4) == 0


def test_snapshot(rig: Rig) -> None:
    """Other hardware continues from a snapshot: the timer, its carry, and the interrupt."""
    rig.write(Register.PM1_EN, Pm1Enable.TMR | Pm1Enable.PWRBTN)
    rig.clock.advance(CARRY_NS // 2)
    rig.pm.press_power_button()
    other = Rig()
    other.clock.advance(12_345)
    other.pm.restore(rig.pm.save())
    assert rig.pm.save() == other.pm.save()
    assert other.sci.levels == [True]
    assert rig.read(Register.PM_TMR, 4) == other.read(Register.PM_TMR, 4)
    other.write(Register.PM1_STS, Pm1Status.PWRBTN)
    other.clock.advance(CARRY_NS - CARRY_NS // 2)
    assert other.sci.levels == [True, False, True]


# Hostile guests


@given(
    st.lists(
        st.tuples(
            st.tuples(
                st.booleans(),
                st.integers(0, 15),
                st.sampled_from((1, 2, 4, 8)),
                st.integers(0, (1 << 64) - 1),
            ),
            st.integers(0, CARRY_NS),
        ),
        max_size=40,
    )
)
def test_any_access_is_survived(steps: list[tuple[Operation, int]]) -> None:
    """No access raises anything; the SCI agrees with status and enable."""
    rig = Rig()
    for operation, passed_ns in steps:
        exercise(rig.pm, [operation])
        rig.clock.advance(passed_ns)
    rig.write(Register.PM1_STS, 0)
    state = rig.pm.save()
    assert bool(state.status & state.enable) == rig.sci.level
    assert all(0 <= sleep <= 7 for sleep in rig.sleeps)
