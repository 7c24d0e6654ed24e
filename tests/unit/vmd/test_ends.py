"""Remains of a VM: its last end, and its log."""

from __future__ import annotations

import pytest

from tests.unit.vmd.registry_host import ALICE, BOB, ROOT, STAFF, Host, code
from vmd.config.disks import DiskKind, DiskOption
from vmd.config.model import Owner, Right, VmConfig
from vmd.rules.ends import GONE_MAX, GONE_PER_USER, LINE_MAX, LINES_KEPT
from vmd.rules.vm_state import Exited, LaunchFailed, Running
from vmd.wire.internal import EndReason
from vmd.wire.messages import (
    ANSWER_MAX,
    DAEMON_TO_CLIENT,
    EndInfo,
    ErrorCode,
    History,
    Lines,
    Reset,
    Start,
    State,
    Status,
    Stop,
    VmInfo,
    Vms,
)
from vmd.wire.parts import DiskRequest

DISKS = (DiskRequest(path="/disk"),)


@pytest.fixture
def host() -> Host:
    """A host with a template whose instances any user may make."""
    host = Host()
    template = VmConfig(
        "template",
        is_enabled=False,
        disks=(DiskOption(DiskKind.RAW, "/t.img"),),
        given=frozenset({Right.DISK}),
        owner=Owner(ROOT),
        allow_instance=frozenset({Right.DISK}),
        instance_owner=Owner(ALICE, STAFF),
    )
    host.run(host.registry.load([template]))
    return host


def live(
    host: Host, name: str, uid: int = ROOT, reason: EndReason | None = EndReason.POWER_OFF
) -> None:
    """Let an ad hoc VM start and end."""
    template = "" if uid == ROOT else "template"
    host.begin(Start(name=name, instance=template, disks=DISKS), uid)
    vm = host.launch(name)
    host.report(vm, Running())
    host.clock.now += 10
    host.end(vm, Exited(reason))


def shown(host: Host, **wanted: bool | str | int) -> tuple[VmInfo, ...]:
    """Return the VMs that `status` lists, except the template."""
    key = host.begin(Status(**wanted))  # type: ignore[arg-type] # fields by name
    answer = host.answers[key]
    assert isinstance(answer, Vms)
    return tuple(vm for vm in answer.vms if vm.name != "template")


def lines(host: Host, uid: int = ROOT, **wanted: str | int) -> list[str]:
    """Return the log lines of a VM."""
    answer = host.answers[host.begin(History(**wanted), uid)]  # type: ignore[arg-type] # the same
    assert isinstance(answer, Lines)
    return [line.text for line in answer.lines]


def test_the_end_of_a_vm_that_is_gone(host: Host) -> None:
    """A gone VM is listed only on request, with its times and the reason of its end."""
    live(host, "a")
    assert shown(host) == ()
    (vm,) = shown(host, gone=True)
    assert (vm.name, vm.state, vm.pid, vm.tty) == ("a", State.GONE, None, "")
    now = host.clock.realtime_s()
    assert vm.last_end == EndInfo(at=now, reason="power-off", exit=0, started_at=now - 10)  # type: ignore[arg-type] # a word of the enum


def test_the_end_of_a_vm_that_stays(host: Host) -> None:
    """The last end is shown until the next one, also while the VM runs again."""
    host.begin(Start(name="template"))
    vm = host.launch("template")
    host.report(vm, Running())
    host.end(vm, Exited(EndReason.CRASHED, message="panic"))
    assert vm.last_end is not None
    assert (vm.last_end.reason, vm.last_end.message) == ("crashed", "panic")
    host.begin(Start(name="template"))
    host.report(host.launch("template"), Running())
    assert vm.last_end.message == "panic"


def test_a_start_that_fails_is_an_end(host: Host) -> None:
    """Even a VM that never had a process has an end: it has no exit, and never ran."""
    host.begin(Start(name="a", disks=DISKS))
    host.launches.clear()
    host.report(host.vm("a"), LaunchFailed(ErrorCode.EIO, "no memory"))
    (vm,) = shown(host, gone=True)
    assert vm.last_end is not None
    assert (vm.last_end.reason, vm.last_end.message) == ("failed", "no memory")
    assert (vm.last_end.exit, vm.last_end.started_at) == (None, None)


def test_a_vm_that_is_there_again(host: Host) -> None:
    """The next VM of the same name and user keeps the history, and is listed once."""
    live(host, "a", reason=EndReason.CRASHED)
    live(host, "a", ALICE)
    host.begin(Start(name="a", disks=DISKS))
    (again, alices) = shown(host, gone=True)
    assert again.state is State.STARTING
    assert again.last_end is not None
    assert again.last_end.reason == "crashed"
    assert alices.last_end is not None
    assert alices.last_end.reason == "power-off"
    assert "failed" in lines(host, name="a")


def test_a_reload_forgets_no_end(host: Host) -> None:
    """A reload forgets VMs of the configuration and makes them again; their ends stay known."""
    config = host.vm("template").config
    host.begin(Start(name="template"))
    vm = host.launch("template")
    host.report(vm, Running())
    host.end(vm, Exited(EndReason.CRASHED))
    host.run(host.registry.forget_idle())
    host.run(host.registry.load([config]))
    again = host.vm("template")
    assert again is not vm
    assert again.last_end == vm.last_end
    assert host.registry.find(0, "template") is again
    assert shown(host, gone=True) == ()


def test_so_many_are_remembered(host: Host) -> None:
    """The latest VMs of each user are remembered, whatever others do, and the latest of all."""
    live(host, "bobs", BOB)
    for number in range(GONE_PER_USER + 5):
        live(host, f"v{number}", ALICE)
        host.clock.now += 10
    names = [vm.name for vm in shown(host, gone=True)]
    assert names[0] == f"v{GONE_PER_USER + 4}"
    assert names[-2:] == ["v5", "bobs"]
    assert len(names) == GONE_PER_USER + 1
    assert GONE_MAX >= 4 * GONE_PER_USER


def test_what_was_logged_of_a_vm(host: Host) -> None:
    """Events and notes are listed in order; those that the client has are left out."""
    live(host, "a")
    vm_id = shown(host, gone=True)[0].id
    expected = ["registered", "starting", "started", "stopped", "removed"]
    assert lines(host, name="a") == lines(host, id=vm_id) == expected
    assert lines(host, name="a", position=3) == ["stopped", "removed"]
    assert lines(host, name="a", position=99) == []
    host.begin(Start(name="a", disks=DISKS))
    host.registry.note(host.vm("a").id, "its network is down")
    assert lines(host, name="a", position=5) == ["registered", "starting", "its network is down"]


def test_who_may_read_what_was_logged(host: Host) -> None:
    """Root and the owner may read the log, of gone VMs too. An unknown VM is an error."""
    live(host, "a", ALICE)
    assert lines(host, ALICE, name="a") == lines(host, ROOT, name="a")
    assert code(host.answers[host.begin(History(name="a"), BOB)]) == "EPERM"
    assert code(host.answers[host.begin(History(name="template"), BOB)]) == "EPERM"
    assert code(host.answers[host.begin(History(name="b"), ALICE)]) == "ENOENT"


def test_what_is_kept_is_bounded(host: Host) -> None:
    """Number and length of lines are bounded; the answer always fits into a packet."""
    vm = host.vm("template")
    for number in range(LINES_KEPT + 10):
        host.registry.note(vm.id, f"{number} " + "\x00" * 2 * LINE_MAX)
    kept = lines(host, name="template")
    assert len(kept) == LINES_KEPT
    assert kept[0].startswith("10 ")
    assert {len(line) for line in kept} == {LINE_MAX}
    (answer,) = [each for each in host.answers.values() if isinstance(each, Lines)][-1:]
    assert answer.position == LINES_KEPT + 11
    assert len(DAEMON_TO_CLIENT.encode(answer)) < ANSWER_MAX


def test_the_end_of_all(host: Host) -> None:
    """Ids start again after a reset; earlier VMs are still known by name."""
    live(host, "a")
    host.begin(Reset())
    host.run(host.registry.remove_all())
    (vm,) = [each for each in shown(host, gone=True) if each.name == "a"]
    assert vm.state is State.GONE
    key = host.begin(Stop(name="a"))
    assert code(host.answers[key]) == "ENOENT"
