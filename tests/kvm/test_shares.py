"""`vmctl run --share`: its processes begin with the machine, and end with it in every way."""

from __future__ import annotations

import signal
import subprocess
from pathlib import Path

import pytest

from tests.vmctl_driver import VMCTL, ConsoleProcess, vmctl_run

pytestmark = pytest.mark.kvm

READY_S = 60.0


def children(pid: int) -> list[int]:
    """Return the children of a process, of all its threads."""
    tasks = Path(f"/proc/{pid}/task").iterdir()
    return [int(word) for task in tasks for word in (task / "children").read_text().split()]


def test_processes_of_shares(tmp_path: Path) -> None:
    """Each share has one; a reboot makes new ones, and none is left."""
    (tmp_path / "one").mkdir()
    options = ("--share", f"{tmp_path}/one:a", "--share", f"{tmp_path}:b:ro")
    with ConsoleProcess(vmctl_run("--selftest", "--timeout", "60", *options)) as vm:
        vm.expect("selftest: ready", READY_S)
        first = children(vm.pid)
        assert len(first) == 2
        vm.send("r")
        vm.expect("selftest: ready", READY_S)
        second = children(vm.pid)
        assert len(second) == 2
        assert not set(first) & set(second)
        vm.send("p")
        assert vm.wait() == 0
        assert vm.errors == b""
    assert not any(Path(f"/proc/{pid}").exists() for pid in (*first, *second))


def test_a_share_ends_with_a_vm_that_is_killed(tmp_path: Path) -> None:
    """Its connection ends, and so it does."""
    arguments = vmctl_run("--selftest", "--timeout", "60", "--share", f"{tmp_path}:a")
    with ConsoleProcess(arguments) as vm:
        vm.expect("selftest: ready", READY_S)
        (share,) = children(vm.pid)
        vm.signal(signal.SIGKILL)
        assert vm.wait() == -signal.SIGKILL
        end = subprocess.run(
            ["tail", f"--pid={share}", "-f", "/dev/null"], timeout=READY_S, check=False
        )
        assert end.returncode == 0


def test_a_server_that_is_not_there(tmp_path: Path) -> None:
    """One line names it."""
    done = subprocess.run(
        [VMCTL, "run", "--selftest", "--share", f"vhost-user:{tmp_path}/none:tag"],
        capture_output=True,
        timeout=60,
        check=False,
    )
    message = f"vmctl: vhost-user:{tmp_path}/none: No such file or directory\n"
    assert (done.returncode, done.stdout, done.stderr.decode()) == (1, b"", message)
