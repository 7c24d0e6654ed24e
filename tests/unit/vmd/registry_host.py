"""A host for a registry: the parent's own code carries out its effects, on fakes.

Networks, consoles, files, clients and the vmm process are fakes that keep the books. They check
promises of the registry and its effects: exactly one answer to each request, descriptors closed
once, no process, interfaces or console without a VM, and none for a stopped VM.
"""

from __future__ import annotations

import os
import weakref
from collections import deque
from collections.abc import Callable, Sequence

from tests.fakes import FakeTimer
from vmd.config.model import Limits, Staggered
from vmd.parent.effects import Effects, Means
from vmd.parent.errors import ResourceError
from vmd.parent.interfaces import Interface, Then
from vmd.parent.resources import Resources
from vmd.parent.snapshots import SnapshotStore
from vmd.parent.status import Inquiries
from vmd.rules import vm_state
from vmd.rules.actions import Action, List, Operate
from vmd.rules.policy import Users
from vmd.rules.registry import Registry
from vmd.rules.vm import Passed, Vm, info
from vmd.rules.vm_state import IDLE, Phase
from vmd.shared.kernels import KernelStore
from vmd.shared.pty import Pty
from vmd.shared.ring import Replay
from vmd.wire.capture import VmCaptured
from vmd.wire.channel import Fds
from vmd.wire.internal import (
    AboutVm,
    AttachConsole,
    EndReason,
    FromVm,
    KillVm,
    LaunchVm,
    ParentToVmm,
    ToVm,
    VmEnding,
    VmExited,
    VmLaunched,
    VmLaunchFailed,
    VmPaused,
    VmReport,
    VmSpec,
    VmStarted,
    VmUnpaused,
)
from vmd.wire.messages import (
    AnyAnswer,
    ErrorCode,
    Event,
    Failed,
    ParentRequest,
    State,
    VmInfo,
    Vms,
)
from vmm_kvm.bits import PAGE_SIZE
from vmm_kvm.boot.source import Stamp
from vmm_kvm.memfd import make_constant, make_memory

ROOT = 0
ALICE, BOB, CAROL = 1001, 1002, 1003
STAFF = 50


class FakeClock:
    """Time that a test advances."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic_s(self) -> float:
        """Return seconds."""
        return self.now

    def realtime_s(self) -> float:
        """Return seconds since 1970."""
        return self.now + 1e9


class FakeLoop:
    """A loop on a test's clock: `settle` makes the calls that are due soon."""

    def __init__(self, clock: FakeClock) -> None:
        self._clock = clock
        self._posted: deque[Callable[[], None]] = deque()
        self.timers: list[FakeTimer] = []

    def monotonic_ns(self) -> int:
        """Return nanoseconds."""
        return int(self._clock.now * 1e9)

    def timer(self, callback: Callable[[], None]) -> FakeTimer:
        """Make a timer."""
        self.timers.append(FakeTimer(callback))
        return self.timers[-1]

    def call_soon(self, callback: Callable[[], None]) -> None:
        """Record a call."""
        self._posted.append(callback)

    def settle(self) -> None:
        """Make the recorded calls, and those that they record."""
        while self._posted:
            self._posted.popleft()()


class FakeNetworks:
    """Interfaces that are made later, if they are slow."""

    def __init__(self) -> None:
        self.is_slow = False
        self.held: set[int] = set()
        self.waiting: dict[int, Then] = {}

    def attach(self, vm: Vm, then: Then) -> None:
        """Make a VM's interfaces, now or later."""
        assert vm.id not in self.waiting
        if self.is_slow and vm.id not in self.held:
            self.waiting[vm.id] = then
        else:
            self.held.add(vm.id)
            then(())

    def make(self, vm_id: int) -> None:
        """Make the waiting interfaces."""
        self.held.add(vm_id)
        self.waiting.pop(vm_id)(())

    def release(self, vm_id: int) -> None:
        """Remove a VM's interfaces."""
        self.held.discard(vm_id)
        assert vm_id not in self.waiting


class Host:
    """Runs a registry's actions."""

    def __init__(self, parallelism: int = 4, delay_s: int = 30) -> None:
        self.clock = FakeClock()
        users = Users(frozenset({ROOT}), lambda uid, gid: (uid, gid) == (BOB, STAFF))
        self.registry = Registry(users, self.clock, Staggered(parallelism, delay_s), b"host")
        self.launches: list[int] = []  # VMs whose process is being made
        self.processes: dict[int, int] = {}  # by VM
        self.told: dict[int, list[str]] = {}  # messages to each process
        self.consoles: set[int] = set()
        self.networks = FakeNetworks()
        self.failing: set[int] = set()  # VMs whose resources cannot be opened
        self.booted: list[tuple[int, int | None]] = []  # the kernel descriptor of each launch
        self.operations: list[Operate] = []
        self.pending: set[tuple[int, int]] = set()  # requests without an answer yet
        self.answers: dict[tuple[int, int], AnyAnswer] = {}
        self.events: list[Event] = []
        self.gone: set[int] = set()
        self._serial = 0
        self._pid = 100
        self._kernels: dict[int, int] = {}  # inodes of clients' descriptors
        weakref.finalize(self, _close_open, self._kernels)
        self._loop = FakeLoop(self.clock)
        self._effects = Effects(
            self._loop,
            self.registry,
            Means(
                clients=self,
                vmm=self,
                networks=self.networks,
                consoles=self,
                kernels=KernelStore(),
                snapshots=SnapshotStore(None, users, Limits),
                open_client_files=lambda _vm, done: done(None),
                open_vm=self._open_vm,
                close_vm=lambda _vm_id: None,
                end_vm=lambda _vm_id: None,
                operate=self._operate,
            ),
        )

    @property
    def boots(self) -> set[int]:
        """Open descriptors of kernels that clients have passed."""
        return _open(self._kernels)

    @property
    def turn_at(self) -> float | None:
        """The time of the next staggered start, in seconds."""
        deadlines = [timer.deadline_ns for timer in self._loop.timers if timer.deadline_ns]
        return min(deadlines) / 1e9 if deadlines else None

    # Events

    def ask(
        self, request: ParentRequest, uid: int = ROOT, client: int = 1, *, with_kernel: bool = False
    ) -> AnyAnswer | None:
        """Send a request; returns the answer, if it came at once."""
        return self.answers.get(self.begin(request, uid, client, with_kernel=with_kernel))

    def begin(
        self, request: ParentRequest, uid: int = ROOT, client: int = 1, *, with_kernel: bool = False
    ) -> tuple[int, int]:
        """Send a request; returns the place of its answer."""
        self._serial += 1
        key = (client, self._serial)
        self.pending.add(key)
        passed = None
        if with_kernel:
            kernel = os.memfd_create("kernel")
            self._kernels[kernel] = os.fstat(kernel).st_ino
            passed = Passed(uid, kernel=kernel)
        request = type(request)(
            **{
                **{name: getattr(request, name) for name in request.__struct_fields__},
                "serial": self._serial,
            }
        )
        self.run(self.registry.request(client, uid, request, passed))
        return key

    def leave(self, client: int) -> None:
        """End a client's connection."""
        self.gone.add(client)
        self.pending = {key for key in self.pending if key[0] != client}
        self.run(self.registry.client_left(client))

    def report(self, vm: Vm | int, *events: vm_state.Event) -> None:
        """Let vmm send the messages that cause these events of a VM."""
        vm_id = vm if isinstance(vm, int) else vm.id
        for event in events:
            self._effects.take(_message(vm_id, event), Fds())
            self._settle()

    def launch(self, name: str) -> Vm:
        """Let the process of a starting VM be ready."""
        vm = self.vm(name)
        self.launches.remove(vm.id)
        self._pid += 1
        self.processes[vm.id] = self._pid
        self._effects.take(VmLaunched(id=vm.id, pid=self._pid), Fds())
        self._settle()
        return vm

    def end(self, vm: Vm | int, event: vm_state.Event) -> None:
        """Let a VM's process end."""
        vm_id = vm if isinstance(vm, int) else vm.id
        del self.processes[vm_id]
        self.report(vm_id, event)

    def capture(self, vm: Vm) -> None:
        """Let the process of a VM hand over the memory for its clones."""
        fds = [make_constant("state", [b"state"]), make_memory("memory", PAGE_SIZE)]
        self._effects.take(FromVm(id=vm.id, report=VmCaptured()), Fds(fds))
        self._settle()

    def end_vmm(self) -> None:
        """Let the vmm process end, and all processes of VMs."""
        self.processes.clear()
        self.launches.clear()
        self._effects.vmm_ended()
        self._settle()

    def make_networks(self, vm_id: int) -> None:
        """Make the interfaces of a VM that waits for them."""
        self.networks.make(vm_id)
        self._settle()

    def wait_for_turn(self) -> None:
        """Advance the time to the next staggered start."""
        assert self.turn_at is not None
        self.clock.now = self.turn_at
        for timer in self._loop.timers:
            if timer.deadline_ns == self._loop.monotonic_ns():
                timer.cancel()
                timer.callback()
        self._settle()

    # State

    def vm(self, name: str) -> Vm:
        """Return the VM of this name."""
        vm = self.registry.find(0, name)
        assert vm is not None
        return vm

    def states(self) -> dict[str, State]:
        """Return the states that users see."""
        return {vm.name: info(vm).state for vm in self.registry.vms}

    # Effects

    def run(self, actions: list[Action]) -> None:
        """Carry out actions, in order, and their consequences."""
        self._effects.run(actions)
        self._settle()

    def _settle(self) -> None:
        self.check()
        self._loop.settle()
        self.check()

    def answer(self, client: int, answer: AnyAnswer, fds: Sequence[int] = ()) -> None:
        """Receive a client's answer."""
        Fds(fds).close()
        key = (client, answer.serial)
        assert client not in self.gone
        assert key in self.pending  # exactly one answer
        self.pending.remove(key)
        self.answers[key] = answer

    def tell(self, event: Event) -> None:
        """Receive an event, as a listener."""
        self.events.append(event)

    def list_vms(self, question: List, _inquiries: Inquiries, running: frozenset[int]) -> None:
        """Tell the status of VMs at once."""
        assert running == {*self.processes, *self.launches}
        shown: tuple[VmInfo, ...] = tuple(map(info, question.vms))
        vms = (*shown, *question.gone)
        self.answer(question.ticket.client, Vms(serial=question.ticket.serial, vms=vms))

    def _operate(self, operation: Operate) -> None:
        self.operations.append(operation)
        assert tuple(operation.ticket) in self.pending

    def send(self, message: ParentToVmm, fds: Sequence[int] = ()) -> bool:
        """Receive a message, as the vmm process."""
        Fds(fds).close()
        match message:
            case LaunchVm(spec=spec):
                assert spec.id not in self.processes
                assert spec.id not in self.launches
                assert spec.id in self.consoles
                vm = self.registry.find(spec.id, "")
                assert vm is not None
                assert vm.state.phase is Phase.STARTING  # it has not been stopped meanwhile
                self.told[spec.id] = []
                self.launches.append(spec.id)
            case KillVm(id=vm_id):
                self._told(vm_id, message)
            case ToVm(id=vm_id, command=AttachConsole()):
                assert vm_id in self.processes  # only its process can show anything
            case ToVm(id=vm_id, command=command):
                self._told(vm_id, command)
            case _:
                raise AssertionError(message)
        return True

    def _told(self, vm_id: int, message: object) -> None:
        if vm_id in self.networks.waiting:  # vmm does not know it yet
            return
        assert vm_id in self.processes or vm_id in self.launches
        self.told[vm_id].append(type(message).__name__)

    def open(self, vm: Vm) -> Pty:
        """Have a console."""
        assert (vm.id in self.consoles) == bool(vm.state.tty)
        self.consoles.add(vm.id)
        return Pty(f"/dev/pts/{vm.id}", -1, -1)

    def replay(self, vm_id: int) -> Replay:
        """Replay nothing."""
        assert vm_id in self.consoles
        return Replay(0, 0)

    def close(self, vm_id: int) -> None:
        """Close a console."""
        assert vm_id not in self.processes
        self.consoles.discard(vm_id)

    def _open_vm(self, vm: Vm, pty: Pty, _networks: Sequence[Interface]) -> Resources:
        self.booted.append((vm.id, vm.passed.kernel if vm.passed else None))
        if vm.passed:
            assert vm.passed.kernel in self.boots  # not closed yet
        if vm.id in self.failing:
            raise ResourceError(ErrorCode.DISK_MISSING, "in use")
        assert pty.name
        spec = VmSpec(
            id=vm.id,
            name=vm.name,
            memory=1 << 20,
            cpus=1,
            boot=0,
            boot_path="",
            kernel=1,
            tty=2,
            ring=3,
        )
        return Resources(spec, [], Stamp(""))

    def check(self) -> None:
        """Compare the registry's table with the books."""
        by_id = {vm.id: vm for vm in self.registry.vms}
        assert len({vm.name for vm in by_id.values()}) == len(by_id)
        networks = (*self.networks.held, *self.networks.waiting)
        for vm_id in (*self.processes, *self.launches, *self.consoles, *networks):
            assert vm_id in by_id
        assert self._effects.running == {*self.processes, *self.launches}
        held = [fd for vm in by_id.values() if vm.passed for fd in vm.passed.fds]
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
            assert vm.id not in networks
            state = vm.state
            assert state.starter is None
            assert (state.waiters, state.pausers, state.unpausers, state.watchers) == ((),) * 4


def _message(vm_id: int, event: vm_state.Event) -> AboutVm:
    """Return vmm's message that causes an event."""
    report: VmReport
    match event:
        case vm_state.LaunchFailed(code, message):
            return VmLaunchFailed(id=vm_id, code=code, message=message)
        case vm_state.Exited(None):
            return VmExited(id=vm_id, pid=0, status=-9)
        case vm_state.Exited(EndReason() as reason, code, message):
            ending = VmEnding(reason=reason, code=code, message=message)
            return VmExited(id=vm_id, pid=0, status=0, ending=ending)
        case vm_state.Running():
            report = VmStarted()
        case vm_state.Paused():
            report = VmPaused()
        case vm_state.Unpaused():
            report = VmUnpaused()
        case vm_state.SendFailed(code, message):
            report = VmCaptured(failure=code, message=message)
        case _:
            raise AssertionError(event)
    return FromVm(id=vm_id, report=report)


def _open(files: dict[int, int]) -> set[int]:
    """Return the descriptors that are open, and still of the same file."""
    found = set()
    for fd, inode in files.items():
        try:
            if os.fstat(fd).st_ino == inode:
                found.add(fd)
        except OSError:
            continue
    return found


def _close_open(files: dict[int, int]) -> None:
    for fd in _open(files):
        os.close(fd)


def code(answer: AnyAnswer | None) -> str:
    """Return the error code of a failed request."""
    assert isinstance(answer, Failed)
    return answer.code
