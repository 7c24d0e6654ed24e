"""Commands that signals end in the middle: by which, silently, and with nothing left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.agents import BOUND_S, Vsock
from tests.unit.vmctl.conftest import Serve
from tests.unit.vmctl.test_every_verb import TROUBLE, two_at_a_time
from tests.vmctl_driver import VMCTL
from vmd.wire.messages import Done, Events

SIGNALS = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGPIPE]
MOMENTS = (0.0, 0.05, 0.15)
"""Seconds from the first sign of work."""


@pytest.fixture
def guest(tmp_path: Path) -> Iterator[Path]:
    """A guest with an agent: this host."""
    with Vsock(tmp_path / "vsock"):
        yield tmp_path / "vsock"


def ended_by(number: signal.Signals, moment: float, words: list[str]) -> str:
    """Send a signal to a command that works; return what is wrong with its end, or nothing."""
    quiet = ["/bin/sh", "-c", 'ulimit -c 0; exec "$@"', "sh"]
    with subprocess.Popen(
        [*quiet, VMCTL, *words],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
    ) as process:
        _wait_for_work(process)
        _let_work(moment)
        process.send_signal(number)
        if number is signal.SIGPIPE:  # which is ignored: there are errors for it
            _let_work(moment)
            assert process.poll() in {None, 0}
            process.terminate()
            number = signal.SIGTERM
        _, errors = process.communicate(timeout=BOUND_S)
    is_wrong = process.returncode not in {-number, 0} or TROUBLE.search(errors)
    return f"{number.name} {moment}: {words}: {process.returncode} {errors}" if is_wrong else ""


def _let_work(seconds: float) -> None:
    """Return at another moment of the command's work; not a wait for anything."""
    with subprocess.Popen(["sleep", str(seconds)]) as sleep:
        sleep.wait()


def _wait_for_work(process: subprocess.Popen[str]) -> None:
    """Wait until a command has connected to something, or has ended."""
    deadline = time.monotonic() + BOUND_S
    while time.monotonic() < deadline:
        if process.poll() is not None:
            return
        try:
            found = [entry.readlink() for entry in Path(f"/proc/{process.pid}/fd").iterdir()]
        except (FileNotFoundError, ProcessLookupError, PermissionError):
            continue  # a descriptor is gone, or the process has not begun
        if any(str(target).startswith("socket:") for target in found):
            return
    raise AssertionError("it connects to nothing")


def everything(work: object) -> list[str]:
    """Return what is wrong with `work` of each signal at each moment."""
    given = [(number, moment) for number in SIGNALS for moment in MOMENTS]
    return [wrong for wrong in two_at_a_time(lambda one: work(*one), given) if wrong]  # type: ignore[operator]


def test_exec(guest: Path) -> None:
    """The command in the guest ends too."""
    seconds = f"1000.{os.getpid()}"

    def work(number: signal.Signals, moment: float) -> str:
        return ended_by(number, moment, ["exec", str(guest), "--", "sleep", seconds])

    assert everything(work) == []
    deadline = time.monotonic() + BOUND_S
    while _runs(seconds):
        assert time.monotonic() < deadline, "it runs on in the guest"
        os.sched_yield()


def _runs(word: str) -> bool:
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_text(errors="replace").split("\0")
        except (FileNotFoundError, ProcessLookupError):
            continue
        if words[:2] == ["sleep", word]:
            return True
    return False


@pytest.mark.parametrize("is_inwards", [True, False])
def test_cp(tmp_path: Path, guest: Path, *, is_inwards: bool) -> None:
    """Half a file is left neither here nor in the guest."""
    source, target = tmp_path / "source", tmp_path / "target"
    with source.open("wb") as file:
        file.truncate(64 << 20)
    target.mkdir()

    def work(number: signal.Signals, moment: float) -> str:
        name = f"{target}/{number.name}{moment}"
        words = [str(source), f"{guest}:{name}"] if is_inwards else [f"{guest}:{source}", name]
        return ended_by(number, moment, ["cp", *words])

    assert everything(work) == []
    deadline = time.monotonic() + BOUND_S
    while any(path.stat().st_size != 64 << 20 for path in target.iterdir()):
        assert time.monotonic() < deadline, [path.name for path in target.iterdir()]
        os.sched_yield()


def test_snapshot(tmp_path: Path, serve: Serve) -> None:
    """Its file is left neither by its name nor by another; the daemon sees the connection end."""
    daemon = serve(lambda request: [Done()] if isinstance(request, Events) else [])

    def work(number: signal.Signals, moment: float) -> str:
        place = tmp_path / f"{number.name}{moment}"
        place.mkdir()
        wrong = ended_by(number, moment, ["snapshot", "web", f"{place}/file"])
        left = [path.name for path in place.iterdir()]
        return wrong or (f"{number.name} {moment}: left: {left}" if left else "")

    assert everything(work) == []
    assert daemon.requests
