"""`vmctl wait --for` and `start --wait` with conditions that need a guest's agent."""

from __future__ import annotations

import itertools
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.agents import HostAgent, spliced
from tests.unit.vmctl.conftest import Serve
from tests.unit.vmctl.fake_daemon import Answers
from vmctl.guest.access import pauses
from vmctl.line.cli import main
from vmd.wire.messages import AnyRequest, ErrorCode, Failed
from vmd.wire.ports import Connect, Connected


@contextmanager
def _guest(serve: Serve, path: Path, *, refusals: int = 0) -> Iterator[list[AnyRequest]]:
    """Run a VM whose agent answers after some attempts; yields the requests to the daemon."""
    threads: list[threading.Thread] = []
    asked: list[AnyRequest] = []
    with HostAgent(path) as host:

        def answer(request: AnyRequest) -> Answers:
            asked.append(request)
            theirs, ours = socket.socketpair()
            if len(asked) <= refusals:
                ours.close()
            else:
                threads.append(spliced(ours, host.connect()))
            return [(Connected(id=7), [theirs.detach()])]

        serve(answer)
        yield asked
        for thread in threads:
            thread.join()


def test_the_agent_comes(serve: Serve, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Attempts go on until the agent answers."""
    with _guest(serve, tmp_path / "agent", refusals=3) as asked:
        assert main(["wait", "--for", "ready", "--timeout", "60", "web"]) == 0
    assert capsys.readouterr().err == "waiting for vm web: ready\n"
    assert asked == [Connect(name="web", port=1024, serial=one.serial) for one in asked]
    assert len(asked) == 4


def test_what_is_in_the_guest(
    serve: Serve, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The agent waits for a file, and for a port."""
    (tmp_path / "file").touch()
    with (
        _guest(serve, tmp_path / "agent"),
        socket.create_server(("127.0.0.1", 0)) as listener,
    ):
        for condition in (f"file={tmp_path}/file", f"port={listener.getsockname()[1]}"):
            assert main(["wait", "--for", condition, "web"]) == 0
            assert capsys.readouterr().err == "waiting for vm web: found\n"


@pytest.mark.parametrize("condition", ["ready", "file=/nonexistent/file"])
def test_in_vain(
    condition: str, serve: Serve, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A time-out has status 124, without an agent and with one."""
    refusals = 1000 if condition == "ready" else 0
    with _guest(serve, tmp_path / "agent", refusals=refusals):
        assert main(["wait", "--for", condition, "--timeout", "1", "web"]) == 124
    assert capsys.readouterr().err == "waiting for vm web: timed out\n"


def test_a_vm_that_does_not_run(serve: Serve, capsys: pytest.CaptureFixture[str]) -> None:
    """A wait for a stopped VM fails at once."""
    serve(lambda _request: [Failed(code=ErrorCode.NOT_RUNNING)])
    assert main(["wait", "--for", "ready", "web"]) == 1
    assert capsys.readouterr().err == "waiting for vm web: \nvmctl: vm is not running\n"


@pytest.mark.parametrize(
    "condition", ["port=0", "port=x", "port=65536", "file=", "unit=", "console=", "readyx"]
)
def test_what_makes_no_sense(condition: str, capsys: pytest.CaptureFixture[str]) -> None:
    """A malformed condition is refused before anything is asked."""
    assert main(["wait", "--for", condition, "web"]) == 1
    assert capsys.readouterr().err.startswith(f"vmctl: invalid condition: {condition}")


def test_attempts_become_rarer() -> None:
    """A guest that is there soon is found soon; one that is not costs little."""
    found = list(itertools.islice(pauses(), 40))
    assert found == sorted(found)
    assert (found[0], found[-1]) == (0.05, 2.0)
    assert sum(found[:10]) < 2
