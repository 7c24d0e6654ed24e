"""Campaign: while a VM is written into a snapshot or started from one, a process is killed.

One daemon, a VM, `vmctl snapshot` and `vmctl start --from`. At a random moment SIGKILL ends the
command, the VM's process, the process of the VM that starts from the snapshot, or the daemon's vmm.
Afterwards the store has only whole snapshots: each starts a VM that answers, or has never had a
name. The source runs on unless it was killed. No file, process or lock is left.

Any deviation is printed, and the exit status is 1. The moment of the kill is not repeatable.
"""

from __future__ import annotations

import os
import random
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from tests.campaigns.killing import (  # noqa: E402 - found by the line above
    TIMEOUT_S,
    RunRound,
    expect_echo,
    kill_titled,
    run_campaign,
)
from tests.system.vmd.daemon import READY, Client, Daemon, vm_block  # noqa: E402
from tests.vmctl_driver import VMCTL  # noqa: E402

DELAY_S = 0.4
SOURCE, COPY = "one", "two"
PARTIES = ("snapshot", "snapshot", "start", "vm/one", "vm/two", "vmd: vmm")


def _ensure_source(client: Client) -> None:
    """Make sure that the source runs; a killed one may still look alive."""
    deadline = time.monotonic() + TIMEOUT_S
    while True:
        client.ask("start", name=SOURCE)  # refused while it runs or ends, or vmm is down
        try:
            with client.console(SOURCE) as console:
                console.expect(READY)
                return
        except AssertionError:  # it does not run, or has ended since
            if time.monotonic() > deadline:
                raise
            time.sleep(0.05)


def _kill(party: str, vmd: Daemon, command: subprocess.Popen[bytes]) -> bool:
    """Kill a process; tell whether the source must run on."""
    if party in {"snapshot", "start"}:
        command.kill()
        return True
    kill_titled(vmd, party)
    return party == "vm/two"


def _command(vmd: Daemon, *words: str) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "VMD_SOCKET": str(vmd.socket)}
    return subprocess.Popen(
        [VMCTL, *words], env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )


def _files(vmd: Daemon) -> set[str]:
    store = vmd.socket.parent / "state" / "snapshots"
    return {path.name for path in store.glob("*/*")}


def _is_gone(client: Client, name: str) -> bool:
    """Wait until a VM that was killed, or has failed to start, is gone."""
    deadline = time.monotonic() + TIMEOUT_S
    while time.monotonic() < deadline:
        if client.ask("status", name=name)["vms"] == []:
            return True
        client.ask("stop", name=name, force=True, wait=True)
        time.sleep(0.02)
    return False


def run_round(
    vmd: Daemon, client: Client, chance: random.Random, number: int
) -> tuple[str, list[str]]:
    """Write a snapshot or start from one, kill a process; return the outcome, and deviations."""
    wrong: list[str] = []
    _ensure_source(client)
    party = chance.choice(PARTIES)
    name = f"s{number}"
    if party in {"start", "vm/two"}:
        made = _command(vmd, "snapshot", SOURCE, name)
        text = made.communicate(timeout=TIMEOUT_S)[1]
        if made.returncode:
            return "failed", [f"no snapshot: {text!r}"]
        command = _command(vmd, "start", COPY, "--from", name)
    else:
        command = _command(vmd, "snapshot", SOURCE, name)
    time.sleep(chance.random() * DELAY_S)
    goes_on = _kill(party, vmd, command)
    said = command.communicate(timeout=TIMEOUT_S)[1]
    if b"Traceback" in said:
        wrong.append(f"{party} killed: {said!r}")
    if goes_on:
        deadline = time.monotonic() + TIMEOUT_S
        while client.ask("pause", name=SOURCE)["type"] != "done":  # while it is being written
            assert time.monotonic() < deadline, "the source is written without end"
            time.sleep(0.02)
        client.ask("unpause", name=SOURCE)
        expect_echo(client, SOURCE)
    if not _is_gone(client, COPY):
        wrong.append(f"{party} killed: {COPY} does not end")
    found = _files(vmd)
    if command.returncode == 0 and f"{name}.snapshot" not in found:
        wrong.append(f"{party} killed: said to be made, and is not there")
    outcome = "none"
    if f"{name}.snapshot" in found:
        outcome = "whole"
        _ensure_source(client)  # after vmm's end too
        started = _command(vmd, "start", COPY, "--from", name)
        text = started.communicate(timeout=TIMEOUT_S)[1]
        if started.returncode:
            wrong.append(f"{party} killed: no VM can be made of the snapshot: {text!r}")
        else:
            expect_echo(client, COPY)
        if not _is_gone(client, COPY):
            wrong.append(f"{COPY} does not end")
        client.ask("remove-snapshot", snapshot=name)
    if left := _files(vmd):
        wrong.append(f"{party} killed: files left: {sorted(left)}")
    return f"{party}: {outcome}", wrong


@contextmanager
def scene(directory: Path) -> Iterator[tuple[Daemon, RunRound]]:
    """Have a daemon with the source."""
    with Daemon(directory, vm_block(SOURCE, memory="256M")) as vmd, vmd.client() as client:
        yield vmd, partial(run_round, vmd, client)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the campaign; returns the exit status."""
    return run_campaign(__doc__, scene, arguments)


if __name__ == "__main__":
    sys.exit(main())
