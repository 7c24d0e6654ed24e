"""The watchdog, by the accesses of Linux's driver: when it bites, and when it does not."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.fakes import FakeClock
from vmm_kvm.clock import NANOSECONDS
from vmm_kvm.pci.i6300esb import (
    CONFIG,
    CONTROL,
    LEFT_MAX_NS,
    PRELOAD_MAX,
    SIZE,
    Config,
    Control,
    Register,
    Reload,
    Watchdog,
    WatchdogState,
)

SECOND = NANOSECONDS
TICK_S = (1 << 15) / 33e6
TIMEOUT_S = 30
TICKS = TIMEOUT_S << 9  # of each timer, as Linux has it: a tick is about a millisecond


class Rig:
    """A watchdog, its driver, and how often it has bitten."""

    def __init__(self, *, has_timed_out: bool = False) -> None:
        self.clock = FakeClock()
        self.bites = 0
        self.device = Watchdog(self.clock, self._bite, has_timed_out=has_timed_out)

    def _bite(self) -> None:
        assert not self.device.lock.locked()
        self.bites += 1

    def configure(self, offset: int, size: int, value: int) -> None:
        """Write in configuration space, as the host bridge does."""
        self.device.function.write_config(offset, size, value)

    def write(self, offset: int, value: int, size: int = 4) -> None:
        """Write a register."""
        with self.device.lock:
            self.device.write(offset, size, value)

    def read(self, offset: int, size: int = 4) -> int:
        """Read a register."""
        with self.device.lock:
            return self.device.read(offset, size)

    def change(self, offset: int, value: int, size: int = 4) -> None:
        """Unlock a register, and write it."""
        self.write(Register.RELOAD, 0x80, 2)
        self.write(Register.RELOAD, 0x86, 2)
        self.write(offset, value, size)

    def begin(self, config: int = Config.INTERRUPT_TYPE, control: int = Control.ENABLED) -> None:
        """Enable it for thirty seconds, in two halves."""
        self.configure(CONFIG, 2, config)
        self.change(Register.TIMER1, TICKS)
        self.change(Register.TIMER2, TICKS)
        self.configure(CONTROL, 1, control)

    def reload(self) -> None:
        """Say that the guest is alive."""
        self.change(Register.RELOAD, Reload.RELOAD, 2)

    def wait(self, seconds: float) -> int:
        """Let time pass; returns the number of bites until then."""
        self.clock.advance(int(seconds * SECOND))
        return self.bites


def test_a_guest_that_hangs_is_reset() -> None:
    """Both timers have to end; their time is twice a timer's."""
    rig = Rig()
    rig.begin()
    assert rig.wait(2 * TICKS * TICK_S - 0.1) == 0
    assert rig.wait(0.2) == 1
    assert rig.wait(10_000) == 1
    assert rig.read(Register.RELOAD, 2) == Reload.TIMEOUT
    rig.change(Register.RELOAD, Reload.TIMEOUT, 2)
    assert rig.read(Register.RELOAD, 2) == 0


def test_a_guest_that_reloads_lives() -> None:
    """Reloading begins anew, during either timer."""
    rig = Rig()
    rig.begin()
    for seconds in (1, 14, 16, 29, 29, 3):
        assert rig.wait(seconds) == 0
        rig.reload()
    assert rig.wait(31) == 1


def test_nothing_happens_before_it_is_enabled() -> None:
    """Nor after it was disabled; enabling twice does not begin anew."""
    rig = Rig()
    rig.begin(control=0)
    rig.reload()
    assert rig.wait(1000) == 0
    rig.configure(CONTROL, 1, Control.ENABLED)
    assert rig.wait(20) == 0
    rig.configure(CONTROL, 1, Control.ENABLED)
    assert rig.wait(5) == 0
    rig.configure(CONTROL, 1, 0)
    assert rig.wait(1000) == 0


def test_a_locked_one_cannot_be_disabled() -> None:
    """A locked watchdog keeps its control register and its reset."""
    rig = Rig()
    rig.begin(control=Control.ENABLED | Control.LOCKED)
    rig.configure(CONTROL, 1, 0)
    assert rig.device.function.read_config(CONTROL, 1) == Control.ENABLED | Control.LOCKED
    assert rig.wait(31) == 1


def test_registers_are_locked() -> None:
    """Only both values, in their order, unlock one write; a wrong one begins anew."""
    rig = Rig()
    rig.begin()
    for values in ((), (0x80,), (0x86,), (0x80, 0x87), (0x86, 0x80), (0x80, 0x86, 0x80)):
        for value in values:
            rig.write(Register.RELOAD, value, 2)
        rig.write(Register.TIMER1, 1)
        assert rig.read(Register.TIMER1) == TICKS
    for value in (0x80, 0x80, 0x86):
        rig.write(Register.RELOAD, value, 2)
    rig.write(Register.TIMER1, 0xABC_DEF12)
    assert rig.read(Register.TIMER1) == 0xC_DEF12 & PRELOAD_MAX
    rig.write(Register.TIMER1, 5)
    assert rig.read(Register.TIMER1) == 0xC_DEF12 & PRELOAD_MAX


def test_short_ticks() -> None:
    """They are a thousandth as long."""
    rig = Rig()
    rig.begin(config=Config.SHORT_TICKS)
    assert rig.wait(2 * TICKS * TICK_S / 1024 - 0.001) == 0
    assert rig.wait(0.002) == 1


@pytest.mark.parametrize("is_free_running", [False, True])
def test_without_a_reset_it_only_tells(is_free_running: bool) -> None:
    """It runs again where it is free running, at most a thousand times a second."""
    rig = Rig()
    rig.begin(Config.NO_RESET, Control.ENABLED | Control.FREE_RUNNING * is_free_running)
    rig.change(Register.TIMER1, 0)
    rig.change(Register.TIMER2, 0)
    rig.reload()
    fired = rig.clock.fired
    rig.wait(0.1)
    assert rig.clock.fired - fired == (100 if is_free_running else 2)
    assert rig.read(Register.RELOAD, 2) == Reload.TIMEOUT
    assert rig.bites == 0


def test_a_paused_guest_is_not_bitten() -> None:
    """A pause stops the timers, which then continue with the remaining time."""
    rig = Rig()
    rig.begin()
    assert rig.wait(29) == 0
    for _ in range(2):
        rig.device.suspend()
    assert rig.wait(1000) == 0
    for _ in range(2):
        rig.device.resume()
    assert rig.wait(1.4) == 0  # a tick is a bit less than a millisecond's 1/1024
    assert rig.wait(0.2) == 1


def test_every_reason_stops_the_timers() -> None:
    """They continue when the last reason is gone, and begin nothing meanwhile."""
    rig = Rig()
    rig.device.suspend("debugged")
    rig.begin()
    rig.device.suspend()
    assert rig.wait(1000) == 0
    rig.device.resume()
    rig.device.resume("throttled")
    assert rig.wait(1000) == 0
    rig.device.resume("debugged")
    assert rig.wait(30.4) == 0
    assert rig.wait(0.3) == 1
    rig.device.suspend("debugged")
    rig.configure(CONTROL, 1, 0)
    rig.device.resume("debugged")
    assert rig.wait(1000) == 1


def test_a_reset_is_remembered_until_the_driver_has_seen_it() -> None:
    """The next machine's watchdog says that the last one's has bitten; a driver clears that."""
    rig = Rig()
    assert not rig.device.has_timed_out
    rig.begin()
    assert rig.wait(31) == 1
    assert rig.device.save().has_timed_out
    after = Rig(has_timed_out=True)
    assert after.read(Register.RELOAD, 2) == Reload.TIMEOUT
    after.change(Register.RELOAD, Reload.TIMEOUT | Reload.RELOAD, 2)
    assert after.read(Register.RELOAD, 2) == 0
    assert not after.device.has_timed_out


def test_a_restored_one_goes_on_when_the_machine_does() -> None:
    """A restored watchdog continues with its timer and the remaining time, once resumed."""
    rig, other = Rig(), Rig()
    rig.begin(control=Control.ENABLED | Control.LOCKED)
    rig.wait(20)
    rig.device.suspend()
    other.device.function.restore(rig.device.function.save())
    other.device.restore(rig.device.save())
    assert other.device.save() == rig.device.save()
    assert other.wait(1000) == 0
    other.device.resume()
    assert other.wait(10.4) == 0
    assert other.wait(0.3) == 1


def test_closing_stops_it() -> None:
    """No callback comes afterwards."""
    rig = Rig()
    rig.begin()
    rig.device.close()
    assert rig.wait(1000) == 0


@given(
    st.lists(
        st.one_of(
            st.tuples(st.integers(0, SIZE), st.sampled_from([1, 2, 4, 8]), st.integers(0, 1 << 64)),
            st.sampled_from([(12, 2, 0x80), (12, 2, 0x86), (12, 2, 0x100), (0, 4, 0)]),
        ),
        max_size=40,
    ),
    st.lists(st.tuples(st.integers(CONFIG, CONTROL + 1), st.integers(0, 255)), max_size=8),
)
def test_any_accesses(writes: list[tuple[int, int, int]], configs: list[tuple[int, int]]) -> None:
    """No access fails, and any resulting state can be restored."""
    rig, other = Rig(), Rig()
    for offset, value in configs:
        rig.configure(offset, 1, value)
    for offset, size, value in writes:
        rig.write(offset, value, size)
        assert 0 <= rig.read(offset, size) < 1 << 8 * size
        rig.wait(0.01)
    rig.device.suspend()
    state = rig.device.save()
    assert isinstance(state, WatchdogState)
    assert state.left_ns is None or 0 <= state.left_ns <= LEFT_MAX_NS
    other.device.restore(state)
    assert other.device.save() == state
