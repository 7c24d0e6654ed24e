"""Ports of guests, through a real daemon: rights, refusals, leftovers."""

from __future__ import annotations

import socket
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.system.vmd.daemon import READY, SELFTEST, TIMEOUT_S, Daemon, vm_block, vmctl
from tests.system.vmd.test_send import receive_from, send_to
from tests.vmctl_driver import VMCTL
from vmctl.client import Client, CommandError, RefusedError

pytestmark = pytest.mark.kvm

Start = Callable[[str], Daemon]
CONFIGURATION = vm_block("web", "vsock") + vm_block("plain") + vm_block("off", "vsock")


def _refusal(client: Client, name: str) -> str:
    with pytest.raises(RefusedError) as refused:
        client.connect(name, 22)
    return refused.value.code


def _ready(vmd: Daemon, name: str) -> None:
    with vmd.client() as client, client.console(name) as console:
        console.expect(READY)


def test_who_is_refused(start_vmd: Start) -> None:
    """A connection is refused without device, VM or driver, or if the VM does not run."""
    with start_vmd(CONFIGURATION) as vmd, Client(str(vmd.socket)) as client:
        client.start("web")
        client.start("plain")
        assert _refusal(client, "plain") == "EINVAL"
        assert _refusal(client, "off") == "not-running"
        assert _refusal(client, "none") == "ENOENT"
        _ready(vmd, "web")
        with pytest.raises(CommandError, match=r"^port 22: connection refused$"):
            client.connect("web", 22, timeout=TIMEOUT_S)
        client.pause("web")
        with pytest.raises(CommandError, match=r"^port 4294967294: connection refused$"):
            client.connect("web", 4294967294, timeout=TIMEOUT_S)
    with start_vmd(CONFIGURATION) as vmd, vmd.client() as raw:
        assert raw.ask("connect", name="web", port=1 << 32)["type"] == "failed"


def test_the_protocol(start_vmd: Start) -> None:
    """The answer has a stream, which ends; many connections leave nothing in the VM's process."""
    with start_vmd(CONFIGURATION) as vmd, vmd.client() as client:
        pid = client.ask("start", name="web")["pid"]
        _ready(vmd, "web")
        fds = Path(f"/proc/{pid}/fd")
        before = len(list(fds.iterdir()))
        for _ in range(100):
            client.send("connect", name="web", port=22)
            answer, received = client.receive()
            assert answer == {"type": "connected", "serial": 0, "id": answer["id"], "stream": 0}
            with socket.socket(fileno=received[0]) as stream:
                stream.settimeout(TIMEOUT_S)
                assert stream.type == socket.SOCK_STREAM
                assert stream.recv(1) == b""
        assert len(list(fds.iterdir())) <= before  # one console less


def test_vmctl_start(start_vmd: Start) -> None:
    """`--vsock auto` gives a new VM the device, and is refused for an existing one."""
    with start_vmd(CONFIGURATION) as vmd, Client(str(vmd.socket)) as client:
        made = vmctl(vmd, "start", "-b", str(SELFTEST), "-m", "64M", "--vsock", "auto", "own")
        assert made.returncode == 0, made.stderr
        with pytest.raises(CommandError, match="connection refused"):
            client.connect("own", 1, timeout=TIMEOUT_S)
        wrong = vmctl(vmd, "start", "--vsock", "/tmp/x", "other")
        line = "vmctl: invalid vsock: /tmp/x: vmd makes no socket, use --vsock auto\n"
        assert (wrong.returncode, wrong.stderr) == (1, line)
        late = vmctl(vmd, "start", "--vsock", "auto", "plain")
        assert late.returncode == 1
        assert "there is such a VM, which is as it is" in late.stderr


def test_a_vm_that_is_sent_keeps_it(start_vmd: Start, tmp_path: Path) -> None:
    """A received VM keeps the device, and `run --from` has it too."""
    with start_vmd(CONFIGURATION) as vmd, Client(str(vmd.socket)) as client:
        client.start("web")
        _ready(vmd, "web")
        assert send_to(tmp_path / "stream", vmd, "web").returncode == 0
        assert receive_from(tmp_path / "stream", vmd, "moved").returncode == 0
        with pytest.raises(CommandError, match="connection refused"):
            client.connect("moved", 22, timeout=TIMEOUT_S)
        client.stop("moved", force=True)
        client.start("plain")
        _ready(vmd, "plain")
        assert send_to(tmp_path / "plain", vmd, "plain").returncode == 0
    path = tmp_path / "vsock"
    words = ("--timeout", "5", "--vsock", str(path))
    done = _run("--from", str(tmp_path / "stream"), *words)
    assert (done.returncode, done.stderr) == (124, "vmctl: timed out after 5 s\n")
    done = _run("--from", str(tmp_path / "plain"), *words)
    line = f"vmctl: {tmp_path}/plain: the VM has no vsock device: use no --vsock\n"
    assert (done.returncode, done.stderr) == (1, line)


def test_a_clone_has_it_too(start_vmd: Start) -> None:
    """Source and clone both answer; neither guest has a driver."""
    with start_vmd(CONFIGURATION) as vmd, Client(str(vmd.socket)) as client:
        client.start("web")
        _ready(vmd, "web")
        cloned = vmctl(vmd, "clone", "web", "two")
        assert cloned.returncode == 0, cloned.stderr
        for name in ("web", "two"):
            with pytest.raises(CommandError, match="connection refused"):
                client.connect(name, 22, timeout=TIMEOUT_S)


def _run(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [VMCTL, "run", *words],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )
