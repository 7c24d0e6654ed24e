"""A vm.conf written from its Config, for `vmd -nv`: one option a line, without macros.

Reading it again gives the same Config, save where each VM stands. Owners are numbers.
"""

from collections.abc import Iterator

from vmd.config.disks import DiskKind, DiskOption
from vmd.config.forwards import ANY
from vmd.config.model import (
    Config,
    InterfaceConfig,
    Limits,
    Owner,
    Prefix,
    Right,
    SwitchConfig,
    VmConfig,
)
from vmd.config.shares import VHOST_USER, ShareOption
from vmm_kvm.boot_device import BootDevice

_MIB = 1 << 20
_STRING_MAX = 2000  # characters, of up to four bytes


def config_lines(config: Config) -> list[str]:
    """Return the lines of a vm.conf equivalent to `config`."""
    return [
        *_globals(config),
        *(line for switch in config.switches for line in _switch(switch)),
        *(line for vm in config.vms for line in _vm(vm)),
    ]


def quoted(text: str) -> str:
    """Write a string in quotes, or as several adjacent ones if it is very long.

    One with a line break or a NUL does not come from a file. A backslash in front of a quote, space
    or tab, or at the end, takes one more. At the end that one has to have a line break after it,
    which is dropped when the string is read.
    """
    pieces = range(0, len(text) or 1, _STRING_MAX)
    return " ".join(_quoted(text[start : start + _STRING_MAX]) for start in pieces)


def _quoted(text: str) -> str:
    found = ""
    for char in text:
        if char == '"' or (char in " \t" and found.endswith("\\")):
            found += "\\"
        found += char
    if found.endswith("\\"):
        found += "\\\n"
    return f'"{found}"'


def _globals(config: Config) -> Iterator[str]:
    if config.local_prefix is not None:
        nat = " nat" if config.is_nat else ""
        yield f"local prefix {quoted(_prefix4(config.local_prefix))}{nat}"
    if config.local_prefix6 is not None:
        yield f"local inet6 prefix {quoted(_prefix6(config.local_prefix6))}"
    elif config.is_local_inet6:
        yield "local inet6"
    if config.socket_owner is not None:
        yield f"socket owner {_owner(config.socket_owner)}"
    if config.agentx is not None:
        context = f" context {quoted(config.agentx.context)}" if config.agentx.context else ""
        yield f"agentx{context} path {quoted(config.agentx.path)}"
    for name, value in config.limits._asdict().items():
        if value != getattr(Limits(), name):
            yield f"limit {name} {value}"
    if config.snapshots is not None:
        yield f"snapshots {quoted(config.snapshots)}"
    if config.clock != Config().clock:
        yield f"clock {config.clock}"
    if config.staggered is not None:
        parallelism, delay_s = config.staggered
        yield f"staggered start parallel {parallelism} delay {delay_s}"


def _prefix4(prefix: Prefix) -> str:
    return ".".join(map(str, prefix.address.to_bytes(4, "big"))) + f"/{prefix.bits}"


def _prefix6(prefix: Prefix) -> str:
    from ipaddress import IPv6Address  # noqa: PLC0415 - hardly any file has such a prefix

    return f"{IPv6Address(prefix.address)}/{prefix.bits}"


def _owner(owner: Owner) -> str:
    if owner.gid is None:
        return '""' if owner.uid is None else str(owner.uid)
    return quoted(f"{'' if owner.uid is None else owner.uid}:{owner.gid}")


def _switch(switch: SwitchConfig) -> Iterator[str]:
    yield f"switch {quoted(switch.name)} {{"
    yield "\tenable" if switch.is_enabled else "\tdisable"
    yield f"\tinterface {quoted(switch.interface)}"
    if switch.group is not None:
        yield f"\tgroup {quoted(switch.group)}"
    if switch.is_locked:
        yield "\tlocked lladdr"
    if switch.rdomain is not None:
        yield f"\trdomain {switch.rdomain}"
    yield "\tup" if switch.is_up else "\tdown"
    if switch.is_created:
        yield "\tcreate"
    if switch.address is not None:
        yield f"\taddress {quoted(switch.address)}"
    yield "}"


def _vm(vm: VmConfig) -> Iterator[str]:
    template = "" if vm.parent is None else f"{quoted(vm.parent)} instance "
    yield f"vm {template}{quoted(vm.name)} {{"
    yield "\tenable" if vm.is_enabled else "\tdisable"
    if vm.memory is not None:
        yield f"\tmemory {vm.memory // _MIB}M"
    if vm.cpus is not None:
        yield f"\tcpus {vm.cpus}"
    if vm.cpu_limit is not None:
        yield f"\tlimit cpu {vm.cpu_limit}%"
    if vm.is_sev:
        yield "\tseves" if vm.is_sev_es else "\tsev"
    for word, path in (("boot", vm.boot), ("firmware", vm.firmware)):
        if path is not None:
            yield f"\t{word} {quoted(path)}"
    for path in vm.initrd:
        yield f"\tinitrd {quoted(path)}"
    if vm.append is not None:
        yield f"\tappend {quoted(vm.append)}"
    if vm.boot_device is not BootDevice.AUTO:
        yield f"\tboot device {vm.boot_device}"
    for disk in vm.disks:
        yield f"\t{_disk(disk)}"
    if Right.CDROM in vm.given:
        yield f"\tcdrom {quoted(vm.cdrom or '')}"
    if Right.INTERFACE in vm.given and not vm.interfaces:
        yield "\tinterfaces 0"
    for interface in vm.interfaces:
        yield f"\t{_interface(interface)}"
    for share in vm.shares:
        yield f"\t{_share(share)}"
    if vm.seed and vm.seed.cloud_init:
        yield f"\tcloud-init {quoted(vm.seed.cloud_init)}"
    for path in vm.seed.ssh_keys if vm.seed else ():
        yield f"\tssh key {quoted(path)}"
    if vm.has_vsock:
        yield "\tvsock"
    if vm.has_balloon:
        yield "\tballoon"
    if vm.has_watchdog:
        yield "\twatchdog"
    if vm.has_tpm:
        yield "\ttpm"
    for name in vm.after:
        yield f"\tafter {quoted(name)}"
    if vm.stop_timeout_s is not None:
        yield f"\tstop timeout {vm.stop_timeout_s}"
    if vm.owner != Owner():
        yield f"\towner {_owner(vm.owner)}"
    if vm.allow_snapshot:
        yield "\tallow snapshot"
    rights: list[str] = sorted(vm.allow_instance)
    if vm.instance_owner is not None:
        rights.append(f"owner {_owner(vm.instance_owner)}")
    if rights:
        yield f"\tallow instance {{ {', '.join(rights)} }}"
    yield "}"


def _disk(disk: DiskOption) -> str:
    found = f"disk {quoted(disk.path)}"
    if disk.kind is not DiskKind.PROBE:
        found += f" format {quoted(disk.kind)}"
    options = []
    if disk.is_read_only:
        options.append("ro")
    if disk.serial:
        options.append(f"serial {quoted(disk.serial)}")
    if disk.queues != 1:
        options.append(f"queues {disk.queues}")
    if disk.on_error is not None:
        options.append(f"error {disk.on_error}")
    if disk.is_private:
        options.append("private")
    if disk.is_snapshot:
        options.append("snapshot")
    return f"{found} {{ {' '.join(options)} }}" if options else found


def _share(share: ShareOption) -> str:
    found = f"share {quoted(f'{VHOST_USER * share.is_server}{share.path}')} tag {quoted(share.tag)}"
    return found if share.is_server else f"{found} {'ro' if share.is_read_only else 'rw'}"


def _interface(interface: InterfaceConfig) -> str:
    found = "local interface" if interface.is_local else "interface"
    if interface.tap is not None:
        found += f" {quoted(interface.tap)}"
    options = ["up" if interface.is_up else "down"]
    # Keywords that OpenBSD lacks would join a string before them.
    if interface.mtu is not None:
        options.append(f"mtu {interface.mtu}")
    if interface.queues is not None:
        options.append(f"queues {interface.queues}")
    for each in interface.forwards:
        address = quoted(each.address or ANY)
        options.append(f"forward {each.protocol} {address} {each.port} to {each.to_port}")
    if interface.switch is not None:
        options.append(f"switch {quoted(interface.switch)}")
    if interface.group is not None:
        options.append(f"group {quoted(interface.group)}")
    if interface.is_locked or interface.lladdr is not None:
        address = "" if interface.lladdr is None else f" {quoted(interface.lladdr)}"
        options.append(f"{'locked ' if interface.is_locked else ''}lladdr{address}")
    if interface.rdomain is not None:
        options.append(f"rdomain {interface.rdomain}")
    return f"{found} {{ {' '.join(options)} }}"
