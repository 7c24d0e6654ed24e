"""Campaign: while a VM is sent from one name to another, one of the processes involved is killed.

One daemon, `vmctl send | vmctl receive`, a VM with a disk. At a random moment SIGKILL ends one of
the two commands, the VM process that sends, or the one that receives. Afterwards two copies never
run; if none runs, a command has said so; the disk's lock is free for the next start; and no process
is left.

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

TIMEOUT_S = 90
DELAY_S = 1.2
PARTIES = ("sender", "receiver", "vm/one", "vm/two")


def _runs(client: Client, name: str) -> bool:
    vms = client.ask("status", name=name)["vms"]
    return isinstance(vms, list) and any(vm["state"] in {"running", "paused"} for vm in vms)


def _kill(party: str, vmd: Daemon, commands: dict[str, subprocess.Popen[bytes]]) -> None:
    with suppress(ProcessLookupError):
        if party in commands:
            commands[party].kill()
            return
        for pid in descendants(vmd.process.pid):
            if process_title(pid) == party:
                os.kill(pid, signal.SIGKILL)


def run_round(vmd: Daemon, client: Client, chance: random.Random) -> tuple[str, list[str]]:
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
    _kill(party, vmd, commands)
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
    return ", ".join(running) or "none", wrong


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
    with tempfile.TemporaryDirectory(prefix="kill-send-") as directory:
        disk = Path(directory) / "disk.img"
        subprocess.run(["qemu-img", "create", "-q", "-f", "raw", disk, "8M"], check=True)
        config = vm_block("one", f'disk "{disk}" format raw')
        with Daemon(Path(directory), config) as vmd, vmd.client() as client:
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
    told = ", ".join(f"{name} runs {count} times" for name, count in sorted(outcomes.items()))
    taken = time.monotonic() - started
    print(f"{options.count} kills in {taken:.0f} s: {told}: {len(deviations)} deviations")
    return 1 if deviations else 0


if __name__ == "__main__":
    sys.exit(main())
