"""What the daemon's processes say to each other: one union per direction.

parent ↔ control: what clients ask, with who they are, and what they are answered.
parent ↔ vmm:     launching, and what is said to and by VM processes.
vmm ↔ vm:         vmm passes it on, and adds what only the parent of a process knows: how it ended.

A process decodes only the union that is meant for it, so that no other can make it do more.
"""

from enum import StrEnum

import msgspec

from vmd.config.disks import DiskKind, DiskOption
from vmd.config.model import BootDevice
from vmd.messages import AnyAnswer, AnyRequest, ErrorCode, Part, Statistics
from vmd.wire import Wire, WireEncoding


class Internal(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag=True):
    """A message between processes of the daemon."""


# What everyone is told


class SetVerbosity(Internal, frozen=True, kw_only=True):
    """Log more or less: 0 brief, 1 as usual, 2 verbose."""

    level: int


# parent ↔ control


class ClientRequest(Internal, frozen=True, kw_only=True):
    """A client's request; its descriptors come along."""

    client: int
    """Control's number for the connection, never used twice."""
    uid: int
    """From SO_PEERCRED, as the next ones."""
    gid: int
    pid: int
    request: AnyRequest


class ClientGone(Internal, frozen=True, kw_only=True):
    """A connection has ended: nothing that it asked needs an answer."""

    client: int


class ClientAnswer(Internal, frozen=True, kw_only=True):
    """An answer or event for a client; its descriptors come along."""

    client: int
    answer: AnyAnswer


class CloseClient(Internal, frozen=True, kw_only=True):
    """End a connection once what it was sent has gone out."""

    client: int


ControlToParent = ClientRequest | ClientGone
ParentToControl = ClientAnswer | CloseClient | SetVerbosity


# parent ↔ vmm ↔ vm


class DiskSpec(Part, frozen=True, kw_only=True):
    """A disk, open."""

    option: DiskOption
    """As it is configured; its path is for messages."""
    chain: tuple[int, ...]
    """Indices of descriptors: the image, then its bases; a server's connection alone."""
    formats: tuple[DiskKind, ...] = ()
    """Of each image, raw or qcow2."""


class NicSpec(Part, frozen=True, kw_only=True):
    """A network interface, open; see `vmm_kvm.net.nic` for what the descriptors are.

    With `vhosts` the kernel moves its frames, with taps alone a device process of ours, with
    neither an external vhost-user-net server.
    """

    name: str
    """Of its tap, for messages."""
    lladdr: str
    """As `fe:e1:bb:d1:23:45`."""
    taps: tuple[int, ...] = ()
    """Indices of the descriptors of the tap's queues."""
    vhosts: tuple[int, ...] = ()
    """Indices of as many descriptors of /dev/vhost-net, or none."""
    server: int | None = None
    """Index of a connection to an external server."""
    mtu: int = 1500
    is_locked: bool = False


class VmSpec(Part, frozen=True, kw_only=True):
    """All that a VM process needs: numbers, names, and indices of descriptors."""

    id: int
    name: str
    memory: int
    """Bytes, a multiple of 1 MiB."""
    cpus: int
    boot: int
    """Index of the boot image's descriptor."""
    boot_path: str
    """For messages."""
    variables: int | None = None
    """Index of the descriptor of UEFI variables, where the boot image is UEFI firmware."""
    initrd: tuple[int, ...] = ()
    append: str | None = None
    disks: tuple[DiskSpec, ...] = ()
    cdrom: int | None = None
    interfaces: tuple[NicSpec, ...] = ()
    tty: int
    """Index of the descriptor of the pty's master side."""
    tty_watch: int
    """Index of an inotify descriptor that tells when the slave side is opened or closed."""
    ring: int
    """Index of the memory that holds what the console has shown; see `ring`."""
    boot_device: BootDevice = BootDevice.AUTO


class Launch(Internal, frozen=True, kw_only=True):
    """Make a VM process; answered by `Launched`, or `LaunchFailed`. All descriptors come along."""

    spec: VmSpec


class Kill(Internal, frozen=True, kw_only=True):
    """End a VM process at once; it is told of by `Exited`."""

    id: int


class PauseVm(Internal, frozen=True, kw_only=True):
    """Stand still, and say `VmPaused`."""


class UnpauseVm(Internal, frozen=True, kw_only=True):
    """Go on, and say `VmUnpaused`."""


class StopVm(Internal, frozen=True, kw_only=True):
    """Ask the guest to stop; end when it does or its time is over."""


class AttachConsole(Internal, frozen=True, kw_only=True):
    """Serve the console on the stream whose descriptor comes along, the last 64 KiB first."""


class AskStatistics(Internal, frozen=True, kw_only=True):
    """Say `VmStatistics`."""

    serial: int


VmCommand = PauseVm | UnpauseVm | StopVm | AttachConsole | AskStatistics | SetVerbosity


class VmStarted(Internal, frozen=True, kw_only=True):
    """The machine is made and its image loaded; the guest runs."""


class VmPaused(Internal, frozen=True, kw_only=True):
    """No vCPU runs and no device works."""


class VmUnpaused(Internal, frozen=True, kw_only=True):
    """The guest runs again."""


class VmStatistics(Internal, frozen=True, kw_only=True):
    """Counters, as they were asked for."""

    serial: int
    statistics: Statistics
    memory_used: int


class EndReason(StrEnum):
    """Why a VM process ends of its own accord."""

    POWER_OFF = "power-off"
    REBOOT = "reboot"
    """Also a triple fault."""
    STOPPED = "stopped"
    """It was asked to stop, and has, or its time was over."""
    CRASHED = "crashed"
    """The guest panicked, or KVM cannot go on."""
    FAILED = "failed"
    """The machine could not be made."""


class VmEnding(Internal, frozen=True, kw_only=True):
    """The VM process is about to end; nothing follows but its exit."""

    reason: EndReason
    code: ErrorCode = ErrorCode.EIO
    """Where it could not be made."""
    message: str = ""


VmReport = VmStarted | VmPaused | VmUnpaused | VmStatistics | VmEnding


class ToVm(Internal, frozen=True, kw_only=True):
    """Something for a VM process; descriptors are passed on."""

    id: int
    command: VmCommand


class FromVm(Internal, frozen=True, kw_only=True):
    """Something that a VM process said."""

    id: int
    report: VmReport


class Launched(Internal, frozen=True, kw_only=True):
    """The VM process exists; its guest may not run yet."""

    id: int
    pid: int


class LaunchFailed(Internal, frozen=True, kw_only=True):
    """There is no VM process."""

    id: int
    code: ErrorCode
    message: str = ""


class Exited(Internal, frozen=True, kw_only=True):
    """A VM process is gone and reaped."""

    id: int
    pid: int
    status: int
    """As waitpid says it: the exit code, or minus the signal's number."""
    ending: VmEnding | None = None
    """What it said last, if it could."""


ParentToVmm = Launch | Kill | ToVm | SetVerbosity
VmmToParent = Launched | LaunchFailed | FromVm | Exited

PARENT_AND_CONTROL: Wire[ParentToControl, ControlToParent] = Wire(
    ControlToParent, WireEncoding.MSGPACK
)
CONTROL_AND_PARENT: Wire[ControlToParent, ParentToControl] = Wire(
    ParentToControl, WireEncoding.MSGPACK
)
PARENT_AND_VMM: Wire[ParentToVmm, VmmToParent] = Wire(VmmToParent, WireEncoding.MSGPACK)
VMM_AND_PARENT: Wire[VmmToParent, ParentToVmm] = Wire(ParentToVmm, WireEncoding.MSGPACK)
VMM_AND_VM: Wire[VmCommand, VmReport] = Wire(VmReport, WireEncoding.MSGPACK)
VM_AND_VMM: Wire[VmReport, VmCommand] = Wire(VmCommand, WireEncoding.MSGPACK)
