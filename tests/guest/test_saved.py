"""A saved Linux guest goes on, in the foreground and in the daemon, sooner than one that boots."""

from __future__ import annotations

import os
import subprocess
import time
from pathlib import Path

import pytest

from tests import artifacts
from tests.guest.daemon_guest import PROMPT, Shell, linux
from tests.guest.linux_guest import COMMAND_LINE
from tests.guest.tools import MODULES
from tests.system.vmd.conftest import needs_separation
from tests.system.vmd.daemon import Daemon
from tests.vmctl_driver import BOOT_TIMEOUT_S, VMCTL, ConsoleProcess, vmctl_run

pytestmark = [
    pytest.mark.guest,
    pytest.mark.slow,
    pytest.mark.timeout(900),
    needs_separation,
]

ASK, REPLY = b"cat /kept; echo re''ply\n", "reply"


def _vmctl(vmd: Daemon, *words: str) -> None:
    environ = {**os.environ, "VMD_SOCKET": str(vmd.socket)}
    subprocess.run([VMCTL, *words], env=environ, stdin=subprocess.DEVNULL, check=True)


def _answer(arguments: list[str], environ: dict[str, str] | None = None) -> float:
    """Ask a saved guest for its file; returns the seconds from the program's start."""
    began = time.monotonic()
    with ConsoleProcess(arguments, environment=environ) as guest:
        guest.send(ASK)
        guest.expect(REPLY, BOOT_TIMEOUT_S)
        took = time.monotonic() - began
        assert b"what is kept" in guest.output
    return took


def test_a_saved_linux_goes_on(tmp_path: Path) -> None:
    """Its shell answers with what it had, twice by `run` and once by `start`."""
    kernel = artifacts.kernel("cloud")
    with Daemon(tmp_path, linux("linux", kernel, enabled=False), is_user=False) as vmd:
        _vmctl(vmd, "start", "linux")
        with vmd.client(BOOT_TIMEOUT_S) as client, client.console("linux") as console:
            Shell(console).run("echo what is kept >/kept")
        _vmctl(vmd, "snapshot", "linux", "saved")
        _vmctl(vmd, "stop", "-f", "linux")
        (path,) = (vmd.socket.parent / "state" / "snapshots").glob("*/saved.snapshot")
        restored = [_answer(vmctl_run("--from", path)) for _ in range(2)]
        print(f"run --from: {restored[0]:.2f} s, then {restored[1]:.2f} s")
        environ = {"VMD_SOCKET": str(vmd.socket)}
        started = _answer([str(VMCTL), "start", "-c", "--from", "saved", "copy"], environ)
        print(f"start --from: {started:.2f} s")
    boot = ("-b", kernel.vmlinuz, "--initrd", artifacts.initramfs_with(kernel, MODULES, "tools"))
    began = time.monotonic()
    line = ("--append", f"{COMMAND_LINE} test=shell", "-m", "128M")
    with ConsoleProcess(vmctl_run(*boot, *line)) as guest:
        guest.expect(PROMPT.decode(), BOOT_TIMEOUT_S)
    booted = time.monotonic() - began
    print(f"cold: {booted:.2f} s, {booted / restored[1]:.1f} times as long as run --from")
    assert restored[1] < booted
