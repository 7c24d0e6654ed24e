"""Exits that no device serves, which end the machine."""

from vmm_kvm.errors import KvmError
from vmm_kvm.kvm import abi
from vmm_kvm.kvm.exits import Exit, FailEntry, InternalError, Shutdown, SystemEvent
from vmm_kvm.kvm.vcpu import Vcpu
from vmm_kvm.machine.spec import Crash, Outcome, TripleFault


def outcome_of(name: str, vcpu: Vcpu, reason: Exit) -> Outcome:
    """Return the outcome of an exit of VM `name` that is no device access; on the vCPU's thread."""
    match reason:
        case Shutdown():
            return TripleFault(f"{name}: triple fault: {_registers(vcpu)}")
        case InternalError():
            instruction = reason.instruction.hex(" ") or "unknown"
            return Crash(
                f"{name}: KVM internal error {reason.suberror}: "
                f"instruction {instruction}: {_registers(vcpu)}"
            )
        case FailEntry():
            return Crash(f"{name}: invalid vCPU state {reason.reason:#x}: {_registers(vcpu)}")
        case SystemEvent(type=abi.KVM_SYSTEM_EVENT_SEV_TERM):
            return Crash(f"{name}: the guest cannot run with SEV-ES, and has ended itself")
        case _:
            kind = type(reason).__name__
            return Crash(f"{name}: unexpected exit {kind}: {_registers(vcpu)}")


def _registers(vcpu: Vcpu) -> str:
    try:
        regs, sregs = vcpu.get_regs(), vcpu.get_sregs()
    except KvmError:  # with SEV-ES they are encrypted
        return f"vcpu{vcpu.index}, whose registers cannot be read"
    return (
        f"vcpu{vcpu.index} rip={regs.rip:#x} rsp={regs.rsp:#x} rax={regs.rax:#x} "
        f"rflags={regs.rflags:#x} cs={sregs.cs.selector:#x} cr0={sregs.cr0:#x} "
        f"cr2={sregs.cr2:#x} cr3={sregs.cr3:#x} cr4={sregs.cr4:#x} efer={sregs.efer:#x}"
    )
