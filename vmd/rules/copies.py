"""`start --from` for users other than root, and under the name of a VM that there is; decisions.

A user can write a snapshot by hand, so that it grants nothing: what continues has the configuration
of a VM of that user's, which the snapshot has to fit. From the snapshot come the guest's memory and
the disks that are in it.
"""

from collections.abc import Sequence
from typing import NamedTuple

from vmd.config.disks import DiskKind, DiskOption
from vmd.config.model import MEMORY_DEFAULT, Owner, VmConfig
from vmd.rules import lifecycle
from vmd.rules.policy import Denied, Users, is_name
from vmd.rules.vm import Passed, Vm
from vmd.rules.vm_state import IDLE
from vmd.wire.messages import ErrorCode
from vmd.wire.transfers import Receive


class Fitted(NamedTuple):
    """A VM that continues from a snapshot."""

    config: VmConfig
    passed: Passed | None
    """The uses of the client's files."""
    unused: Passed | None = None
    """The rest of them."""
    vm: Vm | None = None
    """The existing VM that continues so."""


def reverted(
    vm: Vm, request: Receive, passed: Passed | None, uid: int, users: Users
) -> Fitted | Denied:
    """Return what an existing VM is once user `uid` has made it continue from a snapshot."""
    if not (request.is_snapshot and request.is_copy):
        return Denied(ErrorCode.EALREADY, f'there is a VM "{vm.name}"')
    if not users.may(uid, vm.config.owner):
        return Denied(ErrorCode.EPERM, "the VM is not yours")
    if vm.state.phase not in IDLE:
        return Denied(ErrorCode.EALREADY, lifecycle.why_already(vm.state.phase))
    fitted = _fitted(vm.config, request, passed)
    return fitted if isinstance(fitted, Denied) else fitted._replace(vm=vm)


def copied(
    source: Vm | None, request: Receive, passed: Passed | None, uid: int, users: Users
) -> Fitted | Denied:
    """Return a copy, for user `uid`, of the VM of which the snapshot was made."""
    if source is None:
        return Denied(ErrorCode.EPERM, "only for root, unless the VM of the snapshot is there")
    if not users.may(uid, source.config.owner):
        return Denied(ErrorCode.EPERM, f'vm "{source.name}" is not yours')
    if not source.config.allow_snapshot:
        return Denied(ErrorCode.EPERM, f'vm "{source.name}" no permission to make snapshots')
    if not is_name(request.name):
        return Denied(ErrorCode.EINVAL, "invalid VM name")
    for index, interface in enumerate(source.config.interfaces):
        if interface.switch and not interface.is_local:
            text = f"interface {index}: its lladdr would be on switch {interface.switch} twice"
            return Denied(ErrorCode.EINVAL, text)
    config = source.config._replace(
        name=request.name,
        parent=None,
        allow_instance=frozenset(),
        instance_owner=None,
        owner=Owner(uid),
        seed=None,
        after=(),
        where="",
        interfaces=tuple(each._replace(tap=None, forwards=()) for each in source.config.interfaces),
    )
    return _fitted(config, request, passed)


def lladdr_twice(request: Receive, vms: Sequence[Vm]) -> Denied | None:
    """Return why a copy would disturb a VM that is there: both guests would have one lladdr."""
    wanted = [(each.switch, each.lladdr, each.is_local) for each in request.interfaces]
    return _twice(wanted, vms)


def lladdr_taken(vm: Vm, vms: Sequence[Vm]) -> Denied | None:
    """Return why a VM cannot start beside a copy of it, say: both guests would have one lladdr."""
    wanted = [(each.switch, each.lladdr, each.is_local) for each in vm.config.interfaces]
    return _twice(wanted, [other for other in vms if other is not vm])


def _twice(
    wanted: Sequence[tuple[str | None, str | None, bool]], vms: Sequence[Vm]
) -> Denied | None:
    for index, (switch, lladdr, is_local) in enumerate(wanted):
        for vm in vms:
            if vm.state.phase in IDLE or not switch or is_local:
                continue
            for other in vm.config.interfaces:
                if (other.switch, other.lladdr) == (switch, lladdr):
                    text = f"interface {index}: {vm.name} has its lladdr, on switch {switch}"
                    return Denied(ErrorCode.EBUSY, text)
    return None


def _fitted(config: VmConfig, request: Receive, passed: Passed | None) -> Fitted | Denied:
    for what, told, own in (
        ("memory", request.memory, config.memory or MEMORY_DEFAULT),
        ("cpus", request.cpus, config.cpus or 1),
        ("vsock", request.has_vsock, config.has_vsock),
        ("tpm", False, config.has_tpm),  # no VM with one is in a snapshot
        ("disks", len(request.disks), len(config.disks)),
        ("cdrom", bool(request.cdrom), config.cdrom is not None),
        ("shares", 0, len(config.shares)),
        (
            "interfaces",
            [each.lladdr for each in request.interfaces],
            [each.lladdr for each in config.interfaces],
        ),
    ):
        if told != own:
            text = f"the snapshot is of a VM with other {what} than {config.name}"
            return Denied(ErrorCode.EINVAL, text)
    disks: list[DiskOption] = []
    for disk, asked in zip(config.disks, request.disks, strict=True):
        if not asked.window:
            disks.append(disk)
        elif disk.is_read_only:
            text = f"disk {asked.path}: the snapshot is of a VM that wrote to it"
            return Denied(ErrorCode.EINVAL, text)
        else:
            disks.append(
                DiskOption(
                    DiskKind.RAW,
                    asked.path,
                    serial=disk.serial,
                    queues=disk.queues,
                    on_error=disk.on_error,
                    is_snapshot=True,
                    window=asked.window,
                )
            )
    return Fitted(config._replace(disks=tuple(disks)), *_parted(passed, disks))


def _parted(passed: Passed | None, disks: list[DiskOption]) -> tuple[Passed | None, Passed | None]:
    """Return the client's files that are used, and the others: the configuration names those."""
    if passed is None:
        return None, None
    chains = tuple(zip(passed.disks, disks, strict=True))
    used = passed._replace(
        cdrom=None, disks=tuple(chain if disk.window else () for chain, disk in chains)
    )
    unused = Passed(
        uid=passed.uid,
        cdrom=passed.cdrom,
        disks=tuple(chain for chain, disk in chains if not disk.window),
    )
    return used, unused if unused.fds else None
