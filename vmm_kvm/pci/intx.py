"""INTx wiring: the four interrupt lines that all functions of a bus share."""

import threading
from collections.abc import Sequence

from vmm_kvm.arch.x86.layout import PINS, line_index
from vmm_kvm.errors import SpecError
from vmm_kvm.irq import IrqLine


class SharedLine:
    """A level-triggered line that is high while any of its inputs is.

    The lock is innermost: it is held only while the line itself is set.
    """

    __slots__ = ("_asserted", "_count", "_line", "_lock")

    def __init__(self, line: IrqLine) -> None:
        self._line = line
        self._lock = threading.Lock()
        self._asserted: set[int] = set()
        self._count = 0

    def input(self) -> IrqLine:
        """Make another input; it is low."""
        self._count += 1
        return _Input(self, self._count)

    def assert_input(self, number: int, level: bool) -> None:
        """Set the level of input `number`; called by it, from any thread."""
        with self._lock:
            was_high = bool(self._asserted)
            if level:
                self._asserted.add(number)
            else:
                self._asserted.discard(number)
            is_high = bool(self._asserted)
            if is_high != was_high:
                self._line.set(is_high)


class _Input:
    """One input of a SharedLine."""

    __slots__ = ("_line", "_number")

    def __init__(self, line: SharedLine, number: int) -> None:
        self._line = line
        self._number = number

    def set(self, level: bool) -> None:
        """Drive the input; any thread."""
        self._line.assert_input(self._number, level)


class IntxLines:
    """The lines INTA to INTD of a bus, each shared by the pins that the rotation leads there."""

    __slots__ = ("_lines",)

    def __init__(self, lines: Sequence[IrqLine]) -> None:
        """Share `lines`, four level-triggered ones.

        Raises:
            SpecError: there are not four.
        """
        if len(lines) != PINS:
            raise SpecError(f"{len(lines)} INTx lines, not {PINS}")
        self._lines = tuple(SharedLine(line) for line in lines)

    def input(self, slot: int, pin: int) -> IrqLine:
        """Make the line for pin 1 to 4 of the function in `slot`."""
        return self._lines[line_index(slot, pin)].input()
