"""The processor's tables that an entry in protected or long mode needs: GDT and page tables."""

import struct
from array import array
from collections.abc import Sequence

from vmm_kvm.arch.x86.entry import Segment
from vmm_kvm.bits import GIB, MIB, PAGE_SIZE
from vmm_kvm.memory import GuestMemory

PTE_PRESENT = 1 << 0
PTE_WRITE = 1 << 1
PTE_ACCESSED = 1 << 5
PTE_LARGE = 1 << 7


def write_gdt(memory: GuestMemory, gpa: int, segments: Sequence[Segment]) -> int:
    """Write a GDT at `gpa` with each segment at the place that its selector names.

    Returns the table's limit (its size in bytes, less one). A system segment takes two places, as
    in long mode.

    Source: Intel SDM vol. 3 §3.4.5, §7.2.3.
    """
    size = max(s.selector + (8 if s.s else 16) for s in segments)
    table = bytearray(size)
    for segment in segments:
        struct.pack_into("<Q", table, segment.selector, _descriptor(segment))
        if not segment.s:
            struct.pack_into("<Q", table, segment.selector + 8, segment.base >> 32)
    memory.write(gpa, table)
    return size - 1


def _descriptor(segment: Segment) -> int:
    limit = segment.limit >> 12 if segment.g else segment.limit
    access = segment.type | segment.s << 4 | segment.dpl << 5 | segment.present << 7
    flags = segment.l << 1 | segment.db << 2 | segment.g << 3
    return (
        limit & 0xFFFF
        | (segment.base & 0xFF_FFFF) << 16
        | access << 40
        | (limit >> 16 & 0xF) << 48
        | flags << 52
        | (segment.base >> 24 & 0xFF) << 56
    )


def write_identity_map(memory: GuestMemory, gpa: int, size: int, encrypted: int = 0) -> int:
    """Map the first `size` bytes (a multiple of 1 GiB, at most 512 GiB) to themselves.

    Writes a PML4, a PDPT and one page directory of 2 MiB pages per GiB, each 4096 bytes, from
    `gpa` on. Returns the first address behind them. `encrypted` is the C-bit, as a mask, of a guest
    whose memory is encrypted.

    Source: Intel SDM vol. 3 §4.5.
    """
    count = size // GIB
    link = PTE_PRESENT | PTE_WRITE | PTE_ACCESSED | encrypted
    directories = gpa + 2 * PAGE_SIZE
    memory.write(gpa, array("Q", [gpa + PAGE_SIZE | link]).tobytes())
    memory.write(
        gpa + PAGE_SIZE,
        array("Q", [directories + i * PAGE_SIZE | link for i in range(count)]).tobytes(),
    )
    leaf = link | PTE_LARGE
    pages = array("Q", range(leaf, size + leaf, 2 * MIB))
    memory.write(directories, pages.tobytes())
    return directories + count * PAGE_SIZE
