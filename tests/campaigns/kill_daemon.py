"""Campaign: each kind of the daemon's processes, killed while clients send requests.

A daemon runs VMs with and without disks; clients ask for their status, pause and unpause them, and
read their consoles. Round after round, SIGKILL ends one process of each kind. Afterwards:

- every client that waits for a VM that ended gets its answer, in time;
- other VMs run on, in the same processes; ended ones are stopped, and can be started;
- each process of a VM belongs to one that runs: there are no orphans;
- the daemon is the same process as before, and answers.

Any deviation is printed, and the exit status is 1. The same --seed picks the same victims, but not
the same moments.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from tests.campaigns import daemon_campaign  # noqa: E402
from tests.campaigns.daemon_campaign import Failure  # noqa: E402
from tests.system.vmd.daemon import Client, Daemon, descendants, process_title, vm_block  # noqa: E402

KINDS = ("vm", "disk", "control", "priv", "local", "vmm", "zygote", "ready vm", "ready disk")
"""`ready` are the processes that wait to be a VM, or to serve a disk."""
OF_ROOT = {"priv", "local"}
TIMEOUT_S = 60.0
CYCLE_S = 5.2
"""The least time of a cycle: the daemon ends at the fifth end of one kind within 10 s; vmm
ends twice, once with the zygote."""
_VMS = 6
_WITH_DISKS = 3
_LOADS = 2
_MIB = 1 << 20
_TITLES = {
    **{kind: f"vmd: {kind}" for kind in ("control", "priv", "local", "vmm", "zygote")},
    "ready vm": "vm",
    "ready disk": "disk",
}


def _until(condition: Callable[[], bool], what: Callable[[], str]) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while not condition():
        if time.monotonic() > deadline:
            raise Failure(what())
        time.sleep(0.02)


class Load(threading.Thread):
    """A client that sends requests until `stop` is set; it connects again when it is cut off."""

    def __init__(self, vmd: Daemon, names: list[str], seed: int, stop: threading.Event) -> None:
        super().__init__(daemon=True)
        self._vmd, self._names, self._stopping = vmd, names, stop
        self._random = random.Random(seed)
        self.asked = 0
        self.faults: list[str] = []

    def run(self) -> None:
        """Send one request after another."""
        while not self._stopping.is_set():
            try:
                with self._vmd.client() as client:
                    while not self._stopping.is_set():
                        self._ask(client)
            except OSError:
                time.sleep(0.01)

    def _ask(self, client: Client) -> None:
        name = self._random.choice(self._names)
        for kind in self._random.choice((("status",), ("pause", "unpause"), ("console",))):
            self.asked += 1
            client.send(kind, name=name, serial=self.asked)
            answer, fds = client.receive()
            for fd in fds:
                os.close(fd)
            if answer["serial"] != self.asked:
                self.faults.append(f"{kind} {self.asked}: answered by {answer}")
        time.sleep(0.01)


class Campaign:
    """The daemon under test, and the state of its VMs."""

    def __init__(self, vmd: Daemon, seed: int) -> None:
        self.vmd = vmd
        self.names = [f"v{number}" for number in range(_VMS)]
        self.killed: Counter[str] = Counter()
        self._random = random.Random(seed)

    def start_all(self) -> None:
        """Start stopped VMs, as soon as the daemon lets us."""
        with self.vmd.client() as client:
            for name in self.names:
                deadline = time.monotonic() + TIMEOUT_S
                while (answer := client.ask("start", name=name))["type"] != "started":
                    if answer["code"] == "EALREADY":
                        break
                    if answer["code"] != "EPERM" or time.monotonic() > deadline:
                        raise Failure(f"{name}: does not start: {answer}")
                    time.sleep(0.2)  # refused: restarted too quickly

    def pids(self) -> dict[str, object]:
        """Return the process of each VM, None for one that does not run."""
        with self.vmd.client() as client:
            return {
                str(vm["name"]): vm["pid"] if vm["state"] != "stopped" else None
                for vm in client.vms()
            }

    def kill(self, kind: str) -> None:
        """Kill one process of a kind, and check what is left."""
        name = self._random.choice(self.names[:_WITH_DISKS] if kind == "disk" else self.names)
        title = _TITLES.get(kind, f"{kind}/{name}")
        before = self.pids()
        ended = {
            "vm": {name},
            "disk": {name},
            "vmm": set(self.names),
            "zygote": set(self.names),
        }.get(kind, set())
        with self.vmd.client() as first, self.vmd.client() as second:
            waiters = [first, second] if ended else []
            for waiter in waiters:
                waiter.send("wait", name=name)
                waiter.send("status", serial=1)
                while waiter.receive()[0].get("serial") != 1:
                    pass
            time.sleep(self._random.uniform(0, 0.05))
            victim = self._find(title)
            os.kill(victim, signal.SIGKILL)
            for waiter in waiters:
                answer = waiter.receive()[0]
                if answer["type"] != "terminated":
                    raise Failure(f"{title} killed: a waiter is told {answer}")
        self.killed[kind] += 1
        self._look(title, before, ended)

    def _ended_with(self, kind: str, name: str) -> set[str]:
        """Return the VMs that end with a process of a kind, which may be `name`'s."""
        if kind in {"vm", "disk"}:
            return {name}
        return set(self.names) if kind in {"vmm", "zygote"} else set()

    def _find(self, title: str) -> int:
        found: list[int] = []

        def look() -> bool:
            found[:] = [
                pid for pid in descendants(self.vmd.process.pid) if process_title(pid) == title[:15]
            ]
            return len(found) == 1

        _until(look, lambda: f"{title}: processes {found}")
        return found[0]

    def _look(self, title: str, before: dict[str, object], ended: set[str]) -> None:
        after: dict[str, object] = {}

        def is_right() -> bool:
            after.update(self._pids_if_served(before))
            return all(
                after[name] is None if name in ended else after[name] == before[name]
                for name in self.names
            )

        _until(is_right, lambda: f"{title} killed: VMs were {before}, are {after}")
        _until(lambda: not self._orphans(after), lambda: f"orphans: {self._orphans(after)}")
        if self.vmd.process.poll() is not None:
            raise Failure(f"{title} killed: the daemon has ended")

    def _pids_if_served(self, otherwise: dict[str, object]) -> dict[str, object]:
        try:
            return self.pids()
        except OSError:  # control has just been killed
            return dict.fromkeys(otherwise, -1)

    def _orphans(self, running: dict[str, object]) -> list[str]:
        titles = [process_title(pid) for pid in descendants(self.vmd.process.pid)]
        return [
            title
            for title in titles
            if title.startswith(("vm/", "disk/")) and running[title.partition("/")[2]] is None
        ]


def run(directory: Path, count: int, seed: int) -> Counter[str]:
    """Kill a process of each kind `count` times; returns the kills of each.

    Raises:
        Failure: the daemon has a fault.
    """
    blocks = []
    for number in range(_VMS):
        lines = []
        if number < _WITH_DISKS:
            image = directory / f"disk{number}"
            image.write_bytes(bytes(_MIB))
            lines.append(f'disk "{image}"')
        blocks.append(vm_block(f"v{number}", *lines))
    is_user = os.geteuid() != 0
    kinds = [kind for kind in KINDS if not (is_user and kind in OF_ROOT)]
    stopping = threading.Event()
    with Daemon(directory, "".join(blocks), is_user=is_user) as vmd:
        campaign = Campaign(vmd, seed)
        campaign.start_all()
        loads = [Load(vmd, campaign.names, seed + index, stopping) for index in range(_LOADS)]
        for load in loads:
            load.start()
        try:
            for cycle in range(count):
                begun = time.monotonic()
                for kind in kinds:
                    campaign.kill(kind)
                    campaign.start_all()
                if sys.stderr.isatty():
                    print(f"\r{cycle + 1} of {count}", end="", file=sys.stderr, flush=True)
                time.sleep(max(0.0, CYCLE_S - (time.monotonic() - begun)))
        except BaseException:
            print(vmd.log.read_text()[-4000:], file=sys.stderr)
            raise
        finally:
            stopping.set()
            for load in loads:
                load.join(TIMEOUT_S)
        if faults := [fault for load in loads for fault in load.faults]:
            raise Failure(f"{len(faults)} wrong answers: {faults[0]}")
        print(f"meanwhile {sum(load.asked for load in loads)} requests of other clients")
    return campaign.killed


def main() -> int:
    """Run the campaign; returns the exit status."""

    def run_all(directory: Path, given: argparse.Namespace) -> str:
        killed = run(directory, given.count, given.seed)
        told = ", ".join(f"{number} {kind}" for kind, number in killed.items())
        return f"killed {told}: nothing lost, no orphan"

    options = {"count": (50, "kills of each kind"), "seed": (1, "of what is killed when")}
    return daemon_campaign.main("kill_daemon", __doc__, options, run_all)


if __name__ == "__main__":
    sys.exit(main())
