"""The UART at register level: drivers' probes, FIFOs, interrupt causes, loopback."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.fakes import Operation, exercise
from tests.unit.devices.uart_rig import EMPTY, PEER, Rig
from vmm_kvm.devices.uart16550 import (
    FIFO_DEPTH,
    Fcr,
    Ier,
    Iir,
    Lcr,
    Lsr,
    Mcr,
    Msr,
    Register,
)


@pytest.fixture
def rig() -> Rig:
    """A UART after power-on."""
    return Rig()


# Registers


@pytest.mark.parametrize(
    ("register", "value"),
    [
        (Register.IER, 0),
        (Register.IIR_FCR, Iir.NONE),
        (Register.LCR, 0),
        (Register.MCR, 0),
        (Register.LSR, EMPTY),
        (Register.MSR, PEER),
        (Register.SCR, 0),
        (Register.RBR_THR, 0),
    ],
)
def test_power_on_values(rig: Rig, register: int, value: int) -> None:
    """After power-on no interrupt is enabled, the transmitter is empty, the peer is there."""
    assert value == rig.read(register)


@pytest.mark.parametrize(
    ("register", "readable"),
    [
        (Register.IER, 0x0F),
        (Register.LCR, 0xFF),
        (Register.MCR, 0x1F),
        (Register.SCR, 0xFF),
    ],
)
@pytest.mark.parametrize("value", [0x00, 0x55, 0xAA, 0xFF])
def test_writable_bits(rig: Rig, register: int, readable: int, value: int) -> None:
    """Registers keep the bits that exist on a 16550A; the others read as zero."""
    rig.write(register, value)
    assert value & readable == rig.read(register)


@pytest.mark.parametrize("register", [Register.LSR, Register.MSR])
def test_status_registers_ignore_writes(rig: Rig, register: int) -> None:
    """Line and modem status cannot be written."""
    before = rig.read(register)
    rig.write(register, 0xFF)
    assert before == rig.read(register)


def test_divisor_latch(rig: Rig) -> None:
    """With DLAB the divisor replaces data and IER, and leaves both unchanged."""
    rig.write(Register.IER, Ier.RDI)
    rig.write(Register.LCR, Lcr.DLAB | 3)
    rig.write(Register.RBR_THR, 0x34)
    rig.write(Register.IER, 0x12)
    assert (rig.read(Register.RBR_THR), rig.read(Register.IER)) == (0x34, 0x12)
    rig.write(Register.LCR, 3)
    assert rig.read(Register.IER) == Ier.RDI
    assert rig.sent == b""


def test_wide_accesses_are_byte_accesses(rig: Rig) -> None:
    """An access of two or four bytes is that many accesses of one, lowest register first."""
    rig.write(Register.LCR, 0x0B_03, 2)
    assert (rig.read(Register.LCR), rig.read(Register.MCR)) == (0x03, 0x0B)
    assert rig.read(Register.LCR, 4) == 0x03 | 0x0B << 8 | EMPTY << 16 | int(PEER) << 24
    assert rig.read(Register.SCR, 2) == 0xFF00


# Probing


def test_linux_autoconfiguration() -> None:
    """The probe of Linux's 8250 driver ends at a 16550A.

    Source: Linux drivers/tty/serial/8250/8250_port.c, autoconfig
    """
    rig = Rig()
    scratch = []
    for value in (0x00, 0x0F):
        rig.write(Register.IER, value)
        scratch.append(rig.read(Register.IER))
    assert scratch == [0x00, 0x0F]
    rig.write(Register.IER, 0)
    rig.write(Register.MCR, Mcr.LOOP | 0x0A)
    assert rig.read(Register.MSR) & 0xF0 == 0x90
    rig.write(Register.MCR, 0)
    # Mode B exposes an EFR on better chips; here its write is one of FCR.
    rig.write(Register.LCR, 0xBF)
    rig.write(Register.IIR_FCR, 0)
    rig.write(Register.LCR, 0)
    rig.write(Register.IIR_FCR, Fcr.ENABLE)
    assert rig.read(Register.IIR_FCR) >> 6 == 3  # 16550A or better
    for mode in (0x80, 0xBF):
        rig.write(Register.LCR, mode)
        assert rig.read(Register.IIR_FCR) != 0  # an EFR would read zero
    # A 16750 has a 64-byte FIFO to enable while DLAB is set.
    identities = []
    for mode in (0, 0x80):
        rig.write(Register.LCR, 0)
        rig.write(Register.IIR_FCR, Fcr.ENABLE)
        rig.write(Register.LCR, mode)
        rig.write(Register.IIR_FCR, Fcr.ENABLE | 0x20)
        identities.append(rig.read(Register.IIR_FCR) >> 5)
    assert identities == [6, 6]
    rig.write(Register.LCR, 0)
    rig.write(Register.IER, 0x40)  # UUE of an XScale UART
    assert rig.read(Register.IER) == 0


def test_linux_finds_no_transmitter_bug() -> None:
    """The transmit interrupt identifies itself each time that it is enabled.

    Source: Linux drivers/tty/serial/8250/8250_port.c, the test for UART_BUG_THRE and UART_BUG_TXEN
    """
    rig = Rig()
    for _ in range(2):
        rig.write(Register.IER, Ier.THRI)
        assert rig.read(Register.IIR_FCR) == Iir.THRE
        rig.write(Register.IER, 0)


def test_openbsd_finds_the_fifo_depth() -> None:
    """A driver that fills the FIFO in loopback counts sixteen characters before an overrun.

    Source: OpenBSD sys/dev/ic/com.c, the FIFO length probe
    """
    rig = Rig()
    rig.write(Register.IIR_FCR, Fcr.ENABLE | Fcr.CLEAR_RECEIVE | Fcr.CLEAR_TRANSMIT)
    rig.write(Register.MCR, Mcr.LOOP)
    for value in range(40):
        rig.write(Register.RBR_THR, value)
    depth = 0
    while rig.read(Register.LSR) & Lsr.DR:
        assert rig.read(Register.RBR_THR) == depth
        depth += 1
    assert depth == FIFO_DEPTH


# Transmission


def test_transmitted_bytes_leave_at_once(rig: Rig) -> None:
    """Every THR write reaches the other side, and the transmitter is empty again."""
    for byte in b"boot>\xff":
        rig.write(Register.RBR_THR, byte)
        assert rig.read(Register.LSR) == EMPTY
    assert rig.sent == b"boot>\xff"


def test_collected_bytes_leave_together(rig: Rig) -> None:
    """Collected bytes are sent at once, with one interrupt for all; in loopback they come back."""
    rig.enable(Ier.THRI)
    rig.uart.write_all(b"boot>")
    assert rig.sent == b"boot>"
    assert rig.irq.levels == [True, False, True]
    rig.write(Register.MCR, Mcr.LOOP | Mcr.OUT2)
    rig.uart.write_all(b"ab")
    assert bytes(rig.read(Register.RBR_THR) for _ in range(2)) == b"ab"
    assert rig.sent == b"boot>"


def test_enabling_the_empty_transmitters_interrupt(rig: Rig) -> None:
    """A rising IER.THRI interrupts; reading IIR withdraws the interrupt."""
    rig.enable(0)
    rig.write(Register.IER, Ier.THRI)
    assert rig.irq.levels == [True]
    assert rig.read(Register.IIR_FCR) == Iir.FIFOS_ENABLED | Iir.THRE
    assert rig.irq.levels == [True, False]
    assert rig.read(Register.IIR_FCR) == Iir.FIFOS_ENABLED | Iir.NONE


def test_writing_ier_again_does_not_interrupt_again(rig: Rig) -> None:
    """Only the rising edge of IER.THRI makes the interrupt pending."""
    rig.enable(Ier.THRI)
    rig.read(Register.IIR_FCR)
    rig.write(Register.IER, Ier.THRI | Ier.RDI)
    assert not rig.irq.level
    rig.write(Register.IER, 0)
    rig.write(Register.IER, Ier.THRI)
    assert rig.irq.level


def test_each_transmission_interrupts_anew(rig: Rig) -> None:
    """A THR write withdraws the interrupt and, THR being empty at once, raises a new edge."""
    rig.enable(Ier.THRI)
    assert rig.irq.rises == 1
    rig.write(Register.RBR_THR, 0x41)
    assert rig.irq.levels == [True, False, True]
    rig.read(Register.IIR_FCR)
    rig.write(Register.RBR_THR, 0x42)
    assert rig.irq.levels == [True, False, True, False, True]


@pytest.mark.parametrize(
    ("register", "value"),
    [(Register.IER, Ier.THRI), (Register.MCR, Mcr.LOOP), (Register.LCR, Lcr.DLAB)],
)
def test_plain_output_is_announced(rig: Rig, register: int, value: int) -> None:
    """The batcher of output learns when THR starts to do more than send, and when that ends."""
    rig.write(Register.IER, Ier.RDI | Ier.MSI)
    assert rig.plain == []
    rig.write(register, value)
    assert rig.plain == [False]
    rig.write(register, value)
    rig.write(register, 0)
    assert rig.plain == [False, True]


def test_what_lsr_has_to_tell_ends_plain_output(rig: Rig) -> None:
    """The keeper of LSR learns of a byte, an error, and their end."""
    rig.uart.receive(b"a")
    assert rig.plain == [False]
    rig.read(Register.RBR_THR)
    assert rig.plain == [False, True]
    rig.uart.receive_break()
    rig.read(Register.RBR_THR)
    assert rig.plain == [False, True, False]
    rig.read(Register.LSR)
    assert rig.plain == [False, True, False, True]
    rig.uart.receive(b"a")
    rig.write(Register.IIR_FCR, Fcr.ENABLE)
    assert rig.plain == [False, True, False, True, False, True]


# Reception


def test_one_byte_fits_without_fifo(rig: Rig) -> None:
    """With the FIFOs off, RBR takes one byte at a time."""
    assert rig.uart.receive(b"ab") == 1
    assert rig.uart.receive(b"b") == 0
    assert rig.read(Register.LSR) == EMPTY | Lsr.DR
    assert rig.read(Register.RBR_THR) == ord("a")
    assert rig.read(Register.LSR) == EMPTY
    assert rig.uart.receive(b"b") == 1


def test_sixteen_bytes_fit_with_fifo(rig: Rig) -> None:
    """The FIFO takes as many bytes as fit, in order, and never overruns from outside."""
    rig.enable(0)
    assert rig.uart.receive(bytes(range(10))) == 10
    assert rig.uart.receive(bytes(range(10, 20))) == 6
    assert rig.uart.receive(b"x") == 0
    assert [rig.read(Register.RBR_THR) for _ in range(16)] == list(range(16))
    assert rig.read(Register.LSR) == EMPTY


def test_receiving_nothing(rig: Rig) -> None:
    """An empty offer changes nothing."""
    rig.enable(Ier.RDI)
    assert rig.uart.receive(b"") == 0
    assert rig.irq.levels == []


def test_room_is_announced_when_the_fifo_runs_empty(rig: Rig) -> None:
    """The sender learns of room once the last byte is read, with the lock held, and only then."""
    rig.enable(0)
    rig.uart.receive(b"ab")
    rig.read(Register.RBR_THR)
    assert rig.rooms == []
    rig.read(Register.RBR_THR)
    assert rig.rooms == [True]
    rig.read(Register.RBR_THR)
    assert rig.rooms == [True]


def test_clearing_the_fifo_makes_room(rig: Rig) -> None:
    """FCR's clear bit drops waiting bytes, and the sender learns of room."""
    rig.enable(Ier.RDI)
    rig.uart.receive(b"abc")
    rig.write(Register.IIR_FCR, Fcr.ENABLE | Fcr.CLEAR_RECEIVE)
    assert rig.read(Register.LSR) == EMPTY
    assert rig.rooms == [True]
    assert not rig.irq.level


def test_changing_fifo_mode_clears_it(rig: Rig) -> None:
    """Turning the FIFOs on or off drops waiting bytes."""
    rig.enable(0)
    rig.uart.receive(b"abc")
    rig.write(Register.IIR_FCR, 0)
    assert rig.read(Register.LSR) == EMPTY
    rig.uart.receive(b"d")
    rig.write(Register.IIR_FCR, Fcr.ENABLE)
    assert rig.read(Register.LSR) == EMPTY


def test_fcr_without_enable_programs_nothing(rig: Rig) -> None:
    """A clear or trigger setting without the enable bit is ignored."""
    rig.uart.receive(b"a")
    rig.write(Register.IIR_FCR, Fcr.CLEAR_RECEIVE | 0xC0)
    assert rig.read(Register.IIR_FCR) == Iir.NONE
    assert rig.read(Register.RBR_THR) == ord("a")


@pytest.mark.parametrize(("trigger", "level"), [(0, 1), (1, 4), (2, 8), (3, 14)])
def test_trigger_levels(rig: Rig, trigger: int, level: int) -> None:
    """Below the trigger level a character time-out is reported, from it on received data."""
    rig.enable(Ier.RDI, trigger=trigger)
    causes = []
    for _ in range(FIFO_DEPTH):
        rig.uart.receive(b"x")
        causes.append(rig.read(Register.IIR_FCR) & 0x0F)
    assert causes == [Iir.CTI] * (level - 1) + [Iir.RDA] * (FIFO_DEPTH - level + 1)
    assert rig.irq.levels == [True]


def test_received_data_interrupts_until_read(rig: Rig) -> None:
    """The line stays high while data waits, across the trigger level."""
    rig.enable(Ier.RDI, trigger=1)
    rig.uart.receive(b"abcde")
    for _ in range(4):
        rig.read(Register.RBR_THR)
        assert rig.irq.levels == [True]
    rig.read(Register.RBR_THR)
    assert rig.irq.levels == [True, False]


def test_out2_gates_the_line(rig: Rig) -> None:
    """Without MCR.OUT2 the cause is pending but the line is low."""
    rig.write(Register.IER, Ier.RDI)
    rig.uart.receive(b"a")
    assert rig.read(Register.IIR_FCR) == Iir.RDA
    assert rig.irq.levels == []
    rig.write(Register.MCR, Mcr.OUT2)
    rig.write(Register.MCR, 0)
    assert rig.irq.levels == [True, False]


# BREAK and line errors


def test_break_is_a_zero_byte_with_bi(rig: Rig) -> None:
    """A BREAK sets BI until LSR is read, and leaves a zero byte."""
    rig.enable(Ier.RLSI | Ier.RDI)
    rig.uart.receive_break()
    assert rig.read(Register.IIR_FCR) & 0x0F == Iir.RLS
    assert rig.read(Register.LSR) == EMPTY | Lsr.DR | Lsr.BI | Lsr.FIFO_ERROR
    assert rig.read(Register.IIR_FCR) & 0x0F == Iir.RDA
    assert rig.read(Register.LSR) == EMPTY | Lsr.DR
    assert rig.read(Register.RBR_THR) == 0
    assert not rig.irq.level


def test_break_without_fifo(rig: Rig) -> None:
    """In 16450 mode BI is set the same way, and the FIFO error bit does not exist."""
    rig.uart.receive_break()
    assert rig.read(Register.LSR) == EMPTY | Lsr.DR | Lsr.BI


def test_break_is_reported_with_its_character(rig: Rig) -> None:
    """After other characters, BI waits until they are read; the FIFO error bit is set before."""
    rig.enable(Ier.RLSI)
    rig.uart.receive(b"a")
    rig.uart.receive_break()
    rig.uart.receive(b"b")
    assert rig.read(Register.LSR) == EMPTY | Lsr.DR | Lsr.FIFO_ERROR
    assert rig.read(Register.LSR) == EMPTY | Lsr.DR | Lsr.FIFO_ERROR
    assert rig.irq.levels == []
    assert rig.read(Register.RBR_THR) == ord("a")
    assert rig.irq.levels == [True]
    assert rig.read(Register.LSR) == EMPTY | Lsr.DR | Lsr.BI | Lsr.FIFO_ERROR
    assert rig.irq.levels == [True, False]
    assert rig.read(Register.RBR_THR) == 0
    assert rig.read(Register.LSR) == EMPTY | Lsr.DR
    assert rig.read(Register.RBR_THR) == ord("b")


def test_break_waits_for_room(rig: Rig) -> None:
    """A BREAK at a full FIFO arrives as soon as a character is read."""
    rig.enable(0)
    rig.uart.receive(bytes(16))
    rig.uart.receive_break()
    assert not rig.read(Register.LSR) & Lsr.FIFO_ERROR
    rig.read(Register.RBR_THR)
    assert rig.read(Register.LSR) & Lsr.FIFO_ERROR
    for _ in range(15):
        rig.read(Register.RBR_THR)
    assert rig.read(Register.LSR) & Lsr.BI


def test_break_waits_for_rbr(rig: Rig) -> None:
    """Without FIFO too; room is announced only once the BREAK itself was read."""
    rig.uart.receive(b"a")
    rig.uart.receive_break()
    assert rig.read(Register.RBR_THR) == ord("a")
    assert rig.rooms == []
    assert rig.read(Register.LSR) == EMPTY | Lsr.DR | Lsr.BI
    assert rig.read(Register.RBR_THR) == 0
    assert rig.rooms == [True]


# Priorities


def test_causes_are_reported_by_priority(rig: Rig) -> None:
    """Line status, received data, empty transmitter, modem status: in that order."""
    rig.enable(0)
    rig.write(Register.MCR, Mcr.LOOP | Mcr.OUT2)  # modem lines change
    rig.write(Register.MCR, Mcr.OUT2)
    rig.uart.receive_break()
    rig.write(Register.IER, Ier.RDI | Ier.THRI | Ier.RLSI | Ier.MSI)
    causes = [rig.read(Register.IIR_FCR) & 0x0F]
    rig.read(Register.LSR)
    causes.append(rig.read(Register.IIR_FCR) & 0x0F)
    rig.read(Register.RBR_THR)
    causes += [rig.read(Register.IIR_FCR) & 0x0F, rig.read(Register.IIR_FCR) & 0x0F]
    assert rig.irq.levels == [True]
    rig.read(Register.MSR)
    causes.append(rig.read(Register.IIR_FCR) & 0x0F)
    assert causes == [Iir.RLS, Iir.RDA, Iir.THRE, Iir.MSI, Iir.NONE]
    assert rig.irq.levels == [True, False]


@pytest.mark.parametrize("ier", [Ier.RDI, Ier.RLSI, Ier.MSI, 0])
def test_only_enabled_causes_interrupt(rig: Rig, ier: int) -> None:
    """IIR and the line follow the enabled causes alone."""
    rig.enable(0)
    rig.write(Register.MCR, Mcr.LOOP | Mcr.OUT2)
    rig.write(Register.MCR, Mcr.OUT2)
    rig.uart.receive_break()
    rig.write(Register.IER, ier)
    expected = {Ier.RDI: Iir.RDA, Ier.RLSI: Iir.RLS, Ier.MSI: Iir.MSI}.get(ier, Iir.NONE)
    assert expected == rig.read(Register.IIR_FCR) & 0x0F
    assert bool(ier) == rig.irq.level


# Loopback


@pytest.mark.parametrize(
    ("output", "line"),
    [(Mcr.DTR, Msr.DSR), (Mcr.RTS, Msr.CTS), (Mcr.OUT1, Msr.RI), (Mcr.OUT2, Msr.DCD)],
)
def test_loopback_reflects_modem_lines(rig: Rig, output: int, line: int) -> None:
    """In loopback each output drives one input; deltas say what changed, until they are read."""
    rig.write(Register.MCR, Mcr.LOOP)
    rig.read(Register.MSR)
    rig.write(Register.MCR, Mcr.LOOP | output)
    rising = {Msr.DSR: Msr.DDSR, Msr.CTS: Msr.DCTS, Msr.RI: 0, Msr.DCD: Msr.DDCD}[line]
    assert line | rising == rig.read(Register.MSR)
    assert line == rig.read(Register.MSR)
    rig.write(Register.MCR, Mcr.LOOP)
    falling = rising or Msr.TERI
    assert falling == rig.read(Register.MSR)
    assert rig.read(Register.MSR) == 0


def test_loopback_disconnects_the_peer(rig: Rig) -> None:
    """In loopback the peer's lines vanish, and return afterwards, with deltas."""
    rig.write(Register.MCR, Mcr.LOOP)
    assert rig.read(Register.MSR) == Msr.DCTS | Msr.DDSR | Msr.DDCD
    rig.write(Register.MCR, 0)
    assert rig.read(Register.MSR) == PEER | Msr.DCTS | Msr.DDSR | Msr.DDCD


def test_loopback_returns_data(rig: Rig) -> None:
    """Bytes sent in loopback are received, with interrupts, and leave no trace outside."""
    rig.enable(Ier.RDI)
    rig.write(Register.MCR, Mcr.LOOP | Mcr.OUT2)
    rig.write(Register.RBR_THR, 0x5A)
    assert rig.irq.level
    assert rig.read(Register.RBR_THR) == 0x5A
    assert rig.sent == b""
    rig.write(Register.MCR, 0)
    rig.write(Register.RBR_THR, 0x41)
    assert rig.sent == b"A"


def test_input_waits_during_loopback(rig: Rig) -> None:
    """Outside data and BREAKs are not taken in loopback; leaving it announces room."""
    rig.enable(0)
    rig.write(Register.MCR, Mcr.LOOP)
    assert rig.uart.receive(b"abc") == 0
    rig.uart.receive_break()
    assert rig.read(Register.LSR) == EMPTY
    rig.write(Register.MCR, 0)
    assert rig.rooms == [True]
    assert rig.read(Register.LSR) & Lsr.BI
    assert rig.uart.receive(b"abc") == 3


def test_overrun_with_fifo(rig: Rig) -> None:
    """The seventeenth character is lost, OE is set until LSR is read, the FIFO keeps the rest."""
    rig.enable(Ier.RLSI)
    rig.write(Register.MCR, Mcr.LOOP | Mcr.OUT2)
    for value in range(17):
        rig.write(Register.RBR_THR, value)
    assert rig.read(Register.IIR_FCR) & 0x0F == Iir.RLS
    assert rig.read(Register.LSR) == EMPTY | Lsr.DR | Lsr.OE
    assert rig.read(Register.LSR) == EMPTY | Lsr.DR
    assert [rig.read(Register.RBR_THR) for _ in range(16)] == list(range(16))


def test_overrun_without_fifo(rig: Rig) -> None:
    """Without FIFO the new character replaces the unread one."""
    rig.write(Register.MCR, Mcr.LOOP)
    rig.write(Register.RBR_THR, 1)
    rig.write(Register.RBR_THR, 2)
    assert rig.read(Register.LSR) == EMPTY | Lsr.DR | Lsr.OE
    assert rig.read(Register.RBR_THR) == 2
    assert rig.read(Register.LSR) == EMPTY


def test_break_in_loopback(rig: Rig) -> None:
    """Setting LCR's break bit in loopback is received as one BREAK."""
    rig.write(Register.MCR, Mcr.LOOP)
    rig.write(Register.LCR, Lcr.SET_BREAK)
    rig.write(Register.LCR, Lcr.SET_BREAK | 3)
    assert rig.read(Register.LSR) == EMPTY | Lsr.DR | Lsr.BI
    assert rig.read(Register.RBR_THR) == 0
    assert rig.read(Register.LSR) == EMPTY


# Reset and snapshots


def test_reset(rig: Rig) -> None:
    """Reset disables everything and drops input; scratch and divisor stay."""
    rig.write(Register.SCR, 0x77)
    rig.enable(Ier.RDI | Ier.THRI)
    rig.uart.receive(b"abc")
    rig.uart.reset()
    assert not rig.irq.level
    assert rig.plain == [False, True]
    assert rig.rooms == [True]
    assert [rig.read(register) for register in range(8)] == [
        0, 0, Iir.NONE, 0, 0, EMPTY, PEER, 0x77,
    ]  # fmt: skip


def test_snapshot(rig: Rig) -> None:
    """Another UART continues where a snapshot was taken: line, FIFO, errors, everything."""
    rig.write(Register.SCR, 0x77)
    rig.enable(Ier.RDI | Ier.THRI | Ier.RLSI, trigger=2)
    rig.uart.receive(b"ab")
    rig.uart.receive_break()
    state = rig.uart.save()
    other = Rig()
    other.uart.restore(state)
    assert state == other.uart.save()
    assert other.irq.level
    assert other.plain == [False]
    registers = [Register.IIR_FCR, Register.LSR, *[Register.RBR_THR] * 3, Register.LSR]
    assert [rig.read(register) for register in registers] == [
        other.read(register) for register in registers
    ]


# Hostile guests

OPERATIONS = st.lists(
    st.tuples(
        st.booleans(),
        st.integers(0, 7),
        st.sampled_from((1, 2, 4, 8)),
        st.integers(0, (1 << 64) - 1),
    ),
    max_size=60,
)


@given(OPERATIONS, st.binary(max_size=20))
def test_any_access_is_survived(operations: list[Operation], data: bytes) -> None:
    """No reads and writes raise anything, and the line agrees with IIR."""
    rig = Rig()
    for operation in operations:
        exercise(rig.uart, [operation])
        rig.uart.receive(data)
        rig.uart.receive_break()
    state = rig.uart.save()
    assert len(state.received) <= FIFO_DEPTH
    assert bool(state.received) == bool(state.lsr & Lsr.DR)
    rig.read(Register.IIR_FCR)  # withdraws a transmit interrupt, so that the next read does not
    is_pending = not rig.read(Register.IIR_FCR) & Iir.NONE
    assert (is_pending and bool(state.mcr & Mcr.OUT2)) == rig.irq.level
