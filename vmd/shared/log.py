"""The daemon's log: to standard error, the journal, or syslog.

Every process inherits the descriptor that it writes to, so it needs no file and no socket of its
own. A line begins with the process's title: `vmm: started`, `vm/alpine: ...`. Verbosity is
OpenBSD's: 0 and 1 show events, 2 also debugging messages.

A message is one line, whatever it contains. A log without a reader blocks no process, and one
source of messages leaves room for others.

Where the journal reads standard error, messages go to its own socket, with fields by which they
can be found: `VM`, `UID` of the user who has asked, `REQUEST`. Without that socket they are lines.

Source: section 5.1 of OpenBSD's behaviour; sd-daemon(3), RFC 3164, systemd's Native Journal
Protocol.
"""

import logging
import os
import select
import socket
import stat
import sys
import threading
import time
import traceback
from collections import deque
from contextlib import suppress
from enum import Enum
from typing import NamedTuple

from vmm_kvm.loop import EventLoop
from vmm_kvm.text import printable

KEPT_MAX = 64 << 10
"""Bytes of lines that a process keeps while the log is not read; further lines are lost, and
counted."""
LINES_AT_ONCE = 100
"""Lines of one source: one user's requests, or one kind of message."""
LINES_PER_S = 10
SOURCES_MAX = 1000
VERBOSE = 2
"""From here on, debugging messages are logged."""

_DEV_LOG = "/dev/log"
_JOURNAL = "/run/systemd/journal/socket"
_FIELDS = {"vm": "VM", "uid": "UID", "request": "REQUEST"}
"""Fields of the journal, by the attributes of records that have them."""
_VM_TITLE = "vm/"
"""The title of a VM's process, before its name."""
_ABOUT_VM = "vm/%s"
"""The beginning of messages about a VM; its name is their first argument."""
_FACILITY_DAEMON = 3 << 3
_LINE_MAX = 4096  # a pipe takes as many bytes as a whole
_WARNING = 4
_OURS = ("vmd", "vmm_kvm")  # not the debugging messages of libraries
# Priorities of syslog(3), for levels of at least so much.
_PRIORITIES = (
    (logging.CRITICAL, 2),
    (logging.ERROR, 3),
    (logging.WARNING, 4),
    (logging.INFO, 6),
    (logging.DEBUG, 7),
)


class Sink(Enum):
    """Kinds of places that messages go to."""

    STDERR = "standard error"
    JOURNAL = "standard error, which the journal reads"
    NATIVE = "the journal's socket"
    SYSLOG = "syslog"


class _Descriptor(logging.Handler):
    """Writes each message to a descriptor by one call, and never blocks.

    Messages that the reader has no room for are kept, up to a limit; lost ones are counted and
    reported.
    """

    def __init__(self, fd: int, sink: Sink) -> None:
        super().__init__()
        self.fd = fd
        self.sink = sink
        self.title = "vmd"
        self._socket: socket.socket | None = None
        self._must_poll = False
        self._kept: deque[bytes] = deque()
        self._kept_size = 0
        self._lost = 0
        self._loop: EventLoop | None = None
        self._shares: dict[str, _Share] = {}

    def open(self, fd: int, sink: Sink) -> None:
        """Write to `fd` from now on, in a way that does not block; it stays open."""
        if self._socket:
            self._socket.detach()
        self.fd, self.sink = fd, sink
        self._socket, self._must_poll = None, False
        kind = os.fstat(fd).st_mode
        if stat.S_ISSOCK(kind):
            # Its flags are shared by all who have it, so each packet itself asks not to wait.
            self._socket = socket.socket(fileno=fd)
        elif not stat.S_ISREG(kind):
            flags = os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
            try:  # another file description, with flags of its own
                self.fd = os.open(f"/proc/self/fd/{fd}", flags)
            except OSError:
                self._must_poll = True

    def forget(self) -> None:
        """Become the log of a forked process: the other one writes the kept messages."""
        self._loop = None
        self._kept.clear()
        self._kept_size = self._lost = 0

    def follow(self, loop: EventLoop | None) -> None:
        """Have `loop` write kept messages as soon as there is room."""
        with self._guard():
            if self._loop and self._kept:
                self._loop.remove_writer(self.fd)
            self._loop = loop
            if loop and self._kept:
                loop.call_soon(self._wait_for_room)

    def emit(self, record: logging.LogRecord) -> None:
        """Write a message, or keep it; one message is one line, but for a traceback's."""
        share = self._share(record)
        if share is not None and not share.take():
            return
        left_out = "" if share is None else share.told()
        try:
            text = printable(record.getMessage())
        except Exception:  # noqa: BLE001 - as logging does: a bad message must not end a process
            text = f"unformattable message {record.msg!r}"
        lines = [*([left_out] if left_out else []), text]
        if record.exc_info and record.exc_info[0] is not None:
            trace = traceback.format_exception(*record.exc_info)
            lines += [printable(line) for line in "".join(trace).splitlines()]
        priority = next((value for level, value in _PRIORITIES if record.levelno >= level), 7)
        fields = self._fields(record) if self.sink is Sink.NATIVE else ""
        for line in lines:
            self._say(line, priority, fields)

    def _guard(self) -> threading.RLock:
        assert self.lock is not None
        return self.lock

    def _share(self, record: logging.LogRecord) -> "_Share | None":
        """Return the remaining share of a message's source; None: unlimited."""
        if record.levelno < logging.INFO:
            return None
        source = getattr(record, "source", "") or str(record.msg)
        share = self._shares.get(source)
        if share is None:
            if len(self._shares) >= SOURCES_MAX:
                del self._shares[next(iter(self._shares))]
            share = self._shares[source] = _Share(source)
        return share

    def _fields(self, record: logging.LogRecord) -> str:
        """Return the fields that a message has besides its text."""
        found = {name: getattr(record, name, "") for name in _FIELDS}
        if found["vm"] == "" and str(record.msg).startswith(_ABOUT_VM) and record.args:
            found["vm"] = record.args[0] if isinstance(record.args, tuple) else ""
        if found["vm"] == "" and self.title.startswith(_VM_TITLE):
            found["vm"] = self.title.removeprefix(_VM_TITLE)
        return "".join(
            f"{_FIELDS[name]}={printable(str(value))}\n"
            for name, value in found.items()
            if value != ""
        )

    def _say(self, line: str, priority: int, fields: str = "") -> None:
        if self.sink is Sink.NATIVE:
            head = f"PRIORITY={priority}\nSYSLOG_IDENTIFIER=vmd\n{fields}MESSAGE={self.title}: "
            text = f"{head}{line}"
            data = text.encode(errors="replace")[: _LINE_MAX - 1] + b"\n"
        elif self.sink is Sink.SYSLOG:
            text = f"<{_FACILITY_DAEMON | priority}>vmd[{os.getpid()}]: {self.title}: {line}"
            data = text.encode(errors="replace")[:_LINE_MAX]
        else:
            head = f"<{priority}>" if self.sink is Sink.JOURNAL else ""
            text = f"{head}{self.title}: {line}"
            data = text.encode(errors="replace")[: _LINE_MAX - 1] + b"\n"
        self._flush()
        if self._kept or not self._write(data):
            self._keep(data)

    def _keep(self, data: bytes) -> None:
        if self._kept_size + len(data) > KEPT_MAX:
            self._lost += 1
            return
        self._kept.append(data)
        self._kept_size += len(data)
        if self._loop and len(self._kept) == 1:
            self._loop.call_soon(self._wait_for_room)

    def _wait_for_room(self) -> None:
        with self._guard():
            if self._loop and self._kept:
                self._loop.add_writer(self.fd, self._room)

    def _room(self) -> None:
        with self._guard():
            self._flush()
            if self._loop and not self._kept:
                self._loop.remove_writer(self.fd)

    def _flush(self) -> None:
        while self._kept and self._write(self._kept[0]):
            self._kept_size -= len(self._kept.popleft())
        if self._lost and not self._kept:
            lost, self._lost = self._lost, 0
            self._say(f"{lost} lines lost: nobody read the log", _WARNING)

    def _write(self, data: bytes) -> bool:
        """Write a line, whole or not at all; False if there is no room for it now."""
        try:
            if self._socket:
                self._socket.sendmsg([data], [], socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
            elif not self._must_poll or self._has_room():
                os.write(self.fd, data)
            else:
                return False
        except BlockingIOError:
            return False
        except OSError:  # no reader will come
            return True
        return True

    def _has_room(self) -> bool:
        poll = select.poll()
        poll.register(self.fd, select.POLLOUT)
        return bool(poll.poll(0))


class _Share:
    """The share of one source: a burst of lines, then a number a second."""

    def __init__(self, source: str) -> None:
        self._source = source
        self._lines = float(LINES_AT_ONCE)
        self._at = time.monotonic()
        self._left_out = 0

    def take(self) -> bool:
        """Return whether it may say one more line now."""
        now = time.monotonic()
        self._lines = min(LINES_AT_ONCE, self._lines + (now - self._at) * LINES_PER_S)
        self._at = now
        if self._lines < 1:
            self._left_out += 1
            return False
        self._lines -= 1
        return True

    def told(self) -> str:
        """Return how many lines were left out since the source's last one; empty for none."""
        left_out, self._left_out = self._left_out, 0
        return f"{left_out} lines left out: {printable(self._source)}" if left_out else ""


_handler = _Descriptor(2, Sink.STDERR)


def open_log(*, is_foreground: bool) -> None:
    """Choose the destination of messages: standard error in the foreground, else syslog.

    Raises:
        OSError: `/dev/log` has no reader; messages go to standard error then.
    """
    root = logging.getLogger()
    if _handler not in root.handlers:
        root.addHandler(_handler)
    if is_foreground:
        _handler.open(2, Sink.JOURNAL if _is_journal() else Sink.STDERR)
        if _handler.sink is Sink.JOURNAL:
            with suppress(OSError):  # an old journal, or none that this root directory shows
                _connect(_JOURNAL, Sink.NATIVE)
        return
    _connect(_DEV_LOG, Sink.SYSLOG)


def _connect(path: str, sink: Sink) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock:
        sock.connect(path)
        _handler.open(sock.detach(), sink)


def set_verbosity(level: int) -> None:
    """Set the verbosity: 0 or 1, or 2 and above for debugging messages too."""
    logging.getLogger().setLevel(logging.INFO)
    for name in _OURS:
        logging.getLogger(name).setLevel(logging.DEBUG if level >= VERBOSE else logging.INFO)


def place() -> tuple[int, Sink, int]:
    """Return where messages go, and how much is logged, for a process that takes our place."""
    return _handler.fd, _handler.sink, logging.getLogger(_OURS[0]).level


def resume(fd: int, sink: Sink, level: int) -> None:
    """Log as the process did whose place this one has taken, by what its `place` said."""
    logging.getLogger().addHandler(_handler)
    logging.getLogger().setLevel(logging.INFO)
    _handler.open(fd, sink)
    for name in _OURS:
        logging.getLogger(name).setLevel(level)


def forked() -> None:
    """Start afresh in a process that was just forked, before it logs anything."""
    _handler.forget()


def follow(loop: EventLoop | None) -> None:
    """Have `loop`, this process's, write kept messages; None before it closes."""
    _handler.follow(loop)


class Asked(NamedTuple):
    """A request, as the log tells of it."""

    source: str
    """The user whose share of the log it takes."""
    uid: int
    request: str
    vm: str = ""
    """The VM that it names, if it does."""


def tell(asked: Asked, message: str, *arguments: object) -> None:
    """Log the result of a request."""
    logging.getLogger(__name__).info(message, *arguments, extra=asked._asdict())


def tell_of(vm: str, message: str, *arguments: object, is_bad: bool = False) -> None:
    """Log an event of a VM, if the message begins with something else than `vm/%s`."""
    level = logging.WARNING if is_bad else logging.INFO
    logging.getLogger(__name__).log(level, message, *arguments, extra={"vm": vm})


def set_title(title: str) -> None:
    """Name this process in its messages."""
    _handler.title = title


def log_fd() -> int:
    """Return the descriptor that messages are written to, which every process keeps."""
    return _handler.fd


def _is_journal() -> bool:
    """Tell whether standard error is the journal's, according to systemd."""
    try:
        status = os.fstat(sys.stderr.fileno())
    except (OSError, ValueError, AttributeError):
        return False
    return os.environ.get("JOURNAL_STREAM") == f"{status.st_dev}:{status.st_ino}"
