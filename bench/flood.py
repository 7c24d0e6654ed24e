"""What a guest that floods its network does to another's: round trips, beside those without it.

Two guests run, each with a tap of its own. One pings the host, while the other does nothing, keeps
its processor busy without a network, or sends datagrams as fast as it can to where nobody is. The
second shows what is the processors' doing: flooding beside that is what the data path adds.

Runs in the rig on its plain clock, as root in a namespace of its own; `--here` measures on this
machine's KVM. Rounds of the three in turn; prints medians of the rounds' medians.
"""

from __future__ import annotations

import argparse
import re
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from bench.net import Guest, Running, running  # noqa: E402 - found by the line above
from tests import artifacts  # noqa: E402
from tests.guest.networks import namespace  # noqa: E402
from tests.guest.tools import MODULES  # noqa: E402
from tests.rig.machine import Rig, project_stages  # noqa: E402

PATHS = {"vhost": "", "thread": ",user", "process": ",process"}
PINGS, INTERVAL_S = 20, 0.1
_NOBODY = 9
_RIG_MIB, _RIG_TIMEOUT_S, _RIG_CPUS = 3072, 3000, 2
DOING = {
    "nothing": "sleep 1000",
    "computing": "while :; do :; done",
    "flooding": "while :; do nc -u {nobody} 9 </dev/zero; done",
}


def ping_ms(run: Running) -> float:
    """Return the median of some round trips to the host."""
    shown = run.shell.run(f"ping -c {PINGS} -i {INTERVAL_S} {run.host}")
    times = [float(found) for found in re.findall(r"time=([\d.]+) ms", shown)]
    assert len(times) == PINGS, f"{PINGS - len(times)} pings were lost"
    return statistics.median(times)


def beside(pinger: Running, other: Running, doing: str) -> float:
    """Return the pinger's round trip while the other guest does something."""
    nobody = f"{other.host.rpartition('.')[0]}.{_NOBODY}"
    # An interactive shell gives each job a group of its own.
    other.shell.run(f"sh -c '{doing.format(nobody=nobody)}' >/dev/null 2>&1 & echo $! >/job")
    try:
        return ping_ms(pinger)
    finally:
        other.shell.run("kill -- -$(cat /job); sleep 1")


def measure(path: str, rounds: int, folder: Path) -> dict[str, list[float]]:
    """Return the round trips of each round on one data path, by what the other guest does."""
    kernel = artifacts.kernel("6.1-cloud")
    guests = [Guest(name, True, PATHS[path], None) for name in ("pinger", "other")]
    found: dict[str, list[float]] = {name: [] for name in DOING}
    with namespace("-flood") as where, running(where, guests, kernel, folder) as (pinger, other):
        lladdr = where.run("cat", "/sys/class/net/tap1/address").strip()
        nobody = f"{other.host.rpartition('.')[0]}.{_NOBODY}"
        other.shell.run(f"arp -i eth0 -s {nobody} {lladdr}")
        for _ in range(rounds):
            for name, doing in DOING.items():
                found[name].append(beside(pinger, other, doing))
        frames = where.run("cat", "/sys/class/net/tap1/statistics/rx_packets").strip()
        print(f"{path}: {frames} frames of the flood reached the host", flush=True)
        for run in (pinger, other):
            run.shell.console.send("poweroff -f\n")
            run.shell.console.wait()
    return found


def report(path: str, found: dict[str, list[float]]) -> str:
    """Return one line of medians, and the ratios that matter."""
    medians = {name: statistics.median(values) for name, values in found.items()}
    told = ", ".join(f"{name} {value:.2f} ms" for name, value in medians.items())
    return (
        f"{path}: {told}: flooding {medians['flooding'] / medians['nothing']:.2f} of nothing,"
        f" {medians['flooding'] / medians['computing']:.2f} of computing"
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Read the command line and measure, here or in the rig."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--here", action="store_true", help="measure on this machine's KVM")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--path", action="append", choices=sorted(PATHS), help="default: all")
    given = parser.parse_args(arguments)
    paths = given.path or list(PATHS)
    if given.here:
        for path in paths:
            with tempfile.TemporaryDirectory() as folder:
                print(report(path, measure(path, given.rounds, Path(folder))), flush=True)
        return 0
    artifacts.initramfs_with(artifacts.kernel("6.1-cloud"), MODULES, "bench-net")
    command = (
        *(str(ROOT / ".venv/bin/python"), str(ROOT / "bench/flood.py"), "--here"),
        *("--rounds", str(given.rounds), *(word for path in paths for word in ("--path", path))),
    )
    return Rig(
        command=command,
        cpus=_RIG_CPUS,
        memory=_RIG_MIB << 20,
        timeout_s=_RIG_TIMEOUT_S,
        stages=project_stages(ROOT),
    ).run()


if __name__ == "__main__":
    sys.exit(main())
