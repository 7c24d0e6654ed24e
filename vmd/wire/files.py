"""Messages between the parent and an opener: files of a client, for one start of a VM."""

from enum import StrEnum

from vmd.config.disks import DiskKind
from vmd.wire.encoding import Wire, WireEncoding
from vmd.wire.messages import ErrorCode
from vmd.wire.parts import Internal, Part


class FileUse(StrEnum):
    """A file's use for a VM."""

    BOOT = "boot image"
    FIRMWARE = "firmware"
    INITRD = "initrd"
    CDROM = "cdrom"
    DISK = "disk"
    MEMORY = "memory"
    """A disk that the guest has as memory."""


class WantedFile(Part, frozen=True, kw_only=True):
    """A file that a VM needs."""

    use: FileUse
    path: str
    """Its path; for messages alone if descriptors came along."""
    passed: tuple[int, ...] = ()
    """Indices of descriptors: the file, already opened, then a disk's bases."""
    follows_bases: bool = False
    """Bases without a descriptor are opened by name."""
    writes: bool = False
    format: DiskKind = DiskKind.PROBE
    """Of a disk."""
    locks: bool = True
    """Whether a disk is locked now; not if another VM may hold the lock until this one has been
    received."""


class FoundFile(Part, frozen=True, kw_only=True):
    """A requested file: checked, and a disk locked if requested."""

    chain: tuple[int, ...]
    """Indices of descriptors: the file, then a disk's bases."""
    formats: tuple[DiskKind, ...] = ()
    """Of each file of a disk, raw or qcow2."""
    stamp: str = ""
    """Of a boot image: the state in which it was; empty if a change might not show in it."""


class OpenFiles(Internal, frozen=True, kw_only=True):
    """Open and judge these files, with the rights of the process; answered once."""

    files: tuple[WantedFile, ...]


class FilesOpened(Internal, frozen=True, kw_only=True):
    """Each of the files, in their order; their descriptors come along, in parcels."""

    files: tuple[FoundFile, ...]
    kept: tuple[int, ...] = ()
    """Indices of the parcels that the opener has made; their keepers come along as the last."""


class OpeningFailed(Internal, frozen=True, kw_only=True):
    """One of the files is unavailable; the message is one line."""

    code: ErrorCode
    message: str


OpenerToParent = FilesOpened | OpeningFailed

PARENT_AND_OPENER: Wire[OpenFiles, OpenerToParent] = Wire(OpenerToParent, WireEncoding.MSGPACK)
OPENER_AND_PARENT: Wire[OpenerToParent, OpenFiles] = Wire(OpenFiles, WireEncoding.MSGPACK)
