"""The disk of the Debian guest that `bench/debian` measures: systemd, a root shell, the agent.

It is that of `tests.cloud_image`, without its first boot, and as small as its files allow.
"""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

from tests.agents import AGENT
from tests.cloud_image import cloud_image

APPEND = "root=/dev/vda rw noatime console=ttyS0 quiet panic=-1 cloud-init=disabled"
PROMPT = "root@debian:~# "

_SPARE_BLOCKS = 24 << 10
_LOGIN = """[Service]
ExecStart=
ExecStart=-/sbin/agetty --autologin root --keep-baud 115200 - vt220
"""
_UNITS = "/etc/systemd/system"
_EDITS = f"""rm /etc/machine-id
rm /etc/hostname
write {{folder}}/machine-id /etc/machine-id
write {{folder}}/hostname /etc/hostname
write {{agent}} /usr/local/sbin/vmm-agent
set_inode_field /usr/local/sbin/vmm-agent mode 0100755
write {{unit}} {_UNITS}/vmm-agent.service
symlink {_UNITS}/multi-user.target.wants/vmm-agent.service {_UNITS}/vmm-agent.service
symlink {_UNITS}/ssh.service /dev/null
mkdir {_UNITS}/serial-getty@ttyS0.service.d
write {{folder}}/login {_UNITS}/serial-getty@ttyS0.service.d/login.conf
"""


class Guest(NamedTuple):
    """What boots: files, whose disk is raw."""

    disk: Path
    vmlinuz: Path
    initrd: Path


def make(folder: Path) -> Guest:
    """Make the guest in a directory.

    Raises:
        tests.artifacts.ArtifactError: there is no image.
    """
    image = cloud_image()
    made = Guest(folder / "debian.raw", folder / "vmlinuz", folder / "initrd")
    shutil.copy(image.vmlinuz, made.vmlinuz)
    shutil.copy(image.initrd, made.initrd)
    _run("cp", "--sparse=always", image.disk, made.disk)
    for name, text in (
        ("machine-id", "0123456789abcdef0123456789abcdef\n"),
        ("hostname", "debian\n"),
        ("login", _LOGIN),
    ):
        (folder / name).write_text(text)
    edits = folder / "edits"
    edits.write_text(
        _EDITS.format(folder=folder, agent=AGENT, unit=AGENT.with_name("vmm-agent.service"))
    )
    _run("debugfs", "-w", "-f", edits, made.disk)
    subprocess.run(["e2fsck", "-f", "-p", made.disk], check=False, capture_output=True)
    _run("resize2fs", "-M", made.disk)
    listed = _run("dumpe2fs", "-h", made.disk)
    (count,) = (line.split()[2] for line in listed.splitlines() if line.startswith("Block count"))
    size = int(count) + _SPARE_BLOCKS
    with made.disk.open("r+b") as file:
        file.truncate(size * 4096)
    _run("resize2fs", made.disk)
    return made


def _run(*command: str | Path) -> str:
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return done.stdout
