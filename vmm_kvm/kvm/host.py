"""Programs that run VMs on this host, and the memory of their VMs, by /proc.

A process that holds a descriptor of `anon_inode:kvm-vm` runs VMs. Processes that cannot be read,
because they are another user's or have just ended, are left out. Nothing here talks to KVM.
"""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

_VM_LINK = "anon_inode:kvm-vm"
_VCPU_LINK = "anon_inode:kvm-vcpu"
_NAME_OPTIONS = ("-name", "--name", "--id")
# A mapping counts as guest memory if it is at least this part of the program's largest: RAM may lie
# in several pieces around a hole; heaps and stacks are much smaller.
_SMALLEST_PART = 8


class HostVm(NamedTuple):
    """A program that runs a VM, or several."""

    pid: int
    name: str
    """The VM's name if the command line tells one, else the program's."""
    vms: int
    vcpus: int
    memory_size: int
    """Bytes of guest memory mapped; an estimate, see `host_vms`."""
    resident: int
    """Bytes of that in host memory."""


def host_vms(proc: Path = Path("/proc"), *, but: int | None = None) -> list[HostVm]:
    """Return the programs that run VMs on this host, by process id, without process `but`.

    Guest memory is estimated: the largest writable mapping of the process, and every other at
    least an eighth as large, by /proc/pid/smaps. `proc` is a file system laid out like proc(5).
    """
    found = []
    for directory in proc.iterdir():
        if directory.name.isdecimal() and int(directory.name) != but:
            try:
                vm = _examine(directory)
            except OSError:  # another user's, or gone
                continue
            if vm is not None:
                found.append(vm)
    return sorted(found, key=lambda vm: vm.pid)


def _examine(directory: Path) -> HostVm | None:
    links = Counter(_links(directory / "fd"))
    vms = links[_VM_LINK]
    if vms == 0:
        return None
    memory_size, resident = _guest_memory(directory / "smaps")
    return HostVm(
        int(directory.name),
        _name(directory),
        vms,
        _vcpus(links, vms),
        memory_size,
        resident,
    )


def _links(directory: Path) -> Iterator[str]:
    for entry in directory.iterdir():
        try:
            yield str(entry.readlink())
        except FileNotFoundError:  # closed meanwhile
            continue


def _vcpus(links: Counter[str], vms: int) -> int:
    # A vCPU may be open more than once, but an index exists once per VM. Before Linux 4.16 the
    # links have no index: then every descriptor counts.
    return sum(
        count if link == _VCPU_LINK else min(count, vms)
        for link, count in links.items()
        if link.startswith(_VCPU_LINK)
    )


def _name(directory: Path) -> str:
    arguments = (directory / "cmdline").read_bytes().decode(errors="replace").split("\0")
    for option, value in zip(arguments, [*arguments[1:], ""], strict=True):
        for name in _NAME_OPTIONS:
            if option == name and value:
                return _vm_name(value)
            if option.startswith(f"{name}="):
                return _vm_name(option.removeprefix(f"{name}="))
    return (directory / "comm").read_text(errors="replace").rstrip("\n")


def _vm_name(value: str) -> str:
    """Return the name in the value of a name option, such as QEMU's `guest=web,process=x`."""
    first, *others = value.split(",")
    for part in (first, *others):
        if part.startswith("guest="):
            return part.removeprefix("guest=")
    return first


def _guest_memory(smaps: Path) -> tuple[int, int]:
    """Return (bytes, resident bytes) of the mappings that look like guest memory."""
    mappings: list[tuple[int, int]] = []
    size, is_writable = 0, False
    with smaps.open(errors="replace") as lines:
        for line in lines:
            head, _, rest = line.partition(" ")
            if head == "Rss:":
                if is_writable:
                    mappings.append((size, int(rest.split()[0]) * 1024))
            elif not head.endswith(":"):
                start, _, end = head.partition("-")
                size = int(end, 16) - int(start, 16)
                is_writable = rest[1:2] == "w"
    largest = max((size for size, _ in mappings), default=0)
    counted = [(size, rss) for size, rss in mappings if size * _SMALLEST_PART >= largest]
    return sum(size for size, _ in counted), sum(rss for _, rss in counted)
