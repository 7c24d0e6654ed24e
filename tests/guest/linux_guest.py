"""Debian guests under test, and the same guests under QEMU for comparison."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tests import artifacts
from tests.vmctl_driver import ConsoleProcess, vmctl_run

MIB = 1 << 20
GIB = 1 << 30

# A panic ends at once (QEMU has no triple fault to wait for); `quiet` saves emulated serial time.
COMMAND_LINE = "console=ttyS0 quiet panic=-1"

COMMAND_S = 120.0

# A guest prints this, QEMU's too, if its host was busy at the wrong moment: it is no fault of ours.
_OF_THE_HOSTS_LOAD = "hrtimer: interrupt took"


@dataclass(frozen=True, slots=True)
class Report:
    """A guest's own report.

    `memory` is what `free` calls total and `ram` the sum of the firmware's RAM ranges, both in
    bytes; `complaints` are the kernel's messages of levels 0 to 4, numbers and times made equal.
    """

    release: str
    nproc: int
    memory: int
    ram: int
    complaints: frozenset[str]

    @classmethod
    def parse(cls, console: str) -> Report:
        """Read the lines that the guest's /init prints for `test=report`."""
        lines = re.findall(r"^report: (\w+) ?(.*?)\r*$", console, re.MULTILINE)
        fields = dict(lines)
        return cls(
            release=fields["release"],
            nproc=int(fields["nproc"]),
            memory=int(fields["memory"]) << 10,
            ram=int(fields["ram"]),
            complaints=frozenset(
                complaint(text)
                for kind, text in lines
                if kind == "dmesg" and _OF_THE_HOSTS_LOAD not in text
            ),
        )


def complaint(raw: str) -> str:
    """Return a line of `dmesg -r` without the parts that differ between two runs.

    It loses the time stamp and the value of each number, but not the number's presence.
    """
    text = re.sub(r"^(<\d>)\[ *\d+\.\d+\] ", r"\1", raw.strip())
    return re.sub(r"0x[0-9a-f]+|\b[0-9a-f]{8,16}\b|\b\d+\b", "N", text)


def ours(
    kernel: artifacts.Kernel,
    test: str,
    *,
    cpus: int = 1,
    memory: int = 256 * MIB,
    options: Sequence[str] = (),
    initrd: Path | None = None,
) -> ConsoleProcess:
    """Start `vmctl run` with a guest whose /init does `test`; `memory` in bytes."""
    return ConsoleProcess(
        vmctl_run(
            *("-m", str(memory), "-p", str(cpus)),
            *("-b", kernel.vmlinuz, "--initrd", initrd or artifacts.guest_initramfs(kernel)),
            *("--append", f"{COMMAND_LINE} test={test}"),
            *options,
        )
    )


def qemus(
    kernel: artifacts.Kernel, test: str, *, machine: str = "pc", cpus: int = 1, memory: int
) -> ConsoleProcess:
    """Start QEMU with the same guest on the same KVM; `memory` in bytes, a multiple of 1 MiB."""
    image = artifacts.guest_initramfs(kernel)
    return ConsoleProcess(
        [
            *("qemu-system-x86_64", "-M", machine, "-accel", "kvm", "-cpu", "host"),
            *("-m", f"{memory // MIB}M", "-smp", str(cpus)),
            *(
                "-nodefaults",
                "-no-user-config",
                "-display",
                "none",
                "-no-reboot",
                "-serial",
                "stdio",
            ),
            *("-device", "pvpanic", "-kernel", str(kernel.vmlinuz), "-initrd", str(image)),
            *("-append", f"{COMMAND_LINE} test={test}"),
        ]
    )


class Shell:
    """The shell of a guest."""

    def __init__(self, console: ConsoleProcess) -> None:
        self.console = console
        self._count = 0

    def run(self, command: str, timeout_s: float = COMMAND_S) -> str:
        """Run a command, which must succeed in that time; returns its output."""
        self._count += 1
        begin, end = f"begin-{self._count}", f"end-{self._count}="
        seen = len(self.console.output)
        # The shell puts the marks together, so that their echo does not match.
        quoted = [mark.replace("-", "''-") for mark in (begin, end)]
        self.console.send(f"echo {quoted[0]}; {command}; echo {quoted[1]}$?\n")
        self.console.expect(rf"{end}\d+\s", timeout_s)
        shown = self.console.output[seen:].decode("latin-1").replace("\r", "")
        assert f"{end}0" in shown, shown
        return shown.partition(f"{begin}\n")[2].partition(end)[0].strip()

    def power_off(self) -> None:
        """Power off; the command must end with status 0."""
        self.console.send("poweroff -f\n")
        assert self.console.wait() == 0, self.console.errors
        assert self.console.errors == b""
