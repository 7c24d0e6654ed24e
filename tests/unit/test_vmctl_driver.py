"""The console driver, with programs in place of a guest."""

from __future__ import annotations

import os
import signal
import sys

import pytest

from tests.vmctl_driver import ConsoleProcess, ConsoleTimeoutError


def sh(script: str, *, is_tty: bool = False) -> ConsoleProcess:
    """Start a shell script as the program under the driver."""
    return ConsoleProcess(["/bin/sh", "-c", script], is_tty=is_tty)


@pytest.mark.parametrize("is_tty", [False, True])
def test_a_conversation(is_tty: bool) -> None:
    """Text is expected, answered, expected again, and the exit status comes at the end."""
    with sh('echo ready; read x; echo "got <$x>"; exit 3', is_tty=is_tty) as program:
        program.expect("ready")
        program.send("word\n")
        assert program.expect("got <(.*)>")[1] == "word"
        assert program.wait() == 3


def test_what_was_matched_is_used_up() -> None:
    """Text before the last match is not matched again."""
    with sh("echo one; echo two") as program:
        program.expect("two")
        with pytest.raises(ConsoleTimeoutError, match="no 'one'"):
            program.expect("one")


def test_standard_error_is_apart() -> None:
    """Standard error is collected separately."""
    with sh("echo out; echo err >&2; exit 1") as program:
        program.expect_errors("err")
        assert program.wait() == 1
        assert program.output == b"out\n"
        assert program.errors == b"err\n"


def test_a_silent_program_times_out_with_its_last_words() -> None:
    """The failure shows the console's output."""
    with sh("echo last words; read x") as program:
        program.expect("last")
        with pytest.raises(ConsoleTimeoutError, match="last words"):
            program.expect("more", 0.01)
        with pytest.raises(ConsoleTimeoutError, match="still running"):
            program.wait(0.01)


def test_a_signal_is_a_negative_status() -> None:
    """The status of a program that a signal ended is the negative signal's number."""
    with sh("echo up; read x") as program:
        program.expect("up")
        program.signal(signal.SIGTERM)
        assert program.wait() == -signal.SIGTERM


def test_leaving_kills_what_still_runs() -> None:
    """The end of the context kills a program in any state."""
    with sh("trap '' TERM; echo up; read x; read y") as program:
        program.expect("up")
        pid = program.pid
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_output_is_passed_on_as_it_comes() -> None:
    """A listener gets every byte in order, standard error included."""
    heard: list[bytes] = []
    script = "import sys; sys.stdout.buffer.write(bytes(range(256)) * 1024)"
    with ConsoleProcess([sys.executable, "-c", script], on_output=heard.append) as program:
        assert program.wait() == 0
        assert program.output == bytes(range(256)) * 1024
    assert b"".join(heard) == bytes(range(256)) * 1024
    heard.clear()
    script = "import sys; sys.stderr.write('no')"
    with ConsoleProcess([sys.executable, "-c", script], on_output=heard.append) as program:
        assert program.wait() == 0
    assert b"".join(heard) == b"no"
