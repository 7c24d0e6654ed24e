"""VMs: memory slots, dirty logs, interrupts, event descriptors, coalesced writes, device state."""

from __future__ import annotations

import ctypes
import mmap
import os
import select
from collections.abc import Iterator
from errno import EBADF, EEXIST, EINVAL, ENOENT

import pytest

from tests import guests
from tests.guests import Guest, guest
from vmm_kvm.arch.x86 import layout
from vmm_kvm.errors import KvmError
from vmm_kvm.irq import IrqLine
from vmm_kvm.kvm import abi
from vmm_kvm.kvm.exits import Hlt, Interrupted, IoExit, MmioExit
from vmm_kvm.kvm.irqline import KvmIrqLine, set_level_triggered
from vmm_kvm.kvm.system import Kvm
from vmm_kvm.kvm.vcpu import Vcpu
from vmm_kvm.kvm.vm import Irqchip, IrqchipRoute, MsiRoute, Vm

pytestmark = pytest.mark.kvm

PAGE = 4096
LAPIC_IRR = 0x200
MSI_ADDRESS = 0xFEE0_0000
IOAPIC_ROUTES = [IrqchipRoute(pin, Irqchip.IOAPIC, pin) for pin in range(24)]


@pytest.fixture
def vm() -> Iterator[Vm]:
    """A VM without parts."""
    with Kvm() as kvm, kvm.create_vm() as made:
        yield made


@pytest.fixture
def chipped(vm: Vm) -> Vm:
    """A VM with interrupt controllers and a timer."""
    vm.set_identity_map_address(layout.IDENTITY_MAP_ADDRESS)
    vm.set_tss_address(layout.TSS_ADDRESS)
    vm.create_irqchip()
    vm.create_pit2()
    return vm


@pytest.fixture
def eventfd() -> Iterator[int]:
    """An event descriptor that does not block."""
    fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
    yield fd
    os.close(fd)


def _is_signalled(fd: int) -> bool:
    return bool(select.select([fd], [], [], 0)[0])


def _anonymous(size: int) -> tuple[mmap.mmap, int]:
    memory = mmap.mmap(-1, size)
    return memory, ctypes.addressof(ctypes.c_char.from_buffer(memory))


def _errno(caught: pytest.ExceptionInfo[KvmError]) -> int | None:
    return caught.value.errno


# Memory slots


def test_slot_moves(vm: Vm) -> None:
    """A slot that moves shows its memory at the new address only."""
    memory, hva = _anonymous(2 * PAGE)
    memory[PAGE] = guests.HALT[0]
    vm.set_memory_region(0, 0, PAGE, hva)
    vm.set_memory_region(1, 0x10_0000, PAGE, hva + PAGE)
    vm.set_memory_region(1, 0x1000, PAGE, hva + PAGE)
    with vm.create_vcpu(0) as vcpu:
        guests.start(vcpu, 0x1000)
        assert isinstance(vcpu.run(), Hlt)


def test_slot_is_deleted(vm: Vm) -> None:
    """Addresses of a deleted slot become MMIO; deleting it again is refused or does nothing."""
    memory, hva = _anonymous(2 * PAGE)
    memory[0:5] = bytes.fromhex("a00010") + guests.HALT + b"\0"  # mov 0x1000, %al; hlt
    vm.set_memory_region(0, 0, PAGE, hva)
    vm.set_memory_region(1, PAGE, PAGE, hva + PAGE)
    vm.delete_memory_region(1)
    with vm.create_vcpu(0) as vcpu:
        guests.start(vcpu, 0)
        reason = vcpu.run()
        assert isinstance(reason, MmioExit)
        assert (reason.address, reason.size, reason.is_write) == (PAGE, 1, 0)


def test_overlapping_slots_are_refused(vm: Vm) -> None:
    """Two slots cannot claim one page."""
    _, hva = _anonymous(2 * PAGE)
    vm.set_memory_region(0, 0, 2 * PAGE, hva)
    with pytest.raises(KvmError) as caught:
        vm.set_memory_region(1, PAGE, PAGE, hva)
    assert str(caught.value) == "KVM_SET_USER_MEMORY_REGION: File exists"
    assert _errno(caught) == EEXIST


@pytest.mark.parametrize(("gpa", "size"), [(1, PAGE), (0, 100), (0, PAGE + 1)])
def test_misaligned_slots_are_refused(vm: Vm, gpa: int, size: int) -> None:
    """A slot must consist of whole pages."""
    _, hva = _anonymous(2 * PAGE)
    with pytest.raises(KvmError) as caught:
        vm.set_memory_region(0, gpa, size, hva)
    assert _errno(caught) == EINVAL


def test_read_only_slot() -> None:
    """The guest reads a read-only slot; its writes are exits and change nothing."""
    code = bytes.fromhex("a00090 a20090") + guests.HALT  # mov 0x9000, %al; mov %al, 0x9000; hlt
    with Kvm() as kvm, kvm.create_vm() as made:
        memory, hva = _anonymous(16 * PAGE)
        memory[guests.CODE : guests.CODE + len(code)] = code
        memory[0x9000] = 0x42
        made.set_memory_region(0, 0, 9 * PAGE, hva)
        made.set_memory_region(1, 0x9000, PAGE, hva + 0x9000, readonly=True)
        with made.create_vcpu(0) as vcpu:
            guests.start(vcpu)
            reason = vcpu.run()
            assert isinstance(reason, MmioExit)
            assert (reason.address, reason.value, reason.is_write) == (0x9000, 0x42, 1)
            assert isinstance(vcpu.run(), Hlt)


# Dirty log


def _dirty_pages(bitmap: bytes) -> set[int]:
    bits = int.from_bytes(bitmap, "little")
    return {page for page in range(len(bitmap) * 8) if bits >> page & 1}


def test_dirty_log() -> None:
    """The log names the pages that the guest wrote since the last read of it."""
    with guest(guests.STORE, log_dirty=True) as g:
        g.vm.get_dirty_log(0, guests.RAM_SIZE)
        assert isinstance(g.vcpu.run(), Hlt)
        bitmap = g.vm.get_dirty_log(0, guests.RAM_SIZE)
        assert len(bitmap) == 8
        assert _dirty_pages(bitmap) >= set(guests.STORED_PAGES)
        assert _dirty_pages(g.vm.get_dirty_log(0, guests.RAM_SIZE)) == set()


def test_dirty_log_can_be_switched_on_later() -> None:
    """A slot starts to log when it is set again with logging."""
    with guest(guests.STORE) as g:
        with pytest.raises(KvmError) as caught:
            g.vm.get_dirty_log(0, guests.RAM_SIZE)
        assert _errno(caught) == ENOENT
        g.vm.set_memory_region(0, 0, guests.RAM_SIZE, g.hva, log_dirty=True)
        g.vcpu.run()
        assert _dirty_pages(g.vm.get_dirty_log(0, guests.RAM_SIZE)) >= set(guests.STORED_PAGES)


def test_dirty_log_is_cleared_by_hand() -> None:
    """With manual protection a page stays in the log until it is cleared."""
    with guest(guests.STORE) as g:
        if not g.kvm.check_extension(abi.KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2):
            pytest.skip("KVM here cannot clear dirty logs by hand")
        g.vm.enable_cap(
            abi.KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, (abi.KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE,)
        )
        g.vm.set_memory_region(0, 0, guests.RAM_SIZE, g.hva, log_dirty=True)
        g.vcpu.run()
        before = _dirty_pages(g.vm.get_dirty_log(0, guests.RAM_SIZE))
        assert before >= set(guests.STORED_PAGES)
        clear = (1 << guests.STORED_PAGES[0]).to_bytes(8, "little")
        g.vm.clear_dirty_log(0, 0, 16, clear)
        after = _dirty_pages(g.vm.get_dirty_log(0, guests.RAM_SIZE))
        assert after == before - {guests.STORED_PAGES[0]}
        with pytest.raises(ValueError, match="a bitmap of 1 bytes for 16 pages"):
            g.vm.clear_dirty_log(0, 0, 16, b"\0")


# Interrupts


def _has_interrupt(g: Guest, vector: int) -> bool:
    """Tell whether the local APIC holds a request for `vector`."""
    register = LAPIC_IRR + vector // 32 * 16
    word = bytes(g.vcpu.get_lapic().regs)[register : register + 4]
    return bool(int.from_bytes(word, "little") >> vector % 32 & 1)


def _enable_lapic(g: Guest) -> None:
    """Set the APIC software enable bit, as a guest does through the spurious vector register."""
    lapic = g.vcpu.get_lapic()
    lapic.regs[0xF1] |= 1
    g.vcpu.set_lapic(lapic)


def test_irq_line_reaches_the_guest() -> None:
    """A rising line interrupts the guest through PIC and vector."""
    with guest(guests.SET_UP_PIC + guests.WAIT_FOR_INTERRUPT, irqchip=True) as g:
        g.put(guests.INTERRUPT_HANDLER, guests.INTERRUPT_REPORT)
        g.set_vector(guests.INTERRUPT_VECTOR, guests.INTERRUPT_HANDLER)
        assert isinstance(g.vcpu.run(), IoExit)
        g.vm.irq_line(0, 1)
        reason = g.vcpu.run()
        assert isinstance(reason, IoExit)
        assert (reason.port, reason.value) == (guests.PORT, guests.INTERRUPT_VECTOR)


def test_kvm_irq_line_tells_changes_only(chipped: Vm) -> None:
    """The kernel gets a level once; a closed VM is noticed only at a change."""
    line: IrqLine = KvmIrqLine(chipped, 4)
    line.set(True)
    assert chipped.get_irqchip(Irqchip.PIC_MASTER).chip.pic.irr & 1 << 4
    chipped.irq_line(4, 0)
    line.set(True)
    chipped.close()
    line.set(True)
    with pytest.raises(KvmError) as caught:
        line.set(False)
    assert _errno(caught) == EBADF


def test_level_triggered_inputs(chipped: Vm) -> None:
    """The PICs keep which inputs are level-triggered; the timer's and the cascade cannot be."""
    set_level_triggered(chipped, (0, 2, 5, 10, 11, 12))
    chips = [chipped.get_irqchip(chip).chip.pic for chip in (Irqchip.PIC_MASTER, Irqchip.PIC_SLAVE)]
    assert [chip.elcr for chip in chips] == [1 << 5, 1 << 2 | 1 << 3 | 1 << 4]


def test_irq_line_status(chipped: Vm) -> None:
    """The kernel reports whether an edge arrived, or merged with one still pending."""
    with chipped.create_vcpu(0):
        assert chipped.irq_line_status(4, 1) >= 1
        chipped.irq_line(4, 0)
        assert chipped.irq_line_status(4, 1) == 0


def test_irq_line_needs_an_irqchip(vm: Vm) -> None:
    """Without interrupt controllers there are no lines."""
    with pytest.raises(KvmError):
        vm.irq_line(0, 1)


def test_msi() -> None:
    """A message reaches the local APIC once that is enabled, and is dropped before."""
    with guest(guests.HALT, irqchip=True) as g:
        _enable_lapic(g)
        assert g.vm.signal_msi(MSI_ADDRESS, 0x41)
        assert _has_interrupt(g, 0x41)
        assert not _has_interrupt(g, 0x42)


def test_gsi_routing() -> None:
    """A GSI sends the message of its route, until the routes are replaced."""
    with guest(guests.HALT, irqchip=True) as g:
        _enable_lapic(g)
        g.vm.set_gsi_routing([*IOAPIC_ROUTES, MsiRoute(40, MSI_ADDRESS, 0x51)])
        g.vm.irq_line(40, 1)
        assert _has_interrupt(g, 0x51)
        g.vm.set_gsi_routing([*IOAPIC_ROUTES, MsiRoute(40, MSI_ADDRESS, 0x52)])
        g.vm.irq_line(40, 1)
        assert _has_interrupt(g, 0x52)


def test_impossible_route_is_refused(chipped: Vm) -> None:
    """A route to a pin beyond the IOAPIC's 24 is refused; an empty table of routes is allowed."""
    with pytest.raises(KvmError) as caught:
        chipped.set_gsi_routing([IrqchipRoute(0, Irqchip.IOAPIC, 24)])
    assert _errno(caught) == EINVAL
    chipped.set_gsi_routing([])


def test_irqfd(eventfd: int) -> None:
    """Writing the event descriptor sends the GSI's interrupt, until it is removed."""
    with guest(guests.HALT, irqchip=True) as g:
        _enable_lapic(g)
        g.vm.set_gsi_routing([MsiRoute(40, MSI_ADDRESS, 0x61), MsiRoute(41, MSI_ADDRESS, 0x62)])
        g.vm.irqfd(eventfd, 40)
        os.eventfd_write(eventfd, 1)
        assert _has_interrupt(g, 0x61)
        g.vm.remove_irqfd(eventfd, 40)
        g.vm.set_gsi_routing([MsiRoute(40, MSI_ADDRESS, 0x63)])
        os.eventfd_write(eventfd, 1)
        assert not _has_interrupt(g, 0x63)


def test_irqfd_wants_an_eventfd(chipped: Vm) -> None:
    """A descriptor of another kind of file is refused."""
    read, write = os.pipe()
    try:
        with pytest.raises(KvmError) as caught:
            chipped.irqfd(read, 5)
        assert _errno(caught) == EINVAL
    finally:
        os.close(read)
        os.close(write)


def test_resampling_irqfd(eventfd: int) -> None:
    """A level interrupt by descriptor stays until the guest's EOI, which signals another one."""
    resample = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
    try:
        with guest(guests.SET_UP_PIC + guests.WAIT_FOR_INTERRUPT, irqchip=True) as g:
            g.put(guests.INTERRUPT_HANDLER, guests.INTERRUPT_REPORT)
            g.set_vector(guests.INTERRUPT_VECTOR, guests.INTERRUPT_HANDLER)
            assert isinstance(g.vcpu.run(), IoExit)
            g.vm.irqfd(eventfd, 0, resample_fd=resample)
            os.eventfd_write(eventfd, 1)
            reason = g.vcpu.run()
            assert isinstance(reason, IoExit)
            assert reason.value == guests.INTERRUPT_VECTOR
            assert not _is_signalled(resample)
            g.vcpu.set_guest_debug(abi.KVM_GUESTDBG_ENABLE | abi.KVM_GUESTDBG_SINGLESTEP)
            for _ in range(8):  # out, iret, and the guest's next instructions
                g.vcpu.run()
            assert _is_signalled(resample)
    finally:
        os.close(resample)


def test_split_irqchip() -> None:
    """A split irqchip has local APICs, which take messages, but no PICs to read."""
    with Kvm() as kvm, kvm.create_vm() as made:
        made.enable_split_irqchip()
        with made.create_vcpu(0) as vcpu:
            lapic = vcpu.get_lapic()
            lapic.regs[0xF1] |= 1
            vcpu.set_lapic(lapic)
            assert made.signal_msi(MSI_ADDRESS, 0x71)
            with pytest.raises(KvmError):
                made.get_irqchip(Irqchip.PIC_MASTER)
        with pytest.raises(KvmError) as caught:
            made.create_irqchip()
        assert _errno(caught) == EEXIST


# Event descriptors and coalesced writes


def test_ioeventfd_for_a_port(eventfd: int) -> None:
    """A port write signals the descriptor and makes no exit, until it is removed."""
    with guest(guests.WRITE_PORT) as g:
        g.vm.ioeventfd(eventfd, guests.PORT, 1, pio=True)
        reason = g.vcpu.run()
        assert isinstance(reason, IoExit)
        assert reason.size == 2
        assert os.eventfd_read(eventfd) == 1
        g.vm.remove_ioeventfd(eventfd, guests.PORT, 1, pio=True)
        guests.start(g.vcpu)
        reason = g.vcpu.run()
        assert isinstance(reason, IoExit)
        assert reason.size == 1
        while not isinstance(reason, Hlt):
            reason = g.vcpu.run()
        assert not _is_signalled(eventfd)


@pytest.mark.parametrize(("value", "signals"), [(0xDEAD_BEEF, True), (0xDEAD_BEEE, False)])
def test_ioeventfd_with_datamatch(eventfd: int, value: int, signals: bool) -> None:
    """Only a write of the bound value signals; any other write is an exit."""
    with guest(guests.ACCESS_MMIO) as g:
        g.vm.ioeventfd(eventfd, guests.MMIO + 0x10, 4, datamatch=value)
        reason = g.vcpu.run()
        assert isinstance(reason, MmioExit)
        assert reason.address == guests.MMIO + (0x14 if signals else 0x10)
        assert _is_signalled(eventfd) == signals


def test_ioeventfd_of_any_length(eventfd: int) -> None:
    """A length of 0 takes writes of every size."""
    with guest(guests.WRITE_PORT) as g:
        g.vm.ioeventfd(eventfd, guests.PORT, 0, pio=True)
        assert isinstance(g.vcpu.run(), Hlt)
        assert os.eventfd_read(eventfd) == 3


def test_ioeventfd_is_bound_once(eventfd: int) -> None:
    """Binding twice is refused, and so is removing a binding that does not exist."""
    with guest(guests.HALT) as g:
        g.vm.ioeventfd(eventfd, guests.MMIO, 4)
        with pytest.raises(KvmError) as caught:
            g.vm.ioeventfd(eventfd, guests.MMIO, 4)
        assert _errno(caught) == EEXIST
        with pytest.raises(KvmError) as caught:
            g.vm.remove_ioeventfd(eventfd, guests.MMIO, 2)
        assert _errno(caught) == ENOENT


def _collected(vcpu: Vcpu) -> list[tuple[bool, int, int, int]]:
    """Return the collected writes: whether to a port, address, size, value."""
    seen: list[tuple[bool, int, int, int]] = []
    is_any = vcpu.write_collected(
        lambda *write: seen.append((True, *write)), lambda *write: seen.append((False, *write))
    )
    assert is_any == bool(seen)
    return seen


def _fail(_address: int, _size: int, value: int) -> None:
    raise ZeroDivisionError(value)


def test_coalesced_port_writes() -> None:
    """Collected port writes are read once, in order, with size and value."""
    with guest(guests.WRITE_PORT) as g:
        if not g.kvm.check_extension(abi.KVM_CAP_COALESCED_PIO):
            pytest.skip("KVM here cannot collect port writes")
        g.vm.register_coalesced(guests.PORT, 4, pio=True)
        assert isinstance(g.vcpu.run(), Hlt)
        expected = [
            (True, guests.PORT, 1, 0x5A),
            (True, guests.PORT, 2, 0x1234),
            (True, guests.PORT, 4, 0x1234_5678),
        ]
        assert expected == _collected(g.vcpu)
        assert _collected(g.vcpu) == []


def test_coalesced_bytes() -> None:
    """Collected writes of one port are read as bytes, in order, also around the ring's end."""
    count = 400
    with guest(guests.out_countdown(count)) as g:
        if not g.kvm.check_extension(abi.KVM_CAP_COALESCED_PIO):
            pytest.skip("KVM here cannot collect port writes")
        g.vm.register_coalesced(guests.PORT, 1, pio=True)
        seen = bytearray()
        assert not g.vcpu.write_collected_bytes(seen.extend)
        while isinstance(reason := g.vcpu.run(), IoExit):
            g.vcpu.write_collected_bytes(seen.extend)
            seen.append(reason.views[1][0])  # the ring was full
        assert isinstance(reason, Hlt)
        g.vcpu.write_collected_bytes(seen.extend)
        assert bytes(left & 0xFF for left in range(count, 0, -1)) == seen


def test_coalesced_mmio_writes_end() -> None:
    """MMIO writes are collected until the zone is unregistered; then they are exits again."""
    with guest(guests.ACCESS_MMIO) as g:
        g.vm.register_coalesced(guests.MMIO, PAGE)
        reason = g.vcpu.run()
        assert isinstance(reason, MmioExit)
        assert (reason.address, reason.is_write) == (guests.MMIO + 0x20, 0)
        expected = [
            (False, guests.MMIO + 0x10, 4, 0xDEAD_BEEF),
            (False, guests.MMIO + 0x14, 1, 0x77),
        ]
        assert expected == _collected(g.vcpu)
        g.vm.unregister_coalesced(guests.MMIO, PAGE)
        assert isinstance(g.vcpu.run(), Hlt)
        guests.start(g.vcpu)
        reason = g.vcpu.run()
        assert isinstance(reason, MmioExit)
        assert reason.address == guests.MMIO + 0x10


def test_full_ring_makes_exits() -> None:
    """A full ring loses no write: the next ones are exits, after the collected ones."""
    count = 1000
    with guest(guests.mmio_loop(count)) as g:
        g.vm.register_coalesced(guests.MMIO, PAGE)
        seen = 0
        while True:
            reason = g.vcpu.run()
            seen += len(_collected(g.vcpu))
            if isinstance(reason, Hlt):
                break
            assert isinstance(reason, MmioExit)
            seen += 1
        assert seen == count


def test_ring_is_left_tidy_when_a_write_fails() -> None:
    """If handling a collected write raises, that write is done and the rest stays."""
    with guest(guests.ACCESS_MMIO) as g:
        g.vm.register_coalesced(guests.MMIO, PAGE)
        g.vcpu.run()
        with pytest.raises(ZeroDivisionError):
            g.vcpu.write_collected(_fail, _fail)
        assert [value for _, _, _, value in _collected(g.vcpu)] == [0x77]
        assert not g.vm.coalesced_lock.locked()


# Device state


@pytest.mark.parametrize("chip", [Irqchip.PIC_MASTER, Irqchip.PIC_SLAVE, Irqchip.IOAPIC])
def test_irqchip_state(chipped: Vm, chip: Irqchip) -> None:
    """The state of both PICs and of the IOAPIC survives a round trip with a change."""
    state = chipped.get_irqchip(chip)
    assert state.chip_id == chip
    if chip == Irqchip.IOAPIC:
        state.chip.ioapic.redirtbl[5] = 0x1_0000 | 0x35
    else:
        state.chip.pic.imr = 0xA5
    chipped.set_irqchip(state)
    assert bytes(state) == bytes(chipped.get_irqchip(chip))


def test_pit_state(chipped: Vm) -> None:
    """The timer's state survives a round trip with a change."""
    state = chipped.get_pit2()
    state.channels[2].count = 0x1234
    state.channels[2].mode = 3
    state.flags = abi.KVM_PIT_FLAGS_SPEAKER_DATA_ON
    chipped.set_pit2(state)
    after = chipped.get_pit2()
    assert (after.channels[2].count, after.channels[2].mode) == (0x1234, 3)
    assert after.flags == abi.KVM_PIT_FLAGS_SPEAKER_DATA_ON


def test_pit_reinjection(chipped: Vm) -> None:
    """Delivery of lost timer ticks can be switched off and on."""
    chipped.set_pit_reinject(False)
    chipped.set_pit_reinject(True)


def test_clock(vm: Vm) -> None:
    """The clock of kvmclock continues from the value it is set to."""
    hour_ns = 3600 * 10**9
    vm.set_clock(abi.kvm_clock_data(clock=hour_ns))
    passed = vm.get_clock().clock - hour_ns
    assert 0 <= passed < 60 * 10**9


def test_boot_cpu() -> None:
    """The boot vCPU can be another than number 0."""
    with Kvm() as kvm, kvm.create_vm() as made:
        made.create_irqchip()
        made.set_boot_cpu(1)
        with made.create_vcpu(0) as first, made.create_vcpu(1) as second:
            assert first.get_mp_state() == abi.KVM_MP_STATE_UNINITIALIZED
            assert second.get_mp_state() == abi.KVM_MP_STATE_RUNNABLE


def test_addresses_beyond_int() -> None:
    """Addresses above 2 GiB pass by value and by reference; those above 4 GiB are refused."""
    with Kvm() as kvm, kvm.create_vm() as made:
        made.set_tss_address(0xFFFB_D000)
        made.set_identity_map_address(0xFFFB_C000)
        with pytest.raises(KvmError):
            made.set_tss_address(0xFFFF_F000)


def test_vcpu_index_is_taken(vm: Vm) -> None:
    """A vCPU index can be used only once."""
    with vm.create_vcpu(0), pytest.raises(KvmError) as caught:
        vm.create_vcpu(0)
    assert str(caught.value) == "KVM_CREATE_VCPU: File exists"


def test_immediate_exit_completes_the_access() -> None:
    """With immediate_exit set, run() finishes the last exit's instruction and nothing more."""
    with guest(guests.READ_PORT) as g:
        reason = g.vcpu.run()
        assert isinstance(reason, IoExit)
        reason.value = 0x99
        g.vcpu.set_immediate_exit()
        assert isinstance(g.vcpu.run(), Interrupted)
        regs = g.vcpu.get_regs()
        assert (regs.rax & 0xFF, regs.rip) == (0x99, guests.CODE + 2)
        g.vcpu.clear_immediate_exit()
        assert isinstance(g.vcpu.run(), IoExit)
