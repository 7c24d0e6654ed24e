#!/usr/bin/env python3
"""vmm-agent: run commands and copy files in this guest, for the host, over virtio-vsock.

usage: vmm-agent [--port number | --unix path | --fd number]

One file for Python 3.9 and later, without dependencies, because it is copied into guests. It
listens on vsock port 1024 and serves the host (CID 2) alone; with `--unix` or `--fd` any peer, for
tests and for proxies. docs/agent.md describes the protocol.

Each connection is one operation and has a process of its own. A command runs in a session of its
own: when its connection ends first, its process group gets SIGHUP, and SIGKILL after a while.
Every buffer is bounded: a sender has credit for WINDOW bytes of each channel.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import io
import json
import os
import pwd
import select
import shutil
import signal
import socket
import stat
import struct
import subprocess
import sys
import tarfile
import termios
import time
from collections.abc import Iterator, Mapping

VERSION = "1.0"
PROTOCOL = 1
PORT = 1024
HOST_CID = 2

FRAME_MAX = 256 << 10
"""Bytes of a frame after its header, at most."""
PIECE = 32 << 10
"""Bytes of data in a frame, as the agent sends them."""
WINDOW = 256 << 10
"""Bytes of a channel that may be under way: sent, and not yet acknowledged by TAKEN."""
SESSIONS_MAX = 64
REQUEST_S = 30.0
"""A connection without a request is closed after this time."""
HANGUP_S = 5.0
"""The time of a process group between SIGHUP and SIGKILL."""
DRAIN_S = 2.0
"""The time to wait for the last output of a terminal."""
CLOSE_S = 5.0
"""The time for a client to close the connection after its operation."""
POLL_S = 0.1
"""The interval in which `wait` checks its condition."""

# Kinds of frames. From the agent:
HELLO, STARTED, DONE, FAILED, EXIT = 1, 2, 3, 4, 5
# From the client:
REQUEST, WINDOW_SIZE, SIGNAL = 16, 17, 18
# Data: INPUT from the client, the others from the agent. The receiver of data sends TAKEN.
INPUT, OUTPUT, ERRORS, TAKEN = 32, 33, 34, 35

_HEADER = struct.Struct("!BI")
_TAKEN = struct.Struct("!BI")
_SIZE = struct.Struct("!HH")
_REPORT = struct.Struct("=ii")

# Source: linux/random.h
_RNDADDENTROPY = 0x40085203
_RNDRESEEDCRNG = 0x5207
_ENTROPY_MAX = 512
_SIGNAL_MAX = 64
_VMADDR_CID_ANY = 0xFFFFFFFF
_DBUS_ID = "/var/lib/dbus/machine-id"
_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


class RefusedError(Exception):
    """The operation cannot be done; `code` is for programs, `str()` for people."""

    def __init__(self, code: str, message: str) -> None:
        """Remember both."""
        super().__init__(message)
        self.code = code


class GoneError(Exception):
    """The client has closed the connection, or breaks the protocol."""


class Wire:
    """Frames over a connected stream socket, which becomes non-blocking."""

    def __init__(self, stream: socket.socket) -> None:
        """Take ownership of `stream`."""
        stream.setblocking(False)
        self.stream = stream
        self._received = bytearray()
        self._waiting = bytearray()
        self.room = {OUTPUT: WINDOW, ERRORS: WINDOW}
        """Bytes of each channel that the client has room for."""
        self._pending = WINDOW
        self._taken = 0

    @property
    def is_sending(self) -> bool:
        """Whether frames are queued."""
        return bool(self._waiting)

    def send(self, kind: int, payload: bytes = b"") -> None:
        """Send a frame, or queue it until there is room."""
        if kind in self.room:
            self.room[kind] -= len(payload)
        self._waiting += _HEADER.pack(kind, len(payload)) + payload
        self.flush()

    def say(self, kind: int, **fields: object) -> None:
        """Send a frame that holds an object."""
        self.send(kind, json.dumps(fields).encode())

    def flush(self) -> None:
        """Send queued frames, as far as there is room."""
        try:
            while self._waiting:
                del self._waiting[: self.stream.send(self._waiting)]
        except BlockingIOError:
            pass
        except OSError as err:
            raise GoneError from err

    def took(self, count: int) -> None:
        """Let the client send as many bytes of input again; TAKEN is sent now and then."""
        self._pending += count
        self._taken += count
        if self._taken >= WINDOW // 4:
            self.send(TAKEN, _TAKEN.pack(INPUT, self._taken))
            self._taken = 0

    def frames(self) -> Iterator[tuple[int, bytes]]:
        """Receive once, and yield the whole frames; TAKEN is handled here."""
        try:
            data = self.stream.recv(FRAME_MAX)
        except BlockingIOError:
            return
        except OSError as err:
            raise GoneError from err
        if not data:
            raise GoneError
        self._received += data
        while len(self._received) >= _HEADER.size:
            kind, size = _HEADER.unpack_from(self._received)
            if size > FRAME_MAX:
                raise GoneError
            end = _HEADER.size + size
            if len(self._received) < end:
                return
            payload = bytes(self._received[_HEADER.size : end])
            del self._received[:end]
            if kind == TAKEN:
                self._credit(payload)
                continue
            if kind == INPUT:
                self._pending -= size
                if self._pending < 0:
                    raise GoneError
            yield kind, payload

    def _credit(self, payload: bytes) -> None:
        if len(payload) != _TAKEN.size:
            raise GoneError
        channel, count = _TAKEN.unpack(payload)
        if channel not in self.room or self.room[channel] + count > WINDOW:
            raise GoneError
        self.room[channel] += count

    # For operations that wait for one thing after the other:

    def wait(self, until: float) -> list[tuple[int, bytes]]:
        """Wait for the socket, up to a time of the monotonic clock; returns the frames."""
        events = select.POLLIN | (select.POLLOUT if self._waiting else 0)
        ready = _poll({self.stream.fileno(): events}, until)
        self.flush()
        if ready.get(self.stream.fileno(), 0) & ~select.POLLOUT:
            return list(self.frames())
        return []

    def send_data(self, view: memoryview) -> None:
        """Send output, as the client has room for it."""
        while view:
            while not self.room[OUTPUT] or self._waiting:
                self.wait(float("inf"))
            size = min(len(view), PIECE, self.room[OUTPUT])
            self.send(OUTPUT, bytes(view[:size]))
            view = view[size:]

    def finish(self) -> None:
        """Send all that is queued, and wait for a while until the client has closed."""
        with contextlib.suppress(GoneError):
            while self._waiting:  # a client may be stopped, and continue later
                self.wait(float("inf"))
            until = time.monotonic() + CLOSE_S
            while time.monotonic() < until:
                self.wait(until)


class Input(io.BufferedIOBase):
    """The data that the client sends for an operation, as a file to read."""

    def __init__(self, wire: Wire) -> None:
        """Read from `wire`."""
        self._wire = wire
        self._data = bytearray()
        self._is_over = False

    def read(self, size: int | None = -1, /) -> bytes:
        """Return `size` bytes, fewer only at the end."""
        assert size is not None
        assert size >= 0
        while len(self._data) < size and not self._is_over:
            for kind, payload in self._wire.wait(float("inf")):
                if kind != INPUT:
                    raise GoneError
                self._is_over = not payload
                self._data += payload
        data = bytes(self._data[:size])
        del self._data[:size]
        self._wire.took(len(data))
        return data


class Output(io.BufferedIOBase):
    """The data that an operation sends, as a file to write."""

    def __init__(self, wire: Wire) -> None:
        """Write to `wire`."""
        self._wire = wire

    def write(self, data: bytes, /) -> int:  # type: ignore[override] # nothing else is written
        """Send it."""
        self._wire.send_data(memoryview(data))
        return len(data)


def _poll(wanted: Mapping[int, int], until: float) -> dict[int, int]:
    """Wait for events of descriptors, up to a time of the monotonic clock."""
    poll = select.poll()
    for fd, events in wanted.items():
        poll.register(fd, events)
    left = until - time.monotonic()
    return dict(poll.poll(None if left == float("inf") else max(0, int(left * 1000) + 1)))


# Requests


def _text(request: Mapping[str, object], name: str, default: str = "") -> str:
    value = request.get(name, default)
    if not isinstance(value, str) or "\0" in value:
        raise RefusedError("invalid", f"{name}: invalid")
    return value


def _number(request: Mapping[str, object], name: str, least: int, most: int) -> int:
    value = request.get(name)
    if type(value) is not int or not least <= value <= most:
        raise RefusedError("invalid", f"{name}: invalid")
    return value


def _texts(request: Mapping[str, object], name: str) -> list[str]:
    value = request.get(name, [])
    if not isinstance(value, list) or not all(isinstance(one, str) for one in value):
        raise RefusedError("invalid", f"{name}: invalid")
    if any("\0" in one for one in value):
        raise RefusedError("invalid", f"{name}: invalid")
    return value


def _bytes(text: str) -> bytes:
    """Return a text's bytes; surrogates stand for bytes that are no UTF-8."""
    try:
        return text.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        raise RefusedError("invalid", "not UTF-8") from None


def _shown(name: bytes) -> str:
    return name.decode("utf-8", "surrogateescape")


def _refusal(err: OSError, what: str) -> RefusedError:
    code = errno.errorcode.get(err.errno or 0, "failed")
    return RefusedError(code, f"{what}: {err.strerror or err}")


def serve(stream: socket.socket, report: int | None) -> None:
    """Do the one operation of a connection.

    `report` is a descriptor to which the process group of a command is written.
    """
    wire = Wire(stream)
    try:
        wire.say(HELLO, protocol=PROTOCOL, version=VERSION)
        request = _receive_request(wire)
        try:
            _do(wire, request, report)
        except RefusedError as err:
            wire.say(FAILED, code=err.code, message=str(err))
        wire.finish()
    except GoneError:
        pass
    finally:
        stream.close()


def _receive_request(wire: Wire) -> Mapping[str, object]:
    until = time.monotonic() + REQUEST_S
    while time.monotonic() < until:
        for kind, payload in wire.wait(until):
            try:
                request = json.loads(payload) if kind == REQUEST else None
            except (ValueError, RecursionError):
                request = None
            if not isinstance(request, dict):
                raise GoneError
            return request
    raise GoneError


def _do(wire: Wire, request: Mapping[str, object], report: int | None) -> None:
    what = _text(request, "do")
    if what == "exec":
        Command(wire, request, report).run()
    elif what == "put":
        wire.say(STARTED)
        _put(Input(wire), request)
        wire.say(DONE)
    elif what == "get":
        _get(wire, request)
        wire.say(DONE)
    elif what == "connect":
        _connect(wire, request)
        wire.say(DONE)
    elif what in _SIMPLE:
        _SIMPLE[what](request)
        wire.say(DONE)
    elif what == "wait":
        wire.say(STARTED)
        _wait(wire, request)
        wire.say(DONE)
    else:
        raise RefusedError("unknown", f"this agent cannot do '{what}'")


# Commands


class Account:
    """The user that a command runs as."""

    def __init__(self, name: str) -> None:
        """Look `name` up: a name or uid; empty for the agent's own user."""
        try:
            if not name:
                entry = pwd.getpwuid(os.getuid())
            elif name.isascii() and name.isdecimal():
                entry = pwd.getpwuid(int(name))
            else:
                entry = pwd.getpwnam(name)
        except (KeyError, OverflowError):
            if name:
                raise RefusedError("user", f"{name}: no such user") from None
            entry = pwd.struct_passwd(("root", "x", os.getuid(), os.getgid(), "", "/", "/bin/sh"))
        self.entry = entry
        self.is_other = entry.pw_uid != os.getuid()

    def become(self) -> None:
        """Give this process the user's rights."""
        if self.is_other or os.getuid() == 0:
            os.initgroups(self.entry.pw_name, self.entry.pw_gid)
            os.setgid(self.entry.pw_gid)
            os.setuid(self.entry.pw_uid)

    def environment(self) -> dict[bytes, bytes]:
        """Return the environment of a command."""
        entry = self.entry
        found = {"HOME": entry.pw_dir, "USER": entry.pw_name, "LOGNAME": entry.pw_name}
        found |= {"SHELL": entry.pw_shell or "/bin/sh", "PATH": _PATH}
        found |= {name: os.environ[name] for name in ("LANG", "TZ") if name in os.environ}
        return {name.encode(): os.fsencode(value) for name, value in found.items()}


class Command:
    """A command with its streams, in a session of its own."""

    def __init__(self, wire: Wire, request: Mapping[str, object], report: int | None) -> None:
        """Check the request; nothing starts yet."""
        self._wire = wire
        self._report = report
        self._arguments = [_bytes(one) for one in _texts(request, "arguments")]
        if not self._arguments or not self._arguments[0]:
            raise RefusedError("invalid", "arguments: there is no command")
        self._account = Account(_text(request, "user"))
        self._directory = _bytes(_text(request, "directory"))
        self._environment = self._account.environment()
        self._has_terminal = request.get("terminal") is True
        self._has_input = request.get("input") is True
        self._rows_and_columns = (0, 0)
        if self._has_terminal:
            rows, columns = (_number(request, name, 0, 0xFFFF) for name in ("rows", "columns"))
            self._rows_and_columns = (rows, columns)
        for one in _texts(request, "environment"):
            name, equals, value = _bytes(one).partition(b"=")
            if not name or not equals:
                raise RefusedError("invalid", "environment: not NAME=VALUE")
            self._environment[name] = value
        self._pid = 0
        self._status: int | None = None
        self._input: int | None = None
        self._terminal = -1
        self._outputs: dict[int, int] = {}
        self._left: dict[int, int] | None = None
        self._drain_until = float("inf")
        self._typed = bytearray()
        self._is_input_over = False
        self._is_ended = False

    def run(self) -> None:
        """Run it until the command or the connection ends."""
        woken, wakes = os.pipe()
        os.set_blocking(woken, False)
        os.set_blocking(wakes, False)
        signal.signal(signal.SIGCHLD, lambda _number, _frame: None)
        signal.signal(signal.SIGTERM, self._end)
        signal.set_wakeup_fd(wakes, warn_on_full_buffer=False)
        try:
            self._start()
            self._wire.say(STARTED, pid=self._pid)
            self._pass_on(woken)
        except GoneError:
            if self._pid:
                self._end_group()
            raise
        finally:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
        status = self._status or 0
        if os.WIFSIGNALED(status):
            self._wire.say(EXIT, signal=os.WTERMSIG(status))
        else:
            self._wire.say(EXIT, status=os.WEXITSTATUS(status))

    def _end(self, _number: int, _frame: object) -> None:
        """The agent ends: end as if the client had gone."""
        self._is_ended = True

    # From a request to a process

    def _start(self) -> None:
        theirs = self._streams()
        is_plain = not (self._has_terminal or self._account.is_other)
        self._pid = self._spawn(theirs) if is_plain else self._fork(theirs)
        if self._has_terminal:
            # The terminal hangs up when its last descriptor is closed, and many commands close
            # their streams before they end: keep one open.
            self._terminal = theirs[0]
        else:
            for fd in theirs:
                os.close(fd)
        if self._report is not None:
            os.write(self._report, _REPORT.pack(os.getpid(), self._pid))

    def _spawn(self, theirs: list[int]) -> int:
        """Start the program; returns its pid.

        A fork would copy what this process has, page by page, before the program is there.
        """
        step = "user"
        try:
            self._account.become()
            self._enter_home()
            step = "directory"
            if self._directory:
                os.chdir(self._directory)
            step = "exec"
            os.environb[b"PATH"] = self._environment[b"PATH"]  # where it is looked for
            return os.posix_spawnp(
                self._arguments[0],
                self._arguments,
                self._environment,
                file_actions=[(os.POSIX_SPAWN_DUP2, fd, to) for to, fd in enumerate(theirs)],
                setsid=True,
                setsigdef=signal.valid_signals(),
            )
        except OSError as err:
            raise self._problem(step, err.errno or errno.EINVAL) from None

    def _fork(self, theirs: list[int]) -> int:
        """Start the program with a terminal, or as another user; returns its pid."""
        told, tells = os.pipe()  # errors of the child, until it executes the program
        pid = os.fork()
        if not pid:
            self._become(theirs, tells)
        os.close(tells)
        with open(told, "rb") as reader:
            problem = reader.read()
        if problem:
            os.waitpid(pid, 0)
            step, number = problem.decode().split()
            raise self._problem(step, int(number))
        return pid

    def _problem(self, step: str, number: int) -> RefusedError:
        name = {"user": self._account.entry.pw_name, "directory": _shown(self._directory)}
        return RefusedError(
            f"{step}:{errno.errorcode.get(number, number)}",
            f"{name.get(step, _shown(self._arguments[0]))}: {os.strerror(number)}",
        )

    def _enter_home(self) -> None:
        try:
            os.chdir(self._account.entry.pw_dir)
        except OSError:
            os.chdir("/")

    def _streams(self) -> list[int]:
        """Make pipes, or a terminal; returns the child's three descriptors, to be closed here."""
        if self._has_terminal:
            ours, theirs = os.openpty()
            fcntl.ioctl(
                theirs, termios.TIOCSWINSZ, struct.pack("HHHH", *self._rows_and_columns, 0, 0)
            )
            os.set_blocking(ours, False)
            self._input = ours
            self._outputs = {ours: OUTPUT}
            return [theirs] * 3
        if self._has_input:
            first, self._input = os.pipe()
            os.set_blocking(self._input, False)
        else:
            first = os.open(os.devnull, os.O_RDONLY)
        output, second = os.pipe()
        errors, third = os.pipe()
        for fd in (output, errors):
            os.set_blocking(fd, False)
        self._outputs = {output: OUTPUT, errors: ERRORS}
        return [first, second, third]

    def _become(self, theirs: list[int], tells: int) -> None:
        """Become the program, in the child; never returns."""
        step = "exec"
        try:
            signal.set_wakeup_fd(-1)
            for number in range(1, _SIGNAL_MAX):
                with contextlib.suppress(OSError, ValueError):
                    signal.signal(number, signal.SIG_DFL)
            os.setsid()
            for to, fd in enumerate([os.dup(fd) for fd in theirs]):
                os.dup2(fd, to)
            if self._has_terminal:
                fcntl.ioctl(0, termios.TIOCSCTTY, 0)
            step = "user"
            self._account.become()
            self._enter_home()
            step = "directory"
            if self._directory:
                os.chdir(self._directory)
            step = "exec"
            os.execvpe(self._arguments[0], self._arguments, self._environment)
        except OSError as err:
            os.write(tells, f"{step} {err.errno}".encode())
        except BaseException:  # noqa: BLE001 - any error is told to the parent
            os.write(tells, f"{step} {errno.EINVAL}".encode())
        finally:
            os._exit(127)

    # Between the client and the process

    def _pass_on(self, woken: int) -> None:
        """Serve all streams until the process has ended and all its output is sent."""
        sock = self._wire.stream.fileno()
        while True:
            wanted = {woken: select.POLLIN, sock: select.POLLIN}
            if self._wire.is_sending:
                wanted[sock] |= select.POLLOUT
            else:
                for fd, channel in self._outputs.items():
                    if self._wire.room[channel]:
                        wanted[fd] = select.POLLIN
            if self._input is not None and self._typed:
                wanted[self._input] = wanted.get(self._input, 0) | select.POLLOUT
            ready = _poll(wanted, self._drain_until)
            if woken in ready:
                os.read(woken, 4096)
                self._reap()
            if self._is_ended:
                raise GoneError
            self._wire.flush()
            if ready.get(sock, 0) & ~select.POLLOUT:
                for kind, payload in self._wire.frames():
                    self._obey(kind, payload)
            if self._input is not None and ready.get(self._input, 0) & ~select.POLLIN:
                self._type()
            for fd in [fd for fd in self._outputs if ready.get(fd, 0) & ~select.POLLOUT]:
                self._read(fd)
            if self._left is not None and self._is_drained():
                return

    def _reap(self) -> None:
        if self._status is not None:
            return
        pid, status = os.waitpid(self._pid, os.WNOHANG)
        if not pid:
            return
        self._status = status
        if self._has_terminal:  # output ends with the terminal, unless other processes keep it open
            os.close(self._terminal)
            self._left = {}
            self._drain_until = time.monotonic() + DRAIN_S
            return
        # Later output of other processes that still have the pipes is not the command's.
        self._left = {}
        for fd in self._outputs:
            self._left[fd] = struct.unpack("i", fcntl.ioctl(fd, termios.FIONREAD, b"\0" * 4))[0]

    def _is_drained(self) -> bool:
        if self._has_terminal:
            if self._wire.is_sending or not self._wire.room[OUTPUT]:
                self._drain_until = time.monotonic() + DRAIN_S  # the client has not caught up
            return not self._outputs or time.monotonic() >= self._drain_until
        return not any(self._left.values()) if self._left else True

    def _read(self, fd: int) -> None:
        channel = self._outputs[fd]
        size = min(PIECE, self._wire.room[channel])
        if self._left is not None and not self._has_terminal:
            size = min(size, self._left[fd])
        if not size:
            if self._left is not None and not self._has_terminal and not self._left[fd]:
                del self._outputs[fd]
                os.close(fd)
            return
        try:
            data = os.read(fd, size)
        except BlockingIOError:
            return
        except OSError:  # the other side of a terminal is gone
            data = b""
        if not data:
            del self._outputs[fd]
            if self._left is not None:
                self._left.pop(fd, None)
            if fd == self._input:
                self._input = None
            os.close(fd)
            return
        if self._left is not None and not self._has_terminal:
            self._left[fd] -= len(data)
        if self._has_terminal and self._left is not None:
            self._drain_until = time.monotonic() + DRAIN_S
        self._wire.send(channel, data)

    def _obey(self, kind: int, payload: bytes) -> None:
        if kind == INPUT:
            if payload:
                self._typed += payload
            else:
                self._is_input_over = True
            self._type()
        elif kind == WINDOW_SIZE and len(payload) == _SIZE.size:
            if self._has_terminal and self._input is not None:
                size = struct.pack("HHHH", *_SIZE.unpack(payload), 0, 0)
                fcntl.ioctl(self._input, termios.TIOCSWINSZ, size)
        elif kind == SIGNAL and len(payload) == 1 and 1 <= payload[0] <= _SIGNAL_MAX:
            if self._status is None:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(self._pid, payload[0])
        else:
            raise GoneError

    def _type(self) -> None:
        """Write queued input to the process, as far as it takes it."""
        if self._input is None or (not self._has_terminal and not self._has_input):
            self._wire.took(len(self._typed))
            self._typed.clear()
            return
        try:
            while self._typed:
                count = os.write(self._input, self._typed[:PIECE])
                del self._typed[:count]
                self._wire.took(count)
            if not self._is_input_over:
                return
            if self._has_terminal:
                self._is_input_over = False
                end = termios.tcgetattr(self._input)[6][termios.VEOF]
                os.write(self._input, end)
                return
        except BlockingIOError:
            return
        except OSError:  # no reader is left: drop the input
            self._wire.took(len(self._typed))
            self._typed.clear()
            if self._has_terminal:
                return
        os.close(self._input)
        self._input = None

    def _end_group(self) -> None:
        """End the process group: SIGHUP, some time to clean up, SIGKILL."""
        for number, seconds in ((signal.SIGHUP, HANGUP_S), (signal.SIGKILL, HANGUP_S)):
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self._pid, number)
                os.killpg(self._pid, signal.SIGCONT)
            until = time.monotonic() + seconds
            while time.monotonic() < until:
                if self._status is None:
                    pid, status = os.waitpid(self._pid, os.WNOHANG)
                    self._status = status if pid else None
                if self._status is not None and not _is_there(self._pid):
                    return
                time.sleep(0.02)


def _is_there(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


# Files


def _put(source: Input, request: Mapping[str, object]) -> None:
    """Write a file, or a tree from a tar stream.

    `path` is the file's name, or that of a directory to put it into under `name`. `form` is `file`
    or `tar`; with `into`, members keep their names below `path`.
    """
    path, name = _bytes(_text(request, "path")), _bytes(_text(request, "name"))
    if not path:
        raise RefusedError("invalid", "path: invalid")
    try:
        if _text(request, "form") == "tar":
            is_into = request.get("into") is True
            if is_into or os.path.isdir(path):
                _unpack(source, path, None if is_into else name)
            else:
                _unpack(source, os.path.dirname(path) or b".", os.path.basename(path))
            while source.read(PIECE):
                pass
            return
        if os.path.isdir(path):
            path = os.path.join(path, os.path.basename(name))
        _write_file(source, path, _number(request, "mode", 0, 0o7777))
    except OSError as err:
        name = os.fsencode(err.filename or path).replace(_part(b""), b"")
        raise _refusal(err, _shown(name)) from None
    except tarfile.TarError as err:
        raise RefusedError("invalid", f"tar: {err}") from None


def _part(path: bytes) -> bytes:
    """Return the name of a file until it is whole."""
    return path + b".part-%d" % os.getpid()


def _write_file(source: Input, path: bytes, mode: int) -> None:
    """Write a file under another name, and rename it when it is whole."""
    if os.path.lexists(path) and not os.path.isfile(path):
        with open(path, "wb", buffering=0) as file:
            shutil.copyfileobj(source, file, PIECE)
        return
    path = os.path.realpath(path)
    part = _part(path)
    try:
        with open(part, "xb") as file:
            shutil.copyfileobj(source, file, PIECE)
            os.fchmod(file.fileno(), mode)
            if os.path.exists(path):
                before = os.stat(path)
                with contextlib.suppress(PermissionError):
                    os.fchown(file.fileno(), before.st_uid, before.st_gid)
        os.rename(part, path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(part)


def _unpack(source: Input, folder: bytes, first: bytes | None) -> None:
    """Unpack a tar stream below `folder`; `first` replaces the first part of each name."""
    with tarfile.open(fileobj=source, mode="r|", bufsize=PIECE) as archive:
        for member in archive:
            parts = [part for part in _bytes(member.name).split(b"/") if part not in {b"", b"."}]
            if b".." in parts:
                raise RefusedError("invalid", f"tar: {member.name}: leads out of the tree")
            if first is not None:
                parts[:1] = [first]
            path = os.path.join(folder, *parts)
            if member.isdir():
                with contextlib.suppress(FileExistsError):
                    os.mkdir(path)
                os.chmod(path, member.mode & 0o7777)
            elif member.issym():
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(path)
                os.symlink(_bytes(member.linkname), path)
            elif member.isreg():
                content = archive.extractfile(member)
                assert content is not None
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(path)
                with open(path, "xb") as file:
                    shutil.copyfileobj(content, file, PIECE)
                    os.fchmod(file.fileno(), member.mode & 0o7777)
                os.utime(path, (member.mtime, member.mtime))
            else:
                raise RefusedError("invalid", f"tar: {member.name}: neither file nor directory")


def _get(wire: Wire, request: Mapping[str, object]) -> None:
    """Send a file, or a tree as a tar stream."""
    path = _bytes(_text(request, "path"))
    try:
        found = os.stat(path)
        if _text(request, "form") != "tar":
            if stat.S_ISDIR(found.st_mode):
                raise RefusedError("EISDIR", f"{_shown(path)}: {os.strerror(errno.EISDIR)}")
            with open(path, "rb", buffering=0) as file:
                wire.say(STARTED, mode=stat.S_IMODE(found.st_mode))
                shutil.copyfileobj(file, Output(wire), PIECE)
            return
        wire.say(STARTED, mode=stat.S_IMODE(found.st_mode))
        path = path.rstrip(b"/") or b"/"
        name = os.path.basename(os.path.realpath(path)) or b"root"
        with tarfile.open(fileobj=Output(wire), mode="w|", bufsize=PIECE) as archive:
            _pack(archive, path, name, is_followed=True)
    except OSError as err:
        raise _refusal(err, _shown(os.fsencode(err.filename or path))) from None


def _pack(archive: tarfile.TarFile, path: bytes, name: bytes, *, is_followed: bool) -> None:
    """Add files, directories and symbolic links; leave out others, such as sockets."""
    found = os.stat(path, follow_symlinks=is_followed)
    member = tarfile.TarInfo(_shown(name))
    member.mode = stat.S_IMODE(found.st_mode)
    member.mtime = int(found.st_mtime)
    if stat.S_ISDIR(found.st_mode):
        member.type = tarfile.DIRTYPE
        archive.addfile(member)
        for one in sorted(os.listdir(path)):
            _pack(archive, path + b"/" + one, name + b"/" + one, is_followed=False)
    elif stat.S_ISLNK(found.st_mode):
        member.type = tarfile.SYMTYPE
        member.linkname = _shown(os.readlink(path))
        archive.addfile(member)
    elif stat.S_ISREG(found.st_mode):
        with open(path, "rb") as file:
            member.size = os.fstat(file.fileno()).st_size
            archive.addfile(member, file)


# TCP ports of this guest


def _connect(wire: Wire, request: Mapping[str, object]) -> None:
    """Join the connection to a TCP port of this guest, until what listens there ends it."""
    port = _number(request, "port", 1, 0xFFFF)
    with _loopback(port) as stream:
        wire.say(STARTED)
        Joint(wire, stream).run()


def _loopback(port: int) -> socket.socket:
    problem = OSError(errno.ECONNREFUSED, os.strerror(errno.ECONNREFUSED))
    for family, address in ((socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1")):
        try:
            stream = socket.socket(family)
        except OSError as err:
            problem = err
            continue
        try:
            stream.settimeout(CLOSE_S)
            stream.connect((address, port))
        except OSError as err:
            problem = err
            stream.close()
            continue
        stream.setblocking(False)
        return stream
    raise _refusal(problem, f"port {port}")


class Joint:
    """The client's stream and one of this guest, joined."""

    def __init__(self, wire: Wire, stream: socket.socket) -> None:
        """Join `wire` and `stream`, which does not block and stays the caller's."""
        self._wire = wire
        self._stream = stream
        self._waiting = bytearray()
        self._is_over = False
        """The client sends no more."""

    def run(self) -> None:
        """Pass data on until `stream` ends."""
        sock, own = self._wire.stream.fileno(), self._stream.fileno()
        while True:
            events = select.POLLOUT if self._waiting else 0
            if self._wire.is_sending:
                wanted = {sock: select.POLLIN | select.POLLOUT}
            else:
                wanted = {sock: select.POLLIN}
                events |= select.POLLIN if self._wire.room[OUTPUT] else 0
            if events:
                wanted[own] = events
            ready = _poll(wanted, float("inf"))
            self._wire.flush()
            if ready.get(sock, 0) & ~select.POLLOUT:
                for kind, payload in self._wire.frames():
                    self._obey(kind, payload)
            if self._waiting:
                self._write()
            if ready.get(own, 0) & ~select.POLLOUT and not self._read():
                return

    def _obey(self, kind: int, payload: bytes) -> None:
        if kind != INPUT or self._is_over:
            raise GoneError
        self._waiting += payload
        if not payload:
            self._is_over = True
            if not self._waiting:
                self._shut()

    def _write(self) -> None:
        try:
            count = self._stream.send(self._waiting)
        except BlockingIOError:
            return
        except OSError:  # there is no reader; the end is found when it is read
            count = len(self._waiting)
        del self._waiting[:count]
        self._wire.took(count)
        if self._is_over and not self._waiting:
            self._shut()

    def _shut(self) -> None:
        with contextlib.suppress(OSError):  # it has ended
            self._stream.shutdown(socket.SHUT_WR)

    def _read(self) -> bool:
        """Send received bytes; returns whether there may be more."""
        size = min(PIECE, self._wire.room[OUTPUT])
        if not size or self._wire.is_sending:
            return True
        try:
            data = self._stream.recv(size)
        except BlockingIOError:
            return True
        except OSError:
            return False
        if data:
            self._wire.send(OUTPUT, data)
        return bool(data)


# For clones, and `wait`


def _add_entropy(request: Mapping[str, object]) -> None:
    """Give the kernel the host's random bytes, and have it reseed at once."""
    try:
        data = bytes.fromhex(_text(request, "data"))
    except ValueError:
        raise RefusedError("invalid", "data: invalid") from None
    if not 1 <= len(data) <= _ENTROPY_MAX:
        raise RefusedError("invalid", "data: invalid")
    try:
        with open("/dev/urandom", "wb", buffering=0) as device:
            fcntl.ioctl(device, _RNDADDENTROPY, struct.pack("ii", 8 * len(data), len(data)) + data)
            fcntl.ioctl(device, _RNDRESEEDCRNG)
    except OSError as err:
        raise _refusal(err, "/dev/urandom") from None


def _set_clock(request: Mapping[str, object]) -> None:
    """Set the system's clock, to nanoseconds since 1970."""
    try:
        time.clock_settime_ns(time.CLOCK_REALTIME, _number(request, "ns", 0, (1 << 63) - 1))
    except OSError as err:
        raise _refusal(err, "clock") from None


def _set_identity(request: Mapping[str, object]) -> None:
    """Write the machine-id and the host name; an empty one stays unchanged."""
    machine, name = _text(request, "machine_id"), _text(request, "host_name")
    if machine and (len(machine) != 32 or set(machine) - set("0123456789abcdef")):
        raise RefusedError("invalid", "machine_id: invalid")
    plain = name.replace("-", "").replace(".", "")
    if name and (len(name) > 64 or not (plain.isascii() and plain.isalnum())):
        raise RefusedError("invalid", "host_name: invalid")
    try:
        if machine:
            _replace("/etc/machine-id", machine)
            if os.path.isfile(_DBUS_ID) and not os.path.islink(_DBUS_ID):
                _replace(_DBUS_ID, machine)
        if name:
            _replace("/etc/hostname", name)
            socket.sethostname(name)
    except OSError as err:
        raise _refusal(err, err.filename or "host name") from None


def _renew(request: Mapping[str, object]) -> None:
    """Do all that makes a clone another machine; what is refused leaves it half done."""
    _add_entropy(request)
    _set_clock(request)
    _set_identity(request)


def _replace(path: str, line: str) -> None:
    part = f"{path}.part-{os.getpid()}"
    with open(part, "w", encoding="utf-8") as file:
        file.write(f"{line}\n")
        file.flush()
        os.fsync(file.fileno())
        os.fchmod(file.fileno(), 0o444 if path.endswith("machine-id") else 0o644)
    os.rename(part, path)


def _nothing(_request: Mapping[str, object]) -> None:
    """Do nothing: `ping` wants only the answer."""


_SIMPLE = {
    "ping": _nothing,
    "entropy": _add_entropy,
    "clock": _set_clock,
    "identity": _set_identity,
    "renew": _renew,
}


def _wait(wire: Wire, request: Mapping[str, object]) -> None:
    """Wait until a file exists, a program listens on a TCP port, or a unit is active."""
    kind, what = _text(request, "for"), _text(request, "what")
    if kind not in {"file", "port", "unit"} or not what:
        raise RefusedError("invalid", "for: invalid")
    if kind == "port" and not (what.isascii() and what.isdecimal() and 0 < int(what) < 1 << 16):
        raise RefusedError("invalid", "what: invalid")
    until = time.monotonic() + _number(request, "timeout_ms", 0, 1 << 40) / 1000
    while not _has_come(kind, what):
        if time.monotonic() >= until:
            raise RefusedError("timeout", f"{kind} {what}: timed out")
        for _frame in wire.wait(min(until, time.monotonic() + POLL_S)):
            raise GoneError


def _has_come(kind: str, what: str) -> bool:
    if kind == "file":
        return os.path.exists(_bytes(what))
    if kind == "port":
        for family, address in ((socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1")):
            with contextlib.suppress(OSError), socket.socket(family) as probe:
                probe.settimeout(POLL_S)
                probe.connect((address, int(what)))
                return True
        return False
    try:
        done = subprocess.run(
            ["systemctl", "is-active", "--quiet", "--", what], check=False, timeout=10
        )
    except FileNotFoundError:
        raise RefusedError("failed", "there is no systemctl") from None
    except subprocess.TimeoutExpired:
        return False
    return done.returncode == 0


# Connections


class Server:
    """Accepts connections, and has a process for each."""

    def __init__(self, listener: socket.socket) -> None:
        """Accept from `listener`, which stays the caller's."""
        self._listener = listener
        self._is_vsock = listener.family == getattr(socket, "AF_VSOCK", -1)
        self._sessions: dict[int, int] = {}
        self._reported, self._report = os.pipe()
        self._woken, self._wakes = os.pipe()
        for fd in (self._reported, self._woken, self._wakes):
            os.set_blocking(fd, False)
        self._is_over = False

    def run(self) -> None:
        """Serve until SIGTERM or SIGINT."""
        signal.signal(signal.SIGCHLD, lambda _number, _frame: None)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._end)
        signal.set_wakeup_fd(self._wakes, warn_on_full_buffer=False)
        self._listener.setblocking(False)
        wanted = dict.fromkeys(
            (self._listener.fileno(), self._reported, self._woken), select.POLLIN
        )
        while not self._is_over:
            ready = _poll(wanted, float("inf"))
            if self._woken in ready:
                os.read(self._woken, 4096)
            self._note_groups()
            self._reap()
            if self._listener.fileno() in ready and not self._is_over:
                self._accept()
        for pid in self._sessions:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGTERM)

    def _end(self, _number: int, _frame: object) -> None:
        self._is_over = True

    def _note_groups(self) -> None:
        with contextlib.suppress(BlockingIOError):
            while True:
                pid, group = _REPORT.unpack(os.read(self._reported, _REPORT.size))
                if pid in self._sessions:
                    self._sessions[pid] = group

    def _reap(self) -> None:
        """Forget sessions that are over; if a session was killed, kill its command too."""
        while self._sessions:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if not pid:
                return
            self._note_groups()
            group = self._sessions.pop(pid, 0)
            if group and status:
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.killpg(group, signal.SIGKILL)

    def _accept(self) -> None:
        try:
            stream, peer = self._listener.accept()
        except OSError as err:
            if err.errno in {errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS}:
                time.sleep(POLL_S)
            return
        with stream:
            # Processes of this guest can reach a vsock listener too, by CID 1.
            if self._is_vsock and peer[0] != HOST_CID:
                return
            if len(self._sessions) >= SESSIONS_MAX:
                self._refuse(stream, "busy", "too many operations at a time")
                return
            try:
                pid = os.fork()
            except OSError as err:
                self._refuse(stream, "busy", f"fork: {err.strerror}")
                return
            if pid:
                self._sessions[pid] = 0
                return
            status = 1
            try:
                signal.set_wakeup_fd(-1)
                for number in (signal.SIGTERM, signal.SIGINT, signal.SIGCHLD):
                    signal.signal(number, signal.SIG_DFL)
                self._listener.close()
                serve(stream, self._report)
                status = 0
            except Exception:  # noqa: BLE001 - the log's, and the end of this connection alone
                sys.excepthook(*sys.exc_info())
            finally:
                sys.stderr.flush()
                os._exit(status)

    def _refuse(self, stream: socket.socket, code: str, message: str) -> None:
        with contextlib.suppress(GoneError):
            wire = Wire(stream)
            wire.say(HELLO, protocol=PROTOCOL, version=VERSION)
            wire.say(FAILED, code=code, message=message)


def _tell(line: str) -> None:
    """Write a message, which is lost if standard error cannot be written."""
    with contextlib.suppress(OSError):
        os.write(2, f"{line}\n".encode(errors="surrogateescape"))


def _usage() -> int:
    _tell("usage: vmm-agent [--port number | --unix path | --fd number]")
    return 2


def main(arguments: list[str] | None = None) -> int:
    """Serve; returns the exit status."""
    words = sys.argv[1:] if arguments is None else arguments
    if len(words) not in {0, 2} or (words and words[0] not in {"--port", "--unix", "--fd"}):
        return _usage()
    while os.open(os.devnull, os.O_RDWR) <= 2:
        pass  # else a connection becomes a standard stream
    kind, value = words or ("--port", str(PORT))
    if kind != "--unix" and not value.isdecimal():
        return _usage()
    try:
        if kind == "--fd":
            stream = socket.socket(fileno=int(value))
            stream.set_inheritable(False)
            if not stream.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
                serve(stream, None)
                return 0
            listener = stream
        elif kind == "--unix":
            listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            before = os.umask(0o177)
            listener.bind(value)
            os.umask(before)
        else:
            listener = socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM)
            listener.bind((_VMADDR_CID_ANY, int(value)))
        listener.listen(SESSIONS_MAX)
    except OSError as err:
        _tell(f"vmm-agent: {kind} {value}: {err.strerror or err}")
        return 1
    _load_databases()
    with listener:
        Server(listener).run()
    return 0


def _load_databases() -> None:
    """Have the C library load what looks up users and groups: else each command's process does."""
    entry = Account("").entry
    os.getgrouplist(entry.pw_name, entry.pw_gid)


if __name__ == "__main__":
    sys.exit(main())
