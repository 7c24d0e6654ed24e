"""Requests about VMs that leave the daemon or come to it; part of `messages`."""

from typing import Annotated

import msgspec

from vmd.wire.parts import DiskRequest, Index, Part, Path, Request, Size, VmRequest, Word
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
    """Make a VM of a stream, and let it continue; root only. Answered by `started` once it runs.

    The client has read the beginning of the stream, `manifest`, and names here the VM's resources
    on this host; it opens the files, or the daemon does with its rights, as for `start`.
    """

    name: Word
    """The VM's from now on."""
    stream: Index
    """Index of the descriptor of a pipe, socket or file; the next byte is the first one behind the
    manifest."""
    manifest: Annotated[str, msgspec.Meta(max_length=65536)]
    """The text of the stream's manifest."""
    stays_paused: bool = False
    uid: Annotated[int, msgspec.Meta(ge=0, le=0xFFFF_FFFE)] | None = None
    """Owner; None for the client."""
    gid: Annotated[int, msgspec.Meta(ge=0, le=0xFFFF_FFFE)] | None = None
    memory: Size
    """Bytes."""
    cpus: Annotated[int, msgspec.Meta(ge=1, le=0xFFFF)]
    disks: Annotated[tuple[DiskRequest, ...], msgspec.Meta(max_length=64)] = ()
    """Their locks may be held by the VM that is sent, until all of it is."""
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
