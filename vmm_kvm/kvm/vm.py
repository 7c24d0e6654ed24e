"""A VM as KVM knows it: memory slots, interrupt controllers, timers, event fds, vCPUs.

It knows nothing of the memory's contents, the devices, or the owners of addresses.

Every method may be called from any thread of the process that made the VM; the kernel refuses
other processes. Set the memory slots before `create_irqchip`: 0.07 ms against 7.4 ms.
"""

import ctypes
import enum
import os
import threading
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, NamedTuple, Self

from vmm_kvm.bits import PAGE_SIZE, align_up
from vmm_kvm.kvm import abi
from vmm_kvm.kvm.ioctl import ioctl
from vmm_kvm.kvm.vcpu import Vcpu

if TYPE_CHECKING:
    from vmm_kvm.kvm.system import Kvm

_BITMAP_UNIT = 64  # pages: the kernel reads and writes whole 64-bit words


class Irqchip(enum.IntEnum):
    """An interrupt controller, by KVM's number."""

    PIC_MASTER = abi.KVM_IRQCHIP_PIC_MASTER
    PIC_SLAVE = abi.KVM_IRQCHIP_PIC_SLAVE
    IOAPIC = abi.KVM_IRQCHIP_IOAPIC


class IrqchipRoute(NamedTuple):
    """A GSI that drives a pin of an interrupt controller."""

    gsi: int
    irqchip: Irqchip
    pin: int
    """0 to 7 for a PIC, 0 to 23 for the IOAPIC."""


class MsiRoute(NamedTuple):
    """A GSI that sends a message-signalled interrupt."""

    gsi: int
    address: int
    data: int
    devid: int | None = None
    """The sender, where interrupt remapping wants it; x86 does not."""


Route = IrqchipRoute | MsiRoute


class Vm:
    """One VM; a context manager that owns its file descriptor.

    The kernel keeps the VM until its vCPUs are closed too.
    """

    __slots__ = ("_mmap_size", "coalesced_lock", "fd")

    def __init__(self, kvm: "Kvm", fd: int) -> None:
        """Use `fd`, a new VM of `kvm`; takes ownership of it. `Kvm.create_vm` calls this."""
        self.fd = fd
        self._mmap_size = kvm.vcpu_mmap_size
        self.coalesced_lock = threading.Lock()  # held while the ring of all vCPUs is drained

    def close(self) -> None:
        """Close the file descriptor; idempotent."""
        fd, self.fd = self.fd, -1
        if fd >= 0:
            os.close(fd)

    def take_over(self, new: "Vm") -> None:
        """Become `new`, under this one's descriptor; closes `new`'s.

        In a forked child, to which the kernel refuses the parent's VM.

        Raises:
            OSError: the descriptor cannot be replaced.
        """
        os.dup2(new.fd, self.fd, inheritable=False)
        new.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def check_extension(self, capability: int) -> int:
        """Return the value of `capability` for this VM; see `Kvm.check_extension`.

        Raises:
            KvmError: the VM is closed.

        Source: KVM API §4.4.
        """
        return ioctl(self.fd, abi.KVM_CHECK_EXTENSION, capability)

    def enable_cap(self, capability: int, args: Sequence[int] = ()) -> None:
        """Enable `capability` with at most four numbers as arguments.

        Raises:
            KvmError: KVM lacks it, refuses the arguments, or it is too late for it.

        Source: KVM API §4.37.
        """
        cap = abi.kvm_enable_cap(cap=capability)
        cap.args[: len(args)] = list(args)
        ioctl(self.fd, abi.KVM_ENABLE_CAP, cap)

    def create_vcpu(self, index: int) -> Vcpu:
        """Make a vCPU whose APIC id is `index`, in its reset state.

        All but number 0 wait for the guest's start-up IPI if the VM has an irqchip by then.

        Raises:
            KvmError: `index` is taken, or more than KVM allows.

        Source: KVM API §4.7.
        """
        fd = ioctl(self.fd, abi.KVM_CREATE_VCPU, index)
        ring_page = self.check_extension(abi.KVM_CAP_COALESCED_MMIO)
        xsave_size = self.check_extension(abi.KVM_CAP_XSAVE2)
        return Vcpu(
            fd,
            index,
            self._mmap_size,
            ring_page=ring_page,
            ring_lock=self.coalesced_lock,
            xsave_size=xsave_size,
        )

    def set_boot_cpu(self, index: int) -> None:
        """Let vCPU `index` be the one that starts; before the first vCPU is made.

        Raises:
            KvmError: a vCPU exists already.

        Source: KVM API §4.41.
        """
        ioctl(self.fd, abi.KVM_SET_BOOT_CPU_ID, index)

    # Memory

    def set_memory_region(
        self,
        slot: int,
        gpa: int,
        size: int,
        hva: int,
        *,
        readonly: bool = False,
        log_dirty: bool = False,
    ) -> None:
        """Show `size` bytes of this process's memory at `hva` to the guest at `gpa`.

        All three are multiples of 4096. A slot that is set already moves to `gpa` or changes its
        dirty logging; its size and memory stay. The memory must stay mapped as long as the slot.
        Guest writes to a read-only slot leave as MmioExit.

        Raises:
            KvmError: misaligned, overlapping another slot, or a change that KVM cannot make.

        Source: KVM API §4.35.
        """
        flags = abi.KVM_MEM_READONLY if readonly else 0
        flags |= abi.KVM_MEM_LOG_DIRTY_PAGES if log_dirty else 0
        region = abi.kvm_userspace_memory_region(slot, flags, gpa, size, hva)
        ioctl(self.fd, abi.KVM_SET_USER_MEMORY_REGION, region)

    def delete_memory_region(self, slot: int) -> None:
        """Take a slot's memory away from the guest.

        Raises:
            KvmError: the slot is not set.

        Source: KVM API §4.35.
        """
        region = abi.kvm_userspace_memory_region(slot=slot)
        ioctl(self.fd, abi.KVM_SET_USER_MEMORY_REGION, region)

    def get_dirty_log(self, slot: int, size: int) -> bytes:
        """Return which pages of a slot of `size` bytes the guest wrote: bit n for page n.

        The log starts afresh, unless KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2 is enabled: then
        `clear_dirty_log` does that. The result is a multiple of 8 bytes long.

        Raises:
            KvmError: the slot does not log.

        Source: KVM API §4.8.
        """
        pages = align_up(size // PAGE_SIZE, _BITMAP_UNIT)
        bitmap = (ctypes.c_uint8 * (pages // 8))()
        log = abi.kvm_dirty_log(slot=slot, dirty_bitmap=ctypes.addressof(bitmap))
        ioctl(self.fd, abi.KVM_GET_DIRTY_LOG, log)
        return bytes(bitmap)

    def clear_dirty_log(self, slot: int, first_page: int, pages: int, bitmap: bytes) -> None:
        """Log anew those of `pages` pages from `first_page` whose bit is set in `bitmap`.

        `first_page` is a multiple of 64, and so is `pages` unless it ends with the slot.

        Raises:
            KvmError: KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2 is not enabled, or the range is wrong.
            ValueError: the bitmap is too short for the pages.

        Source: KVM API §4.117.
        """
        needed = align_up(pages, _BITMAP_UNIT) // 8
        if len(bitmap) < needed:
            raise ValueError(f"a bitmap of {len(bitmap)} bytes for {pages} pages")
        copy = (ctypes.c_uint8 * len(bitmap)).from_buffer_copy(bitmap)
        log = abi.kvm_clear_dirty_log(
            slot=slot,
            num_pages=pages,
            first_page=first_page,
            dirty_bitmap=ctypes.addressof(copy),
        )
        ioctl(self.fd, abi.KVM_CLEAR_DIRTY_LOG, log)

    def set_tss_address(self, gpa: int) -> None:
        """Give KVM three pages below 4 GiB, outside all slots, for real mode on old processors.

        Raises:
            KvmError: the address is out of range, or a vCPU exists already.

        Source: KVM API §4.36.
        """
        ioctl(self.fd, abi.KVM_SET_TSS_ADDR, gpa)

    def set_identity_map_address(self, gpa: int) -> None:
        """Give KVM one page below 4 GiB, outside all slots, for the same purpose.

        Raises:
            KvmError: a vCPU exists already.

        Source: KVM API §4.40.
        """
        ioctl(self.fd, abi.KVM_SET_IDENTITY_MAP_ADDR, ctypes.c_uint64(gpa))

    # Interrupts and timers

    def create_irqchip(self) -> None:
        """Make two PICs and an IOAPIC, and a local APIC for each vCPU made later.

        Raises:
            KvmError: there is one already, or a vCPU exists.

        Source: KVM API §4.24.
        """
        ioctl(self.fd, abi.KVM_CREATE_IRQCHIP)

    def enable_split_irqchip(self, pins: int = 24) -> None:
        """Make only local APICs; PICs and an IOAPIC of `pins` inputs are the caller's to model.

        Raises:
            KvmError: there is an irqchip already, or a vCPU exists.

        Source: KVM API §7.5.
        """
        self.enable_cap(abi.KVM_CAP_SPLIT_IRQCHIP, (pins,))

    def create_pit2(self, speaker_dummy: bool = True) -> None:
        """Make the i8254 timer; with `speaker_dummy` also port 0x61, without any sound.

        Raises:
            KvmError: there is no irqchip, or a timer already.

        Source: KVM API §4.71.
        """
        config = abi.kvm_pit_config(flags=abi.KVM_PIT_SPEAKER_DUMMY if speaker_dummy else 0)
        ioctl(self.fd, abi.KVM_CREATE_PIT2, config)

    def set_pit_reinject(self, is_on: bool) -> None:
        """Choose whether timer ticks that the guest was too slow for are delivered later.

        Raises:
            KvmError: there is no timer.

        Source: Linux arch/x86/kvm/x86.c, KVM_REINJECT_CONTROL.
        """
        ioctl(self.fd, abi.KVM_REINJECT_CONTROL, abi.kvm_reinject_control(pit_reinject=int(is_on)))

    def irq_line(self, gsi: int, level: int) -> None:
        """Drive the interrupt line `gsi` to 0 or 1.

        Raises:
            KvmError: there is no irqchip.

        Source: KVM API §4.25.
        """
        ioctl(self.fd, abi.KVM_IRQ_LINE, abi.kvm_irq_level(irq=gsi, level=level))

    def irq_line_status(self, gsi: int, level: int) -> int:
        """Drive the line and tell whether the interrupt was delivered.

        Returns 0 if it was coalesced with a pending one or masked, else how many processors got it.

        Raises:
            KvmError: there is no irqchip.

        Source: Linux virt/kvm/kvm_main.c, KVM_CAP_IRQ_INJECT_STATUS.
        """
        line = abi.kvm_irq_level(irq=gsi, level=level)
        ioctl(self.fd, abi.KVM_IRQ_LINE_STATUS, line)
        return max(int(line.status), 0)

    def signal_msi(self, address: int, data: int, devid: int | None = None) -> bool:
        """Send a message-signalled interrupt; returns False if the guest blocks it.

        Raises:
            KvmError: there is no local APIC.

        Source: KVM API §4.71.
        """
        msi = abi.kvm_msi(
            address_lo=address & 0xFFFF_FFFF,
            address_hi=address >> 32,
            data=data,
            flags=0 if devid is None else abi.KVM_MSI_VALID_DEVID,
            devid=devid or 0,
        )
        return ioctl(self.fd, abi.KVM_SIGNAL_MSI, msi) > 0

    def set_gsi_routing(self, routes: Iterable[Route]) -> None:
        """Replace what every GSI leads to, for `irq_line` and `irqfd`.

        One GSI may have one route per PIC and IOAPIC, or a single MSI.

        Raises:
            KvmError: a route names a pin that does not exist, or there is no irqchip.

        Source: KVM API §4.52.
        """
        entries = [_routing_entry(route) for route in routes]
        table = abi.with_entries(abi.kvm_irq_routing, abi.kvm_irq_routing_entry, len(entries))(
            nr=len(entries)
        )
        table.entries[:] = entries
        ioctl(self.fd, abi.KVM_SET_GSI_ROUTING, table)

    def irqfd(self, eventfd: int, gsi: int, *, resample_fd: int | None = None) -> None:
        """Let writes to `eventfd` raise the interrupt `gsi`, an edge each.

        With `resample_fd` it stays raised until the guest's EOI, which writes that eventfd. Both
        stay the caller's; KVM forgets them when they are closed.

        Raises:
            KvmError: not an eventfd, bound already, or no irqchip.

        Source: KVM API §4.75.
        """
        irqfd = abi.kvm_irqfd(fd=eventfd, gsi=gsi)
        if resample_fd is not None:
            irqfd.flags = abi.KVM_IRQFD_FLAG_RESAMPLE
            irqfd.resamplefd = resample_fd
        ioctl(self.fd, abi.KVM_IRQFD, irqfd)

    def remove_irqfd(self, eventfd: int, gsi: int) -> None:
        """Undo `irqfd`; after this returns it raises no more interrupts.

        Raises:
            KvmError: not an eventfd.

        Source: KVM API §4.75.
        """
        irqfd = abi.kvm_irqfd(fd=eventfd, gsi=gsi, flags=abi.KVM_IRQFD_FLAG_DEASSIGN)
        ioctl(self.fd, abi.KVM_IRQFD, irqfd)

    # Accesses that need no exit

    def ioeventfd(
        self,
        eventfd: int,
        address: int,
        size: int,
        *,
        datamatch: int | None = None,
        pio: bool = False,
    ) -> None:
        """Let guest writes of `size` bytes at `address` signal `eventfd`, instead of an exit.

        `size` is 1, 2, 4 or 8, or 0 for any; with `datamatch` only that value counts, and `size`
        is not 0. `eventfd` stays the caller's; KVM forgets it when it is closed.

        Raises:
            KvmError: not an eventfd, a size that cannot be, or bound already.

        Source: KVM API §4.59.
        """
        ioctl(self.fd, abi.KVM_IOEVENTFD, _ioeventfd(eventfd, address, size, datamatch, pio=pio))

    def remove_ioeventfd(
        self,
        eventfd: int,
        address: int,
        size: int,
        *,
        datamatch: int | None = None,
        pio: bool = False,
    ) -> None:
        """Undo `ioeventfd`, called with the same arguments.

        Raises:
            KvmError: it is not bound so.

        Source: KVM API §4.59.
        """
        binding = _ioeventfd(eventfd, address, size, datamatch, pio=pio)
        binding.flags |= abi.KVM_IOEVENTFD_FLAG_DEASSIGN
        ioctl(self.fd, abi.KVM_IOEVENTFD, binding)

    def register_coalesced(self, address: int, size: int, *, pio: bool = False) -> None:
        """Let KVM collect guest writes to `size` bytes at `address` in a ring, without exits.

        `Vcpu.write_collected` empties it. A full ring makes the next write an exit.

        Raises:
            KvmError: KVM cannot; for ports, it lacks KVM_CAP_COALESCED_PIO.

        Source: KVM API §4.116.
        """
        zone = abi.kvm_coalesced_mmio_zone(addr=address, size=size, pio=int(pio))
        ioctl(self.fd, abi.KVM_REGISTER_COALESCED_MMIO, zone)

    def unregister_coalesced(self, address: int, size: int, *, pio: bool = False) -> None:
        """Undo `register_coalesced`; writes in the ring stay to be drained.

        Raises:
            KvmError: KVM cannot.

        Source: KVM API §4.116.
        """
        zone = abi.kvm_coalesced_mmio_zone(addr=address, size=size, pio=int(pio))
        ioctl(self.fd, abi.KVM_UNREGISTER_COALESCED_MMIO, zone)

    # State

    def get_clock(self) -> abi.kvm_clock_data:
        """Return the VM's kvmclock, in nanoseconds.

        Raises:
            KvmError: the kernel refused.

        Source: KVM API §4.29.
        """
        clock = abi.kvm_clock_data()
        ioctl(self.fd, abi.KVM_GET_CLOCK, clock)
        return clock

    def set_clock(self, clock: abi.kvm_clock_data) -> None:
        """Set the VM's kvmclock; of `flags` only KVM_CLOCK_REALTIME may be set.

        Raises:
            KvmError: other flags are set.

        Source: KVM API §4.30.
        """
        ioctl(self.fd, abi.KVM_SET_CLOCK, clock)

    def get_irqchip(self, chip: Irqchip) -> abi.kvm_irqchip:
        """Return the state of a PIC or the IOAPIC.

        Raises:
            KvmError: there is no such chip.

        Source: KVM API §4.26.
        """
        irqchip = abi.kvm_irqchip(chip_id=chip)
        ioctl(self.fd, abi.KVM_GET_IRQCHIP, irqchip)
        return irqchip

    def set_irqchip(self, irqchip: abi.kvm_irqchip) -> None:
        """Set the state of the PIC or IOAPIC that `chip_id` names.

        Raises:
            KvmError: there is no such chip.

        Source: KVM API §4.27.
        """
        ioctl(self.fd, abi.KVM_SET_IRQCHIP, irqchip)

    def get_pit2(self) -> abi.kvm_pit_state2:
        """Return the state of the i8254.

        Raises:
            KvmError: there is none.

        Source: KVM API §4.72.
        """
        state = abi.kvm_pit_state2()
        ioctl(self.fd, abi.KVM_GET_PIT2, state)
        return state

    def set_pit2(self, state: abi.kvm_pit_state2) -> None:
        """Set the state of the i8254.

        Raises:
            KvmError: there is none.

        Source: KVM API §4.73.
        """
        ioctl(self.fd, abi.KVM_SET_PIT2, state)


def _routing_entry(route: Route) -> abi.kvm_irq_routing_entry:
    entry = abi.kvm_irq_routing_entry(gsi=route.gsi)
    if isinstance(route, IrqchipRoute):
        entry.type = abi.KVM_IRQ_ROUTING_IRQCHIP
        entry.u.irqchip.irqchip = route.irqchip
        entry.u.irqchip.pin = route.pin
        return entry
    entry.type = abi.KVM_IRQ_ROUTING_MSI
    entry.u.msi.address_lo = route.address & 0xFFFF_FFFF
    entry.u.msi.address_hi = route.address >> 32
    entry.u.msi.data = route.data
    if route.devid is not None:
        entry.flags = abi.KVM_MSI_VALID_DEVID
        entry.u.msi.devid = route.devid
    return entry


def _ioeventfd(
    eventfd: int, address: int, size: int, datamatch: int | None, *, pio: bool
) -> abi.kvm_ioeventfd:
    flags = abi.KVM_IOEVENTFD_FLAG_PIO if pio else 0
    flags |= 0 if datamatch is None else abi.KVM_IOEVENTFD_FLAG_DATAMATCH
    return abi.kvm_ioeventfd(
        datamatch=datamatch or 0, addr=address, len=size, fd=eventfd, flags=flags
    )
