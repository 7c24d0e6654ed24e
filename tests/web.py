"""Run `vmctl web` in a test, and speak HTTP and WebSockets to it, by nothing of ours."""

from __future__ import annotations

import http.client
import json
import os
import socket
import subprocess
import sys
import urllib.parse
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, Self

from wsproto import ConnectionType, WSConnection
from wsproto.events import (
    AcceptConnection,
    BytesMessage,
    CloseConnection,
    Event,
    Ping,
    RejectConnection,
    Request,
    TextMessage,
)

ROOT = Path(__file__).resolve().parents[1]
TIMEOUT_S = 60.0

Fields = dict[str, Any]  # type: ignore[explicit-any] # what JSON holds


class Answer(NamedTuple):
    """An answer of the server's."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def told(self) -> Fields:
        """The JSON object that it is."""
        told: Fields = json.loads(self.body)
        return told


class WebServer:
    """A `vmctl web`; a context manager that ends it, and fails if it has said anything wrong."""

    def __init__(self, path: Path, *, uid: int | None = None, port: int = 0) -> None:
        """Use the control socket at `path`, as another user if `uid` is given."""
        self._path = path
        self._uid = uid
        self.port = port
        self.cookie = ""

    def __enter__(self) -> Self:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "vmctl", "web", "--port", str(self.port)],
            cwd=ROOT,
            env={**os.environ, "VMD_SOCKET": str(self._path), "PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            user=self._uid,
            group=self._uid,
            extra_groups=None if self._uid is None else [],
        )
        self.link = self.next_link()
        self.port = urllib.parse.urlsplit(self.link).port or 0
        return self

    def __exit__(self, *exc: object) -> None:
        self.process.terminate()
        _, errors = self.process.communicate(timeout=TIMEOUT_S)
        assert "Traceback" not in errors, errors

    def next_link(self) -> str:
        """Return the link that it prints next."""
        assert self.process.stdout
        line = self.process.stdout.readline().strip()
        if not line:
            raise AssertionError(self.process.communicate(timeout=TIMEOUT_S)[1])
        return line

    def log_in(self) -> None:
        """Use the link; the cookie goes along with requests from now on."""
        answer = self.ask("GET", self.link.partition(str(self.port))[2])
        assert answer.status == 200, answer
        self.cookie = answer.headers["set-cookie"].partition(";")[0]
        self.link = self.next_link()

    def ask(
        self,
        method: str,
        path: str,
        body: object = None,
        headers: Mapping[str, str | None] | None = None,
    ) -> Answer:
        """Send a request; `headers` replace those that belong to it, None leaves one out.

        A body of bytes is sent as it is, anything else as JSON.
        """
        wanted = {**self._headers(), "content-type": "application/json", **(headers or {})}
        data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=TIMEOUT_S)
        try:
            connection.putrequest(method, path, skip_host=True, skip_accept_encoding=True)
            for name, value in wanted.items():
                if value is not None:
                    connection.putheader(name, value)
            if data is not None:
                connection.putheader("content-length", str(len(data)))
            connection.endheaders(data)
            answer = connection.getresponse()
            told = {name.lower(): value for name, value in answer.getheaders()}
            return Answer(answer.status, told, answer.read())
        finally:
            connection.close()

    def _headers(self) -> dict[str, str | None]:
        cookie = {"cookie": self.cookie} if self.cookie else {}
        return {"host": f"127.0.0.1:{self.port}", **cookie}

    def stream(self, path: str, headers: Mapping[str, str | None] | None = None) -> WebSocket:
        """Open a WebSocket; `headers` as of `ask`."""
        told = {**self._headers(), **(headers or {})}
        host = told.pop("host") or ""
        pairs = [(name, value) for name, value in told.items() if value is not None]
        return WebSocket(self.port, host, path, pairs)


class WebSocket:
    """A WebSocket; a context manager."""

    def __init__(self, port: int, host: str, path: str, headers: list[tuple[str, str]]) -> None:
        """Connect, and wait until the server has accepted, or refused: `status` tells."""
        self._socket = socket.create_connection(("127.0.0.1", port), TIMEOUT_S)
        self._connection = WSConnection(ConnectionType.CLIENT)
        self._events: list[Event] = []
        extra = [(name.encode(), value.encode()) for name, value in headers]
        self._send(Request(host=host, target=path, extra_headers=extra))
        first = self._next()
        self.status = first.status_code if isinstance(first, RejectConnection) else 101
        assert isinstance(first, AcceptConnection | RejectConnection), first
        self.output = b""
        """Binary messages."""
        self.closed: tuple[int, str] | None = None
        """How the server has closed it."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self._socket.close()

    def _send(self, event: Event) -> None:
        self._socket.sendall(self._connection.send(event))

    def send(self, data: bytes | str) -> None:
        """Send a message."""
        self._send(TextMessage(data=data) if isinstance(data, str) else BytesMessage(data=data))

    def receive(self) -> bytes | str | None:
        """Return the next message, or a part of one; None when it is closed."""
        while True:
            match self._next():
                case TextMessage(data=text):
                    return str(text)
                case BytesMessage(data=data):
                    self.output += data
                    return bytes(data)
                case CloseConnection(code=code, reason=reason):
                    self.closed = code, reason or ""
                    return None
                case Ping() as ping:
                    self._send(ping.response())

    def expect(self, text: bytes) -> None:
        """Read until the binary messages have `text`."""
        while text not in self.output:
            assert self.receive() is not None, (self.closed, self.output)

    def read_to_end(self) -> tuple[int, str]:
        """Read until it is closed; returns why."""
        while self.receive() is not None:
            pass
        assert self.closed
        return self.closed

    def _next(self) -> Event:
        while not self._events:
            data = self._socket.recv(1 << 16)
            self._connection.receive_data(data or None)
            self._events += self._connection.events()
        return self._events.pop(0)
