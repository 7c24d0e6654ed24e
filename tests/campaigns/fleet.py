"""Campaign: jobs by Dask over two hosts, and meanwhile SIGKILL of a worker and of a vmd.

Two network namespaces are two hosts, with a vmd and a worker each, which declares memory and
processors for four machines. Each job has a fresh clone of the self-test guest. At random moments
the worker of one host is killed, whose nanny starts another one, and the vmd of the other, which is
started again. Then every job has exactly one result; no host has had more machines than declared,
and one template; and with the workers all of them have ended.

The seed decides which host loses what, and after how many results.
"""

from __future__ import annotations

import argparse
import os
import random
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from tests.agents import wait_until  # noqa: E402 - found by the line above
from tests.campaigns.daemon_campaign import Failure, main  # noqa: E402
from tests.campaigns.fleet_figures import Figures  # noqa: E402
from tests.fleet import SLOTS, FleetHost, Watch, two_hosts  # noqa: E402
from tests.fleet_jobs import MEMORY_MIB  # noqa: E402

_JOB_S = 3.0
_SLACK_S = 240.0
_DOWN_S = 1.0


def run(directory: Path, jobs: int, seed: int) -> Figures:
    """Run the campaign.

    Raises:
        Failure: a job has no result, or two; a host has had more machines than it declared.
    """
    chance = random.Random(seed)
    log = directory / "calls"
    with two_hosts(directory) as (one, two, address):
        hosts = [one, two]
        chance.shuffle(hosts)
        moments = sorted(chance.sample(range(jobs // 8, jobs * 3 // 4), 2))
        actions = [hosts[0].kill_worker, lambda: _restart_vmd(hosts[1])]
        chance.shuffle(actions)
        plan = dict(zip(moments, actions, strict=True))
        began = time.monotonic()
        with Watch([one, two]) as watch:
            lines = _client(one, address, jobs, log, plan)
        seconds = time.monotonic() - began
    results = Counter(int(line.split()[0]) for line in lines)
    if results != Counter(range(jobs)):
        raise Failure(f"results by job: {results}")
    for host in (one, two):
        wait_until(lambda host=host: not host.processes())  # type: ignore[misc] # bound
        if watch.peaks[host.name] > SLOTS + 1:
            raise Failure(f"more machines than declared: {watch.peaks}")
    calls = len(log.read_text().splitlines())
    by_host = Counter(line.split()[1] for line in lines)
    return Figures(
        *(jobs, by_host, calls, watch.peaks, watch.looks, seconds),
        memory=MEMORY_MIB,
        lost="a worker and a vmd",
        declared=f"{SLOTS * MEMORY_MIB} MiB declared and {MEMORY_MIB} MiB of the template",
    )


def _restart_vmd(host: FleetHost) -> None:
    host.kill_vmd()
    time.sleep(_DOWN_S)
    host.start_vmd()


def _client(
    host: FleetHost, address: str, jobs: int, log: Path, plan: Mapping[int, Callable[[], None]]
) -> list[str]:
    """Have a client on this host; returns its lines. After so many of them, act as planned."""
    program = str(ROOT / "tests" / "fleet_jobs.py")
    limit = str(_SLACK_S + jobs * _JOB_S)
    lines: list[str] = []
    errors = host.directory / "log.client"
    words = ["timeout", limit, *host.space.prefix, sys.executable, program, address, str(jobs)]
    with (
        errors.open("wb") as stderr,
        subprocess.Popen(
            [*words, log],
            env={**os.environ, **host.environ},
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
        ) as process,
    ):
        assert process.stdout
        for line in process.stdout:
            lines.append(line)
            action = plan.get(len(lines))
            if action:
                action()
    if process.returncode:
        raise Failure(f"the client: status {process.returncode}: {errors.read_text()[-2000:]}")
    return lines


def _run(directory: Path, given: argparse.Namespace) -> str:
    return str(run(directory, given.count, given.seed))


if __name__ == "__main__":
    sys.exit(
        main(
            "fleet",
            __doc__,
            {"count": (200, "how many jobs"), "seed": (1, "of the moments")},
            _run,
        )
    )
