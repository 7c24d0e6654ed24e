"""Refusals of vmm(4)'s create, before anything is created."""

from __future__ import annotations

import pytest

from vmm_kvm.arch.x86.layout import ram_ranges
from vmm_kvm.bits import GIB, MIB
from vmm_kvm.errors import Refusal, RefusedError
from vmm_kvm.vm_params import (
    CreateParams,
    MemoryRange,
    MemoryType,
    check_memory_end,
    check_params,
    memory_size,
)

VA = 0x7000_0000_0000
PAGE = 4096


def _ram(gpa: int, size: int, va: int = VA) -> MemoryRange:
    return MemoryRange(gpa, va, size)


@pytest.mark.parametrize(
    "ranges",
    [
        [_ram(0, PAGE)],
        [_ram(0, MIB), _ram(MIB, MIB)],
        [_ram(0, 3 * GIB), MemoryRange(3 * GIB, 0, GIB, MemoryType.MMIO), _ram(4 * GIB, GIB)],
        [_ram(128 * GIB - PAGE, PAGE)],
        [_ram(0, 128 * GIB)],
        [_ram(i * MIB, PAGE) for i in range(16)],
        [MemoryRange(0, VA, PAGE, MemoryType.RESERVED)],
    ],
)
def test_good_ranges(ranges: list[MemoryRange]) -> None:
    """One to sixteen ascending ranges are accepted, also with gaps, up to 128 GiB."""
    check_params(CreateParams(ranges=ranges), 64)


@pytest.mark.parametrize(
    ("ranges", "message"),
    [
        ([], "0 memory ranges: not 1 to 16"),
        ([_ram(i * MIB, PAGE) for i in range(17)], "17 memory ranges: not 1 to 16"),
        ([_ram(0, 0)], "memory range 0x0+0x0: empty"),
        ([_ram(0, PAGE), _ram(PAGE, 0)], "memory range 0x1000+0x0: empty"),
        ([_ram(1, PAGE)], "memory range 0x1+0x1000: not page aligned"),
        ([_ram(0, PAGE + 1)], "memory range 0x0+0x1001: not page aligned"),
        ([_ram(-PAGE, PAGE)], "memory range -0x1000+0x1000: not ascending, or overlapping"),
        (
            [_ram(0, 2 * PAGE), _ram(PAGE, PAGE)],
            "memory range 0x1000+0x1000: not ascending, or overlapping",
        ),
        (
            [_ram(MIB, PAGE), _ram(0, PAGE)],
            "memory range 0x0+0x1000: not ascending, or overlapping",
        ),
        ([_ram(128 * GIB, PAGE)], "memory range 0x2000000000+0x1000: beyond 0x2000000000"),
        ([_ram(PAGE, 128 * GIB)], "memory range 0x1000+0x2000000000: beyond 0x2000000000"),
        ([_ram(0, PAGE, VA + 1)], "memory range 0x0+0x1000: its memory is not page aligned"),
        ([_ram(0, PAGE, 0)], "memory range 0x0+0x1000: its memory is not a process's"),
        ([_ram(0, PAGE, 1 << 63)], "memory range 0x0+0x1000: its memory is not a process's"),
        (
            [_ram(0, 2 * PAGE, 0x7FFF_FFFF_E000)],
            "memory range 0x0+0x2000: its memory is not a process's",
        ),
        ([MemoryRange(0, 0, PAGE, MemoryType.MMIO)], "memory ranges: no RAM among them"),
    ],
)
def test_bad_ranges(ranges: list[MemoryRange], message: str) -> None:
    """Each kind of bad range is EINVAL, with a line that names it and the reason."""
    with pytest.raises(RefusedError) as caught:
        check_params(CreateParams(ranges=ranges), 64)
    assert (str(caught.value), caught.value.refusal) == (message, Refusal.EINVAL)


@pytest.mark.parametrize(("ncpus", "most"), [(1, 1), (64, 64), (64, 4096), (4, 4)])
def test_good_vcpu_counts(ncpus: int, most: int) -> None:
    """One to 64 vCPUs are accepted, or as many as KVM allows."""
    check_params(CreateParams(ranges=[_ram(0, PAGE)], ncpus=ncpus), most)


@pytest.mark.parametrize(
    ("ncpus", "most", "message"),
    [
        (0, 64, "0 vCPUs: not 1 to 64"),
        (-1, 64, "-1 vCPUs: not 1 to 64"),
        (65, 4096, "65 vCPUs: not 1 to 64"),
        (5, 4, "5 vCPUs: not 1 to 4"),
    ],
)
def test_bad_vcpu_counts(ncpus: int, most: int, message: str) -> None:
    """No vCPU, more than 64, or more than KVM allows is EINVAL."""
    with pytest.raises(RefusedError) as caught:
        check_params(CreateParams(ranges=[_ram(0, PAGE)], ncpus=ncpus), most)
    assert (str(caught.value), caught.value.refusal) == (message, Refusal.EINVAL)


@pytest.mark.parametrize("name", ["x" * 64, "\N{SNOWMAN}" * 22, "a\0b"])
def test_bad_names(name: str) -> None:
    """A name has at most 63 bytes and no NUL."""
    with pytest.raises(RefusedError) as caught:
        check_params(CreateParams(ranges=[_ram(0, PAGE)], name=name), 64)
    assert str(caught.value) == "name: more than 63 bytes, or a NUL"


def test_memory_size() -> None:
    """MMIO counts as no memory; reserved ranges count."""
    ranges = [
        _ram(0, MIB),
        MemoryRange(MIB, 0, MIB, MemoryType.MMIO),
        MemoryRange(2 * MIB, VA, PAGE, MemoryType.RESERVED),
    ]
    assert memory_size(CreateParams(ranges=ranges)) == MIB + PAGE


@pytest.mark.parametrize(
    ("size", "hole_start", "most"),
    [(128 * GIB, 3 * GIB, 127), (127 * GIB + MIB, 3 * GIB, 127), (128 * GIB, 2 * GIB, 126)],
)
def test_memory_that_ends_too_high(size: int, hole_start: int, most: int) -> None:
    """The limit is on addresses, so the hole below 4 GiB counts; the line gives the maximum."""
    with pytest.raises(RefusedError, match=f": {most * 1024} MiB at most") as caught:
        check_memory_end(size, sum(ram_ranges(size, hole_start)[-1]))
    assert caught.value.refusal is Refusal.EINVAL
    check_memory_end(most * GIB, sum(ram_ranges(most * GIB, hole_start)[-1]))
