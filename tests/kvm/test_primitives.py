"""vmm(4)'s operations on the host's KVM: their effects, their refusals, their waits."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest

from tests import guests
from tests.kvm.primitive_guests import Ram, Runner, create, entry, mapped, state
from vmm_kvm import primitives
from vmm_kvm.arch.x86.registers import (
    ALL_GROUPS,
    MSR_EFER,
    MSR_LSTAR,
    RegisterGroup,
    SegmentRegister,
)
from vmm_kvm.errors import Refusal, RefusedError
from vmm_kvm.kvm.exits import Exit, Hlt, IoExit, IrqWindowOpen, MmioExit, Shutdown
from vmm_kvm.kvm.system import Kvm
from vmm_kvm.kvm.vcpu import KICK_SIGNAL, Vcpu, install_kick_signal
from vmm_kvm.primitives import (
    Inject,
    InjectType,
    NoHelpNeeded,
    RunResult,
    Terminated,
    VcpuState,
    Vmm,
)
from vmm_kvm.vm_params import Controllers, CreateParams, Mapping, MemoryRange, MemoryType

pytestmark = pytest.mark.kvm

WAIT = bytes.fromhex("fb90ebfd")  # sti; nop; 1: jmp 1b


@pytest.fixture
def vmm() -> Iterator[Vmm]:
    """An empty table, and the handler that kicks need."""
    before = signal.getsignal(KICK_SIGNAL)
    install_kick_signal()
    with Kvm() as kvm, Vmm(kvm) as made:
        yield made
    signal.signal(KICK_SIGNAL, before)
    mapped.clear()


def own_info(vmm: Vmm) -> list[primitives.VmInfo]:
    """Return `info`'s entries of this table alone."""
    return [vm for vm in primitives.info(vmm) if vm.id is not None]


def refusal(operation: Callable[[], object]) -> Refusal:
    """Return the reason for which `operation` is refused."""
    with pytest.raises(RefusedError) as caught:
        operation()
    assert "\n" not in str(caught.value)
    return caught.value.refusal


# create, info, terminate


def test_ids_only_grow(vmm: Vmm) -> None:
    """Ids start at 1, and no id is used twice."""
    ram = Ram()
    assert primitives.create(vmm, ram.params()) == 1
    assert primitives.create(vmm, ram.params()) == 2
    primitives.terminate(vmm, 2)
    assert primitives.create(vmm, ram.params()) == 3


def test_info(vmm: Vmm) -> None:
    """`info` lists VMs newest first, with sizes, vCPUs, process and name."""
    ram = Ram(1 << 20)
    ram.put(0, b"x" * 8192)
    ranges = [
        MemoryRange(0, ram.va, 0x8_0000),
        MemoryRange(0x8_0000, 0, 0x1000, MemoryType.MMIO),
        MemoryRange(0x10_0000, ram.va + 0x8_0000, 0x8_0000, MemoryType.RESERVED),
    ]
    primitives.create(vmm, CreateParams(ranges=ranges, ncpus=2, name="older"))
    primitives.create(vmm, ram.params(name="newer"))
    newer, older = own_info(vmm)
    assert [(newer.id, newer.name, newer.ncpus), (older.id, older.name, older.ncpus)] == [
        (2, "newer", 1),
        (1, "older", 2),
    ]
    assert (older.pid, older.memory_size) == (os.getpid(), 1 << 20)
    assert 8192 <= older.used_size < 1 << 20
    assert older.vcpu_states == (VcpuState.STOPPED, VcpuState.STOPPED)


def test_info_tells_other_programs(vmm: Vmm) -> None:
    """`info` finds a VM of another process, with name, vCPUs and memory; the doctor shows it."""
    code = """
import ctypes, mmap, sys
from vmm_kvm.kvm.system import Kvm
ram = mmap.mmap(-1, 64 << 20)
ram[: 32 << 20] = b"x" * (32 << 20)
with Kvm() as kvm, kvm.create_vm() as vm:
    vm.set_memory_region(0, 0, len(ram), ctypes.addressof(ctypes.c_char.from_buffer(ram)))
    with vm.create_vcpu(0), vm.create_vcpu(1):
        print("ready", flush=True)
        sys.stdin.read()
"""
    with subprocess.Popen(
        [sys.executable, "-c", code, "--name", "stranger"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
    ) as program:
        assert program.stdout is not None
        assert program.stdout.readline() == b"ready\n"
        found = [vm for vm in primitives.info(vmm) if vm.pid == program.pid]
        report = subprocess.run(
            [sys.executable, "-m", "vmctl", "doctor", "--json"],
            capture_output=True,
            check=False,
            cwd=Path(__file__).parents[2],
        )
        program.communicate()
    told = [line["detail"] for line in json.loads(report.stdout) if line["check"] == "vm"]
    assert any(line.startswith(f"stranger, process {program.pid}: 2 vCPUs, ") for line in told)
    assert [(vm.id, vm.name) for vm in found] == [(None, "stranger")]
    assert found[0].vcpu_states == (VcpuState.UNKNOWN, VcpuState.UNKNOWN)
    assert 64 << 20 <= found[0].memory_size < 128 << 20
    assert 32 << 20 <= found[0].used_size < 64 << 20


def test_create_refuses(vmm: Vmm) -> None:
    """Bad parameters are EINVAL; nothing is created, and the id is not used up."""
    ram = Ram()
    bad = (
        CreateParams(ranges=[]),
        CreateParams(ranges=[MemoryRange(1, ram.va, ram.size)]),
        ram.params(ncpus=0),
        ram.params(ncpus=65),
        ram.params(name="x" * 64),
    )
    for params in bad:
        assert refusal(partial(primitives.create, vmm, params)) is Refusal.EINVAL
    assert own_info(vmm) == []
    assert primitives.create(vmm, ram.params()) == 1


def test_room_for_512_vcpus(vmm: Vmm) -> None:
    """The table takes 512 vCPUs; one more is ENOMEM until a VM is gone."""
    ram = Ram()
    most = min(64, vmm.kvm.max_vcpus)
    if most < 64:
        pytest.skip("KVM here allows fewer than 64 vCPUs")
    for _ in range(8):
        primitives.create(vmm, ram.params(ncpus=64))
    assert refusal(lambda: primitives.create(vmm, ram.params())) is Refusal.ENOMEM
    primitives.terminate(vmm, 3)
    assert primitives.create(vmm, ram.params(ncpus=64)) == 9


def test_unknown_ids(vmm: Vmm) -> None:
    """Every operation on a missing VM or vCPU is ENOENT."""
    vm_id, _ = create(vmm, guests.HALT)
    registers = entry(vmm, vm_id)
    for wrong_vm, wrong_vcpu in ((99, 0), (0, 0), (vm_id, 1), (vm_id, -1)):
        where = (vmm, wrong_vm, wrong_vcpu)
        operations: list[Callable[[], object]] = [
            partial(primitives.run, *where),
            partial(primitives.reset_vcpu, *where, registers),
            partial(primitives.read_registers, *where),
            partial(primitives.write_registers, *where, registers),
            partial(primitives.interrupt, *where, level=True),
        ]
        assert {Refusal.ENOENT} == {refusal(operation) for operation in operations}
    assert {Refusal.ENOENT} == {
        refusal(lambda: primitives.terminate(vmm, 99)),
        refusal(lambda: primitives.pause(vmm, 99)),
        refusal(lambda: primitives.unpause(vmm, 99)),
    }


def test_terminate_a_stopped_vm(vmm: Vmm) -> None:
    """A terminated VM is gone, with all its descriptors."""
    before = len(os.listdir("/proc/self/fd"))  # noqa: PTH208 - a count is all there is to know
    vm_id, _ = create(vmm, guests.HALT, ncpus=2)
    primitives.terminate(vmm, vm_id)
    assert own_info(vmm) == []
    assert refusal(lambda: primitives.terminate(vmm, vm_id)) is Refusal.ENOENT
    assert len(os.listdir("/proc/self/fd")) == before  # noqa: PTH208 - same


def test_terminate_brings_running_vcpus_out(vmm: Vmm) -> None:
    """Running vCPUs return Terminated, and only then terminate returns."""
    vm_id, _ = create(vmm, guests.SPIN, ncpus=2)
    runners = [Runner(vmm, vm_id, vcpu_id) for vcpu_id in range(2)]
    primitives.terminate(vmm, vm_id)
    results = [runner.join() for runner in runners]
    assert [Terminated, Terminated] == [type(result.exit) for result in results]


def test_closing_the_table_terminates() -> None:
    """Leaving the table ends running VMs."""
    before = signal.getsignal(KICK_SIGNAL)
    install_kick_signal()
    with Kvm() as kvm:
        with Vmm(kvm) as vmm:
            vm_id, _ = create(vmm, guests.SPIN)
            runner = Runner(vmm, vm_id)
        assert isinstance(runner.join().exit, Terminated)
    signal.signal(KICK_SIGNAL, before)


def test_another_process_is_refused(vmm: Vmm) -> None:
    """A forked child may not touch its parent's VMs."""
    vm_id, ram = create(vmm, guests.HALT)
    child = os.fork()
    if child == 0:
        status = 1
        try:
            refusals = {
                refusal(lambda: primitives.create(vmm, ram.params())),
                refusal(lambda: primitives.run(vmm, vm_id, 0)),
                refusal(lambda: primitives.info(vmm)),
                refusal(lambda: primitives.terminate(vmm, vm_id)),
                refusal(vmm.close),
            }
            status = 0 if refusals == {Refusal.EPERM} else 1
        finally:
            os._exit(status)
    assert os.waitpid(child, 0)[1] == 0
    assert isinstance(primitives.run(vmm, vm_id, 0).exit, Hlt)


# run


def _kinds(vmm: Vmm, vm_id: int) -> list[type[Exit | Terminated | NoHelpNeeded]]:
    kinds = []
    while True:
        kinds.append(type(primitives.run(vmm, vm_id, 0).exit))
        if kinds[-1] in {Hlt, Shutdown}:
            return kinds


def test_exits(vmm: Vmm) -> None:
    """Port and memory accesses, HLT and a triple fault return as KVM's exits."""
    assert _kinds(vmm, create(vmm, guests.WRITE_PORT)[0]) == [IoExit, IoExit, IoExit, Hlt]
    assert _kinds(vmm, create(vmm, guests.ACCESS_MMIO)[0]) == [MmioExit, MmioExit, MmioExit, Hlt]
    assert _kinds(vmm, create(vmm, guests.TRIPLE_FAULT)[0]) == [Shutdown]


def test_a_running_vcpu_is_busy(vmm: Vmm) -> None:
    """A running or ended vCPU can be neither run nor reset."""
    vm_id, _ = create(vmm, guests.SPIN, ncpus=2)
    registers = entry(vmm, vm_id, 1)
    runner = Runner(vmm, vm_id)
    assert state(vmm, vm_id) is VcpuState.RUNNING
    assert refusal(lambda: primitives.run(vmm, vm_id, 0)) is Refusal.EBUSY
    assert refusal(lambda: primitives.reset_vcpu(vmm, vm_id, 0, registers)) is Refusal.EBUSY
    primitives.reset_vcpu(vmm, vm_id, 1, registers)
    primitives.terminate(vmm, vm_id)
    runner.join()


def _with_handlers(vmm: Vmm, code: bytes) -> int:
    vm_id, ram = create(vmm, code)
    ram.put(guests.INTERRUPT_HANDLER, guests.INTERRUPT_REPORT)
    ram.put(guests.NMI_HANDLER, guests.NMI_REPORT)
    for vector, handler in (
        (guests.INTERRUPT_VECTOR, guests.INTERRUPT_HANDLER),
        (2, guests.NMI_HANDLER),
        (6, guests.NMI_HANDLER),
    ):
        ram.put(4 * vector, handler.to_bytes(2, "little"))
    return vm_id


def _port_value(result: RunResult) -> int:
    assert isinstance(result.exit, IoExit)
    return result.exit.value


def test_interrupt_is_injected_when_ready(vmm: Vmm) -> None:
    """A vCPU with a pending interrupt exits once it can take one, and then takes it."""
    vm_id = _with_handlers(vmm, WAIT)
    result = primitives.run(vmm, vm_id, 0, intr_pending=True)
    assert isinstance(result.exit, IrqWindowOpen)
    assert result.irq_ready
    inject = Inject(InjectType.INTR, guests.INTERRUPT_VECTOR)
    assert _port_value(primitives.run(vmm, vm_id, 0, inject=inject)) == guests.INTERRUPT_VECTOR


def test_nmi_is_injected(vmm: Vmm) -> None:
    """An NMI is taken in any state of the guest."""
    vm_id = _with_handlers(vmm, guests.SPIN)
    assert _port_value(primitives.run(vmm, vm_id, 0, inject=Inject(InjectType.NMI))) == 2


def test_exception_is_injected(vmm: Vmm) -> None:
    """An exception reaches the handler of its vector."""
    vm_id = _with_handlers(vmm, guests.SPIN)
    inject = Inject(InjectType.EXCEPTION, 6)
    assert _port_value(primitives.run(vmm, vm_id, 0, inject=inject)) == 2


@pytest.mark.parametrize(
    "inject",
    [
        Inject(InjectType.EXCEPTION, 32),
        Inject(InjectType.EXCEPTION, 2),
        Inject(InjectType.EXCEPTION, -1),
        Inject(InjectType.INTR, 256),
    ],
)
def test_impossible_events(vmm: Vmm, inject: Inject) -> None:
    """Invalid vectors are EINVAL, and the vCPU stays stopped."""
    vm_id, _ = create(vmm, guests.HALT)
    assert refusal(lambda: primitives.run(vmm, vm_id, 0, inject=inject)) is Refusal.EINVAL
    assert state(vmm, vm_id) is VcpuState.STOPPED
    assert isinstance(primitives.run(vmm, vm_id, 0).exit, Hlt)


def test_intr_line(vmm: Vmm) -> None:
    """Raising the INTR line interrupts a running vCPU; lowering it does nothing."""
    vm_id = _with_handlers(vmm, WAIT)
    runner = Runner(vmm, vm_id)
    primitives.interrupt(vmm, vm_id, 0, level=True)
    result = runner.join()
    assert isinstance(result.exit, IrqWindowOpen)
    assert result.irq_ready
    primitives.interrupt(vmm, vm_id, 0, level=False)
    runner = Runner(vmm, vm_id)
    primitives.terminate(vmm, vm_id)
    assert isinstance(runner.join().exit, Terminated)


def test_every_thread_can_be_brought_out(vmm: Vmm) -> None:
    """A vCPU may change its thread with each run, even to one with an ended thread's identity."""
    vm_id, _ = create(vmm, WAIT)
    for _ in range(20):
        runner = Runner(vmm, vm_id)
        primitives.interrupt(vmm, vm_id, 0, level=True)
        assert isinstance(runner.join().exit, IrqWindowOpen)
        primitives.interrupt(vmm, vm_id, 0, level=False)


# Registers


def test_all_registers_go_there_and_back(vmm: Vmm) -> None:
    """Registers read from one vCPU can be written to another, and read the same there."""
    vm_id, _ = create(vmm, guests.HALT, ncpus=2)
    registers = entry(vmm, vm_id)
    assert registers.gprs is not None
    assert registers.msrs is not None
    assert registers.drs is not None
    changed = registers._replace(
        gprs={**registers.gprs, "r12": 0x1234_5678_9ABC_DEF0},
        msrs={**registers.msrs, MSR_LSTAR: 0xFFFF_8000_0000_0000},
        drs={**registers.drs, "dr1": 0x4000},
    )
    primitives.write_registers(vmm, vm_id, 1, changed)
    assert primitives.read_registers(vmm, vm_id, 1) == changed


def test_long_mode_in_one_write(vmm: Vmm) -> None:
    """EFER, CR0, CR4 and the code segment are written together, as long mode needs it."""
    vm_id, ram = create(vmm, guests.HALT)
    ram.put(0x3000, (0x4003).to_bytes(8, "little"))
    ram.put(0x4000, (0x5003).to_bytes(8, "little"))
    ram.put(0x5000, (0x83).to_bytes(8, "little"))
    registers = entry(vmm, vm_id)
    assert registers.segments is not None
    assert registers.crs is not None
    assert registers.msrs is not None
    long_mode = registers._replace(
        segments={**registers.segments, "cs": SegmentRegister(8, 0, 0xFFFF_FFFF, 0xA09B)},
        crs={**registers.crs, "cr0": 0x8000_0011, "cr3": 0x3000, "cr4": 0x20},
        msrs={**registers.msrs, MSR_EFER: 0x500},
    )
    primitives.write_registers(vmm, vm_id, 0, long_mode)
    assert primitives.read_registers(vmm, vm_id, 0).msrs == long_mode.msrs
    assert isinstance(primitives.run(vmm, vm_id, 0).exit, Hlt)


@pytest.mark.parametrize("group", list(RegisterGroup))
def test_one_group(vmm: Vmm, group: RegisterGroup) -> None:
    """A mask of one group reads and writes that group only."""
    vm_id, _ = create(vmm, guests.HALT)
    registers = primitives.read_registers(vmm, vm_id, 0, group)
    assert registers.groups == group
    primitives.write_registers(vmm, vm_id, 0, registers, group)


@pytest.mark.parametrize("groups", [RegisterGroup(0), RegisterGroup(0x20), RegisterGroup(0x3F)])
def test_unknown_groups(vmm: Vmm, groups: RegisterGroup) -> None:
    """An empty or unknown mask is EINVAL."""
    vm_id, _ = create(vmm, guests.HALT)
    registers = entry(vmm, vm_id)
    where = (vmm, vm_id, 0)
    assert refusal(lambda: primitives.read_registers(*where, groups)) is Refusal.EINVAL
    assert refusal(lambda: primitives.write_registers(*where, registers, groups)) is Refusal.EINVAL


def test_incomplete_registers(vmm: Vmm) -> None:
    """A reset needs all registers, a write all of the groups in its mask."""
    vm_id, _ = create(vmm, guests.HALT)
    registers = entry(vmm, vm_id)._replace(drs=None, gprs={"rip": 0})
    with pytest.raises(RefusedError) as caught:
        primitives.reset_vcpu(vmm, vm_id, 0, registers)
    assert str(caught.value) == "registers: GPR, DR not complete"
    assert caught.value.refusal is Refusal.EINVAL
    groups = RegisterGroup.CR | RegisterGroup.MSR
    primitives.write_registers(vmm, vm_id, 0, registers, groups)


def test_invalid_state(vmm: Vmm) -> None:
    """A state that no processor can have is EIO."""
    vm_id, _ = create(vmm, guests.HALT)
    registers = entry(vmm, vm_id)
    assert registers.crs is not None
    impossible = registers._replace(crs={**registers.crs, "cr0": 1 << 31})
    where = (vmm, vm_id, 0)
    assert refusal(lambda: primitives.reset_vcpu(*where, impossible)) is Refusal.EIO
    assert refusal(lambda: primitives.write_registers(*where, impossible)) is Refusal.EIO


def test_reset_forgets_what_was_pending(vmm: Vmm) -> None:
    """After a reset a vCPU starts over, without its pending NMI."""
    vm_id, _ = create(vmm, guests.HALT)
    registers = entry(vmm, vm_id)
    assert isinstance(primitives.run(vmm, vm_id, 0).exit, Hlt)
    vmm.vms[vm_id].vcpus[0].vcpu.nmi()
    primitives.reset_vcpu(vmm, vm_id, 0, registers)
    assert primitives.read_registers(vmm, vm_id, 0) == registers
    assert isinstance(primitives.run(vmm, vm_id, 0).exit, Hlt)


def test_registers_of_a_running_vcpu(vmm: Vmm) -> None:
    """A running vCPU is interrupted, read and written, and continues with the written values."""
    vm_id, ram = create(vmm, guests.SPIN)
    ram.put(0x1800, guests.HALT)
    runner = Runner(vmm, vm_id)
    registers = primitives.read_registers(vmm, vm_id, 0)
    assert registers.gprs is not None
    assert registers.gprs["rip"] == guests.CODE
    elsewhere = registers._replace(gprs={**registers.gprs, "rip": 0x1800})
    primitives.write_registers(vmm, vm_id, 0, elsewhere, RegisterGroup.GPR)
    assert isinstance(runner.join().exit, Hlt)


def test_cpuid_hides_the_local_apic(vmm: Vmm) -> None:
    """A guest of these operations has no local APIC, and CPUID reports none."""
    vm_id, _ = create(vmm, guests.HALT, ncpus=2)
    leaves = vmm.vms[vm_id].vcpus[1].vcpu.get_cpuid()
    leaf = next(e for e in leaves if e.function == 1)
    assert leaf.ebx >> 24 == 1
    assert not leaf.ecx & (1 << 21 | 1 << 24)


# pause, unpause


def test_pause(vmm: Vmm) -> None:
    """A paused VM's vCPUs do not run until it is unpaused; both may be repeated."""
    vm_id, ram = create(vmm, guests.SPIN)
    ram.put(0x1800, guests.HALT)
    runner = Runner(vmm, vm_id)
    primitives.pause(vmm, vm_id)
    primitives.pause(vmm, vm_id)
    assert state(vmm, vm_id) is VcpuState.STOPPED
    registers = primitives.read_registers(vmm, vm_id, 0)
    assert registers.gprs is not None
    moved = registers._replace(gprs={**registers.gprs, "rip": 0x1800})
    primitives.write_registers(vmm, vm_id, 0, moved)
    assert primitives.read_registers(vmm, vm_id, 0) == moved
    primitives.unpause(vmm, vm_id)
    primitives.unpause(vmm, vm_id)
    assert isinstance(runner.join().exit, Hlt)


def test_a_waiting_vcpu_is_busy(vmm: Vmm) -> None:
    """While a vCPU's `run` waits for the end of a pause, others can neither run nor reset it."""
    vm_id, _ = create(vmm, guests.SPIN)
    registers = entry(vmm, vm_id)
    runner = Runner(vmm, vm_id)
    primitives.pause(vmm, vm_id)
    runner.wait_until(lambda: vmm.vms[vm_id].vcpus[0].is_waiting)
    assert refusal(lambda: primitives.run(vmm, vm_id, 0)) is Refusal.EBUSY
    assert refusal(lambda: primitives.reset_vcpu(vmm, vm_id, 0, registers)) is Refusal.EBUSY
    primitives.terminate(vmm, vm_id)
    assert isinstance(runner.join().exit, Terminated)


def test_a_pause_that_waits_for_nobody(vmm: Vmm) -> None:
    """Without waiting, a thread in `run` can pause its own VM; the vCPU then waits in `run`."""
    vm_id, _ = create(vmm, guests.WRITE_PORT)

    def enter(vcpu: Vcpu) -> Exit:
        reason = vcpu.run()
        primitives.pause(vmm, vm_id, wait=False)
        return reason

    assert isinstance(primitives.run(vmm, vm_id, 0, enter=enter).exit, IoExit)
    runner = Runner(vmm, vm_id, is_paused=True)
    primitives.unpause(vmm, vm_id)
    assert isinstance(runner.join().exit, IoExit)


def test_a_request_ends_every_run(vmm: Vmm) -> None:
    """After terminate each `run` returns Terminated, the caller's too; the VM stays visible."""
    vm_id, _ = create(vmm, guests.SPIN, ncpus=3)
    runner = Runner(vmm, vm_id)

    def enter(_vcpu: Vcpu) -> Exit:
        primitives.request_termination(vmm, vm_id)
        return _vcpu.run()

    assert isinstance(primitives.run(vmm, vm_id, 1, enter=enter).exit, Terminated)
    assert isinstance(runner.join().exit, Terminated)
    assert isinstance(primitives.run(vmm, vm_id, 0).exit, Terminated)
    assert isinstance(primitives.run(vmm, vm_id, 2).exit, Terminated)
    assert primitives.info_of(vmm, vm_id).vcpu_states == (VcpuState.TERMINATED,) * 3
    primitives.pause(vmm, vm_id)
    primitives.unpause(vmm, vm_id)
    assert primitives.read_registers(vmm, vm_id, 0).groups == ALL_GROUPS
    primitives.terminate(vmm, vm_id)


def test_an_error_while_the_vcpu_is_entered(vmm: Vmm) -> None:
    """An exception of `enter` reaches the caller, and the vCPU has ended."""
    vm_id, _ = create(vmm, guests.SPIN)

    def enter(_vcpu: Vcpu) -> Exit:
        raise LookupError

    with pytest.raises(LookupError):
        primitives.run(vmm, vm_id, 0, enter=enter)
    assert state(vmm, vm_id) is VcpuState.TERMINATED


# Interrupt controllers and mappings


def test_interrupt_controllers_of_kvm(vmm: Vmm) -> None:
    """With interrupt controllers a VM has local APICs, and refuses injection and the INTR line."""
    params = Ram().params().but(controllers=Controllers.KERNEL)
    vm_id = primitives.create(vmm, params)
    leaf = next(e for e in primitives.kvm_vcpu(vmm, vm_id, 0).get_cpuid() if e.function == 1)
    assert leaf.edx & 1 << 9
    assert refusal(lambda: primitives.interrupt(vmm, vm_id, 0, level=True)) is Refusal.EINVAL
    inject = Inject(InjectType.INTR, guests.INTERRUPT_VECTOR)
    assert refusal(lambda: primitives.run(vmm, vm_id, 0, inject=inject)) is Refusal.EINVAL
    primitives.kvm_vm(vmm, vm_id).irq_line(4, 1)


def test_mappings(vmm: Vmm) -> None:
    """A mapping is guest memory until it is removed; a read-only one takes no write."""
    ram, rom = Ram(), Ram(0x1000)
    rom.put(0x20, b"\x12\x34\x56\x78")
    ram.put(guests.CODE, guests.ACCESS_MMIO)
    mapping = Mapping(guests.MMIO, rom.va, rom.size, is_readonly=True)
    vm_id = primitives.create(vmm, ram.params().but(mappings=[mapping]))
    registers = entry(vmm, vm_id)
    for is_mapped, kinds in ((True, 2), (False, 3), (True, 2)):
        primitives.set_mapped(vmm, vm_id, 0, is_mapped=is_mapped)
        primitives.reset_vcpu(vmm, vm_id, 0, registers)
        assert _kinds(vmm, vm_id) == [MmioExit] * kinds + [Hlt]
    for index in (-1, 1):
        call = partial(primitives.set_mapped, vmm, vm_id, index, is_mapped=True)
        assert refusal(call) is Refusal.EINVAL


def test_all_groups_are_read_by_default(vmm: Vmm) -> None:
    """Without a mask every group is read."""
    vm_id, _ = create(vmm, guests.HALT)
    assert primitives.read_registers(vmm, vm_id, 0).groups == ALL_GROUPS
