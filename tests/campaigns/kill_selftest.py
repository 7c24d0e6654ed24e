"""Campaign: the self-test guest, killed again and again at random moments.

Each run starts `vmctl run --selftest` and ends it by SIGKILL, by one or two SIGTERMs, or by
--timeout, after a random delay that covers everything from the interpreter's start to a guest
that idles. Afterwards nothing may be left: no process that inherited this run's environment, no
descriptor in this process, no file in the run's own temporary directory, no memfd of a dead
guest. The exit status must be the documented one.

Any deviation is printed, and the exit status is 1. The same --seed gives the same delays.
"""

from __future__ import annotations

import argparse
import enum
import os
import random
import re
import signal
import sys
import tempfile
import time
import uuid
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from tests.vmctl_driver import ConsoleProcess, ConsoleTimeoutError, vmctl_run  # noqa: E402

MARKER = "VMM_CAMPAIGN"
EXIT_TIMEOUT = 124
EXIT_KILLED = 128 + signal.SIGTERM
# The time for a guest to end after its power button is pressed, on a busy machine.
END_TIMEOUT_S = 30.0
# From then on `vmctl` is surely in its event loop, with its signal handlers in place.
READY = "selftest: ready"


class Way(enum.Enum):
    """The way in which a run is ended."""

    KILL = "SIGKILL"
    TERM = "SIGTERM once"
    TERM_TWICE = "SIGTERM twice"
    TIMEOUT = "--timeout"


@dataclass(frozen=True, slots=True)
class Plan:
    """One run: the way of its end, and the delay in seconds.

    `waits_for_guest` counts the delay from the guest's last output instead of from the start.
    """

    way: Way
    delay_s: float
    waits_for_guest: bool

    def statuses(self) -> set[int]:
        """Return the allowed exit statuses.

        SIGTERM before `vmctl` has its handler, which is set last, kills the process as it kills
        any other; before the guest has its power button enabled a press is lost or kept, and the
        driver then sends the second SIGTERM. The second of two may come too late.
        """
        died = {-signal.SIGTERM, EXIT_KILLED} if not self.waits_for_guest else set()
        match self.way:
            case Way.KILL:
                return {-signal.SIGKILL}
            case Way.TERM:
                return {0} | died
            case Way.TERM_TWICE:
                return {0, EXIT_KILLED} | died
            case Way.TIMEOUT:
                return {EXIT_TIMEOUT}


def plans(count: int, seed: int) -> list[Plan]:
    """Return the runs of a campaign, a pure function of its arguments."""
    chance = random.Random(seed)
    found = []
    for number in range(count):
        way = list(Way)[number % len(Way)]
        waits_for_guest = way is not Way.TIMEOUT and chance.random() < 0.5
        delay_s = chance.uniform(0.0, 0.3 if waits_for_guest else 1.5)
        found.append(Plan(way, delay_s, waits_for_guest))
    chance.shuffle(found)
    return found


def end(guest: ConsoleProcess, plan: Plan) -> int:
    """Start the clock of one plan, end the guest by it, and return the exit status.

    Raises:
        ConsoleTimeoutError: the program did not end.
    """
    if plan.way is Way.TIMEOUT:
        return guest.wait(END_TIMEOUT_S)
    if plan.waits_for_guest:
        guest.expect(READY, END_TIMEOUT_S)
    time.sleep(plan.delay_s)
    if plan.way is Way.KILL:
        guest.signal(signal.SIGKILL)
        return guest.wait(END_TIMEOUT_S)
    guest.signal(signal.SIGTERM)
    if plan.way is Way.TERM_TWICE:
        guest.signal(signal.SIGTERM)
        return guest.wait(END_TIMEOUT_S)
    if plan.waits_for_guest:
        return guest.wait(END_TIMEOUT_S)
    try:
        return guest.wait(5.0)
    except ConsoleTimeoutError:
        guest.signal(signal.SIGTERM)
        return guest.wait(END_TIMEOUT_S)


def marked_processes(mark: str) -> list[int]:
    """Return the processes, zombies included, that were started with this mark."""
    wanted = f"{MARKER}={mark}".encode()
    found = []
    for environment in Path("/proc").glob("[0-9]*/environ"):
        try:
            if wanted in environment.read_bytes().split(b"\0"):
                found.append(int(environment.parent.name))
        except OSError:  # gone meanwhile, or another user's
            continue
    return found


def open_files() -> set[str]:
    """Return this process's descriptors, each with its target."""
    found = set()
    for entry in Path("/proc/self/fd").iterdir():
        try:
            found.add(f"{entry.name}: {entry.readlink()}")
        except FileNotFoundError:  # the listing's own descriptor
            continue
    return found


def leftovers(mark: str, before: set[str], scratch: Path) -> list[str]:
    """Return the leftovers of a run, a line each."""
    left = [f"process {pid}" for pid in marked_processes(mark)]
    left += [f"descriptor {one}" for one in open_files() - before]
    left += [f"file {path}" for path in scratch.rglob("*")]
    maps = Path("/proc/self/maps").read_text()
    left += [f"mapping {name}" for name in re.findall(r"/memfd:\S+", maps)]
    return left


def run(plan: Plan, scratch: Path) -> list[str]:
    """Carry out one plan; return the deviations, a line each."""
    before = open_files()
    mark = uuid.uuid4().hex
    options = ["--timeout", f"{plan.delay_s + 0.05:.3f}"] if plan.way is Way.TIMEOUT else []
    environment = {MARKER: mark, "TMPDIR": str(scratch)}
    wrong = []
    with ConsoleProcess(
        vmctl_run("--selftest", "-m", "32M", *options), environment=environment
    ) as guest:
        try:
            status = end(guest, plan)
            if status not in plan.statuses():
                wrong.append(f"exit status {status}, not one of {sorted(plan.statuses())}")
        except ConsoleTimeoutError as error:
            wrong.append(str(error))
        if b"Traceback" in guest.errors and not _was_starting(plan):
            wrong.append(f"a traceback: {guest.errors.decode(errors='replace')}")
    return wrong + leftovers(mark, before, scratch)


def _was_starting(plan: Plan) -> bool:
    """Tell whether the interpreter's own start may have been interrupted."""
    return not plan.waits_for_guest and plan.way is not Way.TIMEOUT


def main(arguments: Sequence[str]) -> int:
    """Run the campaign and print its summary."""
    parser = argparse.ArgumentParser(
        prog="kill_selftest", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--seed", type=int, default=1)
    given = parser.parse_args(arguments)
    deviations = 0
    ways: Counter[str] = Counter()
    begun = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="kill-selftest-") as scratch:
        for number, plan in enumerate(plans(given.count, given.seed)):
            wrong = run(plan, Path(scratch))
            ways[plan.way.value] += 1
            deviations += bool(wrong)
            for line in wrong:
                print(f"run {number}, {plan}: {line}", flush=True)
    taken = time.monotonic() - begun
    told = ", ".join(f"{count} by {way}" for way, count in sorted(ways.items()))
    print(f"{given.count} runs in {taken:.0f} s ({told}): {deviations} deviated")
    return 1 if deviations else 0


if __name__ == "__main__":
    os.umask(0o077)
    sys.exit(main(sys.argv[1:]))
