"""Output that KVM collects: in batches while THR only sends, in its order always."""

import threading

import pytest

from tests import guests
from tests.fakes import FakeClock, RecordingIrqLine
from tests.guests import guest
from vmm_kvm.boot import layout
from vmm_kvm.bus import Bus
from vmm_kvm.devices.uart16550 import Lsr, Register, Uart16550
from vmm_kvm.kvm.dispatch import dispatch
from vmm_kvm.kvm.exits import IoExit
from vmm_kvm.kvm.vcpu import Vcpu
from vmm_kvm.serial_output import SerialOutput

pytestmark = pytest.mark.kvm

COUNT = 400
"""More bytes than the ring holds."""


class _Port:
    """Keeps what is written to it."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.written: list[int] = []

    def read(self, _offset: int, _size: int) -> int:
        return 0

    def write(self, _offset: int, _size: int, value: int) -> None:
        self.written.append(value)


def test_bytes_printed_in_a_row_come_in_batches() -> None:
    """A guest that looks at LSR before each byte pays for a few batches; loopback is exact."""
    sent: list[bytes] = []

    def note_plain(is_plain: bool) -> None:
        output.note_plain(is_plain)

    with guest(guests.print_and_loop_back(COUNT)) as g:
        if not g.kvm.can_coalesce_ports:
            pytest.skip("KVM here cannot collect port writes")
        g.vm.register_coalesced(layout.PORT_COM1, 1, pio=True)
        pio, port = Bus(1 << 16), _Port()
        uart = Uart16550(
            RecordingIrqLine(),
            sent.append,
            on_receive_room=lambda: None,
            on_plain=note_plain,
        )
        output = SerialOutput(FakeClock(), uart, g.vcpu)
        pio.insert(layout.PORT_COM1, 8, uart)
        pio.insert(guests.PORT, 4, port)
        output.start()
        dispatch(g.vcpu, pio, Bus(1 << 32), lambda _vcpu, _reason: False, output)
        output.stop()
    assert bytes(left & 0xFF for left in range(COUNT, 0, -1)) == b"".join(sent)
    assert len(sent) < COUNT // 20
    lsr = Lsr.THRE | Lsr.TEMT | Lsr.DR
    assert port.written == [lsr << 8 | 0x5A]


def test_output_is_looked_for_ever_less_often_in_silence() -> None:
    """Without output the timer comes rarely; a byte brings it back soon, and no byte waits long."""
    clock, sent = FakeClock(), bytearray()
    with guest(guests.print_and_loop_back(3)) as g:
        if not g.kvm.can_coalesce_ports:
            pytest.skip("KVM here cannot collect port writes")
        g.vm.register_coalesced(layout.PORT_COM1, 1, pio=True)
        uart = Uart16550(
            RecordingIrqLine(),
            sent.extend,
            on_receive_room=lambda: None,
            on_plain=lambda _is_plain: None,
        )
        output = SerialOutput(clock, uart, g.vcpu)
        output.start()
        clock.advance(60 * 1_000_000_000)
        assert clock.fired < 80
        assert output.harmless == [0]
        _look_at_lsr(g.vcpu)
        _look_at_lsr(g.vcpu)
        assert not sent
        output.drain(g.vcpu)
        assert sent == b"\3"
        assert output.harmless != [0]
        _look_at_lsr(g.vcpu)
        assert sent == b"\3"
        clock.advance(10_000_000)
        assert sent == b"\3\2"
        clock.advance(10_000_000)
        assert output.harmless == [0]


def _look_at_lsr(vcpu: Vcpu) -> None:
    """Run the guest to its next look at LSR, and answer that THR is empty."""
    reason = vcpu.run()
    assert isinstance(reason, IoExit)
    assert reason.port == layout.PORT_COM1 + Register.LSR
    reason.value = Lsr.THRE | Lsr.TEMT
