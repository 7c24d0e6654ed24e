"""The order of starts and stops, and the effect of a stop of all on later starts."""

from __future__ import annotations

import pytest

from tests.unit.vmd.registry_host import ALICE, ROOT, Host, code
from vmd.config.disks import DiskKind, DiskOption
from vmd.config.model import Owner, Right, Staggered, VmConfig
from vmd.rules.trial import trial
from vmd.rules.vm_state import Exited, LaunchFailed, Running
from vmd.wire.internal import EndReason
from vmd.wire.messages import Done, ErrorCode, Hold, Start, Started, State, Stop, Terminated

STOPPED = Exited(EndReason.STOPPED)


def a_vm(name: str, *after: str, enabled: bool = True) -> VmConfig:
    """Return a VM that starts after others."""
    return VmConfig(
        name,
        is_enabled=enabled,
        disks=(DiskOption(DiskKind.RAW, f"/{name}.img"),),
        given=frozenset({Right.DISK}),
        owner=Owner(ROOT),
        after=after,
    )


@pytest.fixture
def host() -> Host:
    """A host that can start any number at once."""
    host = Host()
    host.registry.staggered = Staggered(8, 30)
    return host


def load(host: Host, *configs: VmConfig) -> None:
    """Let the registry have a configuration."""
    assert host.registry.judge(configs) == []
    host.run(host.registry.load(configs))


def run(host: Host, *names: str) -> None:
    """Let VMs that are starting run."""
    for name in names:
        host.report(host.launch(name), Running())


# Starting


def test_a_vm_starts_when_those_before_it_run(host: Host) -> None:
    """A VM starts once those before it run, in any order of the file; a process is not enough."""
    load(host, a_vm("web", "app", "db"), a_vm("app", "db"), a_vm("db"))
    waiting, starting, running = State.WAITING, State.STARTING, State.RUNNING
    assert host.states() == {"web": waiting, "app": waiting, "db": starting}
    db = host.launch("db")
    assert host.states() == {"web": waiting, "app": waiting, "db": starting}
    host.report(db, Running())
    assert host.states() == {"web": waiting, "app": starting, "db": running}
    run(host, "app")
    assert host.states() == {"web": starting, "app": running, "db": running}


def test_one_that_fails_or_does_not_start_holds_up_nobody(host: Host) -> None:
    """It is an order, not a condition: failed, unknown and disabled VMs do not delay others."""
    load(host, a_vm("off", enabled=False), a_vm("db"), a_vm("web", "db", "off", "nobody"))
    host.launches.remove(host.vm("db").id)
    host.report(host.vm("db"), LaunchFailed(ErrorCode.EIO, "no disk"))
    assert host.states()["web"] is State.STARTING


def test_starts_in_order_are_staggered_too(host: Host) -> None:
    """A VM whose turn has come waits for the next round if this one is full."""
    host.registry.staggered = Staggered(2, 30)
    load(host, a_vm("db"), a_vm("web", "db"), a_vm("other"))
    assert host.launches == [host.vm("db").id, host.vm("other").id]
    run(host, "db")
    assert host.states()["web"] is State.WAITING
    host.wait_for_turn()
    assert host.states()["web"] is State.STARTING


def test_a_start_by_hand_waits_for_nothing(host: Host) -> None:
    """A start by hand does not wait."""
    load(host, a_vm("db"), a_vm("web", "db"))
    host.begin(Start(name="web"))
    assert host.states()["web"] is State.STARTING


def test_stopping_what_is_waited_for_lets_the_others_start(host: Host) -> None:
    """If a VM that was to start first is stopped, the others start."""
    host.registry.staggered = Staggered(1, 30)
    load(host, a_vm("first"), a_vm("db"), a_vm("web", "db"))
    key = host.begin(Stop(name="db"))
    assert host.answers[key] == Done(serial=key[1], id=host.vm("db").id)
    host.wait_for_turn()
    assert host.states() == {
        "first": State.STARTING,
        "db": State.STOPPED,
        "web": State.STARTING,
    }


@pytest.mark.parametrize(
    ("configs", "what"),
    [
        ([a_vm("a", "a")], "a after a"),
        ([a_vm("a", "b"), a_vm("b", "a")], "b after a after b"),
        ([a_vm("a", "b"), a_vm("b", "c"), a_vm("c", "x", "a")], "c after a after b after c"),
    ],
)
def test_a_ring_is_refused(configs: list[VmConfig], what: str) -> None:
    """The refusal names the VM that closes the ring, and all on the way."""
    (line,) = trial(configs)
    assert line == f'vm "{configs[-1].name}" failed: it starts after itself: {what}'


def test_a_ring_over_two_files_is_refused(host: Host) -> None:
    """A file that is loaded later is refused if it closes a ring with VMs that exist."""
    load(host, a_vm("a", "b"))
    (line,) = host.registry.judge([a_vm("b", "a")])
    assert "it starts after itself" in line


def test_two_ways_to_one_vm_are_no_ring() -> None:
    """Many VMs may start after one, and one after many."""
    assert trial([a_vm("db"), a_vm("a", "db"), a_vm("b", "db"), a_vm("web", "a", "b")]) == []


# Stopping


def test_a_turn_that_is_cancelled(host: Host) -> None:
    """`stop` of a waiting VM removes it from the queue, with or without a wait; `start` works."""
    host.registry.staggered = Staggered(1, 30)
    load(host, a_vm("a"), a_vm("b"), a_vm("c"))
    plain = host.begin(Stop(name="b"))
    waits = host.begin(Stop(name="c", wait=True))
    assert isinstance(host.answers[plain], Done)
    assert isinstance(host.answers[waits], Terminated)
    host.wait_for_turn()
    assert host.states() == {"a": State.STARTING, "b": State.STOPPED, "c": State.STOPPED}
    host.begin(Start(name="c"))
    assert host.states()["c"] is State.STARTING


def test_vms_stop_in_the_reverse_order(host: Host) -> None:
    """Each VM is asked when those that start after it have ended; every waiter is answered."""
    load(host, a_vm("db"), a_vm("app", "db"), a_vm("web", "app"), a_vm("alone"))
    run(host, "db", "alone")
    run(host, "app")
    run(host, "web")
    keys = {
        name: host.begin(Stop(name=name, wait=True, in_order=True))
        for name in ("web", "app", "db", "alone")
    }
    told = {name: host.told[host.vm(name).id] for name in keys}
    assert told == {"web": ["StopVm"], "app": [], "db": [], "alone": ["StopVm"]}
    host.end(host.vm("web"), STOPPED)
    assert told == {"web": ["StopVm"], "app": ["StopVm"], "db": [], "alone": ["StopVm"]}
    assert isinstance(host.answers[keys["web"]], Terminated)
    host.end(host.vm("app"), STOPPED)
    assert told["db"] == ["StopVm"]
    host.end(host.vm("db"), STOPPED)
    assert isinstance(host.answers[keys["db"]], Terminated)


def test_an_order_without_a_wait(host: Host) -> None:
    """Without a wait the client is answered at once, and may leave: the order is kept."""
    load(host, a_vm("db"), a_vm("web", "db"))
    run(host, "db")
    run(host, "web")
    host.begin(Stop(name="web", in_order=True))
    key = host.begin(Stop(name="db", in_order=True))
    assert isinstance(host.answers[key], Done)
    host.leave(1)
    db = host.vm("db")
    assert host.told[db.id] == []
    host.end(host.vm("web"), STOPPED)
    assert host.told[db.id] == ["StopVm"]


def test_one_that_is_not_being_stopped_is_not_waited_for(host: Host) -> None:
    """A VM is stopped at once if its follower is not being stopped, or it is not in order."""
    load(host, a_vm("db"), a_vm("web", "db"))
    run(host, "db")
    run(host, "web")
    host.begin(Stop(name="db", in_order=True))
    assert host.told[host.vm("db").id] == ["StopVm"]


def test_an_end_by_force_waits_for_nobody(host: Host) -> None:
    """`stop -f` ends a VM now; a later plain `stop` does not wait either."""
    load(host, a_vm("db"), a_vm("web", "db"))
    run(host, "db")
    run(host, "web")
    host.begin(Stop(name="web", in_order=True))
    host.begin(Stop(name="db", in_order=True))
    host.begin(Stop(name="db", force=True, in_order=True))
    assert host.told[host.vm("db").id] == ["KillVm"]


def test_a_vm_that_is_starting_is_stopped(host: Host) -> None:
    """A starting VM is stopped in order, before it has a process and after."""
    load(host, a_vm("early"), a_vm("late"))
    host.launch("late")
    keys = [host.begin(Stop(name=name, wait=True, in_order=True)) for name in ("early", "late")]
    assert {host.vm(name).state.phase.value for name in ("early", "late")} == {"stopping"}
    host.processes[host.vm("early").id] = 99
    host.launches.clear()
    for name in ("early", "late"):
        host.end(host.vm(name), STOPPED)
    assert all(isinstance(host.answers[key], Terminated) for key in keys)


# Holding


def test_nothing_starts_while_starts_are_held(host: Host) -> None:
    """Nothing starts while held; waiting VMs start when the last holder leaves."""
    host.registry.staggered = Staggered(1, 30)
    load(host, a_vm("a"), a_vm("b"), a_vm("c", enabled=False))
    for client in (7, 8):
        key = host.begin(Hold(), client=client)
        assert isinstance(host.answers[key], Done)
    refused = host.begin(Start(name="c"))
    assert code(host.answers[refused]) == "EAGAIN"
    host.wait_for_turn()
    assert host.states()["b"] is State.WAITING
    host.leave(7)
    assert host.states()["b"] is State.WAITING
    host.leave(8)
    assert host.states()["b"] is State.STARTING
    started = host.begin(Start(name="c"))
    run(host, "c")
    assert isinstance(host.answers[started], Started)


def test_only_root_holds(host: Host) -> None:
    """A user cannot keep other users' VMs from starting."""
    key = host.begin(Hold(), ALICE)
    assert code(host.answers[key]) == "EPERM"
    load(host, a_vm("a"))
    assert host.states()["a"] is State.STARTING


def test_a_start_by_hand_of_one_that_starts_in_its_turn(host: Host) -> None:
    """The starter gets an answer when it runs; a second one is told that it is starting."""
    load(host, a_vm("web"))
    first, second = (host.begin(Start(name="web"), client=client) for client in (1, 2))
    assert code(host.answers[second]) == "EALREADY"
    run(host, "web")
    assert isinstance(host.answers[first], Started)
