"""Time short commands, beside another tree: `python -m bench.commands [TREE]`.

This interpreter runs both trees, in turn, so that other work on the machine affects both.
The others are compared with `status` without a daemon. For `status` of twelve VMs, on a pipe and on
a terminal, a stand-in for the daemon answers at once.
"""

from __future__ import annotations

import os
import pty
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests.unit.vmctl.fake_daemon import Answers, FakeDaemon
from vmd.wire.messages import AnyRequest, State, VmInfo, Vms

ROOT = Path(__file__).resolve().parents[1]
ROUNDS = 11
VMS = 12
ON_TERMINAL = "on a terminal"
COMMANDS = {
    "status": ["status"],
    f"status, {VMS} VMs": ["status"],
    f"status {ON_TERMINAL}": ["status"],
    "--help": ["--help"],
    "run --help": ["run", "--help"],
    "image info": ["image", "info", "disk.qcow2"],
    "create": ["create", "-s", "1M", "new.img"],
    "a mistyped verb": ["strat"],
    "a mistyped option": ["stop", "-x", "a"],
}


def once(tree: Path, name: str, place: Path) -> tuple[float, float]:
    """Run a command of `tree` in `place`; returns milliseconds of wall and processor time."""
    words = COMMANDS[name]
    (place / "new.img").unlink(missing_ok=True)
    # Keep byte code, and buffer streams, as users do.
    environment = {name: value for name, value in os.environ.items() if "PYTHON" not in name}
    has_vms = name.startswith("status") and name != "status"
    environment |= {
        "PYTHONPATH": str(tree),
        "TERM": "xterm",
        "VMD_SOCKET": str(place / ("vmd.sock" if has_vms else "none")),
    }
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    command = [sys.executable, "-m", "vmctl", *words]
    if ON_TERMINAL in name:
        _on_terminal(command, environment, place)
    else:
        subprocess.run(
            command,
            env=environment,
            cwd=place,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            check=False,
        )
    wall = time.perf_counter() - began
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return wall * 1000, used * 1000


def _on_terminal(command: list[str], environment: dict[str, str], place: Path) -> None:
    """Run a command on a terminal of its own, and read its output."""
    master, slave = pty.openpty()
    with subprocess.Popen(
        command, env=environment, cwd=place, stdin=slave, stdout=slave, stderr=slave
    ):
        os.close(slave)
        try:
            while os.read(master, 65536):
                pass
        except OSError:  # the other side of the terminal is gone
            os.close(master)


def _answer(_request: AnyRequest) -> Answers:
    vms = (
        VmInfo(id=one, name=f"vm-{one}", state=State.RUNNING, cpus=1, memory=1 << 30, pid=one)
        for one in range(1, VMS + 1)
    )
    return [Vms(vms=tuple(vms))]


def main(arguments: list[str]) -> None:
    """Print the medians of each command, and their ratios to `status`."""
    trees = [ROOT, *(Path(each).resolve() for each in arguments)]
    with tempfile.TemporaryDirectory() as scratch:
        place = Path(scratch)
        subprocess.run(
            [sys.executable, "-m", "vmctl", "create", "-s", "10M", "disk.qcow2"],
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            cwd=place,
            capture_output=True,
            check=True,
        )
        taken: dict[tuple[Path, str], list[tuple[float, float]]] = {}
        with FakeDaemon(place / "vmd.sock", _answer):
            for _ in range(ROUNDS):
                for name in COMMANDS:
                    for tree in trees:
                        taken.setdefault((tree, name), []).append(once(tree, name, place))
        for tree in trees:
            print(tree)
            least = statistics.median(used for _, used in taken[tree, "status"])
            for name in COMMANDS:
                wall = statistics.median(wall for wall, _ in taken[tree, name])
                used = statistics.median(used for _, used in taken[tree, name])
                print(f"  {name:20} {wall:6.1f} ms, {used:6.1f} ms cpu, {used / least:4.2f} status")


if __name__ == "__main__":
    main(sys.argv[1:])
