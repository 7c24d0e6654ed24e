"""Repairing the reference counts of an image that was not closed.

Source: qcow2 specification, "incompatible_features" bit 0.
"""

from vmm_kvm.block.file import HostFile
from vmm_kvm.block.qcow2.check import differences
from vmm_kvm.block.qcow2.header import Header
from vmm_kvm.block.qcow2.mapping import COMPRESSED
from vmm_kvm.block.qcow2.metadata import Metadata
from vmm_kvm.block.qcow2.references import CHUNK, References
from vmm_kvm.block.qcow2.tables import COPIED, OFFSET_MASK
from vmm_kvm.errors import ImageError


def repair(file: HostFile, header: Header, metadata: Metadata) -> None:
    """Set each count by the tables, and the tables' flags by the counts.

    Raises:
        ImageError: more is wrong than counts.
        OSError: the file cannot be read or written.
    """
    references = References(file, header)
    if references.error_count:
        raise ImageError(f"{file.name}: was not closed, and is corrupt: {references.errors[0]}")
    refcounts = metadata.refcounts
    used = max(chunk * CHUNK + len(counts) for chunk, counts in references.chunks.items())
    while not references.get(used - 1):
        used -= 1
    end = max(used, -(-file.size() >> header.cluster_bits))
    own = refcounts.add_blocks(end, range(used))
    for cluster, _, wanted in differences(references, refcounts):
        if cluster not in own:
            refcounts.replace(cluster, wanted)
    if references.error_count:
        raise ImageError(f"{file.name}: was not closed, and is corrupt: {references.errors[0]}")
    _repair_flags(header, metadata, references)
    metadata.commit()


def _repair_flags(header: Header, metadata: Metadata, references: References) -> None:
    tables, refcounts = metadata.tables, metadata.refcounts
    step = 2 if header.has_subclusters else 1
    for index, offset in references.active_tables.items():
        is_single = refcounts.get(offset >> header.cluster_bits) == 1
        tables.flag(index, is_copied=is_single)
        table = tables.get(index)
        if table is None or not is_single:
            continue  # a snapshot's as well: its entries are looked at when it is copied
        for place in range(0, len(table.words), step):
            entry = table.words[place]
            if not entry & OFFSET_MASK or entry & COMPRESSED:
                continue
            single = refcounts.get((entry & OFFSET_MASK) >> header.cluster_bits) == 1
            if single != bool(entry & COPIED):
                table.words[place] = entry ^ COPIED
                tables.touch(index, table, place, place + step)
        metadata.relieve()
