"""Accepting connections on an event loop, also where the host is short of descriptors or memory.

A listening socket stays readable while a connection waits, so an accept(2) that fails for want of
descriptors would be tried again at once, for ever. Here it is tried again after a while, or when
the owner has closed something.
"""

import errno
import socket
from collections.abc import Callable
from typing import Protocol

from vmm_kvm.log import Log

log = Log(__name__)

RETRY_NS = 100_000_000
"""Delay before accept(2) is tried again after descriptors or memory ran out."""
_SHORT = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM})


class Timer(Protocol):
    """Calls back once, some time after it was armed."""

    def arm(self, deadline_ns: int) -> None:
        """Fire at `deadline_ns` on the loop's clock."""

    def cancel(self) -> None:
        """Do not fire."""


class Loop(Protocol):
    """The event loop, as far as an acceptor needs it."""

    def monotonic_ns(self) -> int:
        """Return nanoseconds on the loop's clock."""

    def timer(self, callback: Callable[[], None]) -> Timer:
        """Make a timer that is not armed."""

    def add_reader(self, fd: int, callback: Callable[[], None]) -> bool:
        """Call `callback` while `fd` is readable."""

    def remove_reader(self, fd: int) -> None:
        """Forget the reader of `fd`, if there is one."""


class Acceptor:
    """Accepts the connections of a listening socket, which does not block and stays the owner's.

    On the loop's thread. Begins stopped.
    """

    def __init__(
        self,
        loop: Loop,
        listener: socket.socket,
        on_connection: Callable[[socket.socket], None],
        *,
        burst: int = 1,
    ) -> None:
        """Hand each connection to `on_connection`, which owns it; up to `burst` in a row."""
        self._loop = loop
        self._listener = listener
        self._on_connection = on_connection
        self._burst = burst
        self._retry = loop.timer(self.start)
        self._is_listening = False
        self._is_short = False

    def start(self) -> None:
        """Accept connections from now on; idempotent."""
        self._is_short = False
        self._retry.cancel()
        if not self._is_listening:
            self._is_listening = True
            self._loop.add_reader(self._listener.fileno(), self._accept)

    def stop(self) -> None:
        """Let connections wait in the backlog; idempotent."""
        self._is_short = False
        self._retry.cancel()
        self._hush()

    def has_room(self) -> None:
        """Accept again at once if descriptors or memory had run out: some are free now."""
        if self._is_short:
            self.start()

    def _hush(self) -> None:
        if self._is_listening:
            self._is_listening = False
            self._loop.remove_reader(self._listener.fileno())

    def _accept(self) -> None:
        for _ in range(self._burst):
            try:
                connection, _address = self._listener.accept()
            except OSError as err:
                if err.errno in _SHORT:
                    log.debug("accept: %s", err.strerror)
                    self._hush()
                    self._is_short = True
                    self._retry.arm(self._loop.monotonic_ns() + RETRY_NS)
                return  # else there is none, or it went away again
            self._on_connection(connection)
            if not self._is_listening:
                return
