"""vmm(4)'s operations on VMs, as functions over a table: the one way to make and run a VM.

They mean what OpenBSD's ioctls mean: `create` takes memory of this process as guest RAM, `run`
enters a stopped vCPU until it needs help, `terminate` waits for its users.

Different from OpenBSD: a VM belongs to the process that created it, because KVM says so; every
operation from another one, such as a forked child, is refused with EPERM. Up to 64 vCPUs. `create`
takes the choice of interrupt controllers: without any, as on OpenBSD, there is one INTR line per
vCPU and HLT leaves as an exit; with KVM's, devices drive their lines through `kvm_vm`. `run` takes
the function that enters the guest, so that a caller can serve most exits without coming out.
Guest RAM is shared by sharing its memfd and kvmclock is set up by the guest through its MSRs, so
SHAREMEM, READVMPARAMS and WRITEVMPARAMS have no function here. `pause` and `unpause` are vmd's.

Every function may be called from any thread. The one lock, `Vmm.changed`, guards all state here
and is not held while a guest runs; a caller may hold a device's lock, and nothing here takes one.
Bringing a running vCPU out needs `install_kick_signal()`.

Source: OpenBSD vmm(4), sys/dev/vmm/vmm.c.
"""

import enum
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from errno import EMFILE, ENFILE, ENOMEM, ENOSPC
from typing import NamedTuple

from vmm_kvm.arch.x86.kvm_state import ClockPolicy, KvmRecord, restore_kvm, save_kvm
from vmm_kvm.arch.x86.registers import (
    ALL_GROUPS,
    RegisterGroup,
    Registers,
    get_registers,
    reset,
    set_registers,
)
from vmm_kvm.errors import KvmError, Refusal, RefusedError
from vmm_kvm.kvm.exits import Exit, Interrupted
from vmm_kvm.kvm.vcpu import Vcpu
from vmm_kvm.kvm.vm import Vm
from vmm_kvm.limits import TABLE_VCPUS_MAX
from vmm_kvm.memory import resident_bytes
from vmm_kvm.vm_params import Controllers, CreateParams, MemoryType, check_params, memory_size
from vmm_kvm.vm_table import (
    VcpuState,
    VmEntry,
    Vmm,
    adopt,
    assemble,
    check_owner,
    end,
    find_vcpu,
    find_vm,
    held,
    hide_mapping,
    show_mapping,
    wait_until_out,
)

__all__ = [
    "Inject",
    "InjectType",
    "NoHelpNeeded",
    "RunResult",
    "Terminated",
    "VcpuState",
    "VmInfo",
    "Vmm",
    "adopt_fork",
    "create",
    "info",
    "info_of",
    "interrupt",
    "kvm_vcpu",
    "kvm_vm",
    "pause",
    "read_registers",
    "request_termination",
    "reset_vcpu",
    "restore_state",
    "run",
    "save_state",
    "set_mapped",
    "terminate",
    "unpause",
    "write_registers",
]


_HOST_IS_FULL = {ENOMEM, ENFILE, EMFILE, ENOSPC}
_EXCEPTION_VECTORS = 32
_EXCEPTIONS_WITH_CODE = {8, 10, 11, 12, 13, 14, 17, 21, 29, 30}
_NMI_VECTOR = 2


class InjectType(enum.Enum):
    """The event that `run` makes the guest take first."""

    INTR = "interrupt"
    EXCEPTION = "exception"
    NMI = "nmi"


class Inject(NamedTuple):
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
    """The caller, not the guest, made the vCPU exit: call `run` again."""

    __slots__ = ()


class RunResult(NamedTuple):
    """Why `run` returned."""

    exit: Exit | Terminated | NoHelpNeeded
    """Valid until the vCPU runs again; a read is answered in place."""
    irq_ready: bool
    """Whether the guest can take an interrupt: the next `run` may inject one."""


class VmInfo(NamedTuple):
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


def create(vmm: Vmm, params: CreateParams) -> int:
    """Create a VM whose vCPUs are stopped in their reset state; returns its id, 1 or more.

    Raises:
        RefusedError: EINVAL for ranges, vCPUs or a name out of range; ENOMEM if this would be
            more than 512 vCPUs in the table, or the host is full; EPERM.
        KvmError: KVM refused for another reason.

    Source: OpenBSD vmm(4), VMM_IOC_CREATE.
    """
    check_owner(vmm)
    check_params(params, vmm.kvm.max_vcpus)
    with vmm.changed:
        vcpus = sum(len(vm.vcpus) for vm in vmm.vms.values())
        if vcpus + params.ncpus > TABLE_VCPUS_MAX:
            raise RefusedError(
                Refusal.ENOMEM, f"{params.ncpus} vCPUs: {vcpus} of {TABLE_VCPUS_MAX} are taken"
            )
        try:
            vm = assemble(vmm, params)
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
    enter: Callable[[Vcpu], Exit] = Vcpu.run,
) -> RunResult:
    """Run a vCPU until an exit for the caller; waits as long as the VM is paused.

    `inject` is taken first. With `intr_pending` the vCPU comes out, as IrqWindowOpen, once the
    guest can take an interrupt; so does a raised INTR line. `enter` enters the guest, on this
    thread; it may serve exits itself, and returns the first that it does not serve. It has to
    return Interrupted.

    Raises:
        RefusedError: ENOENT; EBUSY if the vCPU is not stopped; EINVAL for an event that cannot be
            injected, or not yet; EPERM.
        KvmError: KVM_RUN failed. The vCPU is TERMINATED then, as it is when `enter` raises.

    Source: OpenBSD vmm(4), VMM_IOC_RUN.
    """
    check_owner(vmm)
    with vmm.changed:
        vm, slot = find_vcpu(vmm, vm_id, vcpu_id)
        if vm.is_ending and slot.is_out and not slot.is_waiting:
            return RunResult(Terminated(), irq_ready=False)
        if slot.state is not VcpuState.STOPPED or slot.is_waiting:
            raise RefusedError(Refusal.EBUSY, f"vCPU {vcpu_id} of VM {vm_id}: not stopped")
        slot.is_waiting = True
        vmm.changed.wait_for(lambda: not vm.keeps_out(vcpu_id) or vm.is_ending)
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
        reason = enter(slot.vcpu)
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


def request_termination(vmm: Vmm, vm_id: int) -> None:
    """Bring a VM's vCPUs out for ever, without waiting; also for a thread that is in `run` of it.

    Every `run` returns Terminated from now on. The VM stays in the table until `terminate`.

    Raises:
        RefusedError: ENOENT; EPERM.
    """
    check_owner(vmm)
    with vmm.changed:
        find_vm(vmm, vm_id).request_end()
        vmm.changed.notify_all()


def terminate(vmm: Vmm, vm_id: int) -> None:
    """Forget a VM, bring its vCPUs out, wait for their `run` to return Terminated, and free it.

    Not for a thread that is in `run` of the same VM.

    Raises:
        RefusedError: ENOENT; EPERM.

    Source: OpenBSD vmm(4), VMM_IOC_TERM.
    """
    check_owner(vmm)
    end(vmm, vm_id)


def info(vmm: Vmm) -> list[VmInfo]:
    """Return the VMs of this table, newest first, then those of other programs on the host.

    Raises:
        RefusedError: EPERM.

    Source: OpenBSD vmm(4), VMM_IOC_INFO; `vmm_kvm.kvm.host` for the others.
    """
    from vmm_kvm.kvm.host import host_vms  # noqa: PLC0415 - slow to load, and few ask

    check_owner(vmm)
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


def info_of(vmm: Vmm, vm_id: int) -> VmInfo:
    """Return `info`'s entry of one VM of this table; quicker, since it looks at no other.

    Raises:
        RefusedError: ENOENT; EPERM.
    """
    check_owner(vmm)
    with vmm.changed:
        return _info(vmm, find_vm(vmm, vm_id))


def reset_vcpu(vmm: Vmm, vm_id: int, vcpu_id: int, registers: Registers) -> None:
    """Give a stopped vCPU the state `registers`, all groups of them, and nothing pending.

    Raises:
        RefusedError: ENOENT; EBUSY if the vCPU is not stopped; EINVAL if a register is missing;
            EIO if the processor does not take the state; EPERM.

    Source: OpenBSD vmm(4), VMM_IOC_RESETCPU.
    """
    check_owner(vmm)
    with vmm.changed:
        _, slot = find_vcpu(vmm, vm_id, vcpu_id)
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
    check_owner(vmm)
    if not groups or int(groups) & ~int(ALL_GROUPS):
        raise RefusedError(Refusal.EINVAL, f"register groups {int(groups):#x}: none, or unknown")
    with vmm.changed:
        vm, slot = find_vcpu(vmm, vm_id, vcpu_id)
        with held(vmm, vm), _refusing_state():
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
    check_owner(vmm)
    if not groups or int(groups) & ~int(ALL_GROUPS):
        raise RefusedError(Refusal.EINVAL, f"register groups {int(groups):#x}: none, or unknown")
    _check_groups(registers, groups)
    with vmm.changed:
        vm, slot = find_vcpu(vmm, vm_id, vcpu_id)
        with held(vmm, vm), _refusing_state():
            set_registers(slot.vcpu, registers, groups)


def interrupt(vmm: Vmm, vm_id: int, vcpu_id: int, *, level: bool) -> None:
    """Drive a vCPU's INTR line; raising it brings a running vCPU out of the guest.

    The line only asks: the caller injects the vector when `RunResult.irq_ready` says so.

    Raises:
        RefusedError: ENOENT; EINVAL if the VM has KVM's interrupt controllers; EPERM.

    Source: OpenBSD vmm(4), VMM_IOC_INTR.
    """
    check_owner(vmm)
    with vmm.changed:
        vm, slot = find_vcpu(vmm, vm_id, vcpu_id)
        if vm.params.controllers is not Controllers.NONE:
            raise RefusedError(Refusal.EINVAL, f"VM {vm_id}: its interrupt controllers are KVM's")
        slot.has_intr = level
        if level and slot.state is VcpuState.RUNNING:
            slot.vcpu.kick()


def pause(vmm: Vmm, vm_id: int, *, wait: bool = True) -> None:
    """Let `run` wait until `unpause`, and bring every vCPU out; again changes nothing.

    Returns when no vCPU is in the guest; without `wait` at once. Clocks go on: the guest finds
    that time has passed. With `wait` not for a thread that is in `run` of this VM.

    Raises:
        RefusedError: ENOENT, also when the VM is terminated meanwhile; EPERM.
    """
    check_owner(vmm)
    with vmm.changed:
        vm = find_vm(vmm, vm_id)
        vm.is_paused = True
        if wait:
            wait_until_out(vmm, vm)
        else:
            vm.kick()


def unpause(vmm: Vmm, vm_id: int) -> None:
    """Let the vCPUs of a paused VM run again; nothing happens if it is not paused.

    A guest with a kvmclock is told that it was paused, so that its watchdogs do not fire.

    Raises:
        RefusedError: ENOENT; EPERM.
    """
    check_owner(vmm)
    with vmm.changed:
        vm = find_vm(vmm, vm_id)
        if not vm.is_paused:
            return
        for slot in vm.vcpus:
            if slot.is_out:
                with suppress(KvmError):  # the guest has not set kvmclock up
                    slot.vcpu.kvmclock_ctrl()
        vm.is_paused = False
        vmm.changed.notify_all()


def save_state(vmm: Vmm, vm_id: int) -> KvmRecord:
    """Return what KVM keeps of a paused VM that has KVM's interrupt controllers.

    Each vCPU has completed the access that it came out for: its `enter` saw to that.

    Raises:
        RefusedError: ENOENT; EBUSY if the VM is not paused; EINVAL if it has no controllers; EPERM.
        KvmError: KVM refused.
    """
    check_owner(vmm)
    with vmm.changed:
        vm = _still(vmm, vm_id)
        vcpus = [slot.vcpu for slot in vm.vcpus]
        return save_kvm(vm.vm, vcpus, vmm.kvm.msr_indices())


def restore_state(
    vmm: Vmm, vm_id: int, record: KvmRecord, policy: ClockPolicy = ClockPolicy.FROZEN
) -> None:
    """Give a paused VM, of which no vCPU has run, what `save_state` returned of another one.

    Raises:
        RefusedError: as `save_state`.
        StateError: it is of another number of vCPUs, or not of this kernel's sizes.
        KvmError: the kernel or the processor does not take it; the VM is of no use then.
    """
    check_owner(vmm)
    with vmm.changed:
        vm = _still(vmm, vm_id)
        restore_kvm(vm.vm, [slot.vcpu for slot in vm.vcpus], record, policy)


def adopt_fork(vmm: Vmm, vm_id: int) -> None:
    """Make a paused VM that a fork has copied this process's own; in a child, on its only thread.

    KVM makes it anew, in the parent's place: `Vm` and `Vcpu` objects stay valid, and so do views of
    what they map. It has its memory and its interrupt controllers in their reset state, without
    routes and event descriptors; `restore_state` gives it the rest. Other VMs of the table are let
    go.

    Raises:
        RefusedError: ENOENT; EBUSY if it is not paused; EINVAL if its controllers are not KVM's.
        KvmError, OSError: KVM or the host refused; the table is of no use then.
    """
    adopt(vmm, vm_id)
    with vmm.changed:
        _still(vmm, vm_id)


def set_mapped(vmm: Vmm, vm_id: int, index: int, *, is_mapped: bool) -> None:
    """Show mapping number `index` of `CreateParams.mappings` to the guest, or take it away.

    A thread that is in `run` of the VM may do it.

    Raises:
        RefusedError: ENOENT; EINVAL if there is no such mapping; EPERM.
        KvmError: KVM refused.
    """
    check_owner(vmm)
    with vmm.changed:
        vm = find_vm(vmm, vm_id)
        if not 0 <= index < len(vm.params.mappings):
            raise RefusedError(Refusal.EINVAL, f"no mapping {index} in VM {vm_id}")
        if is_mapped:
            show_mapping(vm.vm, index, vm.params.mappings[index])
            vm.hidden.discard(index)
        else:
            hide_mapping(vm.vm, index)
            vm.hidden.add(index)


def kvm_vm(vmm: Vmm, vm_id: int) -> Vm:
    """Return what KVM has below a VM: for its devices' interrupt lines and event descriptors.

    It is the table's, valid until `terminate`.

    Raises:
        RefusedError: ENOENT; EPERM.
    """
    check_owner(vmm)
    with vmm.changed:
        return find_vm(vmm, vm_id).vm


def kvm_vcpu(vmm: Vmm, vm_id: int, vcpu_id: int) -> Vcpu:
    """Return what KVM has below a vCPU, with all the state that `Registers` lacks.

    It is the table's, valid until `terminate`. Only the thread that is in `run` of it may use it,
    or while none is, one other.

    Raises:
        RefusedError: ENOENT; EPERM.
    """
    check_owner(vmm)
    with vmm.changed:
        return find_vcpu(vmm, vm_id, vcpu_id)[1].vcpu


# Everything below is called with the lock held, or needs none.


def _still(vmm: Vmm, vm_id: int) -> VmEntry:
    """Return a VM that is paused, with KVM's controllers, and with every vCPU out."""
    vm = find_vm(vmm, vm_id)
    if not vm.is_paused or not all(slot.is_out for slot in vm.vcpus):
        raise RefusedError(Refusal.EBUSY, f"VM {vm_id}: not paused")
    if vm.params.controllers is not Controllers.KERNEL:
        raise RefusedError(Refusal.EINVAL, f"VM {vm_id}: its interrupt controllers are not KVM's")
    return vm


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


def _info(vmm: Vmm, vm: VmEntry) -> VmInfo:
    if vm.params.used_size is not None:
        used = vm.params.used_size()
    else:
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
