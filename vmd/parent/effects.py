"""Carries out the registry's decisions, and reports their results back.

An effect of a VM's life is performed here from its first step to its last: a launch makes the
networks, opens the console and the files, and has vmm make the processes. vmm's messages then
become events for the registry. The host is behind protocols: the tests of the registry's model run
this module on a host of their own.
"""

import os
import socket
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol, assert_never

from vmd.parent import captures
from vmd.parent.errors import ResourceError
from vmd.parent.exits import exit_event
from vmd.parent.interfaces import Interface, Then
from vmd.parent.resources import Resources
from vmd.parent.sendings import Sendings
from vmd.parent.silence import Silences, why_silent
from vmd.parent.snapshots import SnapshotStore
from vmd.parent.starts import Starts
from vmd.parent.status import Inquiries, TimedLoop
from vmd.rules import vm_state
from vmd.rules.actions import (
    Action,
    Answer,
    ArmTurn,
    Drop,
    Effect,
    List,
    LookIntoStore,
    OpenConsole,
    OpenDebugger,
    OpenPort,
    Operate,
    Perform,
    Tell,
)
from vmd.rules.registry import Registry
from vmd.rules.vm import Vm
from vmd.shared.kernels import KernelStore
from vmd.shared.log import tell_of
from vmd.shared.opening import OpeningError
from vmd.shared.pty import Pty
from vmd.shared.ring import Replay
from vmd.wire.capture import CaptureVm, VmCaptured
from vmd.wire.channel import Fds, Timer
from vmd.wire.internal import (
    AboutVm,
    AskStatistics,
    AttachConsole,
    ConnectVm,
    DebugVm,
    EndReason,
    FromVm,
    KillVm,
    LaunchVm,
    ParentToVmm,
    PauseVm,
    StopVm,
    ToVm,
    UnpauseVm,
    VmCommand,
    VmExited,
    VmHalted,
    VmHeld,
    VmLaunched,
    VmLaunchFailed,
    VmPaused,
    VmReport,
    VmStarted,
    VmStatistics,
    VmUnpacked,
    VmUnpaused,
)
from vmd.wire.leaving import CancelSendVm, VmMigrating, VmSent
from vmd.wire.messages import (
    AnyAnswer,
    ConsoleOpened,
    ErrorCode,
    Event,
    EventKind,
    Failed,
)
from vmd.wire.ports import Connected
from vmm_kvm.clock import NANOSECONDS
from vmm_kvm.log import Log

log = Log(__name__)

STOP_S = 123
"""How long a guest without a stop timeout of its own has; the VM process enforces it."""
GRACE_S = 5
"""How much longer a VM process may take before it is killed."""


class Later(TimedLoop, Protocol):
    """An event loop that also takes calls."""

    def call_soon(self, callback: Callable[[], None]) -> None:
        """Call `callback` once, after what runs now."""


class Clients(Protocol):
    """Clients, and their answers."""

    def answer(self, client: int, answer: AnyAnswer, fds: Sequence[int] = ()) -> None:
        """Answer a client; takes ownership of `fds`."""

    def tell(self, event: Event) -> None:
        """Tell all that listen to events."""

    def list_vms(self, question: List, inquiries: Inquiries, running: frozenset[int]) -> None:
        """Answer with the status of VMs; `running` are the ids of those that have a process."""


class Vmm(Protocol):
    """The vmm process."""

    def send(self, message: ParentToVmm, fds: Sequence[int] = ()) -> bool:
        """Send a message, and take ownership of `fds`; False if there is no vmm."""


class Interfaces(Protocol):
    """Makes the network interfaces of VMs."""

    def attach(self, vm: Vm, then: Then) -> None:
        """Make a VM's interfaces, or find those from before its reboot; then call `then` once."""

    def release(self, vm_id: int) -> None:
        """Remove a VM's interfaces, if it has any."""


class Terminals(Protocol):
    """Makes the consoles of VMs."""

    def open(self, vm: Vm) -> Pty:
        """Return a VM's console, the same until `close`.

        Raises:
            OSError: the host has no terminals or descriptors left.
        """

    def replay(self, vm_id: int) -> Replay:
        """Return the part of a VM's console output that a new client is shown first."""

    def close(self, vm_id: int) -> None:
        """Give a VM's console back, if it has one."""


OpenClientFiles = Callable[[Vm, Callable[[OpeningError | None], None]], None]
"""Opens a VM's files that are a client's, and calls its argument once, at once or later."""

OpenVm = Callable[[Vm, Pty, Sequence[Interface]], Resources]
"""Opens all else that a VM needs.

Raises:
    ResourceError: something is missing.
    OSError: the host has no descriptors left.
"""


class Means(NamedTuple):
    """The means by which effects are carried out; they stay the caller's."""

    clients: Clients
    vmm: Vmm
    networks: Interfaces
    consoles: Terminals
    kernels: KernelStore
    snapshots: SnapshotStore
    open_client_files: OpenClientFiles
    open_vm: OpenVm
    close_vm: Callable[[int], None]
    """Releases what `open_vm` made for a VM, by its id; its processes are gone."""
    end_vm: Callable[[int], None]
    """Releases resources that a VM has kept over its reboots, by its id."""
    operate: Callable[[Operate], None]
    """Executes an administrator's request of the daemon itself, and answers."""


class Effects:
    """Carries out the registry's actions, on the event loop's thread."""

    def __init__(self, loop: Later, registry: Registry, means: Means) -> None:
        """Begin without VMs."""
        self._loop = loop
        self._registry = registry
        self._clients = means.clients
        self._vmm = means.vmm
        self._networks = means.networks
        self._consoles = means.consoles
        self._kernels = means.kernels
        self._open_client_files = means.open_client_files
        self._open_vm = means.open_vm
        self._close_vm = means.close_vm
        self._end_vm = means.end_vm
        self._operate = means.operate
        self._turn_timer = loop.timer(lambda: self.run(registry.turn()))
        self._launched: set[int] = set()  # ids of VMs that vmm knows
        self._ttys: dict[int, str] = {}  # of those
        self._deadlines: dict[int, Timer] = {}  # of those that are to stop
        self._silences = Silences(loop, self._is_silent)
        self._inquiries = Inquiries(loop, lambda vm_id: self.tell_vm(vm_id, AskStatistics()))
        self.starts = Starts(loop.monotonic_ns)
        """How many VMs were started, and how fast."""
        self._sendings = Sendings(loop, means.snapshots, self.tell_vm, self._kill)
        self._on_idle: Callable[[], None] | None = None

    @property
    def inquiries(self) -> Inquiries:
        """Asks VM processes for statistics."""
        return self._inquiries

    @property
    def running(self) -> frozenset[int]:
        """The ids of VMs that vmm knows."""
        return frozenset(self._launched)

    # Effects

    def run(self, actions: Sequence[Action]) -> None:
        """Carry out actions in order."""
        for action in actions:
            match action:
                case Answer(client, answer):
                    self._clients.answer(client, answer)
                case Tell(event):
                    _log_event(event)
                    self._clients.tell(event)
                case Perform(vm, effect):
                    self._perform(vm, effect)
                case Operate():
                    self._operate(action)
                case LookIntoStore(ticket=ticket):
                    self._clients.answer(ticket.client, *self._sendings.answer(action))
                case List():
                    self._clients.list_vms(action, self._inquiries, self.running)
                case OpenConsole(ticket, vm):
                    self._open_console(ticket, vm)
                case OpenPort(ticket, vm, port):
                    self._open_stream(ticket, vm, ConnectVm(port=port))
                case OpenDebugger(ticket, vm):
                    self._open_stream(ticket, vm, DebugVm())
                case Drop(passed):
                    Fds(passed.fds).close()
                case ArmTurn(delay_s):
                    self._turn_timer.arm(self._loop.monotonic_ns() + delay_s * NANOSECONDS)
                case _:
                    assert_never(action)

    def end_all(self, on_idle: Callable[[], None]) -> None:
        """End all VMs; `on_idle` is called once, when none is left."""
        self._on_idle = on_idle
        self._turn_timer.cancel()
        self.run(self._registry.remove_all())
        self._look_if_idle()

    def tell_vm(self, vm_id: int, command: VmCommand, fds: Sequence[int] = ()) -> None:
        """Send a message to a VM process; takes ownership of `fds`."""
        self._vmm.send(ToVm(id=vm_id, command=command), fds)

    def _kill(self, vm_id: int, why: str) -> None:
        self._vmm.send(KillVm(id=vm_id, why=why))

    def _happened(self, vm_id: int, event: vm_state.Event) -> None:
        self.run(self._registry.report(vm_id, event))
        self._look_if_idle()

    def _look_if_idle(self) -> None:
        if self._on_idle and self._registry.is_idle and not self._launched:
            on_idle, self._on_idle = self._on_idle, None
            on_idle()

    def _perform(self, vm: Vm, effect: Effect) -> None:
        match effect:
            case vm_state.Launch():
                self.starts.begin(vm.id)
                # Its results must come after the registry has finished this step.
                self._loop.call_soon(lambda: self._launch(vm))
            case vm_state.Release(keeps_tty=keeps_tty):
                if not keeps_tty:
                    self._consoles.close(vm.id)
                    self._networks.release(vm.id)
                    self._end_vm(vm.id)
            case vm_state.Kill():
                self._vmm.send(KillVm(id=vm.id))
            case vm_state.SendStop():
                self._stop(vm)
            case vm_state.SendPause():
                self._silences.begin(vm.id)
                self.tell_vm(vm.id, PauseVm())
            case vm_state.SendUnpause(force=force):
                self._silences.begin(vm.id)
                self.tell_vm(vm.id, UnpauseVm(force=force))
            case vm_state.SendState():
                failure = self._sendings.begin(vm, effect)
                if failure:
                    self._send_failed(vm, failure)
            case vm_state.SendCapture():
                self.tell_vm(vm.id, CaptureVm())
            case vm_state.CancelSend():
                self.tell_vm(vm.id, CancelSendVm())
            case _:
                assert_never(effect)

    def _stop(self, vm: Vm) -> None:
        """Ask a guest to stop; a process that does not end with it is killed."""
        timeout_s = vm.config.stop_timeout_s
        self.tell_vm(vm.id, StopVm(timeout_s=timeout_s))
        timer = self._deadlines.get(vm.id)
        if timer is None:
            timer = self._loop.timer(lambda: self._happened(vm.id, vm_state.Overdue()))
            self._deadlines[vm.id] = timer
        patience_s = (timeout_s or STOP_S) + GRACE_S
        timer.arm(self._loop.monotonic_ns() + patience_s * NANOSECONDS)

    def _open_console(self, ticket: vm_state.Ticket, vm: Vm) -> None:
        try:
            theirs, ours = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        except OSError as err:
            text = f"console: {err.strerror}"
            failed = Failed(serial=ticket.serial, code=ErrorCode.EAGAIN, message=text)
            self._clients.answer(ticket.client, failed)
            return
        past = self._consoles.replay(vm.id)
        self.tell_vm(vm.id, AttachConsole(position=past.start), (ours.detach(),))
        opened = ConsoleOpened(
            serial=ticket.serial,
            id=vm.id,
            tty=vm.state.tty,
            position=past.start,
            history=past.size,
        )
        self._clients.answer(ticket.client, opened, (theirs.detach(),))

    def _open_stream(self, ticket: vm_state.Ticket, vm: Vm, command: ConnectVm | DebugVm) -> None:
        try:
            theirs, ours = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        except OSError as err:
            text = f"stream: {err.strerror}"
            failed = Failed(serial=ticket.serial, code=ErrorCode.EAGAIN, message=text)
            self._clients.answer(ticket.client, failed)
            return
        self.tell_vm(vm.id, command, (ours.detach(),))
        connected = Connected(serial=ticket.serial, id=vm.id)
        self._clients.answer(ticket.client, connected, (theirs.detach(),))

    # Launching

    def _launch(self, vm: Vm) -> None:
        """Make a VM's interfaces; then continue."""
        if not self._was_stopped(vm):
            self._networks.attach(vm, lambda found: self._launch_with(vm, found))

    def _launch_with(self, vm: Vm, networks: Sequence[Interface] | ResourceError) -> None:
        """Have a client's files opened; then continue."""
        if isinstance(networks, ResourceError):
            self._launch_failed(vm, networks.code, str(networks))
            return
        self._open_client_files(vm, lambda failure: self._launch_now(vm, networks, failure))

    def _launch_now(
        self, vm: Vm, networks: Sequence[Interface], failure: OpeningError | None
    ) -> None:
        """Open the rest of a VM's resources, and have vmm start its processes."""
        if failure:
            self._launch_failed(vm, failure.code, str(failure))
            return
        if self._was_stopped(vm):
            return
        try:
            pty = self._consoles.open(vm)
            spec, fds, stamp = self._open_vm(vm, pty, networks)
        except ResourceError as err:
            self._launch_failed(vm, err.code, str(err))
            return
        except OSError as err:
            self._launch_failed(vm, ErrorCode.EIO, err.strerror or str(err))
            return
        try:
            vm.lent = captures.lend(vm, spec, fds) if vm.state.is_template else None
        except OSError as err:
            Fds(fds).close()
            self._launch_failed(vm, ErrorCode.EIO, err.strerror or str(err))
            return
        self._launched.add(vm.id)
        self._ttys[vm.id] = pty.name
        if spec.kernel is None:
            self._kernels.expect(vm.id, stamp)
        else:
            log.debug("vm %d: unpacked kernel lent", vm.id)
        if not self._vmm.send(LaunchVm(spec=spec), fds):
            self._launched.discard(vm.id)
            self._launch_failed(vm, ErrorCode.EAGAIN, "there is no vmm process")

    def _was_stopped(self, vm: Vm) -> bool:
        """Tell whether a VM's start was cancelled; if so, the registry is told."""
        if vm.state.phase is vm_state.Phase.STARTING:
            return False
        self.starts.end(vm.id)
        self._happened(vm.id, vm_state.LaunchFailed(ErrorCode.EINTR, "it was stopped"))
        return True

    def _launch_failed(self, vm: Vm, code: ErrorCode, message: str) -> None:
        self.starts.end(vm.id)
        _remove_new(vm)
        self._close_vm(vm.id)
        self._happened(vm.id, vm_state.LaunchFailed(code, message))

    # Reports of vmm

    def take(self, message: AboutVm, fds: Fds) -> None:
        """Account for what vmm says."""
        if message.id not in self._launched:
            log.warning("vmm: speaks of vm %d, which does not run", message.id)
            return
        match message:
            case VmLaunched(id=vm_id, pid=pid):
                self._happened(vm_id, vm_state.Launched(pid, self._ttys[vm_id]))
            case VmLaunchFailed(id=vm_id, code=code, message=text):
                self._launched.discard(vm_id)
                self.starts.end(vm_id)
                self._close_vm(vm_id)
                if vm := self._registry.find(vm_id, ""):
                    _remove_new(vm)
                self._happened(vm_id, vm_state.LaunchFailed(code, text))
            case FromVm(id=vm_id, report=report):
                self._reported(vm_id, report, fds)
            case VmHeld(id=vm_id, message=text):
                if vm := self._registry.find(vm_id, ""):
                    log.warning("vm/%s: %s", vm.name, text)
                self._happened(vm_id, vm_state.Held(text))
            case VmExited():
                self._exited(message)
            case _:
                assert_never(message)

    def vmm_ended(self) -> None:
        """Note that no process of any VM is left."""
        for vm_id in sorted(self._launched):
            self._forget_process(vm_id)
            self._happened(vm_id, vm_state.Exited(None, message="the vmm process has ended"))

    def _forget_process(self, vm_id: int) -> None:
        self.starts.end(vm_id)
        self._launched.discard(vm_id)
        self._sendings.forget(vm_id)
        self._close_vm(vm_id)
        self._inquiries.forget(vm_id)
        self._silences.end(vm_id)
        timer = self._deadlines.pop(vm_id, None)
        if timer:
            timer.cancel()
        self._kernels.expect_no_more(vm_id)

    def _reported(self, vm_id: int, report: VmReport, fds: Fds) -> None:
        match report:
            case VmUnpacked():
                for kernel in fds.take_all():
                    is_kept = self._kernels.keep(vm_id, kernel)
                    log.debug("vm %d: unpacked kernel %s", vm_id, "kept" if is_kept else "refused")
            case VmStarted():
                self.starts.succeed(vm_id)
                self._kernels.expect_no_more(vm_id)
                self._happened(vm_id, vm_state.Running())
                vm = self._registry.find(vm_id, "")
                if vm:
                    vm.new_file = None
                    told = "started %s (vm %d) successfully, tty %s"
                    tell_of(vm.name, told, vm.name, vm_id, vm.state.tty)
            case VmPaused():
                self._silences.end(vm_id)
                self._happened(vm_id, vm_state.Paused())
            case VmHalted(reason=reason, message=text):
                vm = self._registry.find(vm_id, "")
                log.warning("vm/%s: paused: %s", vm.name if vm else vm_id, text)
                self._happened(vm_id, vm_state.Halted(reason, text))
            case VmUnpaused():
                self._silences.end(vm_id)
                self._happened(vm_id, vm_state.Unpaused())
            case VmCaptured(failure=None):
                self._captured(vm_id, fds)
            case VmCaptured(failure=code, message=text) if code is not None:
                self._happened(vm_id, vm_state.SendFailed(code, text))
            case VmSent():
                self._sent(vm_id, report)
            case VmMigrating(message=text):
                self._happened(vm_id, vm_state.Migrating(text))
            case VmStatistics():
                self._inquiries.told(vm_id, report)
            case _:
                log.debug("vm %d: %s", vm_id, report)

    def _is_silent(self, vm_id: int) -> None:
        if vm := self._registry.find(vm_id, ""):
            self._happened(vm_id, vm_state.Silent(why_silent(vm.state.pid)))

    def _sent(self, vm_id: int, report: VmSent) -> None:
        event: vm_state.Sent | vm_state.SendFailed
        if report.failure is None:
            event = self._sendings.end(vm_id)
        else:
            ours = self._sendings.forget(vm_id)
            code, text = (ours.code, str(ours)) if ours else (report.failure, report.message)
            event = vm_state.SendFailed(code, text)
        vm = self._registry.find(vm_id, "")
        if vm and isinstance(event, vm_state.SendFailed):
            tell_of(vm.name, "%s: cannot be sent: %s", vm.name, event.message, is_bad=True)
        elif vm and vm.state.snapshot is None:
            self._tell_sent(vm_id)
        self._happened(vm_id, event)

    def _send_failed(self, vm: Vm, event: vm_state.SendFailed) -> None:
        tell_of(vm.name, "%s: cannot be sent: %s", vm.name, event.message, is_bad=True)
        # The registry may be in the middle of the step that this comes of.
        self._loop.call_soon(lambda: self._happened(vm.id, event))

    def _captured(self, vm_id: int, fds: Fds) -> None:
        vm = self._registry.find(vm_id, "")
        if vm is None:
            return
        try:
            vm.captured = captures.keep(vm, fds)
        except captures.CaptureError as err:
            log.warning("vm/%s: cannot be captured: %s", vm.name, err)
            self._happened(vm_id, vm_state.SendFailed(ErrorCode.EIO, str(err)))
            return
        self._happened(vm_id, vm_state.Captured())

    def _tell_sent(self, vm_id: int) -> None:
        if vm := self._registry.find(vm_id, ""):
            tell_of(vm.name, "%s: sent vm %d successfully.", vm.name, vm_id)

    def _exited(self, message: VmExited) -> None:
        self._forget_process(message.id)
        vm = self._registry.find(message.id, "")
        event = exit_event(message)
        if event.reason is EndReason.SENT:
            self._tell_sent(message.id)
        if vm:
            _remove_new(vm)
            vm.has_timed_out = message.ending is not None and message.ending.has_timed_out
        self._happened(message.id, event)


def _log_event(event: Event) -> None:
    """Log how a VM ended, why it was started again, or which part of it fails."""
    text = f"{event.kind}: {event.message}" if event.message else event.kind
    if event.kind is EventKind.INTERFACE:
        text = event.message
    is_bad = event.kind in {EventKind.FAILED, EventKind.INTERFACE}
    if is_bad or (event.kind is EventKind.REBOOTED and event.message):
        log.warning("vm/%s: %s", event.name, text)
    elif event.kind is EventKind.STOPPED:
        log.info("vm/%s: %s", event.name, text)


def _remove_new(vm: Vm) -> None:
    """Remove the file that was made for a failed start, if there was one."""
    path, vm.new_file = vm.new_file, None
    if path is None:
        return
    try:
        os.unlink(path)  # noqa: PTH108 - the plainest way
    except OSError as err:
        log.warning("%s: cannot be removed: %s", path, err.strerror)
