"""Serial output that KVM collects: in batches while THR only sends, and always in order."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from tests import guests
from tests.fakes import FakeClock, RecordingDevice, RecordingIrqLine
from vmm_kvm.arch.x86 import layout
from vmm_kvm.arch.x86.dispatch import dispatch
from vmm_kvm.bus import Bus
from vmm_kvm.devices.uart16550 import Lsr, Register, Uart16550
from vmm_kvm.kvm.exits import IoExit
from vmm_kvm.kvm.vcpu import Vcpu
from vmm_kvm.machine.serial_output import SerialOutput

pytestmark = pytest.mark.kvm

COUNT = 400
"""More bytes than the ring holds."""
SOON_NS = 10_000_000


class Rig:
    """A guest that prints, its UART, the receiver of its output, and the output."""

    def __init__(self, vcpu: Vcpu) -> None:
        self.vcpu = vcpu
        self.clock = FakeClock()
        self.sent: list[bytes] = []
        self.uart = Uart16550(
            RecordingIrqLine(),
            self.sent.append,
            on_receive_room=lambda: None,
            on_plain=self._note_plain,
        )
        self.output = SerialOutput(self.clock, self.uart, vcpu)

    def _note_plain(self, is_plain: bool) -> None:
        self.output.note_plain(is_plain)

    def look_at_lsr(self) -> None:
        """Run the guest to its next read of LSR, and answer that THR is empty."""
        reason = self.vcpu.run()
        assert isinstance(reason, IoExit)
        assert reason.port == layout.PORT_COM1 + Register.LSR
        reason.value = Lsr.THRE | Lsr.TEMT


@contextmanager
def printing(count: int) -> Iterator[Rig]:
    """Make a guest that prints `count` bytes, which KVM collects."""
    with guests.guest(guests.printing(count) + guests.LOOP_BACK) as g:
        if not g.kvm.can_coalesce_ports:
            pytest.skip("KVM here cannot collect port writes")
        g.vm.register_coalesced(layout.PORT_COM1, 1, pio=True)
        rig = Rig(g.vcpu)
        rig.output.start()
        yield rig


def test_bytes_printed_in_a_row_come_in_batches() -> None:
    """A guest that reads LSR before each byte costs few batches; loopback is exact."""
    pio, port = Bus(1 << 16), RecordingDevice()
    with printing(COUNT) as rig:
        pio.insert(layout.PORT_COM1, 8, rig.uart)
        pio.insert(guests.PORT, 4, port)
        dispatch(rig.vcpu, pio, Bus(1 << 32), rig.output)
        rig.output.stop()
    assert bytes(left & 0xFF for left in range(COUNT, 0, -1)) == b"".join(rig.sent)
    assert len(rig.sent) < COUNT // 20
    lsr = Lsr.THRE | Lsr.TEMT | Lsr.DR
    assert port.writes == [(0, 2, lsr << 8 | 0x5A)]


def test_output_is_looked_for_ever_less_often_in_silence() -> None:
    """Without output the timer fires rarely; a byte speeds it up, and no byte waits long."""
    with printing(3) as rig:
        rig.clock.advance(60 * 1_000_000_000)
        assert rig.clock.fired < 80
        assert rig.output.early_read[0] == 0
        rig.look_at_lsr()
        rig.look_at_lsr()
        assert rig.sent == []
        rig.output.drain(rig.vcpu)
        assert rig.sent == [b"\3"]
        assert rig.output.early_read[0] != 0
        rig.look_at_lsr()
        assert rig.sent == [b"\3"]
        rig.clock.advance(SOON_NS)
        assert rig.sent == [b"\3", b"\2"]
        rig.clock.advance(SOON_NS)
        assert rig.output.early_read[0] == 0


def test_no_look_is_early_while_bytes_do_more_than_leave() -> None:
    """Neither a drain nor the timer lets KVM answer LSR while THR loops back or interrupts."""
    with printing(3) as rig:
        rig.output.note_plain(False)
        rig.look_at_lsr()
        rig.look_at_lsr()
        rig.output.drain(rig.vcpu)
        assert rig.output.early_read[0] == 0
        rig.look_at_lsr()
        rig.clock.advance(SOON_NS)
        assert rig.sent == [b"\3", b"\2"]
        assert rig.output.early_read[0] == 0


def test_no_look_is_early_while_a_byte_waits() -> None:
    """A guest that reads LSR between bytes sees its input."""
    with printing(3) as rig:
        rig.look_at_lsr()
        rig.look_at_lsr()
        rig.output.drain(rig.vcpu)
        assert rig.output.early_read[0] != 0
        rig.uart.receive(b"x")
        assert rig.output.early_read[0] == 0
        rig.clock.advance(SOON_NS)
        assert rig.output.early_read[0] == 0
