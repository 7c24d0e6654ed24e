"""Jobs of the fleet's tests, and the client that has them done: `fleet_jobs.py ADDRESS COUNT LOG`.

A job sees that its machine is fresh, and lets it count a second. The client prints a line for each
job that is done: its number, host and machine.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from distributed import Client, as_completed

from tests.system.vmd.daemon import SELFTEST
from vmm_fleet import InVm
from vmm_pytest.machine import Machine

MEMORY_MIB = 16
CPUS = 1


def count(vm: Machine, number: int, log: str) -> tuple[int, str, str]:
    """Have a fresh machine count once; returns the job's number, its host and its machine."""
    host = os.environ["FLEET_HOST"]
    with Path(log).open("a") as file:
        file.write(f"{number} {host} {vm.name}\n")
    vm.send_console("n")
    assert vm.wait_for_console_text(r"seconds\s+\d+").split() == ["seconds", "1"]
    return number, host, vm.name


def main(address: str, jobs: int, log: str) -> int:
    """Have the jobs done; returns the exit status."""
    in_vm = InVm(count, kernel=str(SELFTEST), memory=f"{MEMORY_MIB}M", cpus=CPUS)
    with Client(address, timeout=60) as client:
        calls = client.map(
            in_vm, range(jobs), log=log, resources=in_vm.resources, pure=False, batch_size=jobs
        )
        done = as_completed(calls, with_results=True)
        for future, result in done:
            print(*result, flush=True)
            future.release()  # or Dask repeats the job if the worker with the result ends
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], int(sys.argv[2]), sys.argv[3]))
