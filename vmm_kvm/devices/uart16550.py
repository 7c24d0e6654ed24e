"""The 16550A UART: registers, FIFOs, interrupt causes and loopback.

Both directions are infinitely fast: a transmitted byte is gone at once, so THR is always empty, and
a received byte below the trigger level has always waited four character times, so it is reported as
a character time-out at once. The sender of received bytes waits for room, so nothing overruns but
loopback. Baud rate, word length and parity are stored and have no effect; the peer always asserts
carrier, DSR and CTS.
"""

import threading
from collections import deque
from collections.abc import Callable
from typing import Annotated, Literal

from vmm_kvm.errors import StateError
from vmm_kvm.irq import IrqLine
from vmm_kvm.state import U8, U16, Length, PartState

REGISTERS = 8
FIFO_DEPTH = 16


class Register:
    """Register offsets (16550D §8.0, table 2)."""

    RBR_THR = 0  # DLL while LCR.DLAB is set
    IER = 1  # DLM while LCR.DLAB is set
    IIR_FCR = 2
    LCR = 3
    MCR = 4
    LSR = 5
    MSR = 6
    SCR = 7


class Ier:
    """Interrupt enable (16550D §8.7)."""

    RDI = 1 << 0
    THRI = 1 << 1
    RLSI = 1 << 2
    MSI = 1 << 3


class Iir:
    """Interrupt identification (16550D §8.6, table 4), highest priority first."""

    RLS = 0x06
    RDA = 0x04
    CTI = 0x0C
    THRE = 0x02
    MSI = 0x00
    NONE = 0x01
    FIFOS_ENABLED = 0xC0


class Fcr:
    """FIFO control (16550D §8.5); bits 6 and 7 select the receive trigger level."""

    ENABLE = 1 << 0
    CLEAR_RECEIVE = 1 << 1
    CLEAR_TRANSMIT = 1 << 2
    DMA_MODE = 1 << 3


class Lcr:
    """Line control (16550D §8.1), the bits that do something here."""

    SET_BREAK = 1 << 6
    DLAB = 1 << 7


class Mcr:
    """Modem control (16550D §8.8)."""

    DTR = 1 << 0
    RTS = 1 << 1
    OUT1 = 1 << 2
    OUT2 = 1 << 3
    LOOP = 1 << 4


class Lsr:
    """Line status (16550D §8.4)."""

    DR = 1 << 0
    OE = 1 << 1
    PE = 1 << 2
    FE = 1 << 3
    BI = 1 << 4
    THRE = 1 << 5
    TEMT = 1 << 6
    FIFO_ERROR = 1 << 7


class Msr:
    """Modem status (16550D §8.9)."""

    DCTS = 1 << 0
    DDSR = 1 << 1
    TERI = 1 << 2
    DDCD = 1 << 3
    CTS = 1 << 4
    DSR = 1 << 5
    RI = 1 << 6
    DCD = 1 << 7


# One look-up each: nearly every exit of a booting guest ends here.
_RDI, _THRI, _RLSI, _MSI = Ier.RDI, Ier.THRI, Ier.RLSI, Ier.MSI
_DR, _OE, _BI = Lsr.DR, Lsr.OE, Lsr.BI
_THRE, _TEMT, _FIFO_ERROR = Lsr.THRE, Lsr.TEMT, Lsr.FIFO_ERROR
_RLS, _RDA, _CTI = Iir.RLS, Iir.RDA, Iir.CTI
_THRE_CAUSE, _MSI_CAUSE, _NONE = Iir.THRE, Iir.MSI, Iir.NONE
_FIFOS_ENABLED = Iir.FIFOS_ENABLED
_LSR_OFFSET = Register.LSR
PLAIN_LSR = _THRE | _TEMT
"""LSR while nothing is received."""
_LSR_ERRORS = Lsr.OE | Lsr.PE | Lsr.FE | Lsr.BI
_LSR_CLEARED_BY_READ = _LSR_ERRORS | _FIFO_ERROR
_OUT2 = Mcr.OUT2
_LOOP = Mcr.LOOP
_DLAB = Lcr.DLAB
_FIFO_ENABLE = Fcr.ENABLE

_IER_WRITABLE = 0x0F
_MCR_WRITABLE = 0x1F
_MSR_DELTAS = Msr.DCTS | Msr.DDSR | Msr.TERI | Msr.DDCD
_MSR_CHANGES = Msr.DCTS | Msr.DDSR | Msr.DDCD
_LOOPED_LINES = ((Mcr.DTR, Msr.DSR), (Mcr.RTS, Msr.CTS), (Mcr.OUT1, Msr.RI), (Mcr.OUT2, Msr.DCD))
_PEER_LINES = Msr.CTS | Msr.DSR | Msr.DCD
_TRIGGER_LEVELS = (1, 4, 8, 14)
_RESET_DIVISOR = 12  # 9600 baud: what firmware traditionally leaves
_BYTES = tuple(bytes((value,)) for value in range(256))
_BREAK = _BI << 8  # a received character: its LSR bits above its eight data bits


class Uart16550State(PartState):
    """Everything that a guest can observe of a Uart16550, in register terms."""

    ier: U8
    fcr: U8
    """The enable and trigger bits only."""
    lcr: U8
    mcr: U8
    lsr: U8
    msr: U8
    scr: U8
    divisor: U16
    rbr: U8
    received: Annotated[tuple[U16, ...], Length(0, FIFO_DEPTH)]
    """Characters that wait, oldest first; LSR bits of each above its eight data bits."""
    is_thre_pending: bool
    is_break_waiting: bool
    version: Literal[1] = 1


class Uart16550:
    """A 16550A; a BusDevice of 8 registers.

    `transmit` takes bytes that the guest sends. `on_receive_room` is called when the receive FIFO
    runs empty. `on_plain` tells whether the UART is plain, as after a reset: a byte written to THR
    is only sent, and LSR reads `PLAIN_LSR`. It is not plain while bytes loop back, set the divisor
    or interrupt, or received ones wait. All three and `irq` are called with the lock held, usually
    on a vCPU thread, and must not wait or call back.

    The interrupt line is high while an enabled cause is pending and MCR.OUT2 is set, also in
    loopback, where a PC's gate would see OUT2 released but integrated UARTs interrupt.

    Source: 16550D §8
    """

    __slots__ = (
        "_divisor",
        "_fcr",
        "_ier",
        "_irq",
        "_is_break_waiting",
        "_is_line_high",
        "_is_plain",
        "_is_thr_direct",
        "_is_thre_pending",
        "_lcr",
        "_lsr",
        "_mcr",
        "_msr",
        "_on_plain",
        "_on_receive_room",
        "_rbr",
        "_received",
        "_scr",
        "_transmit",
        "_trigger",
        "lock",
    )

    def __init__(
        self,
        irq: IrqLine,
        transmit: Callable[[bytes], None],
        *,
        on_receive_room: Callable[[], None],
        on_plain: Callable[[bool], None],
    ) -> None:
        self.lock = threading.Lock()
        self._irq = irq
        self._transmit = transmit
        self._on_receive_room = on_receive_room
        self._on_plain = on_plain
        self._is_line_high = False
        self._divisor = _RESET_DIVISOR
        self._scr = 0
        self._rbr = 0
        # From here on, what `_clear` sets
        self._ier = self._fcr = self._lcr = self._mcr = 0
        self._trigger = 1
        self._lsr = PLAIN_LSR
        self._msr = _PEER_LINES
        self._received: deque[int] = deque()
        self._is_thr_direct = self._is_plain = True
        self._is_thre_pending = False
        self._is_break_waiting = False

    # The guest's side; the bus holds the lock

    def read(self, offset: int, size: int) -> int:
        """Read registers; each byte of a wider access is an access of its own, as on ISA."""
        if size == 1:
            if offset == _LSR_OFFSET:
                lsr = self._lsr
                return self._read_lsr() if lsr & _LSR_CLEARED_BY_READ else lsr
            return self._read_register(offset)
        value = 0
        for i in range(size):
            value |= self.read(offset + i, 1) << (8 * i)
        return value

    def write(self, offset: int, size: int, value: int) -> None:
        """Write registers; each byte of a wider access is an access of its own, as on ISA."""
        if size == 1:
            if offset == 0 and self._is_thr_direct:
                self._transmit(_BYTES[value & 0xFF])
                if self._ier & _THRI:
                    self._raise_thre()
                return
            self._write_register(offset, value & 0xFF)
            return
        for i in range(size):
            self.write(offset + i, 1, value >> (8 * i))

    def write_all(self, data: bytes) -> None:
        """Write bytes to register 0, one after the other; takes the lock. On a vCPU's thread."""
        with self.lock:
            if self._is_thr_direct:
                self._transmit(data)
                if self._ier & _THRI:
                    self._raise_thre()
            else:
                for value in data:
                    self._write_register(0, value)

    def _read_register(self, offset: int) -> int:
        match offset:
            case Register.RBR_THR:
                return self._divisor & 0xFF if self._lcr & _DLAB else self._read_rbr()
            case Register.IER:
                return self._divisor >> 8 if self._lcr & _DLAB else self._ier
            case Register.IIR_FCR:
                return self._read_iir()
            case Register.LCR:
                return self._lcr
            case Register.MCR:
                return self._mcr
            case Register.LSR:
                return self._read_lsr()
            case Register.MSR:
                msr = self._msr
                self._msr = msr & ~_MSR_DELTAS
                self._update_irq()
                return msr
            case Register.SCR:
                return self._scr
            case _:
                return 0xFF

    def _write_register(self, offset: int, value: int) -> None:
        match offset:
            case Register.RBR_THR:
                if self._lcr & _DLAB:
                    self._divisor = (self._divisor & 0xFF00) | value
                else:
                    self._loop_back(value)
            case Register.IER:
                if self._lcr & _DLAB:
                    self._divisor = (self._divisor & 0xFF) | (value << 8)
                else:
                    self._write_ier(value & _IER_WRITABLE)
            case Register.IIR_FCR:
                self._write_fcr(value)
            case Register.LCR:
                self._write_lcr(value)
            case Register.MCR:
                self._write_mcr(value & _MCR_WRITABLE)
            case Register.SCR:
                self._scr = value
            case _:  # LSR and MSR are for the chip's factory test only
                pass

    def _read_rbr(self) -> int:
        if self._received:
            self._rbr = self._received.popleft() & 0xFF
            if self._is_break_waiting and not self._mcr & _LOOP:
                self._is_break_waiting = False
                self._received.append(_BREAK)
                self._lsr |= self._fifo_error()
            if self._received:
                self._lsr |= self._received[0] >> 8
            else:
                self._lsr &= ~_DR
                self._on_receive_room()
            self._note_plain()
            self._update_irq()
        return self._rbr

    def _read_lsr(self) -> int:
        lsr = self._lsr
        self._lsr = lsr & ~_LSR_CLEARED_BY_READ
        # An error stays with its character, which was reported now if it is the oldest one.
        if self._received:
            self._received[0] &= 0xFF
            if any(character > 0xFF for character in self._received):
                self._lsr |= self._fifo_error()
        self._note_plain()
        self._update_irq()
        return lsr

    def _read_iir(self) -> int:
        cause = self._cause()
        if cause == _THRE_CAUSE:
            self._is_thre_pending = False
            self._update_irq()
        return cause | _FIFOS_ENABLED if self._fcr & _FIFO_ENABLE else cause

    def _write_ier(self, value: int) -> None:
        changes = self._ier ^ value
        self._ier = value
        if changes & _THRI:
            # Enabling the interrupt while THR is empty, which it always is, makes it pending.
            self._is_thre_pending = bool(value & _THRI)
            self._note_plain()
        self._update_irq()

    def _write_fcr(self, value: int) -> None:
        was_enabled = self._fcr & _FIFO_ENABLE
        is_enabled = value & _FIFO_ENABLE
        # Without the enable bit, the others are not programmed.
        self._set_fcr(value if is_enabled else 0)
        if was_enabled != is_enabled or (is_enabled and value & Fcr.CLEAR_RECEIVE):
            self._drop_received()
        self._update_irq()

    def _set_fcr(self, value: int) -> None:
        self._fcr = value & 0xC1
        self._trigger = _TRIGGER_LEVELS[value >> 6] if value & 1 else 1

    def _write_lcr(self, value: int) -> None:
        begins_break = value & ~self._lcr & Lcr.SET_BREAK
        self._lcr = value
        self._note_plain()
        if begins_break and self._mcr & _LOOP:
            self._loop_back(_BREAK)

    def _write_mcr(self, value: int) -> None:
        leaves_loop = self._mcr & ~value & _LOOP
        self._mcr = value
        self._note_plain()
        self._drive_modem_lines()
        if leaves_loop:
            if self._is_break_waiting and self._room():
                self._is_break_waiting = False
                self._push(_BREAK)
            self._on_receive_room()
        self._update_irq()

    def _drive_modem_lines(self) -> None:
        if self._mcr & _LOOP:
            lines = sum(int(line) for output, line in _LOOPED_LINES if self._mcr & output)
        else:
            lines = _PEER_LINES
        deltas = ((self._msr ^ lines) >> 4) & _MSR_CHANGES
        if self._msr & ~lines & Msr.RI:
            deltas |= int(Msr.TERI)
        self._msr = lines | (self._msr & _MSR_DELTAS) | deltas

    def _loop_back(self, character: int) -> None:
        if self._room():
            self._push(character)
        else:
            self._lsr |= _OE
            if not self._fcr & _FIFO_ENABLE:
                self._received.clear()
                self._push(character)
        self._raise_thre()

    def _raise_thre(self) -> None:
        # Writing THR withdraws the interrupt; it returns when THR is empty again: at once. The
        # line falls between the two, or an edge-triggered input would see one request only.
        if self._is_thre_pending and self._cause() == _THRE_CAUSE:
            self._is_thre_pending = False
            self._update_irq()
        self._is_thre_pending = True
        self._update_irq()

    # The outside; these take the lock

    def receive(self, data: bytes) -> int:
        """Offer received bytes to the guest; returns how many were taken, from the first.

        At most 16 fit, or 1 while the FIFOs are off; none during loopback. After fewer than all
        were taken, `on_receive_room` says when to offer the rest. Any thread.
        """
        with self.lock:
            if self._mcr & _LOOP:
                return 0
            count = min(self._room(), len(data))
            if count:
                self._received.extend(data[:count])
                self._lsr |= _DR
                self._note_plain()
                self._update_irq()
            return count

    def receive_break(self) -> None:
        """Let the guest see a BREAK: a zero byte with LSR.BI; it waits for room. Any thread."""
        with self.lock:
            if self._mcr & _LOOP or not self._room():
                self._is_break_waiting = True
            else:
                self._push(_BREAK)
                self._update_irq()

    def reset(self) -> None:
        """Act as at the master reset pin; divisor, scratch and RBR keep their values.

        Source: 16550D table 1
        """
        with self.lock:
            had_received = bool(self._received)
            self._clear()
            self._update_irq()
            if had_received:
                self._on_receive_room()

    def save(self) -> Uart16550State:
        """Return a snapshot; any thread."""
        with self.lock:
            return Uart16550State(
                ier=self._ier,
                fcr=self._fcr,
                lcr=self._lcr,
                mcr=self._mcr,
                lsr=self._lsr,
                msr=self._msr,
                scr=self._scr,
                divisor=self._divisor,
                rbr=self._rbr,
                received=tuple(self._received),
                is_thre_pending=self._is_thre_pending,
                is_break_waiting=self._is_break_waiting,
            )

    def restore(self, state: Uart16550State) -> None:
        """Continue from a snapshot and drive the interrupt line accordingly.

        Raises:
            StateError: more characters wait than there is room for.
        """
        if len(state.received) > 1 and not state.fcr & _FIFO_ENABLE:
            raise StateError(f"received: {len(state.received)} characters without FIFOs")
        with self.lock:
            self._ier = state.ier & _IER_WRITABLE
            self._set_fcr(state.fcr)
            self._lcr = state.lcr
            self._mcr = state.mcr & _MCR_WRITABLE
            self._lsr = state.lsr
            self._msr = state.msr
            self._scr = state.scr
            self._divisor = state.divisor
            self._rbr = state.rbr
            self._received = deque(state.received)
            self._is_thre_pending = state.is_thre_pending
            self._is_break_waiting = state.is_break_waiting
            self._note_plain()
            self._update_irq()

    # Parts of both

    def _clear(self) -> None:
        self._ier = 0
        self._set_fcr(0)
        self._lcr = 0
        self._mcr = 0
        self._lsr = PLAIN_LSR
        self._msr = _PEER_LINES
        self._received.clear()
        self._is_thre_pending = False
        self._is_break_waiting = False
        self._note_plain()

    def _note_plain(self) -> None:
        self._is_thr_direct = not (self._lcr & _DLAB or self._mcr & _LOOP)
        is_plain = self._is_thr_direct and not self._ier & _THRI and self._lsr == PLAIN_LSR
        if is_plain != self._is_plain:
            self._is_plain = is_plain
            self._on_plain(is_plain)

    def _room(self) -> int:
        return (FIFO_DEPTH if self._fcr & _FIFO_ENABLE else 1) - len(self._received)

    def _push(self, character: int) -> None:
        self._received.append(character)
        self._lsr |= _DR
        if character > 0xFF:
            self._lsr |= self._fifo_error()
            if len(self._received) == 1:
                self._lsr |= character >> 8
        self._note_plain()

    def _fifo_error(self) -> int:
        return _FIFO_ERROR if self._fcr & _FIFO_ENABLE else 0

    def _drop_received(self) -> None:
        had_received = bool(self._received)
        self._received.clear()
        self._lsr &= ~(_DR | _LSR_CLEARED_BY_READ)
        self._note_plain()
        if had_received:
            self._on_receive_room()

    def _cause(self) -> int:
        ier = self._ier
        if ier & _RLSI and self._lsr & _LSR_ERRORS:
            return _RLS
        if ier & _RDI and self._received:
            return _RDA if len(self._received) >= self._trigger else _CTI
        if ier & _THRI and self._is_thre_pending:
            return _THRE_CAUSE
        if ier & _MSI and self._msr & _MSR_DELTAS:
            return _MSI_CAUSE
        return _NONE

    def _update_irq(self) -> None:
        level = bool(self._mcr & _OUT2) and self._cause() != _NONE
        if level != self._is_line_high:
            self._is_line_high = level
            self._irq.set(level)
