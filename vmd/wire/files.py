"""What the parent and an opener say to each other: files of a client, for one start of a VM."""

from enum import StrEnum

from vmd.config.disks import DiskKind
from vmd.wire.encoding import Wire, WireEncoding
from vmd.wire.internal import Internal
from vmd.wire.messages import ErrorCode
from vmd.wire.parts import Part


class FileUse(StrEnum):
    """What a file is to be for a VM."""

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
    """Where it is; for messages alone, where descriptors came along."""
    passed: tuple[int, ...] = ()
    """Indices of descriptors: the file, as it was opened already, then a disk's bases."""
    follows_bases: bool = False
    """Bases of which no descriptor came along are opened by name."""
    writes: bool = False
    format: DiskKind = DiskKind.PROBE
    """Of a disk."""
    locks: bool = True
    """A disk is locked now. Not where the lock may be another's until the VM has been received."""


class FoundFile(Part, frozen=True, kw_only=True):
    """A file that was wanted: what it has to be, a disk locked unless that was not wanted."""

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
    """One of the files is not to be had; the message is one line."""

    code: ErrorCode
    message: str


OpenerToParent = FilesOpened | OpeningFailed

PARENT_AND_OPENER: Wire[OpenFiles, OpenerToParent] = Wire(OpenerToParent, WireEncoding.MSGPACK)
OPENER_AND_PARENT: Wire[OpenerToParent, OpenFiles] = Wire(OpenFiles, WireEncoding.MSGPACK)
