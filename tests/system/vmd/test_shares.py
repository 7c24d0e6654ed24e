"""Shared directories of the daemon's VMs: their processes, who may have them, and their ends."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.system.vmd.conftest import needs_separation
from tests.system.vmd.daemon import (
    READY,
    ROOT,
    SELFTEST,
    TIMEOUT_S,
    Daemon,
    children,
    process_title,
    vm_block,
    vmctl,
)
from tests.system.vmd.users import USER, connection

pytestmark = pytest.mark.kvm

Start = Callable[[str], Daemon]
NOT_SAVED = "share src: what its guest has open there cannot be saved"


def shares_of(vmd: Daemon, vm: str) -> list[int]:
    """Return the pids of the processes that serve a VM's shares."""
    return [pid for pid in children(vmd.process.pid) if process_title(pid) == f"share/{vm}"]


def wait_for_no_shares(vmd: Daemon, vm: str) -> None:
    """Wait until no process serves a share of a VM."""
    deadline = time.monotonic() + TIMEOUT_S
    while left := shares_of(vmd, vm):
        assert time.monotonic() < deadline, left
        time.sleep(0.02)


def user_of(pid: int) -> int:
    """Return the user of a process."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("Uid:")).split()[1])


def test_shares_from_start_to_end(start_vmd: Start, tmp_path: Path) -> None:
    """Each has a process, a reboot makes new ones, none is left after any end."""
    (tmp_path / "src").mkdir()
    lines = (f'share "{tmp_path}/src"', f'share "{tmp_path}" tag "all" rw')
    config = "".join(vm_block(name, *lines) for name in ("web", "dies", "loses"))
    config += vm_block("lacks", f'share "{tmp_path}/gone"')
    with start_vmd(config) as vmd, vmd.client() as client:
        pid = client.ask("start", name="web")["pid"]
        shown = vmctl(vmd, "show", "web").stdout
        assert f"share 0: {tmp_path}/src tag src ro\n" in shown
        assert f"share 1: {tmp_path} tag all rw\n" in shown
        first = shares_of(vmd, "web")
        assert len(first) == 2
        for words in (("snapshot", "web", "one"), ("clone", "web", "two")):
            refused = vmctl(vmd, *words)
            assert (refused.returncode, NOT_SAVED in refused.stderr) == (1, True), refused.stderr
        read_end, write_end = os.pipe()
        sent = client.ask("send", (write_end,), name="web", stream=0)
        os.close(read_end)
        os.close(write_end)
        assert (sent["code"], sent["message"]) == ("EBUSY", NOT_SAVED)
        with client.console("web") as console:
            console.expect(READY)
            console.type(b"r")
        client.wait_for_reboot("web", pid)
        second = shares_of(vmd, "web")
        assert len(second) == 2
        assert not set(first) & set(second)
        assert client.ask("stop", name="web", force=True, wait=True)["type"] == "terminated"
        wait_for_no_shares(vmd, "web")
        pid = client.ask("start", name="dies")["pid"]
        assert isinstance(pid, int)
        os.kill(pid, signal.SIGKILL)
        client.wait_for_state("dies", "stopped")
        wait_for_no_shares(vmd, "dies")
        # A guest whose share has crashed would wait for ever.
        assert client.ask("start", name="loses")["type"] == "started"
        os.kill(shares_of(vmd, "loses")[0], signal.SIGKILL)
        end = client.wait_for_state("loses", "stopped")["last_end"]
        assert isinstance(end, dict)
        assert (end["reason"], end["message"]) in [
            ("crashed", f"share {tag}: its process was killed by signal 9")
            for tag in ("src", "all")
        ]
        failed = client.ask("start", name="lacks")
        assert failed["message"] == f"share {tmp_path}/gone: No such file or directory"
        for name in ("loses", "lacks"):
            wait_for_no_shares(vmd, name)


SERVER = """
import socket, sys
from vmm_kvm.fs.server import FuseServer
from vmm_kvm.fs.tree import Tree, open_root
from vmm_kvm.virtio.fs import VirtioFs
from vmm_kvm.virtio.vhost_user.process import serve
listener = socket.socket(socket.AF_UNIX)
listener.bind(sys.argv[2])
listener.listen()
print("listening", flush=True)
for _ in range(2):
    server = FuseServer(Tree(open_root(sys.argv[1])), is_writable=False)
    serve(listener.accept()[0], VirtioFs(server, b"unused"))
"""


def test_a_server_of_somebody_elses(tmp_path: Path) -> None:
    """The parent connects to it at each boot; without it the VM does not start."""
    path = tmp_path / "fs.sock"
    config = vm_block("web", f'share "vhost-user:{path}" tag "t"')
    with Daemon(tmp_path, config) as vmd, vmd.client() as client:
        failed = client.ask("start", name="web")
        assert failed["message"] == f"vhost-user:{path}: No such file or directory"
        words = [sys.executable, "-c", SERVER, str(tmp_path), str(path)]
        with subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE) as server:
            assert server.stdout
            assert server.stdout.readline() == b"listening\n"
            pid = client.ask("start", name="web")["pid"]
            with client.console("web") as console:
                console.expect(READY)
                console.type(b"r")
            client.wait_for_reboot("web", pid)
            assert shares_of(vmd, "web") == []
            assert f"share 0: {path} tag t server\n" in vmctl(vmd, "show", "web").stdout
            assert client.ask("stop", name="web", force=True, wait=True)["type"] == "terminated"
            assert server.wait(TIMEOUT_S) == 0


def test_shares_of_start(tmp_path: Path) -> None:
    """The client passes the directory; --save writes it into the VM's file."""
    (tmp_path / "src").mkdir()
    config = f'include "{tmp_path}/vm.conf.d/*.conf"\n'
    options = ("-m", "64M", "--share", f"{tmp_path}/src:src:ro", "--share", f"{tmp_path}:all")
    with Daemon(tmp_path, config) as vmd, vmd.client() as client:
        started = vmctl(vmd, "start", "--selftest", *options, "web")
        assert started.returncode == 0, started.stderr
        (vm,) = json.loads(vmctl(vmd, "show", "--json", "web").stdout)
        assert [(one["tag"], one["is_read_only"]) for one in vm["shares"]] == [
            ("src", True),
            ("all", False),
        ]
        assert len(shares_of(vmd, "web")) == 2
        again = vmctl(vmd, "start", "--share", f"{tmp_path}:more", "web")
        assert again.returncode == 1
        saved = vmctl(vmd, "start", "--save", "--selftest", *options, "kept")
        assert saved.returncode == 0, saved.stderr
        text = (tmp_path / "vm.conf.d/kept.conf").read_text()
        assert f'\tshare "{tmp_path}/src" tag "src" ro\n\tshare "{tmp_path}" tag "all" rw\n' in text
        client.wait_for_state("kept", "running")
        assert len(shares_of(vmd, "kept")) == 2


@pytest.mark.root
@needs_separation
def test_shares_of_users(reachable: Path) -> None:
    """A user's share is served with the user's rights, and needs the template's permission."""
    closed = reachable / "closed"
    (closed / "in").mkdir(parents=True)
    closed.chmod(0o700)
    config = f"socket owner {USER}\n" + "".join(
        vm_block(name, f"allow instance {{ {rights} owner {USER} }}")
        for name, rights in (("open", "share, boot,"), ("closed", "boot,"))
    )
    asked = {"kernel": 0, "shares": [{"path": str(reachable), "tag": "t"}]}
    with (
        Daemon(reachable, config, is_user=False) as vmd,
        vmd.client() as root,
        connection(vmd, USER) as client,
        SELFTEST.open("rb") as kernel,
    ):
        fds = (kernel.fileno(),)
        refused = client.ask("start", fds, name="mine", instance="closed", **asked)
        assert refused["message"] == 'vm "mine" no permission to set shares'
        started = client.ask("start", fds, name="mine", instance="open", **asked)
        assert started["type"] == "started", started
        (share,) = shares_of(vmd, "mine")
        assert user_of(share) == USER
        asked["shares"] = [{"path": f"{closed}/in", "tag": "t"}]
        failed = client.ask("start", fds, name="other", instance="open", **asked)
        assert failed["message"] == f"share {closed}/in: Permission denied"
        # A directory that is passed is used with no other rights than the user's.
        asked["shares"] = [{"path": "/x", "tag": "t", "directory": 1}]
        directory = os.open(closed, os.O_PATH | os.O_DIRECTORY)
        failed = client.ask("start", (*fds, directory), name="other", instance="open", **asked)
        os.close(directory)
        assert failed["message"] == "share /x: Permission denied"
        assert root.vm("mine")["state"] == "running"
