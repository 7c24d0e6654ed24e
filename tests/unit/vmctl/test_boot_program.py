"""Programs of system calls: assembled, and executed on this host."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from vmctl.foreground.boot_program import RESULT, Call, assemble

_WRITE, _OPEN, _EXECVE, _EXIT, _PWRITE, _MMAP = 1, 2, 59, 60, 18, 9


@pytest.fixture
def execute(tmp_path: Path) -> Callable[[list[Call]], subprocess.CompletedProcess[bytes]]:
    """Assemble and execute a program."""

    def run(calls: list[Call]) -> subprocess.CompletedProcess[bytes]:
        program = tmp_path / "program"
        program.write_bytes(assemble(calls))
        program.chmod(0o755)
        return subprocess.run([program], capture_output=True, check=False, timeout=60)

    return run


Execute = Callable[[list[Call]], subprocess.CompletedProcess[bytes]]


def test_calls_in_their_order(execute: Execute, tmp_path: Path) -> None:
    """Strings have addresses, a result is the next call's argument, and a failure stops nothing."""
    file = tmp_path / "file"
    done = execute(
        [
            Call(_WRITE, (1, b"one\n", 4)),
            Call(_OPEN, (b"/none/of/this", 0, 0)),
            Call(_OPEN, (os.fsencode(file), os.O_WRONLY | os.O_CREAT, 0o600)),
            Call(_PWRITE, (RESULT, b"contents", 8, 3)),
            Call(_WRITE, (2, b"two\n", 4)),
            Call(_EXIT, (42,)),
        ]
    )
    assert (done.returncode, done.stdout, done.stderr) == (42, b"one\n", b"two\n")
    assert file.read_bytes() == bytes(3) + b"contents"


def test_six_arguments(execute: Execute) -> None:
    """All are passed: a mapping at an address, private and anonymous, is where it was asked for."""
    at, fixed_private_anonymous = 0x10000000, 0x32
    done = execute(
        [
            Call(_MMAP, (at, 4096, 3, fixed_private_anonymous, 0xFFFF_FFFF, 0)),
            Call(_WRITE, (1, at, 3)),
            Call(_EXIT, (0,)),
        ]
    )
    assert (done.returncode, done.stdout) == (0, bytes(3))


def test_a_program_is_executed(execute: Execute) -> None:
    """With arguments and an environment, which are arrays of strings."""
    arguments = (b"/bin/sh", b"-c", b'echo "$A $0"', b"name")
    done = execute([Call(_EXECVE, (b"/bin/sh", arguments, (b"A=1",))), Call(_EXIT, (1,))])
    assert (done.returncode, done.stdout) == (0, b"1 name\n")
