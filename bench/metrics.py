"""Time a scrape of many running VMs: by `vmctl web`, and by `vmctl metrics` in processor time.

VMs run the self-test guest, which waits for input. `python -m bench.metrics [--vms N]`
"""

from __future__ import annotations

import argparse
import os
import resource
import statistics
import tempfile
import time
from pathlib import Path

from tests.system.vmd.daemon import Daemon, vm_block, vmctl
from tests.web import WebServer

_ROUNDS = 15
_SETTLING_S = 5.0
_PAUSE_S = 0.2  # statistics are asked for at most every 0.1 s


def main() -> None:
    """Measure, and print a line for each way."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--vms", type=int, default=300)
    options = parser.parse_args()
    names = [f"vm{number}" for number in range(options.vms)]
    with (
        tempfile.TemporaryDirectory(prefix="bench-") as scratch,
        Daemon(Path(scratch), "".join(vm_block(name, memory="16M") for name in names)) as vmd,
        vmd.client() as client,
        WebServer(vmd.socket) as server,
    ):
        server.log_in()
        for name in names:
            answer = client.ask("start", name=name)
            assert answer["type"] == "started", answer
        time.sleep(_SETTLING_S)
        seconds = []
        for _ in range(_ROUNDS):
            time.sleep(_PAUSE_S)
            begun = time.perf_counter()
            body = server.ask("GET", "/metrics").body
            seconds.append(time.perf_counter() - begun)
            assert body.count(b"\nvmd_vm_cpu_seconds_total{") == len(names)
        print(f"/metrics: {_told(seconds)}, {len(body)} bytes")
        before = _processor_time()
        for _ in range(_ROUNDS):
            assert vmctl(vmd, "metrics").returncode == 0
        used = (_processor_time() - before) / _ROUNDS
        print(f"vmctl metrics: {used * 1e3:.0f} ms of processor time")
        print(f"load average: {os.getloadavg()[0]:.1f}")


def _told(seconds: list[float]) -> str:
    least, most = min(seconds) * 1e3, max(seconds) * 1e3
    return f"{statistics.median(seconds) * 1e3:.0f} ms ({least:.0f} to {most:.0f})"


def _processor_time() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


if __name__ == "__main__":
    main()
