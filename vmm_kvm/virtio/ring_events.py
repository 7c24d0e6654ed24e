"""Events of rings that the kernel or another process serves.

Notifications of the guest reach the server by one eventfd for each ring, and its interrupts the
guest by another, so that nothing passes through here while the guest does I/O. Between `watch` and
`unwatch` a thread waits for other events: a ring breaks, the server goes away, or an interrupt has
to be raised because the guest has no MSI-X.

Methods are called one at a time, `kick` excepted; what the thread watches does not change while it
runs.
"""

import os
import select
import threading
from collections.abc import Callable, Mapping
from functools import partial

from vmm_kvm.virtio.device import Frontend

_GONE = select.POLLRDHUP | select.POLLHUP | select.POLLERR


class RingEvents:
    """The eventfds of a device's rings, which it owns, and the thread that watches some of them."""

    def __init__(self, rings: int, name: str) -> None:
        """Make the eventfds of that many rings; `name` is the thread's.

        Raises:
            OSError: the host has no descriptors left.
        """
        self._name = name
        self._thread: threading.Thread | None = None
        self._fds: list[int] = []
        self._call_fds: dict[int, int] = {}
        try:
            self._stop_fd = self._eventfd()
            self.error_fd = self._eventfd()
            """The server writes it when it gives up any ring."""
            self._kick_fds = [self._eventfd() for _ in range(rings)]
        except BaseException:
            self.close()
            raise

    def kick(self, index: int) -> None:
        """Have the server process ring `index`; any thread."""
        os.eventfd_write(self._kick_fds[index], 1)

    def kick_fd(self, index: int) -> int:
        """Return the eventfd that does the same when written."""
        return self._kick_fds[index]

    def call_fd(self, frontend: Frontend, index: int) -> int:
        """Return the eventfd that interrupts the driver: the transport's, or one to be watched."""
        fd = frontend.interrupt_fd(index)
        if fd is not None:
            return fd
        if index not in self._call_fds:
            self._call_fds[index] = self._eventfd()
        return self._call_fds[index]

    def watch(
        self,
        frontend: Frontend,
        on_error: Callable[[], None],
        connection: int | None = None,
        on_hangup: Callable[[], None] = lambda: None,
    ) -> None:
        """Report events to `frontend` from now on.

        `on_error` is called when the server has written `error_fd`, `on_hangup` if `connection`
        ends; both on the thread, which `unwatch` waits for.
        """
        watched: dict[int, Callable[[], None]] = {
            fd: partial(frontend.interrupt, index) for index, fd in self._call_fds.items()
        }
        watched[self.error_fd] = on_error
        self._thread = threading.Thread(
            target=self._run, args=(watched, connection, on_hangup), name=self._name
        )
        self._thread.start()

    def unwatch(self) -> None:
        """Stop watching; after this returns, no callback is called. Idempotent."""
        thread, self._thread = self._thread, None
        if thread is not None:
            os.eventfd_write(self._stop_fd, 1)
            thread.join()
            os.eventfd_read(self._stop_fd)

    def close(self) -> None:
        """Stop, and close the eventfds; idempotent."""
        self.unwatch()
        while self._fds:
            os.close(self._fds.pop())

    def _eventfd(self) -> int:
        fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._fds.append(fd)
        return fd

    def _run(
        self,
        watched: Mapping[int, Callable[[], None]],
        connection: int | None,
        on_hangup: Callable[[], None],
    ) -> None:
        poll = select.poll()
        for fd in (self._stop_fd, *watched):
            poll.register(fd, select.POLLIN)
        if connection is not None:
            poll.register(connection, select.POLLRDHUP)
        while True:
            for fd, events in poll.poll():
                if fd == self._stop_fd:
                    return
                if fd != connection:
                    os.eventfd_read(fd)
                    watched[fd]()
                elif events & _GONE:
                    poll.unregister(fd)
                    on_hangup()
