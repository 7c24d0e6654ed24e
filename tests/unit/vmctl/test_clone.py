"""`vmctl clone --wait ready`: clones that their agent makes other machines, or that are killed."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.agents import BOUND_S, CLONES_AGENT, ROOT, HostAgent, spliced, wait_until
from tests.unit.vmctl.conftest import Serve
from tests.unit.vmctl.fake_daemon import Answers, FakeDaemon
from vmctl.line.cli import main
from vmd.wire.messages import AnyRequest, ErrorCode, Failed, Stop, Terminated
from vmd.wire.ports import Connect, Connected
from vmd.wire.transfers import Clone, Cloned, ClonedVm

WORDS = ["clone", "--wait", "ready", "--timeout", "60"]


@contextmanager
def guests(
    serve: Serve, folder: Path, monkeypatch: pytest.MonkeyPatch, *, lost: int = 0
) -> Iterator[FakeDaemon]:
    """Have clones that run, with ids from 11, and one agent; so many connections to it end."""
    monkeypatch.setenv("TOLD", str(folder / "told"))
    monkeypatch.setenv("REFUSES", str(folder / "refuses"))
    threads: list[threading.Thread] = []
    left = [lost]
    with HostAgent(folder / "agent", program=CLONES_AGENT) as host:

        def answer(request: AnyRequest) -> Answers:
            match request:
                case Clone(clone=pattern, count=count):
                    names = [pattern.replace("%d", str(number)) for number in range(count)]
                    vms = tuple(
                        ClonedVm(name=name, id=11 + number, pid=99, tty="/dev/pts/9")
                        for number, name in enumerate(names)
                    )
                    return [Cloned(vms=vms)]
                case Stop(id=number):
                    assert number is not None
                    return [Terminated(id=number)]
            assert isinstance(request, Connect)
            theirs, ours = socket.socketpair()
            if left[0]:
                left[0] -= 1
                ours.close()
            else:
                threads.append(spliced(ours, host.connect()))
            return [(Connected(id=request.id or 0), [theirs.detach()])]

        yield serve(answer)
        for thread in threads:
            thread.join()


def stopped(daemon: FakeDaemon) -> list[int | None]:
    """Return the ids of the VMs that were killed."""
    found = [request for request in daemon.requests if isinstance(request, Stop)]
    assert all(request.force and request.wait for request in found)
    return [request.id for request in found]


def test_each_clone_is_made_another(
    serve: Serve,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Entropy, clock, machine-id, host name; connections that end at first are made again."""
    with guests(serve, tmp_path, monkeypatch, lost=2) as daemon:
        before = time.time_ns()
        assert main([*WORDS, "-n", "2", "web", "web_%d"]) == 0
    assert capsys.readouterr().err == (
        "vmctl: started vm 11 (web_0) successfully, tty /dev/pts/9\n"
        "vmctl: started vm 12 (web_1) successfully, tty /dev/pts/9\n"
    )
    told = [json.loads(line) for line in (tmp_path / "told").read_text().splitlines()]
    assert [one["do"] for one in told] == ["entropy", "clock", "identity"] * 2
    assert len({one["data"] for one in told if "data" in one}) == 2
    assert all(before <= one["ns"] <= time.time_ns() for one in told if "ns" in one)
    assert len({one["machine_id"] for one in told[2::3]}) == 2
    assert [one["host_name"] for one in told[2::3]] == ["web-0", "web-1"]
    assert stopped(daemon) == []


@pytest.mark.parametrize("what", ["entropy", "clock", "identity"])
def test_a_clone_that_stays_the_same(
    what: str,
    serve: Serve,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A clone whose agent fails at any step is killed; the status is 1."""
    (tmp_path / "refuses").write_text(what)
    with guests(serve, tmp_path, monkeypatch) as daemon:
        assert main([*WORDS, "--json", "-n", "2", "web", "w%d"]) == 1
    shown = capsys.readouterr()
    line = f"not-ready: {what}: Operation not permitted"
    assert shown.err == f"vmctl: clone w0 failed: {line}\nvmctl: clone w1 failed: {line}\n"
    assert [vm["code"] for vm in json.loads(shown.out)] == ["not-ready"] * 2
    assert stopped(daemon) == [11, 12]


def test_a_clone_without_an_agent(
    serve: Serve,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """It is killed when the time is over."""
    with guests(serve, tmp_path, monkeypatch, lost=1000) as daemon:
        words = ["clone", "--wait", "ready", "--timeout", "0.3", "web", "w"]
        assert main(words) == 1
    line = "the guest has no agent: nobody listens on its vsock port"
    assert capsys.readouterr().err == f"vmctl: clone w failed: not-ready: {line}\n"
    assert stopped(daemon) == [11]


def test_a_signal_while_it_waits(
    serve: Serve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Clones that are not ready yet are killed."""
    with guests(serve, tmp_path, monkeypatch, lost=1 << 30) as daemon:
        words = ["clone", "--wait", "ready", "-n", "2", "web", "w%d"]
        with subprocess.Popen([sys.executable, "-m", "vmctl", *words], cwd=ROOT) as process:
            wait_until(lambda: sum(isinstance(one, Connect) for one in daemon.requests) > 1)
            process.terminate()
            assert process.wait(BOUND_S) == -signal.SIGTERM
        assert stopped(daemon) == [11, 12]


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--wait", "stopped"], "invalid condition: stopped (ready)"),
        (["--timeout", "3"], "--timeout is for --wait"),
        (["--wait", "ready", "--timeout", "x"], "invalid time-out: x: not a number of seconds"),
    ],
)
def test_what_makes_no_sense(
    words: list[str], line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is refused before anything is asked."""
    assert main(["clone", *words, "web", "w"]) == 1
    assert capsys.readouterr().err == f"vmctl: {line}\n"


def test_a_refusal_of_the_daemon(serve: Serve, capsys: pytest.CaptureFixture[str]) -> None:
    """It is told as without --wait."""
    serve(lambda _request: [Failed(code=ErrorCode.ENOENT, message="no such VM")])
    assert main([*WORDS, "web", "w"]) == 1
    assert capsys.readouterr().err.endswith("vmctl: no such VM\n")
