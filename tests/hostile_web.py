"""A web server whose every answer a test writes itself, to the byte."""

from __future__ import annotations

import socket
import ssl
import subprocess
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple, Self

_REQUEST_MAX = 65536
BOUND_S = 60.0


class Asked(NamedTuple):
    """A request."""

    path: str
    headers: dict[str, str]


class Connection:
    """A test's answer to a request."""

    def __init__(self, stream: socket.socket, closing: threading.Event) -> None:
        """Answer on `stream`."""
        self._stream = stream
        self.closing = closing
        """Set when the test is over."""

    def send(self, data: bytes) -> None:
        """Send bytes; the client may be gone."""
        self._stream.sendall(data)

    def answer(self, data: bytes, status: str = "200 OK", *headers: str, size: int = -1) -> None:
        """Send an answer, which may announce another size than it has."""
        lines = (
            f"HTTP/1.1 {status}",
            f"Content-Length: {len(data) if size < 0 else size}",
            "Connection: close",
            *headers,
        )
        self.send("\r\n".join((*lines, "", "")).encode() + data)


Answer = Callable[[Asked, Connection], None]


class HostileWeb:
    """A server on a port of the loopback address; a context manager, which ends it.

    Each request is answered by `answer`, in a thread, and then the connection ends.
    """

    def __init__(self, answer: Answer, context: ssl.SSLContext | None = None) -> None:
        """Listen; by TLS with a `context`."""
        self._answer = answer
        self._context = context
        self._closing = threading.Event()
        self._threads: list[threading.Thread] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._thread = threading.Thread(target=self._accept)
        self.asked: list[Asked] = []
        scheme = "https" if context else "http"
        self.url = f"{scheme}://127.0.0.1:{self._listener.getsockname()[1]}"

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._closing.set()
        self._listener.shutdown(socket.SHUT_RDWR)
        self._thread.join(BOUND_S)
        self._listener.close()
        for thread in self._threads:
            thread.join(BOUND_S)

    def _accept(self) -> None:
        while True:
            try:
                stream, _ = self._listener.accept()
            except OSError:
                return
            thread = threading.Thread(target=self._serve, args=(stream,))
            self._threads.append(thread)
            thread.start()

    def _serve(self, stream: socket.socket) -> None:
        with stream, suppress(OSError):  # the client ends whenever it likes
            stream.settimeout(BOUND_S)
            if self._context:
                with self._context.wrap_socket(stream, server_side=True) as encrypted:
                    self._answer_one(encrypted)
            else:
                self._answer_one(stream)

    def _answer_one(self, stream: socket.socket) -> None:
        data = b""
        while b"\r\n\r\n" not in data and len(data) < _REQUEST_MAX:
            more = stream.recv(4096)
            if not more:
                return
            data += more
        first, *lines = data.partition(b"\r\n\r\n")[0].decode().split("\r\n")
        headers = dict(line.split(": ", 1) for line in lines)
        asked = Asked(first.split()[1], headers)
        self.asked.append(asked)
        self._answer(asked, Connection(stream, self._closing))


def certificate(folder: Path) -> tuple[ssl.SSLContext, Path]:
    """Make a certificate for the loopback address; returns a server's context, and its file."""
    key, path = folder / "key.pem", folder / "certificate.pem"
    subprocess.run(
        [
            *("openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2"),
            *("-subj", "/CN=127.0.0.1", "-addext", "subjectAltName=IP:127.0.0.1"),
            *("-keyout", key, "-out", path),
        ],
        check=True,
        capture_output=True,
    )
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(path, key)
    return context, path
