"""autopkgtest-virt-vmm's server whose machines are self-test guests with a system beside them.

That guest has no Linux. So each VM has an overlay over this host's root, in a mount namespace of
its own, in which its agent runs commands: it comes and goes with the VM. The file TESTBEDS gets the
name of each VM that becomes a testbed.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tests.agents import CLONES_AGENT, ROOT, Vsock
from vmctl.guest.access import agent_of
from vmctl.guest.agent import Agent
from vmm_pytest.machine import Machine
from vmm_pytest.run import Run
from vmm_pytest.templates import Templates
from vmm_pytest.virt_server import Server

BOUND_S = 60
_OVERLAY = """set -e
mount -t tmpfs tmpfs "$1"
mkdir "$1/upper" "$1/work" "$1/root"
mount -t overlay -o "lowerdir=/,upperdir=$1/upper,workdir=$1/work" overlay "$1/root"
for one in proc dev sys; do mount --rbind "/$one" "$1/root/$one"; done
echo ready
exec cat
"""


class Systems:
    """The systems of VMs, by their names."""

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        """Make them below `folder`; the stack ends them."""
        self._folder = folder
        self._stack = stack

    def path(self, name: str) -> Path:
        """Return the vsock socket of a VM's system, which is made at first."""
        path = self._folder / f"{name}.vsock"
        if not path.exists():
            place = self._folder / name
            place.mkdir()
            words = ("unshare", "--mount", "--propagation", "private", "sh", "-c", _OVERLAY)
            process = subprocess.Popen(
                [*words, "sh", place], stdin=subprocess.PIPE, stdout=subprocess.PIPE
            )
            self._stack.callback(process.wait, BOUND_S)
            self._stack.callback(process.terminate)
            assert process.stdout
            assert process.stdout.readline() == b"ready\n"
            enter = ("nsenter", f"--mount=/proc/{process.pid}/ns/mnt", "chroot", f"{place}/root")
            self._stack.enter_context(Vsock(path, through=enter, program=CLONES_AGENT))
        return path

    def agent_of(self, name: str) -> Agent:
        """Return the agent of a VM's system."""
        return agent_of(str(self.path(name)))


class SystemServer(Server):
    """The server, whose commands go into these systems."""

    systems: Systems

    def _command(self, machine: Machine) -> list[str]:
        vmctl = str(Path(sys.executable).parent / "vmctl")
        return [vmctl, "exec", "-i", str(self.systems.path(machine.name)), "--"]


def main() -> int:
    """Serve autopkgtest; returns the exit status."""
    with (
        tempfile.TemporaryDirectory(prefix="systems-") as folder,
        Run() as run,
        ExitStack() as stack,
    ):
        systems = Systems(Path(folder), stack)
        templates = Templates(run, systems.agent_of, ROOT)

        def make() -> Machine:
            template = templates.get(kernel=ROOT / "bios" / "selftest.bin", memory="16M")
            machine = template.clone()
            with Path(os.environ["TESTBEDS"]).open("a") as file:
                file.write(f"{machine.name}\n")
            return machine

        server = SystemServer(run.daemon, make)
        server.systems = systems
        stack.enter_context(server).serve(sys.stdin, sys.stdout)
    return 0


if __name__ == "__main__":
    sys.exit(main())
