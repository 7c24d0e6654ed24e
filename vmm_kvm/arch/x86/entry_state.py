"""From a boot path's Entry to KVM's registers."""

from vmm_kvm.arch.x86.entry import Entry, Segment
from vmm_kvm.kvm import abi
from vmm_kvm.kvm.vcpu import Vcpu


def load_entry(vcpu: Vcpu, entry: Entry) -> None:
    """Set the registers of a vCPU that has not run yet to what `entry` describes.

    Parts that an Entry leaves out, such as the local APIC's base, stay as after reset.

    Raises:
        KvmError: KVM refuses the state.
    """
    sregs = vcpu.get_sregs()
    for name in ("ds", "es", "fs", "gs", "ss"):
        setattr(sregs, name, _segment(entry.data))
    sregs.cs = _segment(entry.code)
    sregs.tr = _segment(entry.task)
    sregs.ldt = abi.kvm_segment(type=2, present=1, limit=0xFFFF, unusable=1)
    sregs.gdt = abi.kvm_dtable(base=entry.gdt_base, limit=entry.gdt_limit)
    sregs.idt = abi.kvm_dtable(limit=entry.idt_limit)
    sregs.cr0, sregs.cr2, sregs.cr3, sregs.cr4 = entry.cr0, 0, entry.cr3, entry.cr4
    sregs.efer = entry.efer
    vcpu.set_sregs(sregs)
    vcpu.set_regs(abi.kvm_regs(rip=entry.rip, rflags=entry.rflags, **entry.registers))


def _segment(segment: Segment) -> abi.kvm_segment:
    return abi.kvm_segment(**segment._asdict())
