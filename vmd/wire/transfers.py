"""Messages about VMs that leave the daemon, or come to it: for `messages` and `internal`."""

from typing import Annotated

import msgspec

from vmd.config.model import GuestClock
from vmd.wire.parts import Answer, DiskRequest, Index, Part, Path, Request, Size, VmRequest, Word
from vmm_kvm.boot_device import BootDevice
from vmm_kvm.limits import MTU_DEFAULT, MTU_MAX, MTU_MIN, QUEUE_PAIRS_MAX


class Send(VmRequest, frozen=True, kw_only=True):
    """Write a VM into a stream, and end it; root only. Answered by `done` when all is written.

    It is paused towards the end. If it cannot be written, it continues. A client that disconnects
    before the answer cancels the sending.
    """

    stream: Index
    """Index of the descriptor of a pipe, socket or file, open for writing; a pipe does not block
    (O_NONBLOCK)."""
    keeps_running: bool = False
    """It does not end, but continues after it is written."""
    replies: Index | None = None
    """Index of the descriptor with the receiver's messages, if the VM is handed over: a pipe or
    socket, open for reading. It ends when it runs there."""
    downtime_ms: Annotated[int, msgspec.Meta(ge=0, le=3_600_000)] = 300
    """How long it may be paused for the end of it; if it is handed over."""
    timeout_s: Annotated[int, msgspec.Meta(ge=0, le=604_800)] = 0
    """How long to wait until that is enough; 0 for ever."""
    forces: bool = False
    """It is then paused for as long as it takes, instead of not being handed over."""
    copies_storage: bool = False
    """Disks that the receiver lacks are copied to it; if the VM is handed over."""


class ReceivedInterface(Part, frozen=True, kw_only=True):
    """A network interface of a VM to be received."""

    lladdr: Word
    """The guest knows it for good."""
    is_local: bool = False
    switch: Word = ""
    group: Word = ""
    rdomain: Annotated[int, msgspec.Meta(ge=0, le=255)] | None = None
    is_locked: bool = False
    is_up: bool = True
    mtu: Annotated[int, msgspec.Meta(ge=MTU_MIN, le=MTU_MAX)] = MTU_DEFAULT
    queues: Annotated[int, msgspec.Meta(ge=1, le=QUEUE_PAIRS_MAX)] = 1


class Receive(Request, frozen=True, kw_only=True):
    """Make a VM of a stream or a snapshot, and let it continue; a stream is for root only.

    Answered by `started` once it runs. The client has read the beginning, `manifest`, and names
    here the VM's needs of this host; the client opens files, or the daemon with the client's
    rights, as for `start`.

    A copy of a snapshot may have the name of a stopped VM: it then follows that VM's
    configuration, with the snapshot's memory and the disks that are in it, until it ends. For
    users other than root that is one of theirs, or the copy is like `source`. Both must agree with
    the request; files that the snapshot lacks are opened as those VMs' are.
    """

    name: Word
    """The VM's from now on."""
    source: Word = ""
    """The VM that the snapshot was made of."""
    stream: Index
    """Index of the descriptor of a pipe, socket or file; the next byte is the first one behind the
    manifest. Of a snapshot the file."""
    is_snapshot: bool = False
    """It is a snapshot: it is mapped, and may be started any number of times."""
    is_copy: bool = False
    """It is another machine from now on, and its guest is told so."""
    clock: GuestClock | None = None
    """None: for a copy as the configuration has it, else the host's time."""
    manifest: Annotated[str, msgspec.Meta(max_length=65536)]
    """The text of the stream's manifest."""
    stays_paused: bool = False
    replies: Index | None = None
    """Index of the descriptor for messages to the sender, if the VM is handed over: a pipe or
    socket, open for writing. It does not run before the sender has released it."""
    uid: Annotated[int, msgspec.Meta(ge=0, le=0xFFFF_FFFE)] | None = None
    """Owner; None for the client."""
    gid: Annotated[int, msgspec.Meta(ge=0, le=0xFFFF_FFFE)] | None = None
    memory: Size
    """Bytes."""
    cpus: Annotated[int, msgspec.Meta(ge=1, le=0xFFFF)]
    disks: Annotated[tuple[DiskRequest, ...], msgspec.Meta(max_length=64)] = ()
    """Of a stream, their locks may be held by the VM that is sent, until all of it is."""
    interfaces: Annotated[tuple[ReceivedInterface, ...], msgspec.Meta(max_length=64)] = ()
    cdrom: Path = ""
    cdrom_image: Index | None = None
    boot: Path = ""
    """Absolute path of the kernel or firmware image that it boots when it reboots."""
    firmware: Path = ""
    """`bios`, `uefi` or a path, if there is no image."""
    initrd: Annotated[tuple[Path, ...], msgspec.Meta(max_length=32)] = ()
    append: Path | None = None
    boot_device: BootDevice = BootDevice.AUTO
    has_vsock: bool = False
    has_balloon: bool = False
    has_watchdog: bool = False


class Snapshot(VmRequest, frozen=True, kw_only=True):
    """Write a VM into a snapshot, and let it continue; answered by `done` when all is written.

    It stands still meanwhile. For its owner if the VM has `allow snapshot`, and for root. A client
    that leaves before the answer does not want it.
    """

    snapshot: Word = ""
    """Its name in the daemon's store, where there is none of this name; of no meaning with a
    file."""
    file: Index | None = None
    """Index of the descriptor of a regular file, open for writing: the snapshot goes there. The
    file's former contents are lost."""
    without_disks: bool = False
    """The disks that the VM writes are not in it."""


class Snapshots(Request, frozen=True, kw_only=True):
    """List the client's snapshots in the daemon's store; answered by `snapshot-list`."""


class OpenSnapshot(Request, frozen=True, kw_only=True):
    """Open one of the client's snapshots; answered by `snapshot-opened`."""

    snapshot: Word


class RemoveSnapshot(Request, frozen=True, kw_only=True):
    """Remove one of the client's snapshots; answered by `done`. VMs made of it run on."""

    snapshot: Word


StoreRequest = Snapshots | OpenSnapshot | RemoveSnapshot


class SnapshotInfo(
    Part, frozen=True, kw_only=True, forbid_unknown_fields=False, omit_defaults=False
):
    """A snapshot in the store."""

    name: str
    created_at: float
    """Seconds since 1970-01-01 UTC."""
    size: int
    """Bytes of the host's storage."""


class SnapshotList(Answer, frozen=True, kw_only=True):
    """The client's snapshots, the latest first."""

    snapshots: tuple[SnapshotInfo, ...]


class SnapshotOpened(Answer, frozen=True, kw_only=True):
    """A snapshot's file, for reading."""

    file: int = 0
    """Index of its descriptor."""


CLONES_MAX = 256
"""Clones of one request."""


class Clone(VmRequest, frozen=True, kw_only=True):
    """Make VMs that continue from the state of one, and let them run; for its owner and root.

    Answered by `cloned` once each runs or has failed; by `failed`, and then none was made, if one
    of them cannot be. A VM that runs is copied while it does, if its memory allows, or else stands
    still until its memory is copied. A template has to be paused.
    """

    clone: Word
    """The name of the clone; where `%d` stands in it, the lowest numbers that are free."""
    count: Annotated[int, msgspec.Meta(ge=1, le=CLONES_MAX)] = 1


class ClonedVm(Part, frozen=True, kw_only=True, forbid_unknown_fields=False, omit_defaults=False):
    """A clone, or the reason for which there is none of that name."""

    name: str
    id: int = 0
    """0 if it does not run."""
    pid: int = 0
    tty: str = ""
    code: str = ""
    """Why it does not run, as `failed` says it; empty if it does."""
    message: str = ""


class Cloned(Answer, frozen=True, kw_only=True):
    """Clones run, or some do."""

    vms: tuple[ClonedVm, ...]


# Messages between the daemon's processes about them


class ReceivedSpec(Part, frozen=True, kw_only=True):
    """Where a VM comes from that is received."""

    stream: int
    """Index of the descriptor of its stream, of which the manifest has been read, or of a
    snapshot's file."""
    manifest: str
    stays_paused: bool
    is_snapshot: bool = False
    memory: int | None = None
    """Index of the descriptor of RAM, if that is no part of the stream, which is then unread: it
    is a clone."""
    is_copy: bool = False
    """Its guest is to be told that it is another machine."""
    clock: GuestClock = GuestClock.NOW
    replies: int | None = None
    """Index of the descriptor for messages to the sender, if it hands the VM over."""


class SentBoot(Part, frozen=True, kw_only=True):
    """The boot files of a VM that is sent, as they are configured."""

    image: str | None
    firmware: str | None
    initrd: tuple[str, ...]
    append: str | None
