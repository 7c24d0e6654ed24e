"""`vmctl exec`: a command in a guest, its streams and exit status as if it ran here.

By the guest's agent (docs/agent.md). It buffers only a window of each stream: a slow reader slows
the command down.
"""

import fcntl
import os
import signal
import stat
import struct
import termios
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from select import POLLIN, POLLOUT

from vmctl.client import CommandError
from vmctl.guest.access import agent_of
from vmctl.guest.agent import Agent, AgentRefusedError, Session
from vmctl.guest.frames import Kind
from vmctl.messages import fail
from vmctl.moment import seconds_in
from vmctl.report import EXIT_TIMEOUT
from vmctl.screen.console import RawTerminal
from vmctl.screen.terminal import TerminalState
from vmctl.signals import cleaning_up
from vmm_kvm.standard_streams import OutputError

EXIT_NO_CONNECTION = 255
EXIT_REFUSED = 125
"""As of env(1): the command could not be started."""
EXIT_CANNOT_EXECUTE = 126
EXIT_NOT_FOUND = 127

_PIPE_BUF = 4096
"""poll promises this much room: a write of this size never blocks."""
_FILE_WRITE = 64 << 10
_READ_MAX = 32 << 10
_DEFAULT_SIZE = (24, 80)


def execute(
    words: Sequence[str],
    *,
    interactive: bool = False,
    terminal: bool = False,
    user: str = "",
    directory: str = "",
    environment: Sequence[str] = (),
    timeout: str | None = None,
) -> int | None:
    """Run a command in a guest; returns its exit status, or one of those above."""
    name, *command = words
    try:
        deadline = _deadline(timeout)
        added = _variables(environment)
    except CommandError as err:
        fail(err)
        return EXIT_NO_CONNECTION
    return execute_by(
        agent_of(name, deadline),
        command,
        deadline=deadline,
        interactive=interactive,
        user=user,
        directory=directory,
        environment=added,
        terminal=terminal,
    )


def execute_by(
    agent: Agent,
    command: Sequence[str],
    *,
    deadline: float | None = None,
    interactive: bool = False,
    terminal: bool = False,
    user: str = "",
    directory: str = "",
    environment: Mapping[str, str],
) -> int:
    """Run a command by an agent, its streams ours; returns its exit status, or one of the above.

    `deadline` is of the monotonic clock.
    """
    added = dict(environment)
    if terminal:
        added.setdefault("TERM", os.environ.get("TERM", "dumb"))
    try:
        with agent.execute(
            command,
            deadline=deadline,
            reads=interactive,
            user=user,
            directory=directory,
            environment=added,
            terminal=_terminal_size() if terminal else None,
        ) as session:
            return _Streams(session, reads_input=interactive, has_terminal=terminal).run()
    except AgentRefusedError as err:
        fail(err)
        return _status_of(err.code)
    except TimeoutError:
        fail("timed out")
        return EXIT_TIMEOUT
    except CommandError as err:
        fail(err)
        return EXIT_NO_CONNECTION


def _status_of(code: str) -> int:
    step, _, error = code.partition(":")
    if step != "exec":
        return EXIT_REFUSED
    return EXIT_NOT_FOUND if error in {"ENOENT", "ENOTDIR"} else EXIT_CANNOT_EXECUTE


def _deadline(timeout: str | None) -> float | None:
    if timeout is None:
        return None
    seconds = seconds_in(timeout)
    if seconds is None:
        raise CommandError(f"invalid time-out: {timeout}: not a number of seconds")
    return time.monotonic() + seconds


def _variables(words: Sequence[str]) -> dict[str, str]:
    """Read NAME=VALUE, or NAME alone, whose value is this environment's."""
    found = {}
    for word in words:
        name, equals, value = word.partition("=")
        if not name:
            raise CommandError(f"invalid variable: {word}")
        if equals:
            found[name] = value
        elif name in os.environ:
            found[name] = os.environ[name]
    return found


def _terminal_size() -> tuple[int, int]:
    """Return the rows and columns of the terminal here, or the usual ones."""
    for fd in (1, 0, 2):
        with suppress(OSError):
            rows, columns = struct.unpack("HHHH", fcntl.ioctl(fd, termios.TIOCGWINSZ, bytes(8)))[:2]
            if rows and columns:
                return rows, columns
    return _DEFAULT_SIZE


class _Streams:
    """A command's streams, joined to ours."""

    def __init__(self, session: Session, *, reads_input: bool, has_terminal: bool) -> None:
        """Prepare; see `run`. The session stays the caller's."""
        self._session = session
        self._reads_input = reads_input
        self._has_terminal = has_terminal
        self._state = TerminalState() if has_terminal and os.isatty(1) else None
        self._outputs = {Kind.OUTPUT: 1, Kind.ERRORS: 2}
        self._sizes = {
            fd: _FILE_WRITE if stat.S_ISREG(os.fstat(fd).st_mode) else _PIPE_BUF
            for fd in self._outputs.values()
        }

    def run(self) -> int:
        """Pass data on until all is written; returns the command's exit status."""
        with cleaning_up(), ExitStack() as stack:
            resized = stack.enter_context(_resizes()) if self._has_terminal else -1
            if self._has_terminal and self._reads_input and os.isatty(0):
                stack.enter_context(RawTerminal(0))
            if self._state:
                stack.callback(self._restore_screen)
            while not self._is_over():
                ready = self._session.wait(self._wanted(resized))
                if resized >= 0 and _has_come(resized):
                    self._session.resize(*_terminal_size())
                if 0 in ready:
                    self._read()
                for channel, fd in self._outputs.items():
                    if fd in ready:
                        self._write(channel, fd)
        assert self._session.result is not None
        status: int = self._session.result["status"]
        return status

    def _is_over(self) -> bool:
        has_arrived = any(self._session.arrived(channel) for channel in self._outputs)
        return self._session.result is not None and not has_arrived

    def _wanted(self, resized: int) -> dict[int, int]:
        wanted = {
            fd: POLLOUT for channel, fd in self._outputs.items() if self._session.arrived(channel)
        }
        if self._session.result is None:
            if self._reads_input and self._session.room:
                wanted[0] = POLLIN
            if resized >= 0:
                wanted[resized] = POLLIN
        return wanted

    def _read(self) -> None:
        try:
            data = os.read(0, min(_READ_MAX, self._session.room))
        except BlockingIOError:
            return
        except OSError:  # a terminal that hung up, or no standard input that can be read
            data = b""
        if data:
            self._session.feed(data)
        else:
            self._reads_input = False
            self._session.end_input()

    def _write(self, channel: Kind, fd: int) -> None:
        data = self._session.peek(channel, self._sizes[fd])
        if self._state and fd == 1:
            self._state.note(data)  # first: a signal may come in between
        try:
            count = os.write(fd, data)
            while self._state and fd == 1 and count < len(data):
                count += os.write(fd, data[count:])
        except BlockingIOError:  # another program made a shared descriptor non-blocking
            return
        except OSError as err:
            if fd == 1:
                raise OutputError from err
            count = len(data)  # there is no reader
        self._session.take(channel, count)

    def _restore_screen(self) -> None:
        """Undo the command's changes to the terminal that shows it."""
        if self._state:
            with suppress(OSError):  # it has hung up: no reader is left
                os.write(1, self._state.restore().removesuffix(b"\r\n"))


def _has_come(told: int) -> bool:
    """Tell whether the size has changed, also since the last poll: it is sent before input."""
    try:
        return bool(os.read(told, _READ_MAX))
    except BlockingIOError:
        return False


@contextmanager
def _resizes() -> Iterator[int]:
    """Yield a descriptor that becomes readable when this terminal's size changes."""
    told, tells = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
    before = signal.signal(signal.SIGWINCH, lambda _number, _frame: None)
    fd_before = signal.set_wakeup_fd(tells, warn_on_full_buffer=False)
    try:
        yield told
    finally:
        signal.set_wakeup_fd(fd_before)
        signal.signal(signal.SIGWINCH, before)
        os.close(told)
        os.close(tells)
