"""Warnings about a valid vm.conf, of `vmd -n` and of a start.

Pure: the configuration, the daemon's user and the host's memory in; lines out. VMs that are
disabled, or skipped because another one has their name, claim nothing.
"""

from collections.abc import Iterator

from vmd.config.disks import DiskKind, DiskOption, writes_image
from vmd.config.forwards import ForwardError, check_ports
from vmd.config.model import Config, SwitchConfig, VmConfig

_ID_MAX = 0xFFFF_FFFF
"""A larger number is a name for vmctl."""


def advice(config: Config, *, is_user: bool, memory_size: int) -> tuple[str, ...]:
    """Return a line, `file:line: warning: text`, for each oddity.

    `is_user`: the daemon runs without privileges. `memory_size` is the host's RAM in bytes.
    """
    vms: dict[str, VmConfig] = {}
    found: list[str] = []
    for vm in config.vms:
        if vm.name in vms:
            found.append(_line(vm, f"only the first of this name counts, {vms[vm.name].where}"))
        else:
            vms[vm.name] = vm
    switches: dict[str, SwitchConfig] = {}
    found += (
        f'warning: switch "{switch.name}": only the first of this name counts'
        for switch in config.switches
        if switches.setdefault(switch.name, switch) is not switch
    )
    for vm in vms.values():
        found += (_line(vm, text) for text in _of_one(vm, set(switches), is_user, memory_size))
        found += (
            _line(vm, f'after "{name}", which is not defined: it waits for nothing')
            for name in vm.after
            if name not in vms
        )
    claimed: dict[str, VmConfig] = {}
    read: dict[str, VmConfig] = {}
    for vm in vms.values():
        if vm.is_enabled:
            taken = dict.fromkeys(_claims(vm))
            for what in taken:
                other = claimed.setdefault(what, read.get(what, vm))
                if other is not vm:
                    found.append(_line(vm, f'{what} is also used by vm "{other.name}"'))
            for what in dict.fromkeys(_reads(vm)):
                other = claimed.get(what, vm)
                read.setdefault(what, vm)
                if what not in taken and other is not vm:
                    found.append(_line(vm, f'{what} is written by vm "{other.name}"'))
    return tuple(found)


def _line(vm: VmConfig, text: str) -> str:
    where = f"{vm.where}: " if vm.where else ""
    return f'{where}warning: vm "{vm.name}": {text}'


def _of_one(vm: VmConfig, switches: set[str], is_user: bool, memory_size: int) -> Iterator[str]:
    if vm.memory is not None and vm.memory > memory_size:
        yield f"{vm.memory >> 20} MB of memory, but this host has {memory_size >> 20} MB"
    if vm.name.isascii() and vm.name.isdecimal() and int(vm.name) <= _ID_MAX:
        yield "vmctl takes a number for an id"
    paths = [disk.path for disk in vm.disks if disk.kind is not DiskKind.VHOST_USER]
    for path in dict.fromkeys(path for path in paths if paths.count(path) > 1):
        if any(_is_written(disk) for disk in vm.disks if disk.path == path):
            yield f"disk {path} comes twice"
    try:
        check_ports([forward for each in vm.interfaces for forward in each.forwards])
    except ForwardError as err:
        yield str(err)
    for switch in dict.fromkeys(each.switch for each in vm.interfaces if each.switch):
        if is_user:
            yield f'switch "{switch}": vmd --user has local interfaces only'
        elif switch not in switches:
            yield f'switch "{switch}" is not defined'


def _claims(vm: VmConfig) -> Iterator[str]:
    """Name the resources that no other running VM can have as well."""
    for disk in vm.disks:
        if _is_written(disk):
            yield f"disk {disk.path}"
    for interface in vm.interfaces:
        if interface.tap is not None:
            yield f"interface {interface.tap}"
        if interface.lladdr is not None:
            yield f"lladdr {interface.lladdr}"
        for forward in interface.forwards:
            yield f"forwarded port {forward.protocol} {forward.port}"


def _reads(vm: VmConfig) -> Iterator[str]:
    """Name the disks that no other running VM may write."""
    for disk in vm.disks:
        if not _is_written(disk) and disk.kind is not DiskKind.VHOST_USER:
            yield f"disk {disk.path}"


def _is_written(disk: DiskOption) -> bool:
    return writes_image(disk) and disk.kind is not DiskKind.VHOST_USER
