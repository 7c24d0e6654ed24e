"""Messages between the daemon's processes: one union per direction.

parent ↔ control: who comes, what clients ask, and what they are answered.
parent ↔ priv:    the host's network: bridges, taps, addresses, NAT.
parent ↔ local:   which guests are answered by DHCP and the like, see `wire.local`.
parent ↔ opener:  files of a client, see `wire.files`.
parent ↔ vmm:     launching, and what is said to and by VM processes.
vmm ↔ zygote:     forking, see `wire.forking`.
vmm ↔ vm:         what VM a process is to be; else vmm passes on what is said, and how it ended.
vmm → device:     what a device process is to serve, see `wire.device`.

A process decodes only the union meant for it, so that no other can make it do more.
"""

from enum import StrEnum
from typing import Annotated

import msgspec

from vmd.config.disks import DiskKind, DiskOption
from vmd.config.model import InterfaceConfig, SwitchConfig
from vmd.wire.blank import JoinCgroup, SpareCgroup
from vmd.wire.capture import CaptureVm, VmCaptured
from vmd.wire.encoding import Wire, WireEncoding
from vmd.wire.leaving import CancelSendVm, SendVm, VmMigrating, VmSent
from vmd.wire.messages import AnyAnswer, ErrorCode, Event, ParentRequest
from vmd.wire.parts import TEXT_MAX, Internal, Part, Statistics
from vmd.wire.transfers import ReceivedSpec
from vmm_kvm.boot_device import BootDevice
from vmm_kvm.errors import HaltReason
from vmm_kvm.limits import MTU_DEFAULT


class SetVerbosity(Internal, frozen=True, kw_only=True):
    """To every process: set the verbosity: 0 brief, 1 as usual, 2 verbose."""

    level: int


# parent ↔ control

CLIENTS_MAX = 1024
"""Connections at a time; root may always make `CLIENTS_OF_ROOT` more."""
CLIENTS_OF_ROOT = 64
UNANSWERED_MAX = 32
"""Requests of one connection that wait for an answer; then control does not read from it."""


class ClientCame(Internal, frozen=True, kw_only=True):
    """A client has connected; its connection comes along, so that the kernel can tell its user."""

    client: int
    """Control's number for the connection, never used twice."""


class ClientRequest(Internal, frozen=True, kw_only=True):
    """A client's request; its descriptors come along."""

    client: int
    request: ParentRequest


class ClientGone(Internal, frozen=True, kw_only=True):
    """A connection has ended: its requests need no answers."""

    client: int


class ClientAnswer(Internal, frozen=True, kw_only=True):
    """An answer or event for a client; its descriptors come along."""

    client: int
    answer: AnyAnswer


class Considered(Internal, frozen=True, kw_only=True):
    """The parent has finished its part of a request, and may be given another.

    Sent once for each, before or after its answer, which may have to wait for a VM.
    """

    client: int


class Happened(Internal, frozen=True, kw_only=True):
    """Something for all clients that listen to events; `event` has no serial."""

    event: Event


class KeepFile(Internal, frozen=True, kw_only=True):
    """Keep a file of a client's: its parcel and the keeper of that come along, see `parcels`."""

    uid: int


ControlToParent = ClientCame | ClientRequest | ClientGone
ParentToControl = ClientAnswer | Considered | Happened | KeepFile | SetVerbosity


# parent ↔ priv


class LocalAddresses(Part, frozen=True, kw_only=True):
    """Addresses of a local interface."""

    host4: str
    guest4: str
    host_lladdr: str
    host6: str = ""
    """Empty without IPv6, as the next one."""
    guest6: str = ""
    """The address that the guest makes for itself."""


class InterfaceSpec(Part, frozen=True, kw_only=True):
    """A VM's network interface, as it is configured."""

    config: InterfaceConfig
    """With an lladdr, and with what the interface inherits of its switch."""

    @property
    def lladdr(self) -> str:
        """The guest's, as `fe:e1:bb:d1:23:45`."""
        assert self.config.lladdr is not None
        return self.config.lladdr

    @property
    def mtu(self) -> int:
        """Bytes of the largest packet, without the Ethernet header."""
        return self.config.mtu or MTU_DEFAULT


class TapSpec(InterfaceSpec, frozen=True, kw_only=True):
    """The host's side of a VM's network interface."""

    queues: tuple[int, ...] = ()
    """Indices of open descriptors of /dev/net/tun; none if the interface is there already."""
    alias: str
    bridge: str = ""
    """The interface of its switch, if it is on one."""
    group: int = 0
    """The number of its group."""
    local: LocalAddresses | None = None


class Configure(Internal, frozen=True, kw_only=True):
    """What the host's network is to be, apart from the interfaces of VMs; answered by `Configured`.

    Everything else that priv has made, now or before it was killed, is removed.
    """

    mark: str
    """This daemon's mark, on everything that priv makes."""
    table: str
    """Name of the packet filter's tables."""
    switches: tuple[SwitchConfig, ...] = ()
    nat4: str = ""
    """Network whose addresses are hidden from the rest of the world; empty for none."""
    nat6: str = ""
    is_partial: bool = False
    """Existing interfaces follow, and then this again: nothing is removed yet."""


class MakeTaps(Internal, frozen=True, kw_only=True):
    """Make the interfaces of a VM; answered by `TapsMade` or `TapsFailed`.

    Each exists as long as the descriptors that come along.
    """

    id: int
    taps: tuple[TapSpec, ...]


class ForgetTaps(Internal, frozen=True, kw_only=True):
    """Forget a VM's interfaces, which are about to go; answered by `TapsForgotten`."""

    id: int


class MadeTap(Part, frozen=True, kw_only=True):
    """An interface that there is."""

    name: str
    index: int
    """The kernel's number for it."""


class Configured(Internal, frozen=True, kw_only=True):
    """The configuration is done, as far as possible; failures are logged."""


class TapsMade(Internal, frozen=True, kw_only=True):
    """A VM's interfaces are there."""

    id: int
    taps: tuple[MadeTap, ...]
    is_filtered: bool
    """Whether frames with a wrong lladdr are dropped as configured, on every data path."""


class TapsFailed(Internal, frozen=True, kw_only=True):
    """A VM has no interfaces; the message is one line."""

    id: int
    message: str


class TapsForgotten(Internal, frozen=True, kw_only=True):
    """Nothing refers to a VM's interfaces any more."""

    id: int


class RulesRefused(Internal, frozen=True, kw_only=True):
    """The packet filter refuses rules of a VM's interface; the rest is in place.

    Sent once.
    """

    id: int
    index: int
    """Of the interface among the VM's."""
    message: Annotated[str, msgspec.Meta(max_length=TEXT_MAX)]
    """What is refused and why, in one line."""


class InterfaceTrouble(Internal, frozen=True, kw_only=True):
    """A VM's interface is not what was asked for, or is now. Sent at each change."""

    id: int
    index: int
    """Of the interface among the VM's."""
    message: Annotated[str, msgspec.Meta(max_length=TEXT_MAX)]
    """Why, in one line; empty if nothing is wrong any more."""


ParentToPriv = Configure | MakeTaps | ForgetTaps | SetVerbosity
PrivToParent = Configured | TapsMade | TapsFailed | TapsForgotten | RulesRefused | InterfaceTrouble


# parent ↔ vmm ↔ vm


class DiskSpec(Part, frozen=True, kw_only=True):
    """A disk, open."""

    option: DiskOption
    """As it is configured; its path is for messages."""
    chain: tuple[int, ...]
    """Indices of descriptors: the image, then its bases; a server's connection alone."""
    formats: tuple[DiskKind, ...] = ()
    """Of each image, raw or qcow2."""
    scratch: int | None = None
    """Index of a file for writes, empty or as it was before a reboot: the image is then only
    read."""
    is_locked: bool = True
    """Whether it is locked already; else the process that uses it waits for the lock."""

    @property
    def files(self) -> tuple[int, ...]:
        """Its process's descriptors: the chain, then the file for writes."""
        return self.chain if self.scratch is None else (*self.chain, self.scratch)

    @property
    def has_process(self) -> bool:
        """Whether a device process of ours serves it."""
        return self.option.kind not in {DiskKind.VHOST_USER, DiskKind.PMEM}


class ShareSpec(Part, frozen=True, kw_only=True):
    """A shared directory, and who serves it."""

    tag: str
    socket: int
    """Index of the descriptor of the connection to its server."""
    status: int | None = None
    """Index of another one: a process of ours says there when it is ready, or why it cannot be."""


class NicSpec(InterfaceSpec, frozen=True, kw_only=True):
    """A network interface, open; see `vmm_kvm.net.paths` for what the descriptors are.

    With `vhosts` the kernel moves its frames, with taps alone a device process of ours, else the
    peer of `stream`.
    """

    name: str
    """Of its tap, for messages."""
    taps: tuple[int, ...] = ()
    """Indices of the descriptors of the tap's queues."""
    vhosts: tuple[int, ...] = ()
    """Indices of as many descriptors of /dev/vhost-net, or none."""
    stream: int | None = None
    """Index of a stream of frames, as passt(1) speaks it."""
    is_up: bool = True
    """Whether the guest finds its cable plugged in."""

    @property
    def has_process(self) -> bool:
        """Whether a device process of ours moves its frames."""
        return bool(self.taps) and not self.vhosts


class VmSpec(Part, frozen=True, kw_only=True):
    """All that a VM process needs: numbers, names, and indices of descriptors."""

    id: int
    name: str
    memory: int
    """Bytes, a multiple of 1 MiB."""
    cpus: int
    boot: int | None
    """Index of the boot image's descriptor; None for one that is received."""
    boot_path: str
    """For messages."""
    is_firmware: bool = False
    """Whether the user named the boot image as firmware, so that its kind is not probed."""
    kernel: int | None = None
    """Index of the descriptor of the unpacked kernel, if it is known."""
    variables: int | None = None
    """Index of the descriptor of UEFI variables, if the boot image is UEFI firmware: a file of the
    VM's own, which keeps the guest's changes."""
    initrd: tuple[int, ...] = ()
    append: str | None = None
    disks: tuple[DiskSpec, ...] = ()
    cdrom: int | None = None
    cdrom_path: str = ""
    """For whoever receives the VM."""
    interfaces: tuple[NicSpec, ...] = ()
    shares: tuple[ShareSpec, ...] = ()
    tty: int
    """Index of the descriptor of the pty's master side."""
    ring: int
    """Index of the memory with the console's output; see `ring`."""
    cgroup: int | None = None
    """Index of the descriptor for joining the control group."""
    device_cgroup: int | None = None
    """Index of the same for its device processes."""
    cgroup_number: int = 0
    """Of the control group, which its processes may have joined ahead; 0 for none."""
    boot_device: BootDevice = BootDevice.AUTO
    has_vsock: bool = False
    has_balloon: bool = False
    has_watchdog: bool = False
    tpm: tuple[int, ...] = ()
    """Indices of the channels of its TPM, of control and of commands; none without one."""
    received: ReceivedSpec | None = None
    """None for one that boots."""
    is_template: bool = False
    """Clones are to go on from it, once it is paused."""
    sev: int | None = None
    """Index of the descriptor of /dev/sev, if its memory is to be encrypted."""
    is_sev_es: bool = False
    has_timed_out: bool = False
    """Its watchdog has reset it before this start."""


class LaunchVm(Internal, frozen=True, kw_only=True):
    """Make a VM process; answered by `VmLaunched` or `VmLaunchFailed`. Descriptors come along."""

    spec: VmSpec


class KillVm(Internal, frozen=True, kw_only=True):
    """Kill a VM process; `VmExited` follows."""

    id: int
    why: str = ""
    """What has crashed, if that is why; the VM has then."""


class PauseVm(Internal, frozen=True, kw_only=True):
    """Stand still, and say `VmPaused`."""


class UnpauseVm(Internal, frozen=True, kw_only=True):
    """Go on, and say `VmUnpaused`; what waits for the host is tried again."""

    force: bool = False
    """Though it may run on another host."""


class StopVm(Internal, frozen=True, kw_only=True):
    """Ask the guest to stop; end when it does or its time is over."""

    timeout_s: int | None = None
    """How long it has; None for as long as guests usually have."""


class AttachConsole(Internal, frozen=True, kw_only=True):
    """Serve the console on the stream whose descriptor comes along, from a ring's `position` on."""

    position: int = 0


class ConnectVm(Internal, frozen=True, kw_only=True):
    """Lead the stream whose descriptor comes along to a port of the guest, by the vsock device."""

    port: int


class DebugVm(Internal, frozen=True, kw_only=True):
    """Serve a debugger through the stream whose descriptor comes along."""


class SetLinks(Internal, frozen=True, kw_only=True):
    """Set the links of the network interfaces."""

    are_up: tuple[bool, ...]
    """Of each, in their order."""


class LookAtTerminal(Internal, frozen=True, kw_only=True):
    """The slave side of the console's terminal was opened or closed."""


class AskStatistics(Internal, frozen=True, kw_only=True):
    """Say `VmStatistics`."""


class Begin(Internal, frozen=True, kw_only=True):
    """Become the process of this VM: the first command, and the only one from vmm itself.

    Descriptors come along: some of those that `spec` names, then counters, a socket and
    a pipe per disk, then the same per interface that has a process.
    """

    spec: VmSpec
    places: tuple[int, ...]
    """The index in `spec` of each of the first descriptors."""
    verbosity: int


VmCommand = (
    PauseVm
    | UnpauseVm
    | SendVm
    | CancelSendVm
    | CaptureVm
    | StopVm
    | AttachConsole
    | ConnectVm
    | DebugVm
    | LookAtTerminal
    | SetLinks
    | AskStatistics
    | SetVerbosity
)


VmmToVm = Begin | JoinCgroup | VmCommand


class VmStarted(Internal, frozen=True, kw_only=True):
    """The machine is made and its image loaded; the guest runs."""


class VmUnpacked(Internal, frozen=True, kw_only=True):
    """The boot image is unpacked; the kernel comes along, in sealed memory."""


class VmPaused(Internal, frozen=True, kw_only=True):
    """No vCPU runs and no device works."""


class VmHalted(Internal, frozen=True, kw_only=True):
    """It has paused because a request of a disk waits for the host; see `UnpauseVm`."""

    reason: HaltReason
    message: Annotated[str, msgspec.Meta(max_length=TEXT_MAX)]
    """Which disk, and what the host said."""


class VmUnpaused(Internal, frozen=True, kw_only=True):
    """The guest runs again."""


class VmStatistics(Internal, frozen=True, kw_only=True):
    """Counters, as they were asked for."""

    statistics: Statistics
    memory_used: int


class EndReason(StrEnum):
    """Why a VM process ends of its own accord."""

    POWER_OFF = "power-off"
    REBOOT = "reboot"
    """Also a triple fault."""
    STOPPED = "stopped"
    """It was asked to stop, and has."""
    OVERDUE = "killed"
    """It was asked to stop, and its time was over."""
    SENT = "sent"
    """All of it is in a stream: it continues elsewhere, and must not continue here."""
    CRASHED = "crashed"
    """The guest panicked, or KVM cannot go on."""
    FAILED = "failed"
    """The machine could not be made."""


class VmEnding(Internal, frozen=True, kw_only=True):
    """The VM process is about to exit; nothing else follows."""

    reason: EndReason
    code: ErrorCode = ErrorCode.EIO
    """Where it could not be made."""
    message: Annotated[str, msgspec.Meta(max_length=TEXT_MAX)] = ""
    has_timed_out: bool = False
    """After a reset: its watchdog has ended, and no driver has cleared that."""


_Went = VmPaused | VmHalted | VmUnpaused | VmMigrating | VmSent | VmCaptured
VmReport = VmStarted | VmUnpacked | _Went | VmStatistics | VmEnding


class ToVm(Internal, frozen=True, kw_only=True):
    """Something for a VM process; descriptors are passed on."""

    id: int
    command: VmCommand


class FromVm(Internal, frozen=True, kw_only=True):
    """Something that a VM process said."""

    id: int
    report: VmReport


class VmLaunched(Internal, frozen=True, kw_only=True):
    """The VM process exists; its guest may not run yet."""

    id: int
    pid: int


class VmLaunchFailed(Internal, frozen=True, kw_only=True):
    """There is no VM process."""

    id: int
    code: ErrorCode
    message: str = ""


class VmExited(Internal, frozen=True, kw_only=True):
    """A VM process is gone and reaped."""

    id: int
    pid: int
    status: int
    """As from waitpid: the exit code, or minus the signal's number."""
    ending: VmEnding | None = None
    """What it said last, if it could."""


class VmHeld(Internal, frozen=True, kw_only=True):
    """Processes of a VM were killed and do not end; `VmExited` follows if they ever do."""

    id: int
    message: Annotated[str, msgspec.Meta(max_length=TEXT_MAX)]


class EndHung(Internal, frozen=True, kw_only=True):
    """End a VM's process, as the zygote that could hangs; a pidfd of it comes along."""

    uid: int
    """The VM's; 0 if VMs have no users of their own."""


ParentToVmm = LaunchVm | SpareCgroup | KillVm | ToVm | SetVerbosity
AboutVm = VmLaunched | VmLaunchFailed | FromVm | VmHeld | VmExited
VmmToParent = AboutVm | EndHung


PARENT_AND_CONTROL: Wire[ParentToControl, ControlToParent] = Wire(
    ControlToParent, WireEncoding.MSGPACK
)
CONTROL_AND_PARENT: Wire[ControlToParent, ParentToControl] = Wire(
    ParentToControl, WireEncoding.MSGPACK
)
PARENT_AND_PRIV: Wire[ParentToPriv, PrivToParent] = Wire(PrivToParent, WireEncoding.MSGPACK)
PRIV_AND_PARENT: Wire[PrivToParent, ParentToPriv] = Wire(ParentToPriv, WireEncoding.MSGPACK)
PARENT_AND_VMM: Wire[ParentToVmm, VmmToParent] = Wire(VmmToParent, WireEncoding.MSGPACK)
VMM_AND_PARENT: Wire[VmmToParent, ParentToVmm] = Wire(ParentToVmm, WireEncoding.MSGPACK)
VMM_AND_VM: Wire[VmmToVm, VmReport] = Wire(VmReport, WireEncoding.MSGPACK)
VM_AND_VMM: Wire[VmReport, VmmToVm] = Wire(VmmToVm, WireEncoding.MSGPACK)
