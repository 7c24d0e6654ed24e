"""What a snapshot says of itself before anything else: which machine it is, and of what host.

Whoever receives it has to know that much before there is a machine: which disks to open, how much
memory to get, whether the processor will do. It is small, and JSON, so that people read it too.

The receiver believes none of it: every field is bounded here, and files and networks are judged
anew with the rights of the user that receives.
"""

from typing import NamedTuple

from vmm_kvm.errors import SnapshotError
from vmm_kvm.limits import (
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
from vmm_kvm.snapshot.objects import Object, dump, integers, parse
from vmm_kvm.state import Json

MAJOR, MINOR = 1, 0
"""Of the format. Minor versions add fields; a reader knows every minor version of its major one."""
MANIFEST_MAX = 64 << 10
"""Bytes of the text."""
STATE_MAX = 128 << 20
"""Bytes of the state of all devices and vCPUs, firmware included."""
REGIONS_MAX = 8
DISKS_MAX = 32
INTERFACES_MAX = 32

_PATH_MAX = 4096
_WORD_MAX = 255
_U32, _U64 = (1 << 32) - 1, (1 << 64) - 1
_ID_MAX = (1 << 32) - 2


class Host(NamedTuple):
    """Where the snapshot was made; for people."""

    kernel: str
    """Release of the host's kernel."""
    tsc_khz: int
    """Rate of the guest's time-stamp counter; 0 if it is unknown."""


class Disk(NamedTuple):
    """A disk, which is not in the snapshot: it has to be there as it was."""

    path: str
    kind: str
    """What stands in front of the colon on a command line; empty for an image of any format."""
    serial: str = ""
    queues: int = 1
    is_read_only: bool = False
    is_private: bool = False
    """What the guest writes is in its memory alone; of a disk that is memory."""
    is_process: bool = False
    """A process of its own serves it, though the user might have had it otherwise."""


class Interface(NamedTuple):
    """A network interface: the lladdr is the guest's for good, the rest how it was configured."""

    lladdr: str
    mtu: int
    queues: int = 1
    is_local: bool = False
    switch: str | None = None
    group: str | None = None
    rdomain: int | None = None
    is_locked: bool = False
    is_up: bool = True
    text: str = ""
    """How it was asked for on the command line of `vmctl run`."""


class Boot(NamedTuple):
    """What the guest was booted from, and is again when it reboots."""

    image: str | None = None
    """Path of a kernel or firmware image."""
    firmware: str | None = None
    """`bios`, `uefi` or a path, where there is no image."""
    initrd: tuple[str, ...] = ()
    append: str | None = None
    device: str = "auto"


class Firmware(NamedTuple):
    """The firmware that the guest sees below 4 GiB; its bytes are the blob `rom`."""

    name: str
    """For messages."""
    size: int
    """Bytes that came from its file."""


class Manifest(NamedTuple):
    """A snapshot's description of itself."""

    name: str
    """Of the VM that it was made of."""
    memory_size: int
    """Bytes of RAM."""
    cpus: int
    regions: tuple[tuple[int, int], ...]
    """Of RAM: guest-physical address and bytes of each, ascending."""
    state_size: int
    """Bytes of the state that follows."""
    created_ns: int
    """Nanoseconds since 1970-01-01 UTC."""
    host: Host
    cpuid: tuple[CpuidRecord, ...]
    """What the receiver's processor is held against."""
    uid: int | None = None
    """Owner of the VM, on its host."""
    gid: int | None = None
    uuid: bytes | None = None
    """Of the system, sixteen bytes; None for one that is made of the name."""
    serial: str = ""
    """Serial number of the system."""
    boot: Boot = Boot()
    firmware: Firmware | None = None
    """None if the guest is without: it was booted from a kernel."""
    disks: tuple[Disk, ...] = ()
    cdrom: str | None = None
    """Path of the image in the CD-ROM drive; None if there is no drive."""
    interfaces: tuple[Interface, ...] = ()
    has_console: bool = False
    """It has a virtio console."""
    minor: int = MINOR


def encode(manifest: Manifest) -> bytes:
    """Return the text of a manifest, which `decode` reads.

    Raises:
        SnapshotError: something in it is out of range, or it is too large: such a machine cannot
            be written down.
    """
    boot, firmware = manifest.boot, manifest.firmware
    text = dump(
        {
            "format": [MAJOR, manifest.minor],
            "name": manifest.name,
            "created_ns": manifest.created_ns,
            "host": {"kernel": manifest.host.kernel, "tsc_khz": manifest.host.tsc_khz},
            "cpuid": [list(record) for record in manifest.cpuid],
            "owner": {"uid": manifest.uid, "gid": manifest.gid},
            "memory_size": manifest.memory_size,
            "cpus": manifest.cpus,
            "regions": [list(region) for region in manifest.regions],
            "state_size": manifest.state_size,
            "uuid": None if manifest.uuid is None else manifest.uuid.hex(),
            "serial": manifest.serial,
            "boot": {
                "image": boot.image,
                "firmware": boot.firmware,
                "initrd": list(boot.initrd),
                "append": boot.append,
                "device": boot.device,
            },
            "firmware": None
            if firmware is None
            else {"name": firmware.name, "size": firmware.size},
            "disks": [_plain(disk._asdict()) for disk in manifest.disks],
            "cdrom": manifest.cdrom,
            "interfaces": [_plain(each._asdict()) for each in manifest.interfaces],
            "has_console": manifest.has_console,
        }
    )
    if decode(text) != manifest:
        raise SnapshotError(f"{manifest.name}: cannot be described in a snapshot")
    return text


def _plain(fields: dict[str, Json]) -> Json:
    return fields


def decode(text: bytes) -> Manifest:
    """Return the manifest that a text describes.

    Raises:
        SnapshotError: it is none, of another major version, or out of range.
    """
    if len(text) > MANIFEST_MAX:
        raise SnapshotError(f"manifest: {len(text)} bytes, at most {MANIFEST_MAX} are possible")
    with Object(parse(text, "manifest"), "manifest") as fields:
        major, minor = fields.integers("format", (_U32, _U32))
        if major != MAJOR:
            raise SnapshotError(
                f"incompatible dump version: {major}.{minor}, this program reads {MAJOR}.x"
            )
        with Object(fields.take("host"), "manifest: host") as of_host:
            host = Host(of_host.text("kernel", _WORD_MAX), of_host.integer("tsc_khz", 0, _U32))
        with Object(fields.take("owner"), "manifest: owner") as of_owner:
            uid = of_owner.optional_integer("uid", 0, _ID_MAX)
            gid = of_owner.optional_integer("gid", 0, _ID_MAX)
        name = fields.text("name", NAME_MAX)
        memory_size = fields.integer("memory_size", MEMORY_MIN, MEMORY_MAX)
        manifest = Manifest(
            name=name,
            memory_size=memory_size,
            cpus=fields.integer("cpus", 1, VCPUS_MAX),
            regions=_regions(fields.items("regions", REGIONS_MAX), memory_size),
            state_size=fields.integer("state_size", 0, STATE_MAX),
            created_ns=fields.integer("created_ns", 0, _U64 >> 1),
            host=host,
            cpuid=tuple(
                CpuidRecord(*integers(one, "manifest: cpuid", (_U32,) * len(CpuidRecord._fields)))
                for one in fields.items("cpuid", CPUID_RECORDS)
            ),
            uid=uid,
            gid=gid,
            uuid=_uuid(fields),
            serial=fields.text("serial", _WORD_MAX),
            boot=_boot(fields.take("boot")),
            firmware=_firmware(fields.take("firmware")),
            disks=tuple(map(_disk, fields.items("disks", DISKS_MAX))),
            cdrom=fields.optional_text("cdrom", _PATH_MAX),
            interfaces=tuple(map(_interface, fields.items("interfaces", INTERFACES_MAX))),
            has_console=fields.flag("has_console"),
            minor=minor,
        )
        if minor > MINOR:  # what it adds is nothing that this version has to know
            fields.forget_rest()
    return manifest


def _regions(found: list[Json], memory_size: int) -> tuple[tuple[int, int], ...]:
    regions = []
    end = total = 0
    for one in found:
        gpa, size = integers(one, "manifest: regions", (MEMORY_MAX * 2, MEMORY_MAX))
        if gpa < end or not size or (gpa | size) % 4096:
            raise SnapshotError("manifest: regions: not ascending, empty or not page aligned")
        regions.append((gpa, size))
        end = gpa + size
        total += size
    if total != memory_size:
        raise SnapshotError(f"manifest: regions: {total} bytes of {memory_size}")
    return tuple(regions)


def _uuid(fields: Object) -> bytes | None:
    text = fields.optional_text("uuid", 32)
    if text is None:
        return None
    try:
        value = bytes.fromhex(text)
    except ValueError:
        value = b""
    if len(value) != 16 or value.hex() != text:
        raise SnapshotError("manifest: uuid: not sixteen bytes")
    return value


def _boot(value: Json) -> Boot:
    what = "manifest: boot"
    with Object(value, what) as fields:
        return Boot(
            image=fields.optional_text("image", _PATH_MAX),
            firmware=fields.optional_text("firmware", _PATH_MAX),
            initrd=tuple(_path(one, f"{what}: initrd") for one in fields.items("initrd", 32)),
            append=fields.optional_text("append", _PATH_MAX),
            device=fields.text("device", _WORD_MAX),
        )


def _path(value: Json, what: str) -> str:
    if not isinstance(value, str) or not 0 < len(value) <= _PATH_MAX or not value.isprintable():
        raise SnapshotError(f"{what}: not a path")
    return value


def _firmware(value: Json) -> Firmware | None:
    if value is None:
        return None
    with Object(value, "manifest: firmware") as fields:
        return Firmware(fields.text("name", _PATH_MAX), fields.integer("size", 16, FIRMWARE_MAX))


def _disk(value: Json) -> Disk:
    with Object(value, "manifest: disks") as fields:
        return Disk(
            path=_path(fields.take("path"), "manifest: disks"),
            kind=fields.text("kind", _WORD_MAX),
            serial=fields.text("serial", DISK_SERIAL_MAX),
            queues=fields.integer("queues", 1, DISK_QUEUES_MAX),
            is_read_only=fields.flag("is_read_only"),
            is_private=fields.flag("is_private"),
            is_process=fields.flag("is_process"),
        )


def _interface(value: Json) -> Interface:
    with Object(value, "manifest: interfaces") as fields:
        return Interface(
            lladdr=fields.text("lladdr", _WORD_MAX),
            mtu=fields.integer("mtu", MTU_MIN, MTU_MAX),
            queues=fields.integer("queues", 1, QUEUE_PAIRS_MAX),
            is_local=fields.flag("is_local"),
            switch=fields.optional_text("switch", _WORD_MAX),
            group=fields.optional_text("group", _WORD_MAX),
            rdomain=fields.optional_integer("rdomain", 0, _WORD_MAX),
            is_locked=fields.flag("is_locked"),
            is_up=fields.flag("is_up"),
            text=fields.text("text", _PATH_MAX),
        )
