"""A UART with recorders on all sides, for its tests."""

from dataclasses import dataclass, field

from tests.fakes import RecordingIrqLine
from vmm_kvm.devices.uart16550 import Fcr, Lsr, Mcr, Msr, Register, Uart16550

EMPTY = Lsr.THRE | Lsr.TEMT
PEER = Msr.CTS | Msr.DSR | Msr.DCD


@dataclass
class Rig:
    """A UART with recorders on all sides."""

    irq: RecordingIrqLine = field(default_factory=RecordingIrqLine)
    sent: bytearray = field(default_factory=bytearray)
    rooms: list[bool] = field(default_factory=list)
    plain: list[bool] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.uart = Uart16550(
            self.irq,
            self.sent.extend,
            on_receive_room=lambda: self.rooms.append(self.uart.lock.locked()),
            on_plain=self.plain.append,
        )

    def read(self, register: int, size: int = 1) -> int:
        """Read as the bus does."""
        with self.uart.lock:
            return self.uart.read(register, size)

    def write(self, register: int, value: int, size: int = 1) -> None:
        """Write as the bus does."""
        with self.uart.lock:
            self.uart.write(register, size, value)

    def enable(self, ier: int, *, fifo: bool = True, trigger: int = 0) -> None:
        """Do the accesses of a driver's open."""
        self.write(Register.MCR, Mcr.DTR | Mcr.RTS | Mcr.OUT2)
        self.write(Register.IIR_FCR, (Fcr.ENABLE if fifo else 0) | trigger << 6)
        self.write(Register.IER, ier)
