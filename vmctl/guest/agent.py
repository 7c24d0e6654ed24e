"""A guest's agent: commands, files, and operations for clones, over a connected stream.

A public interface, synchronous; docs/agent.md shows how. Each operation has a connection of its
own, which `connect` makes. The agent is the guest's, so nothing that it sends is trusted: a
violation of the protocol is an AgentError, buffers are bounded, and it never decides the name of a
file on this side (`vmctl.guest.unpack`).
"""

import json
import os
import select
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, Self

from vmctl.client import CommandError, Fields
from vmctl.guest.frames import (
    FRAME_MAX,
    PIECE,
    PROTOCOL,
    SIZE_BODY,
    TAKEN_BODY,
    WINDOW,
    FrameReader,
    Kind,
    ProtocolError,
    fields_of,
    frame,
    number_of,
    text_of,
)
from vmm_kvm.text import printable

ANSWER_S = 30.0
"""How long the agent has for its first message."""
OUTPUT_MAX = 64 << 20
"""Bytes of each stream that `Agent.run` keeps."""
_STATUS_MAX = 255
_SIGNAL_MAX = 64
_RECEIVED_MAX = 64 << 10
_POLL_MAX_S = 1e5
"""The longest time of one poll."""
_OUTPUTS = (Kind.OUTPUT, Kind.ERRORS)


class AgentError(CommandError):
    """There is no agent, its connection has ended, or it violates the protocol."""


class AgentRefusedError(CommandError):
    """The agent refused a request; `code` is for programs."""

    def __init__(self, code: str, message: str) -> None:
        """Remember both; control characters in the guest's text are escaped."""
        super().__init__(printable(message))
        self.code = code


class Finished(NamedTuple):
    """A command's end, and its output."""

    status: int
    """0 to 255; of a command that a signal ended, 128 and the signal's number."""
    output: bytes
    errors: bytes


class Hello(NamedTuple):
    """An agent's protocol and version."""

    protocol: int
    version: str


class Session:
    """One operation on a connection; a context manager that closes it.

    It keeps received data, up to WINDOW bytes of each channel, until `take` gets them.
    """

    def __init__(
        self, stream: socket.socket, request: Mapping[str, object], deadline: float | None = None
    ) -> None:
        """Send a request, and wait until the agent has begun or finished it.

        Takes ownership of `stream`. `deadline` is of the monotonic clock, seconds.

        Raises:
            AgentRefusedError: the agent does not do it.
            AgentError: it does not answer.
            TimeoutError: the deadline has come.
        """
        self._stream = stream
        self._deadline = deadline
        self._frames = FrameReader()
        self._sending = bytearray()
        self._arrived = {channel: bytearray() for channel in _OUTPUTS}
        self._taken = dict.fromkeys(_OUTPUTS, 0)
        self._rooms = dict.fromkeys(_OUTPUTS, WINDOW)
        self._room = WINDOW
        self._hello: Hello | None = None
        self._started: Fields | None = None
        self._refusal: AgentRefusedError | None = None
        self.result: Fields | None = None
        """The agent's final message; None until then."""
        self._request = request
        try:
            stream.setblocking(False)
            self._begin()
        except BaseException:
            stream.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self._stream.close()

    def _begin(self) -> None:
        # Before the agent has said a word, which saves the guest a turn.
        data = json.dumps(self._request).encode()
        if len(data) > FRAME_MAX:
            raise CommandError("the command line is too long")
        self._queue(Kind.REQUEST, data)
        first = time.monotonic() + ANSWER_S
        while self._hello is None:
            self._await_word(first)
        first = time.monotonic() + ANSWER_S
        while self._started is None and self.result is None:
            self._await_word(first)

    def _await_word(self, until: float) -> None:
        """Wait for a message that the agent sends at once."""
        if self._deadline is not None and self._deadline < until:
            self.wait()
            return
        own, self._deadline = self._deadline, until
        try:
            self.wait()
        except TimeoutError:
            raise AgentError("the guest's agent does not answer") from None
        finally:
            self._deadline = own

    @property
    def hello(self) -> Hello:
        """The agent's own description."""
        assert self._hello is not None
        return self._hello

    @property
    def started(self) -> Fields:
        """The agent's message at its start."""
        return self._started or {}

    @property
    def room(self) -> int:
        """How many bytes of input can be fed."""
        return 0 if self._sending else self._room

    def feed(self, data: bytes) -> None:
        """Send input, no more than there is `room` for."""
        assert 0 < len(data) <= self._room
        self._room -= len(data)
        for at in range(0, len(data), PIECE):
            self._queue(Kind.INPUT, data[at : at + PIECE])

    def end_input(self) -> None:
        """Say that there is no more input."""
        self._queue(Kind.INPUT)

    def resize(self, rows: int, columns: int) -> None:
        """Tell the size of the terminal."""
        self._queue(Kind.WINDOW_SIZE, SIZE_BODY.pack(rows & 0xFFFF, columns & 0xFFFF))

    def signal(self, number: int) -> None:
        """Send a signal to the command's process group."""
        self._queue(Kind.SIGNAL, bytes((number,)))

    def arrived(self, channel: Kind) -> int:
        """Return how many bytes of a channel are there."""
        return len(self._arrived[channel])

    def peek(self, channel: Kind, size: int = WINDOW) -> bytes:
        """Return received data, up to `size` bytes, without taking them."""
        return bytes(self._arrived[channel][:size])

    def take(self, channel: Kind, size: int = WINDOW) -> bytes:
        """Take received data, up to `size` bytes; the agent may send as many again."""
        data = self.peek(channel, size)
        del self._arrived[channel][: len(data)]
        self._taken[channel] += len(data)
        if self._taken[channel] >= WINDOW // 4 and self.result is None:
            self._rooms[channel] += self._taken[channel]
            self._queue(Kind.TAKEN, TAKEN_BODY.pack(channel, self._taken[channel]))
            self._taken[channel] = 0
        return data

    def wait(self, wanted: Mapping[int, int] | None = None) -> dict[int, int]:
        """Wait until something arrives, or is sent, or one of other descriptors is ready.

        Args:
            wanted: other descriptors, with the events of poll(2).

        Returns:
            those of them that are ready.

        Raises:
            AgentRefusedError, AgentError, TimeoutError: as the constructor.
        """
        self._send()
        poll = select.poll()
        own = self._stream.fileno()
        if self.result is None:
            poll.register(own, select.POLLIN | (select.POLLOUT if self._sending else 0))
        for fd, events in (wanted or {}).items():
            poll.register(fd, events)
        left = None
        if self._deadline is not None:
            left = self._deadline - time.monotonic()
            if left <= 0:
                raise TimeoutError("timed out")
        ready = dict(poll.poll(None if left is None else int(min(left, _POLL_MAX_S) * 1000) + 1))
        events = ready.pop(own, 0)
        if events & select.POLLOUT:
            self._send()
        if events & ~select.POLLOUT:
            self._receive()
        return ready

    def _queue(self, kind: Kind, payload: bytes = b"") -> None:
        """Send a frame, or keep it until there is room."""
        self._sending += frame(kind, payload)
        self._send()

    def _send(self) -> None:
        try:
            while self._sending:
                del self._sending[: self._stream.send(self._sending)]
        except BlockingIOError:
            pass
        except OSError:  # the reason is among received data: the agent may have refused before
            self._sending.clear()

    def _receive(self) -> None:
        try:
            data = self._stream.recv(_RECEIVED_MAX)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            raise AgentError("the connection to the guest's agent has ended")
        self._frames.feed(data)
        try:
            while self.result is None and (found := self._frames.next()) is not None:
                self._understand(*found)
        except ProtocolError as err:
            text = f"the guest's agent does not keep to the protocol: {err}"
            raise AgentError(text) from None
        if self._refusal is not None:
            raise self._refusal

    def _understand(self, kind: Kind, payload: bytes) -> None:
        if (self._hello is None) != (kind is Kind.HELLO):
            raise ProtocolError(f"unexpected {kind.name}")
        match kind:
            case Kind.HELLO:
                fields = fields_of(payload)
                version = printable(text_of(fields, "version"))
                self._hello = Hello(number_of(fields, "protocol", 1 << 16), version)
                if self._hello.protocol != PROTOCOL:
                    raise AgentError("the guest's agent speaks another version of the protocol")
            case Kind.FAILED:
                fields = fields_of(payload)
                self._refusal = AgentRefusedError(
                    text_of(fields, "code"), text_of(fields, "message")
                )
            case Kind.STARTED if self._started is None:
                self._started = fields_of(payload)
            case Kind.DONE:
                self.result = fields_of(payload)
            case Kind.EXIT if self._started is not None:
                self.result = {"status": _exit_status(fields_of(payload))}
            case Kind.OUTPUT | Kind.ERRORS if self._started is not None:
                self._rooms[kind] -= len(payload)
                if self._rooms[kind] < 0:
                    raise ProtocolError("more data than there was room for")
                self._arrived[kind] += payload
            case Kind.TAKEN if len(payload) == TAKEN_BODY.size:
                channel, count = TAKEN_BODY.unpack(payload)
                if channel != Kind.INPUT or self._room + count > WINDOW:
                    raise ProtocolError("more taken than was sent")
                self._room += count
            case _:
                raise ProtocolError(f"unexpected {kind.name}")

    # For sequential operations.

    def read(self, size: int) -> bytes:
        """Return so many bytes of output, fewer only at its end, which the agent has to tell."""
        found = bytearray()
        while len(found) < size:
            data = self.take(Kind.OUTPUT, size - len(found))
            found += data
            if not data:
                if self.result is not None:
                    break
                self.wait()
        return bytes(found)

    def write(self, data: bytes) -> int:
        """Send input, as there is room for it."""
        view = memoryview(data)
        while view:
            while not self.room:
                self.wait()
            count = min(len(view), self.room)
            self.feed(bytes(view[:count]))
            view = view[count:]
        return len(data)

    def finish(self) -> Fields:
        """Wait for the end; returns the agent's final message. Output is dropped."""
        while self.result is None:
            self.wait()
            for channel in _OUTPUTS:
                self.take(channel)
        return self.result


def _exit_status(fields: Fields) -> int:
    """Return a command's exit status as in a shell."""
    if "signal" in fields:
        return 128 + number_of(fields, "signal", _SIGNAL_MAX)
    return number_of(fields, "status", _STATUS_MAX)


class Agent:
    """A guest's agent; it holds no connection."""

    def __init__(self, connect: Callable[[], socket.socket]) -> None:
        """Remember how to connect: `connect` returns a stream to the agent, or raises."""
        self._connect = connect

    def open(self, what: str, deadline: float | None = None, /, **fields: object) -> Session:
        """Begin an operation; see `Session`."""
        return Session(self._connect(), {"do": what, **fields}, deadline)

    def ping(self, *, timeout: float | None = None) -> Hello:
        """Return the agent's own description.

        Raises:
            AgentError: there is none; as of each of these methods.
            TimeoutError: there is none after `timeout` seconds.
        """
        with self.open("ping", _deadline(timeout)) as session:
            session.finish()
            return session.hello

    def run(
        self,
        arguments: Sequence[str],
        *,
        stdin: bytes = b"",
        user: str = "",
        directory: str = "",
        environment: Mapping[str, str] | None = None,
        timeout: float | None = None,
    ) -> Finished:
        """Run a command, and return its end and its output, up to OUTPUT_MAX bytes.

        Args:
            arguments: the program, looked for in PATH, and its arguments.
            stdin: its input; without any it has /dev/null.
            user: name or uid; the agent's own, root, by default.
            directory: where it runs; the user's home by default.
            environment: added to the agent's.
            timeout: seconds, after which its process group is ended.

        Raises:
            AgentRefusedError: it cannot be started.
            TimeoutError: it has not ended in time.
            CommandError: it writes too much.
        """
        with self.execute(
            arguments,
            deadline=_deadline(timeout),
            reads=bool(stdin),
            user=user,
            directory=directory,
            environment=environment,
        ) as session:
            return _collected(session, stdin)

    def execute(
        self,
        arguments: Sequence[str],
        *,
        deadline: float | None = None,
        reads: bool = False,
        user: str = "",
        directory: str = "",
        environment: Mapping[str, str] | None = None,
        terminal: tuple[int, int] | None = None,
    ) -> Session:
        """Start a command; the session has its streams. See `run` and `Session`.

        Args:
            arguments: as of `run`.
            deadline: of the monotonic clock.
            reads: whether there will be input.
            user: as of `run`.
            directory: as of `run`.
            environment: as of `run`.
            terminal: rows and columns of one that it gets.
        """
        size: dict[str, object] = {}
        if terminal is not None:
            size = {"terminal": True, "rows": terminal[0], "columns": terminal[1]}
        return self.open(
            "exec",
            deadline,
            arguments=list(arguments),
            input=reads,
            user=user,
            directory=directory,
            environment=[f"{name}={value}" for name, value in (environment or {}).items()],
            **size,
        )

    def add_entropy(self, data: bytes | None = None) -> None:
        """Have the guest's kernel mix in random bytes, 1 to 512, and reseed from them at once."""
        self._do("entropy", data=(os.urandom(64) if data is None else data).hex())

    def set_clock(self, ns: int | None = None) -> None:
        """Set the guest's clock, to nanoseconds since 1970; to this host's by default."""
        self._do("clock", ns=time.time_ns() if ns is None else ns)

    def set_identity(self, *, machine_id: str = "", host_name: str = "") -> None:
        """Give the guest a machine-id, 32 hexadecimal digits, or a host name, or both."""
        self._do("identity", machine_id=machine_id, host_name=host_name)

    def renew(self, *, machine_id: str, host_name: str, deadline: float) -> None:
        """Do all three of these at once, by `deadline` of the monotonic clock: for a clone.

        Raises:
            AgentRefusedError: one of them is refused: the clone must not go on.
            TimeoutError: it has not answered by then.
        """
        data, now = os.urandom(64).hex(), time.time_ns()
        with self.open(
            "renew", deadline, data=data, ns=now, machine_id=machine_id, host_name=host_name
        ) as session:
            session.finish()

    def wait_for(
        self,
        *,
        file: str | None = None,
        port: int | None = None,
        unit: str | None = None,
        timeout: float = 60.0,
    ) -> None:
        """Wait until a file exists, a TCP port is listened on, or a unit of systemd is active.

        Raises:
            TimeoutError: none of it in time.
        """
        wanted = {"file": file, "port": port, "unit": unit}
        deadline = time.monotonic() + timeout
        for kind, what in wanted.items():
            if what is None:
                continue
            left = max(0.0, deadline - time.monotonic())
            fields = {"for": kind, "what": str(what), "timeout_ms": int(left * 1000)}
            try:
                # The agent begins at once, so its own time limit ends the wait.
                with self.open("wait", deadline + ANSWER_S, **fields) as session:
                    session.finish()
            except AgentRefusedError as err:
                if err.code == "timeout":
                    raise TimeoutError(str(err)) from None
                raise

    def _do(self, what: str, /, **fields: object) -> None:
        with self.open(what, time.monotonic() + ANSWER_S, **fields) as session:
            session.finish()


def _deadline(timeout: float | None) -> float | None:
    return None if timeout is None else time.monotonic() + timeout


def _collected(session: Session, stdin: bytes) -> Finished:
    """Feed and read a command to its end."""
    kept: dict[Kind, bytearray] = {channel: bytearray() for channel in _OUTPUTS}
    left = memoryview(stdin)
    while True:
        if left and session.room:
            count = min(len(left), session.room)
            session.feed(bytes(left[:count]))
            left = left[count:]
            if not left:
                session.end_input()
        for channel, data in kept.items():
            data.extend(session.take(channel))
            if len(data) > OUTPUT_MAX:
                raise CommandError("the command writes too much")
        if session.result is not None:
            break
        session.wait()
    return Finished(session.result["status"], bytes(kept[Kind.OUTPUT]), bytes(kept[Kind.ERRORS]))
