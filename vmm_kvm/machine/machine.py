"""The machine: from a specification to KVM objects, buses and devices, wired together.

Wiring only: `devices` has the chips, `arch.x86.layout` the addresses, `runner` the vCPU threads;
`vmm_kvm.primitives` makes, pauses and ends the VM itself. A reboot makes a new Machine, so that
nothing of the old one is left over.
"""

import ctypes
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from mmap import mmap
from typing import TYPE_CHECKING, Self

from vmm_kvm import primitives
from vmm_kvm.arch.x86 import layout
from vmm_kvm.arch.x86.acpi import AcpiConfig, AcpiTables, build_tables, loader_files
from vmm_kvm.arch.x86.e820 import encode, firmware_e820_map
from vmm_kvm.arch.x86.entry import Entry
from vmm_kvm.arch.x86.entry_state import load_entry
from vmm_kvm.arch.x86.image import BootConfig, FirmwareImage, load
from vmm_kvm.arch.x86.kvm_state import ClockPolicy, KvmRecord
from vmm_kvm.arch.x86.smbios import SmbiosTables, build_smbios, name_uuid
from vmm_kvm.boot.cache import default_directory
from vmm_kvm.bus import Bus
from vmm_kvm.clock import Clock
from vmm_kvm.devices.acpi_pm import AcpiPm
from vmm_kvm.devices.debug_exit import DebugExit
from vmm_kvm.devices.debugcon import Debugcon, DebugLog
from vmm_kvm.devices.fw_cfg import FwCfg
from vmm_kvm.devices.i8042 import I8042Reset
from vmm_kvm.devices.mc146818 import Mc146818
from vmm_kvm.devices.port92 import Port92
from vmm_kvm.devices.pvpanic import PanicEvent, Pvpanic
from vmm_kvm.devices.rom import Rom
from vmm_kvm.devices.uart16550 import Uart16550
from vmm_kvm.errors import HaltError, Refusal, RefusedError
from vmm_kvm.holding import hold_vcpus, throttle
from vmm_kvm.kvm.eventfds import EventFds
from vmm_kvm.kvm.exits import Debug, Exit
from vmm_kvm.kvm.irqline import KvmIrqLine, set_level_triggered
from vmm_kvm.kvm.stats import ExitCounts
from vmm_kvm.kvm.vcpu import Vcpu
from vmm_kvm.machine.bad_exits import outcome_of
from vmm_kvm.machine.identity import Identity
from vmm_kvm.machine.routes import interrupt_routes
from vmm_kvm.machine.runner import Runner
from vmm_kvm.machine.security import encrypt_memory, make_flash, make_launch, make_tpm
from vmm_kvm.machine.serial_output import SerialOutput
from vmm_kvm.machine.spec import (
    Crash,
    DebugExitStatus,
    Ending,
    MachineSpec,
    Outcome,
    nets_of,
    pmems_of,
)
from vmm_kvm.machine.wiring import Devices, boot_order, place_pmem, ram_of
from vmm_kvm.memory import GuestMemory
from vmm_kvm.pci.host import EcamWindow, PciHost
from vmm_kvm.pci.intx import IntxLines
from vmm_kvm.primitives import VmInfo, Vmm
from vmm_kvm.state import Part
from vmm_kvm.vm_params import Controllers, CreateParams, Mapping, MemoryRange, check_vcpus

if TYPE_CHECKING:
    from vmm_kvm.machine.dirty import DirtyPages
    from vmm_kvm.virtio.balloon import VirtioBalloon
    from vmm_kvm.virtio.vhost_user.frontend import VhostUser
    from vmm_kvm.virtio.vsock import VirtioVsock

_SLP_TYP_S5 = 5
_PIO_SIZE = 1 << 16
_MMIO_SIZE = 1 << 64

# fw_cfg keys that are not files. Source: QEMU docs/specs/fw_cfg.
_FW_CFG_RAM_SIZE = 0x03
_FW_CFG_NOGRAPHIC = 0x04
_FW_CFG_NB_CPUS = 0x05
_FW_CFG_MAX_CPUS = 0x0F


class Machine:
    """One VM from power-on to its end; a context manager.

    `transmit` and `on_outcome` are called on vCPU threads and must not block; `on_outcome` once.
    `on_receive_room` is called, on any thread, when the serial port can take input again; with
    the port's lock held, so it may only post to an event loop. `on_halt` is called on a device's
    thread when a request of a disk waits for the host: the callee has an event loop pause the
    machine, and `resume` has the request tried again. `vmm`, the VM's table, stays the caller's.
    """

    def __init__(
        self,
        spec: MachineSpec,
        vmm: Vmm,
        clock: Clock,
        *,
        transmit: Callable[[bytes], None],
        on_receive_room: Callable[[], None],
        on_outcome: Callable[[Outcome], None],
        on_halt: Callable[[HaltError], None] = lambda _err: None,
        is_restored: bool = False,
        memory: GuestMemory | None = None,
    ) -> None:
        """Build the machine and load its image; no vCPU runs yet.

        With `is_restored` it is made for `machine.state.restore`: no image is loaded, nothing is
        set up for a guest, and it is paused. Of the image only the place and size of firmware
        count. Its owner fills RAM, restores the state, calls `start`, and `resume`. RAM may have
        been filled before: then it is `memory`, which becomes the machine's.

        Raises:
            RefusedError: vmm(4) refuses it: too many vCPUs, too much memory, or a name too long.
            SpecError: a device is impossible.
            BootError: the image, initrd or command line does not fit.
            KvmError, OSError: the host refused something.
        """
        check_vcpus(spec.cpus, vmm.kvm.max_vcpus)
        self.spec = spec
        self._launch = make_launch(spec, vmm.kvm, is_restored)
        self._vmm = vmm
        self._transmit = transmit
        self._on_outcome = on_outcome
        self._on_halt = on_halt
        self._outcome_lock = threading.Lock()
        self._has_ended = False
        self._clock = clock
        self._output: SerialOutput | None = None
        self._exit_counts: ExitCounts | None = None
        self.on_debug: Callable[[Vcpu, Debug], None] | None = None
        """Called on a vCPU's thread for its Debug exits, which a debugger asks KVM for."""
        is_firmware = isinstance(spec.image, FirmwareImage)
        self._is_q35 = isinstance(spec.image, FirmwareImage) and spec.image.is_uefi
        hole_start = layout.UEFI_HOLE_START if self._is_q35 else layout.PCI_HOLE_START
        with ExitStack() as stack:
            self.memory = stack.enter_context(ram_of(spec, hole_start, memory))
            self._pmem, memory_end = place_pmem(pmems_of(spec.devices), self.memory.regions[-1].end)
            acpi = AcpiConfig(spec.cpus, memory_end, self._is_q35, spec.tpm is not None)
            tables = build_tables(acpi)
            smbios = build_smbios(
                spec.uuid or name_uuid(spec.name),
                spec.serial,
                spec.cpus,
                [(region.gpa, region.size) for region in self.memory.regions],
                None if is_firmware else layout.SMBIOS_START,
            )
            entry = None if is_restored else self._load(tables, smbios)
            self._make_vm(stack)
            self.pio = Bus(_PIO_SIZE)
            self.mmio = Bus(_MMIO_SIZE)
            self._make_devices(clock, on_receive_room)
            self._make_pci_host(hole_start)
            self._make_pci_devices(stack, on_receive_room)
            self._flash = make_flash(spec, self.mmio, self._map_flash, stack)
            make_tpm(spec.tpm, self.mmio, stack)
            ranges = firmware_e820_map(self.memory.regions, has_ecam=not self._is_q35)
            self.fw_cfg.add_file("etc/e820", encode(ranges))
            for name, data in loader_files(tables).items():
                self.fw_cfg.add_file(name, data)
            if is_firmware:
                self.fw_cfg.add_file("etc/smbios/smbios-anchor", smbios.anchor)
                self.fw_cfg.add_file("etc/smbios/smbios-tables", smbios.tables)
            first = primitives.kvm_vcpu(vmm, self._vm_id, 0)
            if vmm.kvm.can_coalesce_ports:
                self._output = SerialOutput(clock, self.uart, first)
            if entry is None:
                primitives.pause(vmm, self._vm_id, wait=False)
            else:
                self.pci.assign_bars()
                load_entry(first, entry)
            self.measurement = encrypt_memory(self._launch, spec, self.memory, self._rom, self.vcpu)
            """Of the memory with which it began, if that is encrypted."""
            self._runner = Runner(
                vmm,
                self._vm_id,
                self.pio,
                self.mmio,
                count=spec.cpus,
                collected=self._output,
                on_exit=self._exit,
                on_failure=lambda err: self._end(Crash(f"{self.spec.name}: {err}")),
            )
            if self._output:
                stack.callback(self._output.stop)  # when no vCPU runs any more
            stack.callback(self._runner.stop)
            self._stack = stack.pop_all()

    def close(self) -> None:
        """End every vCPU thread and release everything; idempotent. Not for vCPU threads."""
        self._stack.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    # Operations; none of them on a vCPU thread
    def start(self) -> None:
        """Let every vCPU run; once."""
        if self._output:
            self._output.start()
        # Before a vCPU runs: as long as one is in the guest, asking KVM about it waits for it.
        vcpus = [primitives.kvm_vcpu(self._vmm, self._vm_id, i) for i in range(self.spec.cpus)]
        self._exit_counts = ExitCounts(vcpu.fd for vcpu in vcpus)
        self._stack.callback(self._exit_counts.close)
        self._runner.start()

    def throttle(self, hold: bool) -> None:
        """Ask the vCPUs to pause, without waiting for it, or let them continue.

        A paused machine stays so.
        """
        if self._devices.console:
            self._devices.console.throttle(hold)
        self._devices.stand_still("throttled", is_still=hold)
        throttle(self._vmm, self._vm_id, hold=hold)

    def receive(self, data: bytes) -> int:
        """Offer input to hvc0 once its driver is ready, else to the serial port.

        Returns how many bytes were taken, from the first; `on_receive_room` says when to offer
        the rest.
        """
        console = self._devices.console
        if console and console.is_started:
            return console.receive(data)
        return self.uart.receive(data)

    def resize_console(self, columns: int, rows: int) -> None:
        """Tell the guest how large the screen behind hvc0 is; each up to 65535."""
        if self._devices.console:
            self._devices.console.resize(columns, rows)

    @property
    def has_timed_out(self) -> bool:
        """Whether its watchdog has reset it, which no driver has cleared; also after `close`."""
        return self._devices.has_timed_out

    @property
    def vsock(self) -> "VirtioVsock | None":
        """The vsock device, if there is one."""
        return self._devices.vsock

    @property
    def balloon(self) -> "VirtioBalloon | None":
        """The memory balloon, if there is one."""
        return self._devices.balloon

    @property
    def remote_disks(self) -> "Sequence[VhostUser]":
        """Disks that other processes serve, in their order."""
        return self._devices.remote_disks

    def set_link(self, index: int, *, is_up: bool) -> None:
        """Set the link of network interface `index`; any thread."""
        self._devices.set_link(index, is_up=is_up)

    def pause(self) -> None:
        """Pause the machine; returns when no vCPU runs and no device works.

        Each vCPU has completed its last exit's access, the devices the guest's requests, and their
        threads have ended: only other processes change guest memory, until `machine.state.save`
        stops them. Of the machine's threads only those of vCPUs are left, and wait.
        """
        self._devices.stand_still("paused")
        primitives.pause(self._vmm, self._vm_id)
        self._devices.settle()
        self._devices.suspend()
        if self._output:
            self._output.drain_all()

    def resume(self) -> None:
        """Let a paused machine continue; the guest's clocks show that time has passed.

        It announces its network interfaces again, in case switches have forgotten their ports.
        """
        self._devices.resume()
        self._devices.prepare_to_resume()
        primitives.unpause(self._vmm, self._vm_id)
        self._devices.stand_still("paused", is_still=False)
        self._devices.announce()

    # For a debugger: only vCPUs stop
    def hold(self, vcpus: Iterable[int] | None = None, *, wait: bool = True) -> None:
        """Keep every vCPU out of the guest, or those of these indices alone.

        With every one, returns when they are out; without `wait` at once.
        """
        held = range(self.spec.cpus) if vcpus is None else tuple(vcpus)
        self._devices.stand_still("debugged", is_still=bool(held))
        hold_vcpus(self._vmm, self._vm_id, held, wait=wait)

    def vcpu(self, index: int) -> Vcpu:
        """Return a vCPU, to inspect it while `hold` holds."""
        return primitives.kvm_vcpu(self._vmm, self._vm_id, index)

    # State, see `machine.state`; while the machine is paused, on the event loop's thread
    def parts(self) -> Iterator[Part]:
        """Yield all parts but RAM, disks and KVM's state, in the order of the wiring."""
        yield Part("pci", self.pci)
        yield from self._devices.parts()
        yield Part("uart0", self.uart)
        yield Part("acpi_pm", self.acpi_pm)
        yield Part("rtc", self.rtc)
        yield Part("i8042", self._i8042)
        yield Part("port92", self._port92)
        yield Part("fw_cfg", self.fw_cfg)
        yield Part("debug_exit", self._debug_exit_port)
        yield Part("pvpanic", self._pvpanic)
        yield Part("debugcon", self._debugcon)
        yield from self._identity.parts()
        if self._rom:
            yield Part("rom", self._rom)
        if self._flash:
            yield Part("flash", self._flash)

    def dirty_pages(self) -> "DirtyPages":
        """Return the log of writes to RAM, which logs nothing yet; ends before `close`."""
        from vmm_kvm.machine.dirty import DirtyPages  # noqa: PLC0415 - few machines are copied

        return DirtyPages(self._vm, self.memory, self._devices)

    def lend_disks(self, is_lent: bool) -> None:
        """Have the processes of disks let others use the images, or take them back.

        The machine is paused, and its state has been saved. Any thread.

        Raises:
            VmmError: one cannot, or another process has the image.
        """
        self._devices.lend_disks(is_lent)

    def save_kvm(self) -> KvmRecord:
        """Return what KVM has of the machine.

        Raises:
            RefusedError: the machine is not paused, or a debugger is at it.
            KvmError: KVM refused.
        """
        if self.on_debug:  # its breakpoints may be in RAM
            raise RefusedError(Refusal.EBUSY, "a debugger is attached")
        self._eventfds.flush()
        return primitives.save_state(self._vmm, self._vm_id)

    def restore_kvm(self, record: KvmRecord, policy: ClockPolicy) -> None:
        """Restore KVM's state from `record`; no vCPU has run, devices have been restored.

        Raises:
            RefusedError: the machine is not paused.
            StateError: it is of another number of vCPUs, or not of this kernel's sizes.
            KvmError: the kernel or the processor does not take it.
        """
        primitives.restore_state(self._vmm, self._vm_id, record, policy)

    def become_another(self, *, is_copy: bool = True) -> None:
        """Tell the guest that it is a copy, or with `is_copy` false that it has moved.

        After `machine.state.restore`, while it is paused.
        """
        self._identity.change(is_copy=is_copy)
        if is_copy:
            self._devices.become_another()

    def adopt_fork(self, record: KvmRecord, policy: ClockPolicy) -> None:
        """Become a clone, in a child forked from a process with this machine paused.

        Called on the child's only thread. Python's objects and RAM stay as they are, with a new VM
        of KVM's that continues from `record`; the machine is paused, and `start` comes before
        `resume`. See `machine.clone`.

        Raises:
            RefusedError: the machine was not paused.
            KvmError, OSError: KVM or the host refused.
        """
        primitives.adopt_fork(self._vmm, self._vm_id)
        self._eventfds.bind_again()
        self._devices.bind_again()
        for line in self._lines:
            line.drive_again()
        primitives.restore_state(self._vmm, self._vm_id, record, policy)
        self._runner.renew()
        self.become_another()

    def info(self) -> VmInfo:
        """Return what vmm(4)'s `info` tells of the VM."""
        return primitives.info_of(self._vmm, self._vm_id)

    def exit_counts(self) -> dict[str, int]:
        """Return how often the guest was left, by reason; empty if KVM does not count it."""
        return self._exit_counts.read() if self._exit_counts else {}

    def press_power_button(self) -> bool:
        """Ask the guest to power itself off: an OpenBSD guest by vmmci, others through ACPI.

        Returns False if it listens to neither.
        """
        return self._devices.request_shutdown() or self.acpi_pm.press_power_button()

    def has_noticed_power_button(self) -> bool:
        """Tell whether the guest has taken the interrupt, or has been asked by vmmci.

        vmmci itself ends a guest that does not take its interrupt.
        """
        return self._devices.is_asked_to_shut_down() or not self.acpi_pm.is_button_pressed()

    # Wiring

    def _load(self, acpi: AcpiTables, smbios: SmbiosTables) -> Entry:
        spec = self.spec
        nets = nets_of(spec.devices)
        return load(
            spec.image,
            self.memory,
            BootConfig(
                cache_directory=default_directory(),
                kernels=spec.kernels,
                command_line=spec.command_line,
                initrd=spec.initrd,
                boot_device=spec.boot_device,
                lladdr=nets[0].lladdr if nets else None,
                acpi=acpi,
                smbios=smbios,
                seed=self._launch is None,  # what is measured is to be the same every time
                encrypted=1 << self._launch.c_bit if self._launch else 0,
            ),
        )

    def _make_vm(self, stack: ExitStack) -> None:
        spec, memory = self.spec, self.memory
        self._flash_mapping = 0
        self._identity = Identity(os.urandom)
        mappings = self._identity.mappings()
        self._rom: Rom | None = None
        if isinstance(spec.image, FirmwareImage):
            rom = self._rom = Rom(spec.image.rom_base, spec.image.rom)
            contents = memoryview(rom.memory)
            self.spec = spec.but(image=spec.image._replace(rom=contents))  # one copy is enough
            mappings.append(Mapping(rom.gpa, _address(rom.memory), len(contents), True))
            if spec.variables is not None:  # right below the firmware
                self._flash_mapping = len(mappings)
                size = spec.variables.size
                mappings.append(Mapping(rom.gpa - size, _address(spec.variables.array), size, True))
        for disk, gpa in self._pmem.items():
            mappings.append(Mapping(gpa, disk.image.hva, disk.image.size, False))
            memory.attach(gpa, disk.image.view)
        self._vm_id = primitives.create(
            self._vmm,
            CreateParams(
                ranges=[MemoryRange(r.gpa, memory.hva + r.offset, r.size) for r in memory.regions],
                ncpus=spec.cpus,
                name=spec.name,
                controllers=Controllers.KERNEL,
                mappings=mappings,
                collected_ports=(layout.PORT_COM1,) if self._vmm.kvm.can_coalesce_ports else (),
                launch=self._launch,
                used_size=memory.resident_size,
            ),
        )
        stack.callback(primitives.terminate, self._vmm, self._vm_id)
        self._vm = primitives.kvm_vm(self._vmm, self._vm_id)
        self._lines: list[KvmIrqLine] = []
        set_level_triggered(self._vm, layout.PIC_PCI_INTX)
        self._eventfds = stack.enter_context(EventFds(self._vm, interrupt_routes(), layout.GSI_MSI))

    def _line(self, gsi: int) -> KvmIrqLine:
        line = KvmIrqLine(self._vm, gsi)
        self._lines.append(line)
        return line

    def _make_devices(self, clock: Clock, on_receive_room: Callable[[], None]) -> None:
        spec, pio = self.spec, self.pio
        self.uart = Uart16550(
            self._line(layout.GSI_COM1),
            self._transmit,
            on_receive_room=on_receive_room,
            on_plain=self._note_plain,
        )
        self._identity.attach(self._line(layout.GSI_VM_GENERATION))
        self.acpi_pm = AcpiPm(self._line(layout.GSI_SCI), clock, self._sleep)
        self.rtc = Mc146818(
            self._line(layout.GSI_RTC),
            clock,
            memory_size=spec.memory_size,
            vcpu_count=spec.cpus,
        )
        self.fw_cfg = FwCfg(self.memory)
        self.fw_cfg.add_item(_FW_CFG_RAM_SIZE, spec.memory_size.to_bytes(8, "little"))
        self.fw_cfg.add_item(_FW_CFG_NOGRAPHIC, (1).to_bytes(2, "little"))
        self.fw_cfg.add_item(_FW_CFG_NB_CPUS, spec.cpus.to_bytes(2, "little"))
        self.fw_cfg.add_item(_FW_CFG_MAX_CPUS, spec.cpus.to_bytes(2, "little"))
        self.fw_cfg.add_file("etc/screen-and-debug", bytes(4))
        self.fw_cfg.add_file("etc/show-boot-menu", bytes(2))  # no user is waited for
        self.fw_cfg.add_file("etc/sercon-port", layout.PORT_COM1.to_bytes(2, "little"))
        pio.insert(layout.PORT_COM1, 8, self.uart)
        pio.insert(layout.PORT_RTC, 2, self.rtc)
        self._i8042 = I8042Reset(self._reset)
        self._port92 = Port92(self._reset)
        self._debug_exit_port = DebugExit(self._debug_exit)
        self._pvpanic = Pvpanic(self._panic)
        self._debugcon = Debugcon(DebugLog(spec.name).write)
        pio.insert(layout.PORT_I8042_DATA, 1, self._i8042.data_port)
        pio.insert(layout.PORT_I8042_COMMAND, 1, self._i8042)
        pio.insert(layout.PORT_SYSTEM_CONTROL_A, 1, self._port92)
        pio.insert(layout.PORT_FW_CFG, layout.PORT_FW_CFG_SIZE, self.fw_cfg)
        pio.insert(layout.PORT_PM1A_EVENT, 12, self.acpi_pm)
        pio.insert(layout.PORT_DEBUG_EXIT, 4, self._debug_exit_port)
        pio.insert(layout.PORT_PVPANIC, 1, self._pvpanic)
        pio.insert(layout.PORT_DEBUGCON, 1, self._debugcon)

    def _make_pci_host(self, hole_start: int) -> None:
        if self._is_q35:
            self.pci = self._q35_host(hole_start)
        else:
            self.pci = PciHost(self.pio, self.mmio, on_reset=self._reset)
            self.mmio.insert(layout.ECAM_START, layout.ECAM_SIZE, EcamWindow(self.pci))
        self.pio.insert(layout.PORT_PCI_CONFIG, 8, self.pci)

    def _q35_host(self, hole_start: int) -> PciHost:
        from vmm_kvm.pci import q35  # noqa: PLC0415 - for UEFI guests only

        window = q35.MovableWindow(self.mmio, layout.ECAM_SIZE)
        host = PciHost(
            self.pio,
            self.mmio,
            on_reset=self._reset,
            bridge=q35.host_bridge(window.move),
            hole_start=hole_start,
        )
        window.device = EcamWindow(host)
        host.add(q35.isa_bridge(), q35.LPC_SLOT)
        return host

    def _make_pci_devices(self, stack: ExitStack, on_receive_room: Callable[[], None]) -> None:
        intx = IntxLines([self._line(gsi) for gsi in layout.GSI_PCI_INTX])
        self._devices = stack.enter_context(
            Devices(
                self.pci,
                self.memory,
                self._eventfds,
                intx,
                self._clock,
                pmem_places=self._pmem,
                transmit=self._transmit,
                on_receive_room=on_receive_room,
                on_expired=lambda _command: self._end(Ending.POWER_OFF),
                on_halt=self._on_halt,
                on_bite=self._reset,
                is_encrypted=self._launch is not None,
            )
        )
        self._devices.plug_all(self.spec.devices)
        order = boot_order(self.spec.boot_device, self._devices.first_disk, self._devices.cdrom)
        if order is not None:
            self.fw_cfg.add_file("bootorder", order)

    # Actions of the guest on the machine; on a vCPU thread, or the clock's
    def _end(self, outcome: Outcome) -> None:
        with self._outcome_lock:
            if self._has_ended:
                return
            self._has_ended = True
        primitives.request_termination(self._vmm, self._vm_id)
        self._on_outcome(outcome)

    def _map_flash(self, is_mapped: bool) -> None:
        primitives.set_mapped(self._vmm, self._vm_id, self._flash_mapping, is_mapped=is_mapped)

    def _note_plain(self, is_plain: bool) -> None:
        if self._output:
            self._output.note_plain(is_plain)

    def _sleep(self, sleep_type: int) -> None:
        if sleep_type == _SLP_TYP_S5:
            self._end(Ending.POWER_OFF)

    def _reset(self) -> None:
        self._end(Ending.REBOOT)

    def _debug_exit(self, value: int) -> None:
        self._end(DebugExitStatus(value))

    def _panic(self, event: int) -> None:
        if event & PanicEvent.PANICKED:
            self._end(Crash(f"{self.spec.name}: the guest panicked"))

    def _exit(self, vcpu: Vcpu, reason: Exit) -> None:
        """Let a debugger see its breakpoint, or end the machine: the exit is no device access."""
        if isinstance(reason, Debug):
            if on_debug := self.on_debug:  # else a debugger has just gone
                on_debug(vcpu, reason)
            return
        self._end(outcome_of(self.spec.name, vcpu, reason))


def _address(memory: "mmap | bytearray") -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(memory))
