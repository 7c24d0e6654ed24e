"""Campaign: jobs by sbatch over two hosts, each `vmctl run`, and meanwhile SIGKILL of a slurmd.

Two network namespaces are two hosts, with a slurmd each, which declares memory and `kvm` for four
machines. Each job of an array boots the self-test guest and lets it count. At random moments a
slurmd is killed and started again, and a running job is requeued, which kills its processes. Then
every job has exactly one result; no host has had more machines than declared; and none is left.
"""

from __future__ import annotations

import argparse
import random
import re
import shlex
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from tests.agents import wait_until  # noqa: E402 - found by the line above
from tests.campaigns.daemon_campaign import Failure, main  # noqa: E402
from tests.campaigns.fleet_figures import Figures  # noqa: E402
from tests.slurm import NODES, Slurm, missing_slurm, slurm  # noqa: E402
from tests.system.vmd.daemon import SELFTEST, is_alive  # noqa: E402
from tests.vmctl_driver import VMCTL  # noqa: E402

SLOTS = 4
MEMORY_MIB = 16
_LOOK_S = 0.02
_JOB_S = 5.0
_SLACK_S = 240.0


def run(directory: Path, jobs: int, seed: int, *, requeues: bool = True) -> Figures:
    """Run the campaign; it `requeues` a job, which Slurm begins again after two minutes.

    Raises:
        Failure: a job has no result, or a host had too many machines.
    """
    chance = random.Random(seed)
    script = _script(directory)
    (directory / "results").mkdir()
    actions = "kr" if requeues else "k"
    moments = dict(zip(chance.sample(range(jobs // 8, jobs * 3 // 4), 2), actions, strict=False))
    peaks = dict.fromkeys(NODES, 0)
    looks = 0
    with slurm(directory, SLOTS, SLOTS * MEMORY_MIB) as cluster:
        began = time.monotonic()
        cluster.run(
            *("sbatch", f"--array=0-{jobs - 1}", "--requeue", "--open-mode=append"),
            *(f"--mem={MEMORY_MIB}", "--gres=kvm:1", f"--output={directory}/out-%a", str(script)),
        )
        deadline = began + _SLACK_S + jobs * _JOB_S
        while len(done := _results(directory)) < jobs:
            if time.monotonic() > deadline:
                raise Failure(f"{len(done)} of {jobs} jobs are done: {cluster.logs()}")
            counts = Counter(_machines(directory))
            peaks = {name: max(most, counts[name]) for name, most in peaks.items()}
            looks += 1
            for moment in [moment for moment in moments if moment <= len(done)]:
                _disturb(cluster, moments.pop(moment), chance)
            time.sleep(_LOOK_S)
        seconds = time.monotonic() - began
        wait_until(lambda: not cluster.run("squeue", "-h"), _SLACK_S)
        wait_until(lambda: not list(_machines(directory)))
        done = _results(directory)
        states = Counter(
            re.findall(r"JobState=(\S+)", cluster.run("scontrol", "-o", "show", "job"))
        )
    numbers = Counter(line.split()[0] for line in done)
    if numbers != Counter(map(str, range(jobs))):
        raise Failure(f"results by job: {numbers}")
    if states != {"COMPLETED": jobs}:
        raise Failure(f"jobs by state: {states}")
    if max(peaks.values()) > SLOTS:
        raise Failure(f"more machines than declared: {peaks}")
    begun = len((directory / "begun").read_text().splitlines())
    return Figures(
        *(jobs, Counter(line.split()[1] for line in done), begun, peaks, looks, seconds),
        memory=MEMORY_MIB,
        lost="a slurmd",
        declared=f"{SLOTS * MEMORY_MIB} MiB declared",
    )


def _script(directory: Path) -> Path:
    """Write the job: a VM in the foreground, which ends with the job."""
    vmctl = shlex.join([str(VMCTL), "run", "-m", f"{MEMORY_MIB}M", "-b", str(SELFTEST)])
    script = directory / "job"
    script.write_text(f"""#!/bin/bash
set -e
cd {shlex.quote(str(directory))}
echo "$SLURM_ARRAY_TASK_ID $SLURMD_NODENAME" >> begun
mkfifo "keys-$SLURM_JOB_ID"
exec 3<> "keys-$SLURM_JOB_ID"
rm "keys-$SLURM_JOB_ID"
printf n >&3
{vmctl} <&3 | while read -r line; do
    case $line in
        1*) echo "$SLURM_ARRAY_TASK_ID $SLURMD_NODENAME" > "result-$SLURM_JOB_ID"
            mv "result-$SLURM_JOB_ID" "results/$SLURM_ARRAY_TASK_ID"
            printf p >&3 ;;
    esac
done
""")
    script.chmod(0o755)
    return script


def _results(directory: Path) -> list[str]:
    """Return what jobs have found; one that is begun again replaces its result."""
    return [path.read_text() for path in (directory / "results").iterdir()]


def _machines(directory: Path) -> Iterator[str]:
    """Yield the host of each VM's process that there is."""
    for path in Path("/proc").glob("[0-9]*"):
        try:
            words = (path / "cmdline").read_bytes().split(b"\0")
            if str(SELFTEST).encode() not in words or b"run" not in words:
                continue
            environ = (path / "environ").read_bytes().split(b"\0")
        except OSError:  # it has ended
            continue
        if f"SLURM_SUBMIT_DIR={directory}".encode() in environ and is_alive(int(path.name)):
            yield from (name for name in NODES if f"SLURMD_NODENAME={name}".encode() in environ)


def _disturb(cluster: Slurm, action: str, chance: random.Random) -> None:
    if action == "k":
        cluster.restart_node(chance.choice(list(NODES)))
        return
    running: list[str] = []

    def is_any() -> bool:
        running.extend(cluster.run("squeue", "-hr", "-t", "R", "-o", "%F_%K").split())
        return bool(running)

    wait_until(is_any)
    cluster.run("scontrol", "requeue", chance.choice(running))


def _run(directory: Path, given: argparse.Namespace) -> str:
    missing = missing_slurm()
    if missing:
        return f"no jobs: {missing}"
    return str(run(directory, given.count, given.seed))


if __name__ == "__main__":
    sys.exit(
        main(
            "fleet_slurm",
            __doc__,
            {"count": (200, "how many jobs"), "seed": (1, "of the moments")},
            _run,
        )
    )
