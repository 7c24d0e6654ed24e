"""Output of the serial port that KVM collects, so that a byte costs the guest one exit, not two.

Any exit takes effect after the writes that were collected before it, with one exception: a guest
that prints without interrupts reads LSR before each byte, which would make each byte a batch of its
own. While a timer will soon collect the bytes, writes to THR only send them, and LSR has its usual
value, the loop that enters the guest answers such a read at once. The timer fires often after
output, ever less often while there is none. (To stop collecting instead would make KVM wait for a
grace period in the guest's start.)
"""

from vmm_kvm.arch.x86 import layout
from vmm_kvm.clock import Clock
from vmm_kvm.devices.uart16550 import PLAIN_LSR, Register, Uart16550
from vmm_kvm.kvm.exits import io_read_word
from vmm_kvm.kvm.vcpu import Vcpu

_POLL_MIN_NS = 10_000_000
_POLL_MAX_NS = 1_000_000_000
_LSR_READ = io_read_word(layout.PORT_COM1 + Register.LSR, 1)


class SerialOutput:
    """Carries collected bytes to the UART; a `dispatch.Collected`.

    `start` and `stop` are for the machine's owner; the rest may be called on any thread.
    """

    __slots__ = ("_clock", "_is_plain", "_poll_ns", "_timer", "_uart", "_vcpu", "early_read")

    def __init__(self, clock: Clock, uart: Uart16550, vcpu: Vcpu) -> None:
        """Prepare; `vcpu` is any one of the VM, which share the collected writes."""
        self._clock = clock
        self._uart = uart
        self._vcpu = vcpu
        self._timer = clock.timer(self._poll)
        self._poll_ns = _POLL_MIN_NS
        self._is_plain = True
        self.early_read = [0, PLAIN_LSR]

    def start(self) -> None:
        """Begin to look for output of a guest that is about to run."""
        self._poll()

    def stop(self) -> None:
        """Carry the remaining output of a stopped guest, and stop."""
        self.drain_all()
        self._timer.cancel()

    def note_plain(self, is_plain: bool) -> None:
        """Note whether the UART is plain; see `Uart16550`."""
        self._is_plain = is_plain
        if not is_plain:
            self.early_read[0] = 0

    def drain(self, vcpu: Vcpu) -> None:
        """Carry collected output; the timer collects the output that follows."""
        if vcpu.write_collected_bytes(self._uart.write_all) and self._poll_ns > _POLL_MIN_NS:
            self._look_soon()

    def drain_all(self) -> None:
        """Carry the collected output of a paused guest."""
        self.drain(self._vcpu)

    def _poll(self) -> None:
        # In this order: a byte that is collected from now on is seen below, or is drained by the
        # read of LSR that follows it.
        self.early_read[0] = 0
        if self._vcpu.write_collected_bytes(self._uart.write_all):
            self._look_soon()
        else:
            self._poll_ns = min(2 * self._poll_ns, _POLL_MAX_NS)
            self._timer.arm(self._clock.monotonic_ns() + self._poll_ns)

    def _look_soon(self) -> None:
        self._poll_ns = _POLL_MIN_NS
        self._timer.arm(self._clock.monotonic_ns() + _POLL_MIN_NS)
        self.early_read[0] = _LSR_READ
        if not self._is_plain:  # looked at last: `note_plain` may be under way
            self.early_read[0] = 0
