"""The machine's PCI devices: from what a user asks for to functions in slots.

Slots are given in the order of the calls. Every device has a worker thread of its own while its
driver is there, and shares one of four interrupt lines where the driver does not use MSI-X.
"""

import os
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, NamedTuple, Self

from vmm_kvm.arch.x86.boot_config import BootDevice
from vmm_kvm.arch.x86.layout import PCI_HOLE_END
from vmm_kvm.bits import GIB, align_up
from vmm_kvm.clock import Clock
from vmm_kvm.kvm.eventfds import EventFds
from vmm_kvm.memory import GuestMemory
from vmm_kvm.pci.host import PciHost
from vmm_kvm.pci.ids import (
    CLASS_COMMUNICATIONS_OTHER,
    CLASS_MASS_STORAGE_SCSI,
    CLASS_NETWORK_ETHERNET,
    CLASS_OTHER,
    CLASS_SYSTEM_OTHER,
)
from vmm_kvm.pci.intx import IntxLines
from vmm_kvm.virtio.device import Backend, Dataplane
from vmm_kvm.virtio.pci import VirtioPci
from vmm_kvm.virtio.rng import VirtioRng
from vmm_kvm.virtio.vmmci import Command, Vmmci
from vmm_kvm.virtio.worker import Worker

if TYPE_CHECKING:  # most machines have no use for sockets, which take milliseconds to load
    import socket

    from vmm_kvm.block.image import Image
    from vmm_kvm.block.mapped import MappedImage
    from vmm_kvm.machine.nics import Nic
    from vmm_kvm.net.nic import NicParams
    from vmm_kvm.virtio.console import VirtioConsole

_PIN_INTA = 1


class Disk(NamedTuple):
    """A disk whose image is open; it stays the caller's, and may serve one machine after another.

    No two machines may have it at once.
    """

    image: "Image"
    name: str
    """For the log."""
    serial: str = ""
    """The identity that the guest reads, at most 20 bytes; empty for none."""
    queues: int = 1
    """1 to 64."""


class RemoteDisk(NamedTuple):
    """A disk that another process serves, by vhost-user."""

    connect: "Callable[[], socket.socket]"
    """Returns a connection to it, for one machine, which owns it."""
    name: str
    """For the log."""


class PmemDisk(NamedTuple):
    """A disk that is memory of the guest; the image stays the caller's, as a Disk's does."""

    image: "MappedImage"
    name: str
    """For the log."""


AnyDisk = Disk | RemoteDisk | PmemDisk


def has_servers(nics: "Sequence[NicParams]", disks: Iterable[AnyDisk]) -> bool:
    """Tell whether another process serves any of these, which needs the guest's memory for it."""
    if any(isinstance(disk, RemoteDisk) for disk in disks):
        return True
    if not nics:
        return False
    from vmm_kvm.net.nic import RemotePath  # noqa: PLC0415 - not every VM has a network

    return any(isinstance(nic.path, RemotePath) for nic in nics)


def place_pmem(disks: Iterable[AnyDisk], memory_end: int) -> tuple[dict[PmemDisk, int], int]:
    """Return where in guest-physical memory each pmem disk goes, and where the last one ends.

    They lie above all RAM, which ends at `memory_end`, and above 4 GiB.
    """
    places = {}
    for disk in disks:
        if isinstance(disk, PmemDisk):
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


class PciDevices:
    """Puts functions into the slots of a host bridge, and closes them; a context manager."""

    def __init__(
        self, host: PciHost, memory: GuestMemory, eventfds: EventFds, intx: IntxLines
    ) -> None:
        """Use what belongs to the machine; all of it has to outlive the devices."""
        self._host = host
        self._memory = memory
        self._eventfds = eventfds
        self._intx = intx
        self._functions: list[VirtioPci | Vmmci] = []
        self._nics: list[Nic] = []

    def close(self) -> None:
        """Stop and close every device; when no vCPU runs. Idempotent."""
        while self._functions:
            self._functions.pop().close()

    def settle(self) -> None:
        """Return when every device has done what the guest asked for; when no vCPU runs."""
        for function in self._functions:
            if isinstance(function, VirtioPci):
                function.settle()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def add_disk(self, disk: Disk | RemoteDisk) -> int:
        """Add a virtio-blk device; returns its slot.

        Raises:
            SpecError: all slots are taken.
            VmmError, OSError: a remote disk cannot be connected to, or is no disk.
        """
        if isinstance(disk, RemoteDisk):
            # Here, because most disks are served by this process.
            from vmm_kvm.virtio.vhost_user.client import Client  # noqa: PLC0415
            from vmm_kvm.virtio.vhost_user.frontend import VhostUser  # noqa: PLC0415

            remote = VhostUser(Client(disk.connect()), self._memory, disk.name)
            return self.add_dataplane(remote, CLASS_MASS_STORAGE_SCSI, disk.name)
        from vmm_kvm.virtio.blk import VirtioBlk  # noqa: PLC0415 - not every machine has a disk

        backend = VirtioBlk(
            disk.image,
            name=disk.name,
            serial=disk.serial,
            queues=disk.queues,
            owns_image=False,
        )
        slot, _ = self.add_backend(backend, CLASS_MASS_STORAGE_SCSI, disk.name)
        return slot

    def add_pmem(self, disk: PmemDisk, gpa: int) -> int:
        """Add a virtio-pmem device whose memory is at `gpa` already; returns its slot.

        Raises:
            SpecError: all slots are taken.
        """
        from vmm_kvm.virtio.pmem import VirtioPmem  # noqa: PLC0415 - few machines have it

        backend = VirtioPmem(gpa, disk.image.size, disk.image.flush, name=disk.name)
        return self.add_backend(backend, CLASS_OTHER, disk.name)[0]

    def add_nic(self, nic: "NicParams") -> int:
        """Add a virtio-net device; returns its slot.

        Raises:
            SpecError: all slots are taken, or a descriptor is not what it has to be.
            VmmError, OSError: a remote one cannot be connected to, or is no interface.
        """
        from vmm_kvm.machine.nics import make_nic  # noqa: PLC0415 - not every machine has one

        made = make_nic(nic, self._memory)
        self._nics.append(made)
        return self.add_dataplane(made.dataplane, CLASS_NETWORK_ETHERNET, nic.name)

    def set_link(self, index: int, *, is_up: bool) -> None:
        """Plug the cable of network interface `index` in or out, in the order of `add_nic`."""
        self._nics[index].set_link(is_up)

    def announce(self) -> None:
        """Have drivers of network interfaces make themselves known again, as far as they can."""
        for nic in self._nics:
            nic.announce()

    def add_rng(self, clock: Clock) -> int:
        """Add a source of entropy; returns its slot.

        Raises:
            SpecError: all slots are taken.
        """
        backend = VirtioRng(clock, os.urandom)
        slot, worker = self.add_backend(backend, CLASS_SYSTEM_OTHER, "rng")
        backend.attach(worker)
        return slot

    def add_cdrom(self, image: "Image | None") -> int:
        """Add a CD-ROM drive with a medium, which stays the caller's, or None; returns its slot.

        Raises:
            SpecError: all slots are taken.
        """
        from vmm_kvm.virtio.scsi import VirtioScsi  # noqa: PLC0415 - few machines have a drive

        backend = VirtioScsi(image, owns_image=False)
        return self.add_backend(backend, CLASS_MASS_STORAGE_SCSI, "cdrom")[0]

    def add_console(
        self, transmit: Callable[[bytes], None], on_receive_room: Callable[[], None]
    ) -> "VirtioConsole":
        """Add a console, which the guest knows as hvc0; see `VirtioConsole` for the callbacks.

        Raises:
            SpecError: all slots are taken.
        """
        from vmm_kvm.virtio.console import VirtioConsole  # noqa: PLC0415 - few machines have one

        backend = VirtioConsole(transmit, on_receive_room=on_receive_room)
        _, worker = self.add_backend(backend, CLASS_COMMUNICATIONS_OTHER, "console")
        backend.attach(worker)
        return backend

    def add_vmmci(self, clock: Clock, on_expired: Callable[[Command], None]) -> Vmmci:
        """Add what asks an OpenBSD guest to shut down; see `Vmmci` for `on_expired`.

        Raises:
            SpecError: all slots are taken.
        """
        line = self._intx.input(self._host.next_slot, _PIN_INTA)
        vmmci = Vmmci(clock, line, on_expired, pin=_PIN_INTA)
        self._functions.append(vmmci)
        self._host.add(vmmci.function)
        return vmmci

    def add_backend(self, backend: Backend, class_code: int, name: str) -> tuple[int, Worker]:
        """Add a virtio device that a thread of this process serves; takes over `backend`.

        Returns the slot and the worker, which is the `Transport` of a backend that wants one.

        Raises:
            SpecError: all slots are taken.
        """
        worker = Worker(backend, self._memory, name)
        return self.add_dataplane(worker, class_code, name), worker

    def add_dataplane(self, dataplane: Dataplane, class_code: int, name: str) -> int:
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
        )
        self._functions.append(function)
        return self._host.add(function.function)
