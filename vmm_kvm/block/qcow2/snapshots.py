"""The table of internal snapshots. They are kept intact, never made or reverted to.

Source: qcow2 specification, "Snapshots".
"""

import struct
from typing import NamedTuple

from vmm_kvm.block.file import HostFile
from vmm_kvm.block.qcow2.header import L1_BYTES_MAX, Header
from vmm_kvm.errors import ImageError

_ENTRY = struct.Struct(">QIHHIIQII")
_TABLE_BYTES_MAX = 64 << 20


class Snapshot(NamedTuple):
    """One internal snapshot."""

    identifier: str
    name: str
    seconds: int
    """When it was made, since 1970."""
    l1_offset: int
    l1_size: int
    """Entries."""


def read_snapshots(file: HostFile, header: Header) -> tuple[list[Snapshot], int]:
    """Return the snapshots, and how many bytes their table has.

    Raises:
        ImageError: the table is corrupt.
        OSError: it cannot be read.
    """
    found = []
    position = header.snapshots_offset
    for number in range(header.snapshot_count):
        fields = _ENTRY.unpack(file.read(position, _ENTRY.size))
        l1_offset, l1_size, identifier_size, name_size, seconds = fields[:5]
        extra_size = fields[8]
        if (
            l1_offset % header.cluster_size
            or l1_size * 8 > L1_BYTES_MAX
            or l1_offset + l1_size * 8 > file.size()
        ):
            raise ImageError(f"snapshot {number} has an invalid L1 table")
        names = position + _ENTRY.size + extra_size
        end = names + identifier_size + name_size
        if end - header.snapshots_offset > _TABLE_BYTES_MAX or end > file.size():
            raise ImageError("snapshot table at invalid offset, or too large")
        text = file.read(names, identifier_size + name_size)
        found.append(
            Snapshot(
                identifier=text[:identifier_size].decode("utf-8", "replace"),
                name=text[identifier_size:].decode("utf-8", "replace"),
                seconds=seconds,
                l1_offset=l1_offset,
                l1_size=l1_size,
            )
        )
        position = (end + 7) & ~7
    return found, position - header.snapshots_offset
