"""Clones: which there may be of a VM, and requests for some until each of them runs or has failed.

Decides, and does nothing. All that a request asks for is judged before anything is done: either
each clone may be, or none is made. Whether one then starts is a matter of the host, and told of
each.
"""

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

from vmd.config.disks import DiskKind, DiskOption, writes_image
from vmd.config.model import InterfaceConfig, VmConfig
from vmd.rules import vm_state
from vmd.rules.actions import Action, Answer
from vmd.rules.encryption import why_denied
from vmd.rules.policy import Denied, is_name, tied_to_host
from vmd.rules.vm import Vm, why_not_saved
from vmd.rules.vm_state import Phase, Ticket
from vmd.wire.messages import AnyAnswer, ErrorCode, EventKind, Failed, Started
from vmd.wire.transfers import Clone, Cloned, ClonedVm

NUMBER = "%d"
"""The placeholder of a number in the name of clones."""
CAPTURE_REQUESTS_MAX = 64
"""Requests that share one capture of a VM."""


class Table(NamedTuple):
    """The registry's part of cloning."""

    find: Callable[[str], Vm | None]
    over_limit: Callable[[Sequence[VmConfig], int], Denied | None]
    """Why a user may not have these VMs besides those that it has."""
    add: Callable[[VmConfig, int], tuple[Vm, list[Action]]]
    """Make a VM that a user may have."""
    step: Callable[[Vm, vm_state.Event], Iterable[Action]]
    tell: Callable[[Vm, EventKind, str], list[Action]]


class _Plan(NamedTuple):
    ticket: Ticket
    """The client's; numbers of its own choice, which need not differ."""
    uid: int
    source: Vm
    request: Clone


class _Starting:
    """Clones of one request, until each has been heard of."""

    def __init__(self, ticket: Ticket, names: Sequence[str]) -> None:
        self.ticket = ticket
        self.names = names
        self.found: dict[str, ClonedVm] = {}


class Clones:
    """Requests to clone that are not answered yet. For one thread."""

    def __init__(self, table: Table) -> None:
        """Begin with none."""
        self._table = table
        self._numbers = itertools.count(1)
        # Those that wait for one capture of a VM, by a ticket of ours, which no client can have.
        self._plans: dict[Ticket, list[_Plan]] = {}
        self._starting: dict[Ticket, _Starting] = {}

    def request(self, ticket: Ticket, uid: int, source: Vm, request: Clone) -> list[Action]:
        """Return the actions for a request of user `uid`, who may have `source` cloned."""
        plan = _Plan(ticket, uid, source, request)
        configs = self._configs(plan)
        if isinstance(configs, Denied):
            return [_refused(ticket, configs)]
        if source.captured and source.state.phase is Phase.PAUSED:
            return list(self._start(plan))
        for others in self._plans.values():
            if others[0].source is source:
                if len(others) >= CAPTURE_REQUESTS_MAX:
                    text = "too many requests wait for its state"
                    return [_refused(ticket, Denied(ErrorCode.EAGAIN, text))]
                others.append(plan)
                return []
        number = -next(self._numbers)
        own = Ticket(number, number)
        self._plans[own] = [plan]
        return list(self._table.step(source, vm_state.Capture(own)))

    def replied(self, ticket: Ticket, vm: Vm, answer: AnyAnswer) -> Iterable[Action] | None:
        """Return what follows from the answer to a request of a VM; None if it is for a client."""
        plans = self._plans.pop(ticket, None)
        if plans:
            if isinstance(answer, Failed):
                denied = Denied(answer.code, answer.message)
                return [_refused(plan.ticket, denied) for plan in plans]
            return itertools.chain.from_iterable(map(self._start, plans))
        starting = self._starting.get(ticket)
        if starting is None:
            return None
        if isinstance(answer, Failed):
            code, text = answer.code, answer.message
            one = ClonedVm(name=vm.name, code=code, message=text)
        else:
            assert isinstance(answer, Started)
            one = ClonedVm(name=vm.name, id=vm.id, pid=answer.pid, tty=answer.tty)
        starting.found[vm.name] = one
        if len(starting.found) < len(starting.names):
            return ()
        del self._starting[ticket]
        vms = tuple(starting.found[name] for name in starting.names)
        return [Answer(ticket.client, Cloned(serial=starting.ticket.serial, vms=vms))]

    def client_left(self, client: int) -> Iterable[Action]:
        """Forget a client's requests; clones that are starting continue.

        A capture goes on while anybody waits for it.
        """
        self._starting = {key: each for key, each in self._starting.items() if key.client != client}
        for own, plans in tuple(self._plans.items()):
            left = [plan for plan in plans if plan.ticket.client != client]
            if left:
                self._plans[own] = left
            else:
                del self._plans[own]
                yield from self._table.step(plans[0].source, vm_state.ClientLeft(own.client))

    def _configs(self, plan: _Plan) -> list[VmConfig] | Denied:
        """Return the configurations of all clones that a request asks for."""
        _, uid, source, request = plan
        config = clone_config(source)
        if isinstance(config, Denied):
            return config
        # First, as it costs least: a user may ask for many too many, and again and again.
        if denied := self._table.over_limit([config] * request.count, uid):
            return denied
        names = clone_names(
            request.clone, request.count, lambda name: self._table.find(name) is not None
        )
        if isinstance(names, Denied):
            return names
        return [config._replace(name=name) for name in names]

    def _ticket(self, client: int) -> Ticket:
        return Ticket(client, -next(self._numbers))

    def _start(self, plan: _Plan) -> Iterator[Action]:
        """Make the clones of a VM that was captured, and let them start."""
        configs = self._configs(plan)  # much may have happened since it was asked
        if isinstance(configs, Denied):
            yield _refused(plan.ticket, configs)
            return
        uid, source = plan.uid, plan.source
        names = [config.name for config in configs]
        own = self._ticket(plan.ticket.client)
        self._starting[own] = _Starting(plan.ticket, names)
        yield from self._table.tell(source, EventKind.CLONED, ", ".join(names))
        for config in configs:
            vm, told = self._table.add(config, uid)
            assert source.captured is not None
            vm.origin, vm.clone_of = source.captured, source.name
            vm.inherited = source.captured.inherited
            yield from told
            yield from self._table.step(vm, vm_state.Start(own))


def clone_config(source: Vm) -> VmConfig | Denied:
    """Return the configuration of a clone, but for its name; or why there can be none."""
    config = source.config
    denied = why_denied(config, "cloned") or tied_to_host(config)
    if denied:
        return denied
    for index, interface in enumerate(config.interfaces):
        problem = _why_not_shared(interface)
        if problem:
            return Denied(ErrorCode.EINVAL, f"interface {index}: {problem}")
    for index, disk in enumerate(config.disks):
        problem = _why_not_cloned(source, index, disk)
        if problem:
            return Denied(ErrorCode.EINVAL, f"disk {disk.path}: {problem}")
    if config.shares:
        return Denied(ErrorCode.EINVAL, why_not_saved(config))
    if config.disks and not source.state.is_template:
        text = "a VM with disks has to be a template, see start --template"
        return Denied(ErrorCode.EINVAL, text)
    return config._replace(
        parent=None,
        allow_instance=frozenset(),
        instance_owner=None,
        seed=None,
        after=(),
        where="",
        disks=tuple(
            disk._replace(is_snapshot=True) if writes_image(disk) else disk for disk in config.disks
        ),
        interfaces=tuple(each._replace(tap=None, forwards=()) for each in config.interfaces),
    )


def _why_not_shared(interface: InterfaceConfig) -> str:
    """Return why a clone cannot have such an interface, whose lladdr its guest knows."""
    if interface.switch and not interface.is_local:
        return f"its lladdr would be on switch {interface.switch} twice"
    return ""


def _why_not_cloned(source: Vm, index: int, disk: DiskOption) -> str:
    """Return why a clone cannot have a disk of a template; its writes vanish with it."""
    if disk.kind in {DiskKind.PMEM, DiskKind.VHOST_USER}:
        return f"{disk.kind} cannot be cloned"
    if disk.is_read_only:
        return ""
    if disk.is_snapshot:
        return "what the guest writes vanishes with the VM"
    if not source.state.is_template:
        return "its clone would write to it too, see start --template"
    formats = source.lent.passed.formats[index] if source.lent else ()
    if formats and formats[0] is not DiskKind.RAW:
        return f"an image in the format {formats[0]}, of which the template's process has a part"
    return ""


def clone_names(pattern: str, count: int, is_taken: Callable[[str], bool]) -> list[str] | Denied:
    """Return the names of so many clones: where NUMBER stands, the lowest numbers that are free."""
    before, found, after = pattern.partition(NUMBER)
    if not is_name(f"{before}{1 if found else ''}{after}"):
        return Denied(ErrorCode.EINVAL, "invalid VM name")
    if (before + after).isdecimal() or pattern == NUMBER:
        return Denied(ErrorCode.EINVAL, "invalid VM name: a number stands for an id")
    if not found:
        if count != 1:
            return Denied(ErrorCode.EINVAL, f'{count} clones need a "{NUMBER}" in their name')
        if is_taken(pattern):
            return Denied(ErrorCode.EALREADY, f'there is a VM "{pattern}"')
        return [pattern]
    names: list[str] = []
    number = 1
    while len(names) < count:
        name = f"{before}{number}{after}"
        number += 1
        if not is_name(name):
            return Denied(ErrorCode.EINVAL, f"invalid VM name {name}")
        if not is_taken(name):
            names.append(name)
    return names


def _refused(ticket: Ticket, denied: Denied) -> Action:
    failed = Failed(serial=ticket.serial, code=denied.code, message=denied.message)
    return Answer(ticket.client, failed)
