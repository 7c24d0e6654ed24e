"""The keyboard controller that can only reset: drivers never wait, and it pulls the line."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.fakes import Operation, exercise
from vmm_kvm.devices.i8042 import SELF_TEST_FAILED, Command, I8042Reset, Status


class Rig:
    """A controller that counts resets."""

    def __init__(self) -> None:
        self.resets = 0
        self.controller = I8042Reset(self._reset)

    def _reset(self) -> None:
        self.resets += 1

    def status(self) -> int:
        """Read port 0x64."""
        with self.controller.lock:
            return self.controller.read(0, 1)

    def command(self, value: int) -> None:
        """Write port 0x64."""
        with self.controller.lock:
            self.controller.write(0, 1, value)

    def read(self) -> int:
        """Read port 0x60."""
        with self.controller.data_port.lock:
            return self.controller.data_port.read(0, 1)

    def write(self, value: int) -> None:
        """Write port 0x60."""
        with self.controller.data_port.lock:
            self.controller.data_port.write(0, 1, value)


@pytest.fixture
def rig() -> Rig:
    """A controller after power-on."""
    return Rig()


def test_always_ready(rig: Rig) -> None:
    """The input buffer is never full, so that a guest may write; the output buffer is empty."""
    assert rig.status() == Status.SYSTEM
    rig.command(0x60)
    rig.write(0x47)
    assert rig.status() == Status.SYSTEM


@pytest.mark.parametrize("command", [0xFE, 0xF0, 0xFC])
def test_pulsing_the_reset_line(rig: Rig, command: int) -> None:
    """A pulse of output bit 0 resets the machine."""
    rig.command(command)
    assert rig.resets == 1


@pytest.mark.parametrize("command", [0xFF, 0xF1, 0xFD, 0xAD, 0xAE, 0x20, 0xA8, 0x00, 0xEE])
def test_other_commands_do_not_reset(rig: Rig, command: int) -> None:
    """Pulses of other bits and other commands do nothing."""
    rig.command(command)
    assert rig.resets == 0
    assert rig.status() == Status.SYSTEM


@pytest.mark.parametrize(("value", "resets"), [(0xDF, 0), (0xDD, 0), (0x03, 0), (0xDE, 1), (0, 1)])
def test_output_port(rig: Rig, value: int, resets: int) -> None:
    """Switching A20 through the output port is harmless; clearing its reset bit is not."""
    rig.command(Command.WRITE_OUTPUT_PORT)
    rig.write(value)
    assert resets == rig.resets
    rig.write(0)  # not an operand any more
    assert resets == rig.resets


def test_reading_the_output_port(rig: Rig) -> None:
    """The output port reports that A20 is open and reset is not pulled."""
    rig.command(Command.READ_OUTPUT_PORT)
    assert rig.status() == Status.SYSTEM | Status.OBF
    assert rig.read() == 0x03
    assert rig.status() == Status.SYSTEM


def test_self_test_fails(rig: Rig) -> None:
    """The self-test answers at once, and negatively: drivers stop looking."""
    rig.command(Command.SELF_TEST)
    assert rig.read() == SELF_TEST_FAILED
    assert rig.read() == 0


def test_another_command_ends_the_wait_for_an_operand(rig: Rig) -> None:
    """A byte after a new command is not the old command's operand."""
    rig.command(Command.WRITE_OUTPUT_PORT)
    rig.command(0xAD)
    rig.write(0)
    assert rig.resets == 0


def test_reset_and_snapshot(rig: Rig) -> None:
    """A snapshot carries the answer and the command in progress; a reset forgets both."""
    rig.command(Command.SELF_TEST)
    rig.command(Command.WRITE_OUTPUT_PORT)
    other = Rig()
    other.controller.restore(rig.controller.save())
    assert rig.controller.save() == other.controller.save()
    assert other.read() == SELF_TEST_FAILED
    other.write(0)
    assert other.resets == 1
    rig.controller.reset()
    rig.write(0)
    assert (rig.resets, rig.status()) == (0, Status.SYSTEM)
    other.controller.restore(rig.controller.save())
    assert other.status() == Status.SYSTEM


OPERATIONS = st.lists(
    st.tuples(
        st.booleans(),
        st.integers(0, 3),
        st.sampled_from((1, 2, 4, 8)),
        st.integers(0, (1 << 64) - 1),
    ),
    max_size=40,
)


@given(OPERATIONS, OPERATIONS)
def test_any_access_is_survived(commands: list[Operation], data: list[Operation]) -> None:
    """No reads and writes of both ports raise anything."""
    rig = Rig()
    exercise(rig.controller, commands)
    exercise(rig.controller.data_port, data)
