"""The header of a qcow2 image: its checked fields, and the geometry that follows from it."""

import os
import struct
from enum import IntEnum, IntFlag
from typing import NamedTuple

from vmm_kvm.block.file import HostFile
from vmm_kvm.errors import ImageError

MAGIC = 0x514649FB
VERSION_3_LENGTH = 104
L1_BYTES_MAX = 32 << 20
"""The largest L1 table, and table of refcount blocks, that QEMU accepts."""
REFCOUNT_TABLE_BYTES_MAX = 8 << 20
SNAPSHOTS_MAX = 65536
BACKING_PATH_MAX = 1023
CLUSTER_BITS_MIN = 9
CLUSTER_BITS_MAX = 21
_SUBCLUSTER_BITS = 5  # 32 subclusters with extended L2 entries
_EXTENDED_CLUSTER_BITS_MIN = 14
_OFFSET_MAX = (1 << 63) - 1

VERSION_2 = struct.Struct(">IIQIIQIIQQIIQ")
VERSION_3 = struct.Struct(">QQQII")
EXTENSION = struct.Struct(">II")
_BITMAPS = struct.Struct(">IIQQ")
EXTENSION_BACKING_FORMAT = 0xE2792ACA
_EXTENSION_FEATURE_NAMES = 0x6803F857
_EXTENSION_BITMAPS = 0x23852875
_FEATURE_NAME_LENGTH = 48

INCOMPATIBLE_OFFSET = 72
AUTOCLEAR_OFFSET = 88
REFCOUNT_TABLE_FIELDS = struct.Struct(">QI")
REFCOUNT_TABLE_FIELDS_OFFSET = 48


class Incompatible(IntFlag):
    """Features that a program must know to open an image at all."""

    DIRTY = 1 << 0
    CORRUPT = 1 << 1
    EXTERNAL_DATA = 1 << 2
    COMPRESSION_TYPE = 1 << 3
    EXTENDED_L2 = 1 << 4


_SUPPORTED = int(
    Incompatible.DIRTY
    | Incompatible.CORRUPT
    | Incompatible.COMPRESSION_TYPE
    | Incompatible.EXTENDED_L2
)
_NAMES = {2: "external data file"}


class Compatible(IntFlag):
    """Features that may be ignored."""

    LAZY_REFCOUNTS = 1 << 0


class Autoclear(IntFlag):
    """Features that a program which does not know them clears before it writes."""

    BITMAPS = 1 << 0
    RAW_EXTERNAL_DATA = 1 << 1


class Compression(IntEnum):
    """How compressed clusters are compressed."""

    ZLIB = 0
    ZSTD = 1


_ENCRYPTION = {1: "AES", 2: "LUKS"}


class Backing(NamedTuple):
    """An overlay's reference to its base."""

    path: str
    """As it stands in the header: a relative one begins at the overlay's directory."""
    disk_format: str | None


class Bitmaps(NamedTuple):
    """The place of the directory of persistent bitmaps."""

    total: int
    size: int
    """Bytes."""
    offset: int


class Header(NamedTuple):
    """A header that has been checked; offsets in bytes from the start of the file."""

    version: int
    cluster_bits: int
    size: int
    """Of the disk, bytes, a multiple of 512."""
    l1_size: int
    """Entries."""
    l1_offset: int
    refcount_table_offset: int
    refcount_table_clusters: int
    snapshot_count: int
    snapshots_offset: int
    incompatible: Incompatible
    compatible: int
    autoclear: int
    refcount_bits: int
    length: int
    """Bytes, without extensions."""
    compression: Compression
    backing: Backing | None
    bitmaps: Bitmaps | None

    @property
    def cluster_size(self) -> int:
        """Bytes."""
        return 1 << self.cluster_bits

    @property
    def has_subclusters(self) -> bool:
        """Whether an L2 entry has two words, the second a bitmap of 32 subclusters."""
        return bool(self.incompatible & Incompatible.EXTENDED_L2)

    @property
    def l2_bits(self) -> int:
        """Binary logarithm of the entries in an L2 table."""
        return self.cluster_bits - (4 if self.has_subclusters else 3)

    @property
    def subcluster_bits(self) -> int:
        """Binary logarithm of the bytes in a subcluster; without them, in a cluster."""
        return self.cluster_bits - (_SUBCLUSTER_BITS if self.has_subclusters else 0)


def l1_entries(size: int, cluster_bits: int, l2_bits: int) -> int:
    """Return how many L1 entries a disk of `size` bytes needs."""
    return -(-size >> (cluster_bits + l2_bits))


def read_header(file: HostFile) -> Header:
    """Read and check the header of the image in `file`.

    Raises:
        ImageError: it is not a qcow2 image, uses an unsupported feature, or is corrupt.
        OSError: it cannot be read.

    Source: qcow2 specification, "Header".
    """
    size = min(file.size(), 1 << CLUSTER_BITS_MIN)
    data = bytes(file.read(0, size))
    if len(data) >= VERSION_2.size:
        cluster_bits = VERSION_2.unpack_from(data)[4]
        if CLUSTER_BITS_MIN < cluster_bits <= CLUSTER_BITS_MAX:
            data = bytes(file.read(0, min(file.size(), 1 << cluster_bits)))
    try:
        header = parse_header(data)
        _check_fits(header, file.size())
    except ImageError as err:
        raise ImageError(f"{file.name}: {err}") from err
    return header


def _check_fits(header: Header, file_size: int) -> None:
    if header.l1_offset + header.l1_size * 8 > file_size:
        raise ImageError("unable to read qcow2 L1 table: past the end of the file")
    if header.refcount_table_offset >= file_size:
        raise ImageError("refcount table past the end of the file")


def parse_header(data: bytes) -> Header:
    """Read and check a header; `data` holds the first cluster, or more.

    Raises:
        ImageError: see `read_header`; the message does not name the file.
    """
    if len(data) < VERSION_2.size:
        raise ImageError("short read on header")
    fields = VERSION_2.unpack_from(data)
    magic, version, backing_offset, backing_size, cluster_bits, size, encryption = fields[:7]
    l1_size, l1_offset, table_offset, table_clusters, snapshot_count, snapshots_offset = fields[7:]
    if magic != MAGIC:
        raise ImageError("invalid magic numbers")
    if version not in {2, 3}:
        advice = ", QCOW: use qemu-img convert -O qcow2" if version == 1 else ""
        raise ImageError(f"unknown qcow2 version {version}{advice}")
    if not CLUSTER_BITS_MIN <= cluster_bits <= CLUSTER_BITS_MAX:
        raise ImageError(f"cluster size of 2^{cluster_bits} bytes: not 2^9 to 2^21")
    cluster_size = 1 << cluster_bits
    data = data[:cluster_size].ljust(cluster_size, b"\0")
    if encryption:
        method = _ENCRYPTION.get(encryption, f"method {encryption}")
        raise ImageError(f"encrypted ({method}): not supported")
    incompatible = compatible = autoclear = 0
    refcount_order, length = 4, VERSION_2.size
    if version == 3:
        incompatible, compatible, autoclear, refcount_order, length = VERSION_3.unpack_from(
            data, VERSION_2.size
        )
        if length < VERSION_3_LENGTH or length % 8 or length > cluster_size:
            raise ImageError(f"header of {length} bytes")
    extensions = _extensions(data, length, backing_offset or cluster_size)
    if incompatible & ~_SUPPORTED:
        raise ImageError(_unsupported(incompatible & ~_SUPPORTED, extensions))
    if refcount_order > 6:
        raise ImageError(f"unsupported refcount size 2^{refcount_order} bits")
    header = Header(
        version=version,
        cluster_bits=cluster_bits,
        size=size - size % 512,
        l1_size=l1_size,
        l1_offset=l1_offset,
        refcount_table_offset=table_offset,
        refcount_table_clusters=table_clusters,
        snapshot_count=snapshot_count,
        snapshots_offset=snapshots_offset,
        incompatible=Incompatible(incompatible),
        compatible=compatible,
        autoclear=autoclear,
        refcount_bits=1 << refcount_order,
        length=length,
        compression=_compression(data, length, incompatible),
        backing=_backing(data, backing_offset, backing_size, extensions),
        bitmaps=_bitmaps(extensions),
    )
    _check_tables(header)
    return header


def _check_tables(header: Header) -> None:
    if header.has_subclusters and header.cluster_bits < _EXTENDED_CLUSTER_BITS_MIN:
        raise ImageError("extended L2 entries need clusters of 16 KiB or more")
    for what, offset, size, limit in (
        ("L1 table", header.l1_offset, header.l1_size * 8, L1_BYTES_MAX),
        (
            "refcount table",
            header.refcount_table_offset,
            header.refcount_table_clusters << header.cluster_bits,
            REFCOUNT_TABLE_BYTES_MAX,
        ),
        ("snapshot table", header.snapshots_offset, header.snapshot_count, SNAPSHOTS_MAX),
    ):
        if size > limit:
            raise ImageError(f"{what} too large")
        if offset % header.cluster_size or offset + size > _OFFSET_MAX:
            raise ImageError(f"{what} at invalid offset {offset:#x}")
    if not header.refcount_table_clusters or not header.refcount_table_offset:
        raise ImageError("no refcount table")
    if l1_entries(header.size, header.cluster_bits, header.l2_bits) > header.l1_size:
        raise ImageError("L1 table too small for the disk")


def _extensions(data: bytes, offset: int, end: int) -> dict[int, bytes]:
    """Return the header extensions by type; `end` is where the backing path or cluster begins."""
    found: dict[int, bytes] = {}
    while offset + EXTENSION.size <= min(end, len(data)):
        kind, size = EXTENSION.unpack_from(data, offset)
        if kind == 0:
            break
        offset += EXTENSION.size
        if offset + size > min(end, len(data)):
            raise ImageError(f"header extension {kind:#x} too large")
        found[kind] = data[offset : offset + size]
        offset += (size + 7) & ~7
    return found


def _unsupported(features: int, extensions: dict[int, bytes]) -> str:
    """Name features by this program's names, then by the image's own."""
    names = dict(_NAMES)
    table = extensions.get(_EXTENSION_FEATURE_NAMES, b"")
    for start in range(0, len(table) - _FEATURE_NAME_LENGTH + 1, _FEATURE_NAME_LENGTH):
        kind, bit = table[start], table[start + 1]
        name = (
            table[start + 2 : start + _FEATURE_NAME_LENGTH].rstrip(b"\0").decode("ascii", "replace")
        )
        if kind == 0 and name.isprintable():
            names.setdefault(bit, name)
    told = [names.get(bit, f"bit {bit}") for bit in range(64) if features >> bit & 1]
    return f"unsupported features {features:#x} ({', '.join(told)})"


def _compression(data: bytes, length: int, incompatible: int) -> Compression:
    value = data[VERSION_3_LENGTH] if length > VERSION_3_LENGTH else 0
    if bool(value) != bool(incompatible & Incompatible.COMPRESSION_TYPE):
        raise ImageError("compression type contradicts the feature bits")
    try:
        return Compression(value)
    except ValueError:
        raise ImageError(f"unsupported compression type {value}") from None


def _backing(data: bytes, offset: int, size: int, extensions: dict[int, bytes]) -> Backing | None:
    if not offset:
        return None
    if size > BACKING_PATH_MAX:
        raise ImageError("path of the base image too long")
    if offset + size > len(data):
        raise ImageError("could not read path of the base image")
    if not size:
        return None
    named = extensions.get(EXTENSION_BACKING_FORMAT)
    path = data[offset : offset + size]
    if b"\0" in path:
        raise ImageError("path of the base image has a null character")
    return Backing(os.fsdecode(path), named.decode("ascii", "backslashreplace") if named else None)


def _bitmaps(extensions: dict[int, bytes]) -> Bitmaps | None:
    data = extensions.get(_EXTENSION_BITMAPS, b"")
    if len(data) != _BITMAPS.size:
        return None
    count, _, size, offset = _BITMAPS.unpack(data)
    return Bitmaps(count, size, offset)
