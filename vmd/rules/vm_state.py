"""The vocabulary of a VM's life: its state, events and effects.

`lifecycle.step` connects them.
"""

from enum import Enum
from typing import NamedTuple

from vmd.wire.internal import EndReason
from vmd.wire.leaving import HandoverPlan
from vmd.wire.messages import AnyAnswer, EndCause, ErrorCode, EventKind
from vmm_kvm.errors import HaltReason


class Phase(Enum):
    """The phases of a VM."""

    STOPPED = "stopped"
    WAITING = "waiting"
    """For its turn in the staggered start."""
    STARTING = "starting"
    """From the request, or the reboot, until the guest runs."""
    RUNNING = "running"
    PAUSING = "pausing"
    """From the request until every vCPU and device is quiet."""
    PAUSED = "paused"
    UNPAUSING = "unpausing"
    SENDING = "sending"
    """It is paused, and is being written into a stream, or captured for clones."""
    STOPPING = "stopping"
    """From the request to stop, or the order to end, until the process is gone."""


IDLE = frozenset({Phase.STOPPED, Phase.WAITING})
"""Nothing of the VM exists but its configuration."""


class Ticket(NamedTuple):
    """The address of an answer: a client's connection, and its number for the request."""

    client: int
    serial: int


class Halted(NamedTuple):
    """Why it paused itself: a request of a disk waits for the host.

    This is also the event that reports it.
    """

    reason: HaltReason
    message: str
    """The disk, and the host's error."""


class VmState(NamedTuple):
    """The phase of a VM's life."""

    id: int
    is_from_config: bool = False
    """It stays when it is stopped; others vanish."""
    stops_at_reboot: bool = False
    """Its boot device was chosen for one boot: it ends where other VMs reboot."""
    phase: Phase = Phase.STOPPED
    pid: int | None = None
    """Of the VM process, if there is one."""
    tty: str = ""
    """Path of the console, if there is one."""
    starter: Ticket | None = None
    """Requests that are answered when it runs."""
    waiters: tuple[Ticket, ...] = ()
    """Requests that are answered when it ends."""
    pausers: tuple[Ticket, ...] = ()
    unpausers: tuple[Ticket, ...] = ()
    halt: Halted | None = None
    """Why it is paused, if no client asked for that."""
    watchers: tuple[Ticket, ...] = ()
    """Clients that get the console as soon as there is a process."""
    held: str = ""
    """Why it does not end, though it was killed, if that is so."""
    is_overdue: bool = False
    """Its guest did not stop in time, and it is being ended."""
    sender: Ticket | None = None
    """The request that is answered with the stream's result."""
    was_paused: bool = False
    """It stood still before it was to be sent."""
    snapshot: str | None = None
    """What is written is this snapshot of the store, or one that has no name; None: a stream."""
    stays_paused: bool = False
    """It is being received, and will be paused then."""
    is_template: bool = False
    """Once it is paused, it stays so: clones continue from it."""
    is_doomed: bool = False
    """It is to be forgotten as soon as it has ended."""
    last_start: float | None = None
    """When it was last to start; for the limit on restarts."""
    early_starts: int = 0
    """How many starts in a row were early."""


# Events: requests


class Start(NamedTuple):
    """A client wants it to run; no ticket: it is its turn in the staggered start."""

    ticket: Ticket | None = None
    stays_paused: bool = False
    """It is received, and is to be paused."""
    is_template: bool = False


class Stop(NamedTuple):
    """A client wants it to stop; no ticket: that has been answered, and now it is its turn."""

    ticket: Ticket | None
    force: bool = False
    """Without asking the guest."""
    wait: bool = False
    """Answer when it has ended."""


class Wait(NamedTuple):
    """Somebody waits for it to end."""

    ticket: Ticket


class Pause(NamedTuple):
    """A client wants it paused."""

    ticket: Ticket


class Unpause(NamedTuple):
    """A client wants it unpaused."""

    ticket: Ticket
    force: bool = False
    """Though it may run on another host."""


class Send(NamedTuple):
    """Somebody wants it written into a stream."""

    ticket: Ticket
    keeps_running: bool = False
    """It is to continue then."""
    is_snapshot: bool = False
    snapshot: str = ""
    """The snapshot's name in the store, if it is there."""
    handover: HandoverPlan | None = None
    """How it is handed over, if it is."""


class Capture(NamedTuple):
    """A client wants clones of it."""

    ticket: Ticket


class Attach(NamedTuple):
    """Somebody wants to see the console."""

    ticket: Ticket


class Enqueue(NamedTuple):
    """It will start in its turn."""


class Overdue(NamedTuple):
    """Its guest has not stopped in the time that it has for that."""


class Discard(NamedTuple):
    """End it, if it runs, and forget it."""


class ClientLeft(NamedTuple):
    """A connection has ended: its requests need no answer."""

    client: int


# Events: reports


class Launched(NamedTuple):
    """Its process exists."""

    pid: int
    tty: str


class LaunchFailed(NamedTuple):
    """It could not be launched; there is no process."""

    code: ErrorCode
    message: str = ""


class Running(NamedTuple):
    """Its guest runs."""


class Paused(NamedTuple):
    """All of it is quiet."""


class Unpaused(NamedTuple):
    """Its guest runs again."""


class Captured(NamedTuple):
    """What clones continue from is there; for one that is not captured, `SendFailed` says so."""


class Silent(NamedTuple):
    """Its process has not reported that it is paused or runs; it still may."""

    message: str = ""


class Held(NamedTuple):
    """Its processes were killed, and the kernel does not let them end; it still may."""

    message: str


class Sent(NamedTuple):
    """All of it is written, and it has gone on; for one that ends, `Exited` says so."""


class Migrating(NamedTuple):
    """It is on its way to another host, or into a snapshot."""

    message: str
    """How far it is."""


class SendFailed(NamedTuple):
    """It could not be written; it is as it was before."""

    code: ErrorCode
    message: str = ""


class Exited(NamedTuple):
    """Its process is gone: of its own accord for a reason, or killed without one."""

    reason: EndReason | None
    code: ErrorCode = ErrorCode.EIO
    """Why it could not start, if that is so."""
    message: str = ""
    status: int | None = None
    """Of the process, as waitpid says it."""


Event = (
    Start
    | Stop
    | Wait
    | Pause
    | Unpause
    | Send
    | Capture
    | Attach
    | Enqueue
    | Overdue
    | Held
    | Discard
    | ClientLeft
    | Launched
    | LaunchFailed
    | Running
    | Paused
    | Halted
    | Unpaused
    | Silent
    | Captured
    | Migrating
    | Sent
    | SendFailed
    | Exited
)


# Effects


class Reply(NamedTuple):
    """Answer a request."""

    ticket: Ticket
    answer: AnyAnswer


class Launch(NamedTuple):
    """Open the VM's resources and make its process; `Launched` or `LaunchFailed` follows."""

    keeps_tty: bool
    """The console is still there from before the reboot."""


class OpenConsole(NamedTuple):
    """Connect a client with the console, and answer."""

    ticket: Ticket


class SendPause(NamedTuple):
    """Tell the VM process to pause; `Paused` follows."""


class SendUnpause(NamedTuple):
    """Tell the VM process to continue; `Unpaused` or `Halted` follows."""

    force: bool = False
    """Though it may run on another host."""


class SendState(NamedTuple):
    """Have the VM process write itself into a stream; `SendFailed` comes of it, or the end.

    With `keeps_running` `Sent` instead of the end.
    """

    keeps_running: bool
    handover: HandoverPlan | None = None


class SendCapture(NamedTuple):
    """Have the VM process hand over the state for clones; `Captured` or `SendFailed` follows."""


class CancelSend(NamedTuple):
    """Tell the VM process to stop writing; `SendFailed` follows, if it is not too late."""


class SendStop(NamedTuple):
    """Tell the VM process to ask its guest to stop; `Exited` follows."""


class Kill(NamedTuple):
    """End the VM process at once; `Exited` comes of it, or the `LaunchFailed` under way."""


class Release(NamedTuple):
    """Close every descriptor that was opened for it."""

    keeps_tty: bool
    """Save the console's."""


class End(NamedTuple):
    """How a VM has ended."""

    cause: EndCause
    status: int | None = None
    """Of its process, as waitpid says it."""


class Publish(NamedTuple):
    """Send to clients that listen to events."""

    kind: EventKind
    message: str = ""
    end: End | None = None
    """How the VM has ended, if it has."""


class Forget(NamedTuple):
    """Take it out of the table; its id stays its name's."""


Effect = (
    Reply
    | Launch
    | OpenConsole
    | SendPause
    | SendUnpause
    | SendState
    | SendCapture
    | CancelSend
    | SendStop
    | Kill
    | Release
    | Publish
    | Forget
)
Step = tuple[VmState, tuple[Effect, ...]]
