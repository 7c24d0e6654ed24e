"""The memory map that kernels and firmware see."""

from __future__ import annotations

from itertools import pairwise

import pytest

from vmm_kvm.arch.x86.e820 import E820Entry, E820Type, e820_map, encode, firmware_e820_map
from vmm_kvm.arch.x86.layout import ECAM_SIZE, ECAM_START, ram_ranges
from vmm_kvm.bits import GIB, MIB
from vmm_kvm.memory import Region

RAM, RESERVED = E820Type.RAM, E820Type.RESERVED


def _regions(size: int) -> list[Region]:
    offset, regions = 0, []
    for gpa, length in ram_ranges(size):
        regions.append(Region(gpa, length, offset))
        offset += length
    return regions


def test_small_memory() -> None:
    """Conventional memory ends below 640 KiB, the BIOS area is reserved, the rest follows."""
    assert (
        E820Entry(0, 0x9FC00, RAM),
        E820Entry(0x9FC00, 0x400, RESERVED),
        E820Entry(0xE0000, 0x20000, RESERVED),
        E820Entry(MIB, 255 * MIB, RAM),
        E820Entry(ECAM_START, ECAM_SIZE, RESERVED),
        E820Entry(0xFEFF_C000, 0x4000, RESERVED),
    ) == e820_map(_regions(256 * MIB))


def test_one_mebibyte() -> None:
    """With 1 MiB there is no RAM above it."""
    assert [e.size for e in e820_map(_regions(MIB)) if e.type is RAM] == [0x9FC00]


@pytest.mark.parametrize("size", [MIB, 3 * GIB, 5 * GIB])
def test_ascending_and_disjoint(size: int) -> None:
    """No entry begins before the previous one ends, around the PCI hole too."""
    entries = e820_map(_regions(size))
    assert all(a.address + a.size <= b.address for a, b in pairwise(entries))
    assert size - MIB == sum(e.size for e in entries if e.type is RAM and e.address >= MIB)


def test_firmware_divides_low_memory_itself() -> None:
    """Firmware gets RAM from 0 on, without holes."""
    assert E820Entry(0, 256 * MIB, RAM) == firmware_e820_map(_regions(256 * MIB))[0]


def test_firmware_that_places_ecam() -> None:
    """If firmware places ECAM, nothing is reserved for it; KVM's own pages are."""
    usual = firmware_e820_map(_regions(256 * MIB))
    (gone,) = set(usual) - set(firmware_e820_map(_regions(256 * MIB), has_ecam=False))
    assert gone.address == ECAM_START


def test_encoding() -> None:
    """An entry takes 20 bytes: address, size, type."""
    entry = E820Entry(0x1234, 0x5678, RESERVED)
    packed = b"\x34\x12" + bytes(6) + b"\x78\x56" + bytes(6) + b"\x02\0\0\0"
    assert packed * 2 == encode([entry, entry])
