"""Time a guest's start: from the program's start to the first line of the guest's /init.

It compares ours (`vmctl run`, and as root `vmctl start` with a daemon that runs already) with
QEMU's machines, and with kvmtool where it is installed: the same kernel, initramfs, command line
and memory, one vCPU; with the kernel's log on the serial console, and with `quiet`. It runs in the
rig with the clock that counts instructions, so that ratios repeat to about one per cent on a busy
machine; all files that are read are staged into the rig's memory and run once before they are
measured. With `--beside`, the programs of another tree of this project take their turns too. If a
guest in the rig hangs, by a fault of QEMU's emulation, the benchmark starts a new rig, and keeps
the earlier results. `--here` measures on this machine's KVM with its own clock instead.

It also measures the memory that an idle guest costs besides its RAM: private, and proportional
(PSS). A shell measures memory, because it shares no interpreter with `vmctl`.

It prints a table with ratios of starts and of whole runs to those of QEMU's `-M pc`, and writes
JSON. A whole run ends when the program ends, after its guest's /init has powered off.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from tests import artifacts  # noqa: E402 - found by the line above
from tests.rig.machine import (  # noqa: E402
    EXIT_TIMEOUT,
    Rig,
    Stage,
    project_stages,
    tree_stages,
)
from tests.system.vmd.daemon import Daemon  # noqa: E402

MEMORY = 256 << 20
COMMAND_LINE = "console=ttyS0 reboot=k panic=-1"
LOGS = {"full log": "", "quiet": " quiet"}
"""How much of the kernel's log the serial console shows, and the words for it."""
MARKER = b"init: up"
BASELINE = "QEMU -M pc"
_WITH_DAEMON = "vmctl start"
_BESIDE = " beside"  # ends the name of a program of another tree
_PAUSE_S = 2.0
_PATIENCE_S = 180.0  # of wall-clock time: a start takes 5 to 40 s of it
_RIGS_MAX = 6
_PACKAGES = ("vmctl", "vmd", "vmm_kvm")
_MIB = 1 << 20
_RAM_NAMES = ("/memfd:", "/dev/shm/", "[anon")


@dataclass(frozen=True, slots=True)
class Memory:
    """A process's mapped memory besides the guest's RAM, in bytes."""

    private: int
    proportional: int
    resident: int


@dataclass(frozen=True, slots=True)
class Result:
    """One program's figures: seconds to init, by round, and the memory of an idle guest."""

    name: str
    log: str
    """A key of `LOGS`."""
    starts_s: tuple[float, ...]
    runs_s: tuple[float, ...]
    """The whole run, to the program's end after the guest's."""
    memory: Memory | None

    @property
    def start_s(self) -> float:
        """The median of the rounds."""
        return statistics.median(self.starts_s)

    @property
    def run_s(self) -> float:
        """The median of the rounds."""
        return statistics.median(self.runs_s)


def competitors(
    test: str, only: str, beside: Path | None, *, with_daemon: bool
) -> dict[str, list[str]]:
    """Return the command line of each program that is installed, by its name in the table.

    Args:
        test: the action of the guest's /init after its first line; more words may follow.
        only: a regular expression that is found in each name.
        beside: another tree of this project, with its `.venv`.
        with_daemon: add programs that need a daemon, as the last ones.
    """
    kernel, image = artifacts.kernel("cloud").vmlinuz, artifacts.plain_initramfs()
    command_line = f"{COMMAND_LINE} test={test}"
    trees = {"": ROOT} if beside is None else {"": ROOT, _BESIDE: beside}
    found = {
        f"vmctl run{suffix}": [
            *(str(_vmctl(tree)), "run", "-m", str(MEMORY), "--no-reboot", "-b", str(kernel)),
            *("--initrd", str(image), "--append", command_line),
        ]
        for suffix, tree in trees.items()
    }
    if shutil.which("qemu-system-x86_64") is not None:
        for machine in ("pc", "q35", "microvm"):
            found[f"QEMU -M {machine}"] = [
                *("qemu-system-x86_64", "-M", machine, "-accel", "kvm", "-cpu", "host"),
                *("-m", f"{MEMORY // _MIB}M", "-nodefaults", "-no-user-config"),
                *("-display", "none", "-no-reboot", "-serial", "stdio", "-kernel", str(kernel)),
                *("-initrd", str(image), "-append", command_line),
            ]
    for tool in ("lkvm", "kvmtool"):
        if shutil.which(tool) is not None:
            found["kvmtool"] = [
                *(tool, "run", "-k", str(kernel), "-i", str(image), "-c", "1"),
                *("-m", str(MEMORY // _MIB), "--console", "serial", "-p", command_line),
            ]
            break
    if with_daemon:
        for suffix, tree in trees.items():
            start = [
                *(str(_vmctl(tree)), "start", "-c", "-m", f"{MEMORY // _MIB}M", "-b", str(kernel)),
                *("--initrd", str(image), "--append", command_line),
            ]
            # Each start is a VM of its own.
            script = f'VMD_SOCKET="${_socket_variable(suffix)}" exec {shlex.join(start)} bench$$'
            found[_WITH_DAEMON + suffix] = ["sh", "-c", script]
    return {name: arguments for name, arguments in found.items() if re.search(only, name)}


def _vmctl(tree: Path) -> Path:
    return tree / ".venv" / "bin" / "vmctl"


def _socket_variable(suffix: str) -> str:
    """Return the environment variable with the daemon's socket of the tree with this suffix."""
    return f"BENCH_SOCKET{suffix.strip().upper()}"


def time_start(arguments: Sequence[str]) -> tuple[float, float]:
    """Run a program to its end; return the seconds to its guest's /init, and those of all.

    The reader shares the one processor: it looks at each byte once.

    Raises:
        RuntimeError: the program ended before.
    """
    begun = time.perf_counter()
    with subprocess.Popen(
        arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    ) as program:
        assert program.stdout
        output, seen = program.stdout.fileno(), b""
        while MARKER not in seen:
            data = os.read(output, 65536)
            if not data:
                raise RuntimeError(f"{arguments[0]}: ended with {seen!r}")
            seen = seen[-len(MARKER) :] + data
        start = time.perf_counter() - begun
        while os.read(output, 65536):
            pass
        program.wait()
        return start, time.perf_counter() - begun


def memory_besides_ram(smaps: str, ram: int) -> Memory:
    """Sum the mappings of one or more processes, except the guest's RAM.

    Args:
        smaps: contents of /proc/PID/smaps, one after the other.
        ram: the guest's memory, bytes; an anonymous or memfd mapping of at least half of it is RAM.

    Source: proc_pid_smaps(5).
    """
    totals = dict.fromkeys(("Private_Clean", "Private_Dirty", "Pss", "Rss"), 0)
    is_ram = False
    for line in smaps.splitlines():
        mapping = re.match(r"([0-9a-f]+)-([0-9a-f]+) \S+ \S+ \S+ \S+ *(.*)", line)
        if mapping:
            size = int(mapping[2], 16) - int(mapping[1], 16)
            name = mapping[3]
            is_ram = size >= ram // 2 and (not name or name.startswith(_RAM_NAMES))
            continue
        field, _, value = line.partition(":")
        if field in totals and not is_ram:
            totals[field] += int(value.split()[0]) << 10
    return Memory(
        private=totals["Private_Clean"] + totals["Private_Dirty"],
        proportional=totals["Pss"],
        resident=totals["Rss"],
    )


def memory_script(programs: dict[str, list[str]], out: str) -> str:
    """Return a shell script that saves the smaps of each program's idle guest as `out`/N.smaps.

    Existing files are left alone. A program's children count with it. Console and input are
    kept in memory: under the counted clock every wait for a shared file system is a jump.
    """
    lines = ["scratch=$(mktemp -d)"]
    for number, arguments in enumerate(programs.values()):
        lines += [
            f"if [ ! -s {out}/{number}.smaps ]; then",
            "mkfifo $scratch/in; sleep 1000000 > $scratch/in & holder=$!",
            f"{shlex.join(arguments)} < $scratch/in > $scratch/console 2>&1 & program=$!",
            'until grep -q "init: idle" $scratch/console; do',
            "kill -0 $program || break; sleep 1; done",
            "sleep 1",
            r'children=$(grep -lE "^PPid:\s$program$" /proc/[0-9]*/status | tr -dc "0-9\n")',
            f"for pid in $program $children; do cat /proc/$pid/smaps; done > {out}/{number}.smaps",
            "kill -9 $program $holder; wait",
            "rm $scratch/in $scratch/console",
            f"echo memory of program {number}: measured; fi",
        ]
    return "\n".join(lines) + "\n"


def qemu_stages() -> list[Stage]:
    """Return the files that QEMU reads: its binary, libraries, and firmware."""
    binary = shutil.which("qemu-system-x86_64")
    if binary is None:
        return []
    listed = subprocess.run(["ldd", binary], check=True, capture_output=True, text=True).stdout
    libraries = {Path(path).resolve() for path in re.findall(r"(/\S+) \(0x", listed)}
    # Every process uses the C library and the loader, the staging ones included.
    libraries = {path for path in libraries if not re.match(r"ld-linux|libc\.so", path.name)}
    folders = [Path("/usr/share/qemu"), Path("/usr/share/seabios")]
    modules = next(iter(Path("/usr/lib").glob("*/qemu")), None)
    if modules is not None:
        folders.append(modules)
    return [
        *(Stage(folder, ("*.fd", "u-boot*", "opensbi*", "*.dtb")) for folder in folders),
        Stage(Path(binary)),
        *(Stage(path) for path in sorted(libraries)),
    ]


Starts = dict[str, dict[str, list[tuple[float, float]]]]
"""Results of `time_start`, by round, by program, by log."""


def measure(rounds: int, only: str, beside: Path | None, out: Path) -> None:
    """Time each program `rounds` times after one run that does not count; keep `out` up to date.

    The programs take turns, so that drift affects all of them. Results of an earlier run in `out`
    count as well.
    """
    starts: Starts = json.loads(out.read_text()) if out.exists() else {log: {} for log in LOGS}
    is_root = os.geteuid() == 0
    programs = {
        log: competitors("poweroff" + words, only, beside, with_daemon=is_root)
        for log, words in LOGS.items()
    }
    with ExitStack() as stack:
        for suffix, tree in (("", ROOT), (_BESIDE, beside)):
            if tree is None or _WITH_DAEMON + suffix not in programs["quiet"]:
                continue
            scratch = stack.enter_context(tempfile.TemporaryDirectory(prefix="bench-"))
            vmd = stack.enter_context(
                Daemon(
                    Path(scratch),
                    "",
                    is_user=False,
                    prefix=("env", "-C", str(tree)),
                    interpreter=tree / ".venv" / "bin" / "python",
                )
            )
            os.environ[_socket_variable(suffix)] = str(vmd.socket)
        is_warm: set[str] = set()
        while missing := [
            (log, name)
            for log in LOGS
            for name in programs[log]
            if len(starts[log].get(name, ())) < rounds
        ]:
            for log, name in missing:
                if name.startswith(_WITH_DAEMON):
                    time.sleep(_PAUSE_S)  # the daemon prepares the next process
                taken = time_start(programs[log][name])
                print(f"{name}, {log}: {taken[0]:.3f} s, {taken[1]:.3f} s", flush=True)
                if name not in is_warm:
                    is_warm.add(name)  # its files are in the rig's memory now
                    continue
                starts[log].setdefault(name, []).append(taken)
                out.write_text(json.dumps(starts))


def results(folder: Path) -> list[Result]:
    """Read the results of `measure` and of the memory script in a directory."""
    starts: Starts = json.loads((folder / "starts.json").read_text())
    found = []
    for log, programs in starts.items():
        for number, (name, times) in enumerate(programs.items()):
            smaps = folder / f"{number}.smaps"
            memory = memory_besides_ram(smaps.read_text(), MEMORY) if smaps.exists() else None
            starts_s, runs_s = zip(*times, strict=True)
            found.append(Result(name, log, starts_s, runs_s, memory))
    return found


def table(found: Sequence[Result]) -> str:
    """Return the figures as text, a line per program and log."""
    head = f"{'':26}{'start':>9}{'ratio':>8}{'spread':>8}{'whole run':>11}{'of pc':>7}"
    lines = [f"{head}{'private':>12}{'proportional':>14}"]
    for result in found:
        base = next((r for r in found if (r.name, r.log) == (BASELINE, result.log)), None)
        ratio = f"{result.start_s / base.start_s:8.3f}" if base else f"{'-':>8}"
        of_run = f"{result.start_s / base.run_s:7.3f}" if base else f"{'-':>7}"
        spread = (max(result.starts_s) - min(result.starts_s)) / result.start_s
        label = f"{result.name}, {result.log}"
        line = f"{label:26}{result.start_s:7.3f} s{ratio}{spread:8.1%}"
        line += f"{result.run_s:9.3f} s{of_run}"
        if result.memory:
            line += f"{result.memory.private / _MIB:8.1f} MiB"
            line += f"{result.memory.proportional / _MIB:10.1f} MiB"
        lines.append(line)
    for result in found:
        other = next(
            (r for r in found if (r.name, r.log) == (result.name + _BESIDE, result.log)), None
        )
        if other:
            of_other = result.start_s / other.start_s
            lines.append(f"{result.name}, {result.log}: {of_other:.3f} of the tree beside")
    return "\n".join(lines)


def _inner(folder: Path, rounds: int, only: str, beside: Path | None) -> str:
    """Return the shell command that measures the missing parts of `folder`, by a script in it."""
    programs = competitors("idle" + LOGS["quiet"], only, beside, with_daemon=False)
    script = folder / "memory.sh"
    script.write_text(memory_script(programs, "$RIG_OUT"))
    run = [sys.executable, __file__, "--measure", str(rounds), "--only", only]
    if beside is not None:
        run += ["--beside", str(beside)]
    place = shlex.quote(str(folder))
    # Keep the processor busy: when it waits for the shared file system, as each look-up of a
    # missing file does, the counted clock would jump to the next timer.
    return (
        "chrt --idle 0 sh -c 'while :; do :; done' & "
        f"cp {place}/*.json {place}/*.smaps $RIG_OUT 2>/dev/null; "
        f"{shlex.join(run)} && . {place}/memory.sh"
    )


def main() -> int:
    """Measure, print the table, and write the JSON file."""
    parser = argparse.ArgumentParser(
        prog="bench/boot", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", default="", metavar="REGEX", help="programs so named")
    parser.add_argument("--beside", type=Path, metavar="TREE", help="another tree, set up as this")
    parser.add_argument("--json", type=Path, default=ROOT / "out" / "boot.json")
    parser.add_argument("--here", action="store_true", help="on this machine, by its own clock")
    parser.add_argument("--measure", type=int, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.measure:
        out = Path(os.environ["RIG_OUT"]) / "starts.json"
        measure(given.measure, given.only, given.beside, out)
        return 0
    beside: Path | None = given.beside and given.beside.resolve()
    # As installed: compiled once, not at each start because of the environment.
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    packages = [str(tree / name) for tree in (ROOT, beside) if tree for name in _PACKAGES]
    subprocess.run([sys.executable, "-m", "compileall", "-q", *packages], check=True)
    with tempfile.TemporaryDirectory(prefix="bench-") as scratch:
        folder = Path(scratch)
        command = ("sh", "-c", _inner(folder, given.rounds, given.only, beside))
        if given.here:
            environment = {**os.environ, "RIG_OUT": scratch}
            status = subprocess.run(command, check=False, env=environment).returncode
        else:
            for _ in range(_RIGS_MAX):
                status = _rig(command, folder, beside).run()
                if status != EXIT_TIMEOUT:
                    break
                print("a guest stood still: another rig goes on", flush=True)
        if status != 0:
            print(f"bench/boot: measuring failed with status {status}", file=sys.stderr)
            return 1
        found = results(folder)
    clock = "this machine's clock" if given.here else "counted clock (rig --icount)"
    print(f"\nStart to the first line of init, {clock}:\n{table(found)}")
    given.json.parent.mkdir(parents=True, exist_ok=True)
    figures = [{**asdict(result), "start_s": result.start_s} for result in found]
    given.json.write_text(json.dumps({"clock": clock, "results": figures}, indent=2) + "\n")
    print(f"written: {given.json}")
    return 0


def _rig(command: tuple[str, ...], out: Path, beside: Path | None) -> Rig:
    kernel = artifacts.kernel("cloud").vmlinuz
    read = (kernel, artifacts.plain_initramfs(), Path(shutil.which("busybox") or "/bin/busybox"))
    return Rig(
        command=command,
        memory=8 << 30,
        timeout_s=3600,
        is_counted=True,
        stages=(
            *project_stages(ROOT),
            *(tree_stages(beside) if beside else ()),
            *qemu_stages(),
            *(Stage(path) for path in read),
        ),
        out=out,
        patience_s=_PATIENCE_S,
    )


if __name__ == "__main__":
    sys.exit(main())
