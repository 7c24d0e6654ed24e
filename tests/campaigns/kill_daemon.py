"""Campaign: each kind of the daemon's processes, killed while clients work it.

A daemon runs VMs with and without disks; clients ask for their status, pause them, let them go on,
read their consoles. Round after round, SIGKILL ends one process of each kind. Afterwards:

- every client that waits for a VM which that ended is told so, in time;
- VMs that it did not end run on, in the same processes; the others are stopped, and can be started;
- each process of a VM belongs to one that runs: there are no orphans;
- the daemon is the same process as before, and answers.

Any deviation is printed, and the exit status is 1. The same --seed picks the same victims; when the
kill comes is up to the clock.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from tests.system.vmd.daemon import Client, Daemon, descendants, process_title, vm_block  # noqa: E402

KINDS = ("vm", "disk", "control", "priv", "vmm", "ready")
"""`ready` is the process that waits to be a VM."""
TIMEOUT_S = 60.0
CYCLE_S = 2.6
"""So long at least, or the daemon takes the fifth end of one kind within 10 s for a bad sign."""
_VMS = 6
_WITH_DISKS = 3
_LOADS = 2
_MIB = 1 << 20
_TITLES = {"control": "vmd: control", "priv": "vmd: priv", "vmm": "vmd: vmm", "ready": "vm"}


class Failure(Exception):  # noqa: N818 - of the daemon, not of this program
    """The daemon is not as it should be; `str()` says how."""


def _until(condition: Callable[[], bool], what: Callable[[], str]) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while not condition():
        if time.monotonic() > deadline:
            raise Failure(what())
        time.sleep(0.02)


class Load(threading.Thread):
    """A client that never rests, until `stop` is set; it connects again when it is cut off."""

    def __init__(self, vmd: Daemon, names: list[str], seed: int, stop: threading.Event) -> None:
        super().__init__(daemon=True)
        self._vmd, self._names, self._stopping = vmd, names, stop
        self._random = random.Random(seed)
        self.asked = 0
        self.faults: list[str] = []

    def run(self) -> None:
        """Ask one thing after another."""
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
    """The daemon under test, and what is known of its VMs."""

    def __init__(self, vmd: Daemon, seed: int) -> None:
        self.vmd = vmd
        self.names = [f"v{number}" for number in range(_VMS)]
        self.killed: Counter[str] = Counter()
        self._random = random.Random(seed)

    def start_all(self) -> None:
        """Start what is stopped, as soon as the daemon lets us."""
        with self.vmd.client() as client:
            for name in self.names:
                deadline = time.monotonic() + TIMEOUT_S
                while (answer := client.ask("start", name=name))["type"] != "started":
                    if answer["code"] == "EALREADY":
                        break
                    if answer["code"] != "EPERM" or time.monotonic() > deadline:
                        raise Failure(f"{name}: does not start: {answer}")
                    time.sleep(0.2)  # restarted too quickly

    def pids(self) -> dict[str, object]:
        """Return the process of each VM, None for one that does not run."""
        with self.vmd.client() as client:
            vms = client.ask("status")["vms"]
        assert isinstance(vms, list)
        return {vm["name"]: vm["pid"] if vm["state"] != "stopped" else None for vm in vms}

    def kill(self, kind: str) -> None:
        """Kill one process of a kind, and look at what is left."""
        name = self._random.choice(self.names[:_WITH_DISKS] if kind == "disk" else self.names)
        title = _TITLES.get(kind, f"{kind}/{name}")
        before = self.pids()
        ended = {"vm": {name}, "disk": {name}, "vmm": set(self.names)}.get(kind, set())
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
    """Kill a process of each kind `count` times; returns how many were killed of each.

    Raises:
        Failure: something is not as it should be.
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
    kinds = [kind for kind in KINDS if not (is_user and kind == "priv")]
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
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=50, help="kills of each kind")
    parser.add_argument("--seed", type=int, default=1)
    given = parser.parse_args()
    begun = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="kill-daemon-") as directory:
        try:
            killed = run(Path(directory), given.count, given.seed)
        except (Failure, OSError, AssertionError) as err:
            print(f"kill_daemon: seed {given.seed}: {err}", file=sys.stderr)
            return 1
    told = ", ".join(f"{number} {kind}" for kind, number in killed.items())
    print(f"killed {told} in {time.monotonic() - begun:.0f} s: nothing lost, no orphan")
    return 0


if __name__ == "__main__":
    sys.exit(main())
