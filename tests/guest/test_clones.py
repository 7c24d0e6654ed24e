"""Clones of a Linux guest with an agent: each is another machine, and the source goes on."""

from __future__ import annotations

import os
import subprocess
import time
from pathlib import Path

import pytest

from tests import artifacts
from tests.guest import agent_guest
from tests.guest.linux_guest import COMMAND_LINE
from tests.system.vmd.conftest import needs_separation
from tests.system.vmd.daemon import Daemon, vm_block
from tests.vmctl_driver import BOOT_TIMEOUT_S, VMCTL

pytestmark = [
    pytest.mark.guest,
    pytest.mark.slow,
    pytest.mark.timeout(1200),
    needs_separation,
]

READY_S = 300
COMMAND_S = 240
SCRIPT = "hostname; cat /etc/machine-id; head -c 32 /dev/urandom | od -An -v -tx1 | tr -d ' \\n'"


def vmctl(vmd: Daemon, *words: str) -> subprocess.CompletedProcess[str]:
    """Run vmctl for as long as a guest in the rig may take."""
    return subprocess.run(
        [VMCTL, *words],
        env={**os.environ, "VMD_SOCKET": str(vmd.socket)},
        capture_output=True,
        text=True,
        timeout=READY_S + COMMAND_S,
        stdin=subprocess.DEVNULL,
        check=False,
    )


def test_clones_become_other_machines(tmp_path: Path) -> None:
    """Two at once: host name, machine-id, random numbers and time; then commands in each."""
    kernel = artifacts.kernel("cloud")
    lines = (
        f'initrd "{agent_guest.initramfs(kernel, tmp_path / "initrd")}"',
        f'append "{COMMAND_LINE} {agent_guest.APPEND}"',
        "vsock",
    )
    config = vm_block("linux", *lines, boot=kernel.vmlinuz, memory="256M", enabled=True)
    with Daemon(tmp_path, config, is_user=False) as vmd:

        def run(name: str, *words: str) -> str:
            began = time.monotonic()
            done = vmctl(vmd, "exec", name, "--", *words)
            assert done.returncode == 0, done.stderr
            print(f"{name}: exec {time.monotonic() - began:.1f} s")
            return done.stdout.strip()

        began = time.monotonic()
        with vmd.client(BOOT_TIMEOUT_S) as client:
            client.wait_for_state("linux", "running")
        done = vmctl(vmd, "wait", "--for", "ready", "--timeout", str(READY_S), "linux")
        print(f"agent: {time.monotonic() - began:.1f} s")
        if done.returncode:
            with vmd.client() as client, client.console("linux") as console:
                print(console.output.decode(errors="replace"))
        assert done.returncode == 0, done.stderr
        began = time.monotonic()
        words = ("--wait", "ready", "--timeout", str(READY_S), "-n", "2", "linux", "copy%d")
        done = vmctl(vmd, "clone", *words)
        print(f"two clones ready: {time.monotonic() - began:.1f} s")
        assert done.returncode == 0, done.stderr
        names = ("linux", "copy1", "copy2")
        told = {name: run(name, "sh", "-c", SCRIPT).split() for name in names}
        assert [told[name][0] for name in names[1:]] == ["copy1", "copy2"]
        assert told["copy1"][1] != told["copy2"][1]
        assert len({values[-1] for values in told.values()}) == 3
        for name in names[1:]:
            assert abs(int(run(name, "date", "+%s")) - time.time()) < COMMAND_S
            assert vmctl(vmd, "stop", "-f", name).returncode == 0
        assert run("linux", "uname", "-s") == "Linux"
        assert vmctl(vmd, "stop", "-f", "linux").returncode == 0
