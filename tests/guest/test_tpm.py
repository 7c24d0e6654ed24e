"""The TPM with Linux's driver and TPM 2.0 Tools: random numbers, and a secret that is sealed."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests import artifacts
from tests.guest.linux_guest import COMMAND_LINE, Shell
from tests.guest.tools import UNPACK, missing, tools_disk
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


def _type(shell: Shell, files: dict[str, str]) -> None:
    for name, text in files.items():
        for line in text.split():
            shell.run(f"echo {line} >>{name}.text")
        shell.run(f"base64 -d {name}.text >{name}")
