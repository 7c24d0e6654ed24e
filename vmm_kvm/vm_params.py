"""Parameters of vmm(4)'s `create`, and its checks of them. Pure: nothing is created here."""

import enum
import os
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

from vmm_kvm.bits import GIB, MIB, PAGE_SIZE
from vmm_kvm.errors import Refusal, RefusedError
from vmm_kvm.limits import MEMORY_MAX, NAME_MAX, VCPUS_MAX
from vmm_kvm.record import Record

MAX_MEMORY_RANGES = 16

_USER_START = PAGE_SIZE
_USER_END = 0x7FFF_FFFF_F000


class MemoryType(enum.IntEnum):
    """The kind of a range of guest-physical addresses, by OpenBSD's numbers."""

    RAM = 0
    RESERVED = 1
    MMIO = 2
    """Nothing is mapped: accesses leave as exits."""


class MemoryRange(NamedTuple):
    """A range of guest-physical addresses and the memory of this process behind it."""

    gpa: int
    va: int
    """Its address in this process; ignored for MMIO. Stays mapped as long as the VM."""
    size: int
    """Bytes; like both addresses a multiple of 4096."""
    type: MemoryType = MemoryType.RAM


class Mapping(NamedTuple):
    """Memory of this process that the guest sees as a ROM or a device, not as RAM.

    vmm(4) has nothing like it: its limits do not apply, and `info` does not count it.
    """

    gpa: int
    va: int
    size: int
    """Bytes; like both addresses a multiple of 4096."""
    is_readonly: bool
    """Whether guest writes leave as MmioExit."""


class Controllers(enum.Enum):
    """The interrupt controllers of a VM."""

    NONE = "none"
    """None, as vmm(4) has it: one INTR line a vCPU, and HLT leaves as an exit."""
    KERNEL = "kernel"
    """KVM's PICs, IOAPIC, local APICs and PIT: no exit per interrupt or HLT."""


class Launch(Protocol):
    """A VM's way to encrypted memory."""

    vm_type: int
    """The type of KVM's VM."""
    c_bit: int
    """The bit of an address that says that the memory there is encrypted."""
    is_es: bool
    """Whether the vCPUs' registers are too."""

    def begin(self, vm_fd: int) -> None:
        """Make a new VM, whose vCPUs do not exist yet, an encrypted one."""


class CreateParams(Record):
    """The VM to create."""

    ranges: Sequence[MemoryRange]
    """1 to 16, ascending and disjoint, up to 128 GiB, not all of them MMIO."""
    ncpus: int = 1
    """1 to 64, and no more than KVM allows."""
    name: str = ""
    """At most 63 bytes."""
    controllers: Controllers = Controllers.NONE
    mappings: Sequence[Mapping] = ()
    """Disjoint from the ranges and from each other; see `set_mapped`."""
    collected_ports: Sequence[int] = ()
    """Ports whose byte-sized writes KVM collects in the vCPUs' ring, without an exit for each."""
    launch: Launch | None = None
    """Makes its memory encrypted; it begins before there are vCPUs, the caller does the rest."""
    used_size: Callable[[], int] | None = None
    """Returns the bytes of the ranges that are in host memory, if the caller knows a quick way."""


def check_vcpus(count: int, most: int) -> None:
    """Refuse a number of vCPUs that vmm(4) refuses, or more than KVM allows, `most`.

    Raises:
        RefusedError: EINVAL.
    """
    most = min(VCPUS_MAX, most)
    if not 1 <= count <= most:
        raise RefusedError(Refusal.EINVAL, f"{count} vCPUs: not 1 to {most}")


def check_params(params: CreateParams, most_vcpus: int) -> None:
    """Refuse parameters that vmm(4) refuses, and more vCPUs than KVM allows, `most_vcpus`.

    Raises:
        RefusedError: EINVAL.

    Source: OpenBSD vmm(4), vm_create_check_mem_ranges.
    """
    check_vcpus(params.ncpus, most_vcpus)
    if len(os.fsencode(params.name)) > NAME_MAX or "\0" in params.name:
        raise RefusedError(Refusal.EINVAL, f"name: more than {NAME_MAX} bytes, or a NUL")
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


def check_memory_end(size: int, end: int) -> None:
    """Refuse RAM of `size` bytes, of which the last lies below `end`, if vmm(4) has no such place.

    Raises:
        RefusedError: it ends too high; the message says how much is possible.

    Source: OpenBSD vmm(4), vm_create_check_mem_ranges: its limit is on addresses.
    """
    if end > MEMORY_MAX:
        most = size - (end - MEMORY_MAX)
        raise RefusedError(
            Refusal.EINVAL,
            f"{size // MIB} MiB of memory would end above {MEMORY_MAX // GIB} GiB, since PCI takes"
            f" the room below 4 GiB: {most // MIB} MiB at most",
        )


def _range_problem(part: MemoryRange, previous_end: int) -> str:
    if part.size <= 0:
        return "empty"
    if (part.gpa | part.size) % PAGE_SIZE:
        return "not page aligned"
    if part.gpa < previous_end:
        return "not ascending, or overlapping"
    if part.gpa + part.size > MEMORY_MAX:
        return f"beyond {MEMORY_MAX:#x}"
    if part.type is not MemoryType.MMIO:
        if part.va % PAGE_SIZE:
            return "its memory is not page aligned"
        if not _USER_START <= part.va <= _USER_END - part.size:
            return "its memory is not a process's"
    return ""


def memory_size(params: CreateParams) -> int:
    """Return the bytes of all ranges that have memory."""
    return sum(part.size for part in params.ranges if part.type is not MemoryType.MMIO)
