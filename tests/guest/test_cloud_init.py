"""A cloud's image on its first boot: `vmctl start --cloud-init --ssh-key --agent`, then ssh."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.cloud_image import cloud_image
from tests.guest.tools import missing
from tests.system.vmd.conftest import needs_separation
from tests.system.vmd.daemon import Daemon
from tests.vmctl_driver import VMCTL

PROGRAMS = ("ssh", "ssh-keygen")
pytestmark = [
    *(pytest.mark.guest, pytest.mark.slow, pytest.mark.timeout(3600)),
    needs_separation,
    pytest.mark.skipif(bool(missing(PROGRAMS)), reason=missing(PROGRAMS)),
]

BOOT_S = 3000.0
COMMAND_S = 300.0
POLL_S = 5.0
USER_DATA = """#cloud-config
write_files:
  - path: /srv/hello
    content: from the host
"""


def test_a_first_boot(tmp_path: Path) -> None:
    """The guest has the VM's name, the file of user-data, keys for two users, and the agent."""
    image = cloud_image()
    key = tmp_path / "key"
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(key)], check=True)
    data = tmp_path / "user-data"
    data.write_text(USER_DATA)
    began = time.monotonic()
    with Daemon(tmp_path, "", is_user=False) as vmd:
        environment = {
            **os.environ,
            "VMD_SOCKET": str(vmd.socket),
            "XDG_STATE_HOME": str(tmp_path / "state"),
        }

        def vmctl(*words: str | Path) -> subprocess.CompletedProcess[str]:
            return subprocess.run(
                [VMCTL, *words],
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                check=False,
                env=environment,
                timeout=COMMAND_S,
            )

        def ssh(user: str, *words: str) -> subprocess.CompletedProcess[str]:
            options = ("-i", key, "-o", "BatchMode=yes", "-o", "ServerAliveInterval=60")
            return vmctl("ssh", *options, f"{user}@web", "--", *words)

        started = vmctl(
            *("start", "-b", image.vmlinuz, "--initrd", image.initrd, "-m", "512M"),
            *("--append", "root=/dev/vda ro console=ttyS0 panic=-1"),
            *("-d", f"raw:{image.disk},snapshot", "--cloud-init", data),
            *("--ssh-key", f"{key}.pub", "--agent", "web"),
        )
        assert started.returncode == 0, started
        with vmd.client(BOOT_S) as client, client.console("web") as console:
            try:
                console.expect(b"login: ")
                _until(lambda: ssh("root", "true").returncode == 0)
                print(f"ssh: {time.monotonic() - began:.0f} s")
                done = ssh("root", "hostname; cat /srv/hello; exit 42")
                assert (done.returncode, done.stdout) == (42, "web\nfrom the host")
                assert ssh("debian", "sudo", "-n", "id", "-u").stdout == "0\n"
                _until(lambda: vmctl("exec", "web", "--", "true").returncode == 0)
                print(f"agent: {time.monotonic() - began:.0f} s")
                told = vmctl("exec", "web", "--", "cloud-init", "status", "--wait", "--long")
                assert "status: done" in told.stdout, told
            finally:
                print(console.output.decode(errors="replace"))


def _until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + BOOT_S
    while not condition():
        assert time.monotonic() < end
        time.sleep(POLL_S)
