"""`vmctl run -- command` with guests that have no agent: one line says so, and nothing is left."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.unit.boot import images
from tests.vmctl_driver import VMCTL

pytestmark = pytest.mark.kvm

END_S = 60.0
HALT = b"\xf4\xeb\xfd"  # hlt, and again


def start(words: Sequence[str | Path], folder: Path) -> subprocess.Popen[str]:
    """Start a command of which files are made in `folder`."""
    return subprocess.Popen(
        [VMCTL, "run", *words],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "TMPDIR": str(folder)},
    )


def end(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    """Return how it has ended."""
    with process:
        output, errors = process.communicate(timeout=END_S)
    return process.returncode, output, errors


def halting(folder: Path) -> str:
    """Return the path of a kernel that does nothing, for ever."""
    path = folder / "kernel"
    path.write_bytes(images.pvh_kernel(code=HALT * 16))
    return str(path)


def below(pid: int) -> list[int]:
    """Return the processes below one, of all its threads."""
    found = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        for word in (task / "children").read_text().split():
            found += [int(word), *below(int(word))]
    return found


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("-b", "/none"), "vmctl: /none: No such file or directory\n"),
        (
            ("-b", "/none", "--vsock", "v"),
            "vmctl: --vsock is not for a command: its VM boots this host's root\n",
        ),
        (("-b", "/etc/hostname"), None),
    ],
)
def test_what_cannot_be_run(tmp_path: Path, words: tuple[str, ...], message: str | None) -> None:
    """Status 1, and a line that says why."""
    status, output, errors = end(start([*words, "--", "true"], tmp_path))
    assert (status, output) == (1, "")
    if message is None:
        assert errors.endswith("vmctl: the VM has ended before the command began\n")
        assert errors.count("\n") == 2
    else:
        assert errors == message
    assert list(tmp_path.iterdir()) == []


def test_rw_is_for_a_command() -> None:
    """Without one there is nothing that could write."""
    done = subprocess.run(
        [VMCTL, "run", "--selftest", "--rw"], capture_output=True, check=False, timeout=END_S
    )
    assert (done.returncode, done.stderr) == (
        1,
        b"vmctl: --rw is for a command, which follows --\n",
    )


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_a_signal_ends_it(tmp_path: Path, number: signal.Signals) -> None:
    """While a guest boots, a signal ends all processes of it; only SIGKILL leaves a directory."""
    folder = tmp_path / "t"
    folder.mkdir()
    process = start(["-b", halting(tmp_path), "--", "true"], folder)
    until = time.monotonic() + END_S
    while len(pids := below(process.pid)) < 2 and time.monotonic() < until:
        time.sleep(0.02)
    process.send_signal(number)
    assert end(process) == (-number, "", "")
    assert len(pids) == 2  # the VM, and what serves its root
    for pid in pids:
        tail = ["tail", f"--pid={pid}", "-f", "/dev/null"]
        subprocess.run(tail, check=True, timeout=END_S)
    assert (list(folder.iterdir()) == []) == (number != signal.SIGKILL)


def test_a_guest_that_never_comes(tmp_path: Path) -> None:
    """A time-out ends it with status 124."""
    words = ["-b", halting(tmp_path), "--timeout", "1", "--", "true"]
    assert end(start(words, tmp_path)) == (124, "", "vmctl: timed out after 1 s\n")
