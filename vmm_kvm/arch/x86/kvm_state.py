"""KVM's state of a PC: vCPUs, interrupt controllers, PIT and clock, as bytes.

A state holds the kernel's own structures, unread: to restore a vCPU from bytes takes a seventh of
the time that ctypes objects take. The order of the calls matters, and each reason stands beside
its line.

Time stands still in a state: kvmclock and each vCPU's TSC go on from where they were, or, by
`ClockPolicy.NOW`, from where they would be had the guest run on.

Source: KVM API §4; Linux Documentation/virt/kvm/devices/vcpu.rst §4.
"""

import ctypes
import enum
import struct
import time
from collections.abc import Sequence
from errno import EINVAL, ENXIO
from typing import Annotated, Literal

from vmm_kvm.errors import KvmError, StateError
from vmm_kvm.kvm import abi
from vmm_kvm.kvm.ioctl import exchange, get_bytes, set_bytes
from vmm_kvm.kvm.vcpu import Vcpu
from vmm_kvm.kvm.vm import Vm
from vmm_kvm.state import U32, U64, Blob, PartState, Range

_NANOSECONDS = 1_000_000_000
_MSR_IA32_TSC = 0x10
_MSR_IA32_MCG_CTL = 0x17B  # readable and not writable where MCG_CAP has no CTL_P
_MSR_IA32_TSC_DEADLINE = 0x6E0
_APIC_LVTT = 0x320
_LVTT_MODE = 0b11 << 17
_LVTT_TSC_DEADLINE = 0b10 << 17

_MSR_HEADER = struct.Struct("=II")  # nmsrs, pad
_MSR_ENTRY = struct.Struct("=IIQ")  # index, reserved, data
_MSRS_MAX = 4096
_MSRS_PER_CALL = 255
_CPUID_HEADER = struct.Struct("=II")  # nent, padding
_CPUID_ENTRY_SIZE = ctypes.sizeof(abi.kvm_cpuid_entry2)
_CPUID_ENTRIES_MAX = 256
_NESTED_MAX = 1 << 16  # bytes; today's kernels have less than 13 KiB
_CHIP_ID = struct.Struct("=I")

_SIZES = {
    "regs": ctypes.sizeof(abi.kvm_regs),
    "sregs": ctypes.sizeof(abi.kvm_sregs2),
    "xcrs": ctypes.sizeof(abi.kvm_xcrs),
    "debugregs": ctypes.sizeof(abi.kvm_debugregs),
    "lapic": ctypes.sizeof(abi.kvm_lapic_state),
    "events": ctypes.sizeof(abi.kvm_vcpu_events),
}


class VcpuRecord(PartState):
    """The state of a vCPU; of the blobs, `cpuid` and `msrs` are entries without their header."""

    mp_state: Annotated[int, Range(0, abi.KVM_MP_STATE_SIPI_RECEIVED)]
    tsc_khz: U32
    """The rate of its TSC; 0 where the host's is not stable."""
    tsc_offset: U64 | None
    """The offset from the host's TSC; None if the kernel does not tell it."""
    regs: Blob
    sregs: Blob
    """A kvm_sregs2."""
    xsave: Blob
    xcrs: Blob
    debugregs: Blob
    lapic: Blob
    cpuid: Blob
    msrs: Blob
    nested: Blob
    """Empty where KVM has no nested virtualisation."""
    events: Blob
    version: Literal[1] = 1


class IrqchipRecord(PartState):
    """The state of the PICs and the IOAPIC: a kvm_irqchip each."""

    pic_master: Blob
    pic_slave: Blob
    ioapic: Blob
    version: Literal[1] = 1


class PitRecord(PartState):
    """The state of the i8254: a kvm_pit_state2."""

    pit: Blob
    version: Literal[1] = 1


class ClockRecord(PartState):
    """kvmclock at the instant that the rest belongs to."""

    clock_ns: U64
    realtime_ns: U64
    """The host's time at that instant, since 1970."""
    host_tsc: U64 | None
    """The host's TSC at that instant; None where it is not stable."""
    version: Literal[1] = 1


class KvmRecord(PartState):
    """Everything that KVM keeps of a VM."""

    clock: ClockRecord
    vcpus: tuple[VcpuRecord, ...]
    irqchip: IrqchipRecord
    pit: PitRecord


class ClockPolicy(enum.Enum):
    """The value from which a restored guest's clocks continue."""

    FROZEN = "frozen"
    """From where they were when it was saved; a TSC only where KVM can set its offset."""
    NOW = "now"
    """From where they would be if it had run on, as far as both hosts can tell."""


# Saving; no vCPU runs, and each has completed the access that it came out for


def save_kvm(vm: Vm, vcpus: Sequence[Vcpu], msrs: Sequence[int]) -> KvmRecord:
    """Return the state of a VM with KVM's interrupt controllers; `msrs` is `Kvm.msr_indices`.

    Raises:
        KvmError: the kernel refused.
    """
    clock = _save_clock(vm)  # first: the guest's time stands from here on
    records: list[VcpuRecord] = []
    for vcpu in vcpus:
        record = _save_vcpu(vcpu, vm, msrs)
        if not records:  # the others' need not be found out anew
            msrs = [entry[0] for entry in _MSR_ENTRY.iter_unpack(record.msrs)]
        records.append(record)
    return KvmRecord(
        clock=clock,
        vcpus=tuple(records),
        irqchip=IrqchipRecord(
            pic_master=_get_irqchip(vm, abi.KVM_IRQCHIP_PIC_MASTER),
            pic_slave=_get_irqchip(vm, abi.KVM_IRQCHIP_PIC_SLAVE),
            ioapic=_get_irqchip(vm, abi.KVM_IRQCHIP_IOAPIC),
        ),
        pit=PitRecord(pit=get_bytes(vm.fd, abi.KVM_GET_PIT2, ctypes.sizeof(abi.kvm_pit_state2))),
    )


def _save_clock(vm: Vm) -> ClockRecord:
    clock = vm.get_clock()
    return ClockRecord(
        clock_ns=clock.clock,
        # If KVM does not return both at once, they are some microseconds apart.
        realtime_ns=clock.realtime if clock.flags & abi.KVM_CLOCK_REALTIME else time.time_ns(),
        host_tsc=clock.host_tsc if clock.flags & abi.KVM_CLOCK_HOST_TSC else None,
    )


def _save_vcpu(vcpu: Vcpu, vm: Vm, msrs: Sequence[int]) -> VcpuRecord:
    fd = vcpu.fd
    # First: to ask for it runs pending APIC events, which may change RIP and CS.
    mp_state = vcpu.get_mp_state()
    regs = get_bytes(fd, abi.KVM_GET_REGS, _SIZES["regs"])
    sregs = get_bytes(fd, abi.KVM_GET_SREGS2, _SIZES["sregs"])
    xsave = bytes(vcpu.get_xsave())
    xcrs = get_bytes(fd, abi.KVM_GET_XCRS, _SIZES["xcrs"])
    debugregs = get_bytes(fd, abi.KVM_GET_DEBUGREGS, _SIZES["debugregs"])
    lapic = get_bytes(fd, abi.KVM_GET_LAPIC, _SIZES["lapic"])
    khz, offset = _tsc(vcpu)
    return VcpuRecord(
        mp_state=mp_state,
        tsc_khz=khz,
        tsc_offset=offset,
        regs=regs,
        sregs=sregs,
        xsave=xsave,
        xcrs=xcrs,
        debugregs=debugregs,
        lapic=lapic,
        cpuid=_get_cpuid(fd),
        msrs=_get_msrs(fd, [index for index in msrs if index != _MSR_IA32_MCG_CTL]),
        nested=_get_nested(fd, vm),
        # Last: all else may add events.
        events=get_bytes(fd, abi.KVM_GET_VCPU_EVENTS, _SIZES["events"]),
    )


def _tsc(vcpu: Vcpu) -> tuple[int, int | None]:
    try:
        khz = vcpu.get_tsc_khz()
    except KvmError:  # the host's TSC is not stable
        khz = 0
    try:
        return khz, vcpu.get_tsc_offset()
    except KvmError as err:
        if err.errno not in {ENXIO, EINVAL}:
            raise
        return khz, None  # a kernel without the attribute


def _get_cpuid(fd: int) -> bytes:
    size = _CPUID_HEADER.size + _CPUID_ENTRIES_MAX * _CPUID_ENTRY_SIZE
    head = _CPUID_HEADER.pack(_CPUID_ENTRIES_MAX, 0)
    table = get_bytes(fd, abi.KVM_GET_CPUID2, size, head)
    count, _ = _CPUID_HEADER.unpack_from(table)
    return table[_CPUID_HEADER.size :][: count * _CPUID_ENTRY_SIZE]


def _get_msrs(fd: int, indices: Sequence[int]) -> bytes:
    found = b""
    remaining = list(indices)
    while remaining:
        part = remaining[:_MSRS_PER_CALL]
        table = (ctypes.c_char * (_MSR_HEADER.size + len(part) * _MSR_ENTRY.size))()
        _MSR_HEADER.pack_into(table, 0, len(part), 0)
        for number, index in enumerate(part):
            _MSR_ENTRY.pack_into(table, _MSR_HEADER.size + number * _MSR_ENTRY.size, index, 0, 0)
        done = exchange(fd, abi.KVM_GET_MSRS, table)
        found += table.raw[_MSR_HEADER.size :][: done * _MSR_ENTRY.size]
        # The kernel stops at the first that it refuses to read: skip that one.
        remaining = remaining[done + (done < len(part)) :]
    return found


def _get_nested(fd: int, vm: Vm) -> bytes:
    size = vm.check_extension(abi.KVM_CAP_NESTED_STATE)
    if not size:
        return b""
    header = abi.kvm_nested_state(size=size)
    state = get_bytes(fd, abi.KVM_GET_NESTED_STATE, size, bytes(header))
    return state[: abi.kvm_nested_state.from_buffer_copy(state).size]


def _get_irqchip(vm: Vm, chip: int) -> bytes:
    size = ctypes.sizeof(abi.kvm_irqchip)
    return get_bytes(vm.fd, abi.KVM_GET_IRQCHIP, size, _CHIP_ID.pack(chip))


# Restoring; no vCPU has run


def restore_kvm(
    vm: Vm, vcpus: Sequence[Vcpu], record: KvmRecord, policy: ClockPolicy = ClockPolicy.FROZEN
) -> None:
    """Restore `record` into a VM with as many vCPUs, none of which has run.

    The interrupt controllers come last: their saved pin levels replace what devices drive before.

    Raises:
        StateError: a structure has a size that this host's does not have.
        KvmError: the kernel or the processor does not take the state.
    """
    _check(vm, vcpus, record)
    now = _save_clock(vm)
    gone_ns = 0
    if policy is ClockPolicy.NOW:
        gone_ns = max(now.realtime_ns - record.clock.realtime_ns, 0)
    for vcpu, state in zip(vcpus, record.vcpus, strict=True):
        _restore_vcpu(vcpu, state, _tsc_offset(state, record.clock, now, gone_ns))
    _align_tscs(vcpus, record)
    set_bytes(vm.fd, abi.KVM_SET_PIT2, record.pit.pit)
    vm.set_clock(abi.kvm_clock_data(clock=record.clock.clock_ns + gone_ns))
    for chip in _chips(record.irqchip):
        set_bytes(vm.fd, abi.KVM_SET_IRQCHIP, chip)


def _align_tscs(vcpus: Sequence[Vcpu], record: KvmRecord) -> None:
    """Give TSCs that shared an offset one offset again, where only their values could be set."""
    offsets = {state.tsc_offset for state in record.vcpus}
    if len(offsets) == 1 and offsets != {None}:
        offset = vcpus[0].get_tsc_offset()
        for vcpu in vcpus[1:]:
            if vcpu.get_tsc_offset() != offset:
                vcpu.set_tsc_offset(offset)


def _tsc_offset(state: VcpuRecord, then: ClockRecord, now: ClockRecord, gone_ns: int) -> int | None:
    """Return the offset by which the TSC continues from then; None if it is unknown."""
    if state.tsc_offset is None or then.host_tsc is None or now.host_tsc is None:
        return None
    gone = gone_ns * state.tsc_khz * 1000 // _NANOSECONDS
    return (then.host_tsc + state.tsc_offset + gone - now.host_tsc) % (1 << 64)


def _restore_vcpu(vcpu: Vcpu, state: VcpuRecord, tsc_offset: int | None) -> None:
    fd = vcpu.fd
    if state.tsc_khz and state.tsc_khz != _tsc(vcpu)[0]:
        vcpu.set_tsc_khz(state.tsc_khz)
    count = len(state.cpuid) // _CPUID_ENTRY_SIZE
    set_bytes(fd, abi.KVM_SET_CPUID2, _CPUID_HEADER.pack(count, 0) + state.cpuid)
    vcpu.set_mp_state(state.mp_state)
    set_bytes(fd, abi.KVM_SET_REGS, state.regs)
    set_bytes(fd, abi.KVM_SET_SREGS2, state.sregs)
    if state.nested:
        set_bytes(fd, abi.KVM_SET_NESTED_STATE, state.nested)  # needs CR4 and EFER
    set_bytes(fd, abi.KVM_SET_XSAVE, state.xsave)
    set_bytes(fd, abi.KVM_SET_XCRS, state.xcrs)
    set_bytes(fd, abi.KVM_SET_DEBUGREGS, state.debugregs)
    set_bytes(fd, abi.KVM_SET_LAPIC, state.lapic)  # needs the APIC base of the special registers
    tsc, deadline, others = _split_msrs(state.msrs)
    _set_msrs(fd, [entry for entry in (tsc,) if entry])
    if tsc_offset is not None:
        vcpu.set_tsc_offset(tsc_offset)
    _set_msrs(fd, others)
    if deadline and _has_deadline_timer(state.lapic):
        # After the TSC, by which it is armed. A timer that has expired unobserved reads as 0, which
        # would disarm it; a deadline in the past makes it fire at once.
        index, value = deadline
        _set_msrs(fd, [(index, value or (tsc[1] if tsc else 1))])
    set_bytes(fd, abi.KVM_SET_VCPU_EVENTS, state.events)  # after what clears events


def _split_msrs(
    data: bytes,
) -> tuple[tuple[int, int] | None, tuple[int, int] | None, list[tuple[int, int]]]:
    values = {index: value for index, _, value in _MSR_ENTRY.iter_unpack(data)}
    tsc = values.pop(_MSR_IA32_TSC, None)
    deadline = values.pop(_MSR_IA32_TSC_DEADLINE, None)
    return (
        None if tsc is None else (_MSR_IA32_TSC, tsc),
        None if deadline is None else (_MSR_IA32_TSC_DEADLINE, deadline),
        list(values.items()),
    )


def _set_msrs(fd: int, entries: Sequence[tuple[int, int]]) -> None:
    for start in range(0, len(entries), _MSRS_PER_CALL):
        part = entries[start : start + _MSRS_PER_CALL]
        table = _MSR_HEADER.pack(len(part), 0) + b"".join(
            _MSR_ENTRY.pack(index, 0, value) for index, value in part
        )
        done = set_bytes(fd, abi.KVM_SET_MSRS, table)
        if done < len(part):
            index, value = part[done]
            raise KvmError("KVM_SET_MSRS", EINVAL, f"MSR {index:#x} cannot be {value:#x}")


def _has_deadline_timer(lapic: bytes) -> bool:
    mode = int.from_bytes(lapic[_APIC_LVTT : _APIC_LVTT + 4], "little") & _LVTT_MODE
    return mode == _LVTT_TSC_DEADLINE


def _chips(record: IrqchipRecord) -> tuple[bytes, ...]:
    """Return the chips by KVM's numbers."""
    return record.pic_master, record.pic_slave, record.ioapic


def _check(vm: Vm, vcpus: Sequence[Vcpu], record: KvmRecord) -> None:
    """Refuse structures of other sizes than this host's: the kernel would read behind them."""
    if len(record.vcpus) != len(vcpus):
        raise StateError(f"{len(record.vcpus)} vCPUs, not {len(vcpus)}")
    for number, (vcpu, state) in enumerate(zip(vcpus, record.vcpus, strict=True)):
        sizes = {**_SIZES, "xsave": vcpu.xsave_size}
        for name, size in sizes.items():
            found = len(getattr(state, name))
            if found != size:
                raise StateError(f"vcpu{number}: {name}: {found} bytes, not {size}")
        _check_entries(f"vcpu{number}: cpuid", state.cpuid, _CPUID_ENTRY_SIZE, _CPUID_ENTRIES_MAX)
        _check_entries(f"vcpu{number}: msrs", state.msrs, _MSR_ENTRY.size, _MSRS_MAX)
        _check_nested(f"vcpu{number}: nested", state.nested, vm)
    for number, chip in enumerate(_chips(record.irqchip)):
        size = ctypes.sizeof(abi.kvm_irqchip)
        if len(chip) != size or _CHIP_ID.unpack_from(chip)[0] != number:
            raise StateError(f"irqchip: {len(chip)} bytes that are not chip {number}")
    if len(record.pit.pit) != ctypes.sizeof(abi.kvm_pit_state2):
        raise StateError(f"pit: {len(record.pit.pit)} bytes")


def _check_entries(name: str, data: bytes, size: int, most: int) -> None:
    if len(data) % size or not 0 < len(data) <= most * size:
        raise StateError(f"{name}: {len(data)} bytes are no 1 to {most} entries")


def _check_nested(name: str, data: bytes, vm: Vm) -> None:
    if not data:
        return
    least = ctypes.sizeof(abi.kvm_nested_state)
    if not least <= len(data) <= min(vm.check_extension(abi.KVM_CAP_NESTED_STATE), _NESTED_MAX):
        raise StateError(f"{name}: {len(data)} bytes")
    if abi.kvm_nested_state.from_buffer_copy(data).size != len(data):
        raise StateError(f"{name}: not as long as it says")
