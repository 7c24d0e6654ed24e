"""The daemon's processes: how the parent starts, restarts and ends them.

Each child is forked, keeps the one descriptor that leads to its parent and those it is given, and
confines itself before it reads a message. A child imports its modules after the fork, so none has
the code of another. One that ends by itself is started again, unless that happens too often; the
parent's end is the end of all, because their channels close.

Source: section 5.3 of OpenBSD's behaviour.
"""

import gc
import os
import signal
import socket
import time
from collections.abc import Callable, Collection, Sequence
from contextlib import ExitStack, suppress
from typing import NamedTuple, NoReturn

from vmd.confine.confinements import Kind
from vmd.confine.sandbox import SandboxError, kill_as, set_title
from vmd.shared import log as logging
from vmd.wire.blank import JoinCgroup
from vmd.wire.channel import ChannelError, Fds
from vmm_kvm.clock import NANOSECONDS
from vmm_kvm.errors import VmmError
from vmm_kvm.log import Log
from vmm_kvm.loop import EventLoop

log = Log(__name__)

RESTARTS_MAX = 5
"""Ends of one kind of process within `RESTARTS_S` after which it is not started again."""
RESTARTS_S = 10
_STANDARD_FDS = 3
_FD_END = 1 << 30
_EXIT_GRACE_S = 5.0
_LOOK_S = 0.5
# A terminal or a service manager may send these to all processes; the parent decides.
_IGNORED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGPIPE)

_UNTOLD = frozenset({Kind.OPENER, Kind.INIT, Kind.SHARE})
"""Kinds of processes whose normal end is not logged."""

Body = Callable[[socket.socket], None]
"""The body of a child: confine itself, and serve the connection until it ends."""


class Plan(NamedTuple):
    """How to make one kind of child."""

    kind: Kind
    body: Body
    fds: Sequence[int] = ()
    """Descriptors of the parent that it keeps."""


class Child(NamedTuple):
    """A running child; the holder owns the socket."""

    pid: int
    connection: socket.socket


def spawn(plan: Plan) -> Child:
    """Fork a child. Only for a process with one thread.

    Raises:
        OSError: the host has no processes or descriptors left.
    """
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    # Until the child has its own handlers, it must not run ours.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    try:
        pid = os.fork()
        if pid == 0:
            _live(plan, theirs)
    except OSError:
        ours.close()
        raise
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        theirs.close()
    return Child(pid, ours)


def close_all_but(kept: set[int]) -> None:
    """Close every descriptor that is neither a standard one, nor the log's, nor in `kept`."""
    start = _STANDARD_FDS
    for fd in sorted(fd for fd in {*kept, logging.log_fd()} if fd >= _STANDARD_FDS):
        os.closerange(start, fd)
        start = fd + 1
    os.closerange(start, _FD_END)


def _live(plan: Plan, connection: socket.socket) -> NoReturn:
    """Run the child; never returns into the parent's code."""
    for number in _IGNORED:
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    # Nothing of the parent's may be finalised here: it would close our descriptors.
    gc.freeze()
    set_title(f"vmd: {plan.kind}")
    # Neither the terminal nor a pipe of the program that started the daemon.
    null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
    for fd in (0, 1):
        os.dup2(null, fd, inheritable=False)
    os.close(null)

    def body() -> int:
        signal.pthread_sigmask(signal.SIG_SETMASK, ())
        plan.body(connection)
        tell = log.debug if plan.kind in _UNTOLD else log.info
        tell("%s exiting, pid %d", plan.kind, os.getpid())
        return 0

    live(plan.kind, {connection.fileno(), *plan.fds}, body)


def live(title: str, kept: set[int], body: Callable[[], int]) -> NoReturn:
    """Run a process that was just forked, and exit with the status that `body` returns.

    Of the descriptors, it has those in `kept`, the standard ones and the log's; `title` is for its
    messages. Never returns into the forking process's code.
    """
    status = 1
    try:
        logging.forked()
        close_all_but(kept)
        logging.set_title(title)
        status = body()
    except (SandboxError, VmmError) as err:
        log.error("%s", err)  # noqa: TRY400 - the host's doing, no bug of ours
    except BaseException:
        log.exception("bug")
    finally:
        os._exit(status)


def join_cgroup(fd: int) -> None:
    """Move this process into a control group, by a descriptor of its cgroup.procs; closes that.

    Raises:
        OSError: the kernel refused.

    Source: cgroups(7), "cgroup.procs"
    """
    try:
        os.write(fd, b"0")
    finally:
        os.close(fd)


def join_ahead(message: JoinCgroup, fds: Fds) -> int:
    """Move this process, which has no task yet, into a control group; returns the group's number.

    The result is 0 if it could not: a task that wants the group has a descriptor of its own.
    """
    try:
        with fds:
            join_cgroup(fds.take(0))
    except (ChannelError, OSError) as err:
        log.debug("control group %d: %s", message.number, err)
        return 0
    return message.number


class Restarts:
    """Whether a kind of process ends too often to be started again."""

    def __init__(self, loop: EventLoop) -> None:
        """Count by the loop's clock."""
        self._loop = loop
        self._ends: dict[Kind, list[int]] = {}

    def count(self, kind: Kind) -> bool:
        """Note an end; returns whether it may be started again."""
        now = self._loop.monotonic_ns()
        recent = [at for at in self._ends.get(kind, []) if now - at < RESTARTS_S * NANOSECONDS]
        self._ends[kind] = [*recent, now]
        return len(recent) + 1 < RESTARTS_MAX


def wait_for(find: Callable[[], set[int]], users: Collection[int] = ()) -> None:
    """Reap the children that `find` returns, until there are none; their channels are closed.

    When none has ended for some time, they are killed, also if they have one of `users`. They are
    reaped in the order in which they end: the first of a pid namespace ends when all others there
    are reaped. `find` is called repeatedly, because one may have forked another meanwhile. Those
    that the kernel does not let end, because they wait for a client's file system, are left.
    """
    quiet_since = time.monotonic()
    killed: set[int] = set()
    while pids := find():
        if _reap_one(pids):
            quiet_since = time.monotonic()
        elif time.monotonic() - quiet_since > _EXIT_GRACE_S:
            if pids <= killed:
                log.warning("left behind, as the kernel waits for files: %s", sorted(pids))
                return
            for pid in pids - killed:
                log.warning("pid %d does not end: killed", pid)
                with suppress(PermissionError):  # it is killed already, as another user
                    kill_as(pid, users)
            killed |= pids
            quiet_since = time.monotonic()


def _reap_one(pids: set[int]) -> bool:
    """Wait until one of our children ends, for a while; returns whether one has."""
    import select  # noqa: PLC0415 - at the very end only

    poll = select.poll()
    with ExitStack() as stack:
        for pid in pids:
            pidfd = os.pidfd_open(pid)
            stack.callback(os.close, pidfd)
            poll.register(pidfd, select.POLLIN)
        if not poll.poll(_LOOK_S * 1000):
            return False
    return any(os.waitpid(pid, os.WNOHANG)[0] for pid in pids)


def orphans(known: set[int]) -> set[int]:
    """Return our children except those `known`: the ones inherited from a vmm that has ended.

    Source: prctl(2), PR_SET_CHILD_SUBREAPER; proc(5), "children".
    """
    with open(f"/proc/self/task/{os.getpid()}/children", encoding="ascii") as file:  # noqa: PTH123
        return {int(text) for text in file.read().split()} - known
