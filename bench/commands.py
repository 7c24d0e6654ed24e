"""Processor and wall time of short commands, beside another tree: `bench/commands.py [TREE]`.

Both trees are run by this interpreter, in turn, so that what else the machine does meets both. A
daemon that answers at once is not needed: `status` finds none, and is the measure of the others.
"""

from __future__ import annotations

import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
ROUNDS = 11
COMMANDS = {
    "status": ["status"],
    "--help": ["--help"],
    "run --help": ["run", "--help"],
    "image info": ["image", "info", "disk.qcow2"],
    "create": ["create", "-s", "1M", "new.img"],
    "a mistyped verb": ["strat"],
    "a mistyped option": ["stop", "-x", "a"],
}


def once(tree: Path, words: list[str], place: Path) -> tuple[float, float]:
    """Run a command of `tree` in `place`; returns milliseconds of wall and processor time."""
    (place / "new.img").unlink(missing_ok=True)
    # Byte code is kept, and streams are buffered, as where people run it.
    environment = {name: value for name, value in os.environ.items() if "PYTHON" not in name}
    environment |= {"PYTHONPATH": str(tree), "VMD_SOCKET": str(place / "none")}
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run(
        [sys.executable, "-m", "vmctl", *words],
        env=environment,
        cwd=place,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        check=False,
    )
    wall = time.perf_counter() - began
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return wall * 1000, used * 1000


def main(arguments: list[str]) -> None:
    """Print the medians of each command, and how many times `status` they are."""
    trees = [ROOT, *(Path(each).resolve() for each in arguments)]
    with tempfile.TemporaryDirectory() as scratch:
        place = Path(scratch)
        once(ROOT, ["create", "-s", "10M", "disk.qcow2"], place)
        taken: dict[tuple[Path, str], list[tuple[float, float]]] = {}
        for _ in range(ROUNDS):
            for name, words in COMMANDS.items():
                for tree in trees:
                    taken.setdefault((tree, name), []).append(once(tree, words, place))
        for tree in trees:
            print(tree)
            least = statistics.median(used for _, used in taken[tree, "status"])
            for name in COMMANDS:
                wall = statistics.median(wall for wall, _ in taken[tree, name])
                used = statistics.median(used for _, used in taken[tree, name])
                print(f"  {name:18} {wall:6.1f} ms, {used:6.1f} ms cpu, {used / least:4.2f} status")


if __name__ == "__main__":
    main(sys.argv[1:])
