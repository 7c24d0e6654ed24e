"""Debian's kernels under vmd: the text of a VM in vm.conf, and the shell on its console."""

from __future__ import annotations

import subprocess
from pathlib import Path

from tests import artifacts
from tests.guest.linux_guest import COMMAND_LINE
from tests.guest.tools import MODULES
from tests.system.vmd.daemon import Stream, vm_block

PROMPT = b"# "


def linux(name: str, kernel: artifacts.Kernel, *lines: str, enabled: bool = True) -> str:
    """Return the text of a VM with a shell on its console."""
    boot = (
        f'initrd "{artifacts.initramfs_with(kernel, MODULES, "tools")}"',
        f'append "{COMMAND_LINE} test=shell"',
    )
    return vm_block(name, *boot, *lines, boot=kernel.vmlinuz, memory="128M", enabled=enabled)


class Shell:
    """A guest's shell on its console."""

    def __init__(self, console: Stream) -> None:
        """Wait for its first prompt."""
        self._console = console
        self._count = 0
        console.expect(PROMPT)
        self.run("dmesg -n 1; ip link set lo up; ip link set eth0 up")

    def run(self, command: str) -> str:
        """Run a command; returns its output."""
        self._count += 1
        console, mark = self._console, f"<{self._count}>".encode()
        start = len(console.output)
        # The typed command has quotes in the middle of the mark, so that its echo does not match.
        console.type(f"{command}; echo '<'{self._count}'>'\n".encode())
        console.expect(mark, console.output.count(mark) + 1)
        end = console.output.rindex(mark)
        while PROMPT not in console.output[end:]:
            console.expect(PROMPT, console.output.count(PROMPT) + 1)
        return console.output[start:end].decode(errors="replace").replace("\r", "")

    def reaches(self, address: str, *options: str) -> bool:
        """Tell whether every ping is answered."""
        words = " ".join(("ping -c 3 -W 5", *options, address))
        return " 0% packet loss" in self.run(words)


def without_vhost(folder: Path) -> list[str]:
    """Return words that run the following ones with a vhost-net that cannot be opened."""
    node = folder / "vhost-net"
    if not node.exists():
        subprocess.run(["mknod", node, "c", "511", "0"], check=True)  # a device without a driver
    hide = f'[ ! -e /dev/vhost-net ] || mount --bind {node} /dev/vhost-net; exec "$@"'
    return ["unshare", "--mount", "sh", "-c", hide, "sh"]
