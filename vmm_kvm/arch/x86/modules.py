"""Boot modules of PVH and Multiboot kernels: files in memory, each with a command line."""

from collections.abc import Sequence
from typing import NamedTuple

from vmm_kvm.arch.x86.layout import EBDA_START
from vmm_kvm.bits import PAGE_SIZE, align_up
from vmm_kvm.boot.source import FileSource
from vmm_kvm.errors import BootError
from vmm_kvm.memory import GuestMemory


class PlacedModule(NamedTuple):
    """The place of a module."""

    address: int
    size: int
    """Bytes."""
    command_line: int
    """The address of its NUL-terminated command line."""


def place_modules(
    memory: GuestMemory,
    files: Sequence[tuple[FileSource, bytes]],
    first: int,
    lines: int,
    lines_end: int = EBDA_START,
) -> list[PlacedModule]:
    """Place files on pages from `first` up, their command lines from `lines` up to `lines_end`.

    Raises:
        BootError: they do not fit, or a file cannot be read.
    """
    placed = []
    for file, line in files:
        address = align_up(first, PAGE_SIZE)
        if not memory.contains(address, file.size) or lines + len(line) > lines_end:
            raise BootError(
                f"{file.name}: module: {file.size:#x} bytes at {address:#x}"
                f" do not fit in {memory.size >> 20} MiB of memory"
            )
        file.place(memory, address, 0, file.size)
        memory.write(lines, line)
        placed.append(PlacedModule(address, file.size, lines))
        first = address + file.size
        lines += len(line)
    return placed
