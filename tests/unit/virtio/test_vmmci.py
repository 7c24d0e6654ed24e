"""vmmci: requests, acknowledgements and their timers, through the registers of OpenBSD's driver."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.fakes import REALTIME_NS, FakeClock, Operation, RecordingIrqLine, exercise
from vmm_kvm.clock import NANOSECONDS
from vmm_kvm.pci.ids import Register as PciRegister
from vmm_kvm.virtio.vmmci import Command, Register, Vmmci

ACKNOWLEDGE, DRIVER, DRIVER_OK = 1, 2, 4
FEATURES = 0b111
ACK_S, SHUTDOWN_S = 3, 120


class Rig:
    """A device, with an OpenBSD guest's driver."""

    def __init__(self) -> None:
        self.clock = FakeClock()
        self.irq = RecordingIrqLine()
        self.expired: list[Command] = []
        self.device = Vmmci(self.clock, self.irq, self.expired.append)

    def read(self, offset: int, size: int = 4) -> int:
        """Read a register."""
        with self.device.lock:
            return self.device.read(offset, size)

    def write(self, offset: int, value: int, size: int = 4) -> None:
        """Write a register."""
        with self.device.lock:
            self.device.write(offset, size, value)

    def attach(self, features: int = FEATURES) -> None:
        """Let the driver find the device."""
        self.write(Register.STATUS, 0, 1)
        self.write(Register.STATUS, ACKNOWLEDGE | DRIVER, 1)
        self.write(Register.GUEST_FEATURES, self.read(Register.DEVICE_FEATURES) & features)
        self.write(Register.STATUS, ACKNOWLEDGE | DRIVER | DRIVER_OK, 1)

    def interrupted(self) -> int:
        """Serve the interrupt: return the command, which the driver has not answered yet."""
        assert self.irq.levels[-1:] == [True]
        assert self.read(Register.ISR, 1) == 2
        assert self.irq.levels[-1:] == [False]
        return self.read(Register.CONFIG)

    def answer(self, command: int) -> None:
        """Write the command register."""
        self.write(Register.CONFIG, command)

    def wait(self, seconds: float) -> None:
        """Let time pass."""
        self.clock.advance(int(seconds * NANOSECONDS))


@pytest.fixture
def rig() -> Rig:
    """A device whose driver is ready."""
    rig = Rig()
    rig.attach()
    return rig


def test_its_function_is_openbsds() -> None:
    """OpenBSD's driver finds the device by vendor and device, class and subsystem."""
    function = Rig().device.function
    assert function.read_config(PciRegister.VENDOR_ID, 4) == 0x0777_0B5D
    assert function.read_config(PciRegister.SUBSYSTEM_VENDOR_ID, 4) == 0xFFFF_0B5D
    assert function.read_config(PciRegister.CLASS_CODE, 4) & 0xFFFFFF == 0x07_80_00
    assert function.read_config(PciRegister.REVISION_ID, 1) == 0
    assert function.read_config(PciRegister.BAR0, 1) & 1 == 1


def test_it_has_features_and_no_queues(rig: Rig) -> None:
    """The device has three features, of which the driver accepts any; every queue has size 0."""
    assert rig.read(Register.DEVICE_FEATURES) == FEATURES
    rig.write(Register.GUEST_FEATURES, 0xFFFF_FFFF)
    assert rig.read(Register.GUEST_FEATURES) == FEATURES
    rig.write(Register.QUEUE_SELECT, 5, 2)
    assert rig.read(Register.QUEUE_SELECT, 2) == 5
    assert rig.read(12, 2) == 0


@pytest.mark.parametrize("command", [Command.SHUTDOWN, Command.REBOOT])
def test_a_request_that_is_acknowledged(rig: Rig, command: Command) -> None:
    """The guest is interrupted, reads the command, acknowledges, and then has 120 s."""
    assert rig.device.request(command)
    assert rig.interrupted() == command
    rig.wait(ACK_S - 0.001)
    rig.answer(command)
    rig.wait(SHUTDOWN_S - 0.001)
    assert rig.expired == []
    rig.wait(0.001)
    assert rig.expired == [command]


def test_a_request_without_an_acknowledgement(rig: Rig) -> None:
    """Without an acknowledgement the guest has three seconds."""
    rig.device.request(Command.REBOOT)
    rig.wait(ACK_S - 0.001)
    assert rig.expired == []
    rig.wait(0.001)
    assert rig.expired == [Command.REBOOT]


@pytest.mark.parametrize("status", [None, 0, ACKNOWLEDGE | DRIVER])
def test_nobody_listens(status: int | None) -> None:
    """Without a ready driver a request is refused, and no timer runs."""
    rig = Rig()
    if status is not None:
        rig.attach()
        rig.write(Register.STATUS, status, 1)
    assert not rig.device.request(Command.SHUTDOWN)
    assert rig.clock.next_deadline_ns is None
    assert rig.irq.rises == 0


def test_asking_twice_changes_nothing(rig: Rig) -> None:
    """A repeated request neither interrupts nor prolongs; a different one replaces it."""
    rig.device.request(Command.REBOOT)
    rig.wait(2)
    assert rig.device.request(Command.REBOOT)
    assert rig.irq.rises == 1
    rig.wait(1)
    assert rig.expired == [Command.REBOOT]
    rig.device.request(Command.SHUTDOWN)
    assert rig.interrupted() == Command.SHUTDOWN


def test_another_answer_is_no_acknowledgement(rig: Rig) -> None:
    """Only the requested value prolongs the wait."""
    rig.device.request(Command.REBOOT)
    rig.answer(Command.SHUTDOWN)
    rig.answer(77)
    rig.answer(0)
    rig.wait(ACK_S)
    assert rig.expired == [Command.REBOOT]


def test_an_answer_without_a_request(rig: Rig) -> None:
    """REBOOT or SYNC_RTC without a request are ignored."""
    rig.answer(Command.REBOOT)
    rig.answer(Command.SYNC_RTC)
    assert rig.clock.next_deadline_ns is None


def test_a_guest_that_powers_down_by_itself(rig: Rig) -> None:
    """A guest that shuts down by itself has three seconds to reboot; then it counts as off."""
    rig.answer(Command.SHUTDOWN)
    rig.wait(ACK_S - 0.001)
    assert rig.expired == []
    rig.wait(0.001)
    assert rig.expired == [Command.SHUTDOWN]


def test_the_clock_can_be_synchronised(rig: Rig) -> None:
    """The guest is asked to read its clock, and answers when it has."""
    rig.device.sync_rtc()
    assert rig.interrupted() == Command.SYNC_RTC
    rig.answer(Command.SYNC_RTC)
    assert rig.read(Register.CONFIG) == Command.NONE
    assert rig.clock.next_deadline_ns is None


def test_powering_down_while_asked_for_the_time(rig: Rig) -> None:
    """A guest that has not answered SYNC_RTC can still announce its shutdown."""
    rig.device.sync_rtc()
    rig.answer(Command.SHUTDOWN)
    rig.wait(ACK_S)
    assert rig.expired == [Command.SHUTDOWN]


def test_only_who_knows_how_is_asked_for_the_time() -> None:
    """Without the feature, or with a request pending, no synchronisation is requested."""
    rig = Rig()
    rig.attach(features=0b011)
    rig.device.sync_rtc()
    assert rig.irq.rises == 0
    rig.attach()
    rig.device.request(Command.REBOOT)
    rig.device.sync_rtc()
    assert rig.interrupted() == Command.REBOOT


def test_the_hosts_time(rig: Rig) -> None:
    """A read of the seconds latches the time for a later read of the microseconds."""
    rig.clock.advance(123_456_789)
    assert rig.read(Register.CONFIG + 8) == 0
    assert rig.read(Register.CONFIG + 4) == REALTIME_NS // NANOSECONDS
    rig.wait(5)
    assert rig.read(Register.CONFIG + 16) == 0
    assert rig.read(Register.CONFIG + 12) == 123_456
    rig.clock.step_realtime(NANOSECONDS << 32)
    rig.read(Register.CONFIG + 4)
    assert rig.read(Register.CONFIG + 8) == 1


def test_a_driver_that_leaves_keeps_its_deadline(rig: Rig) -> None:
    """A reset of the device withdraws the interrupt; the request stays."""
    rig.device.request(Command.SHUTDOWN)
    rig.write(Register.STATUS, 0, 1)
    assert not rig.irq.level
    assert rig.read(Register.GUEST_FEATURES) == 0
    rig.wait(ACK_S)
    assert rig.expired == [Command.SHUTDOWN]


@pytest.mark.parametrize("end", [Vmmci.close, Vmmci.reset])
def test_nothing_expires_after_the_end(rig: Rig, end: object) -> None:
    """A closed or reset device has no timer."""
    rig.device.request(Command.SHUTDOWN)
    assert callable(end)
    end(rig.device)
    rig.wait(1000)
    assert rig.expired == []


def test_a_snapshot_continues(rig: Rig) -> None:
    """Command, interrupt cause and the remaining time move with the guest."""
    rig.device.request(Command.REBOOT)
    rig.answer(Command.REBOOT)
    rig.wait(100)
    other = Rig()
    other.clock.advance(77)
    other.device.restore(rig.device.save())
    assert other.device.save() == rig.device.save()
    assert other.read(Register.CONFIG) == Command.REBOOT
    other.wait(20)
    assert other.expired == [Command.REBOOT]


def test_a_snapshot_in_peace(rig: Rig) -> None:
    """Restoring a state without a request forgets a pending one."""
    state = rig.device.save()
    rig.device.request(Command.REBOOT)
    rig.device.restore(state)
    rig.wait(1000)
    assert rig.expired == []


def test_what_is_not_there_reads_as_ones(rig: Rig) -> None:
    """Registers after the configuration read as ones."""
    assert rig.read(40) == 0xFFFF_FFFF
    assert rig.read(38) == 0xFFFF_FFFF
    assert rig.read(36) == 0


OPERATION = st.tuples(
    st.booleans(),
    st.integers(0, 63),
    st.sampled_from([1, 2, 4, 8]),
    st.integers(0, (1 << 64) - 1) | st.integers(0, 8),
)


@given(st.lists(OPERATION, max_size=40))
def test_a_hostile_guest_only_ends_itself(operations: list[Operation]) -> None:
    """Any accesses are answered, and a timer can only end the guest."""
    rig = Rig()
    exercise(rig.device, operations)
    rig.device.request(Command.SHUTDOWN)
    rig.wait(1000)
    assert len(rig.expired) <= 1
