"""vmm(4)'s operations on VMs, as functions over an explicit table.

They mean what OpenBSD's ioctls mean: `create` takes memory of this process as guest RAM, `run`
enters a stopped vCPU until it needs help, `terminate` waits for its users. Interrupt controllers
are the caller's, and so is HLT: there is no irqchip in the kernel, only one INTR line per vCPU.

Different from OpenBSD: a VM belongs to the process that created it, because KVM says so; every
operation from another one, such as a forked child, is refused with EPERM. Up to 64 vCPUs. Guest
RAM is shared by sharing its memfd and kvmclock is set up by the guest through its MSRs, so
SHAREMEM, READVMPARAMS and WRITEVMPARAMS have no function here. `pause` and `unpause` are vmd's.

Every function may be called from any thread. The one lock, `Vmm.changed`, guards all state here
and is not held while a guest runs. Bringing a running vCPU out needs `install_kick_signal()`.

Source: OpenBSD vmm(4), sys/dev/vmm/vmm.c.
"""

import enum
import os
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from errno import EMFILE, ENFILE, ENOMEM, ENOSPC
from typing import Self

from vmm_kvm.arch.x86.cpuid import guest_cpuid
from vmm_kvm.arch.x86.registers import (
    ALL_GROUPS,
    RegisterGroup,
    Registers,
    get_registers,
    reset,
    set_registers,
)
from vmm_kvm.errors import KvmError, Refusal, RefusedError
from vmm_kvm.kvm.cpuid import CpuidEntry
from vmm_kvm.kvm.exits import Exit, Interrupted
from vmm_kvm.kvm.host import host_vms, resident_bytes
from vmm_kvm.kvm.system import Kvm
from vmm_kvm.kvm.vcpu import Vcpu
from vmm_kvm.kvm.vm import Vm
from vmm_kvm.vm_params import CreateParams, MemoryType, check_params, memory_size

MAX_VCPUS = 512

_HOST_IS_FULL = {ENOMEM, ENFILE, EMFILE, ENOSPC}
_EXCEPTION_VECTORS = 32
_EXCEPTIONS_WITH_CODE = {8, 10, 11, 12, 13, 14, 17, 21, 29, 30}
_NMI_VECTOR = 2
_EDX1_APIC = 1 << 9
_ECX1_X2APIC = 1 << 21
_ECX1_TSC_DEADLINE = 1 << 24
# Below the top of the 32-bit space, where no RAM range of a sane VM lies.
_IDENTITY_MAP_ADDRESS = 0xFEFF_C000
_TSS_ADDRESS = 0xFEFF_D000


class VcpuState(enum.IntEnum):
    """What a vCPU does, by OpenBSD's numbers."""

    STOPPED = 0
    RUNNING = 1
    REQTERM = 2
    """It runs, and is to end."""
    TERMINATED = 3
    UNKNOWN = 4
    """It is another program's."""


class InjectType(enum.Enum):
    """What `run` makes the guest take first."""

    INTR = "interrupt"
    EXCEPTION = "exception"
    NMI = "nmi"


@dataclass(frozen=True, slots=True)
class Inject:
    """An event for the guest."""

    type: InjectType
    vector: int = 0
    """0 to 255 for an interrupt, 0 to 31 but 2 for an exception; not looked at for an NMI.

    An exception that has an error code gets 0.
    """


class Terminated:
    """The VM was terminated while, or before, the vCPU ran."""

    __slots__ = ()


class NoHelpNeeded:
    """The vCPU came out for the caller's sake, not its own: call `run` again."""

    __slots__ = ()


@dataclass(frozen=True, slots=True)
class RunResult:
    """Why a vCPU came out."""

    exit: Exit | Terminated | NoHelpNeeded
    """Valid until the vCPU runs again; a read is answered in place."""
    irq_ready: bool
    """Whether the guest can take an interrupt: the next `run` may inject one."""


@dataclass(frozen=True, slots=True)
class VmInfo:
    """One VM of this table or, with id None, of another program."""

    id: int | None
    name: str
    pid: int
    """The process that created it."""
    memory_size: int
    """Bytes of RAM and reserved memory; estimated for other programs."""
    used_size: int
    """Bytes of that in host memory; estimated for other programs."""
    vcpu_states: tuple[VcpuState, ...]

    @property
    def ncpus(self) -> int:
        """How many vCPUs it has."""
        return len(self.vcpu_states)


@dataclass(slots=True)
class _Vcpu:
    vcpu: Vcpu
    state: VcpuState = VcpuState.STOPPED
    is_waiting: bool = False
    """A `run` waits until nothing holds the VM any more."""
    has_intr: bool = False
    """The level of the INTR line."""


@dataclass(slots=True)
class _Vm:
    id: int
    params: CreateParams
    vm: Vm
    vcpus: list[_Vcpu]
    resources: ExitStack
    holds: int = 0
    """While positive no vCPU of the VM enters the guest."""
    paused_clock_ns: int | None = None
    """Paused since kvmclock said this."""
    is_ending: bool = False


class Vmm:
    """A table of VMs; a context manager that terminates what is left in it.

    `kvm` stays the caller's. Everything else here is for the functions of this module.
    """

    def __init__(self, kvm: Kvm) -> None:
        """Make an empty table for VMs of this process."""
        self.kvm = kvm
        self.pid = os.getpid()
        self.last_id = 0
        self.vms: dict[int, _Vm] = {}
        # Notified when a vCPU stops or ends, and when a VM is held no longer.
        self.changed = threading.Condition()

    def close(self) -> None:
        """Terminate every VM; idempotent.

        Raises:
            RefusedError: this is not the process that made the table (EPERM).
        """
        for vm_id in list(self.vms):
            try:
                terminate(self, vm_id)
            except RefusedError as err:
                if err.refusal is not Refusal.ENOENT:  # another thread was quicker
                    raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def create(vmm: Vmm, params: CreateParams) -> int:
    """Create a VM whose vCPUs are stopped in their reset state; returns its id, 1 or more.

    Raises:
        RefusedError: EINVAL for ranges, vCPUs or a name out of range; ENOMEM if this would be
            more than 512 vCPUs in the table, or the host is full; EPERM.
        KvmError: KVM refused for another reason.

    Source: OpenBSD vmm(4), VMM_IOC_CREATE.
    """
    _check_owner(vmm)
    check_params(params, vmm.kvm.max_vcpus)
    with vmm.changed:
        vcpus = sum(len(vm.vcpus) for vm in vmm.vms.values())
        if vcpus + params.ncpus > MAX_VCPUS:
            raise RefusedError(
                Refusal.ENOMEM, f"{params.ncpus} vCPUs: {vcpus} of {MAX_VCPUS} are taken"
            )
        try:
            vm = _assemble(vmm, params)
        except KvmError as err:
            if err.errno not in _HOST_IS_FULL:
                raise
            raise RefusedError(Refusal.ENOMEM, str(err)) from err
        vmm.vms[vm.id] = vm
        return vm.id


def run(
    vmm: Vmm,
    vm_id: int,
    vcpu_id: int,
    *,
    inject: Inject | None = None,
    intr_pending: bool = False,
) -> RunResult:
    """Run a vCPU until it needs help; waits as long as the VM is paused.

    `inject` is taken first. With `intr_pending` the vCPU comes out, as IrqWindowOpen, once the
    guest can take an interrupt; so does a raised INTR line.

    Raises:
        RefusedError: ENOENT; EBUSY if the vCPU is not stopped; EINVAL for an event that cannot be
            injected, or not yet; EPERM.
        KvmError: KVM_RUN failed. The vCPU is TERMINATED then.

    Source: OpenBSD vmm(4), VMM_IOC_RUN.
    """
    _check_owner(vmm)
    with vmm.changed:
        vm, slot = _find(vmm, vm_id, vcpu_id)
        if slot.state is not VcpuState.STOPPED or slot.is_waiting:
            raise RefusedError(Refusal.EBUSY, f"vCPU {vcpu_id} of VM {vm_id}: not stopped")
        slot.is_waiting = True
        vmm.changed.wait_for(lambda: vm.holds == 0 or vm.is_ending)
        slot.is_waiting = False
        if vm.is_ending:
            slot.state = VcpuState.TERMINATED
            vmm.changed.notify_all()
            return RunResult(Terminated(), irq_ready=False)
        if inject is not None:
            _inject(slot.vcpu, inject)
        slot.vcpu.kvm_run.request_interrupt_window = int(intr_pending or slot.has_intr)
        slot.vcpu.clear_immediate_exit()
        slot.vcpu.bind_thread()
        slot.state = VcpuState.RUNNING
    try:
        reason = slot.vcpu.run()
    except BaseException:
        with vmm.changed:
            slot.state = VcpuState.TERMINATED
            vmm.changed.notify_all()
        raise
    with vmm.changed:
        is_ending = slot.state is VcpuState.REQTERM
        slot.state = VcpuState.TERMINATED if is_ending else VcpuState.STOPPED
        irq_ready = bool(slot.vcpu.kvm_run.ready_for_interrupt_injection)
        vmm.changed.notify_all()
    if is_ending:
        return RunResult(Terminated(), irq_ready=False)
    return RunResult(NoHelpNeeded() if isinstance(reason, Interrupted) else reason, irq_ready)


def terminate(vmm: Vmm, vm_id: int) -> None:
    """Forget a VM, bring its vCPUs out, wait for their `run` to return Terminated, and free it.

    Not for a thread that is in `run` of the same VM.

    Raises:
        RefusedError: ENOENT; EPERM.

    Source: OpenBSD vmm(4), VMM_IOC_TERM.
    """
    _check_owner(vmm)
    with vmm.changed:
        vm = _find_vm(vmm, vm_id)
        del vmm.vms[vm_id]
        vm.is_ending = True
        for slot in vm.vcpus:
            if slot.state is VcpuState.RUNNING:
                slot.state = VcpuState.REQTERM
                slot.vcpu.kick()
            elif slot.state is VcpuState.STOPPED and not slot.is_waiting:
                slot.state = VcpuState.TERMINATED
        vmm.changed.notify_all()
        vmm.changed.wait_for(
            lambda: (
                all(slot.state is VcpuState.TERMINATED for slot in vm.vcpus)
                and vm.holds == (vm.paused_clock_ns is not None)
            )
        )
    vm.resources.close()


def info(vmm: Vmm) -> list[VmInfo]:
    """Return the VMs of this table, newest first, then those of other programs on the host.

    Raises:
        RefusedError: EPERM.

    Source: OpenBSD vmm(4), VMM_IOC_INFO; `vmm_kvm.kvm.host` for the others.
    """
    _check_owner(vmm)
    with vmm.changed:
        own = [_info(vmm, vm) for vm in sorted(vmm.vms.values(), key=lambda vm: -vm.id)]
    others = [
        VmInfo(
            None,
            vm.name,
            vm.pid,
            vm.memory_size,
            vm.resident,
            (VcpuState.UNKNOWN,) * vm.vcpus,
        )
        for vm in host_vms(but=vmm.pid)
    ]
    return own + others


def reset_vcpu(vmm: Vmm, vm_id: int, vcpu_id: int, registers: Registers) -> None:
    """Give a stopped vCPU the state `registers`, all groups of them, and nothing pending.

    Raises:
        RefusedError: ENOENT; EBUSY if the vCPU is not stopped; EINVAL if a register is missing;
            EIO if the processor does not take the state; EPERM.

    Source: OpenBSD vmm(4), VMM_IOC_RESETCPU.
    """
    _check_owner(vmm)
    with vmm.changed:
        _, slot = _find(vmm, vm_id, vcpu_id)
        if slot.state is not VcpuState.STOPPED or slot.is_waiting:
            raise RefusedError(Refusal.EBUSY, f"vCPU {vcpu_id} of VM {vm_id}: not stopped")
        _check_groups(registers, ALL_GROUPS)
        with _refusing_state():
            reset(slot.vcpu, registers)
        slot.has_intr = False


def read_registers(
    vmm: Vmm, vm_id: int, vcpu_id: int, groups: RegisterGroup = ALL_GROUPS
) -> Registers:
    """Read `groups` of registers; a running vCPU is brought out for that.

    Raises:
        RefusedError: ENOENT, also when the VM is terminated meanwhile; EINVAL for an unknown
            group or none; EPERM.

    Source: OpenBSD vmm(4), VMM_IOC_READREGS.
    """
    _check_owner(vmm)
    if not groups or int(groups) & ~int(ALL_GROUPS):
        raise RefusedError(Refusal.EINVAL, f"register groups {int(groups):#x}: none, or unknown")
    with vmm.changed:
        vm, slot = _find(vmm, vm_id, vcpu_id)
        with _held(vmm, vm), _refusing_state():
            return get_registers(slot.vcpu, groups)


def write_registers(
    vmm: Vmm,
    vm_id: int,
    vcpu_id: int,
    registers: Registers,
    groups: RegisterGroup = ALL_GROUPS,
) -> None:
    """Write `groups` of `registers`; a running vCPU is brought out for that.

    Raises:
        RefusedError: ENOENT, also when the VM is terminated meanwhile; EINVAL for an unknown
            group, none, or one with a register missing; EIO if the processor does not take the
            state; EPERM.

    Source: OpenBSD vmm(4), VMM_IOC_WRITEREGS.
    """
    _check_owner(vmm)
    if not groups or int(groups) & ~int(ALL_GROUPS):
        raise RefusedError(Refusal.EINVAL, f"register groups {int(groups):#x}: none, or unknown")
    _check_groups(registers, groups)
    with vmm.changed:
        vm, slot = _find(vmm, vm_id, vcpu_id)
        with _held(vmm, vm), _refusing_state():
            set_registers(slot.vcpu, registers, groups)


def interrupt(vmm: Vmm, vm_id: int, vcpu_id: int, *, level: bool) -> None:
    """Drive a vCPU's INTR line; raising it brings a running vCPU out of the guest.

    The line only asks: the caller injects the vector when `RunResult.irq_ready` says so.

    Raises:
        RefusedError: ENOENT; EPERM.

    Source: OpenBSD vmm(4), VMM_IOC_INTR.
    """
    _check_owner(vmm)
    with vmm.changed:
        _, slot = _find(vmm, vm_id, vcpu_id)
        slot.has_intr = level
        if level and slot.state is VcpuState.RUNNING:
            slot.vcpu.kick()


def pause(vmm: Vmm, vm_id: int) -> None:
    """Bring every vCPU out, and let `run` wait until `unpause`; again changes nothing.

    The guest's kvmclock stands still meanwhile. Not for a thread that is in `run` of this VM.

    Raises:
        RefusedError: ENOENT, also when the VM is terminated meanwhile; EPERM.
    """
    _check_owner(vmm)
    with vmm.changed:
        vm = _find_vm(vmm, vm_id)
        if vm.paused_clock_ns is not None:
            return
        with _held(vmm, vm):
            if vm.paused_clock_ns is None:
                vm.paused_clock_ns = vm.vm.clock_ns()
                vm.holds += 1


def unpause(vmm: Vmm, vm_id: int) -> None:
    """Let the vCPUs of a paused VM run again; nothing happens if it is not paused.

    Raises:
        RefusedError: ENOENT; EPERM.
    """
    _check_owner(vmm)
    with vmm.changed:
        vm = _find_vm(vmm, vm_id)
        if vm.paused_clock_ns is None:
            return
        vm.vm.set_clock_ns(vm.paused_clock_ns)
        for slot in vm.vcpus:
            with suppress(KvmError):  # the guest has not set kvmclock up
                slot.vcpu.kvmclock_ctrl()
        vm.paused_clock_ns = None
        vm.holds -= 1
        vmm.changed.notify_all()


# Everything below is called with the lock held, or needs none.


def _check_owner(vmm: Vmm) -> None:
    if os.getpid() != vmm.pid:
        raise RefusedError(Refusal.EPERM, f"the VMs belong to process {vmm.pid}")


def _find_vm(vmm: Vmm, vm_id: int) -> _Vm:
    vm = vmm.vms.get(vm_id)
    if vm is None:
        raise RefusedError(Refusal.ENOENT, f"no VM {vm_id}")
    return vm


def _find(vmm: Vmm, vm_id: int, vcpu_id: int) -> tuple[_Vm, _Vcpu]:
    vm = _find_vm(vmm, vm_id)
    if not 0 <= vcpu_id < len(vm.vcpus):
        raise RefusedError(Refusal.ENOENT, f"no vCPU {vcpu_id} in VM {vm_id}")
    return vm, vm.vcpus[vcpu_id]


def _assemble(vmm: Vmm, params: CreateParams) -> _Vm:
    with ExitStack() as stack:
        vm = stack.enter_context(vmm.kvm.create_vm())
        vm.set_identity_map_address(_IDENTITY_MAP_ADDRESS)
        vm.set_tss_address(_TSS_ADDRESS)
        for index, part in enumerate(params.ranges):
            if part.type is not MemoryType.MMIO:
                vm.set_memory_region(index, part.gpa, part.size, part.va)
        supported = vmm.kvm.supported_cpuid()
        vcpus = []
        for index in range(params.ncpus):
            vcpu = stack.enter_context(vm.create_vcpu(index))
            vcpu.set_cpuid(
                [_without_apic(entry) for entry in guest_cpuid(supported, index, params.ncpus)]
            )
            vcpus.append(_Vcpu(vcpu))
        vmm.last_id += 1
        return _Vm(vmm.last_id, params, vm, vcpus, stack.pop_all())


def _without_apic(entry: CpuidEntry) -> CpuidEntry:
    if entry.function != 1:
        return entry
    hidden = _ECX1_X2APIC | _ECX1_TSC_DEADLINE
    return entry._replace(ecx=entry.ecx & ~hidden, edx=entry.edx & ~_EDX1_APIC)


def _inject(vcpu: Vcpu, inject: Inject) -> None:
    if inject.type is InjectType.EXCEPTION:
        if not 0 <= inject.vector < _EXCEPTION_VECTORS or inject.vector == _NMI_VECTOR:
            raise RefusedError(Refusal.EINVAL, f"exception {inject.vector}: there is none")
        events = vcpu.get_vcpu_events()
        events.exception.injected = 1
        events.exception.nr = inject.vector
        events.exception.has_error_code = int(inject.vector in _EXCEPTIONS_WITH_CODE)
        events.exception.error_code = 0
        vcpu.set_vcpu_events(events)
        return
    try:
        if inject.type is InjectType.NMI:
            vcpu.nmi()
        else:
            vcpu.interrupt(inject.vector)
    except KvmError as err:
        raise RefusedError(Refusal.EINVAL, f"{inject.type.value} {inject.vector}: {err}") from err


def _check_groups(registers: Registers, groups: RegisterGroup) -> None:
    missing = groups & ~registers.groups
    if missing:
        names = ", ".join(str(group.name) for group in missing)
        raise RefusedError(Refusal.EINVAL, f"registers: {names} not complete")


@contextmanager
def _refusing_state() -> Iterator[None]:
    try:
        yield
    except KvmError as err:
        raise RefusedError(Refusal.EIO, str(err)) from err


@contextmanager
def _held(vmm: Vmm, vm: _Vm) -> Iterator[None]:
    """Keep every vCPU of `vm` out of the guest; entered and left with the lock held."""
    vm.holds += 1
    try:
        for slot in vm.vcpus:
            if slot.state is VcpuState.RUNNING:
                slot.vcpu.kick()
        vmm.changed.wait_for(
            lambda: vm.is_ending or all(s.state is not VcpuState.RUNNING for s in vm.vcpus)
        )
        if vm.is_ending:
            raise RefusedError(Refusal.ENOENT, f"no VM {vm.id}")
        yield
    finally:
        vm.holds -= 1
        vmm.changed.notify_all()


def _info(vmm: Vmm, vm: _Vm) -> VmInfo:
    used = sum(
        resident_bytes(part.va, part.size)
        for part in vm.params.ranges
        if part.type is not MemoryType.MMIO
    )
    return VmInfo(
        vm.id,
        vm.params.name,
        vmm.pid,
        memory_size(vm.params),
        used,
        tuple(slot.state for slot in vm.vcpus),
    )
