"""The machine's PCI devices: from their records to functions in slots.

Every device has a worker thread of its own while its
driver is there, and shares one of four interrupt lines where the driver does not use MSI-X.
"""

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Self, assert_never

from vmm_kvm.arch.x86.layout import PCI_HOLE_END, ram_ranges
from vmm_kvm.bits import GIB, align_up
from vmm_kvm.boot_device import BootDevice
from vmm_kvm.clock import Clock
from vmm_kvm.errors import HaltError, SpecError
from vmm_kvm.kvm.eventfds import EventFds
from vmm_kvm.machine.spec import has_servers
from vmm_kvm.memory import GuestMemory
from vmm_kvm.pci.host import PciHost
from vmm_kvm.pci.ids import (
    CLASS_COMMUNICATIONS_OTHER,
    CLASS_MASS_STORAGE_OTHER,
    CLASS_MASS_STORAGE_SCSI,
    CLASS_NETWORK_ETHERNET,
    CLASS_OTHER,
    CLASS_SYSTEM_OTHER,
)
from vmm_kvm.pci.intx import IntxLines
from vmm_kvm.state import Part
from vmm_kvm.virtio.device import Backend, Dataplane
from vmm_kvm.virtio.pci import VirtioPci
from vmm_kvm.virtio.rng import VirtioRng
from vmm_kvm.virtio.vmmci import Command, Vmmci
from vmm_kvm.virtio.worker import Worker
from vmm_kvm.vm_params import check_memory_end
from vmm_kvm.write_log import SharedLog

if TYPE_CHECKING:  # loaded where there is such a device
    from vmm_kvm.machine.net import Net
    from vmm_kvm.machine.spec import DeviceSpec, MachineSpec
    from vmm_kvm.pci.i6300esb import Watchdog
    from vmm_kvm.virtio.balloon import VirtioBalloon
    from vmm_kvm.virtio.console import VirtioConsole
    from vmm_kvm.virtio.pmem import PmemSpec
    from vmm_kvm.virtio.vhost_user.frontend import VhostUser
    from vmm_kvm.virtio.vsock import VirtioVsock

_ORDER = {
    "rng": 0,
    "net": 1,
    "blk": 2,
    "remote-blk": 2,
    "pmem": 2,
    "scsi-cd": 3,
    "remote-fs": 4,
    "console": 5,
    "vsock": 6,
    "balloon": 7,
    "watchdog": 8,
    "vmmci": 9,
}
_PIN_INTA = 1


def ram_of(spec: "MachineSpec", hole_start: int, memory: GuestMemory | None) -> GuestMemory:
    """Return the RAM of a machine: `memory`, if it is suitable, or else new RAM.

    Raises:
        SpecError: `memory` is not, and closed now.
        RefusedError: it would end too high, or the host has not that much.
        OSError: the host has no descriptors left.
    """
    ranges = ram_ranges(spec.memory_size, hole_start)
    check_memory_end(spec.memory_size, sum(ranges[-1]))
    is_private = not (spec.shares_memory or has_servers(spec.devices))
    if spec.sev is not None:
        from vmm_kvm.machine.encryption import RecordedMemory  # noqa: PLC0415 - few have this

        return RecordedMemory(ranges, spec.name, is_private=is_private)
    if memory is None:
        return GuestMemory(ranges, spec.name, is_private=is_private)
    is_shared = memory.fd >= 0
    if tuple((r.gpa, r.size) for r in memory.regions) != ranges or not (is_private or is_shared):
        memory.close()
        raise SpecError(f"{spec.name}: the memory is not this machine's")
    return memory


def place_pmem(disks: "Iterable[PmemSpec]", memory_end: int) -> "tuple[dict[PmemSpec, int], int]":
    """Return where in guest-physical memory each pmem disk goes, and where the last one ends.

    They lie above all RAM, which ends at `memory_end`, and above 4 GiB.
    """
    places = {}
    for disk in disks:
        gpa = align_up(max(memory_end, PCI_HOLE_END), GIB)
        places[disk] = gpa
        memory_end = gpa + disk.image.size
    return places, memory_end


def boot_order(device: BootDevice, disk: int | None, cdrom: int | None = None) -> bytes | None:
    """Return fw_cfg's `bootorder` for firmware, or None to leave it the choice.

    `disk` and `cdrom` are the slots of the first disk and of the CD-ROM drive. As in OpenBSD, a
    device that is not there leaves the choice too. The paths are those that QEMU gives, which
    SeaBIOS and OVMF both understand.

    Source: SeaBIOS docs/Runtime_config.md; OpenBSD vmd/fw_cfg.c
    """
    match device:
        case BootDevice.DISK if disk is not None:
            order = f"/pci@i0cf8/scsi@{disk:x}/disk@0,0\nHALT"
        case BootDevice.CDROM if cdrom is not None:
            order = f"/pci@i0cf8/scsi@{cdrom:x}/channel@0/disk@0,0\nHALT"
        case BootDevice.NET:
            order = "HALT"
        case _:
            return None
    return order.encode() + b"\0"


class Devices:
    """The devices in the slots of a host bridge, made of their records; a context manager."""

    def __init__(
        self,
        host: PciHost,
        memory: GuestMemory,
        eventfds: EventFds,
        intx: IntxLines,
        clock: Clock,
        *,
        pmem_places: "Mapping[PmemSpec, int]",
        transmit: Callable[[bytes], None],
        on_receive_room: Callable[[], None],
        on_expired: Callable[[Command], None],
        on_halt: Callable[[HaltError], None],
        on_bite: Callable[[], None],
        is_encrypted: bool = False,
    ) -> None:
        """Use what belongs to the machine; all of it has to outlive the devices.

        `transmit` and `on_receive_room` are for a console, see `VirtioConsole`; `on_expired` is
        for vmmci, see there; `on_halt` for disks, see `VirtioPci`; `on_bite` for a watchdog. With
        `is_encrypted` they reach only memory that drivers share on purpose.
        """
        self._host = host
        self._memory = memory
        self._eventfds = eventfds
        self._intx = intx
        self._clock = clock
        self._pmem_places = pmem_places
        self._transmit = transmit
        self._on_receive_room = on_receive_room
        self._on_expired = on_expired
        self._on_halt = on_halt
        self._on_bite = on_bite
        self._is_encrypted = is_encrypted
        self._functions: dict[int, VirtioPci | Vmmci | Watchdog] = {}
        """By slot."""
        self._nets: list[Net] = []
        self.remote_disks: list[VhostUser] = []
        """Disks that other processes serve, in their order."""
        self._vmmci: Vmmci | None = None
        self._watchdog: Watchdog | None = None
        self.console: VirtioConsole | None = None
        self.vsock: VirtioVsock | None = None
        self.balloon: VirtioBalloon | None = None
        self.first_disk: int | None = None
        """Its slot."""
        self.cdrom: int | None = None
        """Its slot."""

    def close(self) -> None:
        """Stop and close every device; when no vCPU runs. Idempotent."""
        while self._functions:
            self._functions.popitem()[1].close()

    def settle(self) -> None:
        """Return when every device has completed the guest's requests; when no vCPU runs."""
        for function in self._functions.values():
            if isinstance(function, VirtioPci):
                function.settle()

    def suspend(self) -> None:
        """Stop every device's thread, with nothing forgotten; when no vCPU runs."""
        for function in self._functions.values():
            if isinstance(function, VirtioPci):
                function.suspend()

    def resume(self) -> None:
        """Let every device continue; before a vCPU runs."""
        for function in self._functions.values():
            if isinstance(function, VirtioPci):
                function.resume()

    def stand_still(self, reason: str, *, is_still: bool = True) -> None:
        """Have a watchdog wait while the guest cannot run, or go on; any thread."""
        if self._watchdog:
            (self._watchdog.suspend if is_still else self._watchdog.resume)(reason)

    @property
    def has_timed_out(self) -> bool:
        """Whether a watchdog has reset the machine, and no driver has cleared that."""
        return self._watchdog is not None and self._watchdog.has_timed_out

    def bind_again(self) -> None:
        """Bind all notifications again, in a VM that replaces the machine's one before."""
        self.stand_still("throttled", is_still=False)  # its output has a reader of its own
        for function in self._functions.values():
            if isinstance(function, VirtioPci):
                function.bind_again()

    def log_writes(self, log: SharedLog | None) -> list[str]:
        """Have other processes mark in `log` their writes to guest memory; None stops that.

        Returns the names of the devices that cannot; then none does.
        """
        functions = [each for each in self._functions.values() if isinstance(each, VirtioPci)]
        unable = [each.name for each in functions if not each.log_writes(log)]
        if unable and log is not None:
            self.log_writes(None)
        return unable

    def lend_disks(self, is_lent: bool) -> None:
        """Have the processes of disks let others use them, or take them back; all are suspended.

        Raises:
            VmmError: one cannot.
        """
        for remote in self.remote_disks:
            remote.lend(is_lent)

    def used_rings(self) -> Iterator[tuple[int, int]]:
        """Yield guest-physical address and bytes of each ring that a device writes to."""
        for function in self._functions.values():
            if isinstance(function, VirtioPci):
                yield from function.used_rings()

    def parts(self) -> Iterator[Part]:
        """Yield the parts with a state, in the order of the slots."""
        for slot, function in self._functions.items():
            name = f"pci.00:{slot:02x}.0"
            if isinstance(function, VirtioPci):
                yield from function.parts(name)
            elif isinstance(function, Vmmci):
                yield Part(f"{name}/vmmci", function)
            else:
                yield Part(f"{name}/watchdog", function)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def plug_all(self, specs: "Iterable[DeviceSpec]") -> None:
        """Make every device and put it into the next slot.

        The kinds are put in OpenBSD's order: unit numbers in a guest follow it.

        Raises:
            SpecError: all slots are taken, or a descriptor is unsuitable.
            VmmError, OSError: a server cannot be connected to, or does not serve such a device.
        """
        for spec in sorted(specs, key=lambda spec: _ORDER[spec.kind]):
            self._plug(spec)

    def _plug(self, spec: "DeviceSpec") -> None:
        # The module of a kind is loaded where its record was made; here it is looked up.
        match spec.kind:
            case "rng":
                rng = VirtioRng(self._clock, os.urandom)
                rng.attach(self._add_backend(rng, CLASS_SYSTEM_OTHER, "rng")[1])
            case "net":
                from vmm_kvm.machine.net import make_net  # noqa: PLC0415 - see above

                net = make_net(spec, self._memory)
                self._nets.append(net)
                self._add(net.dataplane, CLASS_NETWORK_ETHERNET, spec.name)
            case "blk":
                from vmm_kvm.virtio.blk import VirtioBlk  # noqa: PLC0415 - see above

                blk = VirtioBlk(
                    spec.image,
                    name=spec.name,
                    serial=spec.serial,
                    queues=spec.queues,
                    stops_at_errors=spec.stops_at_errors,
                    owns_image=False,
                )
                self._note_disk(self._add_backend(blk, CLASS_MASS_STORAGE_SCSI, spec.name)[0])
            case "remote-blk":
                from vmm_kvm.virtio.vhost_user.blk import (  # noqa: PLC0415 - see above
                    make_remote_blk,
                )

                remote = make_remote_blk(spec, self._memory)
                self.remote_disks.append(remote)
                self._note_disk(self._add(remote, CLASS_MASS_STORAGE_SCSI, spec.name))
            case "pmem":
                from vmm_kvm.virtio.pmem import VirtioPmem  # noqa: PLC0415 - see above

                image, gpa = spec.image, self._pmem_places[spec]
                pmem = VirtioPmem(gpa, image.size, image.flush, name=spec.name)
                self._note_disk(self._add_backend(pmem, CLASS_OTHER, spec.name)[0])
            case "scsi-cd":
                from vmm_kvm.virtio.scsi import VirtioScsi  # noqa: PLC0415 - see above

                drive = VirtioScsi(spec.image, owns_image=False)
                self.cdrom = self._add_backend(drive, CLASS_MASS_STORAGE_SCSI, "cdrom")[0]
            case "remote-fs":
                from vmm_kvm.virtio.vhost_user.fs import (  # noqa: PLC0415 - see above
                    make_remote_fs,
                )

                self._add(make_remote_fs(spec, self._memory), CLASS_MASS_STORAGE_OTHER, spec.name)
            case "console":
                from vmm_kvm.virtio.console import VirtioConsole  # noqa: PLC0415 - see above

                self.console = VirtioConsole(self._transmit, on_receive_room=self._on_receive_room)
                console = self._add_backend(self.console, CLASS_COMMUNICATIONS_OTHER, "console")
                self.console.attach(console[1])
            case "vsock":
                from vmm_kvm.virtio.vsock import VirtioVsock  # noqa: PLC0415 - see above

                self.vsock = VirtioVsock(spec)
                self.vsock.attach(
                    self._add_backend(self.vsock, CLASS_COMMUNICATIONS_OTHER, "vsock")[1]
                )
            case "balloon":
                from vmm_kvm.virtio.balloon import VirtioBalloon  # noqa: PLC0415 - see above

                self.balloon = VirtioBalloon(self._memory)
                self.balloon.attach(self._add_backend(self.balloon, CLASS_OTHER, "balloon")[1])
            case "watchdog":
                from vmm_kvm.pci.i6300esb import Watchdog  # noqa: PLC0415 - see above

                self._watchdog = Watchdog(
                    self._clock, self._on_bite, has_timed_out=spec.has_timed_out
                )
                self._functions[self._host.next_slot] = self._watchdog
                self._host.add(self._watchdog.function)
            case "vmmci":
                line = self._intx.input(self._host.next_slot, _PIN_INTA)
                self._vmmci = Vmmci(self._clock, line, self._on_expired, pin=_PIN_INTA)
                self._functions[self._host.next_slot] = self._vmmci
                self._host.add(self._vmmci.function)
            case _:
                assert_never(spec)

    def _note_disk(self, slot: int) -> None:
        if self.first_disk is None:
            self.first_disk = slot

    def set_link(self, index: int, *, is_up: bool) -> None:
        """Set the link of network interface `index`, in their order."""
        self._nets[index].set_link(is_up)

    def announce(self) -> None:
        """Have drivers of network interfaces announce themselves again, as far as they can."""
        for net in self._nets:
            net.announce()

    def become_another(self) -> None:
        """Drop state that the guest's original keeps, and have the guest told."""
        if self.vsock:
            self.vsock.become_another()

    def prepare_to_resume(self) -> None:
        """Tell the guest, before it continues, that its clock stood still, if it listens."""
        if self._vmmci:
            self._vmmci.sync_rtc()

    def request_shutdown(self) -> bool:
        """Ask an OpenBSD guest to shut down; False if no driver listens."""
        return self._vmmci is not None and self._vmmci.request(Command.SHUTDOWN)

    def is_asked_to_shut_down(self) -> bool:
        """Tell whether an OpenBSD guest has been asked to shut down."""
        return self._vmmci is not None and self._vmmci.save().command is Command.SHUTDOWN

    def _add_backend(self, backend: Backend, class_code: int, name: str) -> tuple[int, Worker]:
        """Add a virtio device that a thread of this process serves; takes over `backend`.

        Returns the slot and the worker, which is the `Transport` of a backend that wants one.

        Raises:
            SpecError: all slots are taken.
        """
        worker = Worker(backend, self._memory, name)
        return self._add(worker, class_code, name), worker

    def _add(self, dataplane: Dataplane, class_code: int, name: str) -> int:
        """Add a virtio device with the dataplane that serves it; takes over `dataplane`.

        Returns the slot.

        Raises:
            SpecError: all slots are taken.
        """
        slot = self._host.next_slot
        function = VirtioPci(
            dataplane,
            self._eventfds,
            self._intx.input(slot, _PIN_INTA),
            class_code=class_code,
            name=name,
            on_halt=self._on_halt,
            is_restricted=self._is_encrypted,
        )
        self._functions[slot] = function
        return self._host.add(function.function)
