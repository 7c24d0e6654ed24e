"""A client whose jobs go on from a snapshot: `fleet_snapshot_jobs.py ADDRESS DIGEST`.

It prints a line for each of two jobs, one on each host: its host, its machine, what that counts.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from distributed import Client

from vmm_fleet import InVm
from vmm_pytest.machine import Machine


def count(vm: Machine) -> tuple[str, str, str]:
    """Have a machine count on."""
    vm.send_console("n")
    counted = vm.wait_for_console_text(r"seconds\s+\d+").split()[1]
    return os.environ["FLEET_HOST"], vm.name, counted


def main(address: str, digest: str) -> int:
    """Have the jobs done; returns the exit status."""
    job = InVm(count, snapshot=digest, memory="16M", cpus=1)
    small = InVm(count, snapshot=digest, memory="8M", cpus=1)
    lost = InVm(count, snapshot=f"sha256:{'0' * 64}", memory="16M", cpus=1)
    with Client(address, timeout=60) as client:
        client.wait_for_workers(2)
        for host in ("two", "one"):
            done = client.submit(job, workers=[host], resources=job.resources, pure=False)
            print(*done.result(timeout=120), flush=True)
        for wrong in (small, lost):
            done = client.submit(wrong, resources=wrong.resources, pure=False)
            print(done.exception(timeout=120), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2]))
