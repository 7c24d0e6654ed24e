"""Exit objects over a kvm_run page, without any vCPU: also those that are hard to provoke."""

from __future__ import annotations

import pytest

from vmm_kvm.kvm import abi
from vmm_kvm.kvm.exits import (
    Debug,
    Exit,
    Exits,
    FailEntry,
    Hlt,
    Hypercall,
    InternalError,
    Interrupted,
    IoapicEoi,
    IoExit,
    IrqWindowOpen,
    MmioExit,
    MsrAccess,
    Shutdown,
    SystemEvent,
    Unknown,
)

PAGES = 2 * 4096


def _page() -> tuple[abi.kvm_run, Exits]:
    page = memoryview(bytearray(PAGES))
    return abi.kvm_run.from_buffer(page), Exits(page)


@pytest.mark.parametrize(
    ("reason", "kind"),
    [
        (abi.KVM_EXIT_UNKNOWN, Unknown),
        (abi.KVM_EXIT_EXCEPTION, Unknown),
        (abi.KVM_EXIT_IO, IoExit),
        (abi.KVM_EXIT_HYPERCALL, Hypercall),
        (abi.KVM_EXIT_DEBUG, Debug),
        (abi.KVM_EXIT_HLT, Hlt),
        (abi.KVM_EXIT_MMIO, MmioExit),
        (abi.KVM_EXIT_IRQ_WINDOW_OPEN, IrqWindowOpen),
        (abi.KVM_EXIT_SHUTDOWN, Shutdown),
        (abi.KVM_EXIT_FAIL_ENTRY, FailEntry),
        (abi.KVM_EXIT_INTR, Interrupted),
        (abi.KVM_EXIT_INTERNAL_ERROR, InternalError),
        (abi.KVM_EXIT_SYSTEM_EVENT, SystemEvent),
        (abi.KVM_EXIT_IOAPIC_EOI, IoapicEoi),
        (abi.KVM_EXIT_X86_RDMSR, MsrAccess),
        (abi.KVM_EXIT_X86_WRMSR, MsrAccess),
        (abi.KVM_EXIT_MEMORY_FAULT, Unknown),
        (1000, Unknown),
    ],
)
def test_each_reason_has_its_class(reason: int, kind: type[Exit]) -> None:
    """Every reason has its class, and an unknown one of a newer kernel is Unknown."""
    _, exits = _page()
    assert isinstance(exits.find(reason), kind)


@pytest.mark.parametrize("reason", [abi.KVM_EXIT_EXCEPTION, abi.KVM_EXIT_MEMORY_FAULT, 1000])
def test_unknown_tells_its_reason(reason: int) -> None:
    """An Unknown exit has KVM's number, and the processor's."""
    run, exits = _page()
    run.hw.hardware_exit_reason = 0x80
    found = exits.find(reason)
    assert isinstance(found, Unknown)
    assert (found.reason, found.hardware_exit_reason) == (reason, 0x80)


def test_fail_entry() -> None:
    """A failed entry has its reason."""
    run, exits = _page()
    run.fail_entry.hardware_entry_failure_reason = 0x8000_0021
    found = exits.find(abi.KVM_EXIT_FAIL_ENTRY)
    assert isinstance(found, FailEntry)
    assert found.reason == 0x8000_0021


def test_internal_error_of_an_instruction() -> None:
    """An instruction that KVM cannot emulate is shown, if KVM reports it."""
    run, exits = _page()
    run.emulation_failure.suberror = abi.KVM_INTERNAL_ERROR_EMULATION
    run.emulation_failure.ndata = 3
    found = exits.find(abi.KVM_EXIT_INTERNAL_ERROR)
    assert isinstance(found, InternalError)
    assert found.instruction == b""
    run.emulation_failure.flags = abi.KVM_INTERNAL_ERROR_EMULATION_FLAG_INSTRUCTION_BYTES
    run.emulation_failure.insn_size = 3
    run.emulation_failure.insn_bytes[:3] = [0x0F, 0x01, 0xC1]
    assert found.instruction == b"\x0f\x01\xc1"
    assert len(found.words) == 3
    assert found.words[0] == abi.KVM_INTERNAL_ERROR_EMULATION_FLAG_INSTRUCTION_BYTES


def test_internal_error_of_another_kind() -> None:
    """Other internal errors have numbers only, at most as many as fit."""
    run, exits = _page()
    run.internal.suberror = abi.KVM_INTERNAL_ERROR_DELIVERY_EV
    run.internal.ndata = 1000
    run.internal.data[:] = range(16)
    found = exits.find(abi.KVM_EXIT_INTERNAL_ERROR)
    assert isinstance(found, InternalError)
    assert (found.words, found.instruction) == (list(range(16)), b"")


def test_system_event() -> None:
    """A system event has its type."""
    run, exits = _page()
    run.system_event.type = abi.KVM_SYSTEM_EVENT_CRASH
    found = exits.find(abi.KVM_EXIT_SYSTEM_EVENT)
    assert isinstance(found, SystemEvent)
    assert found.type == abi.KVM_SYSTEM_EVENT_CRASH


def test_small_exits() -> None:
    """Exits have the vector of an EOI, an MSR's number, a hypercall's number."""
    run, exits = _page()
    run.eoi.vector = 0x31
    eoi = exits.find(abi.KVM_EXIT_IOAPIC_EOI)
    assert isinstance(eoi, IoapicEoi)
    assert eoi.vector == 0x31
    run.msr.index = 0x1234
    msr = exits.find(abi.KVM_EXIT_X86_RDMSR)
    assert isinstance(msr, MsrAccess)
    msr.error = 1
    assert (msr.index, run.msr.error) == (0x1234, 1)
    run.hypercall.nr = 12
    hypercall = exits.find(abi.KVM_EXIT_HYPERCALL)
    assert isinstance(hypercall, Hypercall)
    assert hypercall.nr == 12
