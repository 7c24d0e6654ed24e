"""KVM's binary interface on x86-64: structures, requests and constants under their C names.

A table in the order of <asm/kvm.h> and <linux/kvm.h>; a test compares all of it, field by field,
with the installed headers. Structures that C leaves unnamed are nested classes in CamelCase.
Left out: other architectures, encrypted guests, Hyper-V and Xen.

A flexible array is the last field, of length 0; `with_entries` makes the structure for a length.
"""

import functools
from ctypes import (
    Structure,
    Union,
    c_int32,
    c_int64,
    c_uint8,
    c_uint16,
    c_uint32,
    c_uint64,
)

from vmm_kvm.kvm.ioctl import _IO, _IOR, _IOW, _IOWR, OPERATIONS

# <asm/kvm.h>

KVM_PIO_PAGE_OFFSET = 1
KVM_COALESCED_MMIO_PAGE_OFFSET = 2

DE_VECTOR = 0
DB_VECTOR = 1
BP_VECTOR = 3
UD_VECTOR = 6
DF_VECTOR = 8
GP_VECTOR = 13
PF_VECTOR = 14

KVM_NR_INTERRUPTS = 256


class kvm_pic_state(Structure):
    _fields_ = (
        ("last_irr", c_uint8),  # edge detection
        ("irr", c_uint8),  # interrupt request register
        ("imr", c_uint8),  # interrupt mask register
        ("isr", c_uint8),  # interrupt service register
        ("priority_add", c_uint8),  # highest irq priority
        ("irq_base", c_uint8),
        ("read_reg_select", c_uint8),
        ("poll", c_uint8),
        ("special_mask", c_uint8),
        ("init_state", c_uint8),
        ("auto_eoi", c_uint8),
        ("rotate_on_auto_eoi", c_uint8),
        ("special_fully_nested_mode", c_uint8),
        ("init4", c_uint8),  # true if 4 byte init
        ("elcr", c_uint8),  # edge/trigger selection
        ("elcr_mask", c_uint8),
    )


KVM_IOAPIC_NUM_PINS = 24


class kvm_ioapic_state(Structure):
    _fields_ = (
        ("base_address", c_uint64),
        ("ioregsel", c_uint32),
        ("id", c_uint32),
        ("irr", c_uint32),
        ("pad", c_uint32),
        ("redirtbl", c_uint64 * KVM_IOAPIC_NUM_PINS),  # the union's `bits`
    )


KVM_IRQCHIP_PIC_MASTER = 0
KVM_IRQCHIP_PIC_SLAVE = 1
KVM_IRQCHIP_IOAPIC = 2
KVM_NR_IRQCHIPS = 3

KVM_RUN_X86_SMM = 1 << 0
KVM_RUN_X86_BUS_LOCK = 1 << 1


class kvm_regs(Structure):
    _fields_ = (
        ("rax", c_uint64),
        ("rbx", c_uint64),
        ("rcx", c_uint64),
        ("rdx", c_uint64),
        ("rsi", c_uint64),
        ("rdi", c_uint64),
        ("rsp", c_uint64),
        ("rbp", c_uint64),
        ("r8", c_uint64),
        ("r9", c_uint64),
        ("r10", c_uint64),
        ("r11", c_uint64),
        ("r12", c_uint64),
        ("r13", c_uint64),
        ("r14", c_uint64),
        ("r15", c_uint64),
        ("rip", c_uint64),
        ("rflags", c_uint64),
    )


KVM_APIC_REG_SIZE = 0x400


class kvm_lapic_state(Structure):
    _fields_ = (("regs", c_uint8 * KVM_APIC_REG_SIZE),)


class kvm_segment(Structure):
    _fields_ = (
        ("base", c_uint64),
        ("limit", c_uint32),
        ("selector", c_uint16),
        ("type", c_uint8),
        ("present", c_uint8),
        ("dpl", c_uint8),
        ("db", c_uint8),
        ("s", c_uint8),
        ("l", c_uint8),
        ("g", c_uint8),
        ("avl", c_uint8),
        ("unusable", c_uint8),
        ("padding", c_uint8),
    )


class kvm_dtable(Structure):
    _fields_ = (
        ("base", c_uint64),
        ("limit", c_uint16),
        ("padding", c_uint16 * 3),
    )


class kvm_sregs(Structure):
    _fields_ = (
        ("cs", kvm_segment),
        ("ds", kvm_segment),
        ("es", kvm_segment),
        ("fs", kvm_segment),
        ("gs", kvm_segment),
        ("ss", kvm_segment),
        ("tr", kvm_segment),
        ("ldt", kvm_segment),
        ("gdt", kvm_dtable),
        ("idt", kvm_dtable),
        ("cr0", c_uint64),
        ("cr2", c_uint64),
        ("cr3", c_uint64),
        ("cr4", c_uint64),
        ("cr8", c_uint64),
        ("efer", c_uint64),
        ("apic_base", c_uint64),
        ("interrupt_bitmap", c_uint64 * ((KVM_NR_INTERRUPTS + 63) // 64)),
    )


class kvm_sregs2(Structure):
    # out (KVM_GET_SREGS2) / in (KVM_SET_SREGS2)
    _fields_ = (
        ("cs", kvm_segment),
        ("ds", kvm_segment),
        ("es", kvm_segment),
        ("fs", kvm_segment),
        ("gs", kvm_segment),
        ("ss", kvm_segment),
        ("tr", kvm_segment),
        ("ldt", kvm_segment),
        ("gdt", kvm_dtable),
        ("idt", kvm_dtable),
        ("cr0", c_uint64),
        ("cr2", c_uint64),
        ("cr3", c_uint64),
        ("cr4", c_uint64),
        ("cr8", c_uint64),
        ("efer", c_uint64),
        ("apic_base", c_uint64),
        ("flags", c_uint64),
        ("pdptrs", c_uint64 * 4),
    )


class kvm_fpu(Structure):
    _fields_ = (
        ("fpr", c_uint8 * 16 * 8),
        ("fcw", c_uint16),
        ("fsw", c_uint16),
        ("ftwx", c_uint8),  # in fxsave format
        ("pad1", c_uint8),
        ("last_opcode", c_uint16),
        ("last_ip", c_uint64),
        ("last_dp", c_uint64),
        ("xmm", c_uint8 * 16 * 16),
        ("mxcsr", c_uint32),
        ("pad2", c_uint32),
    )


class kvm_msr_entry(Structure):
    _fields_ = (
        ("index", c_uint32),
        ("reserved", c_uint32),
        ("data", c_uint64),
    )


class kvm_msrs(Structure):
    _fields_ = (
        ("nmsrs", c_uint32),  # number of msrs in entries
        ("pad", c_uint32),
        ("entries", kvm_msr_entry * 0),
    )


class kvm_msr_list(Structure):
    _fields_ = (
        ("nmsrs", c_uint32),  # number of msrs in entries
        ("indices", c_uint32 * 0),
    )


class kvm_cpuid_entry2(Structure):
    _fields_ = (
        ("function", c_uint32),
        ("index", c_uint32),
        ("flags", c_uint32),
        ("eax", c_uint32),
        ("ebx", c_uint32),
        ("ecx", c_uint32),
        ("edx", c_uint32),
        ("padding", c_uint32 * 3),
    )


KVM_CPUID_FLAG_SIGNIFCANT_INDEX = 1 << 0


class kvm_cpuid2(Structure):
    _fields_ = (
        ("nent", c_uint32),
        ("padding", c_uint32),
        ("entries", kvm_cpuid_entry2 * 0),
    )


class kvm_pit_channel_state(Structure):
    _fields_ = (
        ("count", c_uint32),  # can be 65536
        ("latched_count", c_uint16),
        ("count_latched", c_uint8),
        ("status_latched", c_uint8),
        ("status", c_uint8),
        ("read_state", c_uint8),
        ("write_state", c_uint8),
        ("write_latch", c_uint8),
        ("rw_mode", c_uint8),
        ("mode", c_uint8),
        ("bcd", c_uint8),
        ("gate", c_uint8),
        ("count_load_time", c_int64),
    )


class kvm_debug_exit_arch(Structure):
    _fields_ = (
        ("exception", c_uint32),
        ("pad", c_uint32),
        ("pc", c_uint64),
        ("dr6", c_uint64),
        ("dr7", c_uint64),
    )


KVM_GUESTDBG_USE_SW_BP = 0x0001_0000
KVM_GUESTDBG_USE_HW_BP = 0x0002_0000
KVM_GUESTDBG_INJECT_DB = 0x0004_0000
KVM_GUESTDBG_INJECT_BP = 0x0008_0000
KVM_GUESTDBG_BLOCKIRQ = 0x0010_0000


class kvm_guest_debug_arch(Structure):
    _fields_ = (("debugreg", c_uint64 * 8),)


KVM_PIT_FLAGS_HPET_LEGACY = 0x0000_0001
KVM_PIT_FLAGS_SPEAKER_DATA_ON = 0x0000_0002


class kvm_pit_state2(Structure):
    _fields_ = (
        ("channels", kvm_pit_channel_state * 3),
        ("flags", c_uint32),
        ("reserved", c_uint32 * 9),
    )


class kvm_reinject_control(Structure):
    _fields_ = (
        ("pit_reinject", c_uint8),
        ("reserved", c_uint8 * 31),
    )


KVM_VCPUEVENT_VALID_NMI_PENDING = 0x0000_0001
KVM_VCPUEVENT_VALID_SIPI_VECTOR = 0x0000_0002
KVM_VCPUEVENT_VALID_SHADOW = 0x0000_0004
KVM_VCPUEVENT_VALID_SMM = 0x0000_0008
KVM_VCPUEVENT_VALID_PAYLOAD = 0x0000_0010
KVM_VCPUEVENT_VALID_TRIPLE_FAULT = 0x0000_0020

KVM_X86_SHADOW_INT_MOV_SS = 0x01
KVM_X86_SHADOW_INT_STI = 0x02


class kvm_vcpu_events(Structure):
    class Exception_(Structure):
        _fields_ = (
            ("injected", c_uint8),
            ("nr", c_uint8),
            ("has_error_code", c_uint8),
            ("pending", c_uint8),
            ("error_code", c_uint32),
        )

    class Interrupt(Structure):
        _fields_ = (
            ("injected", c_uint8),
            ("nr", c_uint8),
            ("soft", c_uint8),
            ("shadow", c_uint8),
        )

    class Nmi(Structure):
        _fields_ = (
            ("injected", c_uint8),
            ("pending", c_uint8),
            ("masked", c_uint8),
            ("pad", c_uint8),
        )

    class Smi(Structure):
        _fields_ = (
            ("smm", c_uint8),
            ("pending", c_uint8),
            ("smm_inside_nmi", c_uint8),
            ("latched_init", c_uint8),
        )

    class TripleFault(Structure):
        _fields_ = (("pending", c_uint8),)

    _fields_ = (
        ("exception", Exception_),
        ("interrupt", Interrupt),
        ("nmi", Nmi),
        ("sipi_vector", c_uint32),
        ("flags", c_uint32),
        ("smi", Smi),
        ("triple_fault", TripleFault),
        ("reserved", c_uint8 * 26),
        ("exception_has_payload", c_uint8),
        ("exception_payload", c_uint64),
    )


class kvm_debugregs(Structure):
    _fields_ = (
        ("db", c_uint64 * 4),
        ("dr6", c_uint64),
        ("dr7", c_uint64),
        ("flags", c_uint64),
        ("reserved", c_uint64 * 9),
    )


class kvm_xsave(Structure):
    _fields_ = (
        ("region", c_uint32 * 1024),
        ("extra", c_uint32 * 0),  # with KVM_CAP_XSAVE2
    )


KVM_MAX_XCRS = 16


class kvm_xcr(Structure):
    _fields_ = (
        ("xcr", c_uint32),
        ("reserved", c_uint32),
        ("value", c_uint64),
    )


class kvm_xcrs(Structure):
    _fields_ = (
        ("nr_xcrs", c_uint32),
        ("flags", c_uint32),
        ("xcrs", kvm_xcr * KVM_MAX_XCRS),
        ("padding", c_uint64 * 16),
    )


KVM_SYNC_X86_REGS = 1 << 0
KVM_SYNC_X86_SREGS = 1 << 1
KVM_SYNC_X86_EVENTS = 1 << 2


class kvm_sync_regs(Structure):
    _fields_ = (
        ("regs", kvm_regs),
        ("sregs", kvm_sregs),
        ("events", kvm_vcpu_events),
    )


class kvm_nested_state(Structure):
    class Hdr(Union):
        _fields_ = (("pad", c_uint8 * 120),)

    _fields_ = (
        ("flags", c_uint16),
        ("format", c_uint16),
        ("size", c_uint32),  # bytes, of all of it
        ("hdr", Hdr),
    )


# for KVM_{GET,SET,HAS}_DEVICE_ATTR of a vCPU
KVM_VCPU_TSC_CTRL = 0
KVM_VCPU_TSC_OFFSET = 0

# <linux/kvm.h>

KVM_API_VERSION = 12


class kvm_userspace_memory_region(Structure):
    _fields_ = (
        ("slot", c_uint32),
        ("flags", c_uint32),
        ("guest_phys_addr", c_uint64),
        ("memory_size", c_uint64),  # bytes
        ("userspace_addr", c_uint64),  # start of the userspace allocated memory
    )


KVM_MEM_LOG_DIRTY_PAGES = 1 << 0
KVM_MEM_READONLY = 1 << 1


class kvm_irq_level(Structure):
    class Irq(Union):
        _fields_ = (
            ("irq", c_uint32),
            ("status", c_int32),
        )

    _anonymous_ = ("u",)
    _fields_ = (
        ("u", Irq),
        ("level", c_uint32),
    )


class kvm_irqchip(Structure):
    class Chip(Union):
        _fields_ = (
            ("dummy", c_uint8 * 512),
            ("pic", kvm_pic_state),
            ("ioapic", kvm_ioapic_state),
        )

    _fields_ = (
        ("chip_id", c_uint32),
        ("pad", c_uint32),
        ("chip", Chip),
    )


class kvm_pit_config(Structure):
    _fields_ = (
        ("flags", c_uint32),
        ("pad", c_uint32 * 15),
    )


KVM_PIT_SPEAKER_DUMMY = 1

KVM_EXIT_UNKNOWN = 0
KVM_EXIT_EXCEPTION = 1
KVM_EXIT_IO = 2
KVM_EXIT_HYPERCALL = 3
KVM_EXIT_DEBUG = 4
KVM_EXIT_HLT = 5
KVM_EXIT_MMIO = 6
KVM_EXIT_IRQ_WINDOW_OPEN = 7
KVM_EXIT_SHUTDOWN = 8
KVM_EXIT_FAIL_ENTRY = 9
KVM_EXIT_INTR = 10
KVM_EXIT_SET_TPR = 11
KVM_EXIT_TPR_ACCESS = 12
KVM_EXIT_NMI = 16
KVM_EXIT_INTERNAL_ERROR = 17
KVM_EXIT_SYSTEM_EVENT = 24
KVM_EXIT_IOAPIC_EOI = 26
KVM_EXIT_X86_RDMSR = 29
KVM_EXIT_X86_WRMSR = 30
KVM_EXIT_DIRTY_RING_FULL = 31
KVM_EXIT_X86_BUS_LOCK = 33
KVM_EXIT_NOTIFY = 37
KVM_EXIT_MEMORY_FAULT = 39

KVM_INTERNAL_ERROR_EMULATION = 1
KVM_INTERNAL_ERROR_SIMUL_EX = 2
KVM_INTERNAL_ERROR_DELIVERY_EV = 3
KVM_INTERNAL_ERROR_UNEXPECTED_EXIT_REASON = 4
KVM_INTERNAL_ERROR_EMULATION_FLAG_INSTRUCTION_BYTES = 1 << 0

KVM_EXIT_IO_IN = 0
KVM_EXIT_IO_OUT = 1

KVM_SYSTEM_EVENT_SHUTDOWN = 1
KVM_SYSTEM_EVENT_RESET = 2
KVM_SYSTEM_EVENT_CRASH = 3
KVM_SYSTEM_EVENT_WAKEUP = 4
KVM_SYSTEM_EVENT_SUSPEND = 5
KVM_SYSTEM_EVENT_SEV_TERM = 6

KVM_NOTIFY_CONTEXT_INVALID = 1 << 0

SYNC_REGS_SIZE_BYTES = 2048


class kvm_run(Structure):
    class Hw(Structure):
        _fields_ = (("hardware_exit_reason", c_uint64),)

    class FailEntry(Structure):
        _fields_ = (
            ("hardware_entry_failure_reason", c_uint64),
            ("cpu", c_uint32),
        )

    class Ex(Structure):
        _fields_ = (
            ("exception", c_uint32),
            ("error_code", c_uint32),
        )

    class Io(Structure):
        _fields_ = (
            ("direction", c_uint8),
            ("size", c_uint8),  # bytes
            ("port", c_uint16),
            ("count", c_uint32),
            ("data_offset", c_uint64),  # relative to kvm_run start
        )

    class Debug(Structure):
        _fields_ = (("arch", kvm_debug_exit_arch),)

    class Mmio(Structure):
        _fields_ = (
            ("phys_addr", c_uint64),
            ("data", c_uint8 * 8),
            ("len", c_uint32),
            ("is_write", c_uint8),
        )

    class Hypercall(Structure):
        _fields_ = (
            ("nr", c_uint64),
            ("args", c_uint64 * 6),
            ("ret", c_uint64),
            ("longmode", c_uint32),
            ("pad", c_uint32),
        )

    class TprAccess(Structure):
        _fields_ = (
            ("rip", c_uint64),
            ("is_write", c_uint32),
            ("pad", c_uint32),
        )

    class Internal(Structure):
        _fields_ = (
            ("suberror", c_uint32),
            ("ndata", c_uint32),
            ("data", c_uint64 * 16),
        )

    class EmulationFailure(Structure):
        _fields_ = (
            ("suberror", c_uint32),
            ("ndata", c_uint32),
            ("flags", c_uint64),
            ("insn_size", c_uint8),
            ("insn_bytes", c_uint8 * 15),
        )

    class SystemEvent(Structure):
        _fields_ = (
            ("type", c_uint32),
            ("ndata", c_uint32),
            ("data", c_uint64 * 16),
        )

    class Eoi(Structure):
        _fields_ = (("vector", c_uint8),)

    class Msr(Structure):
        _fields_ = (
            ("error", c_uint8),  # user -> kernel
            ("pad", c_uint8 * 7),
            ("reason", c_uint32),  # kernel -> user
            ("index", c_uint32),  # kernel -> user
            ("data", c_uint64),  # kernel <-> user
        )

    class Notify(Structure):
        _fields_ = (("flags", c_uint32),)

    class Exit(Union):
        pass

    class Sync(Union):
        _fields_ = (
            ("regs", kvm_sync_regs),
            ("padding", c_uint8 * SYNC_REGS_SIZE_BYTES),
        )

    Exit._fields_ = (
        ("hw", Hw),  # KVM_EXIT_UNKNOWN
        ("fail_entry", FailEntry),  # KVM_EXIT_FAIL_ENTRY
        ("ex", Ex),  # KVM_EXIT_EXCEPTION
        ("io", Io),  # KVM_EXIT_IO
        ("debug", Debug),  # KVM_EXIT_DEBUG
        ("mmio", Mmio),  # KVM_EXIT_MMIO
        ("hypercall", Hypercall),  # KVM_EXIT_HYPERCALL
        ("tpr_access", TprAccess),  # KVM_EXIT_TPR_ACCESS
        ("internal", Internal),  # KVM_EXIT_INTERNAL_ERROR
        ("emulation_failure", EmulationFailure),  # KVM_INTERNAL_ERROR_EMULATION
        ("system_event", SystemEvent),  # KVM_EXIT_SYSTEM_EVENT
        ("eoi", Eoi),  # KVM_EXIT_IOAPIC_EOI
        ("msr", Msr),  # KVM_EXIT_X86_RDMSR, KVM_EXIT_X86_WRMSR
        ("notify", Notify),  # KVM_EXIT_NOTIFY
        ("padding", c_uint8 * 256),
    )
    _anonymous_ = ("exit",)
    _fields_ = (
        # in
        ("request_interrupt_window", c_uint8),
        ("immediate_exit", c_uint8),
        ("padding1", c_uint8 * 6),
        # out
        ("exit_reason", c_uint32),
        ("ready_for_interrupt_injection", c_uint8),
        ("if_flag", c_uint8),
        ("flags", c_uint16),
        # in (before KVM_RUN), out (after it)
        ("cr8", c_uint64),
        ("apic_base", c_uint64),
        ("exit", Exit),
        ("kvm_valid_regs", c_uint64),
        ("kvm_dirty_regs", c_uint64),
        ("s", Sync),
    )


class kvm_coalesced_mmio_zone(Structure):
    class Pio(Union):
        _fields_ = (
            ("pad", c_uint32),
            ("pio", c_uint32),
        )

    _anonymous_ = ("u",)
    _fields_ = (
        ("addr", c_uint64),
        ("size", c_uint32),
        ("u", Pio),
    )


class kvm_coalesced_mmio(Structure):
    class Pio(Union):
        _fields_ = (
            ("pad", c_uint32),
            ("pio", c_uint32),
        )

    _anonymous_ = ("u",)
    _fields_ = (
        ("phys_addr", c_uint64),
        ("len", c_uint32),
        ("u", Pio),
        ("data", c_uint8 * 8),
    )


class kvm_coalesced_mmio_ring(Structure):
    _fields_ = (
        ("first", c_uint32),
        ("last", c_uint32),
        ("coalesced_mmio", kvm_coalesced_mmio * 0),
    )


class kvm_translation(Structure):
    _fields_ = (
        # in
        ("linear_address", c_uint64),
        # out
        ("physical_address", c_uint64),
        ("valid", c_uint8),
        ("writeable", c_uint8),
        ("usermode", c_uint8),
        ("pad", c_uint8 * 5),
    )


class kvm_interrupt(Structure):
    _fields_ = (("irq", c_uint32),)


class kvm_dirty_log(Structure):
    class Bitmap(Union):
        _fields_ = (
            ("dirty_bitmap", c_uint64),  # a pointer; one bit per page
            ("padding2", c_uint64),
        )

    _anonymous_ = ("u",)
    _fields_ = (
        ("slot", c_uint32),
        ("padding1", c_uint32),
        ("u", Bitmap),
    )


class kvm_clear_dirty_log(Structure):
    class Bitmap(Union):
        _fields_ = (
            ("dirty_bitmap", c_uint64),  # a pointer; one bit per page
            ("padding2", c_uint64),
        )

    _anonymous_ = ("u",)
    _fields_ = (
        ("slot", c_uint32),
        ("num_pages", c_uint32),
        ("first_page", c_uint64),
        ("u", Bitmap),
    )


class kvm_signal_mask(Structure):
    _fields_ = (
        ("len", c_uint32),
        ("sigset", c_uint8 * 0),
    )


KVM_MP_STATE_RUNNABLE = 0
KVM_MP_STATE_UNINITIALIZED = 1
KVM_MP_STATE_INIT_RECEIVED = 2
KVM_MP_STATE_HALTED = 3
KVM_MP_STATE_SIPI_RECEIVED = 4


class kvm_mp_state(Structure):
    _fields_ = (("mp_state", c_uint32),)


KVM_GUESTDBG_ENABLE = 0x0000_0001
KVM_GUESTDBG_SINGLESTEP = 0x0000_0002


class kvm_guest_debug(Structure):
    _fields_ = (
        ("control", c_uint32),
        ("pad", c_uint32),
        ("arch", kvm_guest_debug_arch),
    )


KVM_IOEVENTFD_FLAG_DATAMATCH = 1 << 0
KVM_IOEVENTFD_FLAG_PIO = 1 << 1
KVM_IOEVENTFD_FLAG_DEASSIGN = 1 << 2


class kvm_ioeventfd(Structure):
    _fields_ = (
        ("datamatch", c_uint64),
        ("addr", c_uint64),  # legal pio/mmio address
        ("len", c_uint32),  # 1, 2, 4, or 8 bytes; or 0 to ignore length
        ("fd", c_int32),
        ("flags", c_uint32),
        ("pad", c_uint8 * 36),
    )


class kvm_enable_cap(Structure):
    _fields_ = (
        ("cap", c_uint32),
        ("flags", c_uint32),
        ("args", c_uint64 * 4),
        ("pad", c_uint8 * 64),
    )


KVMIO = 0xAE

# ioctls for /dev/kvm fds
KVM_GET_API_VERSION = _IO(KVMIO, 0x00)
KVM_CREATE_VM = _IO(KVMIO, 0x01)  # returns a VM fd
KVM_GET_MSR_INDEX_LIST = _IOWR(KVMIO, 0x02, kvm_msr_list)
KVM_CHECK_EXTENSION = _IO(KVMIO, 0x03)
KVM_GET_VCPU_MMAP_SIZE = _IO(KVMIO, 0x04)  # in bytes
KVM_GET_SUPPORTED_CPUID = _IOWR(KVMIO, 0x05, kvm_cpuid2)

KVM_CAP_IRQCHIP = 0
KVM_CAP_HLT = 1
KVM_CAP_USER_MEMORY = 3
KVM_CAP_SET_TSS_ADDR = 4
KVM_CAP_EXT_CPUID = 7
KVM_CAP_CLOCKSOURCE = 8
KVM_CAP_NR_VCPUS = 9  # returns recommended max vcpus per vm
KVM_CAP_NR_MEMSLOTS = 10  # returns max memory slots per vm
KVM_CAP_MP_STATE = 14
KVM_CAP_COALESCED_MMIO = 15
KVM_CAP_SYNC_MMU = 16  # Changes to host mmap are reflected in guest
KVM_CAP_DESTROY_MEMORY_REGION_WORKS = 21
KVM_CAP_USER_NMI = 22
KVM_CAP_SET_GUEST_DEBUG = 23
KVM_CAP_REINJECT_CONTROL = 24
KVM_CAP_IRQ_ROUTING = 25
KVM_CAP_IRQ_INJECT_STATUS = 26
KVM_CAP_JOIN_MEMORY_REGIONS_WORKS = 30
KVM_CAP_IRQFD = 32
KVM_CAP_PIT2 = 33
KVM_CAP_SET_BOOT_CPU_ID = 34
KVM_CAP_PIT_STATE2 = 35
KVM_CAP_IOEVENTFD = 36
KVM_CAP_SET_IDENTITY_MAP_ADDR = 37
KVM_CAP_ADJUST_CLOCK = 39
KVM_CAP_INTERNAL_ERROR_DATA = 40
KVM_CAP_VCPU_EVENTS = 41
KVM_CAP_INTR_SHADOW = 49
KVM_CAP_DEBUGREGS = 50
KVM_CAP_X86_ROBUST_SINGLESTEP = 51
KVM_CAP_ENABLE_CAP = 54
KVM_CAP_XSAVE = 55
KVM_CAP_XCRS = 56
KVM_CAP_TSC_CONTROL = 60
KVM_CAP_GET_TSC_KHZ = 61
KVM_CAP_MAX_VCPUS = 66  # returns max vcpus per vm
KVM_CAP_TSC_DEADLINE_TIMER = 72
KVM_CAP_SYNC_REGS = 74
KVM_CAP_KVMCLOCK_CTRL = 76
KVM_CAP_SIGNAL_MSI = 77
KVM_CAP_READONLY_MEM = 81
KVM_CAP_IRQFD_RESAMPLE = 82
KVM_CAP_IOAPIC_POLARITY_IGNORED = 97
KVM_CAP_ENABLE_CAP_VM = 98
KVM_CAP_IOEVENTFD_NO_LENGTH = 100
KVM_CAP_CHECK_EXTENSION_VM = 105
KVM_CAP_SPLIT_IRQCHIP = 121
KVM_CAP_IOEVENTFD_ANY_LENGTH = 122
KVM_CAP_MAX_VCPU_ID = 128
KVM_CAP_X2APIC_API = 129
KVM_CAP_MSI_DEVID = 131
KVM_CAP_IMMEDIATE_EXIT = 136
KVM_CAP_X86_DISABLE_EXITS = 143
KVM_CAP_NESTED_STATE = 157
KVM_CAP_COALESCED_PIO = 162
KVM_CAP_EXCEPTION_PAYLOAD = 164
KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2 = 168
KVM_CAP_HALT_POLL = 182
KVM_CAP_SREGS2 = 200
KVM_CAP_EXIT_ON_EMULATION_FAILURE = 204
KVM_CAP_XSAVE2 = 208
KVM_CAP_SYSTEM_EVENT_DATA = 215
KVM_CAP_X86_TRIPLE_FAULT_EVENT = 218


class kvm_irq_routing_irqchip(Structure):
    _fields_ = (
        ("irqchip", c_uint32),
        ("pin", c_uint32),
    )


class kvm_irq_routing_msi(Structure):
    class Devid(Union):
        _fields_ = (
            ("pad", c_uint32),
            ("devid", c_uint32),
        )

    _anonymous_ = ("u",)
    _fields_ = (
        ("address_lo", c_uint32),
        ("address_hi", c_uint32),
        ("data", c_uint32),
        ("u", Devid),
    )


KVM_IRQ_ROUTING_IRQCHIP = 1
KVM_IRQ_ROUTING_MSI = 2


class kvm_irq_routing_entry(Structure):
    class Route(Union):
        _fields_ = (
            ("irqchip", kvm_irq_routing_irqchip),
            ("msi", kvm_irq_routing_msi),
            ("pad", c_uint32 * 8),
        )

    _fields_ = (
        ("gsi", c_uint32),
        ("type", c_uint32),
        ("flags", c_uint32),
        ("pad", c_uint32),
        ("u", Route),
    )


class kvm_irq_routing(Structure):
    _fields_ = (
        ("nr", c_uint32),
        ("flags", c_uint32),
        ("entries", kvm_irq_routing_entry * 0),
    )


KVM_IRQFD_FLAG_DEASSIGN = 1 << 0
KVM_IRQFD_FLAG_RESAMPLE = 1 << 1


class kvm_irqfd(Structure):
    _fields_ = (
        ("fd", c_uint32),
        ("gsi", c_uint32),
        ("flags", c_uint32),
        ("resamplefd", c_uint32),
        ("pad", c_uint8 * 16),
    )


KVM_CLOCK_TSC_STABLE = 2
KVM_CLOCK_REALTIME = 1 << 2
KVM_CLOCK_HOST_TSC = 1 << 3


class kvm_clock_data(Structure):
    _fields_ = (
        ("clock", c_uint64),
        ("flags", c_uint32),
        ("pad0", c_uint32),
        ("realtime", c_uint64),
        ("host_tsc", c_uint64),
        ("pad", c_uint32 * 4),
    )


KVM_MSI_VALID_DEVID = 1 << 0


class kvm_msi(Structure):
    _fields_ = (
        ("address_lo", c_uint32),
        ("address_hi", c_uint32),
        ("data", c_uint32),
        ("flags", c_uint32),
        ("devid", c_uint32),
        ("pad", c_uint8 * 12),
    )


class kvm_device_attr(Structure):
    _fields_ = (
        ("flags", c_uint32),  # no flags currently defined
        ("group", c_uint32),  # device-defined
        ("attr", c_uint64),  # group-defined
        ("addr", c_uint64),  # userspace address of attr data
    )


# ioctls for VM fds
KVM_CREATE_VCPU = _IO(KVMIO, 0x41)
KVM_GET_DIRTY_LOG = _IOW(KVMIO, 0x42, kvm_dirty_log)
KVM_SET_USER_MEMORY_REGION = _IOW(KVMIO, 0x46, kvm_userspace_memory_region)
KVM_SET_TSS_ADDR = _IO(KVMIO, 0x47)
KVM_SET_IDENTITY_MAP_ADDR = _IOW(KVMIO, 0x48, c_uint64)
KVM_CREATE_IRQCHIP = _IO(KVMIO, 0x60)
KVM_IRQ_LINE = _IOW(KVMIO, 0x61, kvm_irq_level)
KVM_GET_IRQCHIP = _IOWR(KVMIO, 0x62, kvm_irqchip)
KVM_SET_IRQCHIP = _IOR(KVMIO, 0x63, kvm_irqchip)
KVM_IRQ_LINE_STATUS = _IOWR(KVMIO, 0x67, kvm_irq_level)
KVM_REGISTER_COALESCED_MMIO = _IOW(KVMIO, 0x67, kvm_coalesced_mmio_zone)
KVM_UNREGISTER_COALESCED_MMIO = _IOW(KVMIO, 0x68, kvm_coalesced_mmio_zone)
KVM_SET_GSI_ROUTING = _IOW(KVMIO, 0x6A, kvm_irq_routing)
KVM_REINJECT_CONTROL = _IO(KVMIO, 0x71)
KVM_IRQFD = _IOW(KVMIO, 0x76, kvm_irqfd)
KVM_CREATE_PIT2 = _IOW(KVMIO, 0x77, kvm_pit_config)
KVM_SET_BOOT_CPU_ID = _IO(KVMIO, 0x78)
KVM_IOEVENTFD = _IOW(KVMIO, 0x79, kvm_ioeventfd)
KVM_SET_CLOCK = _IOW(KVMIO, 0x7B, kvm_clock_data)
KVM_GET_CLOCK = _IOR(KVMIO, 0x7C, kvm_clock_data)
KVM_GET_PIT2 = _IOR(KVMIO, 0x9F, kvm_pit_state2)
KVM_SET_PIT2 = _IOW(KVMIO, 0xA0, kvm_pit_state2)
KVM_SET_TSC_KHZ = _IO(KVMIO, 0xA2)
KVM_GET_TSC_KHZ = _IO(KVMIO, 0xA3)
KVM_SIGNAL_MSI = _IOW(KVMIO, 0xA5, kvm_msi)

# ioctls for vcpu fds
KVM_RUN = _IO(KVMIO, 0x80)
KVM_GET_REGS = _IOR(KVMIO, 0x81, kvm_regs)
KVM_SET_REGS = _IOW(KVMIO, 0x82, kvm_regs)
KVM_GET_SREGS = _IOR(KVMIO, 0x83, kvm_sregs)
KVM_SET_SREGS = _IOW(KVMIO, 0x84, kvm_sregs)
KVM_TRANSLATE = _IOWR(KVMIO, 0x85, kvm_translation)
KVM_INTERRUPT = _IOW(KVMIO, 0x86, kvm_interrupt)
KVM_GET_MSRS = _IOWR(KVMIO, 0x88, kvm_msrs)
KVM_SET_MSRS = _IOW(KVMIO, 0x89, kvm_msrs)
KVM_SET_SIGNAL_MASK = _IOW(KVMIO, 0x8B, kvm_signal_mask)
KVM_GET_FPU = _IOR(KVMIO, 0x8C, kvm_fpu)
KVM_SET_FPU = _IOW(KVMIO, 0x8D, kvm_fpu)
KVM_GET_LAPIC = _IOR(KVMIO, 0x8E, kvm_lapic_state)
KVM_SET_LAPIC = _IOW(KVMIO, 0x8F, kvm_lapic_state)
KVM_SET_CPUID2 = _IOW(KVMIO, 0x90, kvm_cpuid2)
KVM_GET_CPUID2 = _IOWR(KVMIO, 0x91, kvm_cpuid2)
KVM_GET_MP_STATE = _IOR(KVMIO, 0x98, kvm_mp_state)
KVM_SET_MP_STATE = _IOW(KVMIO, 0x99, kvm_mp_state)
KVM_NMI = _IO(KVMIO, 0x9A)
KVM_SET_GUEST_DEBUG = _IOW(KVMIO, 0x9B, kvm_guest_debug)
KVM_GET_VCPU_EVENTS = _IOR(KVMIO, 0x9F, kvm_vcpu_events)
KVM_SET_VCPU_EVENTS = _IOW(KVMIO, 0xA0, kvm_vcpu_events)
KVM_GET_DEBUGREGS = _IOR(KVMIO, 0xA1, kvm_debugregs)
KVM_SET_DEBUGREGS = _IOW(KVMIO, 0xA2, kvm_debugregs)
KVM_ENABLE_CAP = _IOW(KVMIO, 0xA3, kvm_enable_cap)
KVM_GET_XSAVE = _IOR(KVMIO, 0xA4, kvm_xsave)
KVM_SET_XSAVE = _IOW(KVMIO, 0xA5, kvm_xsave)
KVM_GET_XCRS = _IOR(KVMIO, 0xA6, kvm_xcrs)
KVM_SET_XCRS = _IOW(KVMIO, 0xA7, kvm_xcrs)
KVM_KVMCLOCK_CTRL = _IO(KVMIO, 0xAD)
KVM_CLEAR_DIRTY_LOG = _IOWR(KVMIO, 0xC0, kvm_clear_dirty_log)
KVM_GET_NESTED_STATE = _IOWR(KVMIO, 0xBE, kvm_nested_state)
KVM_SET_NESTED_STATE = _IOW(KVMIO, 0xBF, kvm_nested_state)
KVM_SET_DEVICE_ATTR = _IOW(KVMIO, 0xE1, kvm_device_attr)
KVM_GET_DEVICE_ATTR = _IOW(KVMIO, 0xE2, kvm_device_attr)
KVM_HAS_DEVICE_ATTR = _IOW(KVMIO, 0xE3, kvm_device_attr)
KVM_GET_SREGS2 = _IOR(KVMIO, 0xCC, kvm_sregs2)
KVM_SET_SREGS2 = _IOW(KVMIO, 0xCD, kvm_sregs2)
KVM_GET_STATS_FD = _IO(KVMIO, 0xCE)  # for VM fds too
KVM_GET_XSAVE2 = _IOR(KVMIO, 0xCF, kvm_xsave)

KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE = 1 << 0
KVM_DIRTY_LOG_INITIALLY_SET = 1 << 1


@functools.lru_cache(maxsize=64)
def with_entries(
    header: type[Structure], entry: type[Structure] | type[c_uint8] | type[c_uint32], count: int
) -> type[Structure]:
    """Return `header` with its flexible array, the last field, made `count` of `entry` long."""
    *fields, (name, _) = ((field[0], field[1]) for field in header._fields_)
    return type(header.__name__, (Structure,), {"_fields_": (*fields, (name, entry * count))})


OPERATIONS.update(
    {
        value: name
        for name, value in list(globals().items())
        if name.startswith("KVM_") and isinstance(value, int) and value & 0xFF00 == KVMIO << 8
    }
)
