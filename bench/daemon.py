"""The daemon's figures: how fast VMs start, what one costs, and what `vmctl status` does.

All on this machine's KVM with the self-test guest, which any KVM runs:

- start: from the request to the guest's first instruction, as root, where the kernel can tell; to
  the answer, which is given when the guest runs; and to the guest's first words on the console. One
  VM after another, each after a pause.
- rate: VMs started one after the other without a pause, until the last has spoken.
- status: processor time of `vmctl status`, and of a Python that does nothing.
- memory: PSS of a VM's process, without what its guest maps.
- idle: processor time of the daemon's own processes, and of VMs, over some seconds.

A busy machine shows in the times: as root, `nice -n -10` helps. Prints a table and writes JSON.
Run as `python -m bench.daemon`; as root it measures separated processes.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

from bench.instructions import Instructions
from tests.system.vmd.daemon import READY, Client, Daemon, descendants, process_title, vm_block

ROOT = Path(__file__).resolve().parents[1]
BIN = Path(sys.executable).parent
_MIB = 1 << 20
_PAUSE_S = 1.5  # in which the daemon makes itself ready for the next start
_SETTLING_S = 3.0
_CLOCK_TICKS = os.sysconf("SC_CLK_TCK")
_STATUS_RUNS = 20
_DAEMON_TITLES = (
    "vmd: control",
    "vmd: priv",
    "vmd: local",
    "vmd: vmm",
    "vmd: zygote",
    "vm",
    "disk",
)
# What the guest maps: its RAM, and its firmware.
_GUEST_MAPPINGS = ("/memfd:vmm:", "/dev/zero")


@dataclass(frozen=True, slots=True)
class Figures:
    """What was measured; times in seconds, memory in bytes."""

    instructions_s: tuple[float, ...]
    """Empty where the kernel does not tell."""
    answers_s: tuple[float, ...]
    consoles_s: tuple[float, ...]
    vms: int
    start_rate: float
    """VMs a second."""
    status_cpu_s: float
    python_cpu_s: float
    status_s: float
    """A `status` of all VMs, by a client that is connected already."""
    pss: float
    """Of a VM's process, the mean over all."""
    private: float
    daemon_pss: float
    """Of all other processes of the daemon together."""
    idle_cpu: float
    """Of the daemon's processes, as a share of one processor."""
    idle_vm_cpu: float
    """Of a VM's process, the mean over all."""


def measure(vms: int, rounds: int, idle_s: float) -> Figures:
    """Measure everything under one daemon."""
    with tempfile.TemporaryDirectory(prefix="bench-") as scratch:
        config = "".join(vm_block(f"vm{number}") for number in range(max(vms, rounds)))
        with (
            Daemon(Path(scratch), config, is_user=os.geteuid() != 0) as vmd,
            vmd.client() as client,
        ):
            starts = _time_starts(client, rounds)
            begun = time.perf_counter()
            for number in range(vms):
                answer = client.ask("start", name=f"vm{number}")
                assert answer["type"] == "started", answer
            for number in range(vms):
                with client.console(f"vm{number}") as console:
                    console.expect(READY)
            rate = vms / (time.perf_counter() - begun)
            time.sleep(_SETTLING_S)
            status_s = _median_of(lambda: _time_status(client))
            os.environ["VMD_SOCKET"] = str(vmd.socket)
            pids = [vmd.process.pid, *descendants(vmd.process.pid)]
            own = [pid for pid in pids if _is_of_daemon(pid, vmd)]
            others = [pid for pid in pids if pid not in own]
            busy = {pid: _cpu_s(pid) for pid in pids}
            time.sleep(idle_s)
            busy = {pid: _cpu_s(pid) - before for pid, before in busy.items()}
            memory = [_memory(pid) for pid in others]
            return Figures(
                instructions_s=tuple(filter(None, (start.instruction for start in starts))),
                answers_s=tuple(start.answer for start in starts),
                consoles_s=tuple(start.console for start in starts),
                vms=vms,
                start_rate=rate,
                status_cpu_s=_median_of(lambda: _child_cpu_s([str(BIN / "vmctl"), "status"])),
                python_cpu_s=_median_of(lambda: _child_cpu_s([sys.executable, "-c", ""])),
                status_s=status_s,
                pss=statistics.mean(pss for pss, _ in memory),
                private=statistics.mean(private for _, private in memory),
                daemon_pss=sum(_memory(pid)[0] for pid in own),
                idle_cpu=sum(busy[pid] for pid in own) / idle_s,
                idle_vm_cpu=statistics.mean(busy[pid] for pid in others) / idle_s,
            )


class _Start(NamedTuple):
    """How long things took from the request to start a VM, in seconds."""

    instruction: float | None
    """None where the kernel does not tell."""
    answer: float
    console: float


def _time_starts(client: Client, rounds: int) -> list[_Start]:
    with ExitStack() as stack:
        instructions = None
        try:
            instructions = stack.enter_context(Instructions())
        except OSError as err:
            print(f"first instructions: {err.strerror}", file=sys.stderr)
        return [_time_start(client, f"vm{number}", instructions) for number in range(rounds)]


def _time_start(client: Client, name: str, instructions: Instructions | None) -> _Start:
    """Start a VM and stop it."""
    if instructions:
        instructions.forget()
    time.sleep(_PAUSE_S)
    begun = time.monotonic()
    answer = client.ask("start", name=name)
    answered = time.monotonic() - begun
    assert answer["type"] == "started", answer
    with client.console(name) as console:
        console.expect(READY[:1])
        spoken = time.monotonic() - begun
        console.expect(READY)
    pid = client.vm(name)["pid"]
    assert isinstance(pid, int)
    instruction = instructions.first_of(pid) - begun if instructions else None
    assert client.ask("stop", name=name, force=True, wait=True)["type"] == "terminated"
    return _Start(instruction, answered, spoken)


def _time_status(client: Client) -> float:
    begun = time.perf_counter()
    client.vms()
    return time.perf_counter() - begun


def _child_cpu_s(command: Sequence[str]) -> float:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(command, check=True, stdout=subprocess.PIPE)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def _median_of(sample: Callable[[], float]) -> float:
    return statistics.median(sample() for _ in range(_STATUS_RUNS))


def _is_of_daemon(pid: int, vmd: Daemon) -> bool:
    return pid == vmd.process.pid or process_title(pid) in _DAEMON_TITLES


def _cpu_s(pid: int) -> float:
    """Return a process's processor time. Source: proc_pid_stat(5), fields 14 and 15."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / _CLOCK_TICKS


def _memory(pid: int) -> tuple[int, int]:
    """Return the PSS and the private memory of a process, without what a guest maps; bytes.

    Source: proc_pid_smaps(5).
    """
    pss = private = 0
    is_guest = False
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        words = line.split()
        if not words[0].endswith(":"):
            is_guest = len(words) > 5 and words[5].startswith(_GUEST_MAPPINGS)
        elif is_guest:
            continue
        elif words[0] == "Pss:":
            pss += int(words[1]) << 10
        elif words[0].startswith("Private_"):
            private += int(words[1]) << 10
    return pss, private


def table(found: Figures) -> str:
    """Return the figures as text, with what they are to be."""
    rows = (
        ("start, to the first instruction", _median_and_fastest(found.instructions_s), "15 ms"),
        ("  to the answer", _median_and_fastest(found.answers_s), ""),
        ("  to the guest's first words", _median_and_fastest(found.consoles_s), ""),
        (f"start rate, {found.vms} VMs", f"{found.start_rate:.1f} /s", ""),
        ("`vmctl status`, processor time", f"{found.status_cpu_s * 1e3:.1f} ms", "60 ms"),
        ("  a Python that does nothing", f"{found.python_cpu_s * 1e3:.1f} ms", "(10 ms)"),
        (f"status of {found.vms} VMs, answer", f"{found.status_s * 1e3:.1f} ms", ""),
        ("PSS of a VM besides the guest's", f"{found.pss / _MIB:.2f} MiB", "4 MiB"),
        ("  private", f"{found.private / _MIB:.2f} MiB", ""),
        ("PSS of the daemon", f"{found.daemon_pss / _MIB:.1f} MiB", ""),
        ("idle: the daemon", f"{found.idle_cpu:.2%}", "0.0%"),
        ("idle: a VM", f"{found.idle_vm_cpu:.2%}", ""),
    )
    return "\n".join(f"{name:36}{value:>22}{target:>10}" for name, value, target in rows)


def _median_and_fastest(times_s: Sequence[float]) -> str:
    if not times_s:
        return "not measured"
    return f"{statistics.median(times_s) * 1e3:.1f}, fastest {min(times_s) * 1e3:.1f} ms"


def main() -> int:
    """Measure, print the table, and write the JSON file."""
    parser = argparse.ArgumentParser(
        prog="bench/daemon",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--vms", type=int, default=100, help="that run at once")
    parser.add_argument("--rounds", type=int, default=20, help="starts that are timed")
    parser.add_argument("--idle", type=float, default=10.0, metavar="SECONDS")
    parser.add_argument("--json", type=Path, default=ROOT / "out" / "daemon.json")
    given = parser.parse_args()
    found = measure(given.vms, given.rounds, given.idle)
    print(table(found))
    given.json.parent.mkdir(parents=True, exist_ok=True)
    given.json.write_text(json.dumps(asdict(found), indent=2) + "\n")
    print(f"written: {given.json}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
