"""The table of VMs: ids, names and owners, requests, and the order of starts.

It only decides: it returns actions, in order, and their results are reported back. The clock and
the users are passed in.

Source: sections 7, 8 and 10 of OpenBSD's behaviour, with the advice of its section 21.
"""

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence

from vmd.config.model import GuestClock, Limits, Owner, Right, Staggered, VmConfig
from vmd.rules import lifecycle, vm_state
from vmd.rules.actions import (
    Action,
    Answer,
    ArmTurn,
    Drop,
    List,
    LookIntoStore,
    OpenConsole,
    Operate,
    Perform,
    Tell,
)
from vmd.rules.addressing import made_lladdr
from vmd.rules.clock import Clock
from vmd.rules.cloning import Clones, Table
from vmd.rules.copies import Fitted, lladdr_taken
from vmd.rules.ends import Gone, GoneVms
from vmd.rules.order import Stops, next_to_start, ring_of
from vmd.rules.policy import Denied, Users, check_vm, make_instance, needs_administrator, over_limit
from vmd.rules.ports import open_stream
from vmd.rules.transfers import received_vm, sink_of
from vmd.rules.vm import Passed, Vm, asks_for_devices, completed, config_of, info, with_states
from vmd.rules.vm_state import IDLE, Phase, Ticket, VmState
from vmd.wire.messages import (
    Console,
    Counts,
    Done,
    EndInfo,
    ErrorCode,
    Event,
    EventKind,
    Failed,
    History,
    Hold,
    Load,
    Log,
    ParentRequest,
    Pause,
    Reload,
    Reset,
    Source,
    Start,
    Status,
    Stop,
    Unpause,
    Wait,
)
from vmd.wire.parts import VmRequest
from vmd.wire.ports import Connect, Debug
from vmd.wire.transfers import Clone, Receive, Send, Snapshot, StoreRequest

IDS_KEPT = 1024
"""Ids of forgotten VMs that are kept for their names."""
_LIVES_END = {EventKind.STOPPED, EventKind.FAILED, EventKind.REBOOTED}


class Registry:
    """All VMs, running or not. For one thread."""

    def __init__(
        self,
        users: Users,
        clock: Clock,
        staggered: Staggered,
        host: bytes,
    ) -> None:
        """Begin without VMs; `host` is this host's identity."""
        self._users = users
        self._clock = clock
        self.staggered = staggered
        """May change with the configuration, as the limits."""
        self.limits = Limits()
        self.clock = GuestClock.FROZEN
        """Of copies, by default; as the limits."""
        self._host = host
        self._vms: dict[int, Vm] = {}
        self._ids: dict[tuple[str, int], int] = {}
        self._gone = GoneVms()
        self._stops = Stops()
        table = Table(
            lambda name: self.find(0, name), self._over_limit, self._add, self._step, self._tell
        )
        self._clones = Clones(table)
        self._holders: set[int] = set()
        self._room = 0  # how many more VMs may start before the next turn
        self._emptiers: list[Ticket] = []
        self.is_emptying = False
        """All VMs are being removed: none can be registered or started until they are gone."""

    # Looking

    @property
    def vms(self) -> tuple[Vm, ...]:
        """All VMs, as they were registered."""
        return tuple(self._vms.values())

    @property
    def is_idle(self) -> bool:
        """Whether nothing of any VM exists but its configuration."""
        return all(vm.state.phase in IDLE for vm in self._vms.values())

    def find(self, vm_id: int, name: str) -> Vm | None:
        """Return the VM of this id, or of this name where the id is 0."""
        if vm_id:
            return self._vms.get(vm_id)
        return next((vm for vm in self._vms.values() if vm.name == name), None)

    # Clients' requests

    def request(
        self, client: int, uid: int, request: ParentRequest, passed: Passed | None = None
    ) -> list[Action]:
        """Return the actions for a request of user `uid`; takes ownership of `passed`."""
        actions: list[Action] = []
        ticket = Ticket(client, request.serial)
        if needs_administrator(request) and uid not in self._users.administrators:
            actions.append(_refuse(ticket, Denied(ErrorCode.EPERM, "only for root")))
        elif self.is_emptying and isinstance(request, Start | Receive | Clone | Load | Reload):
            actions.append(_refuse(ticket, Denied(ErrorCode.EAGAIN, "all VMs are being removed")))
        elif self._holders and isinstance(request, Start | Clone | Receive):
            actions.append(_refuse(ticket, Denied(ErrorCode.EAGAIN, "all VMs are being stopped")))
        elif isinstance(request, Start):
            return self._start(ticket, uid, request, passed)
        elif isinstance(request, Receive):
            return self._receive(ticket, uid, request, passed)
        elif isinstance(request, Send | Snapshot):
            return self._send(ticket, uid, request, passed)
        else:
            actions += self._dispatch(ticket, uid, request)
            actions += self._followers()
        if passed:
            actions.append(Drop(passed))
        return actions

    def _dispatch(self, ticket: Ticket, uid: int, request: ParentRequest) -> list[Action]:
        match request:
            case Counts() | Load() | Reload() | Source() | Reset() | Log():
                return [Operate(ticket, request)]
            case _ if isinstance(request, StoreRequest):
                return [LookIntoStore(ticket, uid, request)]
            case Hold():
                self._holders.add(ticket.client)
                return [Answer(ticket.client, Done(serial=ticket.serial))]
            case History():
                return [self._history(ticket, uid, request)]
            case Status():
                gone = self._gone.infos(request.id, request.name) if request.gone else ()
                vms = self._listed(request)
                own = (vm.id for vm in vms if self._users.may(uid, vm.config.owner))
                return [List(ticket, request, vms, gone, frozenset(own))]
            case VmRequest():
                vm = self._authorised(uid, request)
                if isinstance(vm, Denied):
                    return [_refuse(ticket, vm)]
            case _:
                raise AssertionError(request)
        event: vm_state.Event
        match request:
            case Clone():
                return self._clones.request(ticket, uid, vm, request)
            case Stop(force=force, wait=wait):
                if request.in_order and self._stops.must_wait(vm, self.vms):
                    return self._stop_later(ticket, vm, request)
                event = vm_state.Stop(ticket, force, wait)
            case Wait():
                event = vm_state.Wait(ticket)
            case Pause():
                event = vm_state.Pause(ticket)
            case Unpause():
                event = vm_state.Unpause(ticket, request.force)
            case Console():
                event = vm_state.Attach(ticket)
            case Connect() | Debug():
                return [open_stream(ticket, vm, request)]
            case _:
                raise AssertionError(request)
        return list(self._step(vm, event))

    def _authorised(self, uid: int, request: VmRequest) -> Vm | Denied:
        vm = self.find(request.id, request.name)
        if vm is None:
            return Denied(ErrorCode.ENOENT, "no such VM")
        if not self._users.may(uid, vm.config.owner):
            return Denied(ErrorCode.EPERM, "the VM is not yours")
        return vm

    def _stop_later(self, ticket: Ticket, vm: Vm, request: Stop) -> list[Action]:
        """Let a VM stop once those that start after it have ended."""
        if vm.state.phase in IDLE or vm.state.phase is Phase.STOPPING or request.force:
            return list(self._step(vm, vm_state.Stop(ticket, request.force, request.wait)))
        self._stops.add(vm)
        if request.wait:
            return list(self._step(vm, vm_state.Wait(ticket)))
        return [Answer(ticket.client, Done(serial=ticket.serial, id=vm.id))]

    def _history(self, ticket: Ticket, uid: int, request: History) -> Action:
        vm = self.find(request.id, request.name)
        gone = None if vm else self._gone.find(request.id, request.name)
        owner = vm.config.owner if vm else gone.owner if gone else None
        history = vm.history if vm else gone.history if gone else None
        if history is None:
            return _refuse(ticket, Denied(ErrorCode.ENOENT, "no such VM"))
        if not self._users.may(uid, owner):
            return _refuse(ticket, Denied(ErrorCode.EPERM, "the VM is not yours"))
        return Answer(ticket.client, history.answer(ticket.serial, request.position))

    def trouble(self, vm_id: int, text: str) -> list[Action]:
        """Return the actions for a part of a running VM that fails."""
        vm = self._vms.get(vm_id)
        return self._tell(vm, EventKind.INTERFACE, text) if vm else []

    def note(self, vm_id: int, text: str) -> None:
        """Remember a log line about a VM, which may be gone; with the id 0, about none."""
        vm = self._vms.get(vm_id) or (self._gone.find(vm_id, "") if vm_id else None)
        if vm:
            vm.history.add(self._clock.realtime_s(), text)

    def _listed(self, request: Status) -> tuple[Vm, ...]:
        if request.id or request.name:
            vm = self.find(request.id, request.name)
            return (vm,) if vm else ()
        running = [vm for vm in self._vms.values() if vm.state.pid is not None]
        running.sort(key=lambda vm: vm.started_at or float("inf"), reverse=True)
        return (*running, *(vm for vm in self._vms.values() if vm.state.pid is None))

    # Starting

    def _start(
        self, ticket: Ticket, uid: int, request: Start, passed: Passed | None
    ) -> list[Action]:
        started = self._prepared(uid, request, passed)
        if isinstance(started, Denied):
            return [_refuse(ticket, started), *_dropped(passed)]
        vm, actions = started
        return [*actions, *self._step(vm, vm_state.Start(ticket, is_template=request.is_template))]

    def _prepared(
        self, uid: int, request: Start, passed: Passed | None
    ) -> tuple[Vm, list[Action]] | Denied:
        """Return the VM that is to start; it owns `passed` then."""
        # Root's instances have their template's owner.
        is_lent = bool(request.instance) and uid in self._users.administrators
        try:
            wanted = config_of(request, Owner(None if is_lent else uid))
        except ValueError as err:
            return Denied(ErrorCode.EINVAL, str(err))
        vm = self.find(request.id, request.name)
        if vm is not None and not request.instance:
            if not self._users.may(uid, vm.config.owner):
                return Denied(ErrorCode.EPERM, "the VM is not yours")
            asks_more = asks_for_devices(wanted, vm.config)
            if vm.state.phase is Phase.STARTING and not (passed or wanted.given or asks_more):
                return vm, []  # the client hears of the start under way, unless another one does
            if vm.state.phase not in IDLE:
                return Denied(ErrorCode.EALREADY, lifecycle.why_already(vm.state.phase))
            if asks_more or wanted.given != ({Right.BOOT} if passed else set()):
                return Denied(ErrorCode.EALREADY, "there is such a VM, which is as it is")
            if taken := lladdr_taken(vm, self.vms):
                return taken
            vm.passed, vm.passed_is_lasting = passed, False
            return vm, []
        is_named = not request.instance and uid in self._users.administrators and not wanted.given
        if request.id or is_named:
            return Denied(ErrorCode.ENOENT, "no such VM")
        registered = self._register(wanted, uid, has_kernel=bool(passed and passed.has_kernel))
        if isinstance(registered, Denied):
            return registered
        vm, actions = registered
        vm.passed, vm.passed_is_lasting = passed, True
        return vm, actions

    def _register(
        self, wanted: VmConfig, uid: int, *, has_kernel: bool = False, is_from_config: bool = False
    ) -> tuple[Vm, list[Action]] | Denied:
        """Make a VM of a configuration that `uid` asks for."""
        config = self._judged(wanted, uid, self._config_of, has_kernel=has_kernel)
        if isinstance(config, Denied):
            return config
        is_instance = wanted.parent is not None
        checked = (
            wanted.given & {Right.BOOT, Right.CDROM, Right.DISK} if is_instance else frozenset()
        )
        taken = {each.lladdr for vm in self._vms.values() for each in vm.config.interfaces}
        config = completed(config, uid, lambda *told: made_lladdr(self._host, *told), taken)
        over = self._over_limit([config], uid)
        if over:
            return over
        vm, actions = self._add(config, uid, is_from_config=is_from_config)
        vm.checked = checked
        return vm, actions

    def _add(
        self, config: VmConfig, uid: int, *, is_from_config: bool = False
    ) -> tuple[Vm, list[Action]]:
        """Make a VM that may be, of a configuration with nothing left to find out."""
        vm_id = self._claim_id(config.name, uid)
        state = VmState(
            vm_id,
            is_from_config=is_from_config,
            stops_at_reboot=config.boot_device != config.boot_device.AUTO,
        )
        vm = Vm(config, state, uid)
        before = self._gone.take(config.name, uid)
        if before:
            vm.history, vm.last_end = before.history, before.info.last_end
        self._vms[vm_id] = vm
        return vm, self._tell(vm, EventKind.REGISTERED, "")

    def _config_of(self, name: str) -> VmConfig | None:
        vm = self.find(0, name)
        return vm.config if vm else None

    def _judged(
        self,
        wanted: VmConfig,
        uid: int,
        find: Callable[[str], VmConfig | None],
        *,
        has_kernel: bool = False,
    ) -> VmConfig | Denied:
        """Return the configuration of a VM that `uid` asks for; `find` looks up others by name."""
        config = wanted
        if wanted.parent is not None:
            template = find(wanted.parent)
            if template is None:
                return Denied(ErrorCode.TEMPLATE_INVALID, f'no VM "{wanted.parent}"')
            if find(wanted.name):
                return Denied(ErrorCode.EPROCLIM, f'there is a VM "{wanted.name}"')
            instance = make_instance(template, wanted, uid, self._users, has_kernel=has_kernel)
            if isinstance(instance, Denied):
                return instance
            config = instance
        elif uid not in self._users.administrators:
            return Denied(ErrorCode.EPERM, "permission denied")
        ring = ring_of(config, find)
        if ring:
            return Denied(ErrorCode.EINVAL, f"it starts after itself: {' after '.join(ring)}")
        return check_vm(config, has_kernel=has_kernel) or config

    def _claim_id(self, name: str, uid: int) -> int:
        """Return the last id of this name with this user, or the lowest free one.

        Ids of forgotten VMs are kept for their names, but not for ever: a client with ever new
        names would use up the ids, and the addresses made of them.
        """
        vm_id = self._ids.pop((name, uid), None)
        if vm_id is None:
            taken = set(self._ids.values())
            vm_id = next(number for number in itertools.count(1) if number not in taken)
        self._ids[name, uid] = vm_id
        forgotten = [key for key, number in self._ids.items() if number not in self._vms]
        for key in forgotten[: -1 - IDS_KEPT]:  # the last one is this VM's
            del self._ids[key]
        return vm_id

    def _over_limit(self, configs: Sequence[VmConfig], uid: int) -> Denied | None:
        """Return the reason, if any, why an ordinary user may not have these VMs besides."""
        if uid in self._users.administrators:
            return None
        own = (vm.config for vm in self._vms.values() if vm.requester == uid)
        return over_limit([*own, *configs], self.limits)

    # Sending and receiving

    def _send(
        self, ticket: Ticket, uid: int, request: Send | Snapshot, passed: Passed | None
    ) -> list[Action]:
        found = self._authorised(uid, request)
        wanted = sink_of(found, request, passed, ticket=ticket, uid=uid, users=self._users)
        if isinstance(wanted, Denied):
            return [_refuse(ticket, wanted), *_dropped(passed)]
        vm, sink, event = wanted
        vm.sink = sink
        actions = list(self._step(vm, event))
        if not any(isinstance(one, Perform) for one in actions):
            vm.sink = None
            actions += _dropped(passed)
        return actions

    def _receive(
        self, ticket: Ticket, uid: int, request: Receive, passed: Passed | None
    ) -> list[Action]:
        """Let a VM start as described: a new one, or one that continues from a snapshot."""
        fitted = received_vm(request, passed, uid, self._users, self.vms)
        if isinstance(fitted, Denied):
            return [_refuse(ticket, fitted), *_dropped(passed)]
        received = self._received(fitted, uid)
        if isinstance(received, Denied):
            return [_refuse(ticket, received), *_dropped(passed)]
        vm, actions = received
        passed = fitted.passed
        if passed and request.is_copy and request.clock is None:
            passed = passed._replace(clock=self.clock)
        vm.passed = passed
        vm.passed_is_lasting = any(disk.window for disk in vm.config.disks)
        start = vm_state.Start(ticket, request.stays_paused)
        return [*actions, *_dropped(fitted.unused), *self._step(vm, start)]

    def _received(self, fitted: Fitted, uid: int) -> tuple[Vm, list[Action]] | Denied:
        vm, config = fitted.vm, fitted.config
        if vm:
            vm.configured, vm.config = vm.config, config
            return vm, []
        if uid in self._users.administrators:
            return self._register(config, uid, has_kernel=fitted.passed is not None)
        return self._over_limit([config], uid) or self._add(config, uid)

    # Reports

    def report(self, vm_id: int, event: vm_state.Event) -> list[Action]:
        """Return the actions for an event of a VM."""
        vm = self._vms.get(vm_id)
        return [*self._step(vm, event), *self._followers()] if vm else []

    def client_left(self, client: int) -> list[Action]:
        """Forget a client's pending requests, and cancel its unfinished sending."""
        self._emptiers = [one for one in self._emptiers if one.client != client]
        actions = list(self._clones.client_left(client))
        for vm in self.vms:
            actions += self._step(vm, vm_state.ClientLeft(client))
        if client not in self._holders:
            return actions
        self._holders.discard(client)
        return [*actions, *self.turn()]

    def turn(self) -> list[Action]:
        """Start the VMs whose turn it is.

        Source: section 10 of OpenBSD's behaviour.
        """
        self._room = max(1, self.staggered.parallelism)
        actions = self._start_waiting()
        if any(vm.state.phase is Phase.WAITING for vm in self._vms.values()):
            actions.append(ArmTurn(max(0, self.staggered.delay_s)))
        return actions

    def _start_waiting(self) -> list[Action]:
        """Start as many waiting VMs as there is room for, except those that wait for others."""
        if self._holders or self._room <= 0:
            return []
        actions: list[Action] = []
        for vm in next_to_start(self.vms)[: self._room]:
            self._room -= 1
            actions += self._step(vm, vm_state.Start())
        return actions

    def _followers(self) -> list[Action]:
        """Start and stop VMs that waited for another one's start or end."""
        actions: list[Action] = []
        for vm in self._stops.take(self.vms):
            actions += self._step(vm, vm_state.Stop(None))
        return [*actions, *self._start_waiting()]

    # Administrators' requests

    def judge(
        self, configs: Iterable[VmConfig], uid: int = 0, *, keeps_idle: bool = True
    ) -> list[str]:
        """Return why VMs of a configuration cannot be registered, a line each; changes nothing.

        `uid` is the user for whom the file speaks. Without `keeps_idle`, VMs that do not run are to
        be forgotten first.
        """
        known = {vm.name: vm.config for vm in self.vms if keeps_idle or vm.state.phase not in IDLE}
        complaints: list[str] = []
        for config in configs:
            if config.name in known:
                continue
            judged = self._judged(config, uid, known.get)
            if isinstance(judged, Denied):
                where = f"{config.where}: " if config.where else ""
                complaints.append(f'{where}vm "{config.name}" failed: {judged.message}')
            else:
                known[config.name] = judged
        return complaints

    def load(self, configs: Iterable[VmConfig], uid: int = 0) -> list[Action]:
        """Register the VMs of a configuration with which `judge` finds no fault.

        Existing VMs stay as they are, except that their interfaces go up and down as the file says.
        One that is refused all the same is passed over.
        """
        actions: list[Action] = []
        for config in configs:
            existing = self.find(0, config.name)
            if existing:
                existing.state = existing.state._replace(is_from_config=True)
                existing.config = with_states(existing.config, config)
                continue
            registered = self._register(config, uid, is_from_config=True)
            if isinstance(registered, Denied):
                continue
            vm, told = registered
            actions += told
            if config.is_enabled:
                actions += self._step(vm, vm_state.Enqueue())
        return [*actions, *self.turn()]

    def forget_idle(self) -> list[Action]:
        """Remove every VM that does not run; their ids stay theirs."""
        return self._discard(vm for vm in self.vms if vm.state.phase in IDLE)

    def remove_all(self, ticket: Ticket | None = None) -> list[Action]:
        """End and remove all VMs, and forget their ids; `ticket` is answered at the end.

        Nothing starts meanwhile.
        """
        self.is_emptying = True
        if ticket:
            self._emptiers.append(ticket)
        return [*self._discard(self.vms), *self._emptied()]

    def _discard(self, vms: Iterable[Vm]) -> list[Action]:
        return [action for vm in vms for action in self._step(vm, vm_state.Discard())]

    def _emptied(self) -> list[Action]:
        if self._vms or not self.is_emptying:
            return []
        self.is_emptying = False
        self._ids.clear()
        emptiers, self._emptiers = self._emptiers, []
        return [Answer(client, Done(serial=serial)) for client, serial in emptiers]

    # Steps

    def _next(self, vm: Vm, event: vm_state.Event) -> vm_state.Step:
        return lifecycle.step(vm.state, event, self._clock.monotonic_s())

    def _step(self, vm: Vm, event: vm_state.Event) -> Iterator[Action]:
        vm.state, effects = self._next(vm, event)
        for effect in effects:
            match effect:
                case vm_state.Reply(ticket, answer):
                    follows = self._clones.replied(ticket, vm, answer)
                    yield from (Answer(ticket.client, answer),) if follows is None else follows
                case vm_state.OpenConsole(ticket):
                    yield OpenConsole(ticket, vm)
                case vm_state.Publish(kind, message, end):
                    if end:
                        vm.last_end = EndInfo(
                            at=self._clock.realtime_s(),
                            reason=end.cause,
                            message=message,
                            exit=end.status,
                            started_at=vm.started_at,
                        )
                    if kind is EventKind.STARTED:
                        vm.started_at = self._clock.realtime_s()
                        vm.has_run = True
                        vm.origin = None
                        yield from _dropped(vm.give_up_stream())
                    elif kind in _LIVES_END:
                        vm.started_at = None
                    yield from self._tell(vm, kind, message)
                case vm_state.Forget():
                    del self._vms[vm.id]
                    if vm.last_end:
                        shown = info(vm, is_gone=True)
                        self._gone.add(Gone(shown, vm.config.owner, vm.requester, vm.history))
                    if not (vm.has_run or vm.state.is_from_config):  # it has used no number
                        del self._ids[vm.name, vm.requester]
                    yield from _dropped(vm.passed)
                    vm.passed = None
                    yield from self._emptied()
                case vm_state.Release():
                    yield Perform(vm, effect)
                    yield from _dropped(vm.drop_passed())
                case _:
                    yield Perform(vm, effect)
        vm.give_back(is_forgotten=vm.id not in self._vms)
        if vm.state.phase in IDLE:  # it may not have started at all
            yield from _dropped(vm.drop_passed())

    def _tell(self, vm: Vm, kind: EventKind, message: str) -> list[Action]:
        at = self._clock.realtime_s()
        vm.history.add(at, f"{kind}: {message}" if message else kind)
        return [Tell(Event(kind=kind, id=vm.id, name=vm.name, at=at, message=message))]


def _refuse(ticket: Ticket, denied: Denied) -> Action:
    answer = Failed(serial=ticket.serial, code=denied.code, message=denied.message)
    return Answer(ticket.client, answer)


def _dropped(passed: Passed | None) -> list[Action]:
    return [Drop(passed)] if passed else []
