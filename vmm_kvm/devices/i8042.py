"""The reset line of the i8042 keyboard controller; there is no keyboard, no mouse, no A20 gate.

ACPI says that there is no controller, so most systems never ask. Those that do, without ACPI or
as a way to restart the machine, must not wait for one that hangs: it is always ready for a command,
and its self-test fails, which ends the probing of drivers at once.
"""

import threading
from collections import deque
from collections.abc import Callable
from typing import Literal

from vmm_kvm.bits import all_ones
from vmm_kvm.state import U8, PartState


class Status:
    """Status register, read at 0x64."""

    OBF = 1 << 0
    SYSTEM = 1 << 2


class Command:
    """Controller commands, written to 0x64."""

    READ_OUTPUT_PORT = 0xD0
    WRITE_OUTPUT_PORT = 0xD1
    SELF_TEST = 0xAA
    PULSE = 0xF0
    """With a low nibble: pulse low the output port bits whose bit is clear."""


class OutputPort:
    """The controller's output port."""

    RESET_N = 1 << 0
    A20 = 1 << 1


SELF_TEST_FAILED = 0xFC
_OUTPUT_PORT = OutputPort.RESET_N | OutputPort.A20


class I8042State(PartState):
    """Everything that a guest can observe of an I8042Reset."""

    output: U8 | None
    """The byte that waits at the data port."""
    expects_output_port: bool
    """Whether the next byte at the data port is for the output port."""
    version: Literal[1] = 1


class I8042DataPort:
    """The data port of an I8042Reset; a BusDevice of one port, for 0x60, with the same lock."""

    __slots__ = ("_controller", "lock")

    def __init__(self, controller: "I8042Reset") -> None:
        self.lock = controller.lock
        self._controller = controller

    def read(self, offset: int, size: int) -> int:
        """Return and take the byte that waits, or zero; nothing drives further bytes."""
        ones = all_ones(size)
        return ones if offset else ones & ~0xFF | self._controller.take_output()

    def write(self, offset: int, size: int, value: int) -> None:
        """Take the operand of a command; bytes for a keyboard are lost."""
        if offset == 0 and size:
            self._controller.write_data(value & 0xFF)


class I8042Reset:
    """The command port; a BusDevice of one port, for 0x64. `data_port` is the other, for 0x60.

    `on_reset` is called when the guest pulls the reset line, with the lock held, on a vCPU thread;
    it must not wait.
    """

    __slots__ = ("_expects_output_port", "_on_reset", "_output", "data_port", "lock")

    def __init__(self, on_reset: Callable[[], None]) -> None:
        self.lock = threading.Lock()
        self._on_reset = on_reset
        self._output: deque[int] = deque(maxlen=1)
        self._expects_output_port = False
        self.data_port = I8042DataPort(self)

    def read(self, offset: int, size: int) -> int:
        """Return the status: ready for a command; nothing drives further bytes."""
        status = Status.SYSTEM | (Status.OBF if self._output else 0)
        ones = all_ones(size)
        return ones if offset else ones & ~0xFF | status

    def write(self, offset: int, size: int, value: int) -> None:
        """Obey a command that concerns the output port or the self-test; ignore others."""
        if offset != 0 or not size:
            return
        command = value & 0xFF
        self._expects_output_port = command == Command.WRITE_OUTPUT_PORT
        if command == Command.SELF_TEST:
            self._output.append(SELF_TEST_FAILED)
        elif command == Command.READ_OUTPUT_PORT:
            self._output.append(_OUTPUT_PORT)
        elif command & 0xF0 == Command.PULSE and not command & OutputPort.RESET_N:
            self._on_reset()

    def take_output(self) -> int:
        """Return the byte that waits at the data port, or zero; called with the lock held."""
        return self._output.popleft() if self._output else 0

    def write_data(self, value: int) -> None:
        """Take a byte, 0 to 255, from the data port; called with the lock held."""
        if self._expects_output_port:
            self._expects_output_port = False
            if not value & OutputPort.RESET_N:
                self._on_reset()

    def reset(self) -> None:
        """Forget a command in progress."""
        with self.lock:
            self._output.clear()
            self._expects_output_port = False

    def save(self) -> I8042State:
        """Return a snapshot; any thread."""
        with self.lock:
            return I8042State(
                output=self._output[0] if self._output else None,
                expects_output_port=self._expects_output_port,
            )

    def restore(self, state: I8042State) -> None:
        """Continue from a snapshot."""
        with self.lock:
            self._output.clear()
            if state.output is not None:
                self._output.append(state.output)
            self._expects_output_port = state.expects_output_port
