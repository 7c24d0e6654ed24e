"""`vmctl -H` through a real sshd of our own, to a daemon behind it."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from tests.system.vmd.daemon import Daemon, vm_block
from tests.system.vmd.test_migrate import sshd
from tests.vmctl_driver import VMCTL, ConsoleProcess

pytestmark = [pytest.mark.kvm, pytest.mark.root]

TIMEOUT_S = 120


def test_through_ssh(tmp_path: Path) -> None:
    """Output, exit status and a terminal come from there; without sshd the status is 255."""
    with Daemon(tmp_path, vm_block("a-vm")) as vmd:
        environment = f"VMD_SOCKET={vmd.socket} PATH={VMCTL.parent}:/usr/bin:/bin"
        with sshd(tmp_path, environment) as ssh:
            environ = {**os.environ, "VMCTL_SSH": ssh, "VMD_SOCKET": "/nonexistent"}

            def there(*words: str) -> tuple[int, str, str]:
                done = subprocess.run(
                    [VMCTL, "-H", "root@127.0.0.1", *words],
                    env=environ,
                    stdin=subprocess.DEVNULL,
                    capture_output=True,
                    text=True,
                    timeout=TIMEOUT_S,
                    check=False,
                )
                return done.returncode, done.stdout, done.stderr

            status, output, errors = there("status")
            assert (status, output.split()[-1:], errors) == (0, ["a-vm"], "")
            assert there("start", "a-vm")[0] == 0
            status, _, errors = there("pause", "a b")
            assert status == 1
            assert "vm not found" in errors or "no such VM" in errors
            words = [str(VMCTL), "-H", "root@127.0.0.1", "console", "a-vm"]
            with ConsoleProcess(words, is_tty=True, environment=environ) as console:
                console.expect("selftest: ready", TIMEOUT_S)
                console.send("\r~.")
                assert console.wait(TIMEOUT_S) in {0, 255}
        assert there("status")[0] == 255
