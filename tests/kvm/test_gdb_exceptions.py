"""INT3 and debug exceptions of the debugger's and of the guest's own, told apart.

No KVM at hand leaves the guest at an INT3, so these exits are made up, and those for debug
exceptions of the guest's; all else is real.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import debugged_guest as guest
from vmm_kvm.arch.x86.image import open_firmware
from vmm_kvm.bits import MIB
from vmm_kvm.gdb.debugger import Action, Breakpoint, Debugger, Kind, Stop
from vmm_kvm.kvm.exits import Debug
from vmm_kvm.kvm.system import Kvm
from vmm_kvm.kvm.vcpu import Vcpu, install_kick_signal
from vmm_kvm.loop import EventLoop
from vmm_kvm.machine.machine import Machine
from vmm_kvm.machine.spec import MachineSpec
from vmm_kvm.primitives import Vmm

pytestmark = pytest.mark.kvm

DEADLINE_NS = 30_000_000_000
INT3 = 0xCC
_DB, _BP = 1, 3
_DR6_FIXED, _DR6_STEP = 0xFFFF_0FF0, 1 << 14
_HANDLER, _COUNT = 0x3F00, 0x3F80


class Bench:
    """A machine that is stopped, its debugger, and the stops that the debugger was told of."""

    def __init__(self, loop: EventLoop, vmm: Vmm, image: Path) -> None:
        self.loop = loop
        self.stops: list[Stop] = []
        self.debugger = Debugger(loop.call_soon, self._stopped)
        self.machine = Machine(
            MachineSpec(image=open_firmware(str(image)), memory_size=4 * MIB, cpus=2),
            vmm,
            loop,
            transmit=lambda _data: None,
            on_receive_room=lambda: None,
            on_outcome=lambda _outcome: loop.call_soon(loop.stop),
        )
        self.debugger.attach(self.machine)
        self.debugger.stop()
        self.machine.start()

    def _stopped(self, stop: Stop) -> None:
        self.stops.append(stop)
        self.loop.stop()

    def insert(self, *breakpoints: Breakpoint) -> None:
        """Insert breakpoints."""
        for one in breakpoints:
            self.debugger.insert(0, one)

    def go_on(self) -> None:
        """Let both processors run."""
        self.debugger.go_on({0: Action.RUN, 1: Action.RUN})

    def wait(self) -> None:
        """Wait for a stop."""
        timer = self.loop.timer(self.loop.stop)
        timer.arm(self.loop.monotonic_ns() + DEADLINE_NS)
        self.loop.run()
        timer.cancel()

    def hit(self, vcpu: int, pc: int) -> None:
        """Have KVM say that a vCPU has left the guest at an INT3."""
        assert self.machine.on_debug
        self.machine.on_debug(self.machine.vcpu(vcpu), Debug(exception=_BP, pc=pc))

    def place_handler(self) -> None:
        """Give the guest a handler of INT3."""
        memory = self.machine.memory
        memory.write(4 * _BP, _HANDLER.to_bytes(4, "little"))
        memory.write(_HANDLER, bytes.fromhex("ff06803fcf"))  # incw 0x3f80; iret

    def count_after_hit(self, pc: int) -> int:
        """Have the stopped machine hit an INT3, and run once through its loop.

        Returns how often the guest's handler has been called by then.
        """
        self.place_handler()
        self.hit(0, pc)
        stop = Breakpoint(Kind.HARDWARE, guest.AFTER_COUNTING, 1)
        for at in range(5):
            self.debugger.remove(Breakpoint(Kind.SOFTWARE, guest.END + at, 1))
        self.debugger.remove(stop)
        self.debugger.go_on({0: Action.STEP})
        self.wait()
        self.insert(stop)
        self.debugger.go_on({0: Action.RUN})
        self.wait()
        assert self.stops[-1] == Stop(0, stop)
        return int.from_bytes(self.machine.memory.read(_COUNT, 2), "little")


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    """A bench, closed afterwards."""
    image = tmp_path / "guest.rom"
    image.write_bytes(guest.make())
    install_kick_signal()
    with Kvm() as kvm, Vmm(kvm) as vmm, EventLoop() as loop:
        made = Bench(loop, vmm, image)
        with made.machine:
            yield made


def test_late_hit_of_a_breakpoint(bench: Bench) -> None:
    """A hit that is told late, when memory is as it was, is not taken for the guest's own."""
    bench.insert(*(Breakpoint(Kind.SOFTWARE, guest.END + at, 1) for at in range(5)))
    bench.go_on()
    memory = bench.machine.memory
    (address,) = (at for at in range(guest.END, guest.END + 5) if memory.read(at, 1)[0] == INT3)
    bench.hit(0, address)
    bench.wait()
    assert bench.stops == [Stop(0, Breakpoint(Kind.SOFTWARE, address, 1))]
    assert memory.read(address, 1)[0] != INT3
    # An INT3 that KVM gives to the guest is counted by the guest.
    assert bench.count_after_hit(address) == 0
    assert bench.count_after_hit(guest.END + 9) == 1


def test_breakpoints_outlive_the_guests_own(bench: Bench) -> None:
    """A guest that has taken an INT3 of its own is still stopped by the processor's registers."""
    bench.place_handler()
    bench.insert(Breakpoint(Kind.HARDWARE, guest.AFTER_COUNTING, 1))
    real, seen = bench.machine.on_debug, []

    def on_debug(vcpu: Vcpu, exit_: Debug) -> None:
        """Take the first stop for an INT3 of the guest's."""
        assert real
        seen.append(exit_.pc)
        real(vcpu, Debug(exception=_BP, pc=exit_.pc) if len(seen) == 1 else exit_)

    bench.machine.on_debug = on_debug
    bench.go_on()
    bench.wait()
    assert bench.stops == [Stop(0, Breakpoint(Kind.HARDWARE, guest.AFTER_COUNTING, 1))]
    assert seen == [guest.AFTER_COUNTING] * 2


def test_debug_exceptions_of_the_guests_own(bench: Bench) -> None:
    """One that the debugger did not ask for is the guest's, whose handler finds its cause."""
    memory = bench.machine.memory
    memory.write(4 * _DB, _HANDLER.to_bytes(4, "little"))
    # mov %dr6, %eax; mov %eax, 0x3f84; incw 0x3f80; iret
    memory.write(_HANDLER, bytes.fromhex("0f21f0 66a3843f ff06803f cf"))
    bench.insert(Breakpoint(Kind.HARDWARE, guest.AFTER_COUNTING, 1))
    real, seen = bench.machine.on_debug, []

    def on_debug(vcpu: Vcpu, exit_: Debug) -> None:
        """Take the first stop for a step of the guest's, by its trap flag."""
        assert real
        seen.append(exit_.pc)
        own = Debug(exception=_DB, pc=exit_.pc, dr6=_DR6_STEP | _DR6_FIXED | 2)
        real(vcpu, own if len(seen) == 1 else exit_)

    bench.machine.on_debug = on_debug
    bench.go_on()
    bench.wait()
    assert bench.stops == [Stop(0, Breakpoint(Kind.HARDWARE, guest.AFTER_COUNTING, 1))]
    assert memory.read(_COUNT, 2) == b"\1\0"
    assert int.from_bytes(memory.read(_COUNT + 4, 4), "little") & _DR6_STEP
