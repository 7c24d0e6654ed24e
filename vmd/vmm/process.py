"""The vmm process: it has VM and device processes made, and knows when they are gone.

It has no privileges, one thread, and no descriptor of /dev/kvm: the zygote forks for it. There is
one process per VM, one per disk of it, and one per interface that vhost-net does not serve. vmm
passes on what the parent and a VM say to each other, and tells of a VM's end when all its processes
are reaped. It decides nothing.

Source: sections 5.3 and 8 of OpenBSD's behaviour.
"""

import os
import signal
import socket
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from types import FrameType
from typing import NamedTuple, assert_never

from vmd.shared import log as logging
from vmd.shared.counters import make_counters
from vmd.shared.vm_devices import DeviceConnection, flattened
from vmd.vmm.blanks import Blanks, Ended, ForkError
from vmd.wire.blank import Role
from vmd.wire.channel import Channel, ChannelError, Fds, MalformedError, OversizeError, Received
from vmd.wire.device import VMM_AND_DEVICE, BeginDisk, BeginNic, DeviceBegin, VmmToDevice
from vmd.wire.internal import (
    VMM_AND_VM,
    AskStatistics,
    AttachConsole,
    Begin,
    EndReason,
    FromVm,
    KillVm,
    LaunchVm,
    LookAtTerminal,
    ParentToVmm,
    PauseVm,
    SendVm,
    SetVerbosity,
    ToVm,
    UnpauseVm,
    VmCommand,
    VmEnding,
    VmExited,
    VmHalted,
    VmLaunched,
    VmLaunchFailed,
    VmmToParent,
    VmmToVm,
    VmPaused,
    VmReport,
    VmSent,
    VmSpec,
    VmStarted,
    VmStatistics,
    VmUnpacked,
    VmUnpaused,
)
from vmd.wire.messages import ErrorCode
from vmm_kvm.log import Log
from vmm_kvm.loop import EventLoop, LoopTimer

log = Log(__name__)

_DEVICE_GRACE_NS = 30_000_000_000
"""How long a device process may write back what it holds, once its VM is gone."""
_VM_HIGH_WATER = 64 << 10
"""Bytes that wait for a VM process that does not read."""
_ANSWERS: dict[type[VmCommand], type[VmReport]] = {
    PauseVm: VmPaused,
    UnpauseVm: VmUnpaused,
    SendVm: VmSent,
    AskStatistics: VmStatistics,
}
"""What a VM process says to a command, once."""
_UNASKED: dict[type[VmReport], int] = {VmStarted: 1, VmUnpacked: 1, VmHalted: 1, VmEnding: 1}
"""What it says without being told to, and how often; that it halts once more for each unpause."""
_NIC = "nic"  # begins the names of interfaces: a guest lives on without


class _Device(NamedTuple):
    name: str
    """For messages."""
    channel: Channel[VmmToDevice, None]
    """To it; it has nothing to say, and nobody reads what it says."""


class _Vm:
    """What vmm knows of one VM until all its processes are reaped."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.pid = 0
        self.channel: Channel[VmmToVm, VmReport] | None = None
        self.devices: dict[int, _Device] = {}  # those that live, by pid
        self.ending: VmEnding | None = None
        self.expected = Counter[type[VmReport]](_UNASKED)
        self.status: int | None = None
        self.timer: LoopTimer | None = None
        self._owes_look = False

    def command(self, command: VmCommand, fds: Fds) -> None:
        """Pass on a command, unless the process does not read and need not have it.

        Raises:
            ChannelError: the process is gone, or descriptors of the message were lost.
        """
        fds.check()
        if self.channel is None:
            return  # it has ended; the parent is being told
        if self.channel.is_full and isinstance(command, AttachConsole):
            return  # the stream ends
        if self.channel.is_full and isinstance(command, LookAtTerminal):
            self._owes_look = True
            return
        self.channel.send(command, fds.take_all())
        if answer := _ANSWERS.get(type(command)):
            self.expected[answer] += 1
        if isinstance(command, UnpauseVm):
            self.expected[VmHalted] += 1

    # A source of its own channel: what need not be told many times waits until there is room.

    def hold(self, _reason: object) -> None:
        """Do nothing: what is left out while the channel is full is found when it is."""

    def release(self, _reason: object) -> None:
        """Tell what was left out."""
        if self._owes_look and self.channel and not self.channel.is_closed:
            self._owes_look = False
            try:
                self.channel.send(LookAtTerminal())
            except ChannelError as err:  # it has ended, which is why there is room
                log.debug("vm/%s: %s", self.name, err)


class Vmm:
    """The vmm process's work, on the event loop's thread."""

    def __init__(
        self,
        loop: EventLoop,
        parent: Channel[VmmToParent, ParentToVmm],
        blanks: Blanks,
    ) -> None:
        """Serve `parent` until it or the zygote is gone; takes over the channel."""
        self._loop = loop
        self._parent = parent
        self._blanks = blanks
        self._verbosity = 0
        self._vms: dict[int, _Vm] = {}
        signal.signal(signal.SIGCHLD, self._child_ended)
        parent.watch(loop, self._take, lambda _: self._parent_left())

    def _parent_left(self) -> None:
        """End: VM processes notice that their channel has closed."""
        for vm in self._vms.values():
            if vm.channel:
                vm.channel.close()
        self._loop.stop()

    def _tell(self, message: VmmToParent, fds: Sequence[int] = ()) -> None:
        try:
            self._parent.send(message, fds)
        except ChannelError as err:
            log.debug("parent: %s", err)
            self._parent_left()

    # What the parent says

    def _take(self, received: Received[ParentToVmm]) -> None:
        with received.fds as fds:
            match received.message:
                case LaunchVm(spec=spec):
                    self._launch(spec, fds)
                case KillVm(id=number):
                    self._kill(number)
                case ToVm(id=number, command=command):
                    self._pass_on(number, command, fds)
                case SetVerbosity(level=level):
                    self._verbosity = level
                    logging.set_verbosity(level)
                    self._blanks.set_verbosity(level)
                    for number, vm in self._vms.items():
                        self._pass_on(number, received.message, fds)
                        self._tell_devices(vm, received.message)
                case _:
                    assert_never(received.message)

    def _pass_on(self, number: int, command: VmCommand, fds: Fds) -> None:
        vm = self._vms.get(number)
        if vm is None:
            return  # likewise
        try:
            vm.command(command, fds)
        except (ChannelError, OversizeError) as err:
            log.warning("vm/%s: %s: %s", vm.name, type(command).__name__, err)

    @staticmethod
    def _tell_devices(vm: _Vm, message: SetVerbosity) -> None:
        for device in vm.devices.values():
            if device.channel.backlog_size:  # it does not read, and nobody waits for it
                continue
            try:
                device.channel.send(message)
            except ChannelError as err:  # it has ended
                log.debug("vm/%s/%s: %s", vm.name, device.name, err)

    def _kill(self, number: int) -> None:
        vm = self._vms.get(number)
        if vm and vm.status is None:
            self._blanks.kill(vm.pid)

    # Starting

    def _launch(self, spec: VmSpec, fds: Fds) -> None:
        if spec.id in self._vms:
            self._fail(spec, ErrorCode.EALREADY, "there is a process for it already")
            return
        vm = _Vm(spec.name)
        self._vms[spec.id] = vm
        try:
            self._start_all(vm, spec, fds)
        except (OSError, ForkError, ChannelError, OversizeError) as err:
            code = ErrorCode.EINVAL if isinstance(err, MalformedError) else ErrorCode.EAGAIN
            self._fail(spec, code, f"cannot start its processes: {err}")
            if not vm.devices:
                del self._vms[spec.id]
            return
        self._tell(VmLaunched(id=spec.id, pid=vm.pid))

    def _fail(self, spec: VmSpec, code: ErrorCode, message: str) -> None:
        self._tell(VmLaunchFailed(id=spec.id, code=code, message=message))

    def _start_all(self, vm: _Vm, spec: VmSpec, fds: Fds) -> None:
        """Start the device processes, then the VM's; what they share is closed here."""
        fds.check()
        with ExitStack() as stack:
            connections = []
            for index, disk in enumerate(spec.disks):
                if disk.has_process:
                    begin = BeginDisk(disk=disk, vm=spec.name, verbosity=self._verbosity)
                    own = [fds.take(at) for at in disk.chain]
                    connections.append(self._start_device(vm, f"disk{index}", begin, own, stack))
            for index, nic in enumerate(spec.interfaces):
                if nic.has_process:
                    move = BeginNic(nic=nic, vm=spec.name, verbosity=self._verbosity)
                    own = [fds.take(at) for at in nic.taps]
                    connections.append(self._start_device(vm, f"{_NIC}{index}", move, own, stack))
            blank = self._blanks.take(Role.VM)
            vm.pid = blank.pid
            vm.channel = Channel(blank.connection, VMM_AND_VM, high_water=_VM_HIGH_WATER)
            passed = [os.dup(fd) for fd in flattened(connections)]
            vm.channel.send(
                Begin(spec=spec, places=tuple(fds.places), verbosity=self._verbosity),
                [*fds.take_all(), *passed],
            )
        self._parent.add_source(vm.channel)
        vm.channel.add_source(vm)
        vm.channel.watch(
            self._loop,
            lambda received: self._report(spec.id, received),
            lambda err: self._vm_silent(spec.id, err),
        )

    def _start_device(
        self, vm: _Vm, name: str, begin: DeviceBegin, own: list[int], stack: ExitStack
    ) -> DeviceConnection:
        """Start a device process that owns `own`; returns the VM's ends of its connection."""
        passed = Fds(own)
        stack.callback(passed.close)
        ours, theirs = self._connection(stack)
        blank = self._blanks.take(Role.DISK if isinstance(begin, BeginDisk) else Role.NIC)
        channel = Channel(blank.connection, VMM_AND_DEVICE)
        vm.devices[blank.pid] = _Device(name, channel)
        channel.send(begin, [*passed.take_all(), *map(os.dup, theirs)])
        return ours

    @staticmethod
    def _connection(stack: ExitStack) -> tuple[DeviceConnection, DeviceConnection]:
        """Make a device's connection: the VM's ends and the other ones; `stack` closes all."""
        one, other = socket.socketpair()
        ours, theirs = one.detach(), other.detach()
        stack.callback(os.close, ours)
        stack.callback(os.close, theirs)
        read_fd, write_fd = os.pipe()
        stack.callback(os.close, read_fd)
        stack.callback(os.close, write_fd)
        counters = make_counters()
        stack.callback(os.close, counters)
        return (
            DeviceConnection(counters, ours, read_fd),
            DeviceConnection(counters, theirs, write_fd),
        )

    # What VM processes say

    def _report(self, number: int, received: Received[VmReport]) -> None:
        vm = self._vms[number]
        kind = type(received.message)
        with received.fds as fds:
            if not vm.expected[kind]:
                # However fast it is, it keeps nobody busy: nothing more is read from it.
                log.warning("vm/%s: says %s unasked: killed", vm.name, kind.__name__)
                if vm.channel:
                    vm.channel.hold(vm)
                self._kill(number)
                return
            vm.expected[kind] -= 1
            if isinstance(received.message, VmEnding):
                vm.ending = received.message
            else:
                passed = fds.take_all() if kind is VmUnpacked else ()
                self._tell(FromVm(id=number, report=received.message), passed)

    def _vm_silent(self, number: int, err: ChannelError) -> None:
        """A VM's channel has ended: so will its process."""
        vm = self._vms[number]
        if isinstance(err, MalformedError):
            log.warning("vm/%s: %s: killed", vm.name, err)
            self._kill(number)

    # Ends

    def _child_ended(self, _number: int, _frame: FrameType | None) -> None:
        self._loop.call_soon(self._reap)

    def _reap(self) -> None:
        while True:
            try:
                pid, waited = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            status = os.waitstatus_to_exitcode(waited)
            if self._blanks.ended(pid, status) is Ended.ZYGOTE:
                log.error("the zygote has ended, status %d", status)
                self._loop.stop()
            for number, vm in tuple(self._vms.items()):
                if pid == vm.pid and vm.status is None:
                    self._vm_ended(vm, status)
                elif pid in vm.devices:
                    device = vm.devices.pop(pid)
                    device.channel.close()
                    self._device_ended(number, vm, device.name, status)
                else:
                    continue
                if not vm.devices and (vm.status is not None or not vm.pid):
                    self._forget(number, vm)

    def _vm_ended(self, vm: _Vm, status: int) -> None:
        vm.status = status
        if vm.channel:
            self._drain(vm.channel, vm)
            vm.channel.close()
            vm.channel = None
        if vm.devices:
            vm.timer = self._loop.timer(lambda: self._kill_devices(vm))
            vm.timer.arm(self._loop.monotonic_ns() + _DEVICE_GRACE_NS)

    @staticmethod
    def _drain(channel: Channel[VmmToVm, VmReport], vm: _Vm) -> None:
        """Read what a VM process said just before it ended, for its last word."""
        try:
            while True:
                received = channel.receive()
                received.fds.close()
                if isinstance(received.message, VmEnding):
                    vm.ending = vm.ending or received.message
        except (BlockingIOError, ChannelError):
            return

    def _device_ended(self, number: int, vm: _Vm, device: str, status: int) -> None:
        if status == 0:
            return
        how = f"was killed by signal {-status}" if status < 0 else f"failed with status {status}"
        log.warning("vm/%s/%s: its process %s", vm.name, device, how)
        if vm.pid and vm.status is None and not device.startswith(_NIC):
            # A guest without its disk is of no use, and must not believe that it wrote.
            vm.ending = vm.ending or VmEnding(
                reason=EndReason.CRASHED, message=f"{device}: its process {how}"
            )
            self._kill(number)

    def _kill_devices(self, vm: _Vm) -> None:
        for pid, device in vm.devices.items():
            log.warning("vm/%s/%s: its process does not end: killed", vm.name, device.name)
            self._blanks.kill(pid)

    def _forget(self, number: int, vm: _Vm) -> None:
        del self._vms[number]
        if vm.timer:
            vm.timer.cancel()
        if vm.pid:
            assert vm.status is not None
            self._tell(VmExited(id=number, pid=vm.pid, status=vm.status, ending=vm.ending))
