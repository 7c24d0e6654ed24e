"""The registry under any sequence of requests and events keeps its promises, step by step.

`registry_host.Host` checks them; this class makes the sequence.
"""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from tests.unit.vmd.registry_host import ALICE, BOB, CAROL, ROOT, STAFF, Host
from vmd.config.disks import DiskKind, DiskOption
from vmd.config.model import Owner, Right, VmConfig
from vmd.rules.vm_state import IDLE, Exited, LaunchFailed, Paused, Phase, Running, Unpaused
from vmd.wire.internal import EndReason
from vmd.wire.messages import Console, ErrorCode, Pause, Reset, Start, Status, Stop, Unpause, Wait
from vmd.wire.parts import DiskRequest

NAMES = ("a", "b", "x")
CONFIGS = tuple(
    VmConfig(
        name,
        is_enabled=name != "b",
        owner=Owner(ALICE, STAFF),
        disks=(DiskOption(DiskKind.RAW, f"/{name}.img"),),
        given=frozenset({Right.DISK}),
        allow_instance=frozenset({Right.DISK}),
        instance_owner=Owner(BOB),
    )
    for name in "ab"
)
_SHORT = settings(max_examples=60, stateful_step_count=50, deadline=None)


class RegistryMachine(RuleBasedStateMachine):
    """Users send requests, processes live and die, time passes."""

    users = st.sampled_from([ROOT] * 6 + [ALICE, BOB, CAROL])
    clients = st.sampled_from([1, 2, 3])
    names = st.sampled_from(NAMES)
    choices = st.integers(min_value=0, max_value=1 << 16)

    def __init__(self) -> None:
        super().__init__()
        self.host = Host(parallelism=1, delay_s=7)
        self.next_client = 4
        self.live = [1, 2, 3]
        self.ids: dict[tuple[str, int], int] = {}
        self.lasting: set[tuple[str, int]] = set()
        """Names whose ids stay reserved when the VMs are gone."""

    @initialize()
    def begin(self) -> None:
        """Start with a configuration, whose second VM runs."""
        self.load()
        self._ask(Start(name="b"), ROOT, 0)
        self.host.report(self.host.launch("b"), Running())

    # Users

    @rule(user=users, client=choices, name=names, with_kernel=st.booleans())
    def start(self, user: int, client: int, name: str, with_kernel: bool) -> None:
        """Start an existing VM, maybe with another kernel."""
        self._ask(Start(name=name, kernel=0 if with_kernel else None), user, client, with_kernel)

    @rule(user=users, client=choices, name=names, instance=st.sampled_from(["", "", "a", "x"]))
    def create(self, user: int, client: int, name: str, instance: str) -> None:
        """Make a VM or an instance."""
        disks = (DiskRequest(path="/disk"),)
        self._ask(Start(name=name, instance=instance, disks=disks), user, client)

    @rule(user=users, client=choices, name=names, force=st.booleans(), wait=st.booleans())
    def stop(self, user: int, client: int, name: str, force: bool, wait: bool) -> None:
        """Stop, in one of four ways."""
        self._ask(Stop(name=name, force=force, wait=wait), user, client)

    @rule(
        user=users,
        client=choices,
        name=names,
        kind=st.sampled_from([Wait, Pause, Unpause, Console, Status]),
    )
    def command(
        self,
        user: int,
        client: int,
        name: str,
        kind: type[Wait | Pause | Unpause | Console | Status],
    ) -> None:
        """Send another request about a VM."""
        self._ask(kind(name=name), user, client)

    @rule(client=choices)
    def leave(self, client: int) -> None:
        """Disconnect; another client comes."""
        left = self.live.pop(client % len(self.live))
        self.host.leave(left)
        self.live.append(self.next_client)
        self.next_client += 1

    # Root

    @precondition(lambda self: not self.host.registry.is_emptying)
    @rule()
    def load(self) -> None:
        """Load the configuration."""
        complaints = self.host.registry.judge(CONFIGS)
        actions = self.host.registry.load(CONFIGS)
        self.host.run(actions)
        assert complaints == []
        assert {vm.name for vm in self.host.registry.vms} >= {"a", "b"}

    @precondition(lambda self: not self.host.registry.is_emptying)
    @rule()
    def reload(self) -> None:
        """Forget stopped VMs, and load again."""
        self.host.run(self.host.registry.forget_idle())
        assert all(vm.state.phase not in IDLE for vm in self.host.registry.vms)
        self.load()

    @rule(client=choices)
    def reset(self, client: int) -> None:
        """Remove everything."""
        before = len(self.host.operations)
        self._ask(Reset(), ROOT, client)
        for operation in self.host.operations[before:]:
            self.host.run(self.host.registry.remove_all(operation.ticket))
        if not self.host.registry.is_emptying:
            self.ids.clear()
            self.lasting.clear()

    # Events

    @precondition(lambda self: self.host.turn_at is not None)
    @rule()
    def take_turns(self) -> None:
        """Let the next ones start."""
        self.host.wait_for_turn()

    @rule(seconds=st.sampled_from([0.5, 3.0, 20.0]))
    def wait(self, seconds: float) -> None:
        """Let time pass."""
        self.host.clock.now += seconds

    @rule(name=names)
    def break_or_mend(self, name: str) -> None:
        """Make a VM's files disappear, or appear again."""
        vm = self.host.registry.find(0, name)
        if vm:
            self.host.failing ^= {vm.id}

    @rule()
    def slow_down_or_speed_up(self) -> None:
        """Make interfaces slow from now on, or fast."""
        self.host.networks.is_slow = not self.host.networks.is_slow

    @precondition(lambda self: self.host.networks.waiting)
    @rule(choice=choices)
    def make_networks(self, choice: int) -> None:
        """Make the interfaces of a VM, in any state of it."""
        waiting = list(self.host.networks.waiting)
        was_emptying = self.host.registry.is_emptying
        self.host.make_networks(waiting[choice % len(waiting)])
        self._note_emptied(was_emptying)

    @precondition(lambda self: self.host.processes)
    @rule(seldom=st.sampled_from([False] * 7 + [True]))
    def end_vmm(self, seldom: bool) -> None:
        """Let the vmm process end, and all processes of VMs."""
        if seldom:
            was_emptying = self.host.registry.is_emptying
            self.host.end_vmm()
            self._note_emptied(was_emptying)

    @precondition(lambda self: self.host.launches)
    @rule(choice=choices, does_run=st.booleans())
    def launch(self, choice: int, does_run: bool) -> None:
        """Let a process be ready, or fail."""
        launches = self.host.launches
        vm_id = launches[choice % len(launches)]
        (vm,) = [vm for vm in self.host.registry.vms if vm.id == vm_id]
        if does_run:
            self.host.launch(vm.name)
            if choice % 4:
                self.host.report(vm, Running())
            return
        launches.remove(vm_id)
        was_emptying = self.host.registry.is_emptying
        self.host.report(vm_id, LaunchFailed(ErrorCode.ENOMEM))
        self._note_emptied(was_emptying)

    @precondition(lambda self: self.host.processes)
    @rule(client=choices, pause=st.booleans(), choice=choices)
    def pause_or_unpause(self, client: int, pause: bool, choice: int) -> None:
        """Pause or unpause a VM that has a process."""
        vm_id = self._process(choice)
        self._ask(Pause(id=vm_id) if pause else Unpause(id=vm_id), ROOT, client)

    @precondition(lambda self: self.host.processes)
    @rule(choice=choices, event=st.sampled_from([Running(), Paused(), Unpaused()]))
    def say(self, choice: int, event: Running | Paused | Unpaused) -> None:
        """Let a process send something, expected or not."""
        self.host.report(self._process(choice), event)

    @precondition(lambda self: self.host.processes)
    @rule(choice=choices, reason=st.sampled_from([*EndReason, None]))
    def end(self, choice: int, reason: EndReason | None) -> None:
        """Let a process end."""
        was_emptying = self.host.registry.is_emptying
        self.host.end(self._process(choice), Exited(reason, ErrorCode.EIO, "it ended"))
        self._note_emptied(was_emptying)

    # Invariants

    @invariant()
    def books_are_right(self) -> None:
        """The table agrees with the books."""
        self.host.check()

    @invariant()
    def ids_stick(self) -> None:
        """A name has one id per user, and ids are unique; a failed start uses none."""
        there = {(vm.name, vm.requester): vm for vm in self.host.registry.vms}
        for key, vm in there.items():
            assert self.ids.setdefault(key, vm.id) == vm.id
            if vm.has_run or vm.state.is_from_config:
                self.lasting.add(key)
        for key in self.ids.keys() - self.lasting - there.keys():
            del self.ids[key]
        assert len(set(self.ids.values())) == len(self.ids)

    @invariant()
    def who_is_unanswered_is_waited_for(self) -> None:
        """Exactly the requests without an answer are known to wait."""
        waiting = {
            tuple(ticket)
            for vm in self.host.registry.vms
            for ticket in (
                *([vm.state.starter] if vm.state.starter else []),
                *vm.state.waiters,
                *vm.state.pausers,
                *vm.state.unpausers,
                *vm.state.watchers,
            )
        }
        resets = {tuple(one.ticket) for one in self.host.operations} & self.host.pending
        assert self.host.pending == waiting | resets
        assert not resets or self.host.registry.is_emptying

    @invariant()
    def nothing_comes_while_all_goes(self) -> None:
        """While all VMs are being removed none is made or started."""
        if self.host.registry.is_emptying:
            assert all(vm.state.is_doomed for vm in self.host.registry.vms)

    @invariant()
    def every_turn_comes(self) -> None:
        """Every VM that waits for its turn has one coming."""
        waiting = [vm for vm in self.host.registry.vms if vm.state.phase is Phase.WAITING]
        assert not waiting or self.host.turn_at is not None

    def teardown(self) -> None:
        """End every process: then no request waits, and nothing is left."""
        self.host.run(self.host.registry.remove_all())
        for vm_id in list(self.host.networks.waiting):
            self.host.make_networks(vm_id)
        for vm_id in list(self.host.launches):
            self.host.launches.remove(vm_id)
            self.host.report(vm_id, LaunchFailed(ErrorCode.EIO))
        for vm_id in list(self.host.processes):
            self.host.end(vm_id, Exited(None))
        assert self.host.pending == set()
        assert self.host.registry.vms == ()
        assert (self.host.consoles, self.host.boots) == (set(), set())
        assert not self.host.registry.is_emptying

    def _ask(
        self,
        request: Start | Stop | Wait | Pause | Unpause | Console | Status | Reset,
        user: int,
        client: int,
        with_kernel: bool = False,
    ) -> None:
        self.host.begin(request, user, self.live[client % len(self.live)], with_kernel=with_kernel)

    def _process(self, choice: int) -> int:
        return list(self.host.processes)[choice % len(self.host.processes)]

    def _note_emptied(self, was_emptying: bool) -> None:
        if was_emptying and not self.host.registry.is_emptying:
            self.ids.clear()
            self.lasting.clear()


TestRegistry = RegistryMachine.TestCase
TestRegistry.settings = _SHORT
