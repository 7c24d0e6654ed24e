"""A machine that a test uses. The methods have the names of the NixOS test driver's."""

import os
import select
import time
from collections.abc import Callable
from typing import NoReturn, Self

from vmctl.client import Client, CommandError, RefusedError
from vmctl.guest.agent import Agent, Finished
from vmctl.guest.copying import copy_file_in, copy_file_out, copy_tree_in, copy_tree_out
from vmm_pytest.console import ConsoleError, ConsoleLog

TIMEOUT_S = 60.0
_AGAIN_S = 0.1
_AGAIN_MAX_S = 1.0
_SHOWN_MAX = 8000
"""Characters of each stream of a command that a failure shows, the last."""


class MachineError(AssertionError):
    """A machine has not done what a test wants; `str()` is for the test's report."""


class MachineTimeoutError(MachineError, TimeoutError):
    """It has not done so in time."""


class CommandFailedError(MachineError):
    """A command has ended otherwise than a test wants."""

    def __init__(self, machine: str, command: str, done: Finished, wanted: str) -> None:
        """Remember the end; `wanted` is the expectation."""
        lines = [f"{machine}: exit status {done.status}, {wanted}: {command}"]
        for name, data in (("output", done.output), ("errors", done.errors)):
            text = data.decode(errors="replace")
            cut = "…" if len(text) > _SHOWN_MAX else ""
            lines += [f"{name}: {cut}{text[-_SHOWN_MAX:].rstrip()}"] if text else []
        super().__init__("\n".join(lines))
        self._arguments = machine, command, done, wanted
        self.command = command
        self.status = done.status
        self.output = done.output.decode(errors="replace")
        self.errors = done.errors.decode(errors="replace")

    def __reduce__(self) -> tuple[type[Self], tuple[str, str, Finished, str]]:
        return type(self), self._arguments


class Machine:
    """A running machine. Each method takes a `timeout` in seconds, by default the marker's."""

    def __init__(
        self, daemon: str, name: str, agent: Agent, console: ConsoleLog, timeout: float = TIMEOUT_S
    ) -> None:
        """Take a VM of the daemon whose socket is `daemon`, and ownership of `console`."""
        self._daemon = daemon
        self.name = name
        """The VM's name, as `vmctl status` shows it."""
        self.agent = agent
        """For what this class has no method for; see docs/agent.md."""
        self.console = console
        self.timeout = timeout

    # Commands

    def execute(self, command: str, timeout: float | None = None) -> tuple[int, str]:
        """Run a shell command; returns its exit status and its output."""
        __tracebackhide__ = True
        done = self._run(command, timeout)
        return done.status, done.output.decode(errors="replace")

    def succeed(self, *commands: str, timeout: float | None = None) -> str:
        """Run shell commands that have to succeed; returns their output.

        Raises:
            CommandFailedError: one has not.
        """
        __tracebackhide__ = True
        output = b""
        for command in commands:
            done = self._run(command, timeout)
            if done.status:
                raise CommandFailedError(self.name, command, done, "not 0")
            output += done.output
        return output.decode(errors="replace")

    def fail(self, *commands: str, timeout: float | None = None) -> str:
        """Run shell commands that have to fail; returns their output.

        Raises:
            CommandFailedError: one has succeeded.
        """
        __tracebackhide__ = True
        output = b""
        for command in commands:
            done = self._run(command, timeout)
            if not done.status:
                raise CommandFailedError(self.name, command, done, "and it should fail")
            output += done.output
        return output.decode(errors="replace")

    def wait_until_succeeds(self, command: str, timeout: float | None = None) -> str:
        """Run a shell command again and again, until it succeeds; returns its output.

        Raises:
            CommandFailedError: it has not by then, and how it ended the last time.
        """
        __tracebackhide__ = True
        deadline = self._deadline(timeout)
        pause = _AGAIN_S
        while True:
            done = self._run(command, deadline - time.monotonic())
            if not done.status:
                return done.output.decode(errors="replace")
            if time.monotonic() + pause >= deadline:
                raise CommandFailedError(self.name, command, done, "still not 0")
            time.sleep(pause)
            pause = min(2 * pause, _AGAIN_MAX_S)

    def _run(self, command: str, timeout: float | None) -> Finished:
        __tracebackhide__ = True
        try:
            return self.agent.run(["/bin/sh", "-c", command], timeout=self._seconds(timeout))
        except TimeoutError:
            self._too_late(f"still runs: {command}", timeout)
        except CommandError as err:
            raise MachineError(f"{self.name}: {err}: {command}") from None

    # Waiting

    def wait_for_unit(self, unit: str, timeout: float | None = None) -> None:
        """Wait until a unit of systemd is active."""
        __tracebackhide__ = True
        self._wait(f"unit {unit}: not active", timeout, unit=unit)

    def wait_for_file(self, path: str, timeout: float | None = None) -> None:
        """Wait until a file exists."""
        __tracebackhide__ = True
        self._wait(f"{path}: no such file", timeout, file=path)

    def wait_for_open_port(self, port: int, timeout: float | None = None) -> None:
        """Wait until something in the guest listens on a TCP port."""
        __tracebackhide__ = True
        self._wait(f"port {port}: nothing listens", timeout, port=port)

    def _wait(
        self,
        problem: str,
        timeout: float | None,
        *,
        unit: str | None = None,
        file: str | None = None,
        port: int | None = None,
    ) -> None:
        __tracebackhide__ = True
        try:
            self.agent.wait_for(unit=unit, file=file, port=port, timeout=self._seconds(timeout))
        except TimeoutError:
            self._too_late(problem, timeout)
        except CommandError as err:
            raise MachineError(f"{self.name}: {err}") from None

    def wait_for_console_text(self, pattern: str, timeout: float | None = None) -> str:
        """Wait until the console shows text that matches a regular expression; returns that text.

        Each call begins behind the text that the one before has found.
        """
        __tracebackhide__ = True
        try:
            return self.console.wait_for(pattern, self._deadline(timeout))
        except TimeoutError as err:
            self._too_late(str(err), timeout)
        except ConsoleError as err:
            raise MachineError(f"{self.name}: {err}") from None

    def send_console(self, text: str) -> None:
        """Type on the console; a line feed ends a line."""
        __tracebackhide__ = True
        try:
            self.console.send(text)
        except OSError as err:
            raise MachineError(f"{self.name}: console: {err.strerror or err}") from None

    # Files

    def copy_from_host(self, source: str | os.PathLike[str], target: str) -> None:
        """Copy a file or a directory into the guest, as `vmctl cp` does."""
        __tracebackhide__ = True
        path = os.fspath(source)
        copy = copy_tree_in if os.path.isdir(path) else copy_file_in
        self._copy(lambda: copy(self.agent, path, target))

    def copy_to_host(
        self, source: str, target: str | os.PathLike[str], *, recursive: bool = False
    ) -> None:
        """Copy a file out of the guest, or with `recursive` a directory, as `vmctl cp` does.

        Raises:
            MachineError: also if links were left out that lead out of the directory.
        """
        __tracebackhide__ = True
        path = os.fspath(target)

        def copy() -> None:
            if not recursive:
                copy_file_out(self.agent, source, path)
            elif left_out := copy_tree_out(self.agent, source, path):
                raise CommandError("\n".join(left_out))

        self._copy(copy)

    def _copy(self, copy: Callable[[], None]) -> None:
        __tracebackhide__ = True
        try:
            copy()
        except (CommandError, OSError) as err:
            raise MachineError(f"{self.name}: {err}") from None

    # Ends

    def crash(self) -> None:
        """End the machine at once, as if its power failed."""
        __tracebackhide__ = True
        self._stop(force=True, timeout=None)

    def shutdown(self, timeout: float | None = None) -> None:
        """Press the power button, and wait until the machine is off."""
        __tracebackhide__ = True
        self._stop(force=False, timeout=timeout)

    def _stop(self, *, force: bool, timeout: float | None) -> None:
        __tracebackhide__ = True
        deadline = self._deadline(timeout)
        try:
            with Client(self._daemon) as client:
                client.send("stop", {"name": self.name, "force": force, "wait": True})
                left = max(0.0, deadline - time.monotonic())
                if not select.select([client.fileno()], [], [], left)[0]:
                    self._too_late("has not ended", timeout)
                client.receive("terminated")
        except RefusedError as err:
            raise MachineError(f"{self.name}: {err.detail or err}") from None
        except CommandError as err:
            raise MachineError(f"{self.name}: {err}") from None

    # Of the plugin

    def how_to_reach(self) -> str:
        """Return how a person reaches the machine after the run."""
        at = f"VMD_SOCKET={self._daemon} vmctl"
        return f"{at} console {self.name}\n{at} stop -f {self.name}"

    def close(self, *, is_kept: bool = False) -> None:
        """End the machine, if it runs, unless it is to be kept."""
        try:
            if not is_kept:
                with Client(self._daemon) as client:
                    if client.vm(self.name) is not None:
                        client.stop(self.name, force=True)
        except CommandError:  # it has just ended, or the daemon has, and it with it
            return
        finally:
            self.console.close()

    def _seconds(self, timeout: float | None) -> float:
        return max(0.0, self.timeout if timeout is None else timeout)

    def _deadline(self, timeout: float | None) -> float:
        return time.monotonic() + self._seconds(timeout)

    def _too_late(self, what: str, timeout: float | None) -> NoReturn:
        __tracebackhide__ = True
        raise MachineTimeoutError(f"{self.name}: after {self._seconds(timeout):g} s: {what}")
