"""What vmm(4)'s `create` takes, and what it refuses. Pure: nothing is created here."""

import enum
from collections.abc import Sequence
from dataclasses import dataclass

from vmm_kvm.bits import GIB, PAGE_SIZE
from vmm_kvm.errors import Refusal, RefusedError

MAX_MEMORY_RANGES = 16
MAX_MEMORY_END = 128 * GIB
MAX_VCPUS_PER_VM = 64
MAX_NAME = 63  # bytes; OpenBSD's 64 include a NUL

_USER_START = PAGE_SIZE
_USER_END = 0x7FFF_FFFF_F000


class MemoryType(enum.IntEnum):
    """What a range of guest-physical addresses is, by OpenBSD's numbers."""

    RAM = 0
    RESERVED = 1
    MMIO = 2
    """Nothing is mapped: accesses leave as exits."""


@dataclass(frozen=True, slots=True)
class MemoryRange:
    """A range of guest-physical addresses and the memory of this process behind it."""

    gpa: int
    va: int
    """Where it lies in this process; not looked at for MMIO. Stays mapped as long as the VM."""
    size: int
    """Bytes; like both addresses a multiple of 4096."""
    type: MemoryType = MemoryType.RAM


@dataclass(frozen=True, slots=True)
class CreateParams:
    """What VM to create."""

    ranges: Sequence[MemoryRange]
    """1 to 16, ascending and disjoint, up to 128 GiB, not all of them MMIO."""
    ncpus: int = 1
    """1 to 64, and no more than KVM allows."""
    name: str = ""
    """At most 63 bytes."""


def check_params(params: CreateParams, most_vcpus: int) -> None:
    """Refuse what vmm(4) refuses, and more vCPUs than KVM allows, `most_vcpus`.

    Raises:
        RefusedError: EINVAL.

    Source: OpenBSD vmm(4), vm_create_check_mem_ranges.
    """
    if not 1 <= params.ncpus <= min(MAX_VCPUS_PER_VM, most_vcpus):
        most = min(MAX_VCPUS_PER_VM, most_vcpus)
        raise RefusedError(Refusal.EINVAL, f"{params.ncpus} vCPUs: not 1 to {most}")
    if len(params.name.encode()) > MAX_NAME or "\0" in params.name:
        raise RefusedError(Refusal.EINVAL, f"name: more than {MAX_NAME} bytes, or a NUL")
    if not 1 <= len(params.ranges) <= MAX_MEMORY_RANGES:
        raise RefusedError(
            Refusal.EINVAL, f"{len(params.ranges)} memory ranges: not 1 to {MAX_MEMORY_RANGES}"
        )
    end = 0
    for part in params.ranges:
        problem = _range_problem(part, end)
        if problem:
            raise RefusedError(
                Refusal.EINVAL, f"memory range {part.gpa:#x}+{part.size:#x}: {problem}"
            )
        end = part.gpa + part.size
    if memory_size(params) == 0:
        raise RefusedError(Refusal.EINVAL, "memory ranges: no RAM among them")


def _range_problem(part: MemoryRange, previous_end: int) -> str:
    if part.size <= 0:
        return "empty"
    if (part.gpa | part.size) % PAGE_SIZE:
        return "not page aligned"
    if part.gpa < previous_end:
        return "not ascending, or overlapping"
    if part.gpa + part.size > MAX_MEMORY_END:
        return f"beyond {MAX_MEMORY_END:#x}"
    if part.type is not MemoryType.MMIO:
        if part.va % PAGE_SIZE:
            return "its memory is not page aligned"
        if not _USER_START <= part.va <= _USER_END - part.size:
            return "its memory is not a process's"
    return ""


def memory_size(params: CreateParams) -> int:
    """Return the bytes of all ranges that have memory."""
    return sum(part.size for part in params.ranges if part.type is not MemoryType.MMIO)
