"""Campaign: while a VM is sent from one name to another, one of the processes involved is killed.

One daemon, `vmctl send | vmctl receive`, a VM with a disk. At a random moment SIGKILL ends one of
the two commands, the VM process that sends, or the one that receives. Afterwards two copies never
run; if none runs, a command has said so; the disk's lock is free for the next start; and no process
is left.

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
    kill_titled,
    run_campaign,
)
from tests.system.vmd.daemon import READY, Client, Daemon, vm_block  # noqa: E402
from tests.vmctl_driver import VMCTL  # noqa: E402

DELAY_S = 1.2
PARTIES = ("sender", "receiver", "vm/one", "vm/two")


def _runs(client: Client, name: str) -> bool:
    vms = client.ask("status", name=name)["vms"]
    return isinstance(vms, list) and any(vm["state"] in {"running", "paused"} for vm in vms)


def run_round(
    vmd: Daemon, client: Client, chance: random.Random, _number: int
) -> tuple[str, list[str]]:
    """Send and receive once, kill a process; return the outcome, and the deviations."""
    wrong: list[str] = []
    if not _runs(client, "one"):
        answer = client.ask("start", name="one")
        if answer["type"] != "started":
            return "lost", [f"one cannot be started: {answer}"]
    with client.console("one") as console:
        console.expect(READY)
    environment = {**os.environ, "VMD_SOCKET": str(vmd.socket)}
    read_fd, write_fd = os.pipe()
    commands = {
        "receiver": subprocess.Popen(
            [VMCTL, "receive", "two"], env=environment, stdin=read_fd, stderr=subprocess.PIPE
        ),
        "sender": subprocess.Popen(
            [VMCTL, "send", "one"], env=environment, stdout=write_fd, stderr=subprocess.PIPE
        ),
    }
    os.close(read_fd)
    os.close(write_fd)
    party = chance.choice(PARTIES)
    time.sleep(chance.random() * DELAY_S)
    if party in commands:
        commands[party].kill()
    else:
        kill_titled(vmd, party)
    said = {name: one.communicate(timeout=TIMEOUT_S)[1] for name, one in commands.items()}
    deadline = time.monotonic() + TIMEOUT_S
    while True:  # a command that was killed does not wait for the operation that it began
        running = [name for name in ("one", "two") if _runs(client, name)]
        if len(running) < 2 or time.monotonic() > deadline:
            break
        time.sleep(0.05)
    has_failed = any(one.returncode for one in commands.values())
    if len(running) > 1:
        wrong.append(f"{party} killed: two copies run: {said}")
    if not running and not has_failed:
        wrong.append(f"{party} killed: none runs, and nobody says so: {said}")
    if any(b"Traceback" in text for text in said.values()):
        wrong.append(f"{party} killed: {said}")
    if "two" in running:
        client.ask("stop", name="two", force=True, wait=True)
    return f"{' and '.join(running) or 'none'} runs", wrong


@contextmanager
def scene(directory: Path) -> Iterator[tuple[Daemon, RunRound]]:
    """Have a daemon with a VM that has a disk."""
    disk = directory / "disk.img"
    subprocess.run(["qemu-img", "create", "-q", "-f", "raw", disk, "8M"], check=True)
    config = vm_block("one", f'disk "{disk}" format raw')
    with Daemon(directory, config) as vmd, vmd.client() as client:
        yield vmd, partial(run_round, vmd, client)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the campaign; returns the exit status."""
    return run_campaign(__doc__, scene, arguments)


if __name__ == "__main__":
    sys.exit(main())
