"""A daemon that answers as a test wants, and checks every request as the real one does."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Self

import msgspec

from vmd.wire.channel import Channel, ChannelError
from vmd.wire.messages import DAEMON_TO_CLIENT, AnyAnswer, AnyRequest

Answers = Sequence[AnyAnswer | tuple[AnyAnswer, list[int]]]


class FakeDaemon:
    """Serves one connection after the other on a thread; a context manager."""

    def __init__(self, path: Path, answer: Callable[[AnyRequest], Answers]) -> None:
        """Listen at `path`; `answer` returns answers, with descriptors that it then owns."""
        self.requests: list[AnyRequest] = []
        self.fd_counts: list[int] = []
        self._answer = answer
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._listener.bind(str(path))
        self._listener.listen()
        self._threads: list[threading.Thread] = []
        self._connections: list[socket.socket] = []
        self._acceptor = threading.Thread(target=self._accept)

    def __enter__(self) -> Self:
        self._acceptor.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._acceptor.join()
        self._listener.close()
        for connection in self._connections:
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            self._connections.append(connection)
            thread = threading.Thread(target=self._serve, args=(connection,))
            self._threads.append(thread)
            thread.start()

    def _serve(self, connection: socket.socket) -> None:
        with Channel(connection, DAEMON_TO_CLIENT) as channel:
            connection.setblocking(True)
            with suppress(ChannelError):
                while True:
                    request, fds, _size = channel.receive()
                    self.fd_counts.append(len(fds))
                    fds.close()
                    self.requests.append(msgspec.structs.replace(request, serial=0))
                    for answer in self._answer(request):
                        message, theirs = answer if isinstance(answer, tuple) else (answer, [])
                        channel.send(
                            msgspec.structs.replace(message, serial=request.serial), theirs
                        )
