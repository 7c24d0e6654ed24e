"""Campaign: a hundred VMs that start staggered, and SIGHUP without end.

Every VM of the configuration starts in its turn, and all run at once. Then the daemon must read its
configuration again and again: no VM ends or starts twice, every request in between gets its answer,
and at the end the daemon leaves nothing behind.

Any deviation is printed, and the exit status is 1.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from tests.campaigns import daemon_campaign  # noqa: E402
from tests.campaigns.daemon_campaign import Failure  # noqa: E402
from tests.system.vmd.daemon import READY, Client, Daemon, vm_block  # noqa: E402

PARALLEL = 4
DELAY_S = 1
_TIMEOUT_S = 60.0
_ASK_EVERY = 10


def _start_all(client: Client, count: int) -> float:
    """Wait until all VMs run and have printed; returns the seconds until the last one ran."""
    begun = time.monotonic()
    limit = _TIMEOUT_S + count / PARALLEL * DELAY_S * 4
    while waiting := [vm["name"] for vm in client.vms() if vm["state"] != "running"]:
        if time.monotonic() - begun > limit:
            raise Failure(f"not running after {limit:.0f} s: {waiting}")
        time.sleep(0.2)
    taken = time.monotonic() - begun
    for number in range(count):
        with client.console(f"v{number}") as console:
            console.expect(READY)
    return taken


def run(directory: Path, storms: int, count: int = 8) -> str:
    """Start `count` VMs and send SIGHUP `storms` times; returns a line to print.

    Raises:
        Failure: the daemon has a fault.
    """
    config = f"staggered start parallel {PARALLEL} delay {DELAY_S}\n" + "".join(
        vm_block(f"v{number}", enabled=True) for number in range(count)
    )
    with (
        Daemon(directory, config, is_user=os.geteuid() != 0) as vmd,
        vmd.client(_TIMEOUT_S) as client,
    ):
        taken = _start_all(client, count)
        before = {vm["name"]: vm["pid"] for vm in client.vms()}
        slowest = 0.0
        for number in range(storms):
            vmd.process.send_signal(signal.SIGHUP)
            if number % _ASK_EVERY == 0:
                begun = time.monotonic()
                client.vms()
                slowest = max(slowest, time.monotonic() - begun)
        after = {vm["name"]: vm["pid"] for vm in client.vms()}
        if after != before:
            raise Failure(f"VMs were {before}, are {after}")
        reloads = vmd.log.read_text().count("reload requested with SIGHUP")
        if not 0 < reloads <= storms:
            raise Failure(f"{reloads} reloads by {storms} signals")
    return (
        f"{count} VMs ran after {taken:.0f} s, {PARALLEL} every {DELAY_S} s; {storms} SIGHUP made "
        f"{reloads} reloads, slowest status {slowest * 1e3:.0f} ms"
    )


def main() -> int:
    """Run the campaign; returns the exit status."""

    def run_all(directory: Path, given: argparse.Namespace) -> str:
        return f"{run(directory, given.storms, given.count)}: none lost, nothing left"

    options = {"count": (100, "VMs"), "storms": (2000, "signals")}
    return daemon_campaign.main("reload_storm", __doc__, options, run_all)


if __name__ == "__main__":
    sys.exit(main())
