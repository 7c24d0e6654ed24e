"""The Python client for programs, with a real daemon; and its example."""

from __future__ import annotations

import os
import subprocess
import sys
import typing
from collections.abc import Callable

import pytest

from tests.system.vmd.daemon import ROOT, SELFTEST, TIMEOUT_S, Daemon, vm_block
from vmctl import client as module
from vmctl.client import Client, CommandError, Console, RefusedError, Started, Vm

pytestmark = pytest.mark.kvm

Start = Callable[[str], Daemon]
EXAMPLE = ROOT / "examples" / "client.py"


def test_a_life(start_vmd: Start) -> None:
    """A VM is listed, started, watched, typed to, paused and stopped; failures are exceptions."""
    with start_vmd(vm_block("web")) as vmd, Client(str(vmd.socket)) as client:
        assert [(vm.name, vm.state, vm.pid) for vm in client.list()] == [("web", "stopped", None)]
        started = client.start("web")
        with pytest.raises(RefusedError) as refused:
            client.start("web")
        assert refused.value.code == "EALREADY"
        vm = client.vm(started.id)
        assert vm
        assert (vm.name, vm.state, vm.pid, vm.tty) == ("web", "running", started.pid, started.tty)
        assert client.vm("none") is None
        with client.console("web") as console:
            assert "fw_cfg: ok" in console.expect("selftest: ready", TIMEOUT_S)
            with pytest.raises(TimeoutError, match="the console has not shown 'never'"):
                console.expect("never", 0.2)
            console.write("123")
            console.expect("123", TIMEOUT_S)
            client.pause("web")
            client.unpause("web")
            client.stop("web", force=True)
            with pytest.raises(CommandError, match="the console has ended"):
                console.expect("never")
        with pytest.raises(RefusedError) as refused:
            client.wait("web")
        assert refused.value.code == "not-running"
        made = client.start("own", boot=str(SELFTEST), memory=64 << 20, cpus=2)
        with client.console(made.id) as console:
            console.expect("cpus: 2 of 2 running", TIMEOUT_S)
        client.stop("own", force=True)


def test_nobody_listens() -> None:
    """Without a daemon the exception has the text of the commands."""
    with pytest.raises(CommandError, match=r"connect: /nonexistent/vmd.sock: No such file"):
        Client("/nonexistent/vmd.sock")


@pytest.mark.parametrize(("text", "status"), [("selftest: ready", 0), ("never", 1)])
def test_the_example(text: str, status: int, start_vmd: Start) -> None:
    """The example starts a VM, waits for a text on its console, and stops it in any case."""
    with start_vmd(vm_block("web")) as vmd, vmd.client() as client:
        done = subprocess.run(
            [sys.executable, EXAMPLE, "web", text, "5"],
            env={**os.environ, "PYTHONPATH": str(ROOT), "VMD_SOCKET": str(vmd.socket)},
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
            check=False,
        )
        assert done.returncode == status, done
        assert done.stdout.startswith("web runs as process ")
        assert (text in done.stdout) == (status == 0)
        assert done.stderr == ("" if status == 0 else "web: the console has not shown 'never'\n")
        assert client.vm("web")["state"] == "stopped"


def test_the_page() -> None:
    """docs/client.md has the example unchanged, and every public name of the client."""
    page = (ROOT / "docs" / "client.md").read_text()
    assert f"```python\n{EXAMPLE.read_text()}```" in page
    for one in (Client, Console, Vm, Started):
        assert f"`{one.__name__}`" in page
    for name in (
        "list",
        "vm",
        "start",
        "stop",
        "wait",
        "pause",
        "unpause",
        "console",
        "connect",
        "ask",
    ):
        assert f"`{name}(" in page
        assert getattr(Client, name).__doc__
    for name in ("expect", "read", "write"):
        assert f"`{name}(" in page
        assert getattr(Console, name).__doc__
    for name in Vm.__annotations__:
        assert f"`{name}`" in page
    assert typing.get_type_hints(module.Client.start)["return"] is Started
