"""The vmm process: it orders VM and device processes from the zygote, and reaps them.

It has no privileges, one thread, and no descriptor of /dev/kvm: the zygote forks for it. There is
one process per VM, one per disk of it, and one per interface that vhost-net does not serve. vmm
passes messages between the parent and VMs, and reports a VM's end when all its processes are
reaped. It decides nothing.

Source: sections 5.3 and 8 of OpenBSD's behaviour.
"""

import os
import signal
import socket
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from types import FrameType
from typing import NamedTuple, assert_never

from vmd.shared import log as logging
from vmd.shared.counters import make_counters
from vmd.shared.vm_devices import DeviceConnection, flattened
from vmd.vmm.blanks import Blank, Blanks, Ended, ForkError
from vmd.wire.blank import Role, SpareCgroup
from vmd.wire.capture import CaptureVm, VmCaptured
from vmd.wire.channel import Channel, ChannelError, Fds, MalformedError, OversizeError, Received
from vmd.wire.device import VMM_AND_DEVICE, BeginDisk, BeginNic, DeviceBegin, VmmToDevice
from vmd.wire.internal import (
    VMM_AND_VM,
    AskStatistics,
    AttachConsole,
    Begin,
    ConnectVm,
    DebugVm,
    EndHung,
    EndReason,
    FromVm,
    KillVm,
    LaunchVm,
    LookAtTerminal,
    ParentToVmm,
    PauseVm,
    SetVerbosity,
    ToVm,
    UnpauseVm,
    VmCommand,
    VmEnding,
    VmExited,
    VmHalted,
    VmHeld,
    VmLaunched,
    VmLaunchFailed,
    VmmToParent,
    VmmToVm,
    VmPaused,
    VmReport,
    VmSpec,
    VmStarted,
    VmStatistics,
    VmUnpacked,
    VmUnpaused,
)
from vmd.wire.leaving import MIGRATING_MAX, SendVm, VmMigrating, VmSent
from vmd.wire.messages import ErrorCode
from vmd.wire.parts import TEXT_MAX
from vmm_kvm.log import Log
from vmm_kvm.loop import EventLoop, LoopTimer

log = Log(__name__)

_DEVICE_GRACE_NS = 30_000_000_000
"""The time for a device process to write back its data, once its VM is gone."""
_HELD_NS = 10_000_000_000
"""The time for a process to end that was killed; it has much memory to give back."""
_VM_HIGH_WATER = 64 << 10
"""Limit of bytes that wait for a VM process that does not read."""
_ANSWERS: dict[type[VmCommand], type[VmReport]] = {
    PauseVm: VmPaused,
    UnpauseVm: VmUnpaused,
    SendVm: VmSent,
    CaptureVm: VmCaptured,
    AskStatistics: VmStatistics,
}
"""Answers of a VM process to a command, sent once."""
_UNASKED: dict[type[VmReport], int] = {VmStarted: 1, VmUnpacked: 1, VmHalted: 1, VmEnding: 1}
"""Messages that a VM process sends unasked, and how many; one more halt for each unpause."""
_PASSED = {VmUnpacked, VmCaptured}
"""Messages whose descriptors are for the parent."""
_NIC = "nic"  # begins the names of interfaces: a guest survives without


class _Device(NamedTuple):
    name: str
    """For messages."""
    channel: Channel[VmmToDevice, None]
    """The connection to it; it sends nothing that is read."""


class _Vm:
    """vmm's record of a VM until all its processes are reaped."""

    def __init__(self, number: int, name: str, blanks: Blanks, uid: int) -> None:
        self.id = number
        self.name = name
        self.blanks = blanks
        """Makes and ends its processes."""
        self.uid = uid
        self.pid = 0
        """0 until its process exists."""
        self.orders = 0
        """How many of its processes have not been reported yet."""
        self.is_doomed = False
        """Whether its process is to be killed as soon as it exists."""
        self.has_failed = False
        """Whether it was said not to be launched."""
        self.channel: Channel[VmmToVm, VmReport] | None = None
        self.devices: dict[int, _Device] = {}  # those that live, by pid
        self.ending: VmEnding | None = None
        self.expected = Counter[type[VmReport]](_UNASKED)
        self.status: int | None = None
        self.timer: LoopTimer | None = None
        """Kills the devices."""
        self.held: LoopTimer | None = None
        """Tells that what was killed does not end."""
        self._owes_look = False

    def command(self, command: VmCommand, fds: Fds) -> None:
        """Pass on a command; drop an unimportant one if the process does not read.

        Raises:
            ChannelError: the process is gone, or descriptors of the message were lost.
        """
        fds.check()
        if self.channel is None:
            return  # it has ended; the parent is being told
        if self.channel.is_full and isinstance(command, AttachConsole | ConnectVm | DebugVm):
            return  # the stream ends
        if self.channel.is_full and isinstance(command, LookAtTerminal):
            self._owes_look = True
            return
        self.channel.send(command, fds.take_all())
        if answer := _ANSWERS.get(type(command)):
            self.expected[answer] += 1
        if isinstance(command, UnpauseVm):
            self.expected[VmHalted] += 1
        if isinstance(command, SendVm):
            self.expected[VmMigrating] += MIGRATING_MAX

    # A source of its own channel: state that need not be repeated waits until there is room.

    def hold(self, _reason: object) -> None:
        """Do nothing: omitted state is sent when there is room again."""

    def release(self, _reason: object) -> None:
        """Send omitted state, now that there is room."""
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
        blanks: Sequence[Blanks],
    ) -> None:
        """Serve `parent` until it or a zygote is gone; takes over the channel.

        `blanks` has one for each zygote; VMs are spread over them.
        """
        self._loop = loop
        self._parent = parent
        self._blanks = blanks
        self._verbosity = 0
        self._vms: dict[int, _Vm] = {}
        signal.signal(signal.SIGCHLD, self._child_ended)
        for each in blanks:
            each.serve(self._ended, self._end_if_useless)
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

    # Messages of the parent

    def _take(self, received: Received[ParentToVmm]) -> None:
        with received.fds as fds:
            match received.message:
                case LaunchVm(spec=spec):
                    self._launch(spec, fds)
                case SpareCgroup(number=number):
                    self._offer(number, fds)
                case KillVm(id=number, why=why):
                    if why:
                        self._note_crash(number, why)
                    self._kill(number)
                case ToVm(id=number, command=command):
                    self._pass_on(number, command, fds)
                case SetVerbosity(level=level):
                    self._verbosity = level
                    logging.set_verbosity(level)
                    for blanks in self._blanks:
                        blanks.set_verbosity(level)
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
            if device.channel.backlog_size:  # it does not read, and is not waited for
                continue
            try:
                device.channel.send(message)
            except ChannelError as err:  # it has ended
                log.debug("vm/%s/%s: %s", vm.name, device.name, err)

    def _note_crash(self, number: int, why: str) -> None:
        vm = self._vms.get(number)
        if vm is not None and vm.status is None:
            vm.ending = vm.ending or VmEnding(reason=EndReason.CRASHED, message=why)

    def _kill(self, number: int) -> None:
        vm = self._vms.get(number)
        if vm is None or vm.status is not None:
            return
        if not vm.pid:
            vm.is_doomed = True
            return
        vm.blanks.kill(vm.pid, lambda err: self._cannot_kill(vm, vm.pid, err))
        self._expect_end(vm)

    def _expect_end(self, vm: _Vm) -> None:
        if vm.held is None:
            vm.held = self._loop.timer(lambda: self._tell_held(vm))
        vm.held.arm(self._loop.monotonic_ns() + _HELD_NS)

    def _tell_held(self, vm: _Vm) -> None:
        """Say that processes of a VM do not end, unless the zygote that kills them hangs."""
        if vm.blanks.has_orders:
            self._expect_end(vm)
            return
        if vm.has_failed:
            return
        devices = [f"{device.name} (pid {pid})" for pid, device in vm.devices.items()]
        found = devices if vm.status is not None else [f"its own (pid {vm.pid})", *devices]
        text = (
            f"it was killed, and the kernel does not let processes end: {', '.join(found)};"
            " a file system may not answer"
        )
        self._tell(VmHeld(id=vm.id, message=text[:TEXT_MAX]))

    def _cannot_kill(self, vm: _Vm, pid: int, err: ForkError) -> None:
        """Have the parent kill a process of a VM, as the zygote does not."""
        log.warning("vm/%s: pid %d: the parent is to kill it: %s", vm.name, pid, err)
        try:
            pidfd = os.pidfd_open(pid)
        except OSError as failure:
            log.warning("vm/%s: cannot be killed: %s", vm.name, failure.strerror)
            return
        self._tell(EndHung(uid=vm.uid), [pidfd])

    # Starting

    def _launch(self, spec: VmSpec, fds: Fds) -> None:
        if spec.id in self._vms:
            text = "there is a process for it already"
            self._tell(VmLaunchFailed(id=spec.id, code=ErrorCode.EALREADY, message=text))
            return
        try:
            blanks = self._choose()
            is_copy = spec.received is not None and spec.received.is_copy
            blanks.expect_clones(spec.is_template or is_copy)
            for each in self._blanks:  # no later process may join it ahead
                each.withdraw(spec.cgroup_number)
            vm = _Vm(spec.id, spec.name, blanks, blanks.claim())
        except ForkError as err:
            text = f"cannot start its processes: {err}"
            self._tell(VmLaunchFailed(id=spec.id, code=ErrorCode.EAGAIN, message=text))
            return
        self._vms[spec.id] = vm
        vm.orders += 1  # of ours: it is not to be forgotten meanwhile
        try:
            self._start_all(vm, spec, fds)
        except (OSError, ForkError, ChannelError, OversizeError) as err:
            self._fail(vm, err)
        vm.blanks.settle(vm.uid)
        vm.orders -= 1
        self._look_if_gone(vm)

    def _offer(self, number: int, fds: Fds) -> None:
        """Have processes that wait join a control group: where the next VM is likely to start."""
        chosen = self._choose()
        for blanks in self._blanks:
            if blanks is not chosen:
                blanks.withdraw()
        try:
            chosen.offer(number, (fds.take(0), fds.take(1)))
        except ChannelError as err:  # they join when they have a task
            log.debug("control group %d: %s", number, err)

    def _choose(self) -> Blanks:
        """Return those whose zygote has the fewest VMs, of zygotes that answer if one does."""
        counts = Counter(vm.blanks for vm in self._vms.values())
        return min(self._blanks, key=lambda each: (each.is_abandoned, counts[each]))

    def _fail(self, vm: _Vm, err: Exception) -> None:
        """Report once that a VM was not launched; its existing processes end."""
        if vm.has_failed:
            return
        vm.has_failed = True
        code = ErrorCode.EINVAL if isinstance(err, MalformedError) else ErrorCode.EAGAIN
        text = f"cannot start its processes: {err}"
        self._tell(VmLaunchFailed(id=vm.id, code=code, message=text))
        if vm.channel:  # its process ends by that
            vm.channel.close()

    def _start_all(self, vm: _Vm, spec: VmSpec, fds: Fds) -> None:
        """Start the device processes, then the VM's; closes our copies of shared descriptors."""
        fds.check()
        with ExitStack() as stack:
            connections = []
            cgroup = self._device_cgroup(spec, fds, stack)
            level, number = self._verbosity, spec.cgroup_number if cgroup else 0
            for index, disk in enumerate(spec.disks):
                if disk.has_process:
                    begin = BeginDisk(disk=disk, vm=spec.name, verbosity=level, cgroup=number)
                    own = [*map(os.dup, cgroup), *map(fds.take, disk.files)]
                    name = f"disk{index}"
                    connections.append(self._start_device(vm, name, begin, own, stack))
            for index, nic in enumerate(spec.interfaces):
                if nic.has_process:
                    move = BeginNic(nic=nic, vm=spec.name, verbosity=level, cgroup=number)
                    own = [*map(os.dup, cgroup), *map(fds.take, nic.taps)]
                    name = f"{_NIC}{index}"
                    connections.append(self._start_device(vm, name, move, own, stack))
            role = Role.VM if spec.sev is None else Role.ENCRYPTED_VM
            blank = self._blank(vm, role, partial(self._launched, vm))
            vm.channel = Channel(blank.connection, VMM_AND_VM, high_water=_VM_HIGH_WATER)
            passed = [os.dup(fd) for fd in flattened(connections)]
            vm.channel.send(
                Begin(spec=spec, places=tuple(fds.places), verbosity=self._verbosity),
                [*fds.take_all(), *passed],
            )
        self._parent.add_source(vm.channel)
        vm.channel.add_source(vm)
        if blank.pid:
            self._launched(vm, blank.pid)

    @staticmethod
    def _device_cgroup(spec: VmSpec, fds: Fds, stack: ExitStack) -> tuple[int, ...]:
        """Return the descriptor for joining the device processes' control group, if any."""
        if spec.device_cgroup is None:
            return ()
        fd = fds.take(spec.device_cgroup)
        stack.callback(os.close, fd)
        return (fd,)

    def _start_device(
        self,
        vm: _Vm,
        name: str,
        begin: DeviceBegin,
        own: list[int],
        stack: ExitStack,
    ) -> DeviceConnection:
        """Start a device process that owns `own`; returns the VM's ends of its connection."""
        passed = Fds(own)
        stack.callback(passed.close)
        ours, theirs = self._connection(stack)

        def forked(pid: int) -> None:
            vm.devices[pid] = _Device(name, channel)

        role = Role.DISK if isinstance(begin, BeginDisk) else Role.NIC
        blank = self._blank(vm, role, forked)
        channel = Channel(blank.connection, VMM_AND_DEVICE)
        if blank.pid:
            forked(blank.pid)
        channel.send(begin, [*passed.take_all(), *map(os.dup, theirs)])
        return ours

    def _blank(self, vm: _Vm, role: Role, then: Callable[[int], None]) -> Blank:
        """Return a process for a VM; see `Blanks.take`."""

        def forked(pid: int) -> None:
            vm.orders -= 1
            then(pid)

        def failed(err: ForkError) -> None:
            vm.orders -= 1
            self._fail(vm, err)
            self._look_if_gone(vm)

        blank = vm.blanks.take(role, vm.uid, forked, failed)
        if not blank.pid:
            vm.orders += 1
        return blank

    def _launched(self, vm: _Vm, pid: int) -> None:
        """Report that a VM's process exists, and read from it."""
        vm.pid = pid
        if not vm.has_failed:
            self._tell(VmLaunched(id=vm.id, pid=vm.pid))
        if vm.is_doomed or vm.has_failed:
            self._kill(vm.id)
        if vm.channel and not vm.channel.is_closed:
            vm.channel.watch(
                self._loop,
                lambda received: self._report(vm.id, received),
                lambda err: self._vm_silent(vm.id, err),
            )

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

    # Messages of VM processes

    def _report(self, number: int, received: Received[VmReport]) -> None:
        vm = self._vms[number]
        kind = type(received.message)
        with received.fds as fds:
            if not vm.expected[kind]:
                # A flooding process is not read any more.
                log.warning("vm/%s: says %s unasked: killed", vm.name, kind.__name__)
                if vm.channel:
                    vm.channel.hold(vm)
                self._kill(number)
                return
            vm.expected[kind] -= 1
            if isinstance(received.message, VmEnding):
                vm.ending = received.message
            else:
                passed = fds.take_all() if kind in _PASSED else ()
                self._tell(FromVm(id=number, report=received.message), passed)

    def _vm_silent(self, number: int, err: ChannelError) -> None:
        """A VM's channel has ended: its process will end too."""
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
            self._ended(pid, os.waitstatus_to_exitcode(waited))

    def _ended(self, pid: int, status: int) -> None:
        """Account for a process that was reaped."""
        owner = next((each for each in self._blanks if each.knows(pid)), None)
        for blanks in self._blanks if owner is None else (owner,):
            if blanks.ended(pid, status) is Ended.ZYGOTE and not blanks.is_abandoned:
                log.error("the zygote has ended, status %d", status)
                self._loop.stop()
        for vm in tuple(self._vms.values()):
            if pid == vm.pid and vm.status is None:
                self._vm_ended(vm, status)
            elif pid in vm.devices:
                device = vm.devices.pop(pid)
                device.channel.close()
                self._device_ended(vm, device.name, status)
            else:
                continue
            self._look_if_gone(vm)

    def _look_if_gone(self, vm: _Vm) -> None:
        if not vm.devices and not vm.orders and (vm.status is not None or not vm.pid):
            self._forget(vm)

    def _end_if_useless(self) -> None:
        """End when no VM is left and none can be started: another vmm can."""
        if all(each.is_abandoned for each in self._blanks) and not self._vms:
            self._loop.stop()

    def _vm_ended(self, vm: _Vm, status: int) -> None:
        vm.status = status
        if vm.held:
            vm.held.cancel()
        if vm.channel:
            self._drain(vm.channel, vm)
            vm.channel.close()
            vm.channel = None
        if vm.devices:
            vm.timer = self._loop.timer(lambda: self._kill_devices(vm))
            vm.timer.arm(self._loop.monotonic_ns() + _DEVICE_GRACE_NS)

    @staticmethod
    def _drain(channel: Channel[VmmToVm, VmReport], vm: _Vm) -> None:
        """Read a VM process's remaining messages, for its reason to end."""
        try:
            while True:
                received = channel.receive()
                received.fds.close()
                if isinstance(received.message, VmEnding):
                    vm.ending = vm.ending or received.message
        except (BlockingIOError, ChannelError):
            return

    def _device_ended(self, vm: _Vm, device: str, status: int) -> None:
        if status == 0:
            return
        how = f"was killed by signal {-status}" if status < 0 else f"failed with status {status}"
        log.warning("vm/%s/%s: its process %s", vm.name, device, how)
        if vm.status is None and not vm.has_failed and not device.startswith(_NIC):
            # A guest without its disk is useless, and must not believe that its writes arrived.
            self._note_crash(vm.id, f"{device}: its process {how}")
            self._kill(vm.id)

    def _kill_devices(self, vm: _Vm) -> None:
        for pid, device in vm.devices.items():
            log.warning("vm/%s/%s: its process does not end: killed", vm.name, device.name)
            vm.blanks.kill(pid, partial(self._cannot_kill, vm, pid))
        self._expect_end(vm)

    def _forget(self, vm: _Vm) -> None:
        del self._vms[vm.id]
        vm.blanks.release(vm.uid)
        for timer in (vm.timer, vm.held):
            if timer:
                timer.cancel()
        if vm.status is not None and not vm.has_failed:
            self._tell(VmExited(id=vm.id, pid=vm.pid, status=vm.status, ending=vm.ending))
        self._end_if_useless()
