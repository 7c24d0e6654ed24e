"""The lifecycle, in every state and at every event."""

from __future__ import annotations

import typing

import pytest

from tests.unit.vmd.lifecycle_told import (
    ASKER,
    SENDER,
    STARTER,
    WAITER,
    WATCHER,
    a_vm,
    outcome,
    told,
)
from vmd.rules.lifecycle import EARLY_MAX, EARLY_S, shown_state, step
from vmd.rules.vm_state import (
    Attach,
    Capture,
    Captured,
    ClientLeft,
    Discard,
    Effect,
    Enqueue,
    Event,
    Exited,
    Halted,
    Held,
    Launched,
    LaunchFailed,
    Migrating,
    Overdue,
    Pause,
    Paused,
    Phase,
    Publish,
    Running,
    Send,
    SendFailed,
    SendUnpause,
    Sent,
    Silent,
    Start,
    Stop,
    Unpause,
    Unpaused,
    VmState,
    Wait,
)
from vmd.wire.internal import EndReason
from vmd.wire.messages import ErrorCode, EventKind, State
from vmm_kvm.errors import HaltReason

EVENTS: dict[str, Event] = {
    "start": Start(ASKER),
    "its turn": Start(),
    "stop": Stop(ASKER),
    "stop -w": Stop(ASKER, wait=True),
    "stop -f": Stop(ASKER, force=True),
    "stop -fw": Stop(ASKER, force=True, wait=True),
    "wait": Wait(ASKER),
    "pause": Pause(ASKER),
    "unpause": Unpause(ASKER),
    "send": Send(ASKER),
    "send -l": Send(ASKER, keeps_running=True),
    "capture": Capture(ASKER),
    "migrating": Migrating("round 1"),
    "console": Attach(ASKER),
    "enqueue": Enqueue(),
    "overdue": Overdue(),
    "discard": Discard(),
    "client left": ClientLeft(99),
    "launched": Launched(701, "/dev/pts/7"),
    "launch failed": LaunchFailed(ErrorCode.DISK_MISSING, "disk.img: in use"),
    "running": Running(),
    "paused": Paused(),
    "halted": Halted(HaltReason.NO_SPACE, "/disk.img: No space left on device"),
    "unpaused": Unpaused(),
    "silent": Silent("it does not answer"),
    "held": Held("disk0 does not end"),
    "captured": Captured(),
    "sent": Sent(),
    "send failed": SendFailed(ErrorCode.EIO, "broken pipe"),
    "power off": Exited(EndReason.POWER_OFF),
    "reboot": Exited(EndReason.REBOOT),
    "stopped": Exited(EndReason.STOPPED),
    "crashed": Exited(EndReason.CRASHED),
    "failed": Exited(EndReason.FAILED, ErrorCode.ENOMEM),
    "killed": Exited(None),
    "was sent": Exited(EndReason.SENT),
}

# The result of each event: the phase afterwards, and the effects. In each phase every possible
# client waits: a starter while it starts, a waiter while it lives, a pauser, an unpauser.
TABLE = {
    "start": {
        "stopped": "starting: +starting launch",
        "waiting": "starting: +starting launch",
        "starting": "starting: asker!EALREADY",
        "running": "running: asker!EALREADY",
        "pausing": "pausing: asker!EALREADY",
        "paused": "paused: asker!EALREADY",
        "unpausing": "unpausing: asker!EALREADY",
        "sending": "sending: asker!EALREADY",
        "stopping": "stopping: asker!EALREADY",
    },
    "its turn": {
        "stopped": "stopped:",
        "waiting": "starting: +starting launch",
        "starting": "starting:",
        "running": "running:",
        "pausing": "pausing:",
        "paused": "paused:",
        "unpausing": "unpausing:",
        "sending": "sending:",
        "stopping": "stopping:",
    },
    "stop": {
        "stopped": "stopped: asker!not-running",
        "waiting": "stopped: asker=done +stopped",
        "starting": "stopping: asker=done +stopping starter!EINTR stop",
        "running": "stopping: asker=done +stopping stop",
        "pausing": "stopping: asker=done +stopping pauser!EINTR unpause stop",
        "paused": "stopping: asker=done +stopping unpause stop",
        "unpausing": "stopping: asker=done +stopping unpauser!EINTR stop",
        "sending": "stopping: asker=done +stopping cancel stop",
        "stopping": "stopping: asker!EALREADY",
    },
    "stop -w": {
        "stopped": "stopped: asker!not-running",
        "waiting": "stopped: asker=terminated +stopped",
        "starting": "stopping: +stopping starter!EINTR stop",
        "running": "stopping: +stopping stop",
        "pausing": "stopping: +stopping pauser!EINTR unpause stop",
        "paused": "stopping: +stopping unpause stop",
        "unpausing": "stopping: +stopping unpauser!EINTR stop",
        "sending": "stopping: +stopping cancel stop",
        "stopping": "stopping: asker!EALREADY",
    },
    "stop -f": {
        "stopped": "stopped: asker!not-running",
        "waiting": "stopped: asker=done +stopped",
        "starting": "stopping: asker=done +stopping starter!EINTR kill",
        "running": "stopping: asker=done +stopping kill",
        "pausing": "stopping: asker=done +stopping pauser!EINTR kill",
        "paused": "stopping: asker=done +stopping kill",
        "unpausing": "stopping: asker=done +stopping unpauser!EINTR kill",
        "sending": "stopping: asker=done +stopping cancel kill",
        "stopping": "stopping: asker=done kill",
    },
    "stop -fw": {
        "stopped": "stopped: asker!not-running",
        "waiting": "stopped: asker=terminated +stopped",
        "starting": "stopping: +stopping starter!EINTR kill",
        "running": "stopping: +stopping kill",
        "pausing": "stopping: +stopping pauser!EINTR kill",
        "paused": "stopping: +stopping kill",
        "unpausing": "stopping: +stopping unpauser!EINTR kill",
        "sending": "stopping: +stopping cancel kill",
        "stopping": "stopping: kill",
    },
    "wait": {
        "stopped": "stopped: asker!not-running",
        "waiting": "waiting: asker!not-running",
        "starting": "starting:",
        "running": "running:",
        "pausing": "pausing:",
        "paused": "paused:",
        "unpausing": "unpausing:",
        "sending": "sending:",
        "stopping": "stopping:",
    },
    "pause": {
        "stopped": "stopped: asker!not-running",
        "waiting": "waiting: asker!not-running",
        "starting": "starting: asker!EAGAIN",
        "running": "pausing: pause",
        "pausing": "pausing:",
        "paused": "paused: asker=done",
        "unpausing": "unpausing:",
        "sending": "sending: asker!EBUSY",
        "stopping": "stopping: asker!not-running",
    },
    "unpause": {
        "stopped": "stopped: asker!not-running",
        "waiting": "waiting: asker!not-running",
        "starting": "starting: asker!EAGAIN",
        "running": "running: asker=done",
        "pausing": "pausing:",
        "paused": "unpausing: unpause",
        "unpausing": "unpausing:",
        "sending": "sending: asker!EBUSY",
        "stopping": "stopping: asker!not-running",
    },
    "console": {
        "stopped": "stopped: asker!not-running",
        "waiting": "waiting: asker!not-running",
        "starting": "starting: asker=console",
        "running": "running: asker=console",
        "pausing": "pausing: asker=console",
        "paused": "paused: asker=console",
        "unpausing": "unpausing: asker=console",
        "sending": "sending: asker=console",
        "stopping": "stopping: asker=console",
    },
    "enqueue": {
        "stopped": "waiting: +waiting",
        "waiting": "waiting:",
        "starting": "starting:",
        "running": "running:",
        "pausing": "pausing:",
        "paused": "paused:",
        "unpausing": "unpausing:",
        "sending": "sending:",
        "stopping": "stopping:",
    },
    "overdue": {
        "stopped": "stopped:",
        "waiting": "waiting:",
        "starting": "starting:",
        "running": "running:",
        "pausing": "pausing:",
        "paused": "paused:",
        "unpausing": "unpausing:",
        "sending": "sending:",
        "stopping": "stopping: kill",
    },
    "discard": {
        "stopped": "stopped: +removed forget",
        "waiting": "stopped: +removed forget",
        "starting": "stopping: +stopping starter!EINTR kill",
        "running": "stopping: +stopping kill",
        "pausing": "stopping: +stopping pauser!EINTR kill",
        "paused": "stopping: +stopping kill",
        "unpausing": "stopping: +stopping unpauser!EINTR kill",
        "sending": "stopping: +stopping cancel kill",
        "stopping": "stopping: kill",
    },
    "client left": {
        "stopped": "stopped:",
        "waiting": "waiting:",
        "starting": "starting:",
        "running": "running:",
        "pausing": "pausing:",
        "paused": "paused:",
        "unpausing": "unpausing:",
        "sending": "sending:",
        "stopping": "stopping:",
    },
    "launched": {
        "stopped": "stopped: kill",
        "waiting": "waiting: kill",
        "starting": "starting:",
        "running": "running:",
        "pausing": "pausing:",
        "paused": "paused:",
        "unpausing": "unpausing:",
        "sending": "sending:",
        "stopping": "stopping:",
    },
    "launch failed": {
        "stopped": "stopped:",
        "waiting": "waiting:",
        "starting": "stopped: release starter!disk-missing waiter=terminated +failed",
        "running": "stopped: release waiter=terminated +failed",
        "pausing": "stopped: release pauser!EINTR waiter=terminated +failed",
        "paused": "stopped: release waiter=terminated +failed",
        "unpausing": "stopped: release unpauser!EINTR waiter=terminated +failed",
        "sending": "stopped: release sender!EIO waiter=terminated +failed",
        "stopping": "stopped: release waiter=terminated +stopped",
    },
    "running": {
        "stopped": "stopped:",
        "waiting": "waiting:",
        "starting": "running: starter=started +started",
        "running": "running:",
        "pausing": "pausing:",
        "paused": "paused:",
        "unpausing": "unpausing:",
        "sending": "sending:",
        "stopping": "stopping:",
    },
    "paused": {
        "stopped": "stopped:",
        "waiting": "waiting:",
        "starting": "starting:",
        "running": "running:",
        "pausing": "paused: pauser=done +paused",
        "paused": "paused:",
        "unpausing": "unpausing:",
        "sending": "sending:",
        "stopping": "stopping:",
    },
    "halted": {
        "stopped": "stopped:",
        "waiting": "waiting:",
        "starting": "starting:",
        "running": "paused: +paused",
        "pausing": "pausing:",
        "paused": "paused:",
        "unpausing": "unpausing:",
        "sending": "sending:",
        "stopping": "stopping:",
    },
    "unpaused": {
        "stopped": "stopped:",
        "waiting": "waiting:",
        "starting": "starting:",
        "running": "running:",
        "pausing": "pausing:",
        "paused": "paused:",
        "unpausing": "running: unpauser=done +unpaused",
        "sending": "sending:",
        "stopping": "stopping:",
    },
    "power off": {
        "stopped": "stopped:",
        "waiting": "waiting:",
        "starting": "stopped: release starter!EIO waiter=terminated +stopped",
        "running": "stopped: release waiter=terminated +stopped",
        "pausing": "stopped: release pauser!EINTR waiter=terminated +stopped",
        "paused": "stopped: release waiter=terminated +stopped",
        "unpausing": "stopped: release unpauser!EINTR waiter=terminated +stopped",
        "sending": "stopped: release sender!EIO waiter=terminated +stopped",
        "stopping": "stopped: release waiter=terminated +stopped",
    },
    "reboot": {
        "stopped": "stopped:",
        "waiting": "waiting:",
        "starting": "starting: keep-tty starter!EIO waiter=terminated +rebooted relaunch",
        "running": "starting: keep-tty waiter=terminated +rebooted relaunch",
        "pausing": "starting: keep-tty pauser!EINTR waiter=terminated +rebooted relaunch",
        "paused": "starting: keep-tty waiter=terminated +rebooted relaunch",
        "unpausing": "starting: keep-tty unpauser!EINTR waiter=terminated +rebooted relaunch",
        "sending": "starting: keep-tty sender!EIO waiter=terminated +rebooted relaunch",
        "stopping": "stopped: release waiter=terminated +stopped",
    },
    "stopped": {
        "stopped": "stopped:",
        "waiting": "waiting:",
        "starting": "stopped: release starter!EIO waiter=terminated +stopped",
        "running": "stopped: release waiter=terminated +stopped",
        "pausing": "stopped: release pauser!EINTR waiter=terminated +stopped",
        "paused": "stopped: release waiter=terminated +stopped",
        "unpausing": "stopped: release unpauser!EINTR waiter=terminated +stopped",
        "sending": "stopped: release sender!EIO waiter=terminated +stopped",
        "stopping": "stopped: release waiter=terminated +stopped",
    },
    "crashed": {
        "stopped": "stopped:",
        "waiting": "waiting:",
        "starting": "stopped: release starter!EIO waiter=terminated +failed",
        "running": "stopped: release waiter=terminated +failed",
        "pausing": "stopped: release pauser!EINTR waiter=terminated +failed",
        "paused": "stopped: release waiter=terminated +failed",
        "unpausing": "stopped: release unpauser!EINTR waiter=terminated +failed",
        "sending": "stopped: release sender!EIO waiter=terminated +failed",
        "stopping": "stopped: release waiter=terminated +stopped",
    },
    "failed": {
        "stopped": "stopped:",
        "waiting": "waiting:",
        "starting": "stopped: release starter!ENOMEM waiter=terminated +failed",
        "running": "stopped: release waiter=terminated +failed",
        "pausing": "stopped: release pauser!EINTR waiter=terminated +failed",
        "paused": "stopped: release waiter=terminated +failed",
        "unpausing": "stopped: release unpauser!EINTR waiter=terminated +failed",
        "sending": "stopped: release sender!EIO waiter=terminated +failed",
        "stopping": "stopped: release waiter=terminated +stopped",
    },
    "killed": {
        "stopped": "stopped:",
        "waiting": "waiting:",
        "starting": "stopped: release starter!EIO waiter=terminated +failed",
        "running": "stopped: release waiter=terminated +failed",
        "pausing": "stopped: release pauser!EINTR waiter=terminated +failed",
        "paused": "stopped: release waiter=terminated +failed",
        "unpausing": "stopped: release unpauser!EINTR waiter=terminated +failed",
        "sending": "stopped: release sender!EIO waiter=terminated +failed",
        "stopping": "stopped: release waiter=terminated +stopped",
    },
    "send": {
        "stopped": "stopped: asker!not-running",
        "waiting": "waiting: asker!not-running",
        "starting": "starting: asker!EAGAIN",
        "running": "sending: send",
        "pausing": "pausing: asker!EAGAIN",
        "paused": "sending: send",
        "unpausing": "unpausing: asker!EAGAIN",
        "sending": "sending: asker!EALREADY",
        "stopping": "stopping: asker!not-running",
    },
    "send -l": {
        "stopped": "stopped: asker!not-running",
        "waiting": "waiting: asker!not-running",
        "starting": "starting: asker!EAGAIN",
        "running": "sending: send-and-go-on",
        "pausing": "pausing: asker!EAGAIN",
        "paused": "sending: send-and-go-on",
        "unpausing": "unpausing: asker!EAGAIN",
        "sending": "sending: asker!EALREADY",
        "stopping": "stopping: asker!not-running",
    },
    "capture": {
        "stopped": "stopped: asker!not-running",
        "waiting": "waiting: asker!not-running",
        "starting": "starting: asker!EAGAIN",
        "running": "sending: capture",
        "pausing": "pausing: asker!EAGAIN",
        "paused": "sending: capture",
        "unpausing": "unpausing: asker!EAGAIN",
        "sending": "sending: asker!EALREADY",
        "stopping": "stopping: asker!not-running",
    },
    "captured": {
        "stopped": "stopped:",
        "waiting": "waiting:",
        "starting": "starting:",
        "running": "running:",
        "pausing": "pausing:",
        "paused": "paused:",
        "unpausing": "unpausing:",
        "sending": "running: sender=done",
        "stopping": "stopping:",
    },
    "held": {
        "stopped": "stopped:",
        "waiting": "waiting:",
        "starting": "stopping: +stopping starter!EINTR kill waiter!EBUSY",
        "running": "stopping: +stopping kill waiter!EBUSY",
        "pausing": "stopping: +stopping pauser!EINTR kill waiter!EBUSY",
        "paused": "stopping: +stopping kill waiter!EBUSY",
        "unpausing": "stopping: +stopping unpauser!EINTR kill waiter!EBUSY",
        "sending": "stopping: +stopping cancel kill waiter!EBUSY",
        "stopping": "stopping: waiter!EBUSY",
    },
    "silent": {
        "stopped": "stopped:",
        "waiting": "waiting:",
        "starting": "starting:",
        "running": "running:",
        "pausing": "pausing: pauser!EAGAIN",
        "paused": "paused:",
        "unpausing": "unpausing: unpauser!EAGAIN",
        "sending": "sending:",
        "stopping": "stopping:",
    },
    "migrating": {
        **{phase.value: f"{phase.value}:" for phase in Phase},
        "sending": "sending: +migrating",
    },
    "sent": {
        "stopped": "stopped:",
        "waiting": "waiting:",
        "starting": "starting:",
        "running": "running:",
        "pausing": "pausing:",
        "paused": "paused:",
        "unpausing": "unpausing:",
        "sending": "running: sender=done +sent",
        "stopping": "stopping:",
    },
    "send failed": {
        "stopped": "stopped:",
        "waiting": "waiting:",
        "starting": "starting:",
        "running": "running:",
        "pausing": "pausing:",
        "paused": "paused:",
        "unpausing": "unpausing:",
        "sending": "running: sender!EIO",
        "stopping": "stopping:",
    },
    "was sent": {
        "stopped": "stopped:",
        "waiting": "waiting:",
        "starting": "stopped: release starter!EIO waiter=terminated +sent +stopped",
        "running": "stopped: release waiter=terminated +sent +stopped",
        "pausing": "stopped: release pauser!EINTR waiter=terminated +sent +stopped",
        "paused": "stopped: release waiter=terminated +sent +stopped",
        "unpausing": "stopped: release unpauser!EINTR waiter=terminated +sent +stopped",
        "sending": "stopped: release sender=done waiter=terminated +sent +stopped",
        "stopping": "stopped: release waiter=terminated +sent +stopped",
    },
}


@pytest.mark.parametrize("phase", Phase, ids=lambda phase: phase.value)
@pytest.mark.parametrize("event", EVENTS)
def test_every_event_in_every_phase(event: str, phase: Phase) -> None:
    """The table has the result, cell by cell."""
    assert outcome(a_vm(phase), EVENTS[event]) == TABLE[event][phase.value]


def test_the_table_has_every_event() -> None:
    """A new kind of event must have its row."""
    assert {type(event) for event in EVENTS.values()} == set(typing.get_args(Event))


def test_states_have_openbsds_names() -> None:
    """A user sees eight phases as OpenBSD's five words, and one of ours."""
    assert {phase.value: shown_state(a_vm(phase)) for phase in Phase} == {
        "stopped": State.STOPPED,
        "waiting": State.WAITING,
        "starting": State.STARTING,
        "running": State.RUNNING,
        "pausing": State.RUNNING,
        "paused": State.PAUSED,
        "unpausing": State.PAUSED,
        "sending": State.RUNNING,
        "stopping": State.STOPPING,
    }


def test_a_template_stays_paused() -> None:
    """A template can be cloned once it is paused, and not before; it cannot be unpaused."""
    template = a_vm(Phase.RUNNING)._replace(is_template=True)
    assert outcome(template, Capture(ASKER)) == "running: asker!EBUSY"
    paused = template._replace(phase=Phase.PAUSED)
    assert outcome(paused, Unpause(ASKER)) == "paused: asker!EBUSY"
    assert outcome(paused, Capture(ASKER)) == "sending: capture"
    assert outcome(template._replace(phase=Phase.PAUSING), Unpause(ASKER)) == "pausing: asker!EBUSY"
    stopped, _ = step(paused, EVENTS["power off"], 100.0)
    assert not stopped.is_template


HALTED = EVENTS["halted"]


def test_a_vm_that_may_run_elsewhere() -> None:
    """A VM in doubt is paused, shown as such, and continues or stops only by force."""
    in_doubt, failed = Halted(HaltReason.IN_DOUBT, "nobody knows"), SendFailed(ErrorCode.EIO, "it")
    for events in ((failed, in_doubt), (in_doubt, failed)):
        vm = a_vm(Phase.SENDING)
        done: list[Effect] = []
        for event in events:
            vm, effects = step(vm, event, 100.0)
            done += effects
        assert (vm.phase, vm.halt, len(done)) == (Phase.PAUSED, in_doubt, 2)
        assert Publish(EventKind.PAUSED, "in doubt: nobody knows") in done
    for request in (Unpause(ASKER), Stop(ASKER), Send(ASKER)):
        assert outcome(vm, request) == "paused: asker!EBUSY"
    assert outcome(vm, Stop(None)).startswith("stopping: ")
    assert "kill" in outcome(vm, Stop(None))
    vm, effects = step(vm, Unpause(ASKER, force=True), 100.0)
    assert effects == (SendUnpause(force=True),)
    assert outcome(vm, Halted(HaltReason.IN_DOUBT, "in use")) == "paused: asker!EBUSY"
    vm, _ = step(vm, Unpaused(), 100.0)
    assert (vm.phase, vm.halt) == (Phase.RUNNING, None)


@pytest.mark.parametrize(
    "events",
    [
        (HALTED,),
        (Pause(ASKER), HALTED, Paused()),
        (Pause(ASKER), Paused(), HALTED),
        (HALTED, Unpause(ASKER), Unpaused(), HALTED),
    ],
)
def test_a_vm_tells_why_it_stands_still(events: tuple[Event, ...]) -> None:
    """The reason is kept, whether a user requests a pause at the same time or not."""
    vm = a_vm(Phase.RUNNING)
    published = []
    for event in events:
        vm, effects = step(vm, event, 100.0)
        published += [effect for effect in effects if isinstance(effect, Publish)]
    assert (vm.phase, vm.halt) == (Phase.PAUSED, HALTED)
    text = "no space: /disk.img: No space left on device"
    assert Publish(EventKind.PAUSED, text) in published or events[-1] is HALTED


@pytest.mark.parametrize(
    "events",
    [
        (Unpause(ASKER), Unpaused()),
        (Stop(ASKER),),
        (Exited(None),),
        (Unpause(ASKER), Exited(EndReason.REBOOT)),
    ],
)
def test_a_vm_that_goes_on_has_no_reason(events: tuple[Event, ...]) -> None:
    """The reason is cleared when it continues, stops or ends."""
    vm, _ = step(a_vm(Phase.RUNNING), HALTED, 100.0)
    for event in events:
        vm, _ = step(vm, event, 100.0)
    assert vm.halt is None


def test_a_vm_without_configuration_vanishes() -> None:
    """A VM made by vmctl is forgotten when it ends, or cannot start."""
    ad_hoc = a_vm(Phase.RUNNING)._replace(is_from_config=False)
    assert outcome(ad_hoc, EVENTS["power off"]) == (
        "stopped: release waiter=terminated +stopped +removed forget"
    )
    ad_hoc = a_vm(Phase.STARTING)._replace(is_from_config=False)
    assert outcome(ad_hoc, EVENTS["launch failed"]) == (
        "stopped: release starter!disk-missing waiter=terminated +failed +removed forget"
    )


def test_a_discarded_vm_vanishes_when_it_has_ended() -> None:
    """A discarded VM of the configuration is killed, and forgotten when its process is gone."""
    doomed, _ = step(a_vm(Phase.RUNNING), Discard(), 100.0)
    assert outcome(doomed, EVENTS["reboot"]) == (
        "stopped: release waiter=terminated +stopped +removed forget"
    )


def test_a_vm_with_a_boot_device_stops_instead_of_rebooting() -> None:
    """As in OpenBSD, the VM stops: an installer that reboots does not begin again."""
    vm = a_vm(Phase.RUNNING)._replace(stops_at_reboot=True)
    assert outcome(vm, EVENTS["reboot"]) == "stopped: release waiter=terminated +stopped"


def test_a_reboot_keeps_identity_and_console() -> None:
    """Id and terminal stay; the process, and requests to it, do not."""
    rebooted, _ = step(a_vm(Phase.RUNNING), Exited(EndReason.REBOOT), 100.0)
    assert (rebooted.id, rebooted.tty, rebooted.pid) == (7, "/dev/pts/7", None)
    again, _ = step(rebooted, Launched(702, "/dev/pts/7"), 100.0)
    assert (again.pid, again.tty) == (702, "/dev/pts/7")
    assert outcome(again, Running()) == "running: +started"


def _watched() -> VmState:
    """Return a VM that starts without a process yet, with a waiting console."""
    vm, _ = step(a_vm(Phase.STOPPED), Start(STARTER), 100.0)
    assert outcome(vm, Attach(WATCHER)) == "starting:"
    vm, _ = step(vm, Attach(WATCHER), 100.0)
    return vm


def test_a_console_waits_for_the_process() -> None:
    """A waiting console of a starting VM is answered once there is a process, and only once."""
    assert outcome(_watched(), Launched(702, "/dev/pts/7")) == "starting: watcher=console"
    launched, _ = step(_watched(), Launched(702, "/dev/pts/7"), 100.0)
    assert outcome(launched, Running()) == "running: starter=started +started"


def test_a_console_that_does_not_come() -> None:
    """If the start fails or is stopped there is no console; a client that left gets no answer."""
    assert outcome(_watched(), LaunchFailed(ErrorCode.ENOMEM)) == (
        "stopped: release starter!ENOMEM watcher!not-running +failed"
    )
    assert outcome(_watched(), Stop(ASKER)) == (
        "stopping: asker=done +stopping starter!EINTR watcher!not-running stop"
    )
    stopping, _ = step(_watched(), Stop(ASKER), 100.0)
    assert outcome(stopping, Attach(WATCHER)) == "stopping: watcher!not-running"
    left, _ = step(_watched(), ClientLeft(WATCHER.client), 100.0)
    assert outcome(left, Launched(702, "/dev/pts/7")) == "starting:"


def _start_and_end(vm: VmState, now: float) -> tuple[VmState, list[str]]:
    vm, effects = step(vm, Start(ASKER), now)
    vm, _ = step(vm, Exited(EndReason.POWER_OFF), now)
    return vm, [told(effect) for effect in effects]


def test_starts_in_quick_succession_are_refused() -> None:
    """The third early start in a row is refused, and later ones until time has passed."""
    vm = a_vm(Phase.STOPPED)
    for number in range(EARLY_MAX):
        vm, effects = _start_and_end(vm, number * 1.0)
        assert effects == ["+starting", "launch"]
    for _ in range(2):
        vm, effects = _start_and_end(vm, EARLY_MAX * 1.0)
        assert effects == ["asker!EPERM", "+failed"]
    _, effects = _start_and_end(vm, EARLY_MAX - 1 + EARLY_S)
    assert effects == ["+starting", "launch"]


def test_starts_at_leisure_are_not_refused() -> None:
    """A start that is not early resets the count of early ones."""
    vm = a_vm(Phase.STOPPED)
    for number in range(20):
        vm, effects = _start_and_end(vm, number * EARLY_S)
        assert effects == ["+starting", "launch"]


def test_a_guest_that_reboots_in_a_loop_ends() -> None:
    """Reboots count as starts: the third early one in a row is the end."""
    vm, _ = step(a_vm(Phase.STOPPED), Start(ASKER), 0.0)
    outcomes = []
    for number in range(1, EARLY_MAX + 1):
        outcomes.append(outcome(vm, Exited(EndReason.REBOOT), number * 1.0))
        vm, _ = step(vm, Exited(EndReason.REBOOT), number * 1.0)
    assert outcomes == [
        "starting: keep-tty asker!EIO +rebooted relaunch",
        "starting: keep-tty +rebooted relaunch",
        "stopped: release +failed",
    ]


def test_any_number_may_wait() -> None:
    """Two waiters, and one who stopped it, each get one answer."""
    vm, _ = step(a_vm(Phase.RUNNING), Wait(ASKER), 1.0)
    vm, _ = step(vm, Stop(STARTER, wait=True), 2.0)
    assert outcome(vm, Exited(EndReason.STOPPED)) == (
        "stopped: release waiter=terminated asker=terminated starter=terminated +stopped"
    )


def test_who_left_is_not_answered() -> None:
    """The end of a connection removes its own requests, and no others."""
    vm, _ = step(a_vm(Phase.STARTING), Wait(ASKER), 1.0)
    vm, _ = step(vm, ClientLeft(STARTER.client), 2.0)
    vm, _ = step(vm, ClientLeft(WAITER.client), 2.0)
    assert outcome(vm, Exited(None)) == "stopped: release asker=terminated +failed"


def test_pausing_and_unpausing_cross() -> None:
    """A request during another operation is done afterwards, in turn."""
    vm, _ = step(a_vm(Phase.PAUSING), Unpause(ASKER), 1.0)
    assert outcome(vm, Paused()) == "unpausing: pauser=done +paused unpause"
    vm, _ = step(vm, Paused(), 1.0)
    vm, _ = step(vm, Pause(STARTER), 1.0)
    assert outcome(vm, Unpaused()) == "pausing: asker=done +unpaused pause"


def test_a_process_that_is_silent_may_answer_yet() -> None:
    """The pauser has an answer already; a late report still counts, and listeners hear of it."""
    vm, _ = step(a_vm(Phase.PAUSING), Silent("it does not answer"), 1.0)
    vm, _ = step(vm, Pause(ASKER), 1.0)
    assert outcome(vm, Paused()) == "paused: asker=done +paused"


def test_how_a_vm_ended_is_told() -> None:
    """Each end has its cause, its process's status, and a line if there is more to say."""

    def end(phase: Phase, event: Event, **more: bool) -> tuple[str, int | None, str]:
        vm = a_vm(phase)._replace(**more)  # type: ignore[arg-type] # fields by name
        _, effects = step(vm, event, 100.0)
        (told,) = [each for each in effects if isinstance(each, Publish) and each.end]
        assert told.end is not None
        return told.end.cause, told.end.status, told.message

    running, stopping = Phase.RUNNING, Phase.STOPPING
    assert end(running, Exited(EndReason.POWER_OFF, status=0)) == ("power-off", 0, "")
    assert end(running, Exited(EndReason.CRASHED, message="panic")) == ("crashed", None, "panic")
    assert end(running, Exited(None, message="died", status=-11)) == ("died", -11, "died")
    assert end(stopping, Exited(EndReason.STOPPED, status=0)) == ("stopped", 0, "")
    assert end(stopping, Exited(None, message="signal 9", status=-9)) == ("killed", -9, "signal 9")
    overdue = end(stopping, Exited(None, status=-9), is_overdue=True)
    assert overdue == ("killed", -9, "the guest did not stop in time")
    assert end(Phase.STARTING, LaunchFailed(ErrorCode.EIO, "gone")) == ("failed", None, "gone")
    rebooted = end(running, Exited(EndReason.REBOOT, status=0), stops_at_reboot=True)
    assert rebooted == ("reboot", 0, "")


def test_the_third_quick_reboot_says_so() -> None:
    """The reason of the end is that it restarted too quickly, with the guest's action."""
    vm = a_vm(Phase.RUNNING)._replace(last_start=99.0, early_starts=EARLY_MAX - 1)
    _, effects = step(vm, Exited(EndReason.REBOOT, message="triple fault"), 100.0)
    (told,) = [each for each in effects if isinstance(each, Publish)]
    assert told.kind == "failed"
    assert told.message == "vm 7 restarted too quickly: triple fault"


def test_a_vm_that_is_not_sent_is_as_before() -> None:
    """A VM that was paused before a failed send is paused afterwards."""
    vm, _ = step(a_vm(Phase.PAUSED), Send(SENDER), 1.0)
    assert outcome(vm, SendFailed(ErrorCode.ENOSPC)) == "paused: sender!ENOSPC"
    assert outcome(vm, Sent()) == "paused: sender=done +sent"
    # Before its guest is asked to stop, it has to continue.
    assert outcome(vm, Stop(ASKER)) == "stopping: asker=done +stopping cancel unpause stop"


def test_what_nobody_waits_for_is_not_sent() -> None:
    """If the sender leaves, its VM is not sent, and it gets no answer."""
    vm = a_vm(Phase.SENDING)
    assert outcome(vm, ClientLeft(SENDER.client)) == "sending: cancel"
    left, _ = step(vm, ClientLeft(SENDER.client), 1.0)
    assert outcome(left, SendFailed(ErrorCode.EIO)) == "running:"
    assert outcome(left, Exited(EndReason.SENT)) == (
        "stopped: release waiter=terminated +sent +stopped"
    )


def test_a_stop_does_not_decide_what_becomes_of_a_stream() -> None:
    """The sender of a VM that is stopped meanwhile gets its process's report: sent, or not."""
    vm, _ = step(a_vm(Phase.SENDING), Stop(ASKER), 1.0)
    assert outcome(vm, Exited(EndReason.SENT)) == (
        "stopped: release sender=done waiter=terminated +sent +stopped"
    )
    assert outcome(vm, SendFailed(ErrorCode.EIO)) == "stopping: sender!EIO"
    assert outcome(vm, Exited(None)) == "stopped: release sender!EINTR waiter=terminated +stopped"


def test_a_vm_is_received_running_or_paused() -> None:
    """A received VM that is to be paused is reported as started, and is paused then."""
    vm, _ = step(a_vm(Phase.STOPPED), Start(STARTER, stays_paused=True), 1.0)
    assert outcome(vm, Running()) == "paused: starter=started +started +paused"
    # Asked to stop before it runs, it has to continue first.
    assert outcome(vm, Stop(ASKER)) == ("stopping: asker=done +stopping starter!EINTR unpause stop")
    running, _ = step(vm, Running(), 1.0)
    assert not running.stays_paused
