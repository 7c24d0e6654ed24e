"""Check an image: compare its reference counts with its references."""

from array import array
from collections.abc import Iterator
from typing import NamedTuple

from vmm_kvm.block.file import HostFile
from vmm_kvm.block.qcow2.counts import width
from vmm_kvm.block.qcow2.faults import Faults
from vmm_kvm.block.qcow2.header import Header
from vmm_kvm.block.qcow2.mapping import COMPRESSED
from vmm_kvm.block.qcow2.refcounts import Refcounts
from vmm_kvm.block.qcow2.references import CHUNK, References
from vmm_kvm.block.qcow2.tables import COPIED, OFFSET_MASK, read_words

_TYPE_CODES = {1: "B", 2: "H", 4: "I", 8: "Q"}


class Report(NamedTuple):
    """The result of a check."""

    errors: tuple[str, ...]
    """The first hundred, a line each."""
    error_count: int
    """Faults that can lose data: clusters counted too low, invalid offsets."""
    leaked_clusters: int
    """Clusters that are counted more often than they are in use: they cost space."""
    data_clusters: int
    compressed_clusters: int


class Difference(NamedTuple):
    """A cluster whose count is wrong."""

    cluster: int
    counted: int
    references: int


def check(file: HostFile, header: Header) -> Report:
    """Check the image in `file`, which must not be written meanwhile. Nothing is changed.

    Raises:
        OSError: the file cannot be read.
    """
    references = References(file, header)
    refcounts = Refcounts(file, header, Faults(file, header))
    leaked = 0
    for cluster, counted, wanted in differences(references, refcounts):
        if counted < wanted:
            references.error(f"cluster {cluster}: {wanted} references, counted as {counted}")
        else:
            leaked += 1
    _check_flags(file, header, references, refcounts)
    return Report(
        errors=tuple(references.errors),
        error_count=references.error_count,
        leaked_clusters=leaked,
        data_clusters=references.data_clusters,
        compressed_clusters=references.compressed_clusters,
    )


def differences(references: References, refcounts: Refcounts) -> Iterator[Difference]:
    """Yield the clusters with wrong counts, block by block.

    A block that cannot be read is an error of `references`, and holds zeros.
    """
    per_block = refcounts.per_block
    indices = {
        chunk * CHUNK // per_block + number
        for chunk in references.chunks
        for number in range(max(1, CHUNK // per_block))
    }
    indices |= {index for index, entry in enumerate(refcounts.table) if entry}
    seen: set[int] = set()
    size = width(refcounts.bits)
    part = min(per_block, CHUNK)
    for index in sorted(indices):
        counts = None
        entry = refcounts.table[index] if index < len(refcounts.table) else 0
        if entry in seen:
            references.error(f"refcount block {index} is another one as well")
        elif entry:
            seen.add(entry)
            try:
                counts = refcounts.counts(index)
            except OSError as err:
                references.error(err.strerror or str(err))
        for start in range(0, per_block, part):
            first = index * per_block + start
            chunk = references.chunks.get(first // CHUNK)
            if chunk is None and counts is None:
                continue
            at = first % CHUNK
            wanted = chunk[at : at + part] if chunk else array("I", bytes(part * 4))
            held = counts[start * size : (start + part) * size] if counts else bytes(part * size)
            if held == _encoded(wanted, size):
                continue
            actual = array(_TYPE_CODES[size], bytes(held))
            actual.byteswap()
            for number in range(part):
                if actual[number] != wanted[number]:
                    yield Difference(first + number, actual[number], wanted[number])


def _encoded(counts: "array[int]", size: int) -> bytes | None:
    """Return counts of `size` bytes as they are in memory; None if they do not fit."""
    try:
        numbers = array(_TYPE_CODES[size], counts)
    except OverflowError:
        return None
    numbers.byteswap()
    return numbers.tobytes()


def _check_flags(
    file: HostFile, header: Header, references: References, refcounts: Refcounts
) -> None:
    """The flag of each table entry must tell whether its cluster is referred to exactly once."""
    l1 = read_words(file, header.l1_offset, header.l1_size)
    step = 2 if header.has_subclusters else 1
    seen: set[int] = set()
    for index, offset in references.active_tables.items():
        if bool(l1[index] & COPIED) != (_count(refcounts, offset >> header.cluster_bits) == 1):
            references.error(f"L2 table {index}: its flag contradicts its count")
        if offset in seen:
            continue
        seen.add(offset)
        for entry in read_words(file, offset, header.cluster_size >> 3)[::step]:
            host = entry & OFFSET_MASK
            if not host or entry & COMPRESSED or host & (header.cluster_size - 1):
                continue
            if bool(entry & COPIED) != (_count(refcounts, host >> header.cluster_bits) == 1):
                references.error(f"cluster at {host:#x}: its flag contradicts its count")


def _count(refcounts: Refcounts, cluster: int) -> int:
    try:
        return refcounts.get(cluster)
    except OSError:
        return 0  # the block's fault has been reported
