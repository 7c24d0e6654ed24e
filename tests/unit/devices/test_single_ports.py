"""The one-port devices: debug console, debug exit, pvpanic, system control port A."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.fakes import Operation, exercise
from vmm_kvm.devices.debug_exit import DebugExit
from vmm_kvm.devices.debugcon import Debugcon
from vmm_kvm.devices.port92 import Control, Port92
from vmm_kvm.devices.pvpanic import PanicEvent, Pvpanic


def test_debugcon_transmits_bytes() -> None:
    """Each write is one byte of the log."""
    log = bytearray()
    debugcon = Debugcon(log.extend)
    for byte in b"SeaBIOS":
        debugcon.write(0, 1, byte)
    debugcon.write(0, 1, 0x141)
    assert log == b"SeaBIOSA"


def test_debugcon_is_detected() -> None:
    """Firmware recognizes the port by its value."""
    assert Debugcon(bytearray().extend).read(0, 1) == 0xE9


@pytest.mark.parametrize(
    ("size", "value", "reported"),
    [(1, 0x31, 0x31), (1, 0x1FF, 0xFF), (2, 0x12345, 0x2345), (4, 0xDEADBEEF, 0xDEADBEEF)],
)
def test_debug_exit_reports_the_value(size: int, value: int, reported: int) -> None:
    """The value is reported in the width of the write."""
    values: list[int] = []
    DebugExit(values.append).write(0, size, value)
    assert values == [reported]


def test_debug_exit_is_its_first_port() -> None:
    """Writes beside the first port do not exit; reads are harmless."""
    values: list[int] = []
    device = DebugExit(values.append)
    device.write(1, 1, 1)
    assert device.read(0, 1) == 0
    assert values == []


@pytest.mark.parametrize(
    ("value", "events"),
    [
        (1, [PanicEvent.PANICKED]),
        (2, [PanicEvent.CRASH_LOADED]),
        (3, [PanicEvent.PANICKED | PanicEvent.CRASH_LOADED]),
        (0xFD, [PanicEvent.PANICKED]),
        (0xFC, []),
        (0, []),
    ],
)
def test_pvpanic_reports_supported_events(value: int, events: list[int]) -> None:
    """Known events are reported, other bits are ignored."""
    reported: list[int] = []
    Pvpanic(reported.append).write(0, 1, value)
    assert events == reported


def test_pvpanic_announces_its_events() -> None:
    """Reading tells the driver which events may be sent."""
    assert Pvpanic(ignore).read(0, 1) == PanicEvent.PANICKED | PanicEvent.CRASH_LOADED


def ignore(_: object) -> None:
    """Take a report."""


@pytest.mark.parametrize("device", [Debugcon(ignore), DebugExit(ignore), Pvpanic(ignore)])
def test_there_is_no_state(device: Debugcon | DebugExit | Pvpanic) -> None:
    """These devices have no state: a reset changes nothing, and all snapshots are equal."""
    before = device.save()
    device.write(0, 1, 1)
    device.reset()
    assert before == device.save()


def test_snapshots_are_restored() -> None:
    """A snapshot is accepted by a device of its kind."""
    debugcon, debug_exit, pvpanic = Debugcon(ignore), DebugExit(ignore), Pvpanic(ignore)
    debugcon.restore(debugcon.save())
    debug_exit.restore(debug_exit.save())
    pvpanic.restore(pvpanic.save())
    assert pvpanic.read(0, 1) == 3


@given(
    st.lists(
        st.tuples(
            st.booleans(),
            st.integers(0, 3),
            st.sampled_from((1, 2, 4, 8)),
            st.integers(0, (1 << 64) - 1),
        ),
        max_size=40,
    )
)
def test_any_access_is_survived(operations: list[Operation]) -> None:
    """No reads and writes raise anything."""
    for device in (Debugcon(ignore), DebugExit(ignore), Pvpanic(ignore)):
        exercise(device, operations)


def test_port92_resets() -> None:
    """Bit 0 resets at each write, and reads back as 0."""
    resets: list[None] = []
    port = Port92(lambda: resets.append(None))
    for value, count in ((0x02, 0), (0x03, 1), (0x01, 2), (0xFE, 2), (0x1FF, 3)):
        port.write(0, 1, value)
        assert len(resets) == count
        assert port.read(0, 1) == value & 0xFE
    port.write(1, 1, 1)
    assert len(resets) == 3


def test_port92_keeps_the_gate_of_line_20() -> None:
    """Address line 20 is open at first; a guest reads back its own value."""
    port = Port92(lambda: None)
    assert port.read(0, 1) == Control.FAST_A20
    assert port.read(0, 2) == 0xFF00 | Control.FAST_A20
    port.write(0, 1, 0)
    assert port.read(0, 1) == 0
    state = port.save()
    port.reset()
    assert port.read(0, 1) == Control.FAST_A20
    port.restore(state)
    assert port.read(0, 1) == 0
