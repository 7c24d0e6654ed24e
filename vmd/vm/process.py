"""A VM's process: the machine, its console, and the channel to vmm; nothing else.

The zygote forks it; it confines itself and waits for its VM. Then it builds the machine from open
descriptors, and runs it until the guest ends, a client stops it, or vmm is gone.
A reboot ends it too: the parent starts another, with the same console.

Source: sections 5.3, 7.6 and 8.3 of OpenBSD's behaviour.
"""

import os
import signal
import socket
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import assert_never

from vmd.config.model import GuestClock
from vmd.confine.confinements import CONFINEMENTS, Kind
from vmd.confine.sandbox import Confinement, confine, die_with, set_title
from vmd.shared import log as logging
from vmd.shared.counters import Counters
from vmd.shared.privsep import join_ahead, join_cgroup
from vmd.shared.vm_devices import Connections
from vmd.vm.capturing import Capturing
from vmd.vm.console import Console
from vmd.vm.machine_spec import has_servers, machine_spec_of
from vmd.vm.reasons import ending, error_code, send_code, why_not_sent
from vmd.vm.receiving import Arrived, own_cpuid, receive, tell_sender
from vmd.vm.rehearsing import rehearse
from vmd.vm.sending import Sending, check_handover
from vmd.vm.shutdown import Shutdown
from vmd.vm.statistics import statistics_of
from vmd.wire.blank import JoinCgroup, Preparation
from vmd.wire.capture import CaptureVm, VmCaptured
from vmd.wire.channel import Channel, ChannelError, Fds, Received
from vmd.wire.internal import (
    VM_AND_VMM,
    AskStatistics,
    AttachConsole,
    Begin,
    ConnectVm,
    DebugVm,
    EndReason,
    LookAtTerminal,
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
    VmUnpacked,
    VmUnpaused,
)
from vmd.wire.leaving import CancelSendVm, SendVm, VmMigrating, VmSent
from vmd.wire.messages import ErrorCode
from vmd.wire.parcels import opened
from vmd.wire.parts import TEXT_MAX
from vmm_kvm.arch.x86.kvm_state import ClockPolicy
from vmm_kvm.clock import NANOSECONDS
from vmm_kvm.errors import (
    HaltError,
    HaltReason,
    SnapshotError,
    VmmError,
)
from vmm_kvm.gdb.server import GdbServer
from vmm_kvm.kvm.system import Kvm
from vmm_kvm.kvm.vcpu import install_kick_signal
from vmm_kvm.libc import LIBC_WITHOUT_ERRNO
from vmm_kvm.log import Log
from vmm_kvm.loop import EventLoop
from vmm_kvm.machine.machine import Machine
from vmm_kvm.machine.spec import (
    Crash,
    MachineSpec,
    Outcome,
    nets_of,
)
from vmm_kvm.machine.state import restore
from vmm_kvm.net.host_stream import HostStream
from vmm_kvm.net.paths import StreamPath
from vmm_kvm.primitives import Vmm
from vmm_kvm.snapshot.generations import Generation, check_generations
from vmm_kvm.snapshot.handover import RUNNING, InDoubtError, failed

log = Log(__name__)

_RETRY_NS = NANOSECONDS
_POLICIES = {GuestClock.FROZEN: ClockPolicy.FROZEN, GuestClock.NOW: ClockPolicy.NOW}
_IGNORED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)


def prepare(
    kvm: Kvm, preparation: Preparation, confinement: Confinement = CONFINEMENTS[Kind.VM]
) -> str | None:
    """Confine this process, a future VM's; returns the reason why it cannot rehearse, if any."""
    for number in _IGNORED:  # vmm ends us
        signal.signal(number, signal.SIG_IGN)
    install_kick_signal()
    set_title("vm")
    die_with(os.getppid())  # without vmm nothing could stop us
    confine(confinement, None)
    if preparation in {Preparation.REHEARSED, Preparation.CLONE}:
        try:
            rehearse(kvm, is_clone=preparation is Preparation.CLONE)
            kvm.make_ready()
        except Exception as err:  # noqa: BLE001 - the process of a real VM tells its own errors
            return f"{type(err).__name__}: {err}"
    return None


def run(kvm: Kvm, connection: socket.socket) -> int:
    """Run the process of one VM; returns the exit status. Takes over its arguments."""
    with Channel(connection, VM_AND_VMM) as channel, kvm:
        be_vm(kvm, channel)
    return 0


def be_vm(kvm: Kvm, channel: Channel[VmReport, VmmToVm]) -> None:
    """Wait for a VM, and run it to its end; takes over the channel."""
    with ExitStack() as stack:
        stack.callback(channel.close)
        begun = _wait(channel)
        if begun is None:
            return
        spec, fds, connections, joined = begun
        logging.set_title(f"vm/{spec.name}")
        set_title(f"vm/{spec.name}")
        vmm = stack.enter_context(Vmm(kvm))
        loop = stack.enter_context(EventLoop())
        logging.follow(loop)
        stack.callback(logging.follow, None)
        stack.callback(channel.close)  # before the loop, which it leaves
        console = Console(loop, *(fds.take(at) for at in (spec.tty, spec.ring)))
        stack.callback(console.close)
        received = None
        try:
            if spec.cgroup is not None and spec.cgroup_number != joined:
                join_cgroup(fds.take(spec.cgroup))  # before there is memory of the guest's
            if spec.received is not None:
                stream, said = fds.take(spec.received.stream), spec.received.replies
                ram = spec.received.memory
                ram_fd = None if ram is None else stack.enter_context(_owned(fds.take(ram)))
                is_private = not (spec.is_template or has_servers(spec))
                received = receive(
                    stream,
                    spec,
                    kvm,
                    is_private=is_private,
                    ram_fd=ram_fd,
                    replies_fd=None if said is None else fds.take(said),
                )
                stack.callback(received.memory.close)
            machine = machine_spec_of(
                spec,
                fds,
                connections,
                stack,
                received=received,
                lend=lambda fd: _tell(channel, VmUnpacked(), fd),
            )
            disks = {
                index: Counters(each.counters)
                for index, each in enumerate(connections.disks)
                if each
            }
            process = VmProcess(
                loop, channel, console, vmm, machine, spec=spec, received=received, disks=disks
            )
        except (VmmError, OSError) as err:
            log.warning("%s", err)
            text = str(err)[:TEXT_MAX]
            if received:
                tell_sender(received, failed(text))
            _tell(channel, VmEnding(reason=EndReason.FAILED, code=error_code(err), message=text))
            return
        del machine  # and with it a copy of its firmware: the machine has its own
        process.run()


def _wait(
    channel: Channel[VmReport, VmmToVm],
) -> tuple[VmSpec, Fds, Connections, int] | None:
    """Return the VM's specification, its descriptors, and its connections to device processes.

    The last is the number of the control group that this process has joined ahead. None if this
    process is not needed any more.
    """
    joined = 0
    try:
        message, fds, _size = channel.wait()
        while isinstance(message, JoinCgroup):
            joined = join_ahead(message, fds)
            message, fds, _size = channel.wait()
    except ChannelError as err:
        log.debug("vmm: %s", err)
        return None
    if not isinstance(message, Begin):
        log.error("%s for no VM", type(message).__name__)
        fds.close()
        return None
    logging.set_verbosity(message.verbosity)
    try:
        passed = opened(fds.take_all())
    except OSError as err:
        log.error("descriptors: %s", err.strerror)  # noqa: TRY400 - the host's doing
        return None
    count = len(message.places)
    named = Fds(passed[:count])
    named.spread(message.places)
    return message.spec, named, Connections.from_fds(message.spec, passed[count:]), joined


@contextmanager
def _owned(fd: int) -> Iterator[int]:
    try:
        yield fd
    finally:
        os.close(fd)


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
        machine_spec: MachineSpec,
        *,
        spec: VmSpec,
        received: Arrived | None,
        disks: Mapping[int, Counters],
    ) -> None:
        """Build the machine; everything else stays the caller's.

        `received` is the state from which it continues, if it does not boot.

        Raises:
            VmmError, OSError: it cannot be made.
        """
        self._loop = loop
        self._channel = channel
        self._disks = disks
        paths = (net.path for net in nets_of(machine_spec.devices))
        self._streams = {
            index: path.traffic for index, path in enumerate(paths) if isinstance(path, StreamPath)
        }
        self._outcome: Outcome | None = None
        self._is_paused = False
        self._is_halted = False
        self._retry_timer = loop.timer(self._retry)
        self._spec = spec
        self._kvm = vmm.kvm
        self._sending: Sending | Capturing | None = None
        self._sent_keeps_running = False
        self._is_sent = False
        self._is_in_doubt = False
        self._when_not_sent: list[Callable[[], None]] = []
        self._received = received
        self._machine = Machine(
            machine_spec,
            vmm,
            loop,
            transmit=console.transmit,
            on_receive_room=lambda: loop.call_soon(console.feed),
            on_outcome=lambda outcome: loop.call_soon(lambda: self._ended(outcome)),
            on_halt=lambda err: loop.call_soon(lambda: self._halt(err)),
            is_restored=received is not None,
            memory=received.memory if received else None,
        )
        if measured := self._machine.measurement:
            log.info("measurement 0x%s", measured.hmac.hex())
            log.info("nonce 0x%s", measured.nonce.hex())
        if received:
            try:
                going_on = spec.received
                assert going_on
                images = (disk.option.path for disk in spec.disks)
                found = self._generations(are_found=True)
                check_generations(images, received.generations, found)
                policy = _POLICIES[going_on.clock]
                restore(self._machine, received.state, policy)
                self._machine.become_another(is_copy=going_on.is_copy)
            except BaseException:
                self._machine.close()
                raise
        ended = Crash(f"{spec.name}: a debugger ended it")
        self._gdb = GdbServer(loop, lambda: self._ended(ended))
        self._gdb.attach(self._machine)
        self._shutdown = Shutdown(self._machine, loop, loop.stop)
        self._console = console
        console.port = self._machine.uart

    def run(self) -> None:
        """Run the guest to its end, and tell vmm how it ended."""
        self._channel.watch(self._loop, self._take, lambda _: self._loop.stop())
        self._machine.start()
        if self._spec.received is not None:
            self._is_paused = self._spec.received.stays_paused
            if self._received:
                tell_sender(self._received, RUNNING)
            if not self._is_paused:
                self._machine.resume()
        _tell(self._channel, VmStarted())
        LIBC_WITHOUT_ERRNO.malloc_trim(0)  # nothing needs the firmware's copy any more
        self._loop.run()
        if self._sending:
            self._sending.abandon()
        self._gdb.close()
        self._machine.close()
        self._console.port = None
        if self._is_sent:
            _tell(self._channel, VmEnding(reason=EndReason.SENT))
        elif self._outcome or self._shutdown.has_begun:
            has_timed_out = self._machine.has_timed_out
            _tell(self._channel, ending(self._outcome, self._shutdown, has_timed_out))

    def _ended(self, outcome: Outcome) -> None:
        self._outcome = outcome
        if self._sending and self._sending.is_written:
            return  # it ends when the file is durable
        if self._sending:  # it has been paused since, but may have ended just before
            self._sending.cancel()
        else:
            self._loop.stop()

    # Messages of vmm

    def _take(self, received: Received[VmmToVm]) -> None:
        with received.fds as fds:
            match received.message:
                case PauseVm():
                    self._pause()
                case UnpauseVm(force=force):
                    self._unpause(force=force)
                case SendVm():
                    self._send(received.message, fds)
                case CaptureVm():
                    self._capture()
                case CancelSendVm():
                    if self._sending:
                        self._sending.cancel()
                case StopVm(timeout_s=seconds):
                    self._stop(None if seconds is None else seconds * NANOSECONDS)
                case AttachConsole(position=position):
                    self._attach(fds, position)
                case ConnectVm(port=port):
                    self._connect(fds, port)
                case DebugVm():
                    self._debug(fds)
                case SetLinks(are_up=are_up):
                    for index, is_up in enumerate(are_up):
                        self._machine.set_link(index, is_up=is_up)
                case LookAtTerminal():
                    self._console.look_at_terminal()
                case AskStatistics():
                    _tell(self._channel, statistics_of(self._machine, self._disks, self._streams))
                case SetVerbosity(level=level):
                    logging.set_verbosity(level)
                case Begin() | JoinCgroup():
                    log.error("told again what VM this is")
                case _:
                    assert_never(received.message)

    def _attach(self, fds: Fds, position: int) -> None:
        try:
            self._console.attach(socket.socket(fileno=fds.take(0)), position)
        except ChannelError as err:  # who wanted to see the console finds its end
            log.warning("console: %s", err)

    def _connect(self, fds: Fds, port: int) -> None:
        try:
            stream = HostStream(socket.socket(fileno=fds.take(0)))
        except ChannelError as err:  # who wanted to connect finds its end
            log.warning("port %d: %s", port, err)
            return
        if self._machine.vsock:
            self._machine.vsock.connect(stream, port)
        else:
            stream.close()

    def _debug(self, fds: Fds) -> None:
        try:
            stream = socket.socket(fileno=fds.take(0))
        except ChannelError as err:  # the debugger finds its end
            log.warning("debugger: %s", err)
            return
        self._gdb.serve(stream)

    def _stop(self, timeout_ns: int | None) -> None:
        if self._sending and not self._sending.is_written:  # if it is not sent after all
            self._when_not_sent.append(lambda: self._stop(timeout_ns))
            self._sending.cancel()
            return
        self._shutdown.begin(timeout_ns)
        if self._is_halted:
            self._retry()

    def _send(self, command: SendVm, fds: Fds) -> None:
        try:
            if self._sending:
                raise SnapshotError("it is being sent")
            if command.handover is not None:
                check_handover(self._spec)
            sink, *replies = opened(fds.take_all())
            self._sending = Sending(
                self._loop,
                sink,
                self._written,
                self._sent,
                is_snapshot=command.is_snapshot,
                replies_fd=replies[0] if replies else None,
                on_progress=lambda text: _tell(self._channel, VmMigrating(message=text)),
            )
        except (VmmError, OSError, ChannelError) as err:
            _tell(self._channel, VmSent(failure=send_code(err), message=str(err)[:TEXT_MAX]))
            return
        self._sent_keeps_running = command.keeps_running
        cpuid = own_cpuid(self._kvm, self._spec)
        halt = None if self._is_paused else self._machine.pause
        self._sending.begin(
            self._machine, self._spec, command, cpuid, halt=halt, generations=self._generations
        )

    def _written(self) -> None:
        """Go on: of a snapshot, all is written but not yet durable; of a clone, all is copied."""
        assert self._sending
        self._sending.is_still = False
        self._sending.is_written = True
        if not self._is_paused:
            self._machine.resume()

    def _capture(self) -> None:
        if self._sending:
            told = VmCaptured(failure=ErrorCode.EALREADY, message="it is being sent")
            _tell(self._channel, told)
            return
        capturing = Capturing(
            self._loop, lambda failure: self._captured(capturing, failure), self._written
        )
        self._sending = capturing
        halt = None if self._is_paused else self._machine.pause
        capturing.begin(self._machine, self._spec, halt)

    def _captured(self, capturing: Capturing, failure: "VmmError | OSError | None") -> None:
        """Go on when nothing is copied any more."""
        if failure is None:
            fds = capturing.take()
            _tell(self._channel, VmCaptured(), *fds)
        else:
            code, text = why_not_sent(failure)
            _tell(self._channel, VmCaptured(failure=code, message=text))
        self._sending = None
        self._go_on(stood_still=capturing.is_still)

    def _sent(self, failure: "VmmError | OSError | None") -> None:
        """Continue, or end, when writing has ended."""
        stood_still = self._stands_still()
        self._sending = None
        if failure is None and not self._sent_keeps_running:
            self._is_sent = True  # from now on it runs elsewhere
            self._loop.stop()
            return
        if isinstance(failure, InDoubtError):
            self._is_paused = self._is_in_doubt = True
        if failure is None:
            _tell(self._channel, VmSent())
        else:
            code, text = why_not_sent(failure)
            _tell(self._channel, VmSent(failure=code, message=text))
        if self._is_in_doubt:
            self._tell_doubt(str(failure))
        self._go_on(stood_still=stood_still)

    def _go_on(self, *, stood_still: bool) -> None:
        """Return to the state before, when the machine is not needed any more."""
        if stood_still and not self._is_paused:
            self._machine.resume()
        if self._outcome:
            self._loop.stop()
        waiting, self._when_not_sent = self._when_not_sent, []
        for call in waiting:
            call()

    def _generations(self, *, are_found: bool = False) -> dict[int, Generation]:
        """Return the generations of disks as their processes have left, or found, them."""
        return {
            index: Generation(*disk.generation(is_found=are_found))
            for index, disk in self._disks.items()
        }

    def _stands_still(self) -> bool:
        """Tell whether the machine is paused to be sent."""
        return self._sending is not None and self._sending.is_still

    def _pause(self) -> None:
        if not self._is_paused:
            self._is_paused = True
            if not self._stands_still():
                self._machine.pause()
        _tell(self._channel, VmPaused())

    def _tell_doubt(self, text: str) -> None:
        reason = HaltReason.IN_DOUBT
        _tell(self._channel, VmHalted(reason=reason, message=text[:TEXT_MAX]))

    def _unpause(self, *, force: bool) -> None:
        if self._is_in_doubt:
            try:
                if not force:
                    raise SnapshotError("it may run on another host")
                self._machine.lend_disks(is_lent=False)
            except VmmError as err:
                self._tell_doubt(str(err))
                return
            self._is_in_doubt = False
        self._resume()
        _tell(self._channel, VmUnpaused())

    def _resume(self) -> None:
        self._is_halted = False
        if self._is_paused:
            self._is_paused = False
            if not self._stands_still():
                self._machine.resume()

    def _halt(self, err: HaltError) -> None:
        """Pause: a request of a disk waits for the host.

        A guest that is being stopped cannot proceed, nor be unpaused: the request is tried again
        and again, until its time is over.
        """
        if self._sending and not self._sending.is_written:  # what waits for the host would be lost
            self._when_not_sent.append(lambda: self._halt(err))
            self._sending.cancel()
            return
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
