"""Count what an operation costs a guest's agent: page faults and time of its processes.

The agent serves a UNIX socket here. In a clone a page fault of the guest's is mostly one of the
host's too, because the clone has the page for the first time.

`python -m bench.agent [--rounds N]`; of another tree: `PYTHONPATH=TREE python bench/agent.py`
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

from tests.agents import HostAgent

# Fields of /proc/PID/stat: proc(5), of the process and of its children that have ended.
_FAULTS = 10, 11
_TIMES = 14, 15, 16, 17
_SETTLE_S = 0.5  # the agent has seen the end of the last connection


def _used(pid: int) -> tuple[int, int, int]:
    """Return page faults of the agent and of its children, and ticks of both."""
    time.sleep(_SETTLE_S)
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    own, children = (int(fields[field - 3]) for field in _FAULTS)
    return own, children, sum(int(fields[field - 3]) for field in _TIMES)


def main() -> None:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--rounds", type=int, default=50)
    rounds = parser.parse_args().rounds
    operations: dict[str, Callable[[HostAgent], object]] = {
        "ping": lambda host: host.agent.ping(),
        "sh -c true": lambda host: host.agent.run(["/bin/sh", "-c", "true"]),
    }
    with (
        TemporaryDirectory() as folder,
        HostAgent(Path(folder) / "agent", interpreter="/usr/bin/python3") as host,
    ):
        for name, operation in operations.items():
            operation(host)
            before = _used(host.process.pid)
            for _ in range(rounds):
                operation(host)
            own, children, ticks = (
                (now - then) / rounds
                for now, then in zip(_used(host.process.pid), before, strict=True)
            )
            took = 1000 * ticks / os.sysconf("SC_CLK_TCK")
            print(f"{name:12} {own:.0f} + {children:.0f} page faults, processor {took:.1f} ms")


if __name__ == "__main__":
    main()
