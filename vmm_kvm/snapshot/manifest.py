"""A snapshot's description at its beginning: its machine, and its host.

Whoever receives it has to know that much before there is a machine: which disks to open, how much
memory to get, whether the processor will do. It is small, and JSON, so that people read it too.

The receiver believes none of it: every field is bounded here, and files and networks are judged
anew with the rights of the user that receives.
"""

from typing import Annotated, NamedTuple

from vmm_kvm.bits import PAGE_SIZE
from vmm_kvm.errors import SnapshotError, StateError
from vmm_kvm.limits import (
    CID_MAX,
    CID_MIN,
    DISK_QUEUES_MAX,
    DISK_SERIAL_MAX,
    FIRMWARE_MAX,
    MEMORY_MAX,
    MEMORY_MIN,
    MTU_MAX,
    MTU_MIN,
    NAME_MAX,
    QUEUE_PAIRS_MAX,
    VCPUS_MAX,
)
from vmm_kvm.snapshot.cpu import CPUID_RECORDS, CpuidRecord
from vmm_kvm.snapshot.json_text import dump, parse
from vmm_kvm.state import U8, U32, Json, Length, Line, Range
from vmm_kvm.state import decode as decode_record
from vmm_kvm.state import encode as encode_record

MAJOR, MINOR = 1, 5
"""Of the format. Minor versions add fields; a reader knows every minor version of its major one.

A manifest is written as the least minor version that has the fields that it needs, for older
readers.
"""
MANIFEST_MAX = 64 << 10
"""Bytes of the text."""
STATE_MAX = 128 << 20
"""Bytes of the state of all devices and vCPUs, firmware included."""
REGIONS_MAX = 8
DISKS_MAX = 32
INTERFACES_MAX = 32

_INITRD_MAX = 32
_OFFSET_MAX = 1 << 60
_Long = Annotated[str, Line(0, 4096)]
_Path = Annotated[str, Line(1, 4096)]
_Word = Annotated[str, Line(0, 255)]
_Id = Annotated[int, Range(0, (1 << 32) - 2)]
_Kept = tuple[Annotated[int, Range(0, _OFFSET_MAX)], Annotated[int, Range(0, _OFFSET_MAX)]]
_Region = tuple[Annotated[int, Range(0, 2 * MEMORY_MAX)], Annotated[int, Range(1, MEMORY_MAX)]]


class Host(NamedTuple):
    """The place where the snapshot was made; for people."""

    kernel: _Word
    """Release of the host's kernel."""
    tsc_khz: U32
    """Rate of the guest's time-stamp counter; 0 if it is unknown."""


class Owner(NamedTuple):
    """The VM's owner, on its host."""

    uid: _Id | None
    gid: _Id | None


class Disk(NamedTuple):
    """A disk; one that is not in the snapshot has to be there as it was."""

    path: _Path
    kind: _Word
    """The part before the colon on a command line; empty for an image of any format."""
    serial: Annotated[str, Line(0, DISK_SERIAL_MAX)] = ""
    queues: Annotated[int, Range(1, DISK_QUEUES_MAX)] = 1
    is_read_only: bool = False
    is_private: bool = False
    """The guest's writes are in its memory alone; for a disk that is memory."""
    is_process: bool = False
    """A process of its own serves it, though the user might have had it otherwise."""


class Interface(NamedTuple):
    """A network interface: the lladdr is the guest's for good, the rest how it was configured."""

    lladdr: _Word
    mtu: Annotated[int, Range(MTU_MIN, MTU_MAX)]
    queues: Annotated[int, Range(1, QUEUE_PAIRS_MAX)] = 1
    is_local: bool = False
    switch: _Word | None = None
    group: _Word | None = None
    rdomain: U8 | None = None
    is_locked: bool = False
    is_up: bool = True
    text: _Long = ""
    """How it was asked for on the command line of `vmctl run`."""


class Boot(NamedTuple):
    """The image that the guest was booted from, and boots again at a reboot."""

    image: _Long | None = None
    """Path of a kernel or firmware image."""
    firmware: _Long | None = None
    """`bios`, `uefi` or a path, where there is no image."""
    initrd: Annotated[tuple[_Path, ...], Length(0, _INITRD_MAX)] = ()
    append: _Long | None = None
    device: _Word = "auto"


class Firmware(NamedTuple):
    """The firmware that the guest sees below 4 GiB; its bytes are the blob `rom`."""

    name: _Long
    """For messages."""
    size: Annotated[int, Range(16, FIRMWARE_MAX)]
    """Bytes that came from its file."""


class Manifest(NamedTuple):
    """A snapshot's description of itself."""

    name: Annotated[str, Line(0, NAME_MAX)]
    """Of the VM that it was made of."""
    created_ns: Annotated[int, Range(0, (1 << 63) - 1)]
    """Nanoseconds since 1970-01-01 UTC."""
    host: Host
    cpuid: Annotated[tuple[CpuidRecord, ...], Length(0, CPUID_RECORDS)]
    """The data that the receiver's processor is compared with."""
    owner: Owner
    memory_size: Annotated[int, Range(MEMORY_MIN, MEMORY_MAX)]
    """Bytes of RAM."""
    cpus: Annotated[int, Range(1, VCPUS_MAX)]
    regions: Annotated[tuple[_Region, ...], Length(0, REGIONS_MAX)]
    """Of RAM: guest-physical address and bytes of each, ascending."""
    state_size: Annotated[int, Range(0, STATE_MAX)]
    """Bytes of the state that follows."""
    uuid: Annotated[bytes, Length(16, 16)] | None = None
    """Of the system; None for one that is made of the name."""
    serial: _Word = ""
    """Serial number of the system."""
    boot: Boot = Boot()
    firmware: Firmware | None = None
    """None if the guest is without: it was booted from a kernel."""
    disks: Annotated[tuple[Disk, ...], Length(0, DISKS_MAX)] = ()
    cdrom: _Long | None = None
    """Path of the image in the CD-ROM drive; None if there is no drive."""
    interfaces: Annotated[tuple[Interface, ...], Length(0, INTERFACES_MAX)] = ()
    has_console: bool = False
    """It has a virtio console."""
    is_live: bool = False
    """RAM comes first in the stream, in rounds, and the state last."""
    vsock_cid: Annotated[int, Range(CID_MIN, CID_MAX)] | None = None
    """The guest's address by its vsock device; None if it has none."""
    kept: Annotated[tuple[_Kept | None, ...], Length(0, DISKS_MAX)] = ()
    """Of each disk that is in the snapshot's file as the guest reads it, its place and size."""
    has_balloon: bool = False
    """It has a memory balloon."""
    has_watchdog: bool = False
    """It has a watchdog."""
    minor: U32 = 0


class _Added(NamedTuple):
    field: str
    minor: int
    """The minor version that has it first."""
    default: Json
    """Its value in earlier versions."""


_ADDED = (
    _Added("is_live", 1, False),
    _Added("vsock_cid", 2, None),
    _Added("kept", 3, []),
    _Added("has_balloon", 4, False),
    _Added("has_watchdog", 5, False),
)


class _Version(NamedTuple):
    format: tuple[U32, U32]


def encode(manifest: Manifest) -> bytes:
    """Return the text of a manifest, which `decode` reads.

    Raises:
        SnapshotError: something in it is out of range, or it is too large: such a machine cannot
            be written down.
    """
    fields, _ = encode_record(manifest)
    needed = [each.minor for each in _ADDED if fields[each.field] != each.default]
    manifest = manifest._replace(minor=max(manifest.minor, *needed, 0))
    version: list[Json] = [MAJOR, manifest.minor]
    del fields["minor"]
    for each in _ADDED:
        if manifest.minor < each.minor:
            del fields[each.field]
    cpuid: list[Json] = [list(record) for record in manifest.cpuid]
    text = dump({"format": version, **fields, "cpuid": cpuid})
    if decode(text) != manifest:
        raise SnapshotError(f"{manifest.name}: cannot be described in a snapshot")
    return text


def decode(text: bytes) -> Manifest:
    """Return the manifest that a text describes.

    Raises:
        SnapshotError: it is none, of another major version, or out of range.
    """
    if len(text) > MANIFEST_MAX:
        raise SnapshotError(f"manifest: {len(text)} bytes, at most {MANIFEST_MAX} are possible")
    fields = parse(text, "manifest")
    try:
        manifest = _decode(fields)
    except StateError as err:
        raise SnapshotError(f"manifest: {err}") from err
    _check_regions(manifest)
    if manifest.kept and len(manifest.kept) != len(manifest.disks):
        raise SnapshotError("manifest: kept: not one for each disk")
    return manifest


def _decode(found: Json) -> Manifest:
    if not isinstance(found, dict):
        raise StateError("no object")
    version = {name: found.pop(name) for name in _Version._fields if name in found}
    major, minor = decode_record(_Version, version).format
    if major != MAJOR:
        raise SnapshotError(
            f"incompatible dump version: {major}.{minor}, this program reads {MAJOR}.x"
        )
    for each in _ADDED:
        if minor < each.minor:
            if each.field in found:
                raise StateError(f"{each.field}: not in format {major}.{minor}")
            found[each.field] = each.default
    if minor > MINOR:  # this version need not know the additions of a later one
        found = {name: value for name, value in found.items() if name in Manifest._fields}
    rows = found.get("cpuid")
    if isinstance(rows, list):
        found["cpuid"] = [_cpuid_fields(row) for row in rows]
    return decode_record(Manifest, {**found, "minor": minor})


def _cpuid_fields(row: Json) -> Json:
    """Return the fields of a record, which the text has as a list."""
    names = CpuidRecord._fields
    if not isinstance(row, list) or len(row) != len(names):
        return None
    return dict(zip(names, row, strict=True))


def _check_regions(manifest: Manifest) -> None:
    end = total = 0
    for gpa, size in manifest.regions:
        if gpa < end or (gpa | size) % PAGE_SIZE:
            raise SnapshotError("manifest: regions: not ascending, or not page aligned")
        end = gpa + size
        total += size
    if total != manifest.memory_size:
        raise SnapshotError(f"manifest: regions: {total} bytes of {manifest.memory_size}")
