"""Campaign: a counting guest is saved and restored again and again, at random moments.

Each cycle builds a new machine, every eighth in a new process by fork, restores what the last one
saved, lets the guest run for a random time, and saves it. The guest's counters advance only if no
timer, IPI or half-done port access is lost. If a guest stops counting, counts back, or reads a
wrong value, that is printed, and the exit status is 1. vCPUs take turns: 1, 2, 4.

The same --seed gives the same delays.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from tests.counting_guest import (  # noqa: E402 - found by the line above
    Counters,
    Stand,
    counting_guest,
    give,
    in_new_process,
    take,
)
from vmm_kvm.machine.state import MachineState  # noqa: E402 - same

VCPUS = (1, 2, 4)
_EVERY = 8
_RUN_MAX_S = 0.02
_SHOWN_EVERY = 100


def main() -> int:
    """Run the cycles; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    chance = random.Random(options.seed)
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as directory:
        image = Path(directory) / "counting.bin"
        image.write_bytes(counting_guest())
        for number, cpus in enumerate(VCPUS):
            share = len(range(number, options.count, len(VCPUS)))
            try:
                _cycles(Stand(image, cpus), cpus, share, chance)
            except AssertionError as err:
                print(f"{cpus} vCPUs: {err}")
                return 1
    took = time.monotonic() - began
    print(
        f"save_restore: {options.count} cycles in {took:.0f} s, seed {options.seed}: no deviation"
    )
    return 0


def _cycles(stand: Stand, cpus: int, count: int, chance: random.Random) -> None:
    with stand.machine() as machine:
        machine.start()
        stand.wait(machine, lambda now: now.others == cpus - 1 and now.sent > 1)
        saved, stopped = take(machine), Counters.of(machine)
    for number in range(count):
        delay = chance.random() * _RUN_MAX_S
        if number % _EVERY == _EVERY - 1:
            status = in_new_process(partial(_try, stand, saved, stopped, delay))
            assert status == 0, f"cycle {number}: a new process ended with {status}"
        saved, stopped = _go_on(stand, saved, stopped, delay)
        if number % _SHOWN_EVERY == _SHOWN_EVERY - 1:
            print(f"{cpus} vCPUs: {number + 1} of {count}: {stopped}", flush=True)


def _try(stand: Stand, saved: tuple[MachineState, bytes], stopped: Counters, delay: float) -> None:
    _go_on(stand, saved, stopped, delay)


def _go_on(
    stand: Stand, saved: tuple[MachineState, bytes], stopped: Counters, delay: float
) -> tuple[tuple[MachineState, bytes], Counters]:
    """Restore, let the guest run, and save it again."""
    with stand.machine(is_restored=True) as machine:
        give(machine, saved)
        stand.wait(machine, lambda now: now.is_past(stopped))
        time.sleep(delay)
        result = take(machine), Counters.of(machine)
        assert not stand.outcomes, stand.outcomes
        return result


if __name__ == "__main__":
    sys.exit(main())
