"""Compare the cost of an exit handled in Python with one handled by the smallest C loop.

Both run the same guests: a port write, a port read and an MMIO write of one byte in a loop. The
Python side is the machine's own: `dispatch`, a `Bus`, and a device that does nothing. Time is the
thread's own processor time, so that other work on the machine matters little. C and Python take
turns, so that a change of the machine's speed affects both; the medians count. The interpreter
matters too: one built without optimisation costs half as much again.

Run as `python -m bench.exits`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from tests import guests
from vmm_kvm.arch.x86.dispatch import dispatch
from vmm_kvm.bus import Bus

BUDGET_NS = 2000
_SOURCE = Path(__file__).with_suffix(".c")
_GUESTS: dict[str, Callable[[int], bytes]] = {
    "PIO write": guests.out_loop,
    "PIO read": guests.in_loop,
    "MMIO write": guests.mmio_loop,
}


class _Sink:
    """A device that does nothing."""

    def __init__(self) -> None:
        self.lock = threading.Lock()

    def read(self, _offset: int, _size: int) -> int:
        return 0

    def write(self, _offset: int, _size: int, _value: int) -> None:
        pass


@dataclass(frozen=True, slots=True)
class Result:
    """Medians for one guest, in nanoseconds per exit."""

    guest: str
    c_ns: float
    python_ns: float
    difference_ns: float


def _compile(directory: Path) -> Path:
    program = directory / "exits"
    subprocess.run(["gcc", "-O2", "-Wall", "-o", str(program), str(_SOURCE)], check=True)
    return program


def _run_c(program: Path, code: bytes) -> float:
    done = subprocess.run([str(program), code.hex()], check=True, capture_output=True, text=True)
    exits, nanoseconds = map(int, done.stdout.split())
    return nanoseconds / exits


def _run_python(code: bytes, exits: int) -> float:
    sink = _Sink()
    pio, mmio = Bus(1 << 16), Bus(1 << 32)
    pio.insert(guests.PORT, 1, sink)
    mmio.insert(guests.MMIO, guests.RAM_SIZE, sink)
    with guests.guest(code) as guest:
        start = time.thread_time_ns()
        dispatch(guest.vcpu, pio, mmio)
        return (time.thread_time_ns() - start) / (exits + 1)


def measure(exits: int, rounds: int) -> list[Result]:
    """Run every guest `rounds` times on either side, each time for `exits` accesses."""
    results = []
    with tempfile.TemporaryDirectory() as directory:
        program = _compile(Path(directory))
        for name, make in _GUESTS.items():
            code = make(exits)
            pairs = [(_run_c(program, code), _run_python(code, exits)) for _ in range(rounds)]
            c_ns = statistics.median(c for c, _ in pairs)
            python_ns = statistics.median(python for _, python in pairs)
            results.append(Result(name, c_ns, python_ns, python_ns - c_ns))
    return results


def main() -> int:
    """Print the table; the exit status is 1 if the port write misses its budget."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--exits", type=int, default=20_000, help="accesses per run")
    parser.add_argument("--rounds", type=int, default=15, help="runs of C and of Python each")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there too")
    arguments = parser.parse_args()
    results = measure(arguments.exits, arguments.rounds)
    print(f"{'ns/exit':<12}{'C':>10}{'Python':>10}{'more':>10}")
    for result in results:
        print(
            f"{result.guest:<12}{result.c_ns:>10.0f}{result.python_ns:>10.0f}"
            f"{result.difference_ns:>10.0f}"
        )
    if arguments.json:
        figures = {"budget_ns": BUDGET_NS, "results": [asdict(result) for result in results]}
        arguments.json.write_text(json.dumps(figures, indent=2) + "\n")
    return 0 if results[0].difference_ns <= BUDGET_NS else 1


if __name__ == "__main__":
    sys.exit(main())
