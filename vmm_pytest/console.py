"""The output of a machine's console, read by a thread from the beginning."""

import re
import socket
import threading
import time

LOG_MAX = 1 << 20
"""Bytes that are kept, the latest."""
_PACKET_MAX = 256 << 10


class ConsoleError(Exception):
    """The console has ended before it showed the expected text."""


class ConsoleLog:
    """A console's output, and its input; `close` ends the thread."""

    def __init__(self, stream: socket.socket) -> None:
        """Take ownership of `stream`, which the daemon has opened."""
        self._stream = stream
        self._shown = bytearray()
        self._cut = 0
        self._seen = 0
        """The start of the next search, counted from the console's first byte."""
        self._has_ended = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._read, name="vm console", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop reading; earlier output stays."""
        try:
            self._stream.shutdown(socket.SHUT_RDWR)
        except OSError:  # the VM has ended
            self._has_ended = True
        self._thread.join()
        self._stream.close()

    def text(self) -> str:
        """Return the output, its latest LOG_MAX bytes."""
        with self._changed:
            text = self._shown.decode(errors="replace")
            return f"[{self._cut} bytes before]\n{text}" if self._cut else text

    def wait_for(self, pattern: str, deadline: float) -> str:
        """Wait until output matches a regular expression; the next search begins behind it.

        Returns the matching text. `deadline` is of the monotonic clock.

        Raises:
            TimeoutError: it has not come.
            ConsoleError: the console has ended.
        """
        wanted = re.compile(pattern.encode(), re.MULTILINE)
        with self._changed:
            while True:
                found = wanted.search(self._shown, max(0, self._seen - self._cut))
                if found:
                    self._seen = self._cut + found.end()
                    return found[0].decode(errors="replace")
                if self._has_ended:
                    raise ConsoleError(f"the console has ended, and has not shown {pattern!r}")
                left = deadline - time.monotonic()
                if left <= 0:
                    raise TimeoutError(f"the console has not shown {pattern!r}")
                self._changed.wait(left)

    def send(self, text: str) -> None:
        """Type `text`.

        Raises:
            OSError: the VM has ended.
        """
        self._stream.sendall(b"\0" + text.encode())

    def _read(self) -> None:
        while True:
            try:
                data = self._stream.recv(_PACKET_MAX)
            except OSError:
                data = b""
            with self._changed:
                self._shown += data
                more = len(self._shown) - LOG_MAX
                if more > 0:
                    del self._shown[:more]
                    self._cut += more
                self._has_ended = self._has_ended or not data
                self._changed.notify_all()
            if not data:
                return
