"""A host for a registry: it does what is to be done, in memory, and keeps the books.

It holds the registry to its promises as it goes: exactly one answer to each request, descriptors
closed once, no process or console without a VM, and none for a VM that is stopped.
"""

from __future__ import annotations

from typing import assert_never

from vmd.config.model import Staggered
from vmd.rules import vm_state
from vmd.rules.policy import Users
from vmd.rules.registry import (
    Action,
    Answer,
    ArmTurn,
    Drop,
    List,
    OpenConsole,
    Operate,
    Perform,
    Registry,
    Tell,
    info,
)
from vmd.rules.vm import PassedBoot, Vm
from vmd.rules.vm_state import (
    IDLE,
    Kill,
    Launch,
    Launched,
    LaunchFailed,
    Release,
    SendPause,
    SendStop,
    SendUnpause,
)
from vmd.wire.messages import (
    AnyAnswer,
    ConsoleOpened,
    ErrorCode,
    Event,
    Failed,
    ParentRequest,
    State,
    VmInfo,
    Vms,
)

ROOT = 0
ALICE, BOB, CAROL = 1001, 1002, 1003
STAFF = 50


class FakeClock:
    """Time that goes on when it is told to."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic_s(self) -> float:
        """Return seconds."""
        return self.now

    def realtime_s(self) -> float:
        """Return seconds since 1970."""
        return self.now + 1e9


class Host:
    """Runs a registry's actions."""

    def __init__(self, parallelism: int = 4, delay_s: int = 30) -> None:
        self.clock = FakeClock()
        users = Users(frozenset({ROOT}), lambda uid, gid: (uid, gid) == (BOB, STAFF))
        self.registry = Registry(
            users, self.clock, Staggered(parallelism, delay_s), lambda size: bytes(range(size))
        )
        self.launches: list[int] = []  # of VMs whose process is under way
        self.processes: dict[int, int] = {}  # by VM
        self.told: dict[int, list[str]] = {}  # what each process was told
        self.consoles: set[int] = set()
        self.failing: set[int] = set()  # VMs whose resources cannot be opened
        self.booted: list[tuple[int, int | None]] = []  # which kernel descriptor each launch had
        self.boots: set[int] = set()
        self.turn_at: float | None = None
        self.operations: list[Operate] = []
        self.pending: set[tuple[int, int]] = set()  # requests without an answer yet
        self.answers: dict[tuple[int, int], AnyAnswer] = {}
        self.events: list[Event] = []
        self.gone: set[int] = set()
        self._serial = 0
        self._pid = 100

    # What happens

    def ask(
        self, request: ParentRequest, uid: int = ROOT, client: int = 1, *, with_kernel: bool = False
    ) -> AnyAnswer | None:
        """Ask; returns the answer, if it came at once."""
        return self.answers.get(self.begin(request, uid, client, with_kernel=with_kernel))

    def begin(
        self, request: ParentRequest, uid: int = ROOT, client: int = 1, *, with_kernel: bool = False
    ) -> tuple[int, int]:
        """Ask; returns where the answer will be."""
        self._serial += 1
        key = (client, self._serial)
        self.pending.add(key)
        boot = None
        if with_kernel:
            boot = PassedBoot(self._serial)
            self.boots.add(self._serial)
        request = type(request)(
            **{
                **{name: getattr(request, name) for name in request.__struct_fields__},
                "serial": self._serial,
            }
        )
        self.run(self.registry.request(client, uid, request, boot))
        return key

    def leave(self, client: int) -> None:
        """End a client's connection."""
        self.gone.add(client)
        self.pending = {key for key in self.pending if key[0] != client}
        self.registry.client_left(client)
        self.check()

    def report(self, vm: Vm | int, *events: vm_state.Event) -> None:
        """Tell the registry what has happened to a VM."""
        vm_id = vm if isinstance(vm, int) else vm.id
        for event in events:
            self.run(self.registry.report(vm_id, event))

    def launch(self, name: str) -> Vm:
        """Let the process of a VM that is starting come to be."""
        vm = self.vm(name)
        self.launches.remove(vm.id)
        self._pid += 1
        self.processes[vm.id] = self._pid
        self.report(vm, Launched(self._pid, f"/dev/pts/{vm.id}"))
        return vm

    def end(self, vm: Vm | int, event: vm_state.Event) -> None:
        """Let a VM's process end."""
        vm_id = vm if isinstance(vm, int) else vm.id
        del self.processes[vm_id]
        self.report(vm_id, event)

    def wait_for_turn(self) -> None:
        """Let time go on until the next VMs are to start."""
        assert self.turn_at is not None
        self.clock.now = self.turn_at
        self.turn_at = None
        self.run(self.registry.turn())

    # What is seen

    def vm(self, name: str) -> Vm:
        """Return the VM of this name."""
        vm = self.registry.find(0, name)
        assert vm is not None
        return vm

    def states(self) -> dict[str, State]:
        """Return what users see."""
        return {vm.name: info(vm).state for vm in self.registry.vms}

    # What is done

    def run(self, actions: list[Action]) -> None:
        """Do what is to be done, in order, and what comes of it."""
        results: list[tuple[int, vm_state.Event]] = []
        for action in actions:
            match action:
                case Answer(client, answer):
                    self._answer(client, answer)
                case Perform(vm, effect):
                    self._perform(vm, effect, results)
                case Operate(ticket, _):
                    self.operations.append(action)
                    assert tuple(ticket) in self.pending
                case List(ticket, _, vms):
                    shown: tuple[VmInfo, ...] = tuple(map(info, vms))
                    self._answer(ticket.client, Vms(serial=ticket.serial, vms=shown))
                case OpenConsole(ticket, vm):
                    assert vm.id in self.processes  # nobody else could show anything
                    assert vm.state.tty
                    self._answer(
                        ticket.client,
                        ConsoleOpened(serial=ticket.serial, id=vm.id, tty=vm.state.tty),
                    )
                case Tell(told):
                    self.events.append(told)
                case Drop(boot):
                    self.boots.remove(boot.kernel)  # never twice
                case ArmTurn(delay_s):
                    self.turn_at = self.clock.now + delay_s
                case _:
                    assert_never(action)
        self.check()
        for vm_id, event in results:
            self.report(vm_id, event)

    def _answer(self, client: int, answer: AnyAnswer) -> None:
        key = (client, answer.serial)
        assert client not in self.gone
        assert key in self.pending  # exactly one answer
        self.pending.remove(key)
        self.answers[key] = answer

    def _perform(
        self,
        vm: Vm,
        effect: Launch | Release | Kill | SendStop | SendPause | SendUnpause,
        results: list[tuple[int, vm_state.Event]],
    ) -> None:
        match effect:
            case Launch(keeps_tty):
                assert (vm.id in self.consoles) == keeps_tty
                assert vm.id not in self.processes
                assert vm.id not in self.launches
                self.booted.append((vm.id, vm.boot.kernel if vm.boot else None))
                if vm.boot:
                    assert vm.boot.kernel in self.boots  # not closed yet
                self.consoles.add(vm.id)
                self.told[vm.id] = []
                if vm.id in self.failing:
                    results.append((vm.id, LaunchFailed(ErrorCode.DISK_MISSING, "in use")))
                else:
                    self.launches.append(vm.id)
            case Release(keeps_tty):
                assert vm.id not in self.processes
                if not keeps_tty:
                    self.consoles.remove(vm.id)
            case Kill() | SendStop() | SendPause() | SendUnpause():
                assert vm.id in self.processes or vm.id in self.launches
                self.told[vm.id].append(type(effect).__name__)
            case _:
                assert_never(effect)

    def check(self) -> None:
        """Hold the registry's table against the books."""
        by_id = {vm.id: vm for vm in self.registry.vms}
        assert len({vm.name for vm in by_id.values()}) == len(by_id)
        for vm_id in (*self.processes, *self.launches, *self.consoles):
            assert vm_id in by_id
        held = [vm.boot.kernel for vm in by_id.values() if vm.boot]
        assert sorted(held) == sorted(self.boots)
        for vm in by_id.values():
            if vm.state.phase not in IDLE:
                continue
            assert vm.state.pid is None
            assert vm.state.tty == ""
            assert vm.started_at is None
            assert vm.id not in self.processes
            assert vm.id not in self.launches
            assert vm.id not in self.consoles
            state = vm.state
            assert state.starter is None
            assert (state.waiters, state.pausers, state.unpausers, state.watchers) == ((),) * 4


def code(answer: AnyAnswer | None) -> str:
    """Return why a request failed."""
    assert isinstance(answer, Failed)
    return answer.code
