"""Parts of the control protocol's messages, and the fields of all requests."""

from typing import Annotated

import msgspec

from vmd.config.disks import OnError
from vmm_kvm.limits import PORT_MAX

TEXT_MAX = 16384
"""Characters of what a VM process says of its end: some paths, and why."""

PROTOCOL_VERSION = 1

VmId = Annotated[int, msgspec.Meta(ge=0, le=0xFFFF_FFFF)]
Word = Annotated[str, msgspec.Meta(max_length=255)]
"""A name; policy decides whether it is valid."""
WITHOUT_NULL = r"^[^\x00]*$"
Path = Annotated[str, msgspec.Meta(max_length=4096, pattern=WITHOUT_NULL)]
"""No system call takes a name with a null character."""
Size = Annotated[int, msgspec.Meta(ge=0, le=1 << 62)]
"""Bytes."""
Port = Annotated[int, msgspec.Meta(ge=1, le=PORT_MAX)]
Index = Annotated[int, msgspec.Meta(ge=0, le=252)]
"""Index of a descriptor among those that came with the message."""


class Part(
    msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True
):
    """A part of a message."""


class Moved(Part, frozen=True, kw_only=True, forbid_unknown_fields=False, omit_defaults=False):
    """A device's traffic since its VM's process began, in bytes."""

    index: int
    """Index of the device among those of its kind in the VM's configuration."""
    to_guest: int
    from_guest: int


class Exits(Part, frozen=True, kw_only=True, forbid_unknown_fields=False, omit_defaults=False):
    """How often a guest was left for a reason."""

    reason: str
    count: int


class MemoryUse(Part, frozen=True, kw_only=True, forbid_unknown_fields=False, omit_defaults=False):
    """How a guest uses its memory, as its driver says; bytes. None: it does not tell."""

    total: int | None = None
    free: int | None = None
    available: int | None = None
    """Memory available without swapping."""
    caches: int | None = None
    """Of files."""
    swapped_in: int | None = None
    swapped_out: int | None = None
    major_faults: int | None = None
    """A count."""


class Statistics(Part, frozen=True, kw_only=True, forbid_unknown_fields=False, omit_defaults=False):
    """A VM's use since its process began."""

    cpu_ns: int = 0
    """Processor time of all its processes, in nanoseconds."""
    disk_read: int = 0
    """Bytes."""
    disk_written: int = 0
    net_received: int = 0
    net_sent: int = 0
    disks: tuple[Moved, ...] = ()
    """Those whose transfers this daemon counts."""
    streams: tuple[Moved, ...] = ()
    """Interfaces whose frames go to passt: the VM's process counts them."""
    exits: tuple[Exits, ...] = ()
    """How often the guest was left, as KVM counts."""
    guest_memory: MemoryUse | None = None
    """What the guest said last, if it has a memory balloon and a driver of it. It is asked each
    time, and its answer told the next time."""
    given_back: int | None = None
    """Bytes of memory that the guest freed and the host took back; None without a balloon."""


def tag_of(name: str) -> str:
    """`ConsoleOpened` is `console-opened` on the wire."""
    return "".join(f"-{char.lower()}" if char.isupper() else char for char in name).lstrip("-")


class Request(
    msgspec.Struct,
    frozen=True,
    kw_only=True,
    forbid_unknown_fields=True,
    omit_defaults=True,
    tag=tag_of,
):
    """The part of every request."""

    serial: Size = 0
    """The client's own number for it, which its answer repeats."""
    version: Size = PROTOCOL_VERSION
    """Of the protocol."""


class Internal(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag=True):
    """A message between processes of the daemon."""


class Answer(msgspec.Struct, frozen=True, kw_only=True, tag=tag_of):
    """The part of every answer. A client ignores fields that it does not know."""

    serial: int = 0
    """The request's."""


class VmRequest(Request, frozen=True, kw_only=True):
    """A request about one VM, named by its id, or by its name where the id is 0."""

    id: VmId = 0
    """The VM's; 0 where it is named."""
    name: Word = ""
    """The VM's; of no meaning where there is an id."""


class ShareRequest(Part, frozen=True, kw_only=True):
    """A directory that a VM to start shares; all in it is done with the client's rights."""

    path: Path
    """Absolute; for messages alone if `directory` is given."""
    tag: Annotated[str, msgspec.Meta(min_length=1, max_length=36, pattern=WITHOUT_NULL)]
    """By which the guest mounts it; at most 36 bytes."""
    directory: Index | None = None
    """Index of the descriptor of the directory."""
    is_read_only: bool = False


class ShareInfo(Part, frozen=True, kw_only=True, forbid_unknown_fields=False, omit_defaults=False):
    """A shared directory of a VM, as it is configured."""

    path: str
    """Of the directory, or of the socket of a server."""
    tag: str
    is_read_only: bool = False
    is_server: bool = False
    """A vhost-user server has it, and decides what may be written."""


class DiskRequest(Part, frozen=True, kw_only=True):
    """A disk of a VM to start; one without descriptors is opened with the client's rights."""

    path: Path
    """Absolute; for messages alone if `chain` is given."""
    chain: Annotated[tuple[Index, ...], msgspec.Meta(max_length=4)] = ()
    """Indices of descriptors: the image, open for reading and writing or, if it is only read, for
    reading; then, for reading, its base, that one's base, and so on."""
    format: Word = ""
    """`raw` or `qcow2`; probed if empty. For a received VM also `pmem` or `vhost-user`."""
    is_read_only: bool = False
    serial: Word = ""
    """The disk's identity for the guest; at most 20 bytes."""
    queues: Annotated[int, msgspec.Meta(ge=1, le=64)] = 1
    error: OnError | None = None
    """If the host cannot read or write it: pause the VM, the default, or report to the guest."""
    is_private: bool = False
    """(`pmem`) The guest's writes stay in its memory."""
    is_snapshot: bool = False
    window: tuple[Size, Size] | None = None
    """The part of a raw image that is the disk: where it begins, and its size in bytes; of one that
    is only read."""
    """The guest's writes go to a file without a name, until the VM ends; the image is only read."""
