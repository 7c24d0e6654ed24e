"""The registry's decisions, in order; the parent's `effects` carries them out."""

from typing import NamedTuple

from vmd.rules import vm_state
from vmd.rules.vm import Passed, Vm
from vmd.rules.vm_state import Ticket
from vmd.wire.messages import (
    AnyAnswer,
    Counts,
    Event,
    Load,
    Log,
    Reload,
    Reset,
    Source,
    Status,
    VmInfo,
)
from vmd.wire.transfers import StoreRequest


class Answer(NamedTuple):
    """Send this to a client."""

    client: int
    answer: AnyAnswer


class Tell(NamedTuple):
    """Send to clients that listen to events."""

    event: Event


Effect = (
    vm_state.Launch
    | vm_state.Release
    | vm_state.Kill
    | vm_state.SendStop
    | vm_state.SendPause
    | vm_state.SendUnpause
    | vm_state.SendState
    | vm_state.SendCapture
    | vm_state.CancelSend
)
"""Effects of a VM's life that are more than an answer or an event."""


class Perform(NamedTuple):
    """Run this effect of a VM's life."""

    vm: Vm
    effect: Effect


class Operate(NamedTuple):
    """Execute an administrator's request of the daemon itself, and answer."""

    ticket: Ticket
    request: Counts | Load | Reload | Source | Reset | Log


class LookIntoStore(NamedTuple):
    """Carry out a user's request to the store of snapshots, and answer."""

    ticket: Ticket
    uid: int
    request: StoreRequest


class List(NamedTuple):
    """Send these VMs, with their processes' statistics, and an end."""

    ticket: Ticket
    request: Status
    vms: tuple[Vm, ...]
    gone: tuple[VmInfo, ...] = ()
    """Those that are forgotten, as they are shown."""
    own: frozenset[int] = frozenset()
    """Ids of those whose boot image and disks the client may see."""


class OpenConsole(NamedTuple):
    """Connect a client with a VM's console, and answer."""

    ticket: Ticket
    vm: Vm


class OpenPort(NamedTuple):
    """Connect a client with a port of a VM's guest, and answer."""

    ticket: Ticket
    vm: Vm
    port: int


class OpenDebugger(NamedTuple):
    """Let a client debug a VM's guest, and answer."""

    ticket: Ticket
    vm: Vm


class Drop(NamedTuple):
    """Close descriptors that are not needed any more."""

    passed: Passed


class ArmTurn(NamedTuple):
    """Call `turn` after a while, instead of at an earlier time."""

    delay_s: int


_OfClients = OpenConsole | OpenPort | OpenDebugger | Operate | LookIntoStore | List
Action = Answer | Tell | Perform | _OfClients | Drop | ArmTurn
