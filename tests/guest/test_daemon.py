"""Unmodified Debian kernels under vmd with separated processes, from start to end."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests import artifacts
from tests.guest.linux_guest import COMMAND_LINE
from tests.system.vmd.conftest import needs_separation
from tests.system.vmd.daemon import Client, Daemon, Stream, vm_block
from tests.vmctl_driver import BOOT_TIMEOUT_S

pytestmark = [
    *(pytest.mark.guest, pytest.mark.slow, pytest.mark.timeout(600)),
    needs_separation,
]

PAUSE_S = 5.0
# The second that a guest prints may be a second old, and the host takes time to ask and to read.
CLOCK_TOLERANCE_S = 2.0

Start = Callable[[str], Daemon]


@pytest.fixture
def start_vmd(tmp_path: Path, cloud_kernel: artifacts.Kernel) -> Start:
    """Return a function that starts a vmd with one VM, `linux`, whose /init does as it says."""

    def start(test: str) -> Daemon:
        lines = (
            f'initrd "{artifacts.guest_initramfs(cloud_kernel)}"',
            f'append "{COMMAND_LINE} test={test}"',
        )
        config = vm_block("linux", *lines, boot=cloud_kernel.vmlinuz, memory="128M")
        return Daemon(tmp_path, config, is_user=False)

    return start


def _wait_for_end(client: Client) -> None:
    """Let `client` wait for the VM's end."""
    client.send("wait", name="linux")
    client.send("status", serial=1)
    assert client.receive()[0]["serial"] == 1


def _guest_is_ahead_s(console: Stream) -> float:
    """Return how far the guest's clock is ahead of the host's."""
    count = len(re.findall(rb"now=\d+", console.output))
    console.type(b"echo now=$(date +%s)\n")
    while len(found := re.findall(rb"now=(\d+)\r?\n", console.output)) == count:
        console.expect(b"now=", console.output.count(b"now=") + 1)
        console.expect(b"# ", console.output.count(b"# ") + 1)
    return float(found[-1]) - time.time()


def test_the_power_button_stops_a_guest(start_vmd: Start) -> None:
    """A stop presses the ACPI power button; the guest ends itself, and every waiter is answered."""
    with (
        start_vmd("button") as vmd,
        vmd.client(BOOT_TIMEOUT_S) as client,
        vmd.client(BOOT_TIMEOUT_S) as waiter,
    ):
        assert client.ask("start", name="linux")["type"] == "started"
        _wait_for_end(waiter)
        with client.console("linux") as console:
            console.expect(b"init: waiting for the button")
            assert client.ask("stop", name="linux", wait=True)["type"] == "terminated"
            console.read_to_end()
            assert b"init: power button" in console.output
        assert waiter.receive()[0]["type"] == "terminated"
        assert client.vm("linux")["state"] == "stopped"
        assert "did not stop" not in vmd.log.read_text()


def test_a_reboot_keeps_id_and_terminal(start_vmd: Start) -> None:
    """A guest that reboots is the same VM afterwards; a wait ends with it, as in OpenBSD."""
    with (
        start_vmd("shell") as vmd,
        vmd.client(BOOT_TIMEOUT_S) as client,
        vmd.client(BOOT_TIMEOUT_S) as waiter,
    ):
        assert client.ask("start", name="linux")["type"] == "started"
        _wait_for_end(waiter)
        before = client.vm("linux")
        with client.console("linux") as console:
            console.expect(b"# ")
            console.type(b"reboot -f\n")
            console.read_to_end()
        assert waiter.receive()[0]["type"] == "terminated"
        while (after := client.vm("linux"))["pid"] in (before["pid"], None, 0):
            time.sleep(0.1)
        assert (after["id"], after["tty"]) == (before["id"], before["tty"])
        with client.console("linux") as console:
            console.expect(b"init: up", 2)  # the first is in the ring's history
            console.expect(b"# ", 2)
            _wait_for_end(waiter)
            console.type(b"poweroff -f\n")
            assert waiter.receive()[0]["type"] == "terminated"
        assert client.vm("linux")["state"] == "stopped"


def test_a_pause_leaves_the_clock_right(start_vmd: Start) -> None:
    """A paused guest does not answer; once it continues, its clock shows that time has passed."""
    with start_vmd("shell") as vmd, vmd.client(BOOT_TIMEOUT_S) as client:
        assert client.ask("start", name="linux")["type"] == "started"
        with client.console("linux") as console:
            console.expect(b"# ")
            before = _guest_is_ahead_s(console)
            assert client.ask("pause", name="linux")["type"] == "done"
            assert client.vm("linux")["state"] == "paused"
            console.type(b"echo awa''ke\n")
            time.sleep(PAUSE_S)
            assert b"awake" not in console.output
            assert client.ask("unpause", name="linux")["type"] == "done"
            console.expect(b"awake")
            after = _guest_is_ahead_s(console)
            assert abs(after - before) < CLOCK_TOLERANCE_S
            console.type(b"poweroff -f\n")
            console.read_to_end()
