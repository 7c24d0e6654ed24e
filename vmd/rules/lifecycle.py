"""The life of one VM, as a pure function: state and event in, state and effects out.

    STOPPED ──start──▶ STARTING ──it runs──▶ RUNNING ◀──unpause── UNPAUSING
       ▲  ▲               ▲  │                │ │ ▲                  ▲
       │  WAITING ──turn──┘  │             pause│ └───────────────┐  │
       │                     ▼                  ▼                 │  │
       └──────it is gone── STOPPING ◀──stop── PAUSING ─all quiet▶ PAUSED

A running VM is PAUSED too when a request of a disk waits for the host; that is its `halt`.
RUNNING and PAUSED become SENDING, from which a VM comes back as it was, or ends.

A VM in any state from STARTING on can end at any moment; it is then STOPPED, or STARTING again if
the guest has rebooted. STOPPED and WAITING mean that nothing is left: no process, no descriptor, no
pending answer.

Every request gets exactly one answer, at once or later: an effect `Reply` with its ticket, or
`OpenConsole`. A refused request has no other effect. The caller carries out effects, and reports
their results as events.

Source: sections 7 and 8 of OpenBSD's behaviour, with the advice of its section 21.
"""

from typing import assert_never

from vmd.rules.replies import NOT_RUNNING, done, failed, not_running, terminated
from vmd.rules.vm_state import (
    IDLE,
    Attach,
    CancelSend,
    Capture,
    Captured,
    ClientLeft,
    Discard,
    Effect,
    End,
    Enqueue,
    Event,
    Exited,
    Forget,
    Halted,
    Held,
    Kill,
    Launch,
    Launched,
    LaunchFailed,
    Migrating,
    OpenConsole,
    Overdue,
    Pause,
    Paused,
    Phase,
    Publish,
    Release,
    Reply,
    Running,
    Send,
    SendCapture,
    SendFailed,
    SendPause,
    SendState,
    SendStop,
    SendUnpause,
    Sent,
    Silent,
    Start,
    Step,
    Stop,
    Ticket,
    Unpause,
    Unpaused,
    VmState,
    Wait,
)
from vmd.wire.internal import EndReason
from vmd.wire.messages import (
    EndCause,
    ErrorCode,
    EventKind,
    Started,
    State,
)
from vmm_kvm.errors import HaltReason

EARLY_S = 6.0
"""A start so soon after the one before counts as early."""
EARLY_MAX = 3
"""Early starts in a row after which a start is refused."""


_ORDERLY = {EndReason.POWER_OFF, EndReason.REBOOT, EndReason.STOPPED, EndReason.SENT}
_PAUSED = {Phase.PAUSING, Phase.PAUSED}
_BEING_SENT = "the VM is being sent"
_IS_TEMPLATE = "it is a template, and stays as it is for its clones"
_SHOWN = {
    Phase.STOPPED: State.STOPPED,
    Phase.WAITING: State.WAITING,
    Phase.STARTING: State.STARTING,
    Phase.RUNNING: State.RUNNING,
    Phase.PAUSING: State.RUNNING,
    Phase.PAUSED: State.PAUSED,
    Phase.UNPAUSING: State.PAUSED,
    Phase.SENDING: State.PAUSED,
    Phase.STOPPING: State.STOPPING,
}


def shown_state(vm: VmState) -> State:
    """Return the VM's state in the words of `vmctl status`."""
    if vm.phase is Phase.SENDING and not vm.was_paused:
        return State.RUNNING  # but for the end of it
    return _SHOWN[vm.phase]


def step(vm: VmState, event: Event, now: float) -> Step:
    """Return a VM's next state after an event, and the effects.

    `now` is in seconds, on any clock that does not jump.
    """
    match event:
        case Start():
            return _start(vm, event, now)
        case Stop():
            return _stop(vm, event)
        case Wait(ticket):
            if vm.phase in IDLE:
                return vm, (not_running(ticket),)
            if vm.held:
                return vm, failed(ticket, ErrorCode.EBUSY, vm.held)
            return vm._replace(waiters=(*vm.waiters, ticket)), ()
        case Pause(ticket):
            return _pause(vm, ticket)
        case Unpause():
            return _unpause(vm, event)
        case Send(ticket, keeps_running):
            snapshot = event.snapshot if event.is_snapshot else None
            return _send(vm, ticket, SendState(keeps_running, event.handover), snapshot)
        case Capture(ticket):
            if vm.is_template and vm.phase is Phase.RUNNING:
                text = "the template still runs: it has to be paused"
                return vm, failed(ticket, ErrorCode.EBUSY, text)
            return _send(vm, ticket, SendCapture())
        case Attach(ticket):
            return _attach(vm, ticket)
        case Enqueue():
            if vm.phase is not Phase.STOPPED:
                return vm, ()
            return vm._replace(phase=Phase.WAITING), (Publish(EventKind.WAITING),)
        case Held(message):
            return _held(vm, message)
        case Overdue():
            return _overdue(vm)
        case Discard():
            return _discard(vm)
        case ClientLeft(client):
            return _without(vm, client)
        case Launched(pid, tty):
            if vm.phase in IDLE:
                return vm, (Kill(),)
            vm = vm._replace(pid=pid, tty=tty)
            return vm._replace(watchers=()), tuple(map(OpenConsole, vm.watchers))
        case LaunchFailed(code, message):
            return _end(vm, now, Exited(EndReason.FAILED, code, message))
        case Running():
            return _running(vm)
        case Paused():
            return _paused(vm)
        case Halted():
            return _halted(vm, event)
        case Unpaused():
            return _unpaused(vm)
        case Silent(message):
            return _silent(vm, message)
        case Captured():
            if vm.phase is Phase.SENDING:
                vm = _as_before(vm)
            return _told_sender(vm, is_sent=True)
        case Migrating(message):
            kind = EventKind.MIGRATING if vm.snapshot is None else EventKind.WRITING
            return vm, (Publish(kind, message),) if vm.phase is Phase.SENDING else ()
        case Sent():
            return _sent(vm)
        case SendFailed(code, message):
            return _send_failed(vm, code, message)
        case Exited():
            return _end(vm, now, event)
        case _:
            assert_never(event)


# Requests


def why_already(phase: Phase) -> str:
    """Return the error text for starting a VM that is not idle.

    For a running VM the code suffices; tools expect its line to be the last.
    """
    return "the VM is stopping" if phase is Phase.STOPPING else ""


def _start(vm: VmState, event: Start, now: float) -> Step:
    ticket = event.ticket
    if vm.phase is Phase.STARTING and vm.starter is None and ticket:
        return vm._replace(starter=ticket), ()  # in its turn, or anew: that is the request
    if vm.phase not in IDLE:
        return vm, failed(ticket, ErrorCode.EALREADY, why_already(vm.phase))
    if ticket is None and vm.phase is Phase.STOPPED:  # started or stopped by hand meanwhile
        return vm, ()
    vm, is_allowed = _count_start(vm, now)
    if not is_allowed:
        text = _too_quickly(vm)
        stopped, effects = _stopped(vm, Publish(EventKind.FAILED, text, End(EndCause.FAILED)))
        return stopped, (*failed(ticket, ErrorCode.EPERM, text), *effects)
    return (
        vm._replace(
            phase=Phase.STARTING,
            starter=ticket,
            stays_paused=event.stays_paused,
            is_template=event.is_template,
        ),
        (Publish(EventKind.STARTING), Launch(keeps_tty=False)),
    )


def _stop(vm: VmState, event: Stop) -> Step:
    ticket = event.ticket
    if vm.phase is Phase.STOPPED:
        return vm, failed(ticket, ErrorCode.NOT_RUNNING, NOT_RUNNING)
    if vm.phase is Phase.WAITING:
        answer = terminated if event.wait else done
        stopped, effects = _stopped(vm, Publish(EventKind.STOPPED, "it starts no more in its turn"))
        return stopped, (*((answer(vm, ticket),) if ticket else ()), *effects)
    if vm.held:
        return vm, failed(ticket, ErrorCode.EBUSY, vm.held)
    if vm.phase is Phase.STOPPING and not event.force:
        return vm, failed(ticket, ErrorCode.EALREADY, "the VM is stopping")
    force = event.force
    if _is_in_doubt(vm) and not force:
        if ticket:
            text = "it may run on another host: if it does, use stop -f"
            return vm, failed(ticket, ErrorCode.EBUSY, text)
        force = True  # its guest must not be asked, for that it would have to run
    reply: tuple[Effect, ...] = ()
    if ticket and event.wait:
        vm = vm._replace(waiters=(*vm.waiters, ticket))
    elif ticket:
        reply = (done(vm, ticket),)
    stopping, effects = _stopping(vm, force=force)
    return stopping, (*reply, *effects)


def _stopping(vm: VmState, *, force: bool) -> Step:
    """Begin to end a VM that is not idle."""
    effects: list[Effect] = []
    if vm.phase is not Phase.STOPPING:
        effects.append(Publish(EventKind.STOPPING))
        effects += failed(vm.starter, ErrorCode.EINTR, "the VM stops")
        effects += _interrupt(vm)
        if vm.phase is Phase.SENDING:  # what becomes of the stream is not known yet
            effects.append(CancelSend())
        is_paused = vm.was_paused if vm.phase is Phase.SENDING else vm.phase in _PAUSED
        if not force and (is_paused or vm.stays_paused):
            effects.append(SendUnpause())  # a paused guest cannot react
    effects.append(Kill() if force else SendStop())
    vm = vm._replace(phase=Phase.STOPPING, starter=None, pausers=(), unpausers=(), watchers=())
    return vm._replace(halt=None), tuple(effects)


def _send(
    vm: VmState, ticket: Ticket, effect: SendState | SendCapture, snapshot: str | None = None
) -> Step:
    match vm.phase:
        case Phase.STOPPED | Phase.WAITING | Phase.STOPPING:
            return vm, (not_running(ticket),)
        case Phase.STARTING:
            return vm, failed(ticket, ErrorCode.EAGAIN, "the VM is starting")
        case Phase.PAUSING | Phase.UNPAUSING:
            return vm, failed(ticket, ErrorCode.EAGAIN, "the VM is being paused, or goes on")
        case Phase.SENDING:
            return vm, failed(ticket, ErrorCode.EALREADY, _BEING_SENT)
        case Phase.PAUSED if vm.halt:
            text = "a request of a disk waits for the host"
            if _is_in_doubt(vm):
                text = "it may run on another host"
            return vm, failed(ticket, ErrorCode.EBUSY, text)
        case Phase.RUNNING | Phase.PAUSED:
            was_paused = vm.phase is Phase.PAUSED
            vm = vm._replace(
                phase=Phase.SENDING, sender=ticket, was_paused=was_paused, snapshot=snapshot
            )
            return vm, (effect,)
        case _:
            assert_never(vm.phase)


def _pause(vm: VmState, ticket: Ticket) -> Step:
    match vm.phase:
        case Phase.STOPPED | Phase.WAITING | Phase.STOPPING:
            return vm, (not_running(ticket),)
        case Phase.STARTING:
            return vm, failed(ticket, ErrorCode.EAGAIN, "the VM is starting")
        case Phase.RUNNING:
            return vm._replace(phase=Phase.PAUSING, pausers=(ticket,)), (SendPause(),)
        case Phase.PAUSING | Phase.UNPAUSING:
            return vm._replace(pausers=(*vm.pausers, ticket)), ()
        case Phase.PAUSED:
            return vm, (done(vm, ticket),)
        case Phase.SENDING:
            return vm, failed(ticket, ErrorCode.EBUSY, _BEING_SENT)
        case _:
            assert_never(vm.phase)


def _unpause(vm: VmState, event: Unpause) -> Step:
    ticket = event.ticket
    match vm.phase:
        case Phase.STOPPED | Phase.WAITING | Phase.STOPPING:
            return vm, (not_running(ticket),)
        case Phase.STARTING:
            return vm, failed(ticket, ErrorCode.EAGAIN, "the VM is starting")
        case Phase.RUNNING:
            return vm, (done(vm, ticket),)
        case Phase.PAUSING if vm.is_template:
            return vm, failed(ticket, ErrorCode.EBUSY, _IS_TEMPLATE)
        case Phase.PAUSING | Phase.UNPAUSING:
            return vm._replace(unpausers=(*vm.unpausers, ticket)), ()
        case Phase.PAUSED if vm.is_template:
            return vm, failed(ticket, ErrorCode.EBUSY, _IS_TEMPLATE)
        case Phase.PAUSED if _is_in_doubt(vm) and not event.force:
            text = "it may run on another host: if it does not, use unpause -f"
            return vm, failed(ticket, ErrorCode.EBUSY, text)
        case Phase.PAUSED:
            unpausing = vm._replace(phase=Phase.UNPAUSING, unpausers=(ticket,))
            return unpausing, (SendUnpause(event.force),)
        case Phase.SENDING:
            return vm, failed(ticket, ErrorCode.EBUSY, _BEING_SENT)
        case _:
            assert_never(vm.phase)


def _attach(vm: VmState, ticket: Ticket) -> Step:
    if vm.pid is not None:
        return vm, (OpenConsole(ticket),)
    if vm.phase is Phase.STARTING:
        return vm._replace(watchers=(*vm.watchers, ticket)), ()
    return vm, (not_running(ticket),)


def _overdue(vm: VmState) -> Step:
    if vm.phase is not Phase.STOPPING:
        return vm, ()
    return vm._replace(is_overdue=True), (Kill(),)


def _held(vm: VmState, message: str) -> Step:
    """Tell those who wait for its end that it does not come; it may yet."""
    if vm.phase in IDLE:
        return vm, ()
    effects: tuple[Effect, ...] = ()
    if vm.phase is not Phase.STOPPING:
        vm, effects = _stopping(vm, force=True)
    replies = (each for ticket in vm.waiters for each in failed(ticket, ErrorCode.EBUSY, message))
    return vm._replace(held=message, waiters=()), (*effects, *replies)


def _discard(vm: VmState) -> Step:
    if vm.phase in IDLE:
        return vm._replace(phase=Phase.STOPPED), (Publish(EventKind.REMOVED), Forget())
    return _stopping(vm._replace(is_doomed=True), force=True)


def _without(vm: VmState, client: int) -> Step:
    def others(tickets: tuple[Ticket, ...]) -> tuple[Ticket, ...]:
        return tuple(ticket for ticket in tickets if ticket.client != client)

    # The client that would learn of it is gone: cancel the sending.
    gives_up = vm.sender is not None and vm.sender.client == client
    effects = (CancelSend(),) if gives_up and vm.phase is Phase.SENDING else ()
    vm = vm._replace(
        sender=None if gives_up else vm.sender,
        starter=None if vm.starter and vm.starter.client == client else vm.starter,
        waiters=others(vm.waiters),
        pausers=others(vm.pausers),
        unpausers=others(vm.unpausers),
        watchers=others(vm.watchers),
    )
    return vm, effects


# Reports


def _running(vm: VmState) -> Step:
    if vm.phase is not Phase.STARTING:  # it is stopping already, and its starter is told
        return vm, ()
    reply: tuple[Effect, ...] = ()
    if vm.starter:
        started = Started(serial=vm.starter.serial, id=vm.id, pid=vm.pid or 0, tty=vm.tty)
        reply = (Reply(vm.starter, started),)
    phase = Phase.PAUSED if vm.stays_paused else Phase.RUNNING
    told = (Publish(EventKind.PAUSED),) if vm.stays_paused else ()
    vm = vm._replace(phase=phase, starter=None, stays_paused=False)
    return vm, (*reply, Publish(EventKind.STARTED), *told)


def _paused(vm: VmState) -> Step:
    if vm.phase is not Phase.PAUSING:
        return vm, ()
    effects: list[Effect] = [done(vm, ticket) for ticket in vm.pausers]
    effects.append(_published_pause(vm))
    vm = vm._replace(pausers=())
    if vm.unpausers:  # a client has unpaused it since
        return vm._replace(phase=Phase.UNPAUSING), (*effects, SendUnpause())
    return vm._replace(phase=Phase.PAUSED), tuple(effects)


def _halted(vm: VmState, event: Halted) -> Step:
    if vm.phase is Phase.UNPAUSING and event.reason is HaltReason.IN_DOUBT:
        waiting, vm = vm.unpausers, vm._replace(phase=Phase.PAUSED, halt=event, unpausers=())
        code, text = ErrorCode.EBUSY, event.message
        return vm, tuple(one for ticket in waiting for one in failed(ticket, code, text))
    if vm.phase is Phase.SENDING and event.reason is HaltReason.IN_DOUBT:
        vm = vm._replace(phase=Phase.PAUSED, halt=event)
        vm, told = _told_sender(vm, is_sent=False, message=event.message)
        return vm, (*told, _published_pause(vm))
    match vm.phase:
        case Phase.RUNNING:
            vm = vm._replace(phase=Phase.PAUSED, halt=event)
            return vm, (_published_pause(vm),)
        case Phase.PAUSING | Phase.PAUSED:  # the report that it is paused is on its way
            return vm._replace(halt=event), ()
        case (
            Phase.STOPPED
            | Phase.WAITING
            | Phase.STARTING
            | Phase.UNPAUSING
            | Phase.SENDING  # its process says so when it is not sent
            | Phase.STOPPING
        ):
            return vm, ()
        case _:
            assert_never(vm.phase)


def _is_in_doubt(vm: VmState) -> bool:
    """Tell whether it is unknown if the VM runs on another host."""
    return vm.halt is not None and vm.halt.reason is HaltReason.IN_DOUBT


def _published_pause(vm: VmState) -> Effect:
    text = f"{vm.halt.reason}: {vm.halt.message}" if vm.halt else ""
    return Publish(EventKind.PAUSED, text)


def _unpaused(vm: VmState) -> Step:
    if vm.phase is not Phase.UNPAUSING:
        return vm, ()
    vm = vm._replace(halt=None)
    effects: list[Effect] = [done(vm, ticket) for ticket in vm.unpausers]
    effects.append(Publish(EventKind.UNPAUSED))
    vm = vm._replace(unpausers=())
    if vm.pausers:
        return vm._replace(phase=Phase.PAUSING), (*effects, SendPause())
    return vm._replace(phase=Phase.RUNNING), tuple(effects)


def _silent(vm: VmState, message: str) -> Step:
    """Tell those who wait for a pause, or its end, that it has not come; it may yet."""
    effects = (
        effect
        for ticket in (*vm.pausers, *vm.unpausers)
        for effect in failed(ticket, ErrorCode.EAGAIN, message)
    )
    return vm._replace(pausers=(), unpausers=()), tuple(effects)


def _sent(vm: VmState) -> Step:
    """Return a VM that was sent, and continues, to its state before."""
    told = Publish(EventKind.SENT)
    if vm.snapshot is not None:
        told = Publish(EventKind.SNAPSHOT, vm.snapshot)
    if vm.phase is not Phase.SENDING:
        return _told_sender(vm, is_sent=True)
    vm, effects = _told_sender(_as_before(vm), is_sent=True)
    return vm, (*effects, told)


def _send_failed(vm: VmState, code: ErrorCode, message: str) -> Step:
    if vm.phase is Phase.SENDING:
        vm = _as_before(vm)
    return _told_sender(vm, is_sent=False, code=code, message=message)


def _as_before(vm: VmState) -> VmState:
    return vm._replace(phase=Phase.PAUSED if vm.was_paused else Phase.RUNNING)


def _told_sender(
    vm: VmState, *, is_sent: bool, code: ErrorCode = ErrorCode.EIO, message: str = ""
) -> Step:
    """Answer the client that had a VM sent, once."""
    sender = vm.sender
    vm = vm._replace(sender=None, was_paused=False, snapshot=None)
    if sender is None:
        return vm, ()
    return vm, (done(vm, sender),) if is_sent else failed(sender, code, message)


def _end(vm: VmState, now: float, exited: Exited) -> Step:
    """Note that a process is gone, or never existed."""
    if vm.phase in IDLE:
        return vm, ()
    reason, code, message, status = exited
    is_sent = reason is EndReason.SENT
    was_stopping = vm.phase is Phase.STOPPING
    vm, told = _told_sender(
        vm,
        is_sent=is_sent,
        code=ErrorCode.EINTR if was_stopping else ErrorCode.EIO,
        message="the VM stops" if was_stopping else message or "the VM process has ended",
    )
    replies = [
        *told,
        *failed(vm.starter, code, message or "the VM process has ended"),
        *_interrupt(vm),
        # As OpenBSD has it, a reboot ends the wait too.
        *(terminated(vm, ticket) for ticket in vm.waiters),
    ]
    if is_sent:
        replies.append(Publish(EventKind.SENT))
    vm = vm._replace(pid=None, starter=None, waiters=(), pausers=(), unpausers=(), watchers=())
    vm = vm._replace(halt=None, stays_paused=False, held="")
    if reason is EndReason.REBOOT and vm.phase is not Phase.STOPPING and not vm.stops_at_reboot:
        vm, is_allowed = _count_start(vm, now)
        if is_allowed:
            return vm._replace(phase=Phase.STARTING), (
                Release(keeps_tty=True),
                *replies,
                Publish(EventKind.REBOOTED, message),
                Launch(keeps_tty=True),
            )
        why = _too_quickly(vm)
        message = f"{why}: {message}" if message else why
        kind = EventKind.FAILED
    elif reason in _ORDERLY or vm.phase is Phase.STOPPING:
        kind = EventKind.STOPPED
    else:
        kind = EventKind.FAILED
    if vm.is_overdue and reason is None:
        message = "the guest did not stop in time"
    end = End(_cause(vm, reason), status)
    stopped, effects = _stopped(vm, Publish(kind, message, end))
    return stopped, (Release(keeps_tty=False), *replies, *effects)


def _cause(vm: VmState, reason: EndReason | None) -> EndCause:
    if reason is None:
        return EndCause.KILLED if vm.phase is Phase.STOPPING else EndCause.DIED
    return EndCause(reason.value)


def _stopped(vm: VmState, told: Publish) -> Step:
    effects: list[Effect] = [told]
    if vm.is_doomed or not vm.is_from_config:
        effects += (Publish(EventKind.REMOVED), Forget())
    vm = vm._replace(phase=Phase.STOPPED, tty="", is_overdue=False, is_template=False)
    return vm, tuple(effects)


# Parts of several


def _count_start(vm: VmState, now: float) -> tuple[VmState, bool]:
    """Note a start; tell whether it is allowed, or one too many."""
    is_early = vm.last_start is not None and now - vm.last_start < EARLY_S
    early_starts = vm.early_starts + 1 if is_early else 0
    is_allowed = early_starts < EARLY_MAX
    # A refused start does not count: the next is allowed when the last real one is long enough ago.
    last_start = now if is_allowed else vm.last_start
    return vm._replace(last_start=last_start, early_starts=early_starts), is_allowed


def _too_quickly(vm: VmState) -> str:
    return f"vm {vm.id} restarted too quickly"


def _interrupt(vm: VmState) -> tuple[Effect, ...]:
    """Fail all requests that wait for a pause, its end, or a console."""
    return (
        *(
            effect
            for ticket in (*vm.pausers, *vm.unpausers)
            for effect in failed(ticket, ErrorCode.EINTR, "the VM stops")
        ),
        *map(not_running, vm.watchers),
    )
