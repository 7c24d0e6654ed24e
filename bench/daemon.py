"""Measure the daemon: the time of starts, the memory of a VM, and the cost of `vmctl status`.

It runs on this machine's KVM with the self-test guest, which any KVM runs:

- start: from the request to the guest's first instruction (as root, where the kernel can tell); to
  the answer, which comes when the guest runs; and to the guest's first output on the console. One
  VM after another, each after a pause.
- rate: VMs started one after the other without a pause, until the last has printed.
- status: processor time of `vmctl status`, and of a Python that does nothing.
- memory: PSS of VM processes, without the mappings of their guests, divided by the number of VMs.
  Page tables and the kernel's own memory are in no PSS. With `--ksm`, as root, once more after the
  host's kernel has merged equal pages; KSM is on for that time only.
- idle: processor time of the daemon's own processes, and of VMs, over some seconds.

On a busy machine times grow: as root, `nice -n -10` helps. Prints a table and writes JSON.
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
from typing import NamedTuple, Self

from bench.instructions import Instructions
from tests.system.vmd.daemon import READY, Client, Daemon, descendants, process_title, vm_block

ROOT = Path(__file__).resolve().parents[1]
BIN = Path(sys.executable).parent
_MIB = 1 << 20
_PAUSE_S = 1.5  # the daemon prepares the next process meanwhile
_SETTLING_S = 3.0
_CLOCK_TICKS = os.sysconf("SC_CLK_TCK")
_STATUS_RUNS = 20
_DAEMON_TITLES = (
    "vmd: control",
    "vmd: priv",
    "vmd: local",
    "vmd: vmm",
    "vmd: init",
    "vmd: zygote",
    "vm",
    "disk",
)
_RAM = 64 * _MIB
# Mappings of the guest: its RAM, which has no name or this one, and its firmware.
_GUEST_MAPPINGS = ("/memfd:vmm:", "/dev/zero")


@dataclass(frozen=True, slots=True)
class Figures:
    """Results; times in seconds, memory in bytes."""

    instructions_s: tuple[float, ...]
    """Empty if the kernel cannot tell."""
    answers_s: tuple[float, ...]
    consoles_s: tuple[float, ...]
    vms: int
    start_rate: float
    """VMs a second."""
    status_cpu_s: float
    python_cpu_s: float
    status_s: float
    """A `status` of all VMs, by a connected client."""
    pss: float
    """Of all processes of VMs, divided by the number of VMs."""
    private: float
    merged_pss: float | None
    """The same after the host has merged equal pages; None without `--ksm`."""
    merged_private: float | None
    daemon_pss: float
    """Of all other processes of the daemon together."""
    idle_cpu: float
    """Of the daemon's processes, as a share of one processor."""
    idle_vm_cpu: float
    """Of a VM's process, the mean over all."""


def measure(vms: int, rounds: int, idle_s: float, *, merges: bool) -> Figures:
    """Measure everything under one daemon."""
    with tempfile.TemporaryDirectory(prefix="bench-") as scratch:
        memory = f"{_RAM // _MIB}M"
        config = "".join(
            vm_block(f"vm{number}", memory=memory) for number in range(max(vms, rounds))
        )
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
            pss, private = _memory_per_vm(others, vms)
            daemon_pss = sum(_memory(pid)[0] for pid in own)
            merged_pss = merged_private = None
            if merges:
                with Merging() as merging:
                    merging.wait()
                    merged_pss, merged_private = _memory_per_vm(others, vms)
            return Figures(
                instructions_s=tuple(filter(None, (start.instruction for start in starts))),
                answers_s=tuple(start.answer for start in starts),
                consoles_s=tuple(start.console for start in starts),
                vms=vms,
                start_rate=rate,
                status_cpu_s=_median_of(lambda: _child_cpu_s([str(BIN / "vmctl"), "status"])),
                python_cpu_s=_median_of(lambda: _child_cpu_s([sys.executable, "-c", ""])),
                status_s=status_s,
                pss=pss,
                private=private,
                merged_pss=merged_pss,
                merged_private=merged_private,
                daemon_pss=daemon_pss,
                idle_cpu=sum(busy[pid] for pid in own) / idle_s,
                idle_vm_cpu=statistics.mean(busy[pid] for pid in others) / idle_s,
            )


class _Start(NamedTuple):
    """Times from the request to start a VM, in seconds."""

    instruction: float | None
    """None if the kernel cannot tell."""
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
    instruction = None
    if instructions:
        try:
            instruction = instructions.first_of(pid) - begun
        except LookupError as err:  # other guests have filled the trace buffer
            print(f"{name}: {err}", file=sys.stderr)
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


def _memory_per_vm(pids: Sequence[int], vms: int) -> tuple[float, float]:
    """Return PSS and private memory of all `pids`, divided by the number of VMs; bytes."""
    pss, private = map(sum, zip(*map(_memory, pids), strict=True))
    return pss / vms, private / vms


class Merging:
    """Merge equal pages of this host meanwhile; a context manager. Needs root.

    Source: Linux Documentation/admin-guide/mm/ksm.rst
    """

    _KSM = Path("/sys/kernel/mm/ksm")
    _SETTINGS = (("pages_to_scan", "4000"), ("run", "1"))
    _SCANS = 4  # one to see a page, one to see that it stays, and some for pages that moved

    def __enter__(self) -> Self:
        self._before = [(name, (self._KSM / name).read_text()) for name, _ in self._SETTINGS]
        for name, value in self._SETTINGS:
            (self._KSM / name).write_text(value)
        return self

    def wait(self) -> None:
        """Wait for enough scans of all pages."""
        end = self._scans() + self._SCANS
        while self._scans() < end:
            time.sleep(0.5)

    def _scans(self) -> int:
        return int((self._KSM / "full_scans").read_text())

    def __exit__(self, *exc: object) -> None:
        for name, value in self._before:
            (self._KSM / name).write_text(value)


def _memory(pid: int) -> tuple[int, int]:
    """Return the PSS and the private memory of a process, without the guest's mappings; bytes.

    Source: proc_pid_smaps(5).
    """
    pss = private = 0
    is_guest = False
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        words = line.split()
        if not words[0].endswith(":"):
            begin, end = (int(address, 16) for address in words[0].split("-"))
            name = words[5] if len(words) > 5 else ""
            is_guest = name.startswith(_GUEST_MAPPINGS) or (not name and end - begin >= _RAM)
        elif is_guest:
            continue
        elif words[0] == "Pss:":
            pss += int(words[1]) << 10
        elif words[0].startswith("Private_"):
            private += int(words[1]) << 10
    return pss, private


def table(found: Figures) -> str:
    """Return the figures as text, with their limits."""
    rows = (
        ("start, to the first instruction", _median_and_fastest(found.instructions_s), "15 ms"),
        ("  to the answer", _median_and_fastest(found.answers_s), ""),
        ("  to the guest's first words", _median_and_fastest(found.consoles_s), ""),
        (f"start rate, {found.vms} VMs", f"{found.start_rate:.1f} /s", ""),
        ("`vmctl status`, processor time", f"{found.status_cpu_s * 1e3:.1f} ms", "60 ms"),
        ("  a Python that does nothing", f"{found.python_cpu_s * 1e3:.1f} ms", "(10 ms)"),
        (f"status of {found.vms} VMs, answer", f"{found.status_s * 1e3:.1f} ms", ""),
        ("PSS of a VM besides the guest's", _mib(found.pss), "4 MiB"),
        ("  private", _mib(found.private), ""),
        ("  PSS, equal pages merged", _mib(found.merged_pss), ""),
        ("  private", _mib(found.merged_private), ""),
        ("PSS of the daemon", f"{found.daemon_pss / _MIB:.1f} MiB", ""),
        ("idle: the daemon", f"{found.idle_cpu:.2%}", "0.0%"),
        ("idle: a VM", f"{found.idle_vm_cpu:.2%}", ""),
    )
    return "\n".join(f"{name:36}{value:>22}{target:>10}" for name, value, target in rows)


def _mib(size: float | None) -> str:
    return "not measured" if size is None else f"{size / _MIB:.2f} MiB"


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
    parser.add_argument(
        "--ksm", action="store_true", help="also have the host merge equal pages, for a while"
    )
    parser.add_argument("--json", type=Path, default=ROOT / "out" / "daemon.json")
    given = parser.parse_args()
    for name in [name for name in os.environ if name.startswith("PYTHON")]:
        del os.environ[name]  # keep byte code, and buffer streams, as users do
    found = measure(given.vms, given.rounds, given.idle, merges=given.ksm)
    print(table(found))
    given.json.parent.mkdir(parents=True, exist_ok=True)
    given.json.write_text(json.dumps(asdict(found), indent=2) + "\n")
    print(f"written: {given.json}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
