"""Shared by campaigns that kill a process while a VM is written down or goes on elsewhere."""

from __future__ import annotations

import argparse
import os
import random
import signal
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, suppress
from pathlib import Path

from tests.system.vmd.daemon import Client, Daemon, descendants, is_alive, process_title

TIMEOUT_S = 90

RunRound = Callable[[random.Random, int], tuple[str, list[str]]]
"""Kills once, given a generator and the round's number; returns the outcome and the deviations."""
Scene = Callable[[Path], AbstractContextManager[tuple[Daemon, RunRound]]]
"""Makes a daemon with its VMs in a directory, and what a round does to it."""


class Tally:
    """The results of all rounds; for many threads."""

    def __init__(self, count: int) -> None:
        """Begin with `count` rounds to be taken."""
        self._count = self._left = count
        self._outcomes: Counter[str] = Counter()
        self._deviations: list[str] = []
        self._began = time.monotonic()
        self._lock = threading.Lock()

    def take(self) -> bool:
        """Take a round, if one is left."""
        with self._lock:
            self._left -= 1
            return self._left >= 0

    def add(self, outcome: str, wrong: Sequence[str]) -> None:
        """Count a round."""
        with self._lock:
            self._outcomes[outcome] += 1
            self._deviations += wrong

    def stop(self, *daemons: Daemon) -> None:
        """Stop daemons, and note a deviation if a process of theirs stays."""
        pids = [pid for daemon in daemons for pid in descendants(daemon.process.pid)]
        for daemon in daemons:
            daemon.stop()
        if left := [pid for pid in pids if is_alive(pid)]:
            self._deviations.append(f"processes left: {left}")

    def report(self) -> int:
        """Print the deviations and a summary; returns the exit status."""
        for line in self._deviations:
            print(line)
        told = ", ".join(f"{name}: {count} times" for name, count in sorted(self._outcomes.items()))
        taken = time.monotonic() - self._began
        print(f"{self._count} kills in {taken:.0f} s: {told}; {len(self._deviations)} deviations")
        return 1 if self._deviations else 0


def command_line(description: str | None) -> argparse.ArgumentParser:
    """Return the parser of options that all these campaigns have."""
    parser = argparse.ArgumentParser(description=(description or "").partition("\n")[0])
    parser.add_argument("--count", type=int, default=100, help="how many kills")
    parser.add_argument("--seed", type=int, default=1)
    return parser


def run_campaign(description: str | None, scene: Scene, arguments: Sequence[str] | None) -> int:
    """Run rounds one after the other, as the command line says; returns the exit status."""
    options = command_line(description).parse_args(arguments)
    chance = random.Random(options.seed)
    tally = Tally(options.count)
    with (
        tempfile.TemporaryDirectory(prefix="kill-") as directory,
        scene(Path(directory)) as (daemon, run_round),
    ):
        for number in range(options.count):
            outcome, wrong = run_round(chance, number)
            tally.add(outcome, [f"round {number}: {line}" for line in wrong])
        tally.stop(daemon)
    return tally.report()


def kill_titled(daemon: Daemon, title: str) -> None:
    """Kill each process of a daemon's whose title begins so."""
    for pid in descendants(daemon.process.pid):
        if process_title(pid).startswith(title[:15]):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def expect_echo(client: Client, name: str) -> None:
    """Fail unless the self-test guest echoes what is typed."""
    with client.console(name) as console:
        console.type(b"e")
        console.expect(b"e", console.output.count(b"e") + 1)
