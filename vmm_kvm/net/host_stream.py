"""Stream sockets of the host, as a device uses them: without waiting, and without a copy."""

import os
import socket
from collections.abc import Sequence
from contextlib import suppress


class HostStream:
    """A connected stream socket that does not block; takes it over."""

    __slots__ = ("_socket", "fd")

    def __init__(self, sock: socket.socket) -> None:
        """Take over `sock`."""
        sock.setblocking(False)
        self._socket = sock
        self.fd = sock.fileno()
        """Its number, also when it is closed."""

    @property
    def is_closed(self) -> bool:
        """Whether it is closed here."""
        return self._socket.fileno() < 0

    def read(self, buffers: Sequence[memoryview]) -> int | None:
        """Read into the buffers; returns the bytes, 0 at the end, None if nothing is there yet.

        Raises:
            OSError: the other end went away without reading everything.
        """
        try:
            return os.readv(self.fd, buffers)
        except BlockingIOError:
            return None

    def write(self, buffers: Sequence[memoryview | bytes]) -> int:
        """Write as much as there is room for; returns the bytes, 0 if there is none.

        Raises:
            OSError: there is no reader any more.
        """
        try:
            return os.writev(self.fd, buffers)
        except BlockingIOError:
            return 0

    def end_output(self) -> None:
        """Let the other end read the end of the file."""
        with suppress(OSError):  # it is gone
            self._socket.shutdown(socket.SHUT_WR)

    def end_input(self) -> None:
        """Let later writes of the other end fail."""
        with suppress(OSError):  # it is gone
            self._socket.shutdown(socket.SHUT_RD)

    def close(self) -> None:
        """Close it; idempotent."""
        self._socket.close()
