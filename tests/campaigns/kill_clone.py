"""Campaign: while VMs are cloned, one of the processes involved is killed.

One VM that runs and one that is paused are cloned, two at a time. At a random moment SIGKILL ends
the command, a source's process, the clones', or vmm, with which every VM ends. Afterwards each VM
that the daemon lists as running answers; a source whose process was not killed is as it was; a
command that succeeded has made both clones; and in the end no process is left.

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
from vmd.rules.lifecycle import EARLY_S  # noqa: E402

DELAY_S = 0.5
CLONES = 2
PARTIES = ("vmctl", "vm/running", "vm/paused", "vm/c", "vmd: vmm")
SOURCES = ("running", "paused")


def _states(client: Client) -> dict[str, str]:
    return {str(vm["name"]): str(vm["state"]) for vm in client.vms()}


def _prepare(client: Client) -> None:
    """Have both sources there: one runs, one stands still."""
    for name in SOURCES:
        if _states(client)[name] != "stopped":
            continue
        time.sleep(EARLY_S)  # the daemon refuses a VM that starts too often
        answer = client.ask("start", name=name)
        assert answer["type"] == "started", answer
        with client.console(name) as console:
            console.expect(READY)
        if name == "paused":
            assert client.ask("pause", name=name)["type"] == "done"


def _settled(client: Client) -> dict[str, str]:
    """Return the states of all VMs, once none of them changes."""
    deadline = time.monotonic() + TIMEOUT_S
    while time.monotonic() < deadline:
        states = _states(client)
        if not {"starting", "stopping"} & set(states.values()):
            # A capture goes on where the command was killed.
            answers = [client.ask("unpause", name=name) for name in states if name == "running"]
            if all(answer.get("code") != "EBUSY" for answer in answers):
                return _states(client)
        time.sleep(0.05)
    return _states(client)


def run_round(
    vmd: Daemon, client: Client, chance: random.Random, _number: int
) -> tuple[str, list[str]]:
    """Clone once, kill a process; return the outcome, and the deviations."""
    wrong: list[str] = []
    _prepare(client)
    source, party = chance.choice(SOURCES), chance.choice(PARTIES)
    command = subprocess.Popen(
        [VMCTL, "clone", "-n", str(CLONES), source, "c%d"],
        env={**os.environ, "VMD_SOCKET": str(vmd.socket)},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )
    time.sleep(chance.random() * DELAY_S)
    if party == "vmctl":
        command.kill()
    else:
        kill_titled(vmd, party)
    said = command.communicate(timeout=TIMEOUT_S)[1]
    states = _settled(client)
    told = f"{source} cloned, {party} killed: {states}: {said!r}"
    for name, state in states.items():
        if state == "running":
            expect_echo(client, name)
    sources = states["running"], states["paused"]
    if party in {"vmctl", "vm/c"} and sources != ("running", "paused"):
        wrong.append(f"a source is not as it was: {told}")
    clones = [name for name in states if name not in SOURCES]
    if party in {"vm/running", "vm/paused"} and not command.returncode and len(clones) < CLONES:
        wrong.append(f"clones are missing, and nobody says so: {told}")
    if b"Traceback" in said:
        wrong.append(told)
    for name in clones:
        client.ask("stop", name=name, force=True, wait=True)
    return f"{len(clones)} clones", wrong


@contextmanager
def scene(directory: Path) -> Iterator[tuple[Daemon, RunRound]]:
    """Have a daemon with both sources."""
    config = "".join(vm_block(name, enabled=True) for name in SOURCES)
    with Daemon(directory, config) as vmd, vmd.client(TIMEOUT_S) as client:
        for name in SOURCES:
            client.wait_for_state(name, "running")
            with client.console(name) as console:
                console.expect(READY)
        assert client.ask("pause", name="paused")["type"] == "done"
        yield vmd, partial(run_round, vmd, client)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the campaign; returns the exit status."""
    return run_campaign(__doc__, scene, arguments)


if __name__ == "__main__":
    sys.exit(main())
