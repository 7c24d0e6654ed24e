"""autopkgtest-virt-vmm: its protocol, with the self-test guest and an agent on this host."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.agents import CLONES_AGENT, HostAgent
from tests.system.vmd.daemon import ROOT, SELFTEST, TIMEOUT_S
from tests.system.vmd.pytest_runs import Runs, runs
from tests.virt_driver import Caller
from vmctl.client import Client
from vmm_pytest.run import Run
from vmm_pytest.templates import Templates
from vmm_pytest.virt_server import CAPABILITIES, Server, ServerError

__all__ = ("runs",)

pytestmark = pytest.mark.kvm


@contextmanager
def served(server: Server, errors: list[str]) -> Iterator[Caller]:
    """Serve on a thread; yields the caller. What ends the server goes to `errors`."""
    pipes = [os.pipe(), os.pipe()]
    with (
        os.fdopen(pipes[0][0]) as commands,
        os.fdopen(pipes[0][1], "w") as tells,
        os.fdopen(pipes[1][0]) as answers,
        os.fdopen(pipes[1][1], "w") as answering,
    ):

        def work() -> None:
            try:
                with server:
                    server.serve(commands, answering)
            except ServerError as err:
                errors.append(str(err))

        thread = threading.Thread(target=work)
        thread.start()
        try:
            yield Caller(tells, answers)
        finally:
            tells.close()
            thread.join()


def test_the_protocol(runs: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Open, copy, reboot, revert and close; each testbed is another clone, and none is left."""
    monkeypatch.setattr(tempfile, "tempdir", str(runs.temporary))
    for name in ("TMPDIR", "TOLD", "REFUSES"):
        monkeypatch.setenv(name, runs.environ[name])
    with HostAgent(tmp_path / "agent", program=CLONES_AGENT) as host, Run() as run:
        templates = Templates(run, lambda _name: host.agent, tmp_path)

        def names() -> list[str]:
            with Client(run.daemon) as client:
                return [vm.name for vm in client.list() if "template" not in vm.name]

        server = Server(
            run.daemon,
            lambda: templates.get(kernel=SELFTEST, memory="16M").clone(),
            users=["me"],
            reboot="true",
            timeout=TIMEOUT_S,
        )
        errors: list[str] = []
        with served(server, errors) as caller:
            assert caller.ask("capabilities") == [*CAPABILITIES, "suggested-normal-user=me"]
            (scratch,) = caller.ask("open")
            assert Path(scratch).stat().st_mode & 0o7777 == 0o1777
            first = names()
            (command,) = caller.ask("print-execute-command")
            assert command.endswith(f",exec,-i,{first[0]},--")
            assert command.startswith(f"env,VMD_SOCKET={run.daemon},")
            (tmp_path / "tree" / "a b").mkdir(parents=True)
            (tmp_path / "tree" / "a b" / "file").write_text("text")
            (tmp_path / "tree" / "link").symlink_to("a b/file")
            caller.ask("copydown", f"{tmp_path}/tree/", f"{scratch}/deep/er/")
            caller.ask("copyup", f"{scratch}/deep/er/", f"{tmp_path}/back/")
            assert (tmp_path / "back" / "link").read_text() == "text"
            caller.ask("copydown", f"{tmp_path}/tree/a b/file", f"{scratch}/one file")
            caller.ask("copyup", f"{scratch}/one file", f"{tmp_path}/one")
            assert (tmp_path / "one").read_text() == "text"
            caller.send("reboot")
            with Client(run.daemon) as client, client.console(first[0]) as console:
                console.expect("selftest: ready", TIMEOUT_S)
                console.write("r")
            assert caller.read() == [scratch]
            assert names() == first
            caller.ask("revert")
            second = names()
            assert len(second) == 1
            assert second != first
            caller.ask("close")
            assert names() == []
            caller.ask("open")
            caller.ask("quit")
            assert names() == []
        assert errors == []
        for commands, error in (
            (("close",), "cannot do this now: close"),
            (("copyup", "/x"), "cannot do this now: copyup /x"),
            (("nonsense\x1b",), r"cannot do this now: nonsense\x1b"),
            (("print-execute-command",), "cannot do this now: print-execute-command"),
            ((), "the caller has gone"),
        ):
            errors = []
            with served(server, errors) as caller:
                if commands:
                    caller.send(*commands)
            assert errors == [error]
    for folder in Path("/var/tmp").glob("autopkgtest.*"):
        subprocess.run(["rm", "-r", folder], check=True)


def test_a_testbed_that_does_not_come(runs: Runs) -> None:
    """The command fails in one line; nothing is left."""
    words = ["--kernel", str(SELFTEST), "-m", "16M", "--timeout", "0.5"]
    done = subprocess.run(
        [sys.executable, "-m", "vmm_pytest.virt_server", *words],
        cwd=ROOT,
        env=runs.environ,
        input="capabilities\nopen\n",
        capture_output=True,
        text=True,
        check=False,
        timeout=TIMEOUT_S,
    )
    assert done.stdout == f"ok\nok {' '.join(CAPABILITIES)}\n"
    assert done.stderr.startswith("autopkgtest-virt-vmm: open: pytest-")
    assert "not ready: the guest has no agent" in done.stderr
    assert done.returncode == 16


def test_a_caller_that_does_not_read_the_last_answer(runs: Runs) -> None:
    """The server ends well after `quit`, as autopkgtest wants it, which reads no more then."""
    with subprocess.Popen(
        [sys.executable, "-m", "vmm_pytest.virt_server", "--kernel", str(SELFTEST)],
        cwd=ROOT,
        env=runs.environ,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout
        assert process.stdout.readline() == "ok\n"
        process.stdout.close()
        assert process.stdin
        process.stdin.write("quit\n")
        process.stdin.close()
        assert process.wait(TIMEOUT_S) == 0
        assert process.stderr
        assert process.stderr.read() == ""
