"""The VMs that may be written and received, and their targets: decisions alone."""

from collections.abc import Sequence

from vmd.config.disks import DiskKind
from vmd.config.model import Owner, VmConfig
from vmd.rules import vm_state
from vmd.rules.copies import Fitted, copied, lladdr_taken, lladdr_twice, reverted
from vmd.rules.encryption import why_denied
from vmd.rules.policy import Denied, Users, is_name, tied_to_host
from vmd.rules.vm import Passed, Sink, Vm, handover_plan, received_config, why_not_saved
from vmd.rules.vm_state import Ticket
from vmd.wire.messages import ErrorCode
from vmd.wire.transfers import Receive, Send, Snapshot


def sink_of(
    vm: Vm | Denied,
    request: Send | Snapshot,
    passed: Passed | None,
    *,
    ticket: Ticket,
    uid: int,
    users: Users,
) -> tuple[Vm, Sink, vm_state.Send] | Denied:
    """Return the VM, where it is to be written for user `uid`, and the event by which it is told.

    There may be no such VM already.
    """
    if isinstance(vm, Denied):
        return vm
    denied = why_denied(vm.config, "sent, nor kept as a snapshot") or tied_to_host(vm.config)
    if denied:
        return denied
    if vm.sink is not None:
        return Denied(ErrorCode.EALREADY, "the VM is being sent")
    if vm.config.shares:
        return Denied(ErrorCode.EBUSY, why_not_saved(vm.config))
    stream = passed.stream if passed else None
    if isinstance(request, Send):
        event = vm_state.Send(ticket, request.keeps_running, handover=handover_plan(request))
        return vm, Sink(stream, replies=passed.replies if passed else None), event
    if uid not in users.administrators and not vm.config.allow_snapshot:
        text = f'vm "{vm.name}" no permission to make snapshots'
        return Denied(ErrorCode.EPERM, text)
    name = "" if request.file is not None else request.snapshot
    if request.file is None and not is_name(name):
        return Denied(ErrorCode.EINVAL, "invalid snapshot name")
    denied = _check_disks(vm.config, request)
    if denied:
        return denied
    event = vm_state.Send(ticket, keeps_running=True, is_snapshot=True, snapshot=name)
    keeps = not request.without_disks
    return vm, Sink(stream, is_snapshot=True, uid=uid, name=name, keeps_disks=keeps), event


def _check_disks(config: VmConfig, request: Snapshot) -> Denied | None:
    """Return why a snapshot of a VM would lack something that belongs to it, if so."""
    for disk in config.disks:
        if (disk.is_private or disk.is_snapshot) and not disk.is_read_only:
            text = f"disk {disk.path}: what the guest writes vanishes with the VM"
            return Denied(ErrorCode.EBUSY, text)
        is_ours = disk.kind in {DiskKind.PROBE, DiskKind.RAW, DiskKind.QCOW2}
        if not (is_ours or disk.is_read_only or request.without_disks):
            text = f"disk {disk.path}: it cannot be copied: --no-disks leaves it out"
            return Denied(ErrorCode.EBUSY, text)
    return None


def received_vm(
    request: Receive,
    passed: Passed | None,
    uid: int,
    users: Users,
    vms: Sequence[Vm],
) -> Fitted | Denied:
    """Return a VM that `uid` receives; `vms` are those that there are."""
    named = {vm.name: vm for vm in vms}
    existing = named.get(request.name)
    if existing:
        fitted = reverted(existing, request, passed, uid, users)
        return fitted if isinstance(fitted, Denied) else lladdr_taken(existing, vms) or fitted
    if uid not in users.administrators:
        return copied(named.get(request.source), request, passed, uid, users)
    twice = lladdr_twice(request, vms) if request.is_copy else None
    if twice:
        return twice
    # The owner that the stream tells of is one of this host's users only for root.
    owner = Owner(uid if request.uid is None or uid else request.uid, request.gid)
    try:
        return Fitted(received_config(request, owner), passed)
    except ValueError as err:
        return Denied(ErrorCode.EINVAL, str(err))
