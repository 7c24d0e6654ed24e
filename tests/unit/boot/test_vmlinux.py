"""The trimmed form of an unpacked kernel: the same memory in fewer bytes."""

from __future__ import annotations

import os

import pytest

from tests.unit.boot.images import KERNEL_ADDRESS, ElfSpec, Segment
from vmm_kvm.arch.x86.layout import ram_ranges
from vmm_kvm.bits import KIB, MIB
from vmm_kvm.boot.elf import place_loads, read_elf
from vmm_kvm.boot.source import BytesSource
from vmm_kvm.boot.vmlinux import trim
from vmm_kvm.memory import GuestMemory

PAGE = os.urandom(4096)
BIG = os.urandom(300 * KIB)


def _loaded(data: bytes) -> tuple[int, bytes]:
    with GuestMemory(ram_ranges(32 * MIB)) as memory:
        end = place_loads(read_elf(BytesSource("k", data)), memory)
        return end, memory.read(MIB, 31 * MIB)


@pytest.mark.parametrize(
    "data",
    [
        PAGE,
        PAGE + bytes(3 * MIB) + PAGE,
        bytes(2 * MIB) + PAGE,
        bytes(100 * KIB) + PAGE + bytes(20 * KIB) + PAGE + bytes(MIB),
        PAGE + bytes(65 * KIB) + BIG + bytes(5 * MIB) + b"end",
        bytes(MIB),
        b"short",
        b"",
    ],
)
def test_loads_the_same(data: bytes) -> None:
    """With any runs of zeros in a segment, memory after trimming is the same."""
    segments = (
        Segment(data, memory_size=len(data) + 5000),
        Segment(PAGE, paddr=KERNEL_ADDRESS + 8 * MIB),
    )
    whole = ElfSpec(segments=segments).build()
    elf = read_elf(BytesSource("k", whole))
    trimmed = b"".join(trim(elf, whole))
    assert _loaded(whole) == _loaded(trimmed)


def test_leaves_long_runs_of_zeros_out() -> None:
    """Megabytes of zeros take no space."""
    whole = ElfSpec(segments=(Segment(PAGE + bytes(8 * MIB) + PAGE + bytes(3 * MIB)),)).build()
    trimmed = b"".join(trim(read_elf(BytesSource("k", whole)), whole))
    assert len(trimmed) == 3 * 4096


def test_keeps_entry_and_lowest_address() -> None:
    """The kernel's lowest address and its entry do not change."""
    spec = ElfSpec(segments=(Segment(bytes(MIB) + PAGE),), entry=KERNEL_ADDRESS + MIB)
    whole = spec.build()
    elf = read_elf(BytesSource("k", b"".join(trim(read_elf(BytesSource("k", whole)), whole))))
    assert (
        elf.entry,
        min(s.paddr for s in elf.loads),
    ) == (KERNEL_ADDRESS + MIB, KERNEL_ADDRESS)
