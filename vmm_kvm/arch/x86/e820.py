"""The memory map that firmware and boot loaders hand to a kernel."""

import struct
from collections.abc import Iterable, Sequence
from enum import IntEnum
from typing import NamedTuple

from vmm_kvm.arch.x86.layout import (
    BIOS_AREA_START,
    EBDA_START,
    ECAM_SIZE,
    ECAM_START,
    HIGH_MEMORY_START,
    IDENTITY_MAP_ADDRESS,
    TSS_ADDRESS,
)
from vmm_kvm.bits import KIB, PAGE_SIZE
from vmm_kvm.memory import Region

_LOW_MEMORY_END = 640 * KIB
_ENTRY = struct.Struct("<QQI")


class E820Type(IntEnum):
    """The use of a range (ACPI 6.5 table 15.6)."""

    RAM = 1
    RESERVED = 2


class E820Entry(NamedTuple):
    """A range of guest-physical addresses."""

    address: int
    size: int
    """Bytes, more than 0."""
    type: E820Type


def e820_map(regions: Sequence[Region]) -> tuple[E820Entry, ...]:
    """Return the map of a direct boot for RAM in `regions`, ascending and disjoint.

    The top KiB of conventional memory and the BIOS area, where ACPI tables lie, are reserved;
    video memory in between is left out, as on a PC.
    """
    entries = []
    for region in regions:
        start = region.gpa
        if start < HIGH_MEMORY_START:
            entries += [
                E820Entry(0, EBDA_START, E820Type.RAM),
                E820Entry(EBDA_START, _LOW_MEMORY_END - EBDA_START, E820Type.RESERVED),
                E820Entry(BIOS_AREA_START, HIGH_MEMORY_START - BIOS_AREA_START, E820Type.RESERVED),
            ]
            start = HIGH_MEMORY_START
        if start < region.end:
            entries.append(E820Entry(start, region.end - start, E820Type.RAM))
    return tuple(sorted((*entries, *_reserved()), key=lambda entry: entry.address))


def firmware_e820_map(regions: Sequence[Region], *, has_ecam: bool = True) -> tuple[E820Entry, ...]:
    """Return the map for firmware: it divides the first MiB itself.

    Without `has_ecam` it is firmware that places ECAM.

    Source: OpenBSD vmd/fw_cfg.c; SeaBIOS src/fw/paravirt.c.
    """
    ram = [E820Entry(region.gpa, region.size, E820Type.RAM) for region in regions]
    reserved = _reserved() if has_ecam else _reserved()[1:]
    return tuple(sorted((*ram, *reserved), key=lambda entry: entry.address))


def encode(entries: Iterable[E820Entry]) -> bytes:
    """Return `entries` as INT 15h, fw_cfg's etc/e820 and boot_params have them: 20 bytes each."""
    return b"".join(_ENTRY.pack(e.address, e.size, e.type) for e in entries)


def _reserved() -> tuple[E820Entry, ...]:
    """Return ranges outside RAM that nothing else may use: ECAM and KVM's own four pages."""
    kvm_pages = TSS_ADDRESS + 3 * PAGE_SIZE - IDENTITY_MAP_ADDRESS
    return (
        E820Entry(ECAM_START, ECAM_SIZE, E820Type.RESERVED),
        E820Entry(IDENTITY_MAP_ADDRESS, kvm_pages, E820Type.RESERVED),
    )
