"""Debuggers of VMs, through a real daemon: rights, pauses, and the end of a session."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.debugging import PLAIN, Conversation
from tests.system.vmd.daemon import READY, TIMEOUT_S, Daemon, vm_block, vmctl
from tests.system.vmd.test_send import send_to
from tests.vmctl_driver import VMCTL
from vmctl.client import Client, opened

pytestmark = pytest.mark.kvm

Start = Callable[[str], Daemon]
CONFIGURATION = vm_block("web") + vm_block("off")


def debug(client: Client, name: str) -> Conversation:
    """Debug a VM."""
    client.send("debug", {"name": name})
    stream, _ = opened(client, "connected")
    return Conversation(stream)


def _started(vmd: Daemon) -> None:
    with vmd.client() as client:
        client.ask("start", name="web")
        with client.console("web") as console:
            console.expect(READY)


def test_a_vm_is_debugged(start_vmd: Start, tmp_path: Path) -> None:
    """A VM stops for one debugger, cannot be sent meanwhile, and runs on when it leaves."""
    with start_vmd(CONFIGURATION) as vmd, Client(str(vmd.socket)) as client:
        _started(vmd)
        with vmd.client() as other, other.console("web") as console:
            console.type(b"s")  # a step ends with the next interrupt if the processor sleeps
            console.expect(b"spin with interrupts off")
        with debug(client, "web") as debugger:
            assert debugger.ask(b"qfThreadInfo") == b"m1"
            assert len(debugger.ask(b"g")) > 600
            with debug(client, "web") as second:
                assert second.answer() == b""
            sent = send_to(tmp_path / "stream", vmd, "web")
            assert sent.returncode == 1
            assert b"a debugger is attached" in sent.stderr
            assert debugger.ask(b"vCont;s:1").startswith(b"T05thread:1;")
            client.pause("web")
            client.unpause("web")
            assert debugger.ask(b"vCont;s:1").startswith(b"T05thread:1;")
        _wait_until_it_is_sent(vmd, tmp_path / "stream")


def _wait_until_it_is_sent(vmd: Daemon, path: Path) -> None:
    """Send the VM as soon as its process has noticed the debugger's end."""
    end = time.monotonic() + TIMEOUT_S
    while send_to(path, vmd, "web").returncode:
        assert time.monotonic() < end


def _gdb(vmd: Daemon, *words: str) -> subprocess.CompletedProcess[str]:
    """Have `vmctl gdb` run commands of gdb's in the VM `web`."""
    return subprocess.run(
        [VMCTL, "gdb", "web", "--", "-nx", "-batch", *words],
        env={**PLAIN, "VMD_SOCKET": str(vmd.socket)},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )


def test_gdb_debugs_a_vm(start_vmd: Start) -> None:
    """`vmctl gdb` starts gdb, which finds the guest; at its end the guest runs on."""
    with start_vmd(CONFIGURATION) as vmd:
        _started(vmd)
        done = _gdb(vmd, "-ex", "info threads", "-ex", "info registers cr0")
        assert done.returncode == 0, done.stderr
        assert "Thread 1 (vcpu0)" in done.stdout
        assert "cr0" in done.stdout
        assert vmctl(vmd, "stop", "-w", "web").returncode == 0


def test_vmctl_gdb_again_and_again(start_vmd: Start) -> None:
    """`vmctl gdb` right after another one is served; beside another debugger it says so."""
    with start_vmd(CONFIGURATION) as vmd, Client(str(vmd.socket)) as client:
        _started(vmd)
        for _ in range(3):
            done = _gdb(vmd, "-ex", "info threads")
            assert done.returncode == 0, done
            assert "Thread 1 (vcpu0)" in done.stdout
        with debug(client, "web") as debugger:
            assert debugger.ask(b"?").startswith(b"T02")
            refused = vmctl(vmd, "gdb", "web")
            assert (refused.returncode, refused.stdout) == (1, "")
            assert refused.stderr == "vmctl: web: another debugger is attached\n"
            assert debugger.ask(b"?").startswith(b"T02")


def test_who_is_refused(start_vmd: Start) -> None:
    """For a VM that is missing or stopped, vmctl prints why, and starts no gdb."""
    with start_vmd(CONFIGURATION) as vmd:
        for name, text in (("none", "no such VM"), ("off", "vm is not running")):
            done = vmctl(vmd, "gdb", name)
            assert (done.returncode, done.stdout) == (1, "")
            assert done.stderr.splitlines()[-1].endswith(text), done.stderr


def test_a_debugger_ends_a_vm(start_vmd: Start) -> None:
    """The command `kill` of gdb ends the VM, and the end is reported."""
    with start_vmd(CONFIGURATION) as vmd, Client(str(vmd.socket)) as client:
        _started(vmd)
        with debug(client, "web") as debugger:
            debugger.send(b"k")
            assert debugger.answer() in {b"W00", b""}
        assert vmctl(vmd, "wait", "web").returncode in {0, 1}
        shown = vmctl(vmd, "show", "-a", "web").stdout
        assert "a debugger ended it" in shown, shown
