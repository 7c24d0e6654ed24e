"""The parts of a machine, and its outcomes: data only.

`MachineSpec.devices` is a tuple of a closed union. The record of each kind lies in the module of
its device; each record names its `kind`, so that only the modules of a machine's devices are
loaded. `machine.wiring` makes the devices.
"""

import enum
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Final, NamedTuple, TypeAlias

from vmm_kvm.arch.x86.image import BootImage
from vmm_kvm.bits import MIB
from vmm_kvm.boot.cache import Kernels
from vmm_kvm.boot.source import FileSource
from vmm_kvm.boot_device import BootDevice
from vmm_kvm.record import Record
from vmm_kvm.virtio.rng import RngSpec
from vmm_kvm.virtio.vmmci import VmmciSpec

if TYPE_CHECKING:  # loaded by what makes a record of it
    from vmm_kvm.boot.nvram import Variables
    from vmm_kvm.devices.tpm_crb import Executor
    from vmm_kvm.kvm.sev import SevSpec
    from vmm_kvm.machine.net import NetSpec
    from vmm_kvm.pci.i6300esb import WatchdogSpec
    from vmm_kvm.virtio.balloon import BalloonSpec
    from vmm_kvm.virtio.blk import BlkSpec
    from vmm_kvm.virtio.console import ConsoleSpec
    from vmm_kvm.virtio.pmem import PmemSpec
    from vmm_kvm.virtio.scsi import ScsiCdSpec
    from vmm_kvm.virtio.vhost_user.blk import RemoteBlkSpec
    from vmm_kvm.virtio.vhost_user.fs import RemoteFsSpec
    from vmm_kvm.virtio.vsock import VsockSpec

DiskSpec: TypeAlias = "BlkSpec | RemoteBlkSpec | PmemSpec"
DeviceSpec: TypeAlias = (
    "RngSpec | NetSpec | DiskSpec | ScsiCdSpec | RemoteFsSpec | ConsoleSpec | VsockSpec"
    " | BalloonSpec | WatchdogSpec | VmmciSpec"
)

BASIC_DEVICES: Final = (RngSpec(), VmmciSpec())
"""Properties of every machine of this project."""


class MachineSpec(Record):
    """The machine to build."""

    image: BootImage
    memory_size: int = 512 * MIB
    """Bytes of RAM, a multiple of 1 MiB."""
    cpus: int = 1
    """vCPUs, 1 to 64 and no more than KVM allows."""
    name: str = "vm"
    """At most 63 bytes."""
    devices: tuple[DeviceSpec, ...] = BASIC_DEVICES
    """PCI devices; those of one kind in their order. At most one each but disks,
    interfaces and file systems."""
    command_line: str | None = None
    initrd: tuple[str | FileSource, ...] = ()
    """Open, or by path; more than one only for Multiboot kernels."""
    variables: "Variables | None" = None
    """UEFI variables, in flash memory below the firmware's image; stays the caller's."""
    kernels: Kernels | None = None
    """Keeps unpacked kernels; None for this user's cache."""
    boot_device: BootDevice = BootDevice.AUTO
    """The device that firmware boots from, and an OpenBSD kernel's root."""
    uuid: bytes | None = None
    """Of the system, sixteen bytes; None makes one of the name."""
    serial: str = ""
    """Serial number of the system; empty for none."""
    shares_memory: bool = False
    """Whether RAM has a descriptor even if no other process serves a device, for others to map."""
    sev: "SevSpec | None" = None
    """Its memory is encrypted; such a machine cannot be saved, cloned or debugged."""
    tpm: "Executor | None" = None
    """A TPM, which stays the caller's; a machine with one cannot be saved."""


def nets_of(devices: "Iterable[DeviceSpec]") -> "list[NetSpec]":
    """Return the network interfaces among `devices`, in their order."""
    return [spec for spec in devices if spec.kind == "net"]


def pmems_of(devices: "Iterable[DeviceSpec]") -> "list[PmemSpec]":
    """Return the disks among `devices` that are memory, in their order."""
    return [spec for spec in devices if spec.kind == "pmem"]


def has_servers(devices: "Sequence[DeviceSpec]") -> bool:
    """Tell whether another process serves a device, which needs the guest's memory for it."""
    nets = nets_of(devices)
    if any(spec.kind in {"remote-blk", "remote-fs"} for spec in devices):
        return True
    if not nets:
        return False
    from vmm_kvm.net.paths import RemotePath  # noqa: PLC0415 - not every machine has a network

    return any(isinstance(net.path, RemotePath) for net in nets)


class Ending(enum.Enum):
    """Orderly ends of a machine by its guest."""

    POWER_OFF = "power off"
    """It entered S5."""
    REBOOT = "reboot"
    """It reset the machine."""


class TripleFault(NamedTuple):
    """The guest shut its processor down, which resets a real machine."""

    message: str


class DebugExitStatus(NamedTuple):
    """The guest wrote `value` to isa-debug-exit."""

    value: int


class Crash(NamedTuple):
    """The guest panicked, or KVM cannot continue; `message` is one line."""

    message: str


Outcome = Ending | TripleFault | DebugExitStatus | Crash
