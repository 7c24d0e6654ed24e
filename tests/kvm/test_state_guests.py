"""Guests continue in another process: halted, with timers, with IPIs, within an access."""

from __future__ import annotations

import random
import time
from functools import partial
from pathlib import Path

import pytest

from tests import guests
from tests.counting_guest import (
    Counters,
    Stand,
    counting_guest,
    give,
    in_new_process,
    take,
)
from vmm_kvm.arch.x86.kvm_state import ClockPolicy
from vmm_kvm.kvm import abi
from vmm_kvm.kvm.system import Kvm
from vmm_kvm.machine.state import MachineState, restore, save

pytestmark = pytest.mark.kvm

APIC_IRR = 0x200
IPI_VECTOR = 0x21


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """The counting guest."""
    path = tmp_path / "counting.bin"
    path.write_bytes(counting_guest())
    return path


@pytest.mark.parametrize("cpus", [1, 2, 4])
def test_a_guest_goes_on_in_a_new_process(image: Path, cpus: int) -> None:
    """TSC deadlines, IPIs, halted processors and port accesses lose nothing in a new process."""
    stand = Stand(image, cpus)
    with stand.machine() as machine:
        machine.start()
        stand.wait(machine, lambda now: now.others == cpus - 1 and now.sent > 3)
        saved = take(machine)
        stopped = Counters.of(machine)

    def go_on() -> None:
        with stand.machine(is_restored=True) as machine:
            give(machine, saved)
            stand.wait(machine, lambda now: now.is_past(stopped))
            assert not stand.outcomes

    assert in_new_process(go_on) == 0


@pytest.mark.parametrize("cpus", [1, 2])
def test_cycles(image: Path, cpus: int) -> None:
    """A guest survives one cycle after the other, at any moment."""
    chance = random.Random(cpus)
    stand = Stand(image, cpus)
    with stand.machine() as machine:
        machine.start()
        stand.wait(machine, lambda now: now.others == cpus - 1 and now.sent > 1)
        saved, stopped = take(machine), Counters.of(machine)
    for _ in range(12):
        with stand.machine(is_restored=True) as machine:
            give(machine, saved)
            stand.wait(machine, partial(_is_past, stopped))
            time.sleep(chance.random() / 100)
            saved, stopped = take(machine), Counters.of(machine)
            assert not stand.outcomes


def _is_past(before: Counters, now: Counters) -> bool:
    return now.is_past(before)


def test_a_state_is_the_same_again(image: Path) -> None:
    """Saving changes nothing, and the restored state equals the saved one, to the last register."""
    stand = Stand(image, 2)
    with stand.machine() as machine:
        machine.start()
        stand.wait(machine, lambda now: now.sent > 1)
        saved = take(machine)
        again = save(machine)
    with stand.machine(is_restored=True) as machine:
        machine.memory.write(0, saved[1])
        restore(machine, saved[0])
        restored = save(machine)
    for other in (again, restored):
        assert _without_time(saved[0]) == _without_time(other)


def _without_time(state: MachineState) -> dict[str, object]:
    """Return the parts that do not change while a guest is paused."""
    times = {"clock", "rtc", "acpi_pm", "pit"}
    parts = {
        name: {key: value for key, value in part.items() if key != "tsc_offset"}
        for name, part in state.parts.items()
        if name not in times
    }
    moving = {"msrs", "lapic"}  # the TSC, and the timer's current count
    blobs = {
        name: blob
        for name, blob in state.blobs.items()
        if name.split("/")[0] not in times and name.split("/")[1] not in moving
    }
    return {**parts, **blobs}


# Reports through COM1's scratch register, which a test can read without an exit.
_PENDING_IPI = b"".join(
    (
        bytes.fromhex("fa"),  # cli
        bytes.fromhex("31c0"),  # xor %ax, %ax
        bytes.fromhex("8ed8"),  # mov %ax, %ds
        bytes.fromhex("8ed0"),  # mov %ax, %ss
        bytes.fromhex("bc0070"),  # mov $0x7000, %sp
        bytes.fromhex("c70684005e00"),  # movw $handler, 0x84
        bytes.fromhex("c706860000f0"),  # movw $0xf000, 0x86
        guests.ENABLE_X2APIC,
        bytes.fromhex("66b930080000"),  # mov $0x830, %ecx
        bytes.fromhex("66b821000400"),  # mov $0x40021, %eax: to itself
        bytes.fromhex("0f30"),  # wrmsr
        bytes.fromhex("c606003001"),  # movb $1, 0x3000: it is pending
        bytes.fromhex("803e043001"),  # 1: cmpb $1, 0x3004
        bytes.fromhex("75f9"),  # jne 1b
        bytes.fromhex("fb"),  # sti
        bytes.fromhex("ebfe"),  # jmp .
        bytes.fromhex("c606083001"),  # handler: movb $1, 0x3008
        bytes.fromhex("ebfe"),  # jmp .
    )
)
_HANDLER = _PENDING_IPI.rindex(bytes.fromhex("c606083001"))


def test_an_ipi_that_is_pending(tmp_path: Path) -> None:
    """A pending interrupt is taken in the new process, once the guest allows it."""
    path = tmp_path / "ipi.bin"
    code = bytearray(_PENDING_IPI)
    at = code.index(bytes.fromhex("c7068400")) + 4
    code[at : at + 2] = _HANDLER.to_bytes(2, "little")
    path.write_bytes(guests.firmware(bytes(code)))
    stand = Stand(path, 1)
    with stand.machine() as machine:
        machine.start()
        stand.wait(machine, lambda now: now.rounds == 1)
        saved = take(machine)
    register = APIC_IRR + (IPI_VECTOR // 32) * 0x10
    irr = int.from_bytes(saved[0].blobs["vcpu0/lapic"][register : register + 4], "little")
    assert irr >> IPI_VECTOR % 32 & 1

    def go_on() -> None:
        with stand.machine(is_restored=True) as machine:
            give(machine, saved)
            machine.memory.write(0x3004, b"\1")
            stand.wait(machine, lambda now: now.ticks == 1)

    assert in_new_process(go_on) == 0


def test_a_halted_processor(image: Path) -> None:
    """Processors that wait for IPIs are saved as halted, and the next IPI wakes them."""
    stand = Stand(image, 4)
    with stand.machine() as machine:
        machine.start()
        stand.wait(machine, lambda now: now.others == 3 and now.sent > 3)
        states = []
        for _ in range(100):  # until no IPI is on its way
            machine.pause()
            state = save(machine)
            machine.resume()
            states += [state.parts[f"vcpu{index}"]["mp_state"] for index in range(1, 4)]
            if abi.KVM_MP_STATE_HALTED in states:
                break
        assert abi.KVM_MP_STATE_HALTED in states


@pytest.mark.parametrize(
    ("policy", "least_s", "most_s"), [(ClockPolicy.FROZEN, 0, 1.5), (ClockPolicy.NOW, 2, 9)]
)
def test_time(image: Path, policy: ClockPolicy, least_s: float, most_s: float) -> None:
    """The TSC and kvmclock continue from the saved values, or from those plus the time between."""
    stand = Stand(image, 1)
    with stand.machine() as machine:
        machine.start()
        before = stand.wait(machine, lambda now: now.ticks > 1)
        saved = take(machine)
    time.sleep(2)
    with stand.machine(is_restored=True) as machine:
        give(machine, saved, policy)
        stand.wait(machine, lambda now: now.is_past(before))
        later = take(machine)[0]
    clocks = [_number(state.parts["clock"]["clock_ns"]) for state in (saved[0], later)]
    assert least_s <= (clocks[1] - clocks[0]) / 1e9 < most_s
    tscs = [_tsc(state) for state in (saved[0], later)]
    if _can_move_tsc() and saved[0].parts["clock"]["host_tsc"] is not None:
        khz = _number(saved[0].parts["vcpu0"]["tsc_khz"])
        assert least_s <= (tscs[1] - tscs[0]) / (khz * 1000) < most_s


def _can_move_tsc() -> bool:
    """Tell whether this KVM gives guests a TSC of their own; one that emulates guests does not."""
    with Kvm() as kvm, kvm.create_vm() as vm:
        vm.create_irqchip()
        with vm.create_vcpu(0) as vcpu:
            offset = vcpu.get_tsc_offset() ^ 1 << 40
            vcpu.set_tsc_offset(offset)
            return vcpu.get_tsc_offset() == offset


def _number(value: object) -> int:
    assert isinstance(value, int)
    return value


def _tsc(state: MachineState) -> int:
    """Return IA32_TSC as it was read."""
    msrs = state.blobs["vcpu0/msrs"]
    for at in range(0, len(msrs), 16):
        if int.from_bytes(msrs[at : at + 4], "little") == 0x10:
            return int.from_bytes(msrs[at + 8 : at + 16], "little")
    raise AssertionError("no TSC")
