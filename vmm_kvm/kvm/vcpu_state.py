"""The state of a vCPU: registers and events, read and written as the kernel's own structures.

Apart from `vcpu`, which runs the guest, only for length: a vCPU is one object.
"""

import ctypes
from collections.abc import Iterable, Mapping, Sequence
from errno import EINVAL

from vmm_kvm.errors import KvmError
from vmm_kvm.kvm import abi
from vmm_kvm.kvm.cpuid import CpuidEntry
from vmm_kvm.kvm.ioctl import ioctl

_XSAVE_REGION = ctypes.sizeof(abi.kvm_xsave)
_MOST_CPUID_ENTRIES = 256
_MOST_MSRS = 255  # per call: the kernel wants fewer than 256
_SIGSET_BYTES = 8  # the kernel's sigset_t, not libc's


class VcpuState:
    """The state that `Vcpu` can get and set; called by its thread, or while it does not run."""

    __slots__ = ("_has_xsave2", "fd", "xsave_size")

    def __init__(self, fd: int, xsave_size: int) -> None:
        """Use the vCPU `fd`; `xsave_size` is KVM_CAP_XSAVE2's value, bytes, 0 without it."""
        self.fd = fd
        self.xsave_size = max(xsave_size, _XSAVE_REGION)
        """Bytes of what `get_xsave` returns."""
        self._has_xsave2 = xsave_size > 0

    def get_regs(self) -> abi.kvm_regs:
        """Return the general registers, RIP and RFLAGS.

        Raises:
            KvmError: the kernel refused.

        Source: KVM API §4.11.
        """
        state = abi.kvm_regs()
        ioctl(self.fd, abi.KVM_GET_REGS, state)
        return state

    def set_regs(self, state: abi.kvm_regs) -> None:
        """Set the general registers, RIP and RFLAGS.

        Raises:
            KvmError: the state is invalid.

        Source: KVM API §4.12.
        """
        ioctl(self.fd, abi.KVM_SET_REGS, state)

    def get_sregs(self) -> abi.kvm_sregs:
        """Return the segment, table and control registers, EFER and the APIC base.

        Raises:
            KvmError: the kernel refused.

        Source: KVM API §4.13.
        """
        state = abi.kvm_sregs()
        ioctl(self.fd, abi.KVM_GET_SREGS, state)
        return state

    def set_sregs(self, state: abi.kvm_sregs) -> None:
        """Set the segment, table and control registers, EFER and the APIC base.

        Raises:
            KvmError: the state is invalid.

        Source: KVM API §4.14.
        """
        ioctl(self.fd, abi.KVM_SET_SREGS, state)

    def get_fpu(self) -> abi.kvm_fpu:
        """Return the x87 and SSE registers.

        Raises:
            KvmError: the kernel refused.

        Source: KVM API §4.22.
        """
        state = abi.kvm_fpu()
        ioctl(self.fd, abi.KVM_GET_FPU, state)
        return state

    def set_fpu(self, state: abi.kvm_fpu) -> None:
        """Set the x87 and SSE registers.

        Raises:
            KvmError: the state is invalid.

        Source: KVM API §4.23.
        """
        ioctl(self.fd, abi.KVM_SET_FPU, state)

    def get_xsave(self) -> ctypes.Structure:
        """Return all extended state as XSAVE lays it out: a kvm_xsave of the size KVM tells.

        Raises:
            KvmError: the kernel refused.

        Source: KVM API §4.42, §4.134.
        """
        extra = (self.xsave_size - _XSAVE_REGION) // 4
        state = abi.with_entries(abi.kvm_xsave, ctypes.c_uint32, extra)()
        ioctl(self.fd, abi.KVM_GET_XSAVE2 if self._has_xsave2 else abi.KVM_GET_XSAVE, state)
        return state

    def set_xsave(self, state: ctypes.Structure) -> None:
        """Set all extended state; `state` is as large as what `get_xsave` returns.

        Raises:
            KvmError: the state is invalid.
            ValueError: `state` is too small.

        Source: KVM API §4.43.
        """
        needed = self.xsave_size
        if ctypes.sizeof(state) < needed:
            raise ValueError(f"XSAVE state of {ctypes.sizeof(state)} bytes, {needed} are needed")
        ioctl(self.fd, abi.KVM_SET_XSAVE, state)

    def get_xcrs(self) -> abi.kvm_xcrs:
        """Return the extended control registers.

        Raises:
            KvmError: the kernel refused.

        Source: KVM API §4.44.
        """
        state = abi.kvm_xcrs()
        ioctl(self.fd, abi.KVM_GET_XCRS, state)
        return state

    def set_xcrs(self, state: abi.kvm_xcrs) -> None:
        """Set the extended control registers.

        Raises:
            KvmError: the state is invalid.

        Source: KVM API §4.45.
        """
        ioctl(self.fd, abi.KVM_SET_XCRS, state)

    def get_msrs(self, indices: Sequence[int]) -> dict[int, int]:
        """Return the model-specific registers `indices`, leaving out those that KVM cannot read.

        Raises:
            KvmError: the kernel refused altogether.

        Source: KVM API §4.18.
        """
        found: dict[int, int] = {}
        remaining = list(indices)
        while remaining:
            part = remaining[:_MOST_MSRS]
            table = _msr_table(dict.fromkeys(part, 0))
            done = ioctl(self.fd, abi.KVM_GET_MSRS, table)
            found.update({entry.index: entry.data for entry in table.entries[:done]})
            # The kernel stops at the first that it cannot read: skip that one.
            remaining = remaining[done + (done < len(part)) :]
        return found

    def set_msrs(self, values: Mapping[int, int]) -> None:
        """Set model-specific registers, in the order of `values`.

        Raises:
            KvmError: KVM does not know one, or refuses its value; the hint names it.

        Source: KVM API §4.19.
        """
        for start in range(0, len(values), _MOST_MSRS):
            part = dict(list(values.items())[start : start + _MOST_MSRS])
            done = ioctl(self.fd, abi.KVM_SET_MSRS, _msr_table(part))
            if done < len(part):
                index, value = list(part.items())[done]
                raise KvmError("KVM_SET_MSRS", EINVAL, f"MSR {index:#x} cannot be {value:#x}")

    def get_lapic(self) -> abi.kvm_lapic_state:
        """Return the local APIC's registers.

        Raises:
            KvmError: the kernel refused.

        Source: KVM API §4.57.
        """
        state = abi.kvm_lapic_state()
        ioctl(self.fd, abi.KVM_GET_LAPIC, state)
        return state

    def set_lapic(self, state: abi.kvm_lapic_state) -> None:
        """Set the local APIC's registers.

        Raises:
            KvmError: the state is invalid.

        Source: KVM API §4.58.
        """
        ioctl(self.fd, abi.KVM_SET_LAPIC, state)

    def get_vcpu_events(self) -> abi.kvm_vcpu_events:
        """Return pending exceptions, interrupts, NMIs and SMIs.

        Raises:
            KvmError: the kernel refused.

        Source: KVM API §4.31.
        """
        state = abi.kvm_vcpu_events()
        ioctl(self.fd, abi.KVM_GET_VCPU_EVENTS, state)
        return state

    def set_vcpu_events(self, state: abi.kvm_vcpu_events) -> None:
        """Set pending exceptions, interrupts, NMIs and SMIs.

        Raises:
            KvmError: the state is invalid.

        Source: KVM API §4.32.
        """
        ioctl(self.fd, abi.KVM_SET_VCPU_EVENTS, state)

    def get_debugregs(self) -> abi.kvm_debugregs:
        """Return DR0 to DR3, DR6 and DR7.

        Raises:
            KvmError: the kernel refused.

        Source: KVM API §4.33.
        """
        state = abi.kvm_debugregs()
        ioctl(self.fd, abi.KVM_GET_DEBUGREGS, state)
        return state

    def set_debugregs(self, state: abi.kvm_debugregs) -> None:
        """Set DR0 to DR3, DR6 and DR7.

        Raises:
            KvmError: the state is invalid.

        Source: KVM API §4.34.
        """
        ioctl(self.fd, abi.KVM_SET_DEBUGREGS, state)

    def get_mp_state(self) -> int:
        """Return whether the vCPU runs, halts or waits for an IPI: a KVM_MP_STATE number.

        Raises:
            KvmError: the kernel refused.

        Source: KVM API §4.38.
        """
        state = abi.kvm_mp_state()
        ioctl(self.fd, abi.KVM_GET_MP_STATE, state)
        return int(state.mp_state)

    def set_mp_state(self, state: int) -> None:
        """Set the KVM_MP_STATE number.

        Raises:
            KvmError: the number is unknown, or the VM has no irqchip.

        Source: KVM API §4.39.
        """
        ioctl(self.fd, abi.KVM_SET_MP_STATE, abi.kvm_mp_state(state))

    def get_cpuid(self) -> list[CpuidEntry]:
        """Return what CPUID tells this vCPU.

        Raises:
            KvmError: the kernel refused.

        Source: Linux arch/x86/kvm/cpuid.c, KVM_GET_CPUID2.
        """
        table = abi.with_entries(abi.kvm_cpuid2, abi.kvm_cpuid_entry2, _MOST_CPUID_ENTRIES)(
            nent=_MOST_CPUID_ENTRIES
        )
        ioctl(self.fd, abi.KVM_GET_CPUID2, table)
        return [
            CpuidEntry(e.function, e.index, e.flags, e.eax, e.ebx, e.ecx, e.edx)
            for e in table.entries[: table.nent]
        ]

    def set_cpuid(self, entries: Sequence[CpuidEntry]) -> None:
        """Set what CPUID tells this vCPU; before its first `run()`. At most 256 entries.

        Raises:
            KvmError: too many entries, or the vCPU has run.

        Source: KVM API §4.20.
        """
        table = abi.with_entries(abi.kvm_cpuid2, abi.kvm_cpuid_entry2, len(entries))(
            nent=len(entries)
        )
        table.entries[:] = [
            abi.kvm_cpuid_entry2(e.function, e.subleaf, e.flags, e.eax, e.ebx, e.ecx, e.edx)
            for e in entries
        ]
        ioctl(self.fd, abi.KVM_SET_CPUID2, table)

    def get_tsc_khz(self) -> int:
        """Return the rate of the vCPU's time-stamp counter, kHz.

        Raises:
            KvmError: the host's is not stable.

        Source: KVM API §4.56.
        """
        return ioctl(self.fd, abi.KVM_GET_TSC_KHZ)

    def set_tsc_khz(self, khz: int) -> None:
        """Set the rate of the vCPU's time-stamp counter, kHz; 0 means the host's.

        Raises:
            KvmError: neither is that the host's rate nor can the processor scale.

        Source: KVM API §4.55.
        """
        ioctl(self.fd, abi.KVM_SET_TSC_KHZ, khz)

    def get_tsc_offset(self) -> int:
        """Return the guest's offset from the host's TSC, modulo 2**64.

        Raises:
            KvmError: the kernel is older than 5.16.

        Source: Linux Documentation/virt/kvm/devices/vcpu.rst §4.
        """
        value = ctypes.c_uint64()
        ioctl(self.fd, abi.KVM_GET_DEVICE_ATTR, _tsc_offset(value))
        return value.value

    def set_tsc_offset(self, offset: int) -> None:
        """Set the guest's offset from the host's TSC, modulo 2**64.

        Raises:
            KvmError: the kernel is older than 5.16.

        Source: Linux Documentation/virt/kvm/devices/vcpu.rst §4.
        """
        value = ctypes.c_uint64(offset)
        ioctl(self.fd, abi.KVM_SET_DEVICE_ATTR, _tsc_offset(value))

    def kvmclock_ctrl(self) -> None:
        """Tell the guest, through kvmclock, that it was paused: no soft-lockup alarm then.

        Raises:
            KvmError: the guest has not set kvmclock up (EINVAL).

        Source: KVM API §4.70.
        """
        ioctl(self.fd, abi.KVM_KVMCLOCK_CTRL)

    # Events and debugging

    def nmi(self) -> None:
        """Queue a non-maskable interrupt.

        Raises:
            KvmError: the kernel refused.

        Source: KVM API §4.64.
        """
        ioctl(self.fd, abi.KVM_NMI)

    def interrupt(self, vector: int) -> None:
        """Queue interrupt `vector`, 0 to 255; only without an irqchip.

        The guest must be able to take it: see `request_interrupt_window` in `kvm_run`.

        Raises:
            KvmError: the vector is out of range (EINVAL), one is queued already (EEXIST), or the
                VM has an irqchip (ENXIO).

        Source: KVM API §4.16.
        """
        ioctl(self.fd, abi.KVM_INTERRUPT, abi.kvm_interrupt(irq=vector))

    def set_guest_debug(self, control: int, debugreg: Sequence[int] = ()) -> None:
        """Choose what leaves as a Debug exit: an OR of KVM_GUESTDBG numbers, 0 for nothing.

        `debugreg` is DR0 to DR7 for hardware breakpoints.

        Raises:
            KvmError: KVM lacks what `control` asks for.

        Source: KVM API §4.87.
        """
        debug = abi.kvm_guest_debug(control=control)
        debug.arch.debugreg[: len(debugreg)] = list(debugreg)
        ioctl(self.fd, abi.KVM_SET_GUEST_DEBUG, debug)

    def translate(self, linear_address: int) -> int | None:
        """Return the guest-physical address of `linear_address`, None if it is not mapped.

        Raises:
            KvmError: the kernel refused.

        Source: KVM API §4.15.
        """
        translation = abi.kvm_translation(linear_address=linear_address)
        ioctl(self.fd, abi.KVM_TRANSLATE, translation)
        return int(translation.physical_address) if translation.valid else None

    def set_signal_mask(self, blocked: Iterable[int] | None) -> None:
        """Block only the signals `blocked` while in `run()`; None: the thread's own mask holds.

        Raises:
            KvmError: the kernel refused.

        Source: KVM API §4.21.
        """
        if blocked is None:
            ioctl(self.fd, abi.KVM_SET_SIGNAL_MASK)
            return
        bits = sum(1 << (number - 1) for number in set(blocked))
        mask = abi.with_entries(abi.kvm_signal_mask, ctypes.c_uint8, _SIGSET_BYTES)(
            len=_SIGSET_BYTES
        )
        mask.sigset[:] = list(bits.to_bytes(_SIGSET_BYTES, "little"))
        ioctl(self.fd, abi.KVM_SET_SIGNAL_MASK, mask)

    def enable_cap(self, capability: int, args: Sequence[int] = ()) -> None:
        """Enable `capability` for this vCPU with at most four numbers as arguments.

        Raises:
            KvmError: KVM lacks it, or refuses the arguments.

        Source: KVM API §4.37.
        """
        cap = abi.kvm_enable_cap(cap=capability)
        cap.args[: len(args)] = list(args)
        ioctl(self.fd, abi.KVM_ENABLE_CAP, cap)


def _tsc_offset(value: ctypes.c_uint64) -> abi.kvm_device_attr:
    return abi.kvm_device_attr(
        group=abi.KVM_VCPU_TSC_CTRL,
        attr=abi.KVM_VCPU_TSC_OFFSET,
        addr=ctypes.addressof(value),
    )


def _msr_table(values: Mapping[int, int]) -> ctypes.Structure:
    table = abi.with_entries(abi.kvm_msrs, abi.kvm_msr_entry, len(values))(nmsrs=len(values))
    table.entries[:] = [abi.kvm_msr_entry(index=i, data=v) for i, v in values.items()]
    return table
