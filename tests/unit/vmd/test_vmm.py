"""The vmm process with a real zygote, whose children only talk like VMs and devices."""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Iterator
from contextlib import suppress

import pytest

from tests.unit.vmd.far import Far, run_until
from vmd.config.disks import DiskKind, DiskOption
from vmd.config.model import InterfaceConfig
from vmd.vmm.blanks import Blanks
from vmd.vmm.process import Vmm
from vmd.wire.blank import Preparation, Role
from vmd.wire.channel import Channel, ChannelError
from vmd.wire.device import DEVICE_AND_VMM, DeviceBegin
from vmd.wire.forking import VMM_AND_ZYGOTE, ZYGOTE_AND_VMM
from vmd.wire.internal import (
    PARENT_AND_VMM,
    VM_AND_VMM,
    VMM_AND_PARENT,
    AskStatistics,
    AttachConsole,
    Begin,
    DiskSpec,
    EndReason,
    FromVm,
    KillVm,
    LaunchVm,
    LookAtTerminal,
    NicSpec,
    ParentToVmm,
    PauseVm,
    SetVerbosity,
    StopVm,
    ToVm,
    UnpauseVm,
    VmEnding,
    VmExited,
    VmLaunched,
    VmLaunchFailed,
    VmmToParent,
    VmPaused,
    VmSpec,
    VmStarted,
    VmStatistics,
    VmUnpaused,
)
from vmd.wire.messages import ErrorCode
from vmd.wire.parts import Statistics
from vmd.zygote import process as zygote
from vmm_kvm.loop import EventLoop

INTERFACE = InterfaceConfig(lladdr="fe:e1:bb:d1:00:01")
FLOOD, CRASH, DEAF = "flood", "crash", "deaf"  # names of VMs, by their behaviour


def _prepare(_preparation: Preparation) -> None:
    """Prepare nothing."""


def _be_vm(connection: socket.socket) -> int:
    """Be a VM's process, which obeys, or does as its name says."""
    with Channel(connection, VM_AND_VMM) as vmm:
        begin, fds, _size = vmm.wait()
        assert isinstance(begin, Begin)
        fds.close()
        vmm.send(VmStarted())
        name = begin.spec.name
        if name == CRASH:
            return 7
        if name == FLOOD:
            vmm.send(VmStarted())
        if name == DEAF:
            signal.pause()
        while True:
            try:
                command, fds, _size = vmm.wait()
            except ChannelError:
                return 0
            fds.close()
            match command:
                case PauseVm():
                    vmm.send(VmPaused())
                case UnpauseVm():
                    vmm.send(VmUnpaused())
                case AskStatistics():
                    told = VmStatistics(statistics=Statistics(), memory_used=len(begin.places))
                    vmm.send(told)
                case StopVm():
                    vmm.send(VmEnding(reason=EndReason.STOPPED))
                    return 0


def _be_device(connection: socket.socket) -> int:
    """Be a device's process, which ends with its VM, or as its name says."""
    with Channel(connection, DEVICE_AND_VMM) as vmm:
        begin, fds, _size = vmm.wait()
        assert isinstance(begin, DeviceBegin)
        *own, sock, status = fds.take_all()
        assert len(own) >= 1
        if begin.device == CRASH:
            return 3
        os.write(status, b"\0")
        socket.socket(fileno=sock).recv(1)
        return 0


def _serve(connection: socket.socket) -> None:
    status = 1
    with suppress(BaseException):
        bodies = dict.fromkeys(Role, zygote.Body(_prepare, _be_device))
        bodies[Role.VM] = zygote.Body(_prepare, _be_vm)
        zygote.serve(Channel(connection, ZYGOTE_AND_VMM), bodies)
        status = 0
    os._exit(status)


class Rig:
    """A vmm process's work; the test is the parent."""

    def __init__(self, loop: EventLoop, orders: socket.socket, zygote_pid: int) -> None:
        self.loop = loop
        self.zygote = zygote_pid
        self.parent: Far[ParentToVmm, VmmToParent] = Far(loop, PARENT_AND_VMM)
        self.channel = Channel(self.parent.near, VMM_AND_PARENT)
        self.blanks = Blanks(
            loop, Channel(orders, VMM_AND_ZYGOTE, asks_pids=True), zygote_pid, (), rehearses=False
        )
        Vmm(loop, self.channel, [self.blanks])

    def launch(self, name: str, *disks: str, nics: int = 0, count: int = 4) -> None:
        """Have VM 1 launched, with `count` descriptors."""
        spec = VmSpec(
            id=1,
            name=name,
            memory=1 << 20,
            cpus=1,
            boot=0,
            boot_path="boot",
            tty=1,
            ring=2,
            disks=tuple(
                DiskSpec(option=DiskOption(DiskKind.RAW, disk), chain=(3,), formats=(DiskKind.RAW,))
                for disk in disks
            ),
            interfaces=(NicSpec(name="tap0", config=INTERFACE, taps=(4,)),) * nics,
        )
        self.parent.say(LaunchVm(spec=spec), [os.open(os.devnull, os.O_RDWR) for _ in range(count)])

    def run_vm(self, name: str = "one", *disks: str, nics: int = 0) -> int:
        """Launch VM 1; returns the pid of its process, which runs."""
        self.launch(name, *disks, nics=nics, count=4 + nics)
        launched = self.parent.wait(VmLaunched)
        self.parent.wait(FromVm)
        return launched.pid

    def tell(
        self, *commands: PauseVm | UnpauseVm | StopVm | AskStatistics | LookAtTerminal
    ) -> None:
        """Send a message to VM 1."""
        for command in commands:
            self.parent.say(ToVm(id=1, command=command))

    def reports(self) -> list[str]:
        """Return the kinds of VM 1's messages."""
        return [type(one.report).__name__ for one in self.parent.of(FromVm)]

    def close(self) -> None:
        """Close everything."""
        self.parent.channel.close()
        self.loop.run()
        self.blanks.close()
        self.channel.close()
        self.parent.close()


@pytest.fixture
def rig() -> Iterator[Rig]:
    """Return a vmm without VMs; its processes are gone at the end."""
    before = signal.getsignal(signal.SIGCHLD)
    here, there = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    pid = os.fork()
    if pid == 0:
        here.close()
        _serve(there)
    there.close()
    with EventLoop() as loop:
        made = Rig(loop, here, pid)
        yield made
        made.close()
        signal.signal(signal.SIGCHLD, before)
        with suppress(ChildProcessError):
            while True:
                os.wait()


def test_a_vm_from_its_launch_to_its_end(rig: Rig) -> None:
    """Messages reach the VM, its messages come back; its end has its last message."""
    pid = rig.run_vm()
    rig.parent.say(SetVerbosity(level=1))
    rig.tell(PauseVm(), UnpauseVm(), AskStatistics(), LookAtTerminal())
    run_until(rig.loop, lambda: len(rig.reports()) == 4)
    assert rig.reports() == ["VmStarted", "VmPaused", "VmUnpaused", "VmStatistics"]
    report = rig.parent.of(FromVm)[-1].report
    assert isinstance(report, VmStatistics)
    assert report.memory_used == 4  # descriptors that came with it
    rig.tell(StopVm())
    exited = rig.parent.wait(VmExited)
    assert exited == VmExited(id=1, pid=pid, status=0, ending=VmEnding(reason=EndReason.STOPPED))
    rig.tell(PauseVm())  # there is no receiver
    rig.parent.say(KillVm(id=1))
    rig.launch("one")  # its id is free
    assert rig.parent.wait(VmLaunched, 2).pid != pid


def test_devices_have_processes(rig: Rig) -> None:
    """A VM's devices have processes; they end with it, and it is gone only when they are."""
    pid = rig.run_vm("one", "disk.img", nics=1)
    rig.parent.say(SetVerbosity(level=0))
    rig.parent.say(KillVm(id=1))
    assert rig.parent.wait(VmExited) == VmExited(id=1, pid=pid, status=-signal.SIGKILL)
    assert os.waitpid(-1, os.WNOHANG) == (0, 0)  # only the zygote is left, and lives
    with pytest.raises(ChildProcessError):
        os.waitpid(pid, os.WNOHANG)


def test_a_vm_whose_disk_has_crashed(rig: Rig) -> None:
    """A VM whose disk has crashed is ended: its writes would be lost. With an interface it runs."""
    rig.launch("one", CRASH)
    ending = rig.parent.wait(VmExited).ending
    assert ending is not None
    assert ending.reason is EndReason.CRASHED
    assert ending.message == "disk0: its process failed with status 3"


def test_a_vm_that_crashes(rig: Rig) -> None:
    """A crashed VM is reported with its status, without a last message."""
    rig.launch(CRASH)
    exited = rig.parent.wait(VmExited)
    assert (exited.status, exited.ending) == (7, None)


def test_a_vm_that_says_what_it_was_not_asked(rig: Rig) -> None:
    """A VM that sends an unexpected message is killed."""
    rig.launch(FLOOD)
    assert rig.parent.wait(VmExited).status == -signal.SIGKILL
    assert rig.reports() == ["VmStarted"]


def test_a_vm_that_does_not_read(rig: Rig) -> None:
    """Repeatable messages are not queued for a VM that does not read; it can be killed."""
    rig.run_vm(DEAF)
    for _ in range(20_000):
        rig.tell(LookAtTerminal())
    rig.parent.say(ToVm(id=1, command=AttachConsole()), [os.open(os.devnull, os.O_RDWR)])
    rig.parent.say(KillVm(id=1))
    assert rig.parent.wait(VmExited).status == -signal.SIGKILL


def test_what_cannot_be_launched(rig: Rig) -> None:
    """With a missing descriptor, or an id in use, the launch fails with one line."""
    rig.launch("one", "disk.img", count=3)
    failed = rig.parent.wait(VmLaunchFailed)
    assert failed.code is ErrorCode.EINVAL
    assert failed.message == "cannot start its processes: descriptor 3 of 3 is missing"
    rig.run_vm()
    rig.launch("two")
    assert rig.parent.wait(VmLaunchFailed, 2).code is ErrorCode.EALREADY


def test_without_a_zygote_vmm_ends(rig: Rig) -> None:
    """Without a zygote vmm ends; the VMs' channels close, and the daemon starts another."""
    rig.run_vm()
    os.kill(rig.zygote, signal.SIGKILL)
    rig.loop.run()
    rig.parent.say(KillVm(id=1))
    rig.launch("two")
