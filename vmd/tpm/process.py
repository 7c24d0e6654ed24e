"""The tpm process: it executes swtpm for VMs, and says when one has ended.

It is forked before the parent's filter, which lets no other process of root's daemon execute a
program. Each swtpm is a user of its own, may open no files but those of its state and what a
program needs to start, and can make no sockets. It ends when its VM's process does, which has the
other ends of its channels. One that was executing a command then may not (swtpm 0.7 turns in a loop
for ever), so it is killed.

Source: swtpm(8), landlock(7)
"""

import os
import resource
import select
import signal
from contextlib import nullcontext, suppress
from types import FrameType
from typing import NoReturn

from vmd.confine import landlock
from vmd.confine.confinements import SWTPM_LIMITS
from vmd.confine.sandbox import acting_as, become
from vmd.shared import log as logging
from vmd.shared.privsep import join_cgroup
from vmd.wire.channel import Channel, ChannelError, Fds, Received
from vmd.wire.internal import SetVerbosity
from vmd.wire.tpm import ParentToTpm, StartTpm, TpmEnded, TpmToParent
from vmm_kvm.clock import NANOSECONDS
from vmm_kvm.log import Log
from vmm_kvm.loop import EventLoop, LoopTimer
from vmm_kvm.memfd import make_memory
from vmm_kvm.swtpm import arguments
from vmm_kvm.text import printable

log = Log(__name__)

PROGRAM = "swtpm"
END_S = 5
"""How long a swtpm whose VM has ended may take to end; less than its next user waits."""
_PROGRAMS = ("/usr", "/lib", "/lib64", "/bin", "/etc/ld.so.cache", "/etc/ssl")
"""Files that a program needs to start."""
_SAID_MAX = 4096
_COPY = ".copy"
_NOT_EXECUTED = 127


class _Swtpm:
    """A swtpm that has not been reaped."""

    __slots__ = ("channel", "has_left", "order", "said", "timer")

    def __init__(self, order: StartTpm, channel: int, said: int, timer: LoopTimer) -> None:
        self.order = order
        self.channel = channel
        """Its own end of the channel of control; the kernel tells by it that the VM has ended."""
        self.said = said
        """Memory with its messages."""
        self.timer = timer
        """Kills it, once it has no VM any more."""
        self.has_left = False
        """Whether the VM has ended."""


class Launcher:
    """The process's work, on the event loop's thread."""

    def __init__(self, loop: EventLoop, parent: Channel[TpmToParent, ParentToTpm]) -> None:
        """Serve `parent` until it is gone; takes over the channel."""
        self._loop = loop
        self._parent = parent
        self._running: dict[int, _Swtpm] = {}
        self._waiting: list[tuple[StartTpm, Fds]] = []
        signal.signal(signal.SIGCHLD, self._child_ended)
        parent.watch(loop, self._take, lambda _: self._parent_left())

    def close(self) -> None:
        """Wait until each swtpm has ended, as it does when its VM has; others are killed."""
        for _, fds in self._waiting:
            fds.close()
        self._waiting.clear()
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        signal.signal(signal.SIGALRM, lambda _number, _frame: self._kill_all())
        signal.alarm(END_S)
        while self._running:
            pid, status = os.wait()
            self._ended(pid, os.waitstatus_to_exitcode(status))
        signal.alarm(0)

    def _parent_left(self) -> None:
        self._parent.close()
        self._loop.stop()

    def _tell_end(self, number: int) -> None:
        if self._parent.is_closed:
            return
        try:
            self._parent.send(TpmEnded(number=number))
        except ChannelError as err:
            log.debug("parent: %s", err)

    def _take(self, received: Received[ParentToTpm]) -> None:
        message = received.message
        if isinstance(message, SetVerbosity):
            received.fds.close()
            logging.set_verbosity(message.level)
            return
        for before in self._running.values():
            if before.order.state == message.state:
                self._look_if_left(before)
                self._waiting.append((message, received.fds))
                return
        self._start(message, received.fds)

    def _start(self, order: StartTpm, fds: Fds) -> None:
        with fds, Fds() as own:
            try:
                fds.check()
                said = own.add(make_memory(PROGRAM, _SAID_MAX))
                channel = own.add(os.dup(fds.left[1]))
                pid = os.fork()
            except (ChannelError, OSError) as err:
                log.warning("vm/%s: no TPM: %s", order.vm, err)
                self._tell_end(order.number)
                return
            if pid == 0:
                _be_swtpm(order, fds.take_all(), said)
            own.take_all()
        timer = self._loop.timer(lambda: self._kill(pid))
        swtpm = self._running[pid] = _Swtpm(order, channel, said, timer)
        self._loop.add_arrival_reader(channel, lambda: self._look_if_left(swtpm))

    def _look_if_left(self, swtpm: _Swtpm) -> None:
        """Have a swtpm killed that does not end, though its VM has."""
        poll = select.poll()
        poll.register(swtpm.channel, 0)  # an end is always told
        if not swtpm.has_left and poll.poll(0):
            swtpm.has_left = True
            swtpm.timer.arm(self._loop.monotonic_ns() + END_S * NANOSECONDS)

    def _kill(self, pid: int) -> None:
        if pid in self._running:  # not reaped yet, so it is ours
            uid = self._running[pid].order.uid
            with acting_as(uid) if uid else nullcontext():
                os.kill(pid, signal.SIGKILL)

    def _kill_all(self) -> None:
        for pid in self._running:
            self._kill(pid)

    def _child_ended(self, _number: int, _frame: FrameType | None) -> None:
        self._loop.call_soon(self._reap)

    def _reap(self) -> None:
        while self._running:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid == 0:
                return
            self._ended(pid, os.waitstatus_to_exitcode(status))

    def _ended(self, pid: int, status: int) -> None:
        swtpm = self._running.pop(pid)
        self._loop.remove_reader(swtpm.channel)
        self._look_if_left(swtpm)
        swtpm.timer.cancel()
        order = swtpm.order
        if status and swtpm.has_left:
            log.debug("vm/%s: swtpm ended after it, status %d", order.vm, status)
        elif status:
            how = f"was killed by signal {-status}" if status < 0 else f"failed: {_text(swtpm)}"
            log.warning("vm/%s: its TPM is gone: swtpm %s", order.vm, how)
        os.close(swtpm.channel)
        os.close(swtpm.said)
        self._tell_end(order.number)
        for at, (waiting, fds) in enumerate(self._waiting):
            if waiting.state == order.state:
                del self._waiting[at]
                self._start(waiting, fds)
                return


def _text(swtpm: _Swtpm) -> str:
    """Return the end of what a swtpm said, as one line."""
    said = os.pread(swtpm.said, _SAID_MAX, 0).rstrip(b"\0").decode(errors="replace")
    lines = said.strip().splitlines()
    return printable(lines[-1]) if lines else "it does not say why"


def _take_over() -> None:
    """Make the files of the working directory this user's, by copies: another swtpm left them."""
    names = os.listdir()  # noqa: PTH208 - names alone
    copies = [name for name in names if name.endswith(_COPY)]
    for name in copies:  # a process that was killed has left it
        os.unlink(name)  # noqa: PTH108 - the same
    for name in set(names) - set(copies):
        if os.stat(name, follow_symlinks=False).st_uid != os.getuid():  # noqa: PTH116 - the same
            with open(name, "rb") as file:  # noqa: PTH123 - the same
                data = file.read()
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
            with open(os.open(name + _COPY, flags, 0o600), "wb") as copy:  # noqa: PTH123 - the same
                copy.write(data)
                copy.flush()
                os.fsync(copy.fileno())
            os.replace(name + _COPY, name)  # noqa: PTH105 - the same


def _be_swtpm(order: StartTpm, fds: list[int], said: int) -> NoReturn:
    """In a process that was forked for it, become the swtpm of a VM."""
    try:
        os.dup2(said, 2)
        os.setsid()
        directory, control, data, *cgroup = fds
        for fd in cgroup:
            join_cgroup(fd)
        for limit, value in SWTPM_LIMITS:
            resource.setrlimit(limit, (value, value))
        if order.uid:
            become(order.uid)
        os.fchdir(directory)
        landlock.restrict(subtree=landlock.Subtree(directory, is_writable=True), programs=_PROGRAMS)
        if order.uid:
            _take_over()
        for number in signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}:
            with suppress(OSError):  # the C library keeps some to itself
                signal.signal(number, signal.SIG_DFL)
        for fd in (control, data):
            os.set_inheritable(fd, True)
        os.execvp(PROGRAM, [PROGRAM, *arguments(control, data, ".")])  # noqa: S606 - as meant
    except BaseException as err:  # noqa: BLE001 - it must never be another launcher
        os.write(2, f"{PROGRAM}: {err}\n".encode())
    os._exit(_NOT_EXECUTED)
