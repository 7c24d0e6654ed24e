"""Where the daemon's messages go: standard error, the journal, or syslog.

Every process inherits the descriptor that it writes to, so it needs no file and no socket of its
own. A line begins with the process's title: `vmm: started`, `vm/alpine: ...`. Verbosity is
OpenBSD's: 0 and 1 show what happens, 2 also what helps to find out why.

Source: section 5.1 of OpenBSD's behaviour; sd-daemon(3), RFC 3164.
"""

import logging
import os
import socket
import sys
from contextlib import suppress
from enum import Enum

VERBOSE = 2
"""From here on, debugging messages are logged."""

_DEV_LOG = "/dev/log"
_FACILITY_DAEMON = 3 << 3
_LINE_MAX = 8192
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
    SYSLOG = "syslog"


class _Descriptor(logging.Handler):
    """Writes each message to a descriptor by one call."""

    def __init__(self, fd: int, sink: Sink) -> None:
        super().__init__()
        self.fd = fd
        self.sink = sink
        self.title = "vmd"

    def emit(self, record: logging.LogRecord) -> None:
        """Write a message; what cannot be written is lost."""
        try:
            text = self.format(record)
        except Exception:  # noqa: BLE001 - as logging does: a bad message must not end a process
            text = f"unformattable message {record.msg!r}"
        priority = next((value for level, value in _PRIORITIES if record.levelno >= level), 7)
        with suppress(OSError):
            if self.sink is Sink.SYSLOG:
                head = f"<{_FACILITY_DAEMON | priority}>vmd[{os.getpid()}]: {self.title}: "
                for line in text.splitlines():
                    os.write(self.fd, (head + line).encode(errors="replace")[:_LINE_MAX])
                return
            head = f"<{priority}>" if self.sink is Sink.JOURNAL else ""
            lines = "".join(f"{head}{self.title}: {line}\n" for line in text.splitlines())
            os.write(self.fd, lines.encode(errors="replace"))


_handler = _Descriptor(2, Sink.STDERR)


def open_log(*, is_foreground: bool) -> None:
    """Choose where messages go: standard error in the foreground, else syslog.

    Raises:
        OSError: nobody reads `/dev/log`; messages go to standard error then.
    """
    root = logging.getLogger()
    if _handler not in root.handlers:
        root.addHandler(_handler)
    if is_foreground:
        _handler.fd = 2
        _handler.sink = Sink.JOURNAL if _is_journal() else Sink.STDERR
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock:
        sock.connect(_DEV_LOG)
        _handler.fd, _handler.sink = sock.detach(), Sink.SYSLOG


def set_verbosity(level: int) -> None:
    """Log more or less from now on: 0 or 1, or 2 and above for debugging messages too."""
    logging.getLogger().setLevel(logging.DEBUG if level >= VERBOSE else logging.INFO)


def set_title(title: str) -> None:
    """Name this process in its messages."""
    _handler.title = title


def log_fd() -> int:
    """Return the descriptor that messages are written to, which every process keeps."""
    return _handler.fd


def _is_journal() -> bool:
    """Tell whether standard error is the journal's, as systemd says it is."""
    try:
        status = os.fstat(sys.stderr.fileno())
    except (OSError, ValueError, AttributeError):
        return False
    return os.environ.get("JOURNAL_STREAM") == f"{status.st_dev}:{status.st_ino}"
