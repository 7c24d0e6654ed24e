"""VMs that are sent and received by vmctl, with real daemons, pipes and files."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.system.vmd.daemon import READY, Daemon, is_alive, vm_block
from tests.vmctl_driver import VMCTL

pytestmark = pytest.mark.kvm

Start = Callable[[str], Daemon]
TIMEOUT_S = 120


def vmctl(
    vmd: Daemon, *words: str, stdin: int | None = None, stdout: int | None = None
) -> subprocess.CompletedProcess[bytes]:
    """Run vmctl, with these descriptors for its standard input and output."""
    return subprocess.run(
        [VMCTL, *words],
        env={**os.environ, "VMD_SOCKET": str(vmd.socket)},
        stdin=subprocess.DEVNULL if stdin is None else stdin,
        stdout=subprocess.PIPE if stdout is None else stdout,
        stderr=subprocess.PIPE,
        timeout=TIMEOUT_S,
        check=False,
    )


def send_to(path: Path, vmd: Daemon, *words: str) -> subprocess.CompletedProcess[bytes]:
    """Send a VM into a file."""
    with path.open("wb") as file:
        return vmctl(vmd, "send", *words, stdout=file.fileno())


def receive_from(path: Path, vmd: Daemon, *words: str) -> subprocess.CompletedProcess[bytes]:
    """Receive a VM from a file."""
    with path.open("rb") as file:
        return vmctl(vmd, "receive", *words, stdin=file.fileno())


def test_a_vm_goes_through_a_file(start_vmd: Start, tmp_path: Path) -> None:
    """What is sent has ended here, and goes on where it is received: it hears what is typed."""
    with start_vmd(vm_block("one", enabled=True)) as vmd, vmd.client() as client:
        pid = client.wait_for_state("one", "running")["pid"]
        with client.console("one") as console:
            console.expect(READY)
        sent = send_to(tmp_path / "stream", vmd, "one")
        assert (sent.stderr, sent.returncode) == (b"vmctl: sent vm one successfully\n", 0)
        assert client.wait_for_state("one", "stopped")["pid"] is None
        assert isinstance(pid, int)
        assert not is_alive(pid)
        vmd.wait_for_log("one: sent vm 1 successfully.")
        received = receive_from(tmp_path / "stream", vmd, "two")
        assert received.stderr.startswith(b"vmctl: started vm 2 successfully, tty /dev/pts/")
        assert received.returncode == 0
        with client.console("two") as console:
            console.type(b"e")
            console.expect(b"e")
