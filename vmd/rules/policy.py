"""Permissions of users, and limits of VMs; pure.

An administrator, whom no rule restricts, is root, and with `vmd --user` the user that runs it.

Source: sections 2.3, 6, 7.3 and 9 of OpenBSD's behaviour.
"""

import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

from vmd.config.model import (
    MEMORY_DEFAULT,
    InterfaceConfig,
    Limits,
    Owner,
    Right,
    VmConfig,
)
from vmd.config.shares import ShareError, check_tags
from vmd.config.sizes import fmt_scaled
from vmd.wire.messages import ErrorCode, Hold, Load, Log, ParentRequest, Reload, Reset, Source
from vmd.wire.transfers import Receive, Send
from vmm_kvm.limits import (
    DISKS_MAX,
    INTERFACES_MAX,
    MEMORY_MAX,
    MEMORY_MIN,
    NAME_MAX,
    SHARES_MAX,
    VCPUS_MAX,
)

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*", re.ASCII)


class Denied(NamedTuple):
    """Why something is not done."""

    code: ErrorCode
    message: str


class Users(NamedTuple):
    """Users and groups of this host."""

    administrators: frozenset[int]
    """User ids."""
    is_member: Callable[[int, int], bool]
    """Whether a user is in a group, its own included."""

    def may(self, uid: int, owner: Owner | None) -> bool:
        """Tell whether a user may do as an owner does.

        Source: section 9.1 of OpenBSD's behaviour.
        """
        if uid in self.administrators:
            return True
        if owner is None:
            return False
        if owner.uid == uid:
            return True
        return owner.gid is not None and self.is_member(uid, owner.gid)


def needs_administrator(request: ParentRequest) -> bool:
    """Tell whether only an administrator may make a request.

    Source: section 6 of OpenBSD's behaviour.
    """
    if isinstance(request, Receive):
        return not (request.is_snapshot and request.is_copy)
    return isinstance(request, Load | Reload | Source | Reset | Log | Hold | Send)


def is_name(text: str) -> bool:
    """Tell whether `text` can be a VM's name."""
    return len(text) <= NAME_MAX and _NAME.fullmatch(text) is not None


def check_vm(config: VmConfig, *, has_kernel: bool = False) -> Denied | None:
    """Return the reason why such a VM is impossible, if any.

    `has_kernel`: a boot image comes along that `config` does not name.
    """
    if not is_name(config.name):
        return _invalid("invalid VM name")
    if config.parent is None and not config.given:  # an instance may have all of its template
        return Denied(ErrorCode.DISK_MISSING, "invalid configuration, no devices")
    if config.cpus is not None and not 1 <= config.cpus <= VCPUS_MAX:
        return _invalid("invalid number of CPUs")
    if config.memory is not None and not MEMORY_MIN <= config.memory <= MEMORY_MAX:
        return _invalid("invalid memory size")
    if len(config.disks) > DISKS_MAX:
        return _invalid("invalid number of disks")
    if len(config.interfaces) > INTERFACES_MAX:
        return _invalid("invalid number of interfaces")
    if len(config.shares) > SHARES_MAX:
        return _invalid("invalid number of shares")
    try:
        check_tags(config.shares)
    except ShareError as err:
        return _invalid(str(err))
    has_boot = has_kernel or config.boot is not None or config.firmware is not None
    is_template = bool(config.allow_instance) or config.instance_owner is not None
    if not (has_boot or config.disks or config.cdrom is not None or is_template):
        return _invalid("no kernel or disk/cdrom specified")
    return None


def tied_to_host(config: VmConfig) -> Denied | None:
    """Return the reason why a VM can be neither copied nor sent, if any."""
    if config.has_tpm:
        return Denied(ErrorCode.EINVAL, f'vm "{config.name}" has a TPM, whose secrets stay with it')
    return None


def over_limit(configs: Sequence[VmConfig], limits: Limits) -> Denied | None:
    """Return the reason why an ordinary user may not have all of these VMs at a time, if any."""
    if len(configs) > limits.vms:
        return _forbidden(f"limit of {limits.vms} VMs of one user")
    if sum(map(_cpus, configs)) > limits.cpus:
        return _forbidden(f"limit of {limits.cpus} vCPUs of one user's VMs")
    if sum(map(_memory, configs)) > limits.memory:
        return _forbidden(f"limit of {fmt_scaled(limits.memory)} memory of one user's VMs")
    return None


def make_instance(
    template: VmConfig, wanted: VmConfig, uid: int, users: Users, *, has_kernel: bool = False
) -> VmConfig | Denied:
    """Return an instance: `wanted`, completed from `template`; `uid` asks for it.

    `has_kernel`: a boot image comes along that `wanted` does not name.

    Disks are never lent: two VMs would write them. Nor are shared directories, which are opened
    with their owner's rights, nor a tap's name, an lladdr and forwarded ports, which only one VM
    can have. Interfaces that lead elsewhere than the template's are a right of their own; OpenBSD
    looks at their number alone. Unlike OpenBSD's, an instance takes its template's kernel and may
    belong to another group.

    Source: sections 9.2 and 9.4 of OpenBSD's behaviour.
    """
    name = wanted.name
    if not users.may(uid, template.instance_owner):
        return _forbidden(f'vm "{template.name}" no permission to create vm instance')
    is_free = uid in users.administrators
    for right, word, differs in (
        (Right.CPUS, "cpus", wanted.cpus not in {None, _cpus(template)}),
        (Right.MEMORY, "memory", wanted.memory not in {None, _memory(template)}),
        (Right.DISK, "disks", bool(wanted.disks)),
        (
            Right.INTERFACE,
            "interfaces",
            bool(wanted.interfaces) and _leads_elsewhere(wanted, template),
        ),
        (Right.BOOT, "boot image", Right.BOOT in wanted.given),
        (Right.CDROM, "cdrom", wanted.cdrom is not None),
        (Right.SHARE, "shares", bool(wanted.shares)),
    ):
        if differs and not is_free and right not in template.allow_instance:
            return _forbidden(f'vm "{name}" no permission to set {word}')
    if not is_free and any(interface.forwards for interface in wanted.interfaces):
        return _forbidden(f'vm "{name}" no permission to forward ports')
    problem = _reuse(template, wanted)
    if problem:
        return Denied(ErrorCode.EBUSY, f'vm "{name}" {problem} cannot be reused')
    owner = wanted.owner
    if owner.uid is not None and owner.uid not in {uid, template.owner.uid}:
        return _forbidden(f'vm "{name}" user mismatch')
    if wanted.allow_instance:
        return _forbidden(f'vm "{name}" cannot change instance permissions')
    is_parent = Right.INSTANCE in template.allow_instance
    has_own = has_kernel or wanted.boot is not None or wanted.firmware is not None
    kernel = wanted if has_own else template
    return wanted._replace(
        cpus=wanted.cpus if wanted.cpus is not None else template.cpus,
        cpu_limit=wanted.cpu_limit if wanted.cpu_limit is not None else template.cpu_limit,
        memory=wanted.memory if wanted.memory is not None else template.memory,
        interfaces=(
            *wanted.interfaces,
            *map(_lend, template.interfaces[len(wanted.interfaces) :]),
        ),
        cdrom=wanted.cdrom if wanted.cdrom is not None else template.cdrom,
        owner=Owner(
            template.owner.uid if owner.uid is None else owner.uid,
            template.owner.gid if owner.gid is None else owner.gid,
        ),
        allow_instance=template.allow_instance if is_parent else frozenset(),
        instance_owner=template.instance_owner if is_parent else None,
        boot=kernel.boot,
        initrd=wanted.initrd or kernel.initrd,
        append=kernel.append if wanted.append is None else wanted.append,
        firmware=kernel.firmware,
        after=wanted.after or template.after,
        is_sev=wanted.is_sev or template.is_sev,
        is_sev_es=wanted.is_sev_es or template.is_sev_es,
        has_vsock=wanted.has_vsock or template.has_vsock,
        has_balloon=wanted.has_balloon or template.has_balloon,
        has_watchdog=wanted.has_watchdog or template.has_watchdog,
        has_tpm=wanted.has_tpm or template.has_tpm,
        stop_timeout_s=(
            template.stop_timeout_s if wanted.stop_timeout_s is None else wanted.stop_timeout_s
        ),
    )


def _lend(interface: InterfaceConfig) -> InterfaceConfig:
    return interface._replace(tap=None, lladdr=None, forwards=())


def _reuse(template: VmConfig, wanted: VmConfig) -> str | None:
    """Return the parts of the template that an instance may not have as well."""
    paths = {disk.path for disk in template.disks}
    taps = {interface.tap for interface in template.interfaces} - {None}
    addresses = {interface.lladdr for interface in template.interfaces} - {None}
    for disk in wanted.disks:
        if disk.path in paths:
            return f"disk {disk.path}"
    for interface in wanted.interfaces:
        if interface.tap in taps:
            return f"interface {interface.tap}"
        if interface.lladdr in addresses:
            return "lladdr"
    return None


def _leads_elsewhere(wanted: VmConfig, template: VmConfig) -> bool:
    """Tell whether the number of interfaces differs, or one leads where the template's do not.

    One that leads nowhere does no harm.
    """
    if len(wanted.interfaces) != len(template.interfaces):
        return True
    return any(
        (own.is_local or own.switch) and (own.is_local, own.switch) != (lent.is_local, lent.switch)
        for own, lent in zip(wanted.interfaces, template.interfaces, strict=True)
    )


def _cpus(config: VmConfig) -> int:
    return config.cpus or 1


def _memory(config: VmConfig) -> int:
    return config.memory or MEMORY_DEFAULT


def _invalid(message: str) -> Denied:
    return Denied(ErrorCode.EINVAL, message)


def _forbidden(message: str) -> Denied:
    return Denied(ErrorCode.EPERM, message)
