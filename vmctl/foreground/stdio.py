"""The console of a foreground VM: standard input and output, as a terminal or a byte pipe.

Nothing is lost: all of the guest's output is on standard output before the process ends, and a slow
reader slows the guest down. Neither the end of standard input nor a standard output that cannot be
written is the end of the VM; that of a terminal is.
"""

import os
import stat
import sys
from collections import deque
from typing import TYPE_CHECKING, Protocol

from vmm_kvm.loop import EventLoop

if TYPE_CHECKING:  # loaded where there is a terminal
    from vmctl.screen.console import Escape, EscapeParser, RawTerminal
    from vmctl.screen.terminal import TerminalState

_BATCH_NS = 3_000_000  # how long a byte may wait for others to be written with
_READ_SIZE = 4096
_WRITE_SIZE = 4096  # poll promises room for PIPE_BUF bytes: a write of this size never blocks
_BACKLOG_HIGH = 64 * 1024
_BACKLOG_LOW = 16 * 1024


class Guest(Protocol):
    """The VM, as far as the console needs it; called on the loop's thread."""

    def receive(self, data: bytes) -> int:
        """Take input; return how many bytes were taken."""

    def receive_break(self) -> None:
        """Take a BREAK."""

    def throttle(self, hold: bool) -> None:
        """Hold the vCPUs while output waits for its reader, or release them."""

    def quit(self, reason: str | None) -> None:
        """End the VM at once: the user asked (None), or the terminal is gone (`reason`)."""


class Stdio:
    """Connects a guest's serial port to this process's standard input and output.

    `transmit` may be called on any thread, all else on the loop's. The descriptors stay open.
    """

    def __init__(
        self,
        loop: EventLoop,
        guest: Guest,
        stdin: int = 0,
        stdout: int = 1,
        log: int | None = None,
    ) -> None:
        """Prepare; see `start`. The guest's output goes to the descriptor `log` too."""
        self._log = log
        self.leaves_line_open = False
        """Whether a pipe's output does not end with the end of a line."""
        self._loop = loop
        self._guest = guest
        self._stdin = stdin
        self._stdout = stdout
        self._written: deque[bytes] = deque()
        self._is_armed = False
        self._timer = loop.timer(self._collect)
        self._backlog = bytearray()
        self._typed = bytearray()
        self._is_throttled = False
        self._is_waiting = False
        self.is_closed = False
        """Whether standard output could not be written."""
        self._reads_directly = False
        self._is_held = False
        self._parser: EscapeParser | None = None
        self._terminal: RawTerminal | None = None
        self._state: TerminalState | None = None
        if os.isatty(stdin) and os.isatty(stdout):
            from vmctl.screen import console  # noqa: PLC0415 - not for pipes

            self._parser = console.EscapeParser()
            self._terminal = console.RawTerminal(stdin)

    def start(self) -> None:
        """Begin to read; a terminal becomes raw."""
        if self._terminal:
            self._terminal.__enter__()
        if not self._loop.add_reader(self._stdin, self._read):
            self._reads_directly = True
            self._loop.call_soon(self.feed)
        # A pipe reports at once that its reader is gone, even if nothing is written.
        if stat.S_ISFIFO(os.fstat(self._stdout).st_mode) and self._stdin != self._stdout:
            self._loop.add_reader(self._stdout, self._reader_left)

    def finish(self, discard: bool) -> None:
        """Write pending output, unless `discard`, and restore the terminal; idempotent."""
        self._loop.remove_reader(self._stdin)
        self._loop.remove_reader(self._stdout)
        self._loop.remove_writer(self._stdout)
        if self._terminal:
            self._terminal.__exit__()
            self._terminal = None
        while self._written:
            self._take(self._written.popleft())
        if discard:
            self._backlog.clear()
        if self._state:  # the guest's changes to the terminal, which it shares with the shell
            self._backlog += self._state.restore()
            self._state = None
        try:
            while self._backlog and not self.is_closed:
                del self._backlog[: os.write(self._stdout, self._backlog)]
        except OSError as err:
            self._close(err)

    # Output

    def tell(self, line: str) -> None:
        """Print a line for the user on standard error, in the midst of the console's output."""
        if self._parser:
            sys.stderr.write(f"\r\n{line}\r\n")
        else:
            print(line, file=sys.stderr)

    def transmit(self, data: bytes) -> None:
        """Take the guest's output; any thread, never blocks."""
        if self.is_closed and self._log is None:
            return
        self._written.append(data)
        if not self._is_armed:
            self._is_armed = True
            self._timer.arm(self._loop.monotonic_ns() + _BATCH_NS)

    def _collect(self) -> None:
        self._is_armed = False  # before the look: a byte that comes now arms the timer again
        while self._written:
            self._take(self._written.popleft())
        self._write()
        self._throttle()  # the reader may take nothing at all

    def _take(self, data: bytes) -> None:
        """Write the guest's output to its target."""
        self._record(data)
        if not self.is_closed:
            self.leaves_line_open = not self._parser and not data.endswith(b"\n")
            self._note(data)
            self._backlog += data

    def _record(self, data: bytes) -> None:
        """Write to the log; a failure is reported once, and ends nothing."""
        view = memoryview(data)
        while view and self._log is not None:
            try:
                view = view[os.write(self._log, view) :]
            except OSError as err:
                self._log = None
                print(f"vmctl: console log: {err.strerror}", file=sys.stderr)

    def _note(self, data: bytes) -> None:
        """See what output does to a terminal."""
        if not self._parser or not data:
            return
        if self._state is None:
            from vmctl.screen.terminal import TerminalState  # noqa: PLC0415 - not for pipes

            self._state = TerminalState()
        self._state.note(data)

    def _write(self) -> None:
        if not self._is_waiting and self._backlog and not self.is_closed:
            self._is_waiting = self._loop.add_writer(self._stdout, self._write_some)
            if not self._is_waiting:  # a regular file
                self._write_some()

    def _write_some(self) -> None:
        try:
            size = _WRITE_SIZE if self._is_waiting else len(self._backlog)
            del self._backlog[: os.write(self._stdout, self._backlog[:size])]
        except BlockingIOError:
            return
        except OSError as err:
            self._close(err)
        if not self._backlog and self._is_waiting:
            self._loop.remove_writer(self._stdout)
            self._is_waiting = False
        self._throttle()

    def _throttle(self) -> None:
        """Hold the guest while too much of its output waits for a reader."""
        limit = _BACKLOG_LOW if self._is_throttled else _BACKLOG_HIGH
        if self._is_throttled != (len(self._backlog) > limit):
            self._is_throttled = not self._is_throttled
            self._guest.throttle(self._is_throttled)

    def _reader_left(self) -> None:
        self._close(BrokenPipeError(0, "its reader has gone away"))

    def _close(self, err: OSError) -> None:
        """Stop writing; the guest runs on without output, unless its terminal is gone."""
        if self.is_closed:
            return
        self.is_closed = True
        self.leaves_line_open = False
        self._backlog.clear()
        self._loop.remove_reader(self._stdout)
        self._loop.remove_writer(self._stdout)
        self._is_waiting = False
        if self._is_throttled:
            self._is_throttled = False
            self._guest.throttle(False)
        reason = f"standard output: {err.strerror}"
        if self._parser:
            self._guest.quit(reason)
        else:
            print(f"vmctl: {reason}", file=sys.stderr)

    # Input

    def feed(self) -> None:
        """Give the guest typed bytes, as far as it has room; called when it has."""
        while True:
            if self._typed:
                del self._typed[: self._guest.receive(bytes(self._typed))]
            if self._typed or not self._reads_directly:
                break
            self._read()
        if len(self._typed) < _READ_SIZE and not self._reads_directly and self._is_held:
            self._is_held = False
            self._loop.add_reader(self._stdin, self._read)

    def _read(self) -> None:
        try:
            data = os.read(self._stdin, _READ_SIZE)
        except BlockingIOError:
            return
        except OSError:  # a terminal that hung up, or no standard input at all
            data = b""
        if not data:
            self._reads_directly = False
            self._loop.remove_reader(self._stdin)
            return
        for part in self._parser.feed(data) if self._parser else (data,):
            if isinstance(part, bytes):
                self._typed += part
            else:
                self._escape(part)
        if not self._reads_directly:
            self.feed()
            if len(self._typed) >= _READ_SIZE:
                self._is_held = True
                self._loop.remove_reader(self._stdin)

    def _escape(self, escape: "Escape") -> None:
        from vmctl.screen.console import ESCAPES, Escape  # noqa: PLC0415 - not for pipes

        match escape:
            case Escape.POWER_OFF:
                self._guest.quit(None)
            case Escape.BREAK:
                self._guest.receive_break()
            case Escape.SUSPEND:
                if self._terminal:
                    self._terminal.suspend()
            case Escape.HELP:
                sys.stderr.write("\r\n" + ESCAPES.replace("\n", "\r\n"))
