"""The parent: requests go to the registry, files are opened, and vmm makes processes.

The test is the control and vmm processes; networks, consoles and files are the real ones.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from tests.unit.vmd.far import Far, run_until
from vmd.children import opener_plan, share_plan
from vmd.config.host import SystemHost
from vmd.confine.confinements import Kind
from vmd.parent.configuration import Settings
from vmd.parent.openers import Openers
from vmd.parent.passt_networks import PasstNetworks
from vmd.parent.process import Parent
from vmd.parent.shares import Shares
from vmd.parent.terminal_watch import TerminalWatch
from vmd.rules.policy import Users
from vmd.wire.channel import Fds
from vmd.wire.internal import (
    CONTROL_AND_PARENT,
    VMM_AND_PARENT,
    AskStatistics,
    AttachConsole,
    ClientAnswer,
    ClientCame,
    ClientGone,
    ClientRequest,
    Considered,
    ControlToParent,
    EndReason,
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
    VmEnding,
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
    AnyAnswer,
    Console,
    ConsoleOpened,
    Done,
    ErrorCode,
    EventKind,
    Failed,
    Load,
    Log,
    ParentRequest,
    Pause,
    Reload,
    Reset,
    ResetMode,
    Start,
    Started,
    Status,
    Stop,
    Terminated,
    Unpause,
    Vms,
    Wait,
)
from vmd.wire.parts import Statistics
from vmm_kvm.loop import EventLoop

PID = 4711
KERNEL = b"no kernel, but a file"


AnyFar = Far[ControlToParent, ParentToControl] | Far[VmmToParent, ParentToVmm]


def vm_block(name: str, *lines: str) -> str:
    """Return a VM of a vm.conf."""
    return "".join(f"{line}\n" for line in (f'vm "{name}" {{', *lines, "}"))


class Rig:
    """A parent with the configuration at `config`, in a directory of its own."""

    def __init__(self, loop: EventLoop, path: Path, listener: socket.socket) -> None:
        self.loop = loop
        self.path = path
        self.config = path / "vm.conf"
        self.kernel = path / "kernel"
        self.kernel.write_bytes(KERNEL)
        self.owners: list[object] = []
        self.terminals = TerminalWatch(loop)
        self.networks = PasstNetworks()
        settings = Settings(
            path=str(self.config),
            macros={},
            is_optional=False,
            users=Users(frozenset({os.geteuid()}), lambda _uid, _gid: False),
            uid=os.geteuid(),
            set_socket_owner=self.owners.append,
            address=listener.getsockname(),
            state=str(path / "state"),
            host=SystemHost("/"),
        )
        openers = Openers(loop, settings.users, opener_plan)
        self.started: list[Kind] = []
        self.hung: list[int] = []
        """Users whose VM processes the parent was asked to kill."""
        self.parent = Parent(
            loop,
            settings,
            self.networks,
            openers,
            self.terminals,
            shares=Shares(lambda order: share_plan(order, is_user=True)),
            start=self.started.append,
            end_hung=lambda _pidfd, uid: self.hung.append(uid),
        )
        self.killed: list[Kind] = []
        self.control: Far[ControlToParent, ParentToControl] = Far(loop, CONTROL_AND_PARENT)
        self.vmm: Far[VmmToParent, ParentToVmm] = Far(loop, VMM_AND_PARENT)
        self._listener = listener
        self._serial = 0
        self.start(Kind.CONTROL, self.control)
        self.start(Kind.VMM, self.vmm)
        self.connect(1)

    def start(
        self, kind: Kind, far: Far[ControlToParent, ParentToControl] | Far[VmmToParent, ParentToVmm]
    ) -> None:
        """Start a process of this kind."""
        self.parent.peers[kind].started(far.near, lambda: self.killed.append(kind))

    def connect(self, client: int) -> None:
        """Let a client connect."""
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as connection:
            connection.connect(self._listener.getsockname())
            accepted = self._listener.accept()[0].detach()
        self.control.say(ClientCame(client=client), (accepted,))

    def configure(self, text: str) -> tuple[str, ...]:
        """Write a configuration, and have it read; returns its errors."""
        self.config.write_text(text)
        return self.parent.configure()

    def request(self, request: ParentRequest, fds: Sequence[int] = (), client: int = 1) -> None:
        """Send a request as a client."""
        self.control.say(ClientRequest(client=client, request=request), fds)

    def answers(self) -> list[AnyAnswer]:
        """Return the answers to clients."""
        return [one.answer for one in self.control.of(ClientAnswer)]

    def ask(self, request: ParentRequest, fds: Sequence[int] = ()) -> AnyAnswer:
        """Send a request; returns the answer."""
        before = len(self.answers())
        self.request(request, fds)
        run_until(self.loop, lambda: len(self.answers()) > before)
        return self.answers()[before]

    def error(self, request: ParentRequest, fds: Sequence[int] = ()) -> str:
        """Send a request that fails; returns the error."""
        answer = self.ask(request, fds)
        assert isinstance(answer, Failed)
        return answer.message

    def say(self, report: VmReport, fds: Sequence[int] = ()) -> None:
        """Send a message as VM 1's process."""
        self.vmm.say(FromVm(id=1, report=report), fds)

    def launch(self, count: int = 1) -> LaunchVm:
        """Be a vmm that launches a VM, which runs; returns the order."""
        launch = self.vmm.wait(LaunchVm, count)
        self.vmm.say(VmLaunched(id=launch.spec.id, pid=PID))
        self.vmm.say(FromVm(id=launch.spec.id, report=VmStarted()))
        return launch

    def commands(self) -> list[VmCommand]:
        """Return the messages to VM processes."""
        return [one.command for one in self.vmm.of(ToVm)]

    def told(self, command: type[VmCommand], count: int = 1) -> None:
        """Run until VM processes have got a message so often."""
        run_until(
            self.loop, lambda: sum(isinstance(one, command) for one in self.commands()) >= count
        )

    def events(self) -> list[EventKind]:
        """Return the events for listeners."""
        return [one.event.kind for one in self.control.of(Happened)]

    def run_vm(self) -> None:
        """Let the VM of the configuration run."""
        assert self.configure(vm_block("one", f'boot "{self.kernel}"')) == ()
        self.launch()
        run_until(self.loop, lambda: EventKind.STARTED in self.events())

    def close(self) -> None:
        """Close everything."""
        self.parent.close()
        self.networks.close()
        self.terminals.close()
        self.control.close()
        self.vmm.close()  # which had the last descriptor of each stream
        for pid in tuple(self.networks.pids):
            os.waitpid(pid, 0)
            self.networks.reaped(pid, 0)


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[Rig]:
    """Return a parent without VMs."""
    with (
        EventLoop() as loop,
        TemporaryDirectory(prefix="vmd-") as directory,
        socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener,
    ):
        listener.bind(f"{directory}/s")
        listener.listen()
        made = Rig(loop, tmp_path, listener)
        yield made
        made.close()


def _contents(fds: Fds, index: int | None) -> bytes:
    assert index is not None
    fd = fds.take(index)
    try:
        return os.pread(fd, 64, 0)
    finally:
        os.close(fd)


def test_a_vm_is_started(rig: Rig) -> None:
    """A VM's files are opened, its process made; the answer comes when the guest runs."""
    assert rig.configure(vm_block("one", "disable", f'boot "{rig.kernel}"')) == ()
    rig.request(Start(name="one", serial=7))
    launch = rig.launch()
    assert (launch.spec.name, launch.spec.id, launch.spec.cpus) == ("one", 1, 1)
    assert _contents(rig.vmm.fds_of(launch), launch.spec.boot) == KERNEL
    run_until(rig.loop, lambda: len(rig.answers()) == 1)
    (started,) = rig.answers()
    assert isinstance(started, Started)
    assert (started.serial, started.id, started.pid) == (7, 1, PID)
    assert Path(started.tty).is_char_device()
    assert rig.control.wait(Considered).client == 1


def test_requests_of_a_vm_that_runs(rig: Rig) -> None:
    """Pause, unpause, console and stop reach its process, and are answered at its report."""
    rig.run_vm()
    rig.request(Pause(name="one", serial=2))
    rig.told(PauseVm)
    rig.say(VmPaused())
    run_until(rig.loop, lambda: Done(serial=2, id=1) in rig.answers())
    rig.request(Unpause(name="one", serial=3))
    rig.told(UnpauseVm)
    rig.say(VmUnpaused())
    run_until(rig.loop, lambda: Done(serial=3, id=1) in rig.answers())
    opened = rig.ask(Console(name="one", serial=4))
    assert isinstance(opened, ConsoleOpened)
    assert opened.tty.startswith("/dev/pts/")
    rig.told(AttachConsole)
    rig.request(Stop(name="one", wait=True, serial=5))
    rig.told(StopVm)
    rig.vmm.say(VmExited(id=1, pid=PID, status=0, ending=VmEnding(reason=EndReason.STOPPED)))
    run_until(rig.loop, lambda: Terminated(serial=5, id=1) in rig.answers())
    assert rig.events()[-1] is EventKind.STOPPED


def test_a_kernel_that_a_client_passes(rig: Rig) -> None:
    """A passed kernel is booted instead, once; a named one without a descriptor is refused."""
    assert rig.configure(vm_block("one", "disable", f'boot "{rig.kernel}"')) == ()
    other = rig.path / "other"
    other.write_bytes(b"another kernel")
    assert rig.error(Start(name="one", kernel=1)) == "descriptor 1 of 0 is missing"
    start = Start(name="one", kernel=0, initrd=(1,), append="console=ttyS0")
    rig.request(start, [os.open(other, os.O_RDONLY), os.open(rig.kernel, os.O_RDONLY)])
    launch = rig.launch()
    fds = rig.vmm.fds_of(launch)
    assert launch.spec.append == "console=ttyS0"
    assert _contents(fds, launch.spec.boot) == b"another kernel"
    assert [_contents(fds, at) for at in launch.spec.initrd] == [KERNEL]
    rig.vmm.say(VmExited(id=1, pid=PID, status=0, ending=VmEnding(reason=EndReason.POWER_OFF)))
    run_until(rig.loop, lambda: rig.events()[-1] is EventKind.STOPPED)
    rig.request(Start(name="one"))
    launch = rig.vmm.wait(LaunchVm, 2)
    assert _contents(rig.vmm.fds_of(launch), launch.spec.boot) == KERNEL


def test_one_that_cannot_be_launched(rig: Rig) -> None:
    """If a file is missing, or vmm refuses, the request fails with the reason."""
    missing = rig.path / "gone"
    missing.write_bytes(b"")
    assert rig.configure(vm_block("one", "disable", f'boot "{missing}"')) == ()
    missing.unlink()
    expected = f"boot image {missing}: No such file or directory"
    assert rig.error(Start(name="one")) == expected
    missing.write_bytes(KERNEL)
    rig.request(Start(name="one", serial=3))
    rig.vmm.wait(LaunchVm)
    rig.vmm.say(VmLaunchFailed(id=1, code=ErrorCode.EAGAIN, message="no processes left"))
    run_until(rig.loop, lambda: len(rig.answers()) == 2)
    failed = Failed(serial=3, code=ErrorCode.EAGAIN, message="no processes left")
    assert rig.answers()[-1] == failed


def test_without_vmm_nothing_starts(rig: Rig) -> None:
    """VMs end with vmm, and start again with the next one."""
    rig.run_vm()
    rig.request(Wait(name="one", serial=2))
    run_until(rig.loop, lambda: len(rig.control.of(Considered)) == 1)
    rig.parent.peers[Kind.VMM].ended()
    run_until(rig.loop, lambda: Terminated(serial=2, id=1) in rig.answers())
    assert rig.events()[-1] is EventKind.FAILED
    assert rig.error(Start(name="one")) == "there is no vmm process"
    with Far[VmmToParent, ParentToVmm](rig.loop, VMM_AND_PARENT) as far:
        rig.start(Kind.VMM, far)
        rig.request(Start(name="one"))
        assert far.wait(LaunchVm).spec.name == "one"


def test_a_process_that_is_killed_and_one_that_reboots(rig: Rig) -> None:
    """A killed process is a failure, with its signal; a reboot launches again, same console."""
    rig.run_vm()
    ending = VmEnding(reason=EndReason.REBOOT)
    rig.vmm.say(VmExited(id=1, pid=PID, status=0, ending=ending))
    rig.launch(2)
    run_until(rig.loop, lambda: rig.events().count(EventKind.STARTED) == 2)
    rig.vmm.say(VmExited(id=1, pid=PID, status=-11))
    run_until(rig.loop, lambda: rig.events()[-1] is EventKind.FAILED)
    told = rig.control.of(Happened)[-1].event
    assert told.message == "the VM process was killed by signal 11"
    rig.vmm.say(VmExited(id=1, pid=PID, status=0))  # of a VM that vmm does not have
    assert rig.ask(Status(serial=9)).serial == 9


def test_status(rig: Rig) -> None:
    """Running processes are asked for their status; a client that leaves gets no answer."""
    rig.run_vm()
    rig.request(Status(serial=2, statistics=True, interfaces=True))
    rig.told(AskStatistics)
    rig.say(VmStatistics(statistics=Statistics(cpu_ns=5), memory_used=77))
    run_until(rig.loop, lambda: len(rig.answers()) == 1)
    (told,) = rig.answers()
    assert isinstance(told, Vms)
    assert [(vm.name, vm.memory_used, vm.pid) for vm in told.vms] == [("one", 77, PID)]
    rig.connect(2)
    rig.parent.peers[Kind.VMM].set_verbosity(1)
    rig.request(Status(serial=3, statistics=True), client=2)
    rig.control.say(ClientGone(client=2))
    run_until(rig.loop, lambda: rig.control.of(Considered)[-1].client == 2)
    assert len([one for one in rig.control.of(ClientAnswer) if one.client == 2]) <= 1


def test_the_next_control_process_has_no_clients(rig: Rig) -> None:
    """Waiting clients are forgotten, and numbers start again."""
    rig.run_vm()
    rig.request(Wait(name="one", serial=2))
    rig.request(Status(serial=3))
    rig.told(AskStatistics)
    rig.parent.peers[Kind.CONTROL].ended()
    with Far[ControlToParent, ParentToControl](rig.loop, CONTROL_AND_PARENT) as far:
        rig.start(Kind.CONTROL, far)
        rig.control.close()
        rig.control = far
        rig.connect(1)
        rig.request(Pause(name="one", serial=5))
        rig.told(PauseVm)


def test_control_that_says_nonsense_is_killed(rig: Rig) -> None:
    """The control process is killed for a request of a client that has not connected."""
    rig.request(Status(), client=99)
    run_until(rig.loop, lambda: rig.killed == [Kind.CONTROL])


def test_administrators_requests(rig: Rig) -> None:
    """Verbosity goes to every process; files are loaded and read again; mistakes change nothing."""
    assert rig.configure(vm_block("one", "disable", f'boot "{rig.kernel}"')) == ()
    assert rig.ask(Log(level=2, serial=2)) == Done(serial=2)
    assert rig.vmm.wait(SetVerbosity, 2).level == 2
    more = rig.path / "more.conf"
    switch = 'switch "lan" {\n\tinterface bridge0\n}\n'
    more.write_text(switch + vm_block("two", "disable", f'boot "{rig.kernel}"'))
    assert rig.ask(Load(path=str(more), serial=3)) == Done(serial=3)
    more.write_text("nonsense")
    failed = rig.ask(Load(path=str(more), serial=4))
    assert isinstance(failed, Failed)
    assert failed.message == "the configuration has errors"
    assert len(failed.lines) == 1
    told = rig.ask(Status(serial=5))
    assert isinstance(told, Vms)
    assert [vm.name for vm in told.vms] == ["one", "two"]
    assert rig.ask(Reload(serial=6)) == Done(serial=6)
    assert rig.ask(Load(path="", serial=7)) == Done(serial=7)
    assert rig.ask(Reset(mode=ResetMode.SWITCHES, serial=8)) == Done(serial=8)
    assert rig.ask(Reset(serial=9)) == Done(serial=9)
    assert rig.ask(Status(serial=10)) == Vms(serial=10, vms=())


def test_the_end(rig: Rig) -> None:
    """All VMs are killed; the daemon learns when the last is gone."""
    rig.run_vm()
    ends: list[str] = []
    rig.parent.shut_down(lambda: ends.append("idle"))
    assert rig.vmm.wait(KillVm).id == 1
    assert ends == []
    rig.vmm.say(VmExited(id=1, pid=PID, status=-9))
    run_until(rig.loop, lambda: ends == ["idle"])


@pytest.mark.usefixtures("fake_passt")
def test_links_follow_the_configuration(rig: Rig) -> None:
    """A guest learns of a link that goes up or down, and only then."""
    boot = f'boot "{rig.kernel}"'
    assert rig.configure(vm_block("one", boot, "local interface")) == ()
    assert rig.launch().spec.interfaces[0].is_up
    run_until(rig.loop, lambda: EventKind.STARTED in rig.events())
    assert rig.configure(vm_block("one", boot, "local interface")) == ()
    assert rig.configure(vm_block("one", boot, "local interface { down }")) == ()
    rig.told(SetLinks)
    assert [one for one in rig.commands() if isinstance(one, SetLinks)] == [
        SetLinks(are_up=(False,))
    ]


def test_a_terminal_that_is_opened(rig: Rig) -> None:
    """If its terminal is opened, the VM is told to look at it."""
    rig.run_vm()
    opened = rig.ask(Console(name="one"))
    assert isinstance(opened, ConsoleOpened)
    os.close(os.open(opened.tty, os.O_RDWR | os.O_NOCTTY))
    rig.told(LookAtTerminal)


def test_what_a_vm_unpacks_is_kept(rig: Rig) -> None:
    """Only sealed memory is kept, and only before its guest runs; anything else is closed."""
    rig.run_vm()
    read_fd, write_fd = os.pipe()
    rig.say(VmUnpacked(), (write_fd,))
    assert rig.ask(Status(serial=2)).serial == 2
    rig.vmm.close()
    assert os.read(read_fd, 1) == b""
    os.close(read_fd)
