"""Campaign: while VMs are cloned, one of the processes involved is killed.

One VM that runs and one that is paused are cloned, two at a time. At a random moment SIGKILL ends
the command, a source's process, the clones', or vmm, with which every VM ends. Afterwards each VM
that the daemon lists as running answers; a source whose process was not killed is as it was; a
command that succeeded has made both clones; and in the end no process is left.

Any deviation is printed, and the exit status is 1. The moment of the kill is not repeatable.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from tests.system.vmd.daemon import (  # noqa: E402 - found by the line above
    READY,
    Client,
    Daemon,
    descendants,
    is_alive,
    process_title,
    vm_block,
)
from tests.vmctl_driver import VMCTL  # noqa: E402
from vmd.rules.lifecycle import EARLY_S  # noqa: E402

TIMEOUT_S = 90
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


def _kill(party: str, vmd: Daemon, command: subprocess.Popen[bytes]) -> None:
    if party == "vmctl":
        command.kill()
        return
    for pid in descendants(vmd.process.pid):
        if process_title(pid).startswith(party):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


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


def run_round(vmd: Daemon, client: Client, chance: random.Random) -> tuple[str, list[str]]:
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
    _kill(party, vmd, command)
    said = command.communicate(timeout=TIMEOUT_S)[1]
    states = _settled(client)
    told = f"{source} cloned, {party} killed: {states}: {said!r}"
    for name, state in states.items():
        if state == "running":
            with client.console(name) as console:
                console.type(b"e")
                console.expect(b"e", console.output.count(b"e") + 1)
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


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the campaign; returns the exit status."""
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--count", type=int, default=100, help="how many kills")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args(arguments)
    chance = random.Random(options.seed)
    outcomes: Counter[str] = Counter()
    deviations: list[str] = []
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="kill-clone-") as directory:
        config = "".join(vm_block(name, enabled=True) for name in SOURCES)
        with Daemon(Path(directory), config) as vmd, vmd.client(TIMEOUT_S) as client:
            for name in SOURCES:
                client.wait_for_state(name, "running")
                with client.console(name) as console:
                    console.expect(READY)
            assert client.ask("pause", name="paused")["type"] == "done"
            for number in range(options.count):
                outcome, wrong = run_round(vmd, client, chance)
                outcomes[outcome] += 1
                deviations += [f"round {number}: {line}" for line in wrong]
            pids = descendants(vmd.process.pid)
            vmd.stop()
            left = [pid for pid in pids if is_alive(pid)]
            if left:
                deviations.append(f"processes left: {left}")
    for line in deviations:
        print(line)
    told = ", ".join(f"{name} {count} times" for name, count in sorted(outcomes.items()))
    taken = time.monotonic() - started
    print(f"{options.count} kills in {taken:.0f} s: {told}: {len(deviations)} deviations")
    return 1 if deviations else 0


if __name__ == "__main__":
    sys.exit(main())
