"""vCPUs: every piece of state there and back, every kind of exit, kicks, debugging, NMIs."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from errno import EINVAL
from pathlib import Path
from typing import Self

import pytest

from tests import guests
from tests.guests import guest
from vmm_kvm.arch.x86.cpuid import KVM_CPUID_SIGNATURE, guest_cpuid
from vmm_kvm.arch.x86.entry import RESET_VECTOR
from vmm_kvm.arch.x86.entry_state import load_entry
from vmm_kvm.errors import KvmError, VmmError
from vmm_kvm.kvm import abi
from vmm_kvm.kvm.exits import (
    Debug,
    Exit,
    Hlt,
    InternalError,
    Interrupted,
    IoExit,
    IrqWindowOpen,
    MmioExit,
    Shutdown,
)
from vmm_kvm.kvm.system import Kvm
from vmm_kvm.kvm.vcpu import KICK_SIGNAL, Vcpu, install_kick_signal

pytestmark = pytest.mark.kvm

MSR_IA32_APICBASE = 0x1B
MSR_SYSENTER_CS = 0x174
MSR_SYSENTER_EIP = 0x176
MSR_NOBODY_HAS = 0x1234_5678
APICBASE_ENABLE = 1 << 11
XCR0_X87 = 1
DEADLINE_S = 20.0


@pytest.fixture
def vcpu() -> Iterator[Vcpu]:
    """A vCPU with a local APIC and the host's CPUID, in its reset state."""
    with Kvm() as kvm, kvm.create_vm() as vm:
        vm.create_irqchip()
        with vm.create_vcpu(0) as made:
            made.set_cpuid(guest_cpuid(kvm.supported_cpuid(), 0, 1))
            yield made


@pytest.fixture
def kick_signal() -> Iterator[None]:
    """The handler that kicks need, for one test."""
    before = signal.getsignal(KICK_SIGNAL)
    install_kick_signal()
    yield
    signal.signal(KICK_SIGNAL, before)


# State


def test_regs(vcpu: Vcpu) -> None:
    """General registers, each with another value, read back as set."""
    regs = abi.kvm_regs(*range(0x1_0000_0001, 0x1_0000_0011), 0x1234, 2)
    vcpu.set_regs(regs)
    assert bytes(regs) == bytes(vcpu.get_regs())
    assert vcpu.get_regs().r15 == 0x1_0000_0010


def test_sregs(vcpu: Vcpu) -> None:
    """Segments, tables and control registers read back as set."""
    sregs = vcpu.get_sregs()
    sregs.ds.base, sregs.ds.selector = 0x1230, 0x123
    sregs.gdt.base, sregs.gdt.limit = 0x5000, 0x7F
    sregs.cr2, sregs.cr3 = 0x1111, 0x2000
    vcpu.set_sregs(sregs)
    assert bytes(sregs) == bytes(vcpu.get_sregs())


def test_invalid_sregs_are_refused(vcpu: Vcpu) -> None:
    """KVM refuses paging without protection."""
    sregs = vcpu.get_sregs()
    sregs.cr0 = 1 << 31
    with pytest.raises(KvmError) as caught:
        vcpu.set_sregs(sregs)
    assert str(caught.value) == "KVM_SET_SREGS: Invalid argument"


def test_fpu(vcpu: Vcpu) -> None:
    """The x87 control word and an SSE register read back as set."""
    fpu = vcpu.get_fpu()
    fpu.fcw = 0x27F
    fpu.xmm[3][:] = range(16)
    vcpu.set_fpu(fpu)
    after = vcpu.get_fpu()
    assert (after.fcw, bytes(after.xmm[3])) == (0x27F, bytes(range(16)))


def test_xsave(vcpu: Vcpu) -> None:
    """The whole XSAVE area, of KVM's size, reads back as set."""
    fcw, xmm5, header = 0, 160 + 5 * 16, 512
    state = vcpu.get_xsave()
    raw = bytearray(bytes(state))
    raw[fcw : fcw + 2] = (0x27F).to_bytes(2, "little")
    raw[xmm5 : xmm5 + 16] = bytes(range(1, 17))
    raw[header] |= 3  # x87 and SSE are not in their initial state
    changed = type(state).from_buffer(raw)
    vcpu.set_xsave(changed)
    after = bytes(vcpu.get_xsave())
    assert after[xmm5 : xmm5 + 16] == bytes(range(1, 17))
    assert ctypes.sizeof(state) >= 4096
    assert bytes(vcpu.get_fpu().xmm[5]) == bytes(range(1, 17))


def test_short_xsave_is_refused(vcpu: Vcpu) -> None:
    """A buffer that is too small for the kernel's read is refused before the call."""
    with pytest.raises(ValueError, match="XSAVE state of 520 bytes"):
        vcpu.set_xsave(abi.kvm_irqchip())


def test_xcrs(vcpu: Vcpu) -> None:
    """XCR0 can be set to x87 state alone."""
    xcrs = vcpu.get_xcrs()
    assert xcrs.nr_xcrs == 1
    xcrs.xcrs[0].value = XCR0_X87
    vcpu.set_xcrs(xcrs)
    assert vcpu.get_xcrs().xcrs[0].value == XCR0_X87


def test_msrs(vcpu: Vcpu) -> None:
    """Model-specific registers read back as set; those that KVM lacks are left out."""
    vcpu.set_msrs({MSR_SYSENTER_CS: 0x10, MSR_SYSENTER_EIP: 0xFFFF_8000_0000_1000})
    indices = [MSR_SYSENTER_CS, MSR_NOBODY_HAS, MSR_SYSENTER_EIP]
    expected = {MSR_SYSENTER_CS: 0x10, MSR_SYSENTER_EIP: 0xFFFF_8000_0000_1000}
    assert expected == vcpu.get_msrs(indices)


def test_all_msrs_go_there_and_back(vcpu: Vcpu) -> None:
    """The values of all state-holding MSRs can be set again, and read back the same."""
    with Kvm() as kvm:
        indices = kvm.msr_indices()
    values = vcpu.get_msrs(indices)
    vcpu.set_msrs(values)
    moving = {0x10, 0x3B, 0x4B56_4D00, 0x4B56_4D01, 0x11, 0x12}  # the TSC and kvmclock advance
    assert {i: v for i, v in values.items() if i not in moving} == {
        i: v for i, v in vcpu.get_msrs(indices).items() if i not in moving
    }


def test_refused_msr_is_named(vcpu: Vcpu) -> None:
    """The error for an MSR that cannot be set names it, with its value."""
    with pytest.raises(KvmError) as caught:
        vcpu.set_msrs({MSR_SYSENTER_CS: 1, MSR_NOBODY_HAS: 2})
    text = "KVM_SET_MSRS: Invalid argument (MSR 0x12345678 cannot be 0x2)"
    assert str(caught.value) == text


def test_more_msrs_than_one_call_takes(vcpu: Vcpu) -> None:
    """Long lists are split; repeated indices yield one value."""
    assert vcpu.get_msrs([MSR_SYSENTER_CS] * 600) == {MSR_SYSENTER_CS: 0}
    assert vcpu.get_msrs([MSR_NOBODY_HAS + i for i in range(300)]) == {}
    assert vcpu.get_msrs([]) == {}


def test_lapic(vcpu: Vcpu) -> None:
    """The local APIC's registers, with a changed task priority, read back as set."""
    task_priority = 0x80
    lapic = vcpu.get_lapic()
    lapic.regs[task_priority] = 0x50
    vcpu.set_lapic(lapic)
    assert vcpu.get_lapic().regs[task_priority] == 0x50


def test_vcpu_events(vcpu: Vcpu) -> None:
    """A pending NMI and the NMI mask read back as set."""
    events = vcpu.get_vcpu_events()
    events.nmi.pending, events.nmi.masked = 1, 1
    events.flags |= abi.KVM_VCPUEVENT_VALID_NMI_PENDING
    vcpu.set_vcpu_events(events)
    after = vcpu.get_vcpu_events()
    assert (after.nmi.pending, after.nmi.masked) == (1, 1)


def test_debugregs(vcpu: Vcpu) -> None:
    """DR0 to DR3, and DR7 with its fixed bit, read back as set."""
    debugregs = vcpu.get_debugregs()
    debugregs.db[:] = [0x1000, 0x2000, 0x3000, 0x4000]
    debugregs.dr7 = 0x402
    vcpu.set_debugregs(debugregs)
    assert bytes(debugregs) == bytes(vcpu.get_debugregs())


@pytest.mark.parametrize("state", [abi.KVM_MP_STATE_HALTED, abi.KVM_MP_STATE_RUNNABLE])
def test_mp_state(vcpu: Vcpu, state: int) -> None:
    """A vCPU's state can be set to halted and to runnable."""
    vcpu.set_mp_state(state)
    assert state == vcpu.get_mp_state()


def test_cpuid(vcpu: Vcpu) -> None:
    """CPUID keeps topology and signature; KVM updates other bits, and drops zeros."""
    with Kvm() as kvm:
        entries = {(e.function, e.subleaf): e for e in guest_cpuid(kvm.supported_cpuid(), 0, 4)}
    vcpu.set_cpuid(list(entries.values()))
    after = {(e.function, e.subleaf): e for e in vcpu.get_cpuid()}
    assert set(after) <= set(entries)
    assert entries[1, 0].ebx == after[1, 0].ebx
    for key in ((0, 0), (0xB, 0), (0xB, 1), (KVM_CPUID_SIGNATURE, 0)):
        assert entries[key] == after[key]


def test_tsc_khz(vcpu: Vcpu) -> None:
    """The TSC's rate can be read; setting the host's own again is always possible."""
    khz = vcpu.get_tsc_khz()
    assert khz > 100_000
    vcpu.set_tsc_khz(khz)
    assert khz == vcpu.get_tsc_khz()


def test_kvmclock_ctrl_needs_a_clock(vcpu: Vcpu) -> None:
    """KVM refuses to tell a guest without kvmclock that it was paused."""
    with pytest.raises(KvmError) as caught:
        vcpu.kvmclock_ctrl()
    assert caught.value.errno == EINVAL


def test_translate() -> None:
    """Without paging, linear addresses are physical ones."""
    with guest(guests.HALT) as g:
        assert g.vcpu.translate(guests.CODE) == guests.CODE


def test_load_entry_keeps_the_apic(vcpu: Vcpu) -> None:
    """An Entry sets its registers and leaves the local APIC unchanged."""
    load_entry(vcpu, RESET_VECTOR)
    sregs = vcpu.get_sregs()
    assert sregs.apic_base & APICBASE_ENABLE
    assert (sregs.cs.base, sregs.cs.selector) == (0xFFFF_0000, 0xF000)
    assert vcpu.get_regs().rip == 0xFFF0


# Exits


def test_port_writes() -> None:
    """OUT of one, two and four bytes is an exit with the value."""
    with guest(guests.WRITE_PORT) as g:
        seen = []
        while isinstance(reason := g.vcpu.run(), IoExit):
            assert reason.is_write
            assert bytes(reason.data) == reason.value.to_bytes(reason.size, "little")
            seen.append((reason.port, reason.size, reason.count, reason.value))
        assert isinstance(reason, Hlt)
        port = guests.PORT
        assert [(port, 1, 1, 0x5A), (port, 2, 1, 0x1234), (port, 4, 1, 0x1234_5678)] == seen


def test_port_reads() -> None:
    """IN reads the exit's answer."""
    with guest(guests.READ_PORT) as g:
        for size, answer in ((1, 0xA5), (4, 0xCAFE_BABE)):
            reason = g.vcpu.run()
            assert isinstance(reason, IoExit)
            assert (reason.is_write, reason.size) == (False, size)
            reason.value = answer
        assert isinstance(g.vcpu.run(), Hlt)
        regs = g.vcpu.get_regs()
        assert (regs.rax & 0xFFFF_FFFF, regs.rbx & 0xFF) == (0xCAFE_BABE, 0xA5)


def test_string_io() -> None:
    """REP OUTS and REP INS move all items, in any number of exits."""
    with guest(guests.STRING_IO) as g:
        g.put(guests.STRING_SOURCE, b"ping")
        sent, answers = bytearray(), bytearray(b"pong")
        while isinstance(reason := g.vcpu.run(), IoExit):
            if reason.is_write:
                sent += reason.data
            else:
                size = len(reason.data)
                reason.data[:], answers = answers[:size], answers[size:]
        assert isinstance(reason, Hlt)
        assert sent == b"ping"
        assert g.ram[guests.STRING_TARGET : guests.STRING_TARGET + 4] == b"pong"


def test_mmio() -> None:
    """Writes and reads of unmapped memory are MMIO exits."""
    with guest(guests.ACCESS_MMIO) as g:
        for address, size, value in ((0x10, 4, 0xDEAD_BEEF), (0x14, 1, 0x77)):
            reason = g.vcpu.run()
            assert isinstance(reason, MmioExit)
            assert (reason.is_write, reason.address) == (1, guests.MMIO + address)
            assert (reason.size, reason.value) == (size, value)
            assert bytes(reason.data) == value.to_bytes(size, "little")
        reason = g.vcpu.run()
        assert isinstance(reason, MmioExit)
        assert (reason.is_write, reason.address, reason.size) == (0, guests.MMIO + 0x20, 4)
        reason.value = 0x0102_0304
        assert isinstance(g.vcpu.run(), Hlt)
        assert g.vcpu.get_regs().rax & 0xFFFF_FFFF == 0x0102_0304


def test_exits_are_the_same_objects() -> None:
    """An exit allocates nothing: each kind has one object, which shows the latest."""
    with guest(guests.WRITE_PORT) as g:
        first = g.vcpu.run()
        second = g.vcpu.run()
        assert first is second
        assert first is g.vcpu.io_exit
        assert isinstance(second, IoExit)
        word = second.words[0].to_bytes(8, "little")
        assert word[:2] == bytes((second.direction, second.size))
        assert word[2:4] == second.port.to_bytes(2, "little")
        assert word[4:] == second.count.to_bytes(4, "little")


def test_odd_mmio_values() -> None:
    """Three bytes, part of an access across a page, are one little-endian number."""
    with guest(guests.ACCESS_MMIO) as g:
        reason = g.vcpu.run()
        assert isinstance(reason, MmioExit)
        reason.len = 3
        reason.value = 0x03_0201
        assert (reason.value, bytes(reason.data)) == (0x03_0201, b"\1\2\3")


def test_shutdown() -> None:
    """A triple fault leaves as Shutdown."""
    with guest(guests.TRIPLE_FAULT) as g:
        assert isinstance(g.vcpu.run(), Shutdown)


def test_internal_error() -> None:
    """KVM cannot emulate code that runs where there is no memory: an internal error."""
    with guest(guests.HALT) as g:
        guests.start(g.vcpu, 0)
        sregs = g.vcpu.get_sregs()
        sregs.cs.base = guests.MMIO
        g.vcpu.set_sregs(sregs)
        reason = g.vcpu.run()
        assert isinstance(reason, InternalError)
        assert reason.suberror == abi.KVM_INTERNAL_ERROR_EMULATION
        assert len(reason.words) <= 16
        assert len(reason.instruction) <= 15


def test_interrupt_window() -> None:
    """Without an irqchip the user injects interrupts, once the guest can take them."""
    with guest(guests.WAIT_FOR_INTERRUPT + guests.SPIN) as g:
        g.put(guests.INTERRUPT_HANDLER, guests.INTERRUPT_REPORT)
        g.set_vector(guests.INTERRUPT_VECTOR, guests.INTERRUPT_HANDLER)
        g.vcpu.kvm_run.request_interrupt_window = 1
        while not g.vcpu.kvm_run.ready_for_interrupt_injection:
            assert isinstance(g.vcpu.run(), IrqWindowOpen | Hlt)
        g.vcpu.kvm_run.request_interrupt_window = 0
        g.vcpu.interrupt(guests.INTERRUPT_VECTOR)
        reason = g.vcpu.run()
        assert isinstance(reason, IoExit)
        assert reason.value == guests.INTERRUPT_VECTOR


def test_interrupt_needs_no_irqchip(vcpu: Vcpu) -> None:
    """With an irqchip, interrupts come by lines and messages only; a vector has eight bits."""
    with pytest.raises(KvmError) as caught:
        vcpu.interrupt(0x20)
    assert caught.value.operation == "KVM_INTERRUPT"
    with guest(guests.HALT) as g, pytest.raises(KvmError) as caught:
        g.vcpu.interrupt(256)
    assert caught.value.errno == EINVAL


# Debugging and NMIs


def test_single_step() -> None:
    """Single-stepping exits after each instruction, until it is switched off."""
    with guest(guests.NOPS) as g:
        g.vcpu.set_guest_debug(abi.KVM_GUESTDBG_ENABLE | abi.KVM_GUESTDBG_SINGLESTEP)
        seen = []
        for _ in range(3):
            reason = g.vcpu.run()
            assert isinstance(reason, Debug)
            assert reason.exception == abi.DB_VECTOR
            seen.append(reason.pc)
        assert seen == [guests.CODE + step for step in (1, 2, 3)]
        g.vcpu.set_guest_debug(0)
        assert isinstance(g.vcpu.run(), Hlt)


def test_hardware_breakpoint() -> None:
    """A breakpoint in DR0 exits at its address."""
    with guest(guests.NOPS) as g:
        control = abi.KVM_GUESTDBG_ENABLE | abi.KVM_GUESTDBG_USE_HW_BP
        g.vcpu.set_guest_debug(control, (guests.CODE + 2, 0, 0, 0, 0, 0, 0, 0x402))
        reason = g.vcpu.run()
        assert isinstance(reason, Debug)
        assert reason.pc == guests.CODE + 2
        assert reason.dr6 & 1


def test_nmi() -> None:
    """An NMI runs the guest's handler although interrupts are off."""
    with guest(guests.SPIN) as g:
        g.put(guests.NMI_HANDLER, guests.NMI_REPORT)
        g.set_vector(2, guests.NMI_HANDLER)
        g.vcpu.nmi()
        reason = g.vcpu.run()
        assert isinstance(reason, IoExit)
        assert reason.value == 2


# Kicks


class _Runner:
    """A thread that runs a vCPU until it has been interrupted once."""

    def __init__(self, vcpu: Vcpu, *, before: Callable[[], object] = lambda: None) -> None:
        self.entered = threading.Event()
        self.seen: list[Exit] = []
        self._vcpu = vcpu
        self._before = before
        self.thread = threading.Thread(target=self._run)

    def _run(self) -> None:
        self._before()
        self.entered.set()
        self.seen.append(self._vcpu.run())

    def __enter__(self) -> Self:
        self.thread.start()
        assert self.entered.wait(DEADLINE_S)
        return self

    def __exit__(self, *_exc: object) -> None:
        self._vcpu.kick()
        self.thread.join(DEADLINE_S)
        assert not self.thread.is_alive()


@pytest.mark.usefixtures("kick_signal")
@pytest.mark.parametrize("irqchip", [False, True])
def test_kick_ends_a_spinning_guest(irqchip: bool) -> None:
    """A kick from another thread interrupts a guest that never exits by itself."""
    with guest(guests.SPIN, irqchip=irqchip) as g:
        with _Runner(g.vcpu) as runner:
            pass
        assert [Interrupted] == [type(reason) for reason in runner.seen]


@pytest.mark.usefixtures("kick_signal")
def test_kick_ends_a_halted_guest() -> None:
    """A kick interrupts a vCPU that sleeps in the kernel."""
    with guest(guests.HALT, irqchip=True) as g:
        with _Runner(g.vcpu) as runner:
            pass
        assert [Interrupted] == [type(reason) for reason in runner.seen]


@pytest.mark.usefixtures("kick_signal")
def test_kick_before_the_first_run() -> None:
    """A kick that comes too early ends the next run, and every later one until it is cleared."""
    with guest(guests.HALT) as g:
        g.vcpu.kick()
        assert isinstance(g.vcpu.run(), Interrupted)
        assert isinstance(g.vcpu.run(), Interrupted)
        g.vcpu.clear_immediate_exit()
        assert isinstance(g.vcpu.run(), Hlt)


@pytest.mark.usefixtures("kick_signal")
def test_kicks_are_never_lost() -> None:
    """Kicks at any moment of many short runs end each run that would spin for ever."""
    rounds = 200
    with guest(guests.SPIN) as g:
        turns = threading.Semaphore(0)
        seen: list[Exit] = []

        def spin() -> None:
            for _ in range(rounds):
                turns.release()
                seen.append(g.vcpu.run())
                g.vcpu.clear_immediate_exit()

        thread = threading.Thread(target=spin)
        thread.start()
        for _ in range(rounds):
            assert turns.acquire(timeout=DEADLINE_S)
            g.vcpu.kick()
        while thread.is_alive():  # a kick that fell between two rounds was cleared by the first
            g.vcpu.kick()
            thread.join(0.01)
        assert {Interrupted} == {type(reason) for reason in seen}
        assert len(seen) == rounds


@pytest.mark.usefixtures("kick_signal")
def test_another_thread_takes_over() -> None:
    """After `bind_thread` a kick finds the new thread."""
    with guest(guests.SPIN) as g:
        g.vcpu.kick()
        assert isinstance(g.vcpu.run(), Interrupted)
        g.vcpu.clear_immediate_exit()
        with _Runner(g.vcpu, before=g.vcpu.bind_thread) as runner:
            pass
        assert [Interrupted] == [type(reason) for reason in runner.seen]


@pytest.mark.usefixtures("kick_signal")
def test_kick_after_the_thread_has_ended() -> None:
    """Kicking a vCPU whose thread is gone, or that is closed, does nothing."""
    with guest(guests.HALT) as g:
        thread = threading.Thread(target=g.vcpu.run)
        thread.start()
        thread.join()
        g.vcpu.kick()
        g.vcpu.close()
        g.vcpu.kick()
    g.vcpu.kick()


def test_kick_without_a_handler(vcpu: Vcpu) -> None:
    """Without its handler the signal would end the process, so a kick does not send it."""
    before = signal.signal(KICK_SIGNAL, signal.SIG_DFL)
    try:
        with pytest.raises(VmmError, match=r"kick: install_kick_signal\(\) has not been called"):
            vcpu.kick()
    finally:
        signal.signal(KICK_SIGNAL, before)


def test_signal_mask() -> None:
    """A signal that is blocked only outside ends a run; one that is blocked only inside waits."""
    code = """
import signal
from tests import guests
from vmm_kvm.kvm.exits import Hlt, Interrupted
from vmm_kvm.kvm.vcpu import KICK_SIGNAL, install_kick_signal
install_kick_signal()
signal.pthread_sigmask(signal.SIG_BLOCK, {KICK_SIGNAL})
signal.raise_signal(KICK_SIGNAL)
with guests.guest(guests.HALT) as g:
    g.vcpu.set_signal_mask([])
    first = type(g.vcpu.run())
    g.vcpu.set_signal_mask(None)
    second = type(g.vcpu.run())
print(first is Interrupted, second is Hlt)
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        check=True,
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
        timeout=60,
    )
    assert done.stdout == "True True\n"


def test_closed_vcpu_cannot_run(vcpu: Vcpu) -> None:
    """Running a closed vCPU raises an error, closing it again does not."""
    vcpu.close()
    vcpu.close()
    with pytest.raises(KvmError) as caught:
        vcpu.run()
    assert str(caught.value) == "KVM_RUN: Bad file descriptor"


def test_application_processors_wait() -> None:
    """A kick interrupts a vCPU that waits for its start-up IPI."""
    before = signal.getsignal(KICK_SIGNAL)
    install_kick_signal()
    with contextlib.ExitStack() as stack:
        stack.callback(signal.signal, KICK_SIGNAL, before)
        kvm = stack.enter_context(Kvm())
        vm = stack.enter_context(kvm.create_vm())
        vm.create_irqchip()
        stack.enter_context(vm.create_vcpu(0))
        second = stack.enter_context(vm.create_vcpu(1))
        assert second.get_mp_state() == abi.KVM_MP_STATE_UNINITIALIZED
        with _Runner(second) as runner:
            pass
        assert [Interrupted] == [type(reason) for reason in runner.seen]
