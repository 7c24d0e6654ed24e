"""The guest agent in a Linux guest, reached by the guest's vsock device."""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import tarfile
import time
from pathlib import Path

import pytest

from tests import artifacts
from tests.guest.agent_guest import MODULES, files
from tests.guest.linux_guest import COMMAND_LINE, Shell
from tests.guest.tools import UNPACK
from tests.vmctl_driver import VMCTL, ConsoleProcess, vmctl_run
from vmctl.client import CommandError
from vmctl.guest.access import agent_of
from vmctl.guest.agent import Agent

pytestmark = [pytest.mark.guest, pytest.mark.core, pytest.mark.slow, pytest.mark.timeout(900)]

COMMAND_S = 240.0
START_S = 300.0
SIZE = 1 << 20
MACHINE = "fedcba9876543210" * 2
NOW = 2_000_000_000
_BLOCK = 1 << 20


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    """A disk with the agent, and the parts of Debian's Python that it uses."""
    disk = tmp_path / "disk"
    with tarfile.open(disk, "w") as archive:
        for name, path in files().items():
            archive.add(path, arcname=name)
    with disk.open("ab") as image:
        image.truncate(-(-image.tell() // _BLOCK) * _BLOCK)
    return disk


def _answers(agent: Agent) -> bool:
    try:
        agent.ping(timeout=COMMAND_S)
    except (CommandError, OSError):
        return False
    return True


def _vmctl(*words: str | Path, stdin: bytes | None = None) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        [VMCTL, *words], input=stdin, capture_output=True, check=False, timeout=COMMAND_S
    )


def test_an_agent_in_a_guest(disk: Path, tmp_path: Path) -> None:
    """Commands, files, operations for clones, and every kind of end, by `vmctl run --vsock`."""
    kernel = artifacts.kernel("cloud")
    path = tmp_path / "vsock"
    arguments = vmctl_run(
        *("-m", "256M", "-b", kernel.vmlinuz, "-d", f"raw:{disk},ro", "--vsock", path),
        *("--initrd", artifacts.initramfs_with(kernel, MODULES, "vsock")),
        *("--append", f"{COMMAND_LINE} test=shell"),
    )
    with ConsoleProcess(arguments) as console:
        console.expect("# ")
        shell = Shell(console)
        shell.run(f"{UNPACK}; mkdir -p /dev/pts; mount -t devpts devpts /dev/pts", COMMAND_S)
        before = _vmctl("exec", path, "--", "true")
        assert (before.returncode, before.stdout) == (255, b"")
        shell.run("python3 -I /bin/vmm-agent >/agent.log 2>&1 & sleep 1")
        agent = agent_of(str(path))
        end = time.monotonic() + START_S
        while not _answers(agent):
            assert time.monotonic() < end
        _commands(path, agent)
        _files(path, tmp_path)
        _clone(agent)
        _ends(path, shell)
    log = console.output.decode(errors="replace")
    assert "Traceback" not in log


def _commands(path: Path, agent: Agent) -> None:
    done = _vmctl("exec", path, "--", "sh", "-c", "uname -s; echo bad >&2; exit 42")
    assert (done.returncode, done.stdout, done.stderr) == (42, b"Linux\n", b"bad\n")
    assert _vmctl("exec", path, "--", "sh", "-c", "kill -9 $$").returncode == 137
    assert _vmctl("exec", path, "--", "/none").returncode == 127
    assert _vmctl("exec", "--timeout", "5", path, "--", "sleep", "1000").returncode == 124
    data = os.urandom(SIZE)
    done = _vmctl("exec", "-i", path, "--", "cat", stdin=data)
    assert hashlib.sha256(done.stdout).digest() == hashlib.sha256(data).digest()
    with agent.execute(["sh", "-c", "stty size; exit 3"], terminal=(33, 99)) as session:
        assert session.read(100) == b"33 99\r\n"
        assert session.finish() == {"status": 3}


def _files(path: Path, tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    (tree / "deep").mkdir(parents=True)
    (tree / "deep" / "data").write_bytes(os.urandom(SIZE // 4))
    (tree / "link").symlink_to("deep/data")
    for words in (
        ("-r", tree, f"{path}:/tmp/tree"),
        ("-r", f"{path}:/tmp/tree", tmp_path / "back"),
        (f"{path}:/tmp/tree/deep/data", tmp_path / "one"),
    ):
        done = _vmctl("cp", *words)
        assert (done.returncode, done.stderr) == (0, b"")
    data = (tree / "deep" / "data").read_bytes()
    assert (tmp_path / "back" / "deep" / "data").read_bytes() == data
    assert (tmp_path / "one").read_bytes() == data
    assert str((tmp_path / "back" / "link").readlink()) == "deep/data"


def _clone(agent: Agent) -> None:
    agent.add_entropy()
    agent.set_clock(NOW * 1_000_000_000)
    told = int(agent.run(["date", "+%s"]).output)
    assert NOW <= told < NOW + COMMAND_S
    agent.set_identity(machine_id=MACHINE, host_name="clone-7")
    done = agent.run(["sh", "-c", "cat /etc/machine-id; hostname"])
    assert done.output.decode() == f"{MACHINE}\nclone-7\n"
    agent.wait_for(file="/etc/hostname", timeout=COMMAND_S)


def _ends(path: Path, shell: Shell) -> None:
    """Kill the client, then the agent's session; then power off under a command."""
    sleep = [str(VMCTL), "exec", str(path), "--", "sh", "-c", "echo $$; exec sleep 7777"]
    for number in ("client", "session", "guest"):
        with subprocess.Popen(sleep, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
            assert process.stdout
            assert process.stderr
            pid = int(process.stdout.readline())
            if number == "client":
                process.send_signal(signal.SIGKILL)
                assert process.wait(COMMAND_S) == -signal.SIGKILL
            elif number == "session":
                # The command's parent is the agent's process for its connection.
                shell.run(f"kill -9 $(awk '{{ print $4 }}' /proc/{pid}/stat)")
                assert process.wait(COMMAND_S) == 255
                assert b"has ended" in process.stderr.read()
            else:
                shell.power_off()
                assert process.wait(COMMAND_S) == 255
                assert process.stderr.read().count(b"\n") == 1
        if number != "guest":
            shell.run(f"while [ -e /proc/{pid} ]; do sleep 1; done", COMMAND_S)
