"""The vmm process: a zygote that forks VM and device processes, and knows when they are gone.

It has no privileges, one thread, and the descriptor of /dev/kvm; everything that a VM process may
import is imported before it starts. It starts one process per VM, one per disk of it, and one per
interface that vhost-net does not serve; passes on what the parent and a VM say to each other; and
tells of a VM's end when all its processes are reaped. It decides nothing.

While nothing starts, it keeps one VM process ready, confined and rehearsed, which is told by a
message what VM it is: what a fork, its page faults and the sandbox cost is spent before a start.

Source: sections 5.3, 7.6 and 8.4 of OpenBSD's behaviour.
"""

import os
import signal
import socket
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from types import FrameType
from typing import NamedTuple, assert_never

from vmd import log as logging
from vmd.channel import Channel, ChannelError, Fds, MalformedError, Received, channel_pair
from vmd.counters import make_counters
from vmd.internal import (
    VM_AND_VMM,
    VMM_AND_VM,
    Begin,
    DiskSpec,
    EndReason,
    Exited,
    FromVm,
    Kill,
    Launch,
    Launched,
    LaunchFailed,
    NicSpec,
    ParentToVmm,
    SetVerbosity,
    ToVm,
    VmCommand,
    VmEnding,
    VmmToParent,
    VmmToVm,
    VmReport,
    VmSpec,
)
from vmd.messages import ErrorCode
from vmd.privsep import close_all_but
from vmd.vm_devices import DeviceConnection, flattened
from vmm_kvm.errors import VmmError
from vmm_kvm.log import Log
from vmm_kvm.loop import EventLoop, LoopTimer

log = Log(__name__)

_DEVICE_GRACE_NS = 30_000_000_000
"""How long a device process may write back what it holds, once its VM is gone."""
_NIC = "nic"  # begins the names of interfaces: a guest lives on without
_SPARE_DELAY_NS = 1_000_000_000
"""How long nothing has to start until a VM process is made ready: guests that boot need the
processors more."""


class Bodies(NamedTuple):
    """What the processes do that are forked here; each returns the exit status."""

    vm: Callable[[Channel[VmReport, VmmToVm], int, bool], int]
    """With the descriptor of /dev/kvm, which it owns, and whether it has the time to rehearse."""
    disk: Callable[[DiskSpec, str, Fds, DeviceConnection], int]
    """With the VM's name; of the connection it has the other ends."""
    nic: Callable[[NicSpec, str, Fds, DeviceConnection], int]
    """The same."""


class _VmProcess(NamedTuple):
    """A process that is a VM, or will be; whoever holds this owns the channel."""

    pid: int
    channel: Channel[VmmToVm, VmReport]


class _Vm:
    """What vmm knows of one VM until all its processes are reaped."""

    __slots__ = ("channel", "devices", "ending", "is_killed", "name", "pid", "status", "timer")

    def __init__(self, name: str) -> None:
        self.name = name
        self.pid = 0
        self.channel: Channel[VmmToVm, VmReport] | None = None
        self.devices: dict[int, str] = {}  # processes that live, and what to call them
        self.ending: VmEnding | None = None
        self.status: int | None = None
        self.is_killed = False
        self.timer: LoopTimer | None = None


class Vmm:
    """The vmm process's work, on the event loop's thread."""

    def __init__(
        self,
        loop: EventLoop,
        parent: Channel[VmmToParent, ParentToVmm],
        kvm_fd: int,
        bodies: Bodies,
    ) -> None:
        """Serve `parent` until it is gone; takes ownership of the descriptors."""
        self._loop = loop
        self._parent = parent
        self._kvm_fd = kvm_fd
        self._bodies = bodies
        self._vms: dict[int, _Vm] = {}
        self._spare: _VmProcess | None = None
        self._spare_timer = loop.timer(self._make_spare)
        self._plan_spare()
        signal.signal(signal.SIGCHLD, self._child_ended)
        parent.watch(loop, self._take, lambda _: self._parent_left())

    def _parent_left(self) -> None:
        """End: VM processes notice that their channel has closed."""
        for vm in self._vms.values():
            if vm.channel:
                vm.channel.close()
        self._drop_spare()
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
                case Launch(spec=spec):
                    self._launch(spec, fds)
                case Kill(id=number):
                    self._kill(number)
                case ToVm(id=number, command=command):
                    self._pass_on(number, command, fds)
                case SetVerbosity(level=level):
                    logging.set_verbosity(level)
                    if self._spare:
                        self._drop_spare()
                        self._plan_spare()
                    for number in self._vms:
                        self._pass_on(number, received.message, fds)
                case _:
                    assert_never(received.message)

    def _pass_on(self, number: int, command: VmCommand, fds: Fds) -> None:
        vm = self._vms.get(number)
        if vm is None or vm.channel is None:
            return  # it has ended; the parent is being told
        try:
            vm.channel.send(command, fds.take_all())
        except ChannelError as err:
            log.debug("vm/%s: %s", vm.name, err)

    def _kill(self, number: int) -> None:
        vm = self._vms.get(number)
        if vm and vm.status is None:
            vm.is_killed = True
            os.kill(vm.pid, signal.SIGKILL)

    # Starting

    def _launch(self, spec: VmSpec, fds: Fds) -> None:
        if spec.id in self._vms:
            self._fail(spec, ErrorCode.EALREADY, "there is a process for it already")
            return
        vm = _Vm(spec.name)
        self._vms[spec.id] = vm
        try:
            self._fork_all(vm, spec, fds)
        except (OSError, ChannelError) as err:
            code = ErrorCode.EINVAL if isinstance(err, MalformedError) else ErrorCode.EAGAIN
            self._fail(spec, code, f"cannot start its processes: {err}")
            if not vm.devices:
                del self._vms[spec.id]
            return
        self._plan_spare()
        self._tell(Launched(id=spec.id, pid=vm.pid))

    def _fail(self, spec: VmSpec, code: ErrorCode, message: str) -> None:
        self._tell(LaunchFailed(id=spec.id, code=code, message=message))

    def _fork_all(self, vm: _Vm, spec: VmSpec, fds: Fds) -> None:
        """Start the device processes, then the VM's; what they share is closed here."""
        with ExitStack() as stack:
            connections = []
            for index, disk in enumerate(spec.disks):
                if not disk.has_process:
                    continue
                chain = stack.enter_context(Fds([fds.take(at) for at in disk.chain]))
                body = partial(self._bodies.disk, disk, spec.name, chain)
                connections.append(self._start_device(vm, f"disk{index}", chain, body, stack))
            for index, nic in enumerate(spec.interfaces):
                if nic.has_process:
                    taps = stack.enter_context(Fds([fds.take(at) for at in nic.taps]))
                    serve = partial(self._bodies.nic, nic, spec.name, taps)
                    connections.append(self._start_device(vm, f"{_NIC}{index}", taps, serve, stack))
            vm.pid, vm.channel = self._vm_process()
            begin = Begin(spec=spec, places=tuple(fds.places))
            passed = [os.dup(fd) for fd in flattened(connections)]
            vm.channel.send(begin, [*fds.take_all(), *passed])
        vm.channel.watch(
            self._loop,
            lambda received: self._report(spec.id, received),
            lambda err: self._vm_silent(spec.id, err),
        )

    def _vm_process(self) -> _VmProcess:
        """Return a process that waits for its `Begin`: the one that is ready, or a new one."""
        spare, self._spare = self._spare, None
        return spare or self._fork_vm(rehearses=False)

    def _fork_vm(self, *, rehearses: bool) -> _VmProcess:
        here, there = channel_pair(VMM_AND_VM, VM_AND_VMM)
        with there:
            try:
                pid = self._fork(
                    "vm",
                    partial(self._bodies.vm, there, self._kvm_fd, rehearses),
                    (there.fileno(), self._kvm_fd),
                )
            except OSError:
                here.close()
                raise
        return _VmProcess(pid, here)

    def _plan_spare(self) -> None:
        if self._spare is None:
            self._spare_timer.arm(self._loop.monotonic_ns() + _SPARE_DELAY_NS)

    def _make_spare(self) -> None:
        try:
            self._spare = self._fork_vm(rehearses=True)
        except OSError as err:
            log.debug("no VM process ready: %s", err.strerror)

    def _drop_spare(self) -> None:
        """End the process that is ready, which has nothing to lose."""
        self._spare_timer.cancel()
        if self._spare:
            os.kill(self._spare.pid, signal.SIGKILL)
            os.waitpid(self._spare.pid, 0)
            self._forget_spare()

    def _forget_spare(self) -> None:
        if self._spare:
            self._spare.channel.close()
            self._spare = None

    def _start_device(
        self,
        vm: _Vm,
        name: str,
        fds: Fds,
        body: Callable[[DeviceConnection], int],
        stack: ExitStack,
    ) -> DeviceConnection:
        """Start a device process that has `fds`; returns the VM's ends of its connection."""
        ours, theirs = self._connection(stack)
        pid = self._fork(f"vm/{vm.name}/{name}", partial(body, theirs), (*fds.left, *theirs))
        vm.devices[pid] = name
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
            DeviceConnection(ours, read_fd, counters),
            DeviceConnection(theirs, write_fd, counters),
        )

    def _fork(self, title: str, body: Callable[[], int], kept: tuple[int, ...]) -> int:
        """Fork a process that has no descriptors but `kept`, the log's, and the standard ones."""
        before = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        try:
            pid = os.fork()
            if pid == 0:
                self._live(title, body, kept)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        return pid

    @staticmethod
    def _live(title: str, body: Callable[[], int], kept: tuple[int, ...]) -> None:
        """Be the new process; never returns."""
        status = 1
        try:
            logging.set_title(title)
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            close_all_but(set(kept))
            signal.pthread_sigmask(signal.SIG_SETMASK, ())
            status = body()
        except (VmmError, OSError) as err:
            log.warning("%s", err)
        except BaseException:
            log.exception("bug")
        finally:
            os._exit(status)

    # What VM processes say

    def _report(self, number: int, received: Received[VmReport]) -> None:
        vm = self._vms[number]
        with received.fds as fds:
            if isinstance(received.message, VmEnding):
                vm.ending = vm.ending or received.message
            else:
                self._tell(FromVm(id=number, report=received.message), fds.take_all())

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
            if self._spare and pid == self._spare.pid:
                log.warning("the VM process that was ready has ended, status %d", status)
                self._forget_spare()
            for number, vm in tuple(self._vms.items()):
                if pid == vm.pid and vm.status is None:
                    self._vm_ended(vm, status)
                elif pid in vm.devices:
                    self._device_ended(number, vm, vm.devices.pop(pid), status)
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

    @staticmethod
    def _kill_devices(vm: _Vm) -> None:
        for pid, device in vm.devices.items():
            log.warning("vm/%s/%s: its process does not end: killed", vm.name, device)
            os.kill(pid, signal.SIGKILL)

    def _forget(self, number: int, vm: _Vm) -> None:
        del self._vms[number]
        if vm.timer:
            vm.timer.cancel()
        if vm.pid:
            assert vm.status is not None
            self._tell(Exited(id=number, pid=vm.pid, status=vm.status, ending=vm.ending))
