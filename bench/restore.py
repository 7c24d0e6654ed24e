"""Time a saved VM with a disk until it answers, and count page faults; on this machine's KVM.

The guest is the self-test guest with 512 MiB of memory, of which the snapshot has FILLED MiB of
random data that it does not touch:

- `run --from`: processor's time and page faults of `vmctl run` and its children;
- `start --from`: those of the VM's process in the daemon, whose disk another process serves.

`python -m bench.restore [--rounds N] [--filled MIB]`; of another tree of this project, which need
not have this file: `PYTHONPATH=TREE python bench/restore.py`
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

from bench.boot import ROOT
from tests.system.vmd.daemon import Client, Daemon, vm_block
from vmm_kvm.snapshot.file import SnapshotFile

_MIB = 1 << 20
_MEMORY_MIB, _FILLED_FROM = 512, 64 * _MIB
_PAUSE_S = 2.0  # the daemon prepares the next process meanwhile
# Fields of /proc/PID/stat: proc(5).
_FAULTS, _USER_TIME, _SYSTEM_TIME = 10, 14, 15


class Cost(NamedTuple):
    """Of one start, until the guest has answered."""

    clock: float
    processor: float
    faults: float


def _run(saved: Path) -> Cost:
    began = time.perf_counter()
    program = subprocess.Popen(
        [sys.executable, "-m", "vmctl", "run", "--from", saved, "--timeout", "60"],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert program.stdin
    assert program.stdout
    with program.stdin, program.stdout:
        program.stdin.write(b"e")
        program.stdin.flush()
        program.stdout.read(1)
        took = time.perf_counter() - began
        program.stdin.write(b"p")
        program.stdin.flush()
        _, status, used = os.wait4(program.pid, 0)
        program.returncode = os.waitstatus_to_exitcode(status)
    return Cost(took, used.ru_utime + used.ru_stime, used.ru_minflt)


def _start(socket: Path, client: Client, name: str, saved: Path) -> Cost:
    time.sleep(_PAUSE_S)
    began = time.perf_counter()
    subprocess.run(
        [sys.executable, "-m", "vmctl", "start", "--from", saved, name],
        cwd=ROOT,
        env={**os.environ, "VMD_SOCKET": str(socket)},
        check=True,
        stdin=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    with client.console(name) as console:
        console.type(b"e")
        console.expect(b"e")
    took = time.perf_counter() - began
    stat = Path(f"/proc/{client.vm(name)['pid']}/stat").read_text().rpartition(")")[2].split()
    faults, *ticks = (int(stat[field - 3]) for field in (_FAULTS, _USER_TIME, _SYSTEM_TIME))
    client.ask("stop", name=name, force=True, wait=True)
    return Cost(took, sum(ticks) / os.sysconf("SC_CLK_TCK"), faults)


def _save(folder: Path, filled: int) -> Path:
    """Save a VM with a disk, and fill memory in the file that its guest never reads."""
    disk, saved = folder / "disk.raw", folder / "saved"
    disk.write_bytes(bytes(_MIB))
    block = vm_block("vm", f'disk "{disk}" format raw', memory=f"{_MEMORY_MIB}M")
    with _daemon(folder / "first", block) as (_, client), saved.open("xb") as file:
        for kind, fields, fds in (
            ("start", {}, ()),
            ("snapshot", {"without_disks": True, "file": 0}, (file.fileno(),)),
            ("stop", {"force": True, "wait": True}, ()),
        ):
            answer = client.ask(kind, fds, name="vm", **fields)
            if answer["type"] == "failed":
                raise SystemExit(f"restore: {kind}: {answer}")
    with SnapshotFile(os.open(saved, os.O_RDONLY)) as snapshot:
        start = snapshot.mapped[1]
    with saved.open("r+b") as file:
        file.seek(start + _FILLED_FROM)
        file.write(os.urandom(filled * _MIB))
    return saved


@contextmanager
def _daemon(folder: Path, config: str = "") -> Iterator[tuple[Path, Client]]:
    folder.mkdir()
    with Daemon(folder, config, is_user=True) as vmd, vmd.client() as client:
        yield vmd.socket, client


def main() -> None:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--filled", type=int, default=256, help="MiB")
    given = parser.parse_args()
    costs: dict[str, list[Cost]] = {"run --from": [], "start --from": []}
    with TemporaryDirectory(prefix="bench-", dir="/dev/shm") as scratch:
        folder = Path(scratch)
        saved = _save(folder, given.filled)
        with _daemon(folder / "second") as (socket, client):
            for number in range(given.rounds + 1):
                pair = _run(saved), _start(socket, client, f"vm{number}", saved)
                if number:  # the first one fills caches
                    for taken, cost in zip(costs.values(), pair, strict=True):
                        taken.append(cost)
    for name, taken in costs.items():
        clock, processor, faults = map(statistics.median, zip(*taken, strict=True))
        print(f"{name:14} {clock:.3f} s, processor {processor:.3f} s, {faults:.0f} page faults")


if __name__ == "__main__":
    main()
