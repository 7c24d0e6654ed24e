"""Drive a program that shows a guest's console: `vmctl run`, or QEMU for comparison.

One class, no threads: it collects the program's output while a call waits for it, and
`close()`, the end of the context, leaves no process and no descriptor.
"""

from __future__ import annotations

import os
import pty
import re
import select
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO, Self

ROOT = Path(__file__).resolve().parents[1]
VMCTL = ROOT / ".venv" / "bin" / "vmctl"

# Time for a guest to reach user space under full emulation on a busy machine.
BOOT_TIMEOUT_S = 240.0
_CHUNK = 65536


class ConsoleTimeoutError(AssertionError):
    """The console did not show the expected text, or the program did not end, in time."""


def vmctl_run(*arguments: str | Path) -> list[str]:
    """Return the argument vector of `vmctl run` with these arguments."""
    return [str(VMCTL), "run", *(str(argument) for argument in arguments)]


class ConsoleProcess:
    """A child process whose standard output is a guest's console.

    With `is_tty` its standard input and output are a pseudo-terminal, else pipes; standard error
    is a pipe always. `output` and `errors` are everything seen so far.
    """

    def __init__(
        self,
        arguments: Sequence[str],
        *,
        is_tty: bool = False,
        environment: Mapping[str, str] | None = None,
        on_output: Callable[[bytes], None] | None = None,
    ) -> None:
        """Start the program, with `environment` added to this process's own.

        `on_output` gets all output of the program, standard error included, as it is read.
        """
        self._on_output = on_output
        self.output = b""
        self.errors = b""
        self._seen = 0
        self._seen_errors = 0
        merged = {**os.environ, **(environment or {})}
        if is_tty:
            master, slave = pty.openpty()
            try:
                self._process = subprocess.Popen(
                    arguments,
                    stdin=slave,
                    stdout=slave,
                    stderr=subprocess.PIPE,
                    env=merged,
                    start_new_session=True,
                )
            except BaseException:
                os.close(master)
                raise
            finally:
                os.close(slave)
            self._input: int | None = master
            self._output: int | None = os.dup(master)
        else:
            self._process = subprocess.Popen(
                arguments,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                env=merged,
                start_new_session=True,
            )
            self._input = _detach(self._process.stdin)
            self._output = _detach(self._process.stdout)
        self._errors: int | None = _detach(self._process.stderr)
        self._process.stdin = self._process.stdout = self._process.stderr = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    @property
    def pid(self) -> int:
        """The program's process id."""
        return self._process.pid

    @property
    def terminal(self) -> int:
        """Our end of the program's input: of its terminal, if it has one."""
        assert self._input is not None, "the input is closed"
        return self._input

    def send(self, text: str | bytes) -> None:
        """Type `text` on the console.

        Raises:
            BrokenPipeError: the program has closed its input.
        """
        assert self._input is not None, "the input is closed"
        data = text.encode() if isinstance(text, str) else text
        while data:
            data = data[os.write(self._input, data) :]

    def close_input(self) -> None:
        """Close the program's standard input."""
        if self._input is not None:
            os.close(self._input)
            self._input = None

    def close_output(self) -> None:
        """Close our end of the program's standard output."""
        if self._output is not None:
            os.close(self._output)
            self._output = None

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to the program."""
        self._process.send_signal(number)

    def expect(self, pattern: str, timeout_s: float = BOOT_TIMEOUT_S) -> re.Match[str]:
        """Wait until new output matches the regular expression; what precedes it is used up.

        Raises:
            ConsoleTimeoutError: the output has no match after that time, or at its end.
        """
        match, self._seen = self._expect(pattern, timeout_s, lambda: self.output, self._seen)
        return match

    def expect_errors(self, pattern: str, timeout_s: float = BOOT_TIMEOUT_S) -> re.Match[str]:
        """Wait as `expect` does, but for output on standard error.

        Raises:
            ConsoleTimeoutError: there is no match after that time, or at the output's end.
        """
        match, self._seen_errors = self._expect(
            pattern, timeout_s, lambda: self.errors, self._seen_errors
        )
        return match

    def wait(self, timeout_s: float = BOOT_TIMEOUT_S) -> int:
        """Wait for the program's end, collecting its output; return its exit status.

        A status below 0 is the signal that ended it.

        Raises:
            ConsoleTimeoutError: it still runs after that time.
        """
        deadline = time.monotonic() + timeout_s
        while True:
            remaining = deadline - time.monotonic()
            if remaining <= 0:
                raise ConsoleTimeoutError(f"still running {self._told()}")
            if not self._collect(remaining):
                try:
                    return self._process.wait(remaining)
                except subprocess.TimeoutExpired:
                    continue

    def close(self) -> None:
        """Kill the program if it still runs and release everything."""
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait()
        self.close_input()
        self.close_output()
        if self._errors is not None:
            os.close(self._errors)
            self._errors = None

    def _expect(
        self, pattern: str, timeout_s: float, shown: Callable[[], bytes], seen: int
    ) -> tuple[re.Match[str], int]:
        wanted = re.compile(pattern, re.MULTILINE)
        deadline = time.monotonic() + timeout_s
        while True:
            match = wanted.search(shown()[seen:].decode("latin-1"))
            if match is not None:
                return match, seen + match.end()
            remaining = deadline - time.monotonic()
            if remaining <= 0 or not self._collect(remaining):
                raise ConsoleTimeoutError(f"no {pattern!r} {self._told()}")

    def _collect(self, timeout_s: float) -> bool:
        """Read available output, waiting for it; False once both outputs have ended."""
        waiting = [fd for fd in (self._output, self._errors) if fd is not None]
        if not waiting:
            return False
        for fd in select.select(waiting, [], [], timeout_s)[0]:
            try:
                data = os.read(fd, _CHUNK)
            except OSError:  # the other side of the pseudo-terminal is gone
                data = b""
            if self._on_output:
                self._on_output(data)
            if fd == self._output:
                self.output += data
                if not data:
                    self.close_output()
            else:
                self.errors += data
                if not data:
                    os.close(fd)
                    self._errors = None
        return True

    def _told(self) -> str:
        tail = self.output[-1500:].decode(errors="replace")
        return (
            f"(exit status {self._process.poll()}); the console ends with:\n{tail}\n"
            f"and standard error with:\n{self.errors[-500:].decode(errors='replace')}"
        )


def _detach(stream: IO[bytes] | None) -> int:
    """Take over the descriptor of a pipe's file object, and close the object."""
    assert stream is not None
    with stream:
        return os.dup(stream.fileno())
