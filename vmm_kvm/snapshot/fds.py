"""A stream's ends as descriptors: pipes, sockets and files, each with a time limit.

The peer may stop reading or writing without closing; the machine, paused meanwhile, must then
continue. So no call blocks: poll(2) waits, for as long as the patience lasts.

A pipe is written through an open file description that does not block; a socket by calls that do
not; a file of a disk blocks, but comes back.
"""

import fcntl
import os
import select
import stat
from typing import TYPE_CHECKING, Self

from vmm_kvm.errors import SnapshotError

if TYPE_CHECKING:  # loaded where there is one: `run --from` reads a file
    import socket

_WRITE_MAX = 1 << 20


class _End:
    """A descriptor, and how long to wait for it; a context manager that closes it."""

    def __init__(self, fd: int, patience_s: float, cancel_fd: int) -> None:
        self._fd = fd
        self._cancel_fd = cancel_fd
        self._patience_ms = int(patience_s * 1000)
        self._is_socket = False
        self._socket: socket.socket | None = None

    def close(self) -> None:
        """Close the descriptor; idempotent."""
        fd, self._fd = self._fd, -1
        if self._socket:
            self._socket.detach()
        if fd >= 0:
            os.close(fd)

    def cancel_no_more(self) -> None:
        """Ignore the descriptor for cancelling from now on."""
        self._cancel_fd = -1

    def wait_at_most(self, patience_s: float) -> None:
        """Have other patience from now on, in seconds."""
        self._patience_ms = int(patience_s * 1000)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _wait(self, events: int, what: str) -> None:
        poll = select.poll()
        poll.register(self._fd, events)
        if self._cancel_fd >= 0:
            poll.register(self._cancel_fd, select.POLLIN)
        ready = poll.poll(self._patience_ms)
        if not ready:
            raise SnapshotError(f"the other end has not {what} for {self._patience_ms / 1000:g} s")
        if any(fd == self._cancel_fd for fd, _ in ready):
            raise SnapshotError("it was cancelled")


class FdSink(_End):
    """The end of a stream that is written; owns the descriptor."""

    def __init__(self, fd: int, patience_s: float, cancel_fd: int = -1) -> None:
        """Take ownership of `fd`, and let it not block.

        `patience_s` is how long it may take no byte, in seconds. When `cancel_fd` can be read, if
        there is one, no more is written; it stays the caller's.

        Raises:
            SnapshotError: it is no pipe, socket or file, or not open for this.
            OSError: it is closed.
        """
        super().__init__(fd, patience_s, cancel_fd)
        self._flags = 0
        try:
            mode = check_kind(fd, os.O_WRONLY)
            if stat.S_ISSOCK(mode):
                import socket  # noqa: PLC0415 - see above

                self._socket = socket.socket(fileno=fd)
                self._flags = socket.MSG_DONTWAIT
            elif stat.S_ISFIFO(mode):
                os.set_blocking(fd, False)
        except BaseException:
            self.close()
            raise
        self._is_file = stat.S_ISREG(mode)

    def write(self, data: bytes) -> None:
        """Write all of `data`.

        Raises:
            SnapshotError: the other end takes nothing for too long, or it was cancelled.
            OSError: it is gone, or a disk is full.
        """
        view = memoryview(data)
        while view:
            self._wait(select.POLLOUT, "read")
            try:
                if self._socket:
                    count = self._socket.send(view[:_WRITE_MAX], self._flags)
                else:
                    count = os.write(self._fd, view[:_WRITE_MAX])
            except BlockingIOError:  # less room than this takes at once
                continue
            view = view[count:]

    def finish(self) -> None:
        """Flush to the disk, if this is a file.

        Raises:
            OSError: it cannot be written.
        """
        if self._is_file:
            os.fsync(self._fd)


class FdSource(_End):
    """The end of a stream that is read; owns the descriptor."""

    def __init__(self, fd: int, patience_s: float, cancel_fd: int = -1) -> None:
        """Take ownership of `fd`; `patience_s` is how long nothing may come, in seconds.

        When `cancel_fd` can be read, if there is one, no more is read; it stays the caller's.

        Raises:
            SnapshotError: it is no pipe, socket or file, or not open for this.
            OSError: it is closed.
        """
        super().__init__(fd, patience_s, cancel_fd)
        try:
            check_kind(fd, os.O_RDONLY)
        except BaseException:
            self.close()
            raise

    def readinto(self, view: memoryview) -> int:
        """Read at least one byte into `view`; 0 at the end.

        Raises:
            SnapshotError: nothing comes for too long.
            OSError: it cannot be read.
        """
        while True:
            self._wait(select.POLLIN, "sent anything")
            try:
                return os.readv(self._fd, [view])
            except BlockingIOError:  # another reader of it was faster
                continue


def check_kind(fd: int, access: int) -> int:
    """Refuse a descriptor of a kind that can carry no machine; returns the mode of its file.

    `access` is O_RDONLY for one that is to be read, O_WRONLY for one that is to be written.

    Raises:
        SnapshotError: it is no pipe, socket or regular file, or the wrong end of a pipe.
        OSError: it is closed.
    """
    mode = os.fstat(fd).st_mode
    if not (stat.S_ISREG(mode) or stat.S_ISFIFO(mode) or stat.S_ISSOCK(mode)):
        raise SnapshotError("not a pipe, socket or file")
    flags = fcntl.fcntl(fd, fcntl.F_GETFL)
    if flags & os.O_PATH or flags & os.O_ACCMODE not in {access, os.O_RDWR}:
        raise SnapshotError(f"not open for {'reading' if access == os.O_RDONLY else 'writing'}")
    return mode
