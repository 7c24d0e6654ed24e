"""The TPM with Linux's driver and TPM 2.0 Tools: random numbers, and a secret that is sealed.

With `vmctl run`, over a reboot; under vmd, over a stop and a start.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests import artifacts
from tests.guest import daemon_guest
from tests.guest.linux_guest import COMMAND_LINE, Shell
from tests.guest.tools import UNPACK, missing, tools_disk
from tests.system.vmd.conftest import missing_separation
from tests.system.vmd.daemon import Client, Daemon, vm_block
from tests.vmctl_driver import ConsoleProcess, vmctl_run

LIBRARY = "libtss2-tcti-device.so.0"
"""Libraries that the tools load at run time."""
PROGRAMS = ("tpm2", "swtpm")

pytestmark = [
    pytest.mark.guest,
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif(bool(missing(PROGRAMS)), reason=missing(PROGRAMS)),
]

COMMAND_S = 240.0
MODULES = ("virtio_pci", "virtio_blk")
TOOLS = "export TPM2TOOLS_TCTI=device:/dev/tpmrm0 LD_LIBRARY_PATH=/lib; cd /tmp"
PRIMARY = "tpm2 createprimary -Q -c primary"
SEAL = "echo -n swordfish | tpm2 create -Q -C primary -i - -u public -r private"
UNSEAL = "tpm2 load -Q -C primary -u public -r private -c sealed && tpm2 unseal -c sealed"


def _library() -> str:
    shown = subprocess.run(["/sbin/ldconfig", "-p"], check=True, capture_output=True, text=True)
    return next(
        line.split(" => ")[1] for line in shown.stdout.splitlines() if LIBRARY in line.split()
    )


def _begin(console: ConsoleProcess) -> Shell:
    console.expect("init: up")
    console.expect("# ")
    shell = Shell(console)
    shell.run(UNPACK, COMMAND_S)
    shell.run(f"{TOOLS}; {PRIMARY}", COMMAND_S)
    return shell


def test_random_numbers_and_a_sealed_secret(tmp_path: Path) -> None:
    """The secret can be had after a reboot, and in no other VM."""
    kernel = artifacts.kernel("cloud")
    disk = tools_disk(tmp_path / "disk", "tpm2", _library())

    def started(state: str) -> ConsoleProcess:
        return ConsoleProcess(
            vmctl_run(
                *("-m", "256M", "-b", kernel.vmlinuz, "-d", f"raw:{disk},ro"),
                *("--initrd", artifacts.initramfs_with(kernel, MODULES, "tpm")),
                *("--append", f"{COMMAND_LINE} test=shell", "--tpm", tmp_path / state),
            )
        )

    with started("one") as console:
        shell = _begin(console)
        first, second = (shell.run("tpm2 getrandom --hex 16", COMMAND_S) for _ in range(2))
        assert len(first) == len(second) == 32
        assert first != second
        shell.run(SEAL, COMMAND_S)
        assert shell.run(UNSEAL, COMMAND_S) == "swordfish"
        files = {name: shell.run(f"base64 -w 64 {name}") for name in ("public", "private")}
        console.send("reboot -f\n")
        shell = _begin(console)
        _type(shell, files)
        assert shell.run(UNSEAL, COMMAND_S) == "swordfish"
        shell.power_off()
    with started("two") as console:
        shell = _begin(console)
        _type(shell, files)
        shown = shell.run(f"({UNSEAL}) 2>&1; true", COMMAND_S)
        assert "swordfish" not in shown
        assert "integrity check failed" in shown
        shell.power_off()


@pytest.mark.skipif(bool(missing_separation()), reason=str(missing_separation()))
def test_a_sealed_secret_under_vmd(tmp_path: Path) -> None:
    """The secret can be had after a stop and a start, and in no other VM."""
    kernel = artifacts.kernel("cloud")
    disk = tools_disk(tmp_path / "disk", "tpm2", _library())
    lines = (
        f'initrd "{artifacts.initramfs_with(kernel, MODULES, "tpm")}"',
        f'append "{COMMAND_LINE} test=shell"',
        f'disk "{disk}" format raw {{ ro }}',
        "tpm",
    )
    config = "".join(
        vm_block(name, *lines, boot=kernel.vmlinuz, memory="256M") for name in ("one", "two")
    )

    def shown(client: Client, name: str, commands: Sequence[str]) -> list[str]:
        """Start a VM, run commands, and end it; returns what they show."""
        assert client.ask("start", name=name)["type"] == "started"
        with client.console(name) as console:
            shell = daemon_guest.Shell(console)
            found = [shell.run(each) for each in (UNPACK, f"{TOOLS}; {PRIMARY}", *commands)]
        assert client.ask("stop", name=name, force=True, wait=True)["type"] == "terminated"
        return found[2:]

    with Daemon(tmp_path, config, is_user=False) as vmd, vmd.client(COMMAND_S) as client:
        names = ("public", "private")
        told = shown(client, "one", (SEAL, *(f"base64 -w 64 {name}" for name in names)))
        words = [re.findall(r"^[A-Za-z0-9+/]+=*$", text, re.MULTILINE) for text in told[1:]]
        typed = [
            f"echo {word} | base64 -d >>{name}"
            for name, pieces in zip(names, words, strict=True)
            for word in pieces
        ]
        again = shown(client, "one", (*typed, UNSEAL))
        assert "swordfish" in again[-1]
        other = shown(client, "two", (*typed, UNSEAL))
        assert "integrity check failed" in other[-1]
        assert "swordfish" not in other[-1]


def _type(shell: Shell, files: dict[str, str]) -> None:
    for name, text in files.items():
        for line in text.split():
            shell.run(f"echo {line} >>{name}.text")
        shell.run(f"base64 -d {name}.text >{name}")
