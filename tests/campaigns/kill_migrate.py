"""Campaign: while a VM moves from one daemon to another, one of the processes involved is killed.

Two daemons on this host, `vmctl migrate`, VMs with a disk each; ssh is a script. Several VMs move
at a time, as most of each move is waiting. At a random moment SIGKILL ends one of the commands,
ssh, the process of the VM or of its disk on either side.
Afterwards two copies never run; if none runs, a command has said so, or the VM is paused in doubt
and continues by `unpause -f`; the disk's lock is free for the next start; and no process is left.
With `--copy-storage` the disks go along, into a directory that only the commands of the other host
see in place of theirs: there, a disk is left only if the VM runs or ran there, or is in doubt.

Any deviation is printed, and the exit status is 1. The moment of the kill is not repeatable.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from tests.campaigns.killing import (  # noqa: E402 - found by the line above
    TIMEOUT_S,
    Tally,
    command_line,
    kill_titled,
)
from tests.system.vmd.daemon import (  # noqa: E402
    READY,
    Client,
    Daemon,
    descendants,
    vm_block,
)
from tests.vmctl_driver import VMCTL  # noqa: E402
from vmd.rules.lifecycle import EARLY_S  # noqa: E402

DELAY_S = 1.4
SETTLE_S = 1.0
PARTIES = (
    "vmctl migrate",
    "ssh",
    "vmctl receive",
    *(f"{side}: {title}" for side in ("here", "there") for title in ("vm", "disk")),
)


class Side(NamedTuple):
    """A daemon, a connection to it, and the name of a VM."""

    daemon: Daemon
    client: Client
    name: str

    def state(self) -> str:
        """Return the VM's state here: running, paused, in doubt, or nothing."""
        vms = self.client.ask("status", name=self.name)["vms"]
        assert isinstance(vms, list)
        if not vms:
            return "gone"
        return "in doubt" if vms[0]["pause_reason"] == "in doubt" else str(vms[0]["state"])


def _kill(party: str, sides: dict[str, Side], command: subprocess.Popen[bytes]) -> None:
    if party == "vmctl migrate":
        command.kill()
        return
    side, _, title = party.rpartition(": ")
    with suppress(ProcessLookupError):
        if side:
            kill_titled(sides[side].daemon, f"{title}/{sides[side].name}")
            return
        for pid in descendants(command.pid):
            words = _words(pid)
            is_receiver = "receive" in words
            if is_receiver == (party == "vmctl receive"):
                os.kill(pid, signal.SIGKILL)


def _words(pid: int) -> list[str]:
    with suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_text(errors="replace").split("\0")
    return []


def _settled(sides: dict[str, Side]) -> tuple[str, str]:
    """Return the VM's states on both sides, once they have been the same for a while."""
    deadline = time.monotonic() + TIMEOUT_S
    before, since = ("", ""), time.monotonic()
    while True:
        now = sides["here"].state(), sides["there"].state()
        is_moving = bool({"starting", "stopping"} & {*now}) or _is_sending(sides["here"])
        if now != before or is_moving:
            before, since = now, time.monotonic()
        if time.monotonic() - since > SETTLE_S or time.monotonic() > deadline:
            return now
        time.sleep(0.05)


def _is_sending(side: Side) -> bool:
    answer = side.client.ask("unpause", name=side.name) if side.state() == "running" else {}
    return answer.get("code") == "EBUSY"


def run_round(
    sides: dict[str, Side], ssh: Path, chance: random.Random, copies: Path | None
) -> tuple[str, list[str]]:
    """Hand the VM over once, kill a process; return the outcome, and the deviations.

    `copies` is where the copy of its disk appears, if it goes along.
    """
    wrong: list[str] = []
    here, there = sides["here"], sides["there"]
    name = here.name
    if here.state() != "running":
        time.sleep(EARLY_S)  # the daemon refuses a VM that starts too often
        answer = here.client.ask("start", name=name)
        if answer["type"] != "started":
            return "lost", [f"{name} cannot be started: {answer}"]
    with here.client.console(name) as console:
        console.expect(READY)
    command = subprocess.Popen(
        [VMCTL, "migrate", *(["--copy-storage"] if copies else ()), "--ssh", ssh, name, "there"],
        env={**os.environ, "VMD_SOCKET": str(here.daemon.socket)},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )
    party = chance.choice(PARTIES)
    time.sleep(chance.random() * DELAY_S)
    _kill(party, sides, command)
    said = command.communicate(timeout=TIMEOUT_S)[1]
    states = _settled(sides)
    told = f"{name}, {party} killed: {states}: {said!r}"
    running = [state for state in states if state == "running"]
    if len(running) > 1 or ("in doubt" in states and states[1] == "in doubt"):
        wrong.append(f"two copies: {told}")
    # If the process was killed on the side where the VM had arrived, the VM has ended there.
    was_lost_there = party.startswith("there") and not command.returncode
    if not (running or "in doubt" in states or command.returncode or was_lost_there):
        wrong.append(f"none runs, and nobody says so: {told}")
    if b"Traceback" in said:
        wrong.append(told)
    if copies:
        is_there = states[1] != "gone" or "in doubt" in states or was_lost_there
        left = [path.name for path in copies.iterdir() if name in path.name]
        if left and not (is_there and left == [f"{name}.qcow2"]):
            wrong.append(f"left there: {left}: {told}")
    if states[0] == "in doubt" and states[1] == "gone":
        answer = here.client.ask("unpause", name=name, force=True)
        # A disk process that was killed has not released anything, and cannot take it back.
        if answer["type"] != "done" and "disk" not in party:
            wrong.append(f"it cannot go on: {answer}: {told}")
    if there.state() != "gone":
        there.client.ask("stop", name=name, force=True, wait=True)
    if copies:
        _check_copy(copies / f"{name}.qcow2", told, wrong)
    if here.state() not in {"running", "stopped"} or "disk" in party:
        here.client.ask("stop", name=name, force=True, wait=True)
    return f"{states[0]} and {states[1]}", wrong


def _check_copy(copy: Path, told: str, wrong: list[str]) -> None:
    """Check the copy of a disk, if there is one, and remove it."""
    if not copy.exists():
        return
    command = ["qemu-img", "check", "-q", "-f", "qcow2", str(copy)]
    done = subprocess.run(command, check=False, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    if done.returncode:
        wrong.append(f"the copy is damaged: {done.stdout!r}: {told}")
    copy.unlink()


def _lane(
    name: str,
    daemons: Sequence[Daemon],
    ssh: Path,
    seed: str,
    tally: Tally,
    *,
    copies: Path | None,
) -> None:
    """Move one VM, as long as rounds are left."""
    chance = random.Random(seed)
    first, second = daemons
    with first.client(TIMEOUT_S) as here, second.client(TIMEOUT_S) as there:
        sides = {"here": Side(first, here, name), "there": Side(second, there, name)}
        while tally.take():
            try:
                tally.add(*run_round(sides, ssh, chance, copies))
            except (AssertionError, OSError, subprocess.TimeoutExpired) as err:
                tally.add("failed", [f"{name}: {err!r}"])
                return


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the campaign; returns the exit status."""
    parser = command_line(__doc__)
    parser.add_argument("--lanes", type=int, default=6, help="how many VMs at a time")
    parser.add_argument("--copy-storage", action="store_true", help="let the disks go along")
    options = parser.parse_args(arguments)
    tally = Tally(options.count)
    with tempfile.TemporaryDirectory(prefix="kill-migrate-") as directory:
        ssh = Path(directory) / "ssh"
        disks, copies = Path(directory) / "disks", Path(directory) / "copies"
        disks.mkdir()
        copies.mkdir()
        names, config = [f"vm{lane}" for lane in range(min(options.lanes, options.count))], ""
        for name in names:
            disk = disks / f"{name}.qcow2"
            subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", disk, "8M"], check=True)
            if options.copy_storage:  # some MiB, so that copying takes a while
                fill = ["qemu-io", "-f", "qcow2", "-c", "write -P 9 1M 6M", str(disk)]
                subprocess.run(fill, check=True, stdout=subprocess.DEVNULL)
            config += vm_block(name, f'disk "{disk}" format qcow2')
        places = [Path(directory) / name for name in ("here", "there")]
        for place in places:
            place.mkdir()
        with Daemon(places[0], config) as first, Daemon(places[1], "") as second:
            mount = f"mount --bind {copies} {disks} && " if options.copy_storage else ""
            unshare = "unshare -m" if os.geteuid() == 0 else "unshare -rm"
            ssh.write_text(
                f"#!/bin/sh\nshift\nexport VMD_SOCKET={second.socket} PATH={VMCTL.parent}:$PATH\n"
                f'{unshare if mount else ""} sh -c "{mount}$*"\n'
            )
            ssh.chmod(0o755)
            lanes = [
                threading.Thread(
                    target=_lane,
                    args=(name, (first, second), ssh, f"{options.seed}{name}", tally),
                    kwargs={"copies": copies if options.copy_storage else None},
                )
                for name in names
            ]
            for lane in lanes:
                lane.start()
            for lane in lanes:
                lane.join()
            tally.stop(first, second)
    return tally.report()


if __name__ == "__main__":
    sys.exit(main())
