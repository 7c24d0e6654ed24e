"""Effects in short words, for readable tables."""

from __future__ import annotations

from typing import assert_never

from vmd.rules.lifecycle import step
from vmd.rules.vm_state import (
    CancelSend,
    Effect,
    Event,
    Forget,
    Kill,
    Launch,
    OpenConsole,
    Phase,
    Publish,
    Release,
    Reply,
    SendCapture,
    SendPause,
    SendState,
    SendStop,
    SendUnpause,
    Ticket,
    VmState,
)
from vmd.wire.messages import Done, Failed, Started, Terminated

ASKER = Ticket(1, 10)
STARTER = Ticket(2, 20)
WAITER = Ticket(3, 30)
PAUSER = Ticket(4, 40)
UNPAUSER = Ticket(5, 50)
WATCHER = Ticket(6, 60)
SENDER = Ticket(7, 70)
_WHO = {
    ASKER: "asker",
    STARTER: "starter",
    WAITER: "waiter",
    PAUSER: "pauser",
    UNPAUSER: "unpauser",
    WATCHER: "watcher",
    SENDER: "sender",
}


def told(effect: Effect) -> str:
    """Return an effect in a word or two."""
    match effect:
        case Reply(ticket, answer):
            assert answer.serial == ticket.serial
            match answer:
                case Failed(code=code):
                    return f"{_WHO[ticket]}!{code}"
                case Done() | Started() | Terminated():
                    return f"{_WHO[ticket]}={type(answer).__name__.lower()}"
            raise AssertionError(answer)
        case Launch(keeps_tty):
            return "relaunch" if keeps_tty else "launch"
        case OpenConsole(ticket):
            return f"{_WHO[ticket]}=console"
        case Release(keeps_tty):
            return "keep-tty" if keeps_tty else "release"
        case Publish(kind):
            return f"+{kind}"
        case SendPause():
            return "pause"
        case SendUnpause():
            return "unpause"
        case SendState(keeps_running):
            return "send-and-go-on" if keeps_running else "send"
        case SendCapture():
            return "capture"
        case CancelSend():
            return "cancel"
        case SendStop():
            return "stop"
        case Kill():
            return "kill"
        case Forget():
            return "forget"
        case _:
            assert_never(effect)


def a_vm(phase: Phase) -> VmState:
    """Return a configured VM in a phase, with every kind of waiting client that it can have."""
    is_active = phase not in {Phase.STOPPED, Phase.WAITING}
    return VmState(
        7,
        is_from_config=True,
        phase=phase,
        pid=700 if is_active else None,
        tty="/dev/pts/7" if is_active else "",
        starter=STARTER if phase is Phase.STARTING else None,
        waiters=(WAITER,) if is_active else (),
        pausers=(PAUSER,) if phase is Phase.PAUSING else (),
        unpausers=(UNPAUSER,) if phase is Phase.UNPAUSING else (),
        sender=SENDER if phase is Phase.SENDING else None,
        last_start=0.0 if is_active else None,
    )


def outcome(vm: VmState, event: Event, now: float = 100.0) -> str:
    """Return the phase after an event and its effects: `running: asker=done`."""
    after, effects = step(vm, event, now)
    return " ".join([f"{after.phase.value}:", *map(told, effects)])
