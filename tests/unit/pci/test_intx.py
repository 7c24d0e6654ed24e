"""INTx wiring: rotation, and lines that several pins share."""

import pytest

from tests.fakes import RecordingIrqLine
from vmm_kvm.arch.x86.layout import line_index
from vmm_kvm.errors import SpecError
from vmm_kvm.pci.intx import IntxLines, SharedLine


@pytest.mark.parametrize(
    ("slot", "pin", "line"), [(0, 1, 0), (1, 1, 1), (3, 2, 0), (31, 4, 2), (4, 1, 0)]
)
def test_rotation(slot: int, pin: int, line: int) -> None:
    """Pins rotate by slot, so that neighbours' INTA pins have different lines."""
    assert line == line_index(slot, pin)


def test_a_shared_line_is_high_while_any_input_is() -> None:
    """The line rises with the first input and falls with the last."""
    line = RecordingIrqLine()
    shared = SharedLine(line)
    first, second = shared.input(), shared.input()
    first.set(True)
    second.set(True)
    first.set(True)
    first.set(False)
    assert line.levels == [True]
    second.set(False)
    second.set(False)
    assert line.levels == [True, False]


def test_lines_of_a_bus() -> None:
    """Each pin of each slot reaches its line; two pins may share it."""
    lines = [RecordingIrqLine() for _ in range(4)]
    intx = IntxLines(lines)
    inputs = [intx.input(slot, 1) for slot in (1, 2, 5)]
    for pin in inputs:
        pin.set(True)
    inputs[0].set(False)
    assert [line.levels for line in lines] == [[], [True], [True], []]
    inputs[2].set(False)
    assert lines[1].levels == [True, False]


def test_there_are_four_lines() -> None:
    """A number beyond the four lines is refused."""
    with pytest.raises(SpecError):
        IntxLines([RecordingIrqLine()])
