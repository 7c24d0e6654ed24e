"""Requests of a Linux guest after its boot: processors, an alarm, another kernel."""

from __future__ import annotations

import re
import signal
import stat
import subprocess
import time
from pathlib import Path

import pytest

from tests import artifacts
from tests.guest.linux_guest import COMMAND_LINE, MIB, Shell, ours
from tests.rig.initramfs import newc_entry

pytestmark = [pytest.mark.guest, pytest.mark.slow, pytest.mark.timeout(600)]

STOPPED_S = 8.0
CLOCK_TOLERANCE_S = 2.5
_SOURCE = Path(__file__).with_name("kexec.c")


def _guest_is_ahead_s(shell: Shell) -> float:
    return float(shell.run("date +%s")) - time.time()


def test_processors_an_alarm_and_a_stopped_process(cloud_kernel: artifacts.Kernel) -> None:
    """A processor can go and come, and none is added; the alarm works; SIGSTOP costs no time.

    `make test` boots once for all three.
    """
    with ours(cloud_kernel, "shell", cpus=2) as guest:
        guest.expect("# ")
        shell = Shell(guest)
        cpu = "/sys/devices/system/cpu"
        assert shell.run(f"cat {cpu}/possible {cpu}/present").split() == ["0-1", "0-1"]
        assert shell.run(f"echo 0 >{cpu}/cpu1/online; nproc") == "1"
        assert shell.run(f"echo 1 >{cpu}/cpu1/online; nproc") == "2"
        refused = shell.run(f"echo 2 >{cpu}/probe 2>&1; ls {cpu}; true")
        assert re.findall(r"\bcpu\d+\b", refused) == ["cpu0", "cpu1"]
        alarm = "/sys/class/rtc/rtc0/wakealarm"
        shell.run(f'echo +2 >{alarm}; test -n "$(cat {alarm})"')
        waits = f'for i in 1 2 3 4 5 6 7 8 9; do test -z "$(cat {alarm})" && break; sleep 1; done'
        shell.run(f'{waits}; test -z "$(cat {alarm})"')
        before = _guest_is_ahead_s(shell)
        guest.signal(signal.SIGSTOP)
        time.sleep(STOPPED_S)
        guest.signal(signal.SIGCONT)
        assert abs(_guest_is_ahead_s(shell) - before) < CLOCK_TOLERANCE_S
        assert "stall" not in shell.run("dmesg | grep -i stall; true")
        shell.power_off()


def test_kexec(cloud_kernel: artifacts.Kernel, tmp_path: Path) -> None:
    """A kernel that kexec starts, without a reset, finds the machine as it needs it."""
    program, image = tmp_path / "kexec", tmp_path / "more.img"
    subprocess.run(["gcc", "-O2", "-static", "-o", program, _SOURCE], check=True)
    initrd = artifacts.guest_initramfs(cloud_kernel)
    more = (
        ("kexec", 0o755, program),
        ("kexec-kernel", 0o644, cloud_kernel.vmlinuz),
        ("kexec-initrd", 0o644, initrd),
    )
    entries = [
        newc_entry(number, name, stat.S_IFREG | mode, path.read_bytes())
        for number, (name, mode, path) in enumerate(more, 1)
    ]
    entries.append(newc_entry(0, "TRAILER!!!", 0, b""))
    whole = initrd.read_bytes()
    image.write_bytes(whole.ljust(-(-len(whole) // 4) * 4, b"\0") + b"".join(entries))
    with ours(cloud_kernel, "shell", memory=384 * MIB, initrd=image) as guest:
        guest.expect("# ")
        guest.send(f"/kexec '{COMMAND_LINE} test=poweroff second'\n")
        guest.expect("init: up")
        assert guest.wait() == 0, guest.errors
    assert guest.output.count(b"init: up") == 2
