"""A guest's agent under load: commands side by side, and much data through one of them.

    tests/campaigns/agent_load.py [--count N] [--mib N] [--python PATH]

COUNT commands (1,000) run 20 at a time, each with input, output, errors and a status of its own;
then MIB MiB (100) go through `cat` in a guest by `vmctl exec -i`, and the checksums of both ends
are compared. They must be equal, no process may be left, and neither end's memory may grow with the
data.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from tests.agents import HostAgent, Vsock, wait_until  # noqa: E402 - found by the line above
from tests.vmctl_driver import VMCTL  # noqa: E402 - same

MIB = 1 << 20
AT_A_TIME = 20
GROWTH_MAX = 24 * MIB
"""The largest growth of a process since its start."""


def commands(count: int, interpreter: str = sys.executable) -> float:
    """Run `count` commands, AT_A_TIME side by side; returns the seconds."""
    with (
        tempfile.TemporaryDirectory() as folder,
        HostAgent(Path(folder) / "agent", interpreter=interpreter) as host,
    ):

        def one(number: int) -> None:
            script = f"cat; echo {number} >&2; exit {number % 256}"
            data = b"%d" % number * 100
            done = host.agent.run(["sh", "-c", script], stdin=data, timeout=300)
            assert done == (number % 256, data, b"%d\n" % number), done

        began = time.monotonic()
        with ThreadPoolExecutor(AT_A_TIME) as pool:
            list(pool.map(one, range(count)))
        seconds = time.monotonic() - began
        wait_until(lambda: not _children(host.process.pid))
    return seconds


def through(size: int) -> float:
    """Send `size` bytes through a command in a guest and back; returns the seconds."""
    piece = os.urandom(MIB)
    sent, received = hashlib.sha256(), hashlib.sha256()
    peaks: dict[int, int] = {}
    with tempfile.TemporaryDirectory() as folder, Vsock(Path(folder) / "vsock") as vsock:
        began = time.monotonic()
        with subprocess.Popen(
            [VMCTL, "exec", "-i", f"{folder}/vsock", "--", "cat"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        ) as process:
            assert process.stdin
            assert process.stdout

            def feed() -> None:
                assert process.stdin
                with process.stdin:
                    for at in range(0, size, MIB):
                        data = piece[: size - at]
                        sent.update(data)
                        process.stdin.write(data)

            feeder = threading.Thread(target=feed)
            feeder.start()
            first: dict[int, int] = {}
            while data := process.stdout.read(MIB):
                received.update(data)
                for pid in (process.pid, *vsock.pids):
                    first.setdefault(pid, _memory(pid))
                    peaks[pid] = max(peaks.get(pid, 0), _memory(pid))
            feeder.join()
            assert process.wait(60) == 0
        seconds = time.monotonic() - began
    assert sent.digest() == received.digest()
    grown = {pid: peaks[pid] - first[pid] for pid in peaks}
    assert all(growth < GROWTH_MAX for growth in grown.values()), grown
    return seconds


def _memory(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")
    except (FileNotFoundError, ProcessLookupError):
        return 0


def _children(pid: int) -> str:
    return Path(f"/proc/{pid}/task/{pid}/children").read_text()


def main() -> int:
    """Run both; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--mib", type=int, default=100)
    parser.add_argument("--python", default=sys.executable, help="the guest's interpreter")
    options = parser.parse_args()
    seconds = commands(options.count, options.python)
    print(
        f"{options.count} commands, {AT_A_TIME} at a time: {seconds:.1f} s, all as they were told"
    )
    seconds = through(options.mib * MIB)
    print(
        f"{options.mib} MiB in and out: {seconds:.1f} s, {options.mib / seconds:.0f} MiB/s, equal"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
