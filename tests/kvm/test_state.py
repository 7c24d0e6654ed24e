"""A machine's state is taken, and continues in a new one: KVM's parts, devices, memory."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import pytest

from vmm_kvm.arch.x86.image import open_image
from vmm_kvm.bits import MIB
from vmm_kvm.boot.firmware import selftest_path
from vmm_kvm.kvm.system import Kvm
from vmm_kvm.kvm.vcpu import install_kick_signal
from vmm_kvm.loop import EventLoop
from vmm_kvm.machine.machine import Machine
from vmm_kvm.machine.spec import MachineSpec, Outcome
from vmm_kvm.machine.state import MachineState, restore, save
from vmm_kvm.primitives import Vmm

pytestmark = pytest.mark.kvm

NANOSECONDS = 1_000_000_000
DEADLINE_S = 20


@dataclass
class Bench:
    """Machines one after the other on one loop; their output is one text."""

    vmm: Vmm
    loop: EventLoop
    spec: MachineSpec
    output: bytearray = field(default_factory=bytearray)
    outcomes: list[Outcome] = field(default_factory=list)

    @contextmanager
    def machine(self, *, is_restored: bool = False) -> Iterator[Machine]:
        """Build a machine of the specification."""
        with Machine(
            self.spec,
            self.vmm,
            self.loop,
            transmit=self.output.extend,
            on_receive_room=lambda: None,
            on_outcome=self.outcomes.append,
            is_restored=is_restored,
        ) as machine:
            yield machine

    def run_until(self, condition: Callable[[], bool]) -> bool:
        """Run the loop until `condition` holds; False if it does not in time."""
        end_ns = self.loop.monotonic_ns() + DEADLINE_S * NANOSECONDS

        def look() -> None:
            if condition() or self.loop.monotonic_ns() >= end_ns:
                self.loop.stop()
            else:
                timer.arm(self.loop.monotonic_ns() + 2_000_000)

        timer = self.loop.timer(look)
        timer.arm(0)
        self.loop.run()
        return condition()

    def says(self, text: bytes) -> bool:
        """Run the loop until the guest has printed `text`."""
        return self.run_until(lambda: text in self.output)


@contextmanager
def bench(cpus: int = 1) -> Iterator[Bench]:
    """Make a bench for machines with the self-test guest."""
    install_kick_signal()
    spec = MachineSpec(
        image=open_image(str(selftest_path())), memory_size=16 * MIB, cpus=cpus, name="bench"
    )
    with Kvm() as kvm, Vmm(kvm) as vmm, EventLoop() as loop:
        yield Bench(vmm, loop, spec)


def take(machine: Machine) -> tuple[MachineState, list[bytes]]:
    """Pause a machine; return its state, after a trip through JSON, and its memory."""
    machine.pause()
    state = save(machine)
    memory = [machine.memory.read(region.gpa, region.size) for region in machine.memory.regions]
    return state._replace(parts=json.loads(json.dumps(state.parts))), memory


def give(machine: Machine, state: MachineState, memory: list[bytes]) -> None:
    """Let a machine continue from there."""
    for region, data in zip(machine.memory.regions, memory, strict=True):
        machine.memory.write(region.gpa, data)
    restore(machine, state)
    machine.start()
    machine.resume()


@pytest.mark.parametrize("cpus", [1, 2, 4])
def test_a_guest_goes_on_in_a_new_machine(cpus: int) -> None:
    """The guest counts on from its state, and obeys keys."""
    with bench(cpus) as stand:
        with stand.machine() as first:
            first.start()
            assert stand.says(b"selftest: ready")
            first.uart.receive(b"n")
            assert stand.says(b"\n2\r\n")
            state, memory = take(first)
        printed = len(stand.output)
        with stand.machine(is_restored=True) as second:
            give(second, state, memory)
            assert stand.says(b"\n4\r\n")
            assert bytes(stand.output[printed:]).split()[:2] == [b"3", b"4"]
            second.uart.receive(b"p")
            assert stand.run_until(lambda: bool(stand.outcomes))
