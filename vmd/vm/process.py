"""A VM's process: the machine, its console, and the channel to vmm; nothing else.

The zygote forks it; it confines itself and waits to be told what VM it is. Then it builds the
machine from open descriptors, and runs it until the guest ends, somebody stops it, or vmm is gone.
A reboot ends it too: the parent starts another, with the same console.

Source: sections 5.3, 7.6 and 8.3 of OpenBSD's behaviour.
"""

import os
import signal
import socket
import time
from collections.abc import Mapping
from contextlib import ExitStack
from typing import assert_never

from vmd.config.disks import DiskKind
from vmd.confine.confinements import CONFINEMENTS, Kind
from vmd.confine.sandbox import confine, die_with, set_title
from vmd.shared import log as logging
from vmd.shared.counters import Counters
from vmd.shared.kernels import LentKernel
from vmd.shared.vm_devices import Connections, DeviceConnection
from vmd.vm.console import Console
from vmd.vm.shutdown import Shutdown
from vmd.wire.channel import Channel, ChannelError, Fds, Received
from vmd.wire.internal import (
    TEXT_MAX,
    VM_AND_VMM,
    AskStatistics,
    AttachConsole,
    Begin,
    DiskSpec,
    EndReason,
    LookAtTerminal,
    NicSpec,
    PauseVm,
    SetLinks,
    SetVerbosity,
    StopVm,
    UnpauseVm,
    VmEnding,
    VmHalted,
    VmmToVm,
    VmPaused,
    VmReport,
    VmSpec,
    VmStarted,
    VmStatistics,
    VmUnpacked,
    VmUnpaused,
)
from vmd.wire.messages import ErrorCode
from vmd.wire.parts import Exits, Moved, Statistics
from vmm_kvm.arch.x86.bios import FirmwareImage
from vmm_kvm.arch.x86.boot_config import BootDevice
from vmm_kvm.arch.x86.image import probe_image, read_firmware
from vmm_kvm.bits import MIB
from vmm_kvm.block.image import Format
from vmm_kvm.block.mapped import MappedImage
from vmm_kvm.boot.nvram import Variables
from vmm_kvm.boot.source import FileSource
from vmm_kvm.clock import NANOSECONDS
from vmm_kvm.errors import (
    BootError,
    HaltError,
    ImageError,
    Refusal,
    RefusedError,
    SpecError,
    VmmError,
)
from vmm_kvm.images.opening import open_image
from vmm_kvm.kvm.system import Kvm
from vmm_kvm.kvm.vcpu import install_kick_signal
from vmm_kvm.log import Log
from vmm_kvm.loop import EventLoop
from vmm_kvm.machine.machine import Machine
from vmm_kvm.machine.net import NetSpec
from vmm_kvm.machine.spec import (
    BASIC_DEVICES,
    Crash,
    DebugExitStatus,
    Ending,
    MachineSpec,
    Outcome,
    TripleFault,
    nets_of,
)
from vmm_kvm.net.ethernet import parse_lladdr
from vmm_kvm.net.paths import Path, RemotePath, StreamPath, Traffic, VhostPath
from vmm_kvm.primitives import Vmm
from vmm_kvm.virtio.pmem import PmemSpec
from vmm_kvm.virtio.scsi import ScsiCdSpec
from vmm_kvm.virtio.vhost_user.blk import RemoteBlkSpec

log = Log(__name__)

_READY = b"\0"
_STATUS_MAX = 4096
_REHEARSAL_ROM = 4096  # bytes of firmware that never runs
_RETRY_NS = NANOSECONDS
_IGNORED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)


def prepare(kvm: Kvm, rehearses: bool) -> str | None:
    """Confine this process, which is to be a VM's; returns why it cannot rehearse.

    One that `rehearses` has the time to make and forget a machine while it waits: afterwards, few
    of the pages that it needs are still the zygote's.
    """
    for number in _IGNORED:  # vmm ends us
        signal.signal(number, signal.SIG_IGN)
    install_kick_signal()
    set_title("vm")
    die_with(os.getppid())  # nobody could stop us without vmm
    confine(CONFINEMENTS[Kind.VM], None)
    if rehearses:
        try:
            rehearse(kvm)
        except Exception as err:  # noqa: BLE001 - the process of a real VM tells its own errors
            return f"{type(err).__name__}: {err}"
    return None


def run(kvm: Kvm, connection: socket.socket) -> int:
    """Be the process of one VM; returns the exit status. Takes over what it is given."""
    with Channel(connection, VM_AND_VMM) as channel, kvm:
        be_vm(kvm, channel)
    return 0


def be_vm(kvm: Kvm, channel: Channel[VmReport, VmmToVm]) -> None:
    """Wait to be told what VM this is, and be it to its end; takes over the channel."""
    with ExitStack() as stack:
        stack.callback(channel.close)
        begun = _wait(channel)
        if begun is None:
            return
        spec, fds, connections = begun
        logging.set_title(f"vm/{spec.name}")
        set_title(f"vm/{spec.name}")
        vmm = stack.enter_context(Vmm(kvm))
        loop = stack.enter_context(EventLoop())
        logging.follow(loop)
        stack.callback(logging.follow, None)
        stack.callback(channel.close)  # before the loop, which it leaves
        console = Console(loop, *(fds.take(at) for at in (spec.tty, spec.ring)))
        stack.callback(console.close)
        try:
            machine = _machine_spec(spec, fds, connections, channel, stack)
            disks = {
                index: Counters(each.counters)
                for index, each in enumerate(connections.disks)
                if each
            }
            process = VmProcess(loop, channel, console, vmm, machine, disks=disks)
        except (VmmError, OSError) as err:
            log.warning("%s", err)
            text = str(err)[:TEXT_MAX]
            _tell(channel, VmEnding(reason=EndReason.FAILED, code=_error_code(err), message=text))
            return
        process.run()


def rehearse(kvm: Kvm) -> None:
    """Make a small machine and forget it, so that what that needs is at hand the next time.

    Raises:
        VmmError, OSError: none can be made.
    """
    spec = MachineSpec(
        image=FirmwareImage("rehearsal", bytes(_REHEARSAL_ROM), _REHEARSAL_ROM), memory_size=MIB
    )
    with Vmm(kvm) as vmm, EventLoop() as loop:
        Machine(
            spec,
            vmm,
            loop,
            transmit=lambda _data: None,
            on_receive_room=lambda: None,
            on_outcome=lambda _outcome: None,
        ).close()


def _wait(
    channel: Channel[VmReport, VmmToVm],
) -> tuple[VmSpec, Fds, Connections] | None:
    """Return what VM this is to be, its descriptors, and its connections to device processes.

    None if nobody needs this process any more.
    """
    try:
        message, fds, _size = channel.wait()
    except ChannelError as err:
        log.debug("vmm: %s", err)
        return None
    if not isinstance(message, Begin):
        log.error("%s for no VM", type(message).__name__)
        fds.close()
        return None
    logging.set_verbosity(message.verbosity)
    passed = fds.take_all()
    count = len(message.places)
    named = Fds(passed[:count])
    named.spread(message.places)
    return message.spec, named, Connections.from_fds(message.spec, passed[count:])


def _machine_spec(
    spec: VmSpec,
    fds: Fds,
    connections: Connections,
    channel: Channel[VmReport, VmmToVm],
    stack: ExitStack,
) -> MachineSpec:
    kernel = None if spec.kernel is None else FileSource(fds.take(spec.kernel), spec.boot_path)
    read = read_firmware if spec.is_firmware else probe_image
    image = read(FileSource(fds.take(spec.boot), spec.boot_path))
    variables = None
    if spec.variables is not None:
        file = open_image(fds.take(spec.variables), Format.RAW, read_only=False, name="nvram")
        variables = stack.enter_context(Variables.of(file))
    cdroms = []
    if spec.cdrom is not None:
        cdrom = open_image(fds.take(spec.cdrom), Format.RAW, read_only=True, name="cdrom")
        stack.callback(cdrom.close)
        cdroms.append(ScsiCdSpec(cdrom))
    disks = tuple(
        _disk(disk, fds, connection, stack)
        for connection, disk in zip(connections.disks, spec.disks, strict=True)
    )
    nets = tuple(
        NetSpec(
            parse_lladdr(nic.lladdr),
            _path(nic, fds, connection),
            nic.name,
            nic.mtu,
            nic.config.is_locked,
            nic.is_up,
        )
        for connection, nic in zip(connections.nics, spec.interfaces, strict=True)
    )
    return MachineSpec(
        image=image,
        kernels=LentKernel(kernel, lambda fd: _tell(channel, VmUnpacked(), fd)),
        variables=variables,
        memory_size=spec.memory,
        cpus=spec.cpus,
        devices=(*BASIC_DEVICES, *nets, *disks, *cdroms),
        boot_device=BootDevice(spec.boot_device.value),
        name=spec.name,
        command_line=spec.append,
        initrd=tuple(FileSource(fds.take(at), "initrd") for at in spec.initrd),
    )


def _disk(
    disk: DiskSpec, fds: Fds, connection: DeviceConnection | None, stack: ExitStack
) -> RemoteBlkSpec | PmemSpec:
    """Return who serves a disk: a process of ours, somebody else's, or this one's memory."""
    path = disk.option.path
    if connection is not None:
        return RemoteBlkSpec(_Connection(connection, path).connect, path, may_halt=True)
    fd = fds.take(disk.chain[0])
    if disk.option.kind is DiskKind.PMEM:
        image = MappedImage(path, is_private=disk.option.is_private, fd=fd)
        return PmemSpec(stack.enter_context(image), path)
    return RemoteBlkSpec(lambda: socket.socket(fileno=fd), path)


def _path(nic: NicSpec, fds: Fds, connection: DeviceConnection | None) -> Path:
    """Return who moves the frames of an interface; the process owns the descriptors to its end."""
    if connection is not None:
        return RemotePath(_Connection(connection, nic.name).connect, is_ours=True)
    taps = tuple(fds.take(at) for at in nic.taps)
    if nic.vhosts:
        return VhostPath(taps, tuple(fds.take(at) for at in nic.vhosts))
    if nic.stream is None:
        raise SpecError(f"{nic.name}: an interface without tap and stream")
    return StreamPath(fds.take(nic.stream), Traffic())


class _Connection:
    """A device process's connection, for the one machine that this process makes."""

    def __init__(self, connection: DeviceConnection, path: str) -> None:
        self._socket, self._status = connection.socket, connection.status
        self._path = path

    def connect(self) -> socket.socket:
        """Wait until the device process is ready.

        Raises:
            ImageError: it cannot open what it serves; the text is its own.
        """
        with open(self._status, "rb", buffering=0) as status:  # noqa: PTH123 - a descriptor
            told = status.read(_STATUS_MAX)
        if told != _READY:
            text = told.decode(errors="replace")
            raise ImageError(text or f"{self._path}: its process has crashed")
        return socket.socket(fileno=self._socket)


def _error_code(err: Exception) -> ErrorCode:
    match err:
        case ImageError():
            return ErrorCode.DISK_MISSING
        case BootError() | RefusedError(refusal=Refusal.EINVAL):
            return ErrorCode.EINVAL
        case MemoryError() | RefusedError(refusal=Refusal.ENOMEM):
            return ErrorCode.ENOMEM
    return ErrorCode.EIO


def _tell(channel: Channel[VmReport, VmmToVm], report: VmReport, *fds: int) -> None:
    try:
        channel.send(report, fds)
        channel.flush()
    except ChannelError as err:  # vmm is gone, and so shall we
        log.debug("vmm: %s", err)


class VmProcess:
    """A VM from its first instruction to its end, on the event loop's thread."""

    def __init__(
        self,
        loop: EventLoop,
        channel: Channel[VmReport, VmmToVm],
        console: Console,
        vmm: Vmm,
        spec: MachineSpec,
        *,
        disks: Mapping[int, Counters],
    ) -> None:
        """Build the machine; everything else stays the caller's.

        Raises:
            VmmError, OSError: it cannot be made.
        """
        self._loop = loop
        self._channel = channel
        self._disks = disks
        paths = (net.path for net in nets_of(spec.devices))
        self._streams = {
            index: path.traffic for index, path in enumerate(paths) if isinstance(path, StreamPath)
        }
        self._outcome: Outcome | None = None
        self._is_paused = False
        self._is_halted = False
        self._retry_timer = loop.timer(self._retry)
        self._machine = Machine(
            spec,
            vmm,
            loop,
            transmit=console.transmit,
            on_receive_room=lambda: loop.call_soon(console.feed),
            on_outcome=lambda outcome: loop.call_soon(lambda: self._ended(outcome)),
            on_halt=lambda err: loop.call_soon(lambda: self._halt(err)),
        )
        self._shutdown = Shutdown(self._machine, loop, loop.stop)
        self._console = console
        console.port = self._machine.uart

    def run(self) -> None:
        """Run the guest to its end, and tell vmm how it ended."""
        self._channel.watch(self._loop, self._take, lambda _: self._loop.stop())
        self._machine.start()
        _tell(self._channel, VmStarted())
        self._loop.run()
        self._machine.close()
        self._console.port = None
        if self._outcome or self._shutdown.has_begun:
            _tell(self._channel, _ending(self._outcome, self._shutdown))

    def _ended(self, outcome: Outcome) -> None:
        self._outcome = outcome
        self._loop.stop()

    # What vmm says

    def _take(self, received: Received[VmmToVm]) -> None:
        with received.fds as fds:
            match received.message:
                case PauseVm():
                    self._pause()
                case UnpauseVm():
                    self._unpause()
                case StopVm(timeout_s=seconds):
                    timeout_ns = None if seconds is None else seconds * NANOSECONDS
                    self._shutdown.begin(timeout_ns)
                    if self._is_halted:
                        self._retry()
                case AttachConsole(position=position):
                    self._attach(fds, position)
                case SetLinks(are_up=are_up):
                    for index, is_up in enumerate(are_up):
                        self._machine.set_link(index, is_up=is_up)
                case LookAtTerminal():
                    self._console.look_at_terminal()
                case AskStatistics():
                    _tell(self._channel, self._statistics())
                case SetVerbosity(level=level):
                    logging.set_verbosity(level)
                case Begin():
                    log.error("told again what VM this is")
                case _:
                    assert_never(received.message)

    def _attach(self, fds: Fds, position: int) -> None:
        try:
            self._console.attach(socket.socket(fileno=fds.take(0)), position)
        except ChannelError as err:  # who wanted to see the console finds its end
            log.warning("console: %s", err)

    def _pause(self) -> None:
        if not self._is_paused:
            self._is_paused = True
            self._machine.pause()
        _tell(self._channel, VmPaused())

    def _unpause(self) -> None:
        self._resume()
        _tell(self._channel, VmUnpaused())

    def _resume(self) -> None:
        self._is_halted = False
        if self._is_paused:
            self._is_paused = False
            self._machine.resume()

    def _halt(self, err: HaltError) -> None:
        """Stand still: a request of a disk waits for the host.

        A guest that is to stop gets no further, and nobody can let it go on: that is tried again
        and again, until its time is over.
        """
        if self._is_halted:
            return
        self._is_halted = True
        if not self._is_paused:
            self._is_paused = True
            self._machine.pause()
        if self._shutdown.has_begun:
            self._retry_timer.arm(self._loop.monotonic_ns() + _RETRY_NS)
        else:
            _tell(self._channel, VmHalted(reason=err.reason, message=str(err)[:TEXT_MAX]))

    def _retry(self) -> None:
        if self._is_halted:
            self._resume()

    def _statistics(self) -> VmStatistics:
        disks = tuple(
            Moved(index=index, to_guest=disk.read, from_guest=disk.written)
            for index, disk in self._disks.items()
        )
        streams = tuple(
            Moved(index=index, to_guest=stream.received, from_guest=stream.sent)
            for index, stream in self._streams.items()
        )
        return VmStatistics(
            statistics=Statistics(
                cpu_ns=time.process_time_ns(),
                disk_read=sum(disk.to_guest for disk in disks),
                disk_written=sum(disk.from_guest for disk in disks),
                net_received=sum(stream.to_guest for stream in streams),
                net_sent=sum(stream.from_guest for stream in streams),
                disks=disks,
                streams=streams,
                exits=tuple(
                    Exits(reason=reason, count=count)
                    for reason, count in self._machine.exit_counts().items()
                ),
            ),
            memory_used=self._machine.info().used_size,
        )


def _ending(outcome: Outcome | None, shutdown: Shutdown) -> VmEnding:
    if shutdown.has_begun:
        if shutdown.is_over and outcome is None:
            text = "the guest did not stop in time"
            return VmEnding(reason=EndReason.OVERDUE, message=text)
        return VmEnding(reason=EndReason.STOPPED)
    match outcome:
        case Ending.REBOOT:
            return VmEnding(reason=EndReason.REBOOT)
        case TripleFault(message):
            return VmEnding(reason=EndReason.REBOOT, message=message)
        case Crash(message):
            return VmEnding(reason=EndReason.CRASHED, message=message)
        case DebugExitStatus(value):
            return VmEnding(reason=EndReason.POWER_OFF, message=f"debug exit {value:#x}")
        case Ending.POWER_OFF | None:
            return VmEnding(reason=EndReason.POWER_OFF)
        case _:
            assert_never(outcome)
