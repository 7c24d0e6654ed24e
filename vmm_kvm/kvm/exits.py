"""Exits of a vCPU from the guest: one class per reason, matched by `match` or isinstance.

Each vCPU has one object of each class, a view of its kvm_run page: its attributes always show the
latest exit, so they are valid until the vCPU's next `run()`. Nothing is allocated per exit.
"""

import ctypes
from typing import TypeAlias

from vmm_kvm.bits import PAGE_SIZE
from vmm_kvm.kvm import abi


class IoExit(abi.kvm_run.Io):
    """The guest executed IN, OUT, INS or OUTS.

    Answer a read before the next `run()`, which completes the instruction. `size` (1, 2 or 4) is
    in bytes; `count` is more than 1 for string instructions, and `data` then holds all items.
    """

    direction: int
    size: int
    port: int
    count: int
    data_offset: int
    words: memoryview
    """The same in numbers of 64 bits: all but `data_offset` in the first. Quicker to read."""
    views: dict[int, memoryview]
    """The data page as unsigned integers of 1, 2 or 4 bytes, by that size.

    It lies at KVM_PIO_PAGE_OFFSET, which is what `data_offset` says every time.
    """

    @property
    def is_write(self) -> bool:
        """Whether the guest writes."""
        return self.direction == abi.KVM_EXIT_IO_OUT

    @property
    def data(self) -> memoryview:
        """All items, `size * count` bytes; writable, to answer a read."""
        return self.views[1][: self.size * self.count]

    @property
    def value(self) -> int:
        """The first item."""
        item: int = self.views[self.size][0]
        return item

    @value.setter
    def value(self, value: int) -> None:
        self.views[self.size][0] = value


def io_read_word(port: int, size: int) -> int:
    """Return the first of `IoExit.words` of an IN of `size` bytes from `port`."""
    return abi.KVM_EXIT_IO_IN | size << 8 | port << 16 | 1 << 32


class MmioExit(abi.kvm_run.Mmio):
    """The guest accessed memory that no slot backs.

    Answer a read before the next `run()`, which completes the instruction. `len` is 1 to 8 bytes.
    """

    phys_addr: int
    len: int
    is_write: int
    """Whether the guest writes, 0 or 1."""
    words: memoryview
    """The same in numbers of 64 bits: `phys_addr`, the data, and MMIO_ACCESS bits of the rest."""
    views: dict[int, memoryview]
    """The eight data bytes as unsigned integers of 1, 2, 4 or 8 bytes, by that size."""

    @property
    def address(self) -> int:
        """The guest-physical address."""
        return self.phys_addr

    @property
    def size(self) -> int:
        """Bytes, 1 to 8."""
        return self.len

    @property
    def data(self) -> memoryview:
        """The data, `size` bytes; writable, to answer a read."""
        return self.views[1][: self.len]

    @property
    def value(self) -> int:
        """The data as a little-endian integer."""
        view = self.views.get(self.len)
        if view is None:  # 3, 5, 6 or 7 bytes: an access across a page
            return int.from_bytes(self.data, "little")
        item: int = view[0]
        return item

    @value.setter
    def value(self, value: int) -> None:
        view = self.views.get(self.len)
        if view is None:
            self.data[:] = value.to_bytes(self.len, "little")
        else:
            view[0] = value


class Hlt:
    """The guest halted; only without an interrupt controller in the kernel."""

    __slots__ = ()


class Shutdown:
    """The guest triple-faulted: a real machine would reset."""

    __slots__ = ()


class InternalError(abi.kvm_run.Internal):
    """KVM cannot continue, for example because it cannot emulate an instruction."""

    suberror: int
    ndata: int

    @property
    def words(self) -> list[int]:
        """KVM's data about the error, at most 16 numbers of 64 bits."""
        return list(self.data[: min(self.ndata, len(self.data))])

    @property
    def instruction(self) -> bytes:
        """The bytes of the instruction that could not be emulated, empty if KVM does not tell."""
        if self.suberror != abi.KVM_INTERNAL_ERROR_EMULATION:
            return b""
        failure = abi.kvm_run.EmulationFailure.from_buffer(self)
        if not failure.flags & abi.KVM_INTERNAL_ERROR_EMULATION_FLAG_INSTRUCTION_BYTES:
            return b""
        return bytes(failure.insn_bytes)[: failure.insn_size]


class FailEntry(abi.kvm_run.FailEntry):
    """The processor refused to enter the guest: its register state is invalid."""

    hardware_entry_failure_reason: int
    cpu: int

    @property
    def reason(self) -> int:
        """The processor's reason; for VMX, Intel SDM vol. 3 §27.8."""
        return self.hardware_entry_failure_reason


class SystemEvent(abi.kvm_run.SystemEvent):
    """The guest asked its hypervisor for a reset, shutdown or crash."""

    type: int
    ndata: int


class Debug(abi.kvm_debug_exit_arch):
    """A breakpoint or single step that guest debugging asked for."""

    exception: int
    pc: int
    dr6: int
    dr7: int


class IrqWindowOpen:
    """The guest can take an interrupt now, as `request_interrupt_window` asked."""

    __slots__ = ()


class IoapicEoi(abi.kvm_run.Eoi):
    """The guest ended a level-triggered interrupt of a split irqchip's IOAPIC."""

    vector: int


class Hypercall(abi.kvm_run.Hypercall):
    """The guest made a hypercall that KVM leaves to its user."""

    nr: int


class MsrAccess(abi.kvm_run.Msr):
    """The guest accessed an MSR that KVM leaves to its user; set `error` to 1 for #GP."""

    error: int
    reason: int
    index: int


class Interrupted:
    """A signal or `kick()` ended the run; the last exit's access has been completed."""

    __slots__ = ()


class Unknown(abi.kvm_run.Hw):
    """A reason that this package does not know, or that needs a feature it never enables."""

    reason: int
    """KVM's number of the reason."""
    hardware_exit_reason: int


Exit: TypeAlias = (
    IoExit
    | MmioExit
    | Hlt
    | Shutdown
    | InternalError
    | FailEntry
    | SystemEvent
    | Debug
    | IrqWindowOpen
    | IoapicEoi
    | Hypercall
    | MsrAccess
    | Interrupted
    | Unknown
)

_REASONS = 64  # more than KVM has
_MMIO_BYTES = 8
MMIO_ACCESS = 0xFF_FFFF_FFFF
"""`len` and `is_write` in the last of MmioExit's `words`; the bits above are not defined."""


class Exits:
    """A vCPU's exit objects; those without a class of their own are Unknown."""

    __slots__ = ("_page", "_union", "by_reason", "interrupted", "io", "mmio")

    def __init__(self, page: memoryview) -> None:
        """Lay the objects over `page`: the vCPU's kvm_run and the data pages behind it."""
        run = abi.kvm_run.from_buffer(page)
        base = ctypes.addressof(run)
        union: int = ctypes.addressof(run.io) - base
        self._page, self._union = page, union
        self.interrupted = Interrupted()
        self.io = io = IoExit.from_buffer(page, union)
        io.words = page[union : union + ctypes.sizeof(abi.kvm_run.Io)].cast("Q")
        io.views = _views(page, abi.KVM_PIO_PAGE_OFFSET * PAGE_SIZE, PAGE_SIZE)
        self.mmio = mmio = MmioExit.from_buffer(page, union)
        mmio.words = page[union : union + ctypes.sizeof(abi.kvm_run.Mmio)].cast("Q")
        mmio.views = _views(page, ctypes.addressof(run.mmio.data) - base, _MMIO_BYTES)
        by_reason: list[Exit] = [self._unknown(reason) for reason in range(_REASONS)]
        by_reason[abi.KVM_EXIT_IO] = io
        by_reason[abi.KVM_EXIT_MMIO] = mmio
        by_reason[abi.KVM_EXIT_HLT] = Hlt()
        by_reason[abi.KVM_EXIT_SHUTDOWN] = Shutdown()
        by_reason[abi.KVM_EXIT_INTERNAL_ERROR] = InternalError.from_buffer(page, union)
        by_reason[abi.KVM_EXIT_FAIL_ENTRY] = FailEntry.from_buffer(page, union)
        by_reason[abi.KVM_EXIT_SYSTEM_EVENT] = SystemEvent.from_buffer(page, union)
        by_reason[abi.KVM_EXIT_DEBUG] = Debug.from_buffer(page, union)
        by_reason[abi.KVM_EXIT_IRQ_WINDOW_OPEN] = IrqWindowOpen()
        by_reason[abi.KVM_EXIT_IOAPIC_EOI] = IoapicEoi.from_buffer(page, union)
        by_reason[abi.KVM_EXIT_HYPERCALL] = Hypercall.from_buffer(page, union)
        by_reason[abi.KVM_EXIT_X86_RDMSR] = MsrAccess.from_buffer(page, union)
        by_reason[abi.KVM_EXIT_X86_WRMSR] = by_reason[abi.KVM_EXIT_X86_RDMSR]
        by_reason[abi.KVM_EXIT_INTR] = self.interrupted
        self.by_reason = by_reason

    def find(self, reason: int) -> Exit:
        """Return the object for `reason`, also if it is beyond the list."""
        return self.by_reason[reason] if reason < _REASONS else self._unknown(reason)

    def _unknown(self, reason: int) -> Unknown:
        unknown = Unknown.from_buffer(self._page, self._union)
        unknown.reason = reason
        return unknown


def _views(page: memoryview, start: int, length: int) -> dict[int, memoryview]:
    raw = page[start : start + length]
    return {1: raw, 2: raw.cast("H"), 4: raw.cast("I"), 8: raw.cast("Q")}
