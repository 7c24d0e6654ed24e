"""A vCPU's registers in the five groups of vmm(4)'s READREGS and WRITEREGS.

Plain values, apart from KVM's structures: a segment's attributes are one number as in a VMCS, EFER
is an MSR, XCR0 is a control register. Each group is read or written as a whole.
"""

import enum
from collections.abc import Mapping
from typing import NamedTuple

from vmm_kvm.kvm import abi
from vmm_kvm.kvm.vcpu_state import VcpuState

GPRS = tuple(field[0] for field in abi.kvm_regs._fields_)
"""rax to r15, rip and rflags."""
SEGMENTS = ("cs", "ds", "es", "fs", "gs", "ss", "ldtr", "tr")
TABLES = ("gdtr", "idtr")
CRS = ("cr0", "cr2", "cr3", "cr4", "cr8", "xcr0")
DRS = ("dr0", "dr1", "dr2", "dr3", "dr6", "dr7")

MSR_EFER = 0xC000_0080
MSR_STAR = 0xC000_0081
MSR_LSTAR = 0xC000_0082
MSR_CSTAR = 0xC000_0083
MSR_SFMASK = 0xC000_0084
MSR_KERNELGSBASE = 0xC000_0102
MSR_MISC_ENABLE = 0x1A0
MSRS = (
    MSR_EFER,
    MSR_STAR,
    MSR_LSTAR,
    MSR_CSTAR,
    MSR_SFMASK,
    MSR_KERNELGSBASE,
    MSR_MISC_ENABLE,
)

_FPU_CONTROL = 0x37F  # Intel SDM vol. 1 §8.1.5: after FNINIT
_MXCSR = 0x1F80  # Intel SDM vol. 1 §10.2.3: after reset

# Positions of the bits of a segment in its attributes. Source: Intel SDM vol. 3 table 25-2.
_ATTRIBUTES = (
    ("type", 0, 0xF),
    ("s", 4, 1),
    ("dpl", 5, 3),
    ("present", 7, 1),
    ("avl", 12, 1),
    ("l", 13, 1),
    ("db", 14, 1),
    ("g", 15, 1),
    ("unusable", 16, 1),
)


class RegisterGroup(enum.IntFlag):
    """Groups of registers, by OpenBSD's bits."""

    GPR = 0x1
    SEGMENT = 0x2
    CR = 0x4
    MSR = 0x8
    DR = 0x10


ALL_GROUPS = (
    RegisterGroup.GPR
    | RegisterGroup.SEGMENT
    | RegisterGroup.CR
    | RegisterGroup.MSR
    | RegisterGroup.DR
)


class SegmentRegister(NamedTuple):
    """A segment register with its hidden part."""

    selector: int
    base: int
    limit: int
    """In bytes, inclusive."""
    attributes: int
    """The access rights of a VMCS: type, S, DPL, P, AVL, L, D/B, G; bit 16 means unusable."""


class TableRegister(NamedTuple):
    """GDTR or IDTR."""

    base: int
    limit: int
    """In bytes, inclusive."""


class Registers(NamedTuple):
    """Some groups of registers; None for a group that is not there."""

    gprs: Mapping[str, int] | None = None
    """By the names in GPRS."""
    segments: Mapping[str, SegmentRegister] | None = None
    """By the names in SEGMENTS."""
    tables: Mapping[str, TableRegister] | None = None
    """By the names in TABLES; they belong to the segment group."""
    crs: Mapping[str, int] | None = None
    """By the names in CRS."""
    msrs: Mapping[int, int] | None = None
    """By the numbers in MSRS."""
    drs: Mapping[str, int] | None = None
    """By the names in DRS."""

    @property
    def groups(self) -> RegisterGroup:
        """The present groups, with all their registers."""
        groups = RegisterGroup(0)
        if self.gprs is not None and set(self.gprs) == set(GPRS):
            groups |= RegisterGroup.GPR
        if self.segments is not None and set(self.segments) == set(SEGMENTS):
            has_tables = self.tables is not None and set(self.tables) == set(TABLES)
            groups |= RegisterGroup.SEGMENT if has_tables else RegisterGroup(0)
        if self.crs is not None and set(self.crs) == set(CRS):
            groups |= RegisterGroup.CR
        if self.msrs is not None and set(self.msrs) == set(MSRS):
            groups |= RegisterGroup.MSR
        if self.drs is not None and set(self.drs) == set(DRS):
            groups |= RegisterGroup.DR
        return groups


def get_registers(vcpu: VcpuState, groups: RegisterGroup) -> Registers:
    """Read `groups` of a vCPU that does not run.

    Raises:
        KvmError: the kernel refused.

    Source: OpenBSD vmm(4), VMM_IOC_READREGS.
    """
    sregs = vcpu.get_sregs()
    gprs = segments = tables = crs = msrs = drs = None
    if groups & RegisterGroup.GPR:
        regs = vcpu.get_regs()
        gprs = {name: int(getattr(regs, name)) for name in GPRS}
    if groups & RegisterGroup.SEGMENT:
        segments = {name: _segment(getattr(sregs, _kvm_name(name))) for name in SEGMENTS}
        tables = {
            name: TableRegister(table.base, table.limit)
            for name in TABLES
            for table in (getattr(sregs, _kvm_name(name)),)
        }
    if groups & RegisterGroup.CR:
        crs = {name: int(getattr(sregs, name)) for name in CRS if name != "xcr0"}
        xcrs = vcpu.get_xcrs()
        crs["xcr0"] = next((x.value for x in xcrs.xcrs[: xcrs.nr_xcrs] if x.xcr == 0), 0)
    if groups & RegisterGroup.MSR:
        msrs = dict.fromkeys(MSRS, 0) | vcpu.get_msrs(MSRS)
    if groups & RegisterGroup.DR:
        state = vcpu.get_debugregs()
        drs = dict(zip(DRS, (*state.db, state.dr6, state.dr7), strict=True))
    return Registers(gprs, segments, tables, crs, msrs, drs)


def set_registers(vcpu: VcpuState, registers: Registers, groups: RegisterGroup) -> None:
    """Write `groups` of `registers`, all of them there, to a vCPU that does not run.

    Segments, control registers and EFER are written at once, so that they need to fit together
    only with each other.

    Raises:
        KvmError: the state is invalid; then an unspecified part of it is written.

    Source: OpenBSD vmm(4), VMM_IOC_WRITEREGS.
    """
    sregs = vcpu.get_sregs()
    if groups & RegisterGroup.SEGMENT:
        for name, segment in (registers.segments or {}).items():
            setattr(sregs, _kvm_name(name), _kvm_segment(segment))
        for name, table in (registers.tables or {}).items():
            setattr(sregs, _kvm_name(name), abi.kvm_dtable(base=table.base, limit=table.limit))
    if groups & RegisterGroup.CR:
        for name, value in (registers.crs or {}).items():
            if name == "xcr0":
                xcrs = abi.kvm_xcrs(nr_xcrs=1)
                xcrs.xcrs[0].value = value
                vcpu.set_xcrs(xcrs)
            else:
                setattr(sregs, name, value)
    msrs = dict(registers.msrs or {}) if groups & RegisterGroup.MSR else {}
    if MSR_EFER in msrs:
        sregs.efer = msrs.pop(MSR_EFER)
    vcpu.set_sregs(sregs)
    if msrs:
        vcpu.set_msrs(msrs)
    if groups & RegisterGroup.GPR:
        vcpu.set_regs(abi.kvm_regs(**(registers.gprs or {})))
    if groups & RegisterGroup.DR:
        values = registers.drs or {}
        state = abi.kvm_debugregs(dr6=values["dr6"], dr7=values["dr7"])
        state.db[:] = [values[name] for name in DRS[:4]]
        vcpu.set_debugregs(state)


def reset(vcpu: VcpuState, registers: Registers) -> None:
    """Give a vCPU that does not run the state `registers`, all groups, and nothing pending.

    Raises:
        KvmError: the state is invalid.

    Source: OpenBSD vmm(4), VMM_IOC_RESETCPU.
    """
    flags = abi.KVM_VCPUEVENT_VALID_NMI_PENDING | abi.KVM_VCPUEVENT_VALID_SHADOW
    vcpu.set_vcpu_events(abi.kvm_vcpu_events(flags=flags))
    vcpu.set_fpu(abi.kvm_fpu(fcw=_FPU_CONTROL, mxcsr=_MXCSR))
    set_registers(vcpu, registers, ALL_GROUPS)


def _kvm_name(name: str) -> str:
    """Return the name in kvm_sregs of a segment or table register."""
    return {"ldtr": "ldt", "gdtr": "gdt", "idtr": "idt"}.get(name, name)


def _segment(segment: abi.kvm_segment) -> SegmentRegister:
    attributes = sum((getattr(segment, name) & mask) << at for name, at, mask in _ATTRIBUTES)
    return SegmentRegister(segment.selector, segment.base, segment.limit, attributes)


def _kvm_segment(segment: SegmentRegister) -> abi.kvm_segment:
    bits = {name: segment.attributes >> at & mask for name, at, mask in _ATTRIBUTES}
    return abi.kvm_segment(
        selector=segment.selector, base=segment.base, limit=segment.limit, **bits
    )
