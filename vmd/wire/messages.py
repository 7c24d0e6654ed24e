"""The control protocol: clients' requests, and the daemon's answers.

Each message is one packet of a SOCK_SEQPACKET socket: a JSON object whose `type` names it.
Descriptors travel beside it by SCM_RIGHTS; a field that names one holds its index among them.
Clients are identified by SO_PEERCRED, never by their messages.

Every request gets exactly one answer, which carries the request's `serial`: a client may have
several pending, and an answer may take long. A long list of VMs comes in parts, all but the last
with `has_more`; after the answer to `events`, every event until the connection ends.

`docs/protocol.md` is made from this module and `parts`.

Source: section 5.5 of OpenBSD's behaviour, for what is said; not for how.
"""

from enum import StrEnum
from typing import Annotated

import msgspec

from vmd.config.model import FORWARDS_MAX
from vmd.wire.encoding import Wire, WireEncoding
from vmd.wire.parts import (
    Answer,
    DiskRequest,
    Index,
    Part,
    Path,
    Port,
    Request,
    ShareInfo,
    ShareRequest,
    Size,
    Statistics,
    VmRequest,
    Word,
)
from vmd.wire.ports import Connect, Connected, Debug
from vmd.wire.transfers import (
    Clone,
    Cloned,
    Receive,
    Send,
    Snapshot,
    SnapshotList,
    SnapshotOpened,
    StoreRequest,
)
from vmm_kvm.boot_device import BootDevice
from vmm_kvm.limits import MTU_DEFAULT

CONSOLE_INPUT = b"\x00"
"""First byte of a packet to a console's stream: the rest is input."""
CONSOLE_BREAK = b"\x01"
"""The packet to a console's stream that is a BREAK."""


class ErrorCode(StrEnum):
    """Why a request failed; those with an errno's name mean what it means.

    Source: sections 1.1 and 1.2 of OpenBSD's behaviour.
    """

    BIOS_MISSING = "bios-missing"
    """The boot firmware cannot be opened."""
    DISK_MISSING = "disk-missing"
    """A disk cannot be opened or is in use, or the VM has no devices at all."""
    CDROM_MISSING = "cdrom-missing"
    """The ISO image cannot be opened."""
    CDROM_INVALID = "cdrom-invalid"
    """The ISO image is not a regular file."""
    TEMPLATE_INVALID = "template-invalid"
    """There is no VM to make an instance of."""
    NOT_RUNNING = "not-running"
    """The VM is not running."""
    EPERM = "EPERM"
    ENOENT = "ENOENT"
    EINTR = "EINTR"
    EIO = "EIO"
    EAGAIN = "EAGAIN"
    ENOMEM = "ENOMEM"
    EBUSY = "EBUSY"
    EEXIST = "EEXIST"
    EINVAL = "EINVAL"
    EALREADY = "EALREADY"
    ENOSPC = "ENOSPC"
    ENAMETOOLONG = "ENAMETOOLONG"
    EPROCLIM = "EPROCLIM"
    """Such a VM exists already. (OpenBSD: too many processes.)"""
    COMMAND_FAILED = "command-failed"
    """The configuration has errors, or the daemon failed; its log has the reason."""
    VERSION = "version"
    """The daemon does not speak the version that the request names."""


class State(StrEnum):
    """The state of a VM, in OpenBSD's words."""

    STOPPED = "stopped"
    WAITING = "waiting"
    """It will be started, in its turn."""
    STARTING = "starting"
    """From the request, or a reboot, until its guest runs."""
    RUNNING = "running"
    PAUSED = "paused"
    STOPPING = "stopping"
    GONE = "gone"
    """It has ended and is forgotten, but for how it ended."""


class EndCause(StrEnum):
    """Why a VM ended."""

    POWER_OFF = "power-off"
    REBOOT = "reboot"
    """Its guest rebooted, or triple-faulted, and was not started again."""
    STOPPED = "stopped"
    """It was asked to stop, and has."""
    SENT = "sent"
    """All of it is in a stream: it continues elsewhere."""
    CRASHED = "crashed"
    """Its guest panicked, or KVM could not continue."""
    FAILED = "failed"
    """It could not be started."""
    KILLED = "killed"
    """It was killed on request, or did not stop in time."""
    DIED = "died"
    """Its process ended by itself, without a reason."""


class ResetMode(StrEnum):
    """The things that `reset` forgets."""

    ALL = "all"
    SWITCHES = "switches"
    VMS = "vms"


class Transport(StrEnum):
    """What a port is one of."""

    TCP = "tcp"
    UDP = "udp"


class EventKind(StrEnum):
    """The kind of an event of a VM."""

    REGISTERED = "registered"
    WAITING = "waiting"
    STARTING = "starting"
    STARTED = "started"
    PAUSED = "paused"
    UNPAUSED = "unpaused"
    STOPPING = "stopping"
    REBOOTED = "rebooted"
    MIGRATING = "migrating"
    """It is being handed over to another host; the message says how far that is."""
    SENT = "sent"
    """All of it is in a stream. It continues, or `stopped` follows."""
    WRITING = "writing"
    """It is being written into a snapshot; the message says how much of its memory is, in %."""
    SNAPSHOT = "snapshot"
    """All of it is in a snapshot, of the daemon's store if the message has a name; it runs on."""
    CLONED = "cloned"
    """Others continue from it; the message has their names."""
    STOPPED = "stopped"
    FAILED = "failed"
    REMOVED = "removed"
    INTERFACE = "interface"
    """A part of one of its network interfaces fails; the message names the part and the reason."""


class ForwardRequest(Part, frozen=True, kw_only=True):
    """A port of the host to forward to one of a guest; only for administrators."""

    protocol: Transport
    port: Port
    to_port: Port
    address: Word = ""
    """The host's, IPv4 or IPv6; all of them if empty."""


class InterfaceRequest(Part, frozen=True, kw_only=True):
    """A network interface of a VM to be started."""

    is_local: bool = False
    """It has an address of the local prefix, by DHCP."""
    switch: Word = ""
    """Name of the switch that it is on."""
    forwards: Annotated[tuple[ForwardRequest, ...], msgspec.Meta(max_length=FORWARDS_MAX)] = ()
    """Of a local interface."""


class Start(VmRequest, frozen=True, kw_only=True):
    """Start a VM that exists, or make one, or make an instance of one; answered by `started`.

    Omitted fields stay as configured. Answered once the VM runs.
    """

    instance: Word = ""
    """The VM whose instance to make."""
    memory: Size | None = None
    """Bytes."""
    cpus: Annotated[int, msgspec.Meta(ge=0, le=0xFFFF)] | None = None
    """How many, 1 to 64."""
    kernel: Index | None = None
    """Index of the descriptor of a kernel or firmware image, for this start only."""
    kernel_path: Path = ""
    """Where it is, for messages."""
    initrd: Annotated[tuple[Index, ...], msgspec.Meta(max_length=32)] = ()
    """Indices of the descriptors of initial RAM disks; more than one only for Multiboot."""
    append: Path | None = None
    """Kernel command line."""
    firmware: Path = ""
    """`bios`, `uefi` or a path."""
    disks: Annotated[tuple[DiskRequest, ...], msgspec.Meta(max_length=64)] = ()
    interfaces: Annotated[tuple[InterfaceRequest, ...], msgspec.Meta(max_length=64)] = ()
    cdrom: Path = ""
    """Absolute path; for messages alone if `cdrom_image` is given."""
    cdrom_image: Index | None = None
    """Index of the descriptor of an ISO image."""
    shares: Annotated[tuple[ShareRequest, ...], msgspec.Meta(max_length=64)] = ()
    boot_device: BootDevice = BootDevice.AUTO
    has_vsock: bool = False
    """It has a vsock device, so that `connect` reaches ports of its guest; an instance also where
    its template has one."""
    has_balloon: bool = False
    """It has a memory balloon; an instance also where its template has one."""
    has_watchdog: bool = False
    """It has a watchdog; an instance also where its template has one."""
    has_tpm: bool = False
    """It has a TPM; an instance also where its template has one, and then one of its own."""
    is_template: bool = False
    """Clones are to be made of it: once it is paused, it stays so."""


class Stop(VmRequest, frozen=True, kw_only=True):
    """Stop a VM; answered by `done` when it is asked to, or by `terminated`."""

    force: bool = False
    """End it at once, without asking the guest."""
    wait: bool = False
    """Answer when it has ended."""
    in_order: bool = False
    """Begin when each VM that starts after this one, and that is being stopped, has ended."""


class Hold(Request, frozen=True, kw_only=True):
    """Start no VM until this connection ends; root only. Answered by `done`."""


class Wait(VmRequest, frozen=True, kw_only=True):
    """Wait until a VM ends or reboots; answered by `terminated`."""


class Pause(VmRequest, frozen=True, kw_only=True):
    """Pause a VM; answered by `done` when all vCPUs and devices have stopped."""


class Unpause(VmRequest, frozen=True, kw_only=True):
    """Let a paused VM continue; answered by `done`."""

    force: bool = False
    """Also one that may run on another host."""


class Console(VmRequest, frozen=True, kw_only=True):
    """Attach to a VM's console; answered by `console-opened`."""


class Status(VmRequest, frozen=True, kw_only=True):
    """List VMs: one, or all if neither id nor name is given; answered by `vms`."""

    statistics: bool = False
    """With the statistics of running VMs."""
    interfaces: bool = False
    """With the network interfaces of each."""
    devices: bool = False
    """With the boot image and disks of the client's own VMs; root sees all."""
    gone: bool = False
    """With VMs that have ended and are forgotten, latest first."""


class History(VmRequest, frozen=True, kw_only=True):
    """Return the log lines of a VM; for its owner and root. Answered by `lines`.

    This finds a forgotten VM too, the latest of its name.
    """

    position: Size = 0
    """Lines that the client has already."""


class Counts(Request, frozen=True, kw_only=True):
    """Return the daemon's counters since its start; answered by `totals`."""


class Events(Request, frozen=True, kw_only=True):
    """Report every event from now on: `event`s, after `done`; once for each connection."""


class Load(Request, frozen=True, kw_only=True):
    """Read another configuration file in addition; root only. Answered by `done`."""

    path: Path


class Source(Request, frozen=True, kw_only=True):
    """Return the path of the configuration; root only. Answered by `source-is`."""


class Reload(Request, frozen=True, kw_only=True):
    """Forget VMs that are not running and read the configuration again; root only."""


class Reset(Request, frozen=True, kw_only=True):
    """End all VMs, forget switches, or both; root only. Answered by `done`."""

    mode: ResetMode = ResetMode.ALL


class Log(Request, frozen=True, kw_only=True):
    """Set the daemon's verbosity: 0 brief, 2 verbose; root only. Answered by `done`."""

    level: Annotated[int, msgspec.Meta(ge=0, le=2)]


_OfVms = Start | Stop | Hold | Wait | Pause | Unpause | Console | Connect | Debug | Status | History
_Transfers = Send | Receive | Clone | Snapshot | StoreRequest
ParentRequest = _OfVms | _Transfers | Counts | Load | Reload | Source | Reset | Log
"""What the parent answers."""
AnyRequest = ParentRequest | Events


class Done(Answer, frozen=True, kw_only=True):
    """It is done, or under way."""

    id: int = 0
    """The VM's, if the request named one."""


LINES_MAX = 64
LINE_MAX = 512
"""Characters: with LINES_MAX of them an answer still fits into a packet."""


class Failed(Answer, frozen=True, kw_only=True):
    """It is not done, and nothing has changed."""

    code: ErrorCode
    message: str = ""
    """The failure and its reason, in one line; may be empty."""
    lines: tuple[str, ...] = ()
    """Details: errors of a configuration, `file:line: text`; at most LINES_MAX."""


class Started(Answer, frozen=True, kw_only=True):
    """The VM runs."""

    id: int
    pid: int
    tty: str
    """Path of its console."""


class Terminated(Answer, frozen=True, kw_only=True):
    """The VM has ended, or has rebooted."""

    id: int


class ConsoleOpened(Answer, frozen=True, kw_only=True):
    """The console's stream: a SOCK_SEQPACKET socket that first repeats the last 64 KiB.

    It sends packets of output. It takes packets of a byte 0 followed by input, or a packet of one
    byte 1, which is a BREAK. It ends with the VM.
    """

    id: int
    tty: str
    stream: int = 0
    """Index of the stream's descriptor."""
    position: int = 0
    """Position of the stream's first byte, counted from the console's first output ever.

    It continues over reboots, so that a client that attaches again knows what it has seen.
    """
    history: int = 0
    """How many bytes of earlier output the stream repeats; the rest is new."""


class ForwardInfo(
    Part, frozen=True, kw_only=True, forbid_unknown_fields=False, omit_defaults=False
):
    """A port of the host's addresses that leads to a guest."""

    protocol: str
    """`tcp` or `udp`."""
    port: int
    to_port: int
    address: str = ""
    """The host's address for it; all of them if empty."""


class InterfaceInfo(
    Part, frozen=True, kw_only=True, forbid_unknown_fields=False, omit_defaults=False
):
    """A network interface of a VM: its configuration, and its state while the VM runs."""

    lladdr: str
    tap: str = ""
    switch: str = ""
    is_local: bool = False
    is_locked: bool = False
    is_up: bool = True
    """Its link is up, if the VM runs; else as configured."""
    mtu: int = MTU_DEFAULT
    queues: int = 1
    """Pairs of queues."""
    group: str = ""
    rdomain: int | None = None
    host_addresses: tuple[str, ...] = ()
    """The host's addresses on it, with the bits of their networks: of a local interface."""
    guest_addresses: tuple[str, ...] = ()
    """The guest's addresses, assigned or self-configured."""
    forwards: tuple[ForwardInfo, ...] = ()
    received: int = 0
    """Bytes that the guest has received since the host's side was made; likewise the next ones."""
    received_packets: int = 0
    sent: int = 0
    sent_packets: int = 0
    dropped: int = 0
    """Frames that the guest had no room for."""
    problem: str = ""
    """The part that fails and the reason, in one line."""


class DiskInfo(Part, frozen=True, kw_only=True, forbid_unknown_fields=False, omit_defaults=False):
    """A disk of a VM, as it is configured."""

    path: str
    format: str = ""
    is_read_only: bool = False
    is_snapshot: bool = False
    serial: str = ""


class EndInfo(Part, frozen=True, kw_only=True, forbid_unknown_fields=False, omit_defaults=False):
    """How a VM ended the last time, `at` seconds since 1970-01-01 UTC."""

    at: float
    reason: EndCause
    message: str = ""
    exit: int | None = None
    """Its process's exit status, or minus the number of a signal; null if there was no process."""
    started_at: float | None = None
    """When its guest had begun to run; null if it never did."""


class VmInfo(Part, frozen=True, kw_only=True, forbid_unknown_fields=False, omit_defaults=False):
    """A VM as `vmctl status` shows it."""

    id: int
    name: str
    state: State
    cpus: int
    memory: int
    """Bytes that the guest has at most."""
    memory_used: int | None = None
    """Bytes of the host's memory that it holds now."""
    pid: int | None = None
    tty: str = ""
    """Path of the console; empty if there is none."""
    pause_reason: str = ""
    """Why it paused itself: `no space` or `I/O error`, of a disk;
    `in doubt` if it was handed over and may run elsewhere. `held by the kernel` if it was killed,
    and its processes wait for a file system."""
    uid: int = 0
    """Of the owner."""
    gid: int | None = None
    """Of the owning group, if there is one."""
    is_from_config: bool = False
    started_at: float | None = None
    """Seconds since 1970-01-01 UTC."""
    clone_of: str = ""
    """The VM that it is a clone of, by its name then."""
    is_template: bool = False
    has_tpm: bool = False
    after: tuple[str, ...] = ()
    """VMs that start before it, and stop after it."""
    last_end: EndInfo | None = None
    """How it ended the last time, if it has run since the daemon started."""
    statistics: Statistics | None = None
    interfaces: tuple[InterfaceInfo, ...] = ()
    """If they are asked for, as what follows."""
    boot: str = ""
    """The kernel or firmware: a path, `bios` or `uefi`."""
    append: str | None = None
    disks: tuple[DiskInfo, ...] = ()
    cdrom: str = ""
    shares: tuple[ShareInfo, ...] = ()


class Vms(Answer, frozen=True, kw_only=True):
    """VMs: running ones first, latest first; then the others in order of registration."""

    vms: tuple[VmInfo, ...]
    has_more: bool = False
    """Another part follows."""


class SourceIs(Answer, frozen=True, kw_only=True):
    """Where the daemon reads its configuration."""

    path: str
    directory: str = ""
    """Where files of single VMs go, `vm.conf.d` beside it; empty if it does not include them."""


class LogLine(Part, frozen=True, kw_only=True, forbid_unknown_fields=False, omit_defaults=False):
    """A line that was logged of a VM, `at` seconds since 1970-01-01 UTC."""

    at: float
    text: str


class Lines(Answer, frozen=True, kw_only=True):
    """The latest log lines of a VM."""

    lines: tuple[LogLine, ...]
    position: int
    """How many lines there have been in all; those before `lines` are lost."""


class Totals(Answer, frozen=True, kw_only=True):
    """The daemon's counts since its start."""

    starts: int
    """VMs whose guests ran; a reboot is one more."""
    failed_starts: int
    start_seconds: float
    """The total duration of `starts`, each from the VM's turn until its guest ran."""
    start_bounds: tuple[float, ...]
    """Upper bounds, in seconds, of classes of durations."""
    start_counts: tuple[int, ...]
    """How many starts are in each class; the last is of those above all bounds."""


class Event(Answer, frozen=True, kw_only=True):
    """Something has happened to a VM."""

    kind: EventKind
    id: int
    name: str
    at: float
    """Seconds since 1970-01-01 UTC."""
    message: str = ""
    """The reason, in one line, if there is one."""


_Transferred = Cloned | SnapshotList | SnapshotOpened
_AnswersOfVms = Started | Terminated | ConsoleOpened | Connected | Vms | Lines | _Transferred
AnyAnswer = Done | Failed | _AnswersOfVms | SourceIs | Totals | Event

ANSWER_MAX = 128 << 10
"""Bytes of one answer."""
PART_MAX = 48 << 10
"""Bytes of the VMs that a `vms` holds, unless it holds one alone: a longer list comes in parts."""

DAEMON_TO_CLIENT: Wire[AnyAnswer, AnyRequest] = Wire(AnyRequest, WireEncoding.JSON)
CLIENT_TO_DAEMON: Wire[AnyRequest, AnyAnswer] = Wire(AnyAnswer, WireEncoding.JSON)
