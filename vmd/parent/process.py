"""The parent: configuration, the table of VMs, every file that is opened, and the other processes.

It decides nothing about a VM's life itself: requests and reports go to the registry, and what that
returns is carried out here. With root's rights, it reads nothing but the configuration, messages of
the other processes, and the headers of disk images.

Source: sections 5.2, 7 and 8 of OpenBSD's behaviour.
"""

import os
import socket
from collections.abc import Callable, Sequence
from typing import assert_never

from vmd.config.model import Config, Staggered, VmConfig
from vmd.parent.clock import SystemClock
from vmd.parent.configuration import Settings, read_configuration
from vmd.parent.exits import exit_event
from vmd.parent.interfaces import Network
from vmd.parent.networks import Networks
from vmd.parent.passed import passed_boot
from vmd.parent.patience import Patience, cut
from vmd.parent.peers import Peers
from vmd.parent.resources import Host, ResourceError, open_resources
from vmd.parent.status import Inquiries, StatusQuestion
from vmd.parent.terminal_watch import TerminalWatch
from vmd.rules import vm_state
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
)
from vmd.rules.vm import Vm
from vmd.shared import log as logging
from vmd.shared.kernels import KernelStore
from vmd.shared.pty import Pty, open_pty
from vmd.wire.channel import (
    Channel,
    ChannelError,
    DescriptorsLostError,
    Fds,
    MalformedError,
    OversizeError,
    Received,
)
from vmd.wire.internal import (
    AskStatistics,
    AttachConsole,
    ClientAnswer,
    ClientCame,
    ClientGone,
    ClientRequest,
    Considered,
    ControlToParent,
    FromVm,
    Happened,
    KillVm,
    LaunchVm,
    LookAtTerminal,
    ParentToControl,
    ParentToVmm,
    PauseVm,
    SetLinks,
    SetVerbosity,
    StopVm,
    ToVm,
    UnpauseVm,
    VmCommand,
    VmExited,
    VmLaunched,
    VmLaunchFailed,
    VmmToParent,
    VmPaused,
    VmReport,
    VmStarted,
    VmStatistics,
    VmUnpacked,
    VmUnpaused,
)
from vmd.wire.messages import (
    LINE_MAX,
    LINES_MAX,
    AnyAnswer,
    ConsoleOpened,
    Done,
    ErrorCode,
    Failed,
    Load,
    Log,
    ParentRequest,
    Reload,
    Reset,
    ResetMode,
    Start,
    Status,
    Vms,
)
from vmm_kvm.clock import NANOSECONDS
from vmm_kvm.log import Log as Logger
from vmm_kvm.loop import EventLoop

log = Logger(__name__)

STAGGER_DELAY_S = 30
"""Between two batches of starting VMs, unless the configuration says otherwise."""


class Parent:
    """The parent's work, on the event loop's thread.

    `control` and `vmm` are None while there is no such process.
    """

    def __init__(
        self, loop: EventLoop, settings: Settings, networks: Networks, terminals: TerminalWatch
    ) -> None:
        """Begin without VMs and processes."""
        self._loop = loop
        self._networks = networks
        self._settings = settings
        self._control: Channel[ParentToControl, ControlToParent] | None = None
        self._vmm: Channel[ParentToVmm, VmmToParent] | None = None
        staggered = Staggered(os.cpu_count() or 1, STAGGER_DELAY_S)
        self._registry = Registry(settings.users, SystemClock(), staggered, os.urandom)
        self._default_staggered = staggered
        self._turn_timer = loop.timer(self._turn)
        self._ptys: dict[int, Pty] = {}
        self._terminals = terminals
        self._watches: dict[int, int] = {}  # of the terminals, by the VM's id
        self._launched: set[int] = set()  # ids of VMs that vmm knows
        self._kernels = KernelStore()
        self._host = Host(settings.users, self._kernels, settings.state)
        self._peers = Peers(settings.address)
        self._questions: set[StatusQuestion] = set()
        self._inquiries = Inquiries(loop, lambda vm_id: self._tell_vm(vm_id, AskStatistics()))
        self._kill_control: Callable[[], None] = lambda: None
        self._patience: Patience | None = None
        self._verbosity = 0
        self._on_idle: Callable[[], None] | None = None

    # Processes

    def control_started(
        self, channel: Channel[ParentToControl, ControlToParent], kill: Callable[[], None]
    ) -> None:
        """Serve clients by a new control process, which `kill` ends; takes over the channel."""
        self._control, self._kill_control = channel, kill
        channel.watch(
            self._loop,
            self._from_control,
            lambda err: cut("control", channel, err, kill),
        )
        self._patience = Patience(self._loop, "control", kill)
        channel.add_source(self._patience)
        self._hold_back()
        self._send_control(SetVerbosity(level=self._verbosity))

    def control_ended(self) -> None:
        """Forget the clients: their connections went with the control process."""
        if self._control:
            self._control.close()
            self._control = None
        for client in self._peers.forget_all():
            self._registry.client_left(client)
        # The next control process counts its clients from the first number again.
        for question in self._questions:
            question.cancel()
        self._questions.clear()

    def vmm_started(
        self, channel: Channel[ParentToVmm, VmmToParent], kill: Callable[[], None]
    ) -> None:
        """Run VMs by a new vmm process, which `kill` ends; takes over the channel."""
        self._vmm = channel
        channel.watch(self._loop, self._from_vmm, lambda err: cut("vmm", channel, err, kill))
        self._hold_back()
        self._send_vmm(SetVerbosity(level=self._verbosity))

    def _hold_back(self) -> None:
        """Take no requests while their answers, or what they have vmm do, cannot go out.

        vmm itself is always listened to: it says no more than it is asked for.
        """
        if self._control:
            self._control.add_source(self._control)
            if self._vmm:
                self._vmm.add_source(self._control)

    def vmm_ended(self) -> None:
        """Account for all VMs: none of their processes is left."""
        self.close_vmm()
        for vm_id in sorted(self._launched):
            self._launched.discard(vm_id)
            self._inquiries.forget(vm_id)
            self._happened(vm_id, vm_state.Exited(None, message="the vmm process has ended"))

    def close_vmm(self) -> None:
        """Let the vmm process end."""
        if self._vmm:
            self._vmm.close()
            self._vmm = None

    def _send_control(
        self, message: ParentToControl, fds: list[int] | tuple[int, ...] = ()
    ) -> None:
        if self._control is None:
            Fds(fds).close()
            return
        try:
            self._control.send(message, fds)
        except ChannelError as err:
            log.warning("control: %s", err)

    def _send_vmm(self, message: ParentToVmm, fds: list[int] | tuple[int, ...] = ()) -> bool:
        if self._vmm is None:
            Fds(fds).close()
            return False
        try:
            self._vmm.send(message, fds)
        except (ChannelError, OversizeError) as err:
            log.warning("vmm: %s", err)
            return False
        return True

    def _tell_vm(
        self, vm_id: int, command: VmCommand, fds: list[int] | tuple[int, ...] = ()
    ) -> None:
        self._send_vmm(ToVm(id=vm_id, command=command), fds)

    # Configuration

    def configure(self) -> tuple[str, ...]:
        """Read the configuration, forget VMs that do not run, and start those that are to start.

        Returns what is wrong with it, a line each; then nothing has changed.
        """
        settings = self._settings
        config = self._read(settings.path, is_optional=settings.is_optional, keeps_idle=False)
        if not isinstance(config, Config):
            return config
        self._run(self._registry.forget_idle())
        settings.set_socket_owner(config.socket_owner)
        self._registry.staggered = config.staggered or self._default_staggered
        self._networks.configure(config)
        self._register(config)
        return ()

    def _read(self, path: str, *, is_optional: bool, keeps_idle: bool) -> Config | tuple[str, ...]:
        def judge(vms: Sequence[VmConfig]) -> list[str]:
            return self._registry.judge(vms, self._settings.uid, keeps_idle=keeps_idle)

        return read_configuration(self._settings, path, judge, is_optional=is_optional)

    def _register(self, config: Config) -> None:
        actions = self._registry.load(config.vms, self._settings.uid)
        for vm_id, links in self._networks.refresh().items():
            if vm_id in self._launched:
                self._tell_vm(vm_id, SetLinks(are_up=links))
        self._run(actions)

    def set_verbosity(self, level: int) -> None:
        """Log more or less, in every process."""
        self._verbosity = level
        logging.set_verbosity(level)
        self._send_control(SetVerbosity(level=level))
        self._send_vmm(SetVerbosity(level=level))
        self._networks.set_verbosity(level)

    def shut_down(self, on_idle: Callable[[], None]) -> None:
        """End all VMs; `on_idle` is called once, when none is left."""
        self._on_idle = on_idle
        self._turn_timer.cancel()
        self._run(self._registry.remove_all())
        self._look_if_idle()

    def _look_if_idle(self) -> None:
        if self._on_idle and self._registry.is_idle and not self._launched:
            on_idle, self._on_idle = self._on_idle, None
            on_idle()

    # What clients ask

    def _from_control(self, received: Received[ControlToParent]) -> None:
        try:
            self._take_from_control(received)
        except MalformedError as err:  # control is not what it should be: another one takes over
            if self._control:
                cut("control", self._control, err, self._kill_control)

    def _take_from_control(self, received: Received[ControlToParent]) -> None:
        with received.fds as fds:
            match received.message:
                case ClientCame(client=client):
                    self._peers.came(client, fds)
                case ClientRequest(client=client, request=request):
                    self._ask(client, self._peers.asks(client), request, fds)
                case ClientGone(client=client):
                    self._peers.gone(client)
                    self._registry.client_left(client)
                    for question in tuple(self._questions):
                        if question.ticket.client == client:
                            self._questions.discard(question)
                            question.cancel()
                            self._send_control(Considered(client=client))
                case _:
                    assert_never(received.message)

    def _ask(self, client: int, uid: int | None, request: ParentRequest, fds: Fds) -> None:
        try:
            if uid is None:
                raise DescriptorsLostError("the daemon had none left to see who connects")
            boot = passed_boot(request, fds) if isinstance(request, Start) else None
        except ChannelError as err:
            is_wrong = isinstance(err, MalformedError)
            code = ErrorCode.EINVAL if is_wrong else ErrorCode.EAGAIN
            self._answer(client, Failed(serial=request.serial, code=code, message=str(err)))
            self._send_control(Considered(client=client))
            return
        self._run(self._registry.request(client, uid, request, boot))
        if not isinstance(request, Status):  # whose answer takes as much again
            self._send_control(Considered(client=client))

    def _answer(
        self, client: int, answer: AnyAnswer, fds: list[int] | tuple[int, ...] = ()
    ) -> None:
        if not (isinstance(answer, Vms) and answer.has_more):
            self._peers.answered(client)
        try:
            self._send_control(ClientAnswer(client=client, answer=answer), fds)
        except OversizeError as err:
            text = f"the answer would be {err}"
            failed = Failed(serial=answer.serial, code=ErrorCode.EIO, message=text)
            self._send_control(ClientAnswer(client=client, answer=failed))

    # What is to be done

    def _run(self, actions: list[Action]) -> None:
        for action in actions:
            match action:
                case Answer(client, answer):
                    self._answer(client, answer)
                case Tell(event):
                    self._send_control(Happened(event=event))
                case Perform(vm, effect):
                    self._perform(vm, effect)
                case Operate(ticket, request):
                    self._operate(ticket, request)
                case List():
                    self._list(action)
                case OpenConsole(ticket, vm):
                    self._open_console(ticket, vm)
                case Drop(boot):
                    Fds((boot.kernel, *boot.initrd)).close()
                case ArmTurn(delay_s):
                    self._turn_timer.arm(self._loop.monotonic_ns() + delay_s * NANOSECONDS)
                case _:
                    assert_never(action)

    def _turn(self) -> None:
        self._run(self._registry.turn())

    def _happened(self, vm_id: int, event: vm_state.Event) -> None:
        self._run(self._registry.report(vm_id, event))
        self._look_if_idle()

    def _perform(
        self,
        vm: Vm,
        effect: vm_state.Launch
        | vm_state.Release
        | vm_state.Kill
        | vm_state.SendStop
        | vm_state.SendPause
        | vm_state.SendUnpause,
    ) -> None:
        match effect:
            case vm_state.Launch():
                # What comes of it is for a registry that has finished this step.
                self._loop.call_soon(lambda: self._launch(vm))
            case vm_state.Release(keeps_tty=keeps_tty):
                if not keeps_tty:
                    self._close_pty(vm.id)
                    self._networks.release(vm.id)
            case vm_state.Kill():
                self._send_vmm(KillVm(id=vm.id))
            case vm_state.SendStop():
                self._tell_vm(vm.id, StopVm())
            case vm_state.SendPause():
                self._tell_vm(vm.id, PauseVm())
            case vm_state.SendUnpause():
                self._tell_vm(vm.id, UnpauseVm())
            case _:
                assert_never(effect)

    def _launch(self, vm: Vm) -> None:
        """Make a VM's interfaces; then go on."""
        if vm.state.phase is not vm_state.Phase.STARTING:  # somebody has thought better of it
            self._happened(vm.id, vm_state.LaunchFailed(ErrorCode.EINTR, "it was stopped"))
            return
        self._networks.attach(vm, lambda found: self._launch_with(vm, found))

    def _launch_with(self, vm: Vm, networks: tuple[Network, ...] | ResourceError) -> None:
        """Open what else a VM needs, and have vmm start its processes."""
        if isinstance(networks, ResourceError):
            self._launch_failed(vm, networks.code, str(networks))
            return
        if vm.state.phase is not vm_state.Phase.STARTING:  # somebody has thought better of it
            self._happened(vm.id, vm_state.LaunchFailed(ErrorCode.EINTR, "it was stopped"))
            return
        try:
            pty = self._pty(vm)
            spec, fds = open_resources(vm, self._host, pty, networks)
        except ResourceError as err:
            self._launch_failed(vm, err.code, str(err))
            return
        except OSError as err:
            self._launch_failed(vm, ErrorCode.EIO, err.strerror or str(err))
            return
        self._launched.add(vm.id)
        if spec.kernel is None:
            self._kernels.expect(vm.id, fds[spec.boot])
        else:
            log.debug("vm %d: unpacked kernel lent", vm.id)
        if not self._send_vmm(LaunchVm(spec=spec), fds):
            self._launched.discard(vm.id)
            self._launch_failed(vm, ErrorCode.EAGAIN, "there is no vmm process")

    def _launch_failed(self, vm: Vm, code: ErrorCode, message: str) -> None:
        log.warning("%s: failed to start vm: %s", vm.name, message)
        self._happened(vm.id, vm_state.LaunchFailed(code, message))

    def _pty(self, vm: Vm) -> Pty:
        pty = self._ptys.get(vm.id)
        if pty is None:
            owner = vm.config.owner
            pty = open_pty(vm.name, owner.uid or 0, owner.gid)
            vm_id = vm.id
            try:
                watch = self._terminals.add(
                    pty.name, lambda: self._tell_vm(vm_id, LookAtTerminal())
                )
            except OSError:
                pty.close()
                raise
            self._ptys[vm_id], self._watches[vm_id] = pty, watch
        return pty

    def _close_pty(self, vm_id: int) -> None:
        pty = self._ptys.pop(vm_id, None)
        if pty:
            self._terminals.remove(self._watches.pop(vm_id))
            pty.close()

    def _open_console(self, ticket: vm_state.Ticket, vm: Vm) -> None:
        theirs, ours = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._tell_vm(vm.id, AttachConsole(), (ours.detach(),))
        opened = ConsoleOpened(serial=ticket.serial, id=vm.id, tty=vm.state.tty)
        self._answer(ticket.client, opened, (theirs.detach(),))

    def _operate(self, ticket: vm_state.Ticket, request: Load | Reload | Reset | Log) -> None:
        errors: tuple[str, ...] = ()
        match request:
            case Load(path=""):
                errors = self.configure()
            case Load(path=path):
                config = self._read(path, is_optional=False, keeps_idle=True)
                if isinstance(config, Config):
                    self._networks.add(config)
                    self._register(config)
                else:
                    errors = config
            case Reload():
                errors = self.configure()
            case Reset(mode=ResetMode.SWITCHES):
                self._networks.forget_switches()
            case Reset(mode=mode):
                if mode is ResetMode.ALL:
                    self._networks.forget_switches()
                self._run(self._registry.remove_all(ticket))
                return
            case Log(level=level):
                self.set_verbosity(level)
            case _:
                assert_never(request)
        answer: AnyAnswer = Done(serial=ticket.serial)
        if errors:
            answer = Failed(
                serial=ticket.serial,
                code=ErrorCode.COMMAND_FAILED,
                message="the configuration has errors",
                lines=tuple(line[:LINE_MAX] for line in errors[:LINES_MAX]),
            )
        self._answer(ticket.client, answer)

    def _list(self, question: List) -> None:
        """Ask the processes of running VMs, and answer when they have, or soon."""
        client = question.ticket.client

        def answer(parts: list[AnyAnswer]) -> None:
            self._questions.discard(asked)
            for part in parts:
                self._answer(client, part)
            self._send_control(Considered(client=client))

        asked = StatusQuestion(self._loop, question, self._inquiries, answer, self._networks.told)
        self._questions.add(asked)
        asked.ask(self._launched)

    # What vmm says

    def _from_vmm(self, received: Received[VmmToParent]) -> None:
        with received.fds as fds:
            self._take_from_vmm(received.message, fds)

    def _take_from_vmm(self, message: VmmToParent, fds: Fds) -> None:
        if message.id not in self._launched:
            log.warning("vmm: speaks of vm %d, which does not run", message.id)
            return
        match message:
            case VmLaunched(id=vm_id, pid=pid):
                self._happened(vm_id, vm_state.Launched(pid, self._ptys[vm_id].name))
            case VmLaunchFailed(id=vm_id, code=code, message=text):
                self._launched.discard(vm_id)
                self._happened(vm_id, vm_state.LaunchFailed(code, text))
            case FromVm(id=vm_id, report=report):
                self._reported(vm_id, report, fds)
            case VmExited():
                self._exited(message)
            case _:
                assert_never(message)

    def _reported(self, vm_id: int, report: VmReport, fds: Fds) -> None:
        match report:
            case VmUnpacked():
                for kernel in fds.take_all():
                    is_kept = self._kernels.keep(vm_id, kernel)
                    log.debug("vm %d: unpacked kernel %s", vm_id, "kept" if is_kept else "refused")
            case VmStarted():
                self._kernels.expect_no_more(vm_id)
                self._happened(vm_id, vm_state.Running())
                vm = self._registry.find(vm_id, "")
                if vm:
                    log.info(
                        "started %s (vm %d) successfully, tty %s", vm.name, vm_id, vm.state.tty
                    )
            case VmPaused():
                self._happened(vm_id, vm_state.Paused())
            case VmUnpaused():
                self._happened(vm_id, vm_state.Unpaused())
            case VmStatistics():
                self._inquiries.told(vm_id, report)
            case _:
                log.debug("vm %d: %s", vm_id, report)

    def _exited(self, message: VmExited) -> None:
        self._launched.discard(message.id)
        self._inquiries.forget(message.id)
        self._kernels.expect_no_more(message.id)
        vm = self._registry.find(message.id, "")
        event = exit_event(message)
        if vm and event.message:
            is_wanted = vm.state.phase is vm_state.Phase.STOPPING
            tell = log.debug if is_wanted else log.warning
            tell("vm/%s: %s", vm.name, event.message)
        self._happened(message.id, event)
