"""The watchdog of the daemon's VMs: it resets a guest that hangs, and waits while it is paused."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests import guests
from tests.system.vmd.daemon import Daemon
from vmd.rules.lifecycle import EARLY_S

pytestmark = pytest.mark.kvm

Start = Callable[[str], Daemon]
HANGS = "vm/hangs: watchdog: the guest hangs, and is reset"


def test_a_hanging_guest(start_vmd: Start, tmp_path: Path) -> None:
    """A VM paused for longer than its watchdog's time is reset only after it continues."""
    image = tmp_path / "hangs"
    image.write_bytes(guests.firmware(guests.hanging(2)))
    config = f'vm "hangs" {{\nboot "{image}"\nmemory 16M\nwatchdog\ndisable\n}}\n'
    with start_vmd(config) as vmd, vmd.client() as client:
        assert client.ask("start", name="hangs")["type"] == "started"
        assert client.ask("pause", name="hangs")["type"] == "done"
        already = vmd.log.read_text().count(HANGS)  # a busy host may have taken its time
        time.sleep(3)
        assert vmd.log.read_text().count(HANGS) == already
        assert client.ask("unpause", name="hangs")["type"] == "done"
        vmd.wait_for_log(HANGS)
        client.wait_for_state("hangs", "running")


def test_the_guest_learns_who_has_reset_it(start_vmd: Start, tmp_path: Path) -> None:
    """The watchdog's "timed out" is there after the reset, and not at the start before it."""
    image = tmp_path / "hangs"
    image.write_bytes(guests.firmware(guests.hanging_once(2)))
    config = f'vm "hangs" {{\nboot "{image}"\nmemory 16M\nwatchdog\ndisable\n}}\n'
    with start_vmd(config) as vmd, vmd.client() as client:
        for number in range(2):
            if number:
                time.sleep(EARLY_S)  # the daemon refuses a VM that starts too often
            bites = vmd.log.read_text().count(HANGS)
            assert client.ask("start", name="hangs")["type"] == "started"
            client.wait_for_state("hangs", "stopped")
            assert vmd.log.read_text().count(HANGS) == bites + 1
            end = client.vm("hangs")["last_end"]
            assert isinstance(end, dict)
            assert end["message"] == "debug exit 0x2a"
