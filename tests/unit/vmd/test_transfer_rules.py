"""Rules for snapshots of VMs, and their effects."""

from __future__ import annotations

import pytest

from vmd.config.disks import DiskKind, DiskOption
from vmd.config.model import Owner, VmConfig
from vmd.rules import lifecycle, vm_state
from vmd.rules.policy import Denied, Users
from vmd.rules.transfers import sink_of
from vmd.rules.vm import Passed, Sink, Vm
from vmd.rules.vm_state import Phase, Publish, Reply, SendState, Ticket, VmState
from vmd.wire.messages import Done, ErrorCode, EventKind
from vmd.wire.transfers import Snapshot

ROOT, ALICE = 0, 1001
USERS = Users(frozenset({ROOT}), lambda _uid, _gid: False)
TICKET = Ticket(3, 4)
RAW = DiskOption(DiskKind.RAW, "/vm/disk.img")
PMEM = DiskOption(DiskKind.PMEM, RAW.path)


def decide(
    request: Snapshot, config: VmConfig, uid: int = ROOT, fd: int | None = None
) -> tuple[Sink, vm_state.Send] | Denied:
    """Return the decision about a snapshot of a VM of alice's."""
    vm = Vm(config, VmState(1, phase=Phase.RUNNING), ROOT)
    passed = None if fd is None else Passed(uid=uid, stream=fd)
    wanted = sink_of(vm, request, passed, ticket=TICKET, uid=uid, users=USERS)
    if isinstance(wanted, Denied):
        return wanted
    assert wanted[0] is vm
    return wanted[1:]


def config(*disks: DiskOption, allowed: bool = False) -> VmConfig:
    """Return a VM of alice's."""
    return VmConfig("web", disks=disks, owner=Owner(ALICE), allow_snapshot=allowed)


def test_where_a_snapshot_goes() -> None:
    """A snapshot goes to the store under a name, for its requester, or into a passed file."""
    named = decide(Snapshot(snapshot="one"), config(allowed=True), ALICE)
    assert not isinstance(named, Denied)
    assert named == (
        Sink(None, is_snapshot=True, uid=ALICE, name="one", keeps_disks=True),
        vm_state.Send(TICKET, keeps_running=True, is_snapshot=True, snapshot="one"),
    )
    passed = decide(Snapshot(file=0, snapshot="ignored"), config(), fd=9)
    assert not isinstance(passed, Denied)
    assert passed[0] == Sink(9, is_snapshot=True, uid=ROOT, name="", keeps_disks=True)


def test_an_owner_needs_permission() -> None:
    """Without `allow snapshot` only an administrator makes one."""
    denied = decide(Snapshot(snapshot="one"), config(), ALICE)
    assert denied == Denied(ErrorCode.EPERM, 'vm "web" no permission to make snapshots')
    assert not isinstance(decide(Snapshot(snapshot="one"), config(), ROOT), Denied)


def test_a_name_has_to_be_one() -> None:
    """A snapshot's name follows the rules of VMs' names."""
    assert decide(Snapshot(snapshot="../one"), config()) == Denied(
        ErrorCode.EINVAL, "invalid snapshot name"
    )


@pytest.mark.parametrize(
    ("disk", "text"),
    [
        (RAW, None),
        (PMEM, "it cannot be copied: --no-disks leaves it out"),
        (RAW._replace(is_read_only=True), None),
        (RAW._replace(is_snapshot=True), "what the guest writes vanishes with the VM"),
        (
            PMEM._replace(is_private=True),
            "what the guest writes vanishes with the VM",
        ),
    ],
)
def test_disks_that_a_snapshot_would_lack(disk: DiskOption, text: str | None) -> None:
    """A disk that cannot be copied is refused by name, and left out only on request."""
    denied = decide(Snapshot(snapshot="one"), config(disk))
    if text is None:
        assert not isinstance(denied, Denied)
        return
    assert denied == Denied(ErrorCode.EBUSY, f"disk {disk.path}: {text}")
    left_out = decide(Snapshot(snapshot="one", without_disks=True), config(disk))
    assert isinstance(left_out, Denied) == (disk != PMEM)


def test_a_vm_goes_on_and_the_snapshot_is_told_of() -> None:
    """The client gets an answer, listeners the name, and the VM is unchanged."""
    event = vm_state.Send(TICKET, keeps_running=True, is_snapshot=True, snapshot="one")
    sending, effects = lifecycle.step(VmState(1, phase=Phase.PAUSED, pid=7), event, 1.0)
    assert effects == (SendState(keeps_running=True),)
    assert lifecycle.step(sending, vm_state.Migrating("7%"), 1.5)[1] == (
        Publish(EventKind.WRITING, "7%"),
    )
    done, effects = lifecycle.step(sending, vm_state.Sent(), 2.0)
    assert (done.phase, done.snapshot) == (Phase.PAUSED, None)
    assert effects == (Reply(TICKET, Done(serial=4, id=1)), Publish(EventKind.SNAPSHOT, "one"))
