"""Device processes: a process that does nothing but serve one backend to one connection.

A device process is forked, not executed: everything is imported already, so it is there in a
millisecond or two. It ends when its connection does, so it cannot outlive the VM, however that
ends; and when it crashes, the VM's side of the connection notices and only the device fails.
"""

import gc
import os
import select
import signal
import socket
import sys
import threading
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from pathlib import Path
from types import FrameType
from typing import NoReturn, Self

from vmm_kvm.errors import VmmError
from vmm_kvm.log import Log
from vmm_kvm.loop import EventLoop
from vmm_kvm.virtio.device import Backend
from vmm_kvm.virtio.vhost_user.readiness import await_ready, tell_failure, tell_ready
from vmm_kvm.virtio.vhost_user.server import Server

log = Log(__name__)

EXIT_TIMEOUT_S = 30.0
"""The time for a device process to write back its data when its connection ends."""

_STANDARD_FDS = 3
_IGNORED = (
    *(signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT),
    *(signal.SIGTSTP, signal.SIGTTIN, signal.SIGTTOU),
)


class DeviceProcess:
    """A device process that we forked; a context manager that waits for its end."""

    def __init__(self, pid: int, name: str, connection: socket.socket) -> None:
        """Look after `pid`, a child; see `spawn_device_process`."""
        self.connection = connection
        """Connected to the server; a Client made of it takes ownership."""
        self._pid: int | None = pid
        self._name = name

    def close(self) -> None:
        """Close the connection if it is still open, and wait for the process; idempotent.

        One that does not end by itself within `EXIT_TIMEOUT_S` is killed.
        """
        self.connection.close()
        pid, self._pid = self._pid, None
        if pid is None:
            return
        pidfd = os.pidfd_open(pid)
        try:
            ended = select.poll()
            ended.register(pidfd, select.POLLIN)
            if not ended.poll(EXIT_TIMEOUT_S * 1000):
                log.warning("%s: device process %d does not end: killed", self._name, pid)
                os.kill(pid, signal.SIGKILL)
        finally:
            os.close(pidfd)
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        if code < 0:
            text = f"was killed by signal {-code}"
            log.warning("%s: device process %d %s", self._name, pid, text)
        elif code > 0:
            log.warning("%s: device process %d failed with status %d", self._name, pid, code)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def spawn_device_process(
    make_backend: Callable[[], Backend], name: str, keep_fds: Sequence[int] = ()
) -> DeviceProcess:
    """Fork a process that serves what `make_backend` makes there; return when it is ready.

    Only for a process with one thread. The device process has none of our descriptors but
    `keep_fds`, which stay ours here, and the standard ones. It ignores the signals that end or stop
    a process group, so that a VM's last writes reach the disk when a signal ends the group. `name`
    is for the log.

    Raises:
        VmmError: `make_backend` did, in the device process; the text is the same.
        OSError: the host has no processes or descriptors left.
    """
    assert threading.active_count() == 1, "a fork takes only one thread along"
    read_fd, write_fd = os.pipe()
    try:
        ours, theirs = socket.socketpair()
    except OSError:
        os.close(read_fd)
        os.close(write_fd)
        raise
    # Until the child has its own handlers, it must not run ours.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    try:
        pid = os.fork()
        if pid == 0:
            _live(make_backend, name, theirs, write_fd, keep_fds)
    except OSError:
        os.close(read_fd)
        ours.close()
        raise
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        theirs.close()
        os.close(write_fd)
    process = DeviceProcess(pid, name, ours)
    reason = await_ready(read_fd)
    if reason is None:
        return process
    process.close()
    raise VmmError(reason or f"{name}: its device process has crashed")


def serve(
    sock: socket.socket,
    backend: Backend,
    *,
    is_one_shot: bool = False,
    signals: Sequence[signal.Signals] = (),
    on_loop: Callable[[EventLoop], AbstractContextManager[None]] = lambda _loop: nullcontext(),
) -> None:
    """Serve `backend` on `sock` until there is nothing more to serve, or one of `signals` comes.

    Takes ownership of both. On the main thread, whose handlers of `signals` it replaces for good: a
    second one changes nothing, so that the backend is closed in order. `on_loop` may have the event
    loop watch something else too, until the context that it returns is left.
    """
    is_ending = False
    with EventLoop() as loop, on_loop(loop):

        def terminate(_number: int, _frame: FrameType | None) -> None:
            nonlocal is_ending
            if not is_ending:
                is_ending = True
                loop.call_soon(loop.stop)

        for number in signals:
            signal.signal(number, terminate)
        try:
            server = Server(sock, backend, loop, is_one_shot=is_one_shot, on_end=loop.stop)
            try:
                loop.run()
            finally:
                is_ending = True
                server.close()
        finally:
            backend.close()


def _live(
    make_backend: Callable[[], Backend],
    name: str,
    connection: socket.socket,
    status_fd: int,
    keep_fds: Sequence[int],
) -> NoReturn:
    """Run the device process. Never returns into the parent's code."""
    status = 1
    try:
        for number in _IGNORED:
            signal.signal(number, signal.SIG_IGN)
        signal.set_wakeup_fd(-1)
        signal.pthread_sigmask(signal.SIG_SETMASK, ())
        # Nothing of the parent's may be finalised here: it would close our descriptors.
        gc.freeze()
        _close_all_but({connection.fileno(), status_fd, *keep_fds})
        try:
            backend = make_backend()
        except (VmmError, OSError) as err:
            tell_failure(status_fd, str(err))
        else:
            if tell_ready(status_fd):
                serve(connection, backend)
            else:
                backend.close()
        status = 0
    except BaseException:
        log.exception("%s: device process", name)
    finally:
        sys.stderr.flush()
        os._exit(status)


def _close_all_but(kept: set[int]) -> None:
    for entry in list(Path("/proc/self/fd").iterdir()):
        fd = int(entry.name)
        # The descriptor of the listing itself is closed by now.
        if fd >= _STANDARD_FDS and fd not in kept:
            with suppress(OSError):
                os.close(fd)
