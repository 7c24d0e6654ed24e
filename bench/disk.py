"""Measure disks: requests per second and the host's CPU time for each, beside QEMU's virtio-blk.

One guest for each way to serve a disk: in the VM's process, by a device process, by
qemu-storage-daemon with io_uring, as memory (pmem), and by QEMU with aio=threads and aio=io_uring,
without an iothread; and QEMU with qemu-storage-daemon, to tell that daemon's part in the third.
All have a raw image of the same size and contents, in memory. All guests run from the beginning and
take turns: a round puts each load on one disk after the other. While one guest is measured the
others are stopped: seven idle guests would use half of the processor. The figures are medians of
the rounds; a ratio compares two figures of one round, measured within seconds, so that other work
on the machine cancels out. All are compared with the one of QEMU's that has the better median.

`--only` and `--loads` measure a part, in a few minutes: loads that are left out stay in the JSON
file unchanged, so that parts add up to the whole. `--show` prints the file.

It runs in the rig on its plain clock, with one processor, so that the costs of a request for the
guest, KVM and the device determine the rate. Seconds are those that the rig's processor ran:
time that this machine gave to other programs does not count. That processor has no ERMS and no
FSRM, for all alike (`rig --copy-words`; docs/testing.md says why). `--here` measures on this
machine's KVM, by the clock.

The CPU time of a request is that of all processes of a VM except the time in their guest. The
kernel samples the latter, so small figures are uncertain.

Other work on the machine still displaces caches, and changes ratios: compare the least and the
largest ratio of the rounds.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from bench.boot import qemu_stages  # noqa: E402 - found by the line above
from tests import artifacts  # noqa: E402
from tests.rig.initramfs import newc_entry  # noqa: E402
from tests.rig.machine import Rig, Stage, processor_ns, project_stages  # noqa: E402
from tests.vmctl_driver import ConsoleProcess, vmctl_run  # noqa: E402

_MIB = 1 << 20
SIZE = 128 * _MIB
_MEMORY = "192M"
_COMMAND_LINE = "console=ttyS0 quiet panic=-1 test=shell"
_DAEMON = "qemu-storage-daemon"
_QEMU_DAEMON = f"QEMU, {_DAEMON}"
_TIMEOUT_S = 120.0
_SETTLE_S = 0.3
BASELINES = ("QEMU threads", "QEMU io_uring")


class Load(NamedTuple):
    """A kind of load, as bench/disk.c takes it."""

    verb: str
    size: int
    depth: int
    order: str

    @property
    def name(self) -> str:
        """Its name in the table."""
        size = f"{self.size >> 20} MiB" if self.size >= _MIB else f"{self.size >> 10} KiB"
        return f"{size} {self.order} {self.verb}, depth {self.depth}"


LOADS = (
    *(
        Load(verb, size, 4, "sequential")
        for size in (_MIB, _MIB // 8)
        for verb in ("read", "write")
    ),
    *(Load(verb, 4096, depth, "random") for depth in (1, 32) for verb in ("read", "write")),
)


class Figure(NamedTuple):
    """The result of one measurement."""

    per_second: float
    cpu_us: float
    """Of the host, for each request."""


@dataclass(frozen=True, slots=True)
class Disk:
    """A guest that runs, with one disk that is measured."""

    console: ConsoleProcess
    device: str
    pids: tuple[int, ...]

    def touch(self) -> None:
        """Read all of it once: the guest's first access to a page costs faults, most with pmem."""
        self.signal(signal.SIGCONT)
        command = f"busybox dd if={self.device} of=/dev/null bs=1M iflag=direct"
        self.console.send(f"{command} && echo al''l\n")
        self.console.expect("all", _TIMEOUT_S)
        self.console.expect("# ", _TIMEOUT_S)
        self.signal(signal.SIGSTOP)

    def measure(self, load: Load, milliseconds: int) -> Figure:
        """Put a load on the disk, and return the result."""
        self.signal(signal.SIGCONT)
        time.sleep(_SETTLE_S)
        words = f"{self.device} {load.verb} {load.size} {load.depth} {load.order}"
        self.console.send(f"/load {words} {milliseconds}\n")
        self.console.expect("load: begin", _TIMEOUT_S)
        used, ran = _cpu_seconds(self.pids), processor_ns()
        found = self.console.expect(r"load: (\d+) \d+\s", _TIMEOUT_S)
        ran, used = processor_ns() - ran, _cpu_seconds(self.pids) - used
        count = int(found[1])
        self.console.expect("# ", _TIMEOUT_S)
        self.signal(signal.SIGSTOP)
        return Figure(count * 1e9 / ran, used * 1e6 / count)

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to every process of this way to serve the disk."""
        for pid in _with_children(self.pids):
            os.kill(pid, number)


def _cpu_seconds(pids: Sequence[int]) -> float:
    """Return the CPU time that processes and their children used, without that of guests.

    Source: proc_pid_stat(5): fields 14, 15 and 43.
    """
    ticks = 0
    for pid in _with_children(pids):
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12]) - int(fields[40])
    return ticks / os.sysconf("SC_CLK_TCK")


def _with_children(pids: Sequence[int]) -> list[int]:
    found = list(pids)
    for pid in found:
        for task in Path(f"/proc/{pid}/task").iterdir():
            with suppress(FileNotFoundError, ProcessLookupError):  # a thread that has ended
                found += map(int, (task / "children").read_text().split())
    return found


def disks(stack: ExitStack, folder: Path, only: str) -> dict[str, Disk]:
    """Boot a guest for each way whose name contains `only`; `stack` ends them."""
    found: dict[str, Disk] = {}
    image = folder / "image.raw"
    block = b"".join(number.to_bytes(8, "little") * 64 for number in range(2048))
    image.write_bytes(block * (SIZE // len(block)))
    for name in ("in-process", "device process", _DAEMON, "pmem", *BASELINES, _QEMU_DAEMON):
        if not re.search(only, name):
            continue
        path = folder / f"{len(found)}.raw"
        shutil.copy(image, path)
        pids: tuple[int, ...] = ()
        if name in (_DAEMON, _QEMU_DAEMON):
            socket = path.with_suffix(".sock")
            daemon = stack.enter_context(subprocess.Popen(_daemon(path, socket)))
            stack.callback(daemon.terminate)
            pids = (daemon.pid,)
            while not socket.exists():
                time.sleep(0.1)
            if name == _DAEMON:
                arguments = _ours(folder, f"vhost-user:{socket}")
            else:
                arguments = _qemu(
                    folder,
                    *("-object", f"memory-backend-memfd,id=ram,size={_MEMORY},share=on"),
                    *(
                        "-machine",
                        "memory-backend=ram",
                        "-chardev",
                        f"socket,id=disk,path={socket}",
                    ),
                    *("-device", "vhost-user-blk-pci,chardev=disk"),
                )
        elif name in BASELINES:
            drive = f"if=none,id=disk,format=raw,file={path},aio={name.removeprefix('QEMU ')}"
            arguments = _qemu(folder, "-drive", drive, "-device", "virtio-blk-pci,drive=disk")
        elif name == "pmem":
            arguments = _ours(folder, f"pmem:{path}")
        else:
            suffix = ",process" if name == "device process" else ""
            arguments = _ours(folder, f"raw:{path}{suffix}")
        console = stack.enter_context(ConsoleProcess(arguments))
        console.expect("# ")
        device = "/dev/pmem0" if name == "pmem" else "/dev/vda"
        found[name] = Disk(console, device, (*pids, console.pid))
        found[name].signal(signal.SIGSTOP)
        stack.callback(found[name].signal, signal.SIGCONT)
        print(f"{name}: booted", flush=True)
    return found


def _ours(folder: Path, disk: str) -> list[str]:
    kernel = artifacts.kernel("cloud")
    return vmctl_run(
        *("-m", _MEMORY, "-b", kernel.vmlinuz, "--initrd", folder / "initrd"),
        *("--append", _COMMAND_LINE, "-d", disk),
    )


def _qemu(folder: Path, *disk: str) -> list[str]:
    kernel = artifacts.kernel("cloud")
    return [
        *("qemu-system-x86_64", "-M", "q35", "-accel", "kvm", "-cpu", "host", "-m", _MEMORY),
        *("-nodefaults", "-no-user-config", "-display", "none", "-no-reboot", "-serial", "stdio"),
        *("-kernel", str(kernel.vmlinuz), "-initrd", str(folder / "initrd")),
        *("-append", _COMMAND_LINE),
        *disk,
    ]


def _daemon(image: Path, socket: Path) -> list[str]:
    return [
        *(_DAEMON, "--blockdev", f"file,node-name=disk,filename={image},aio=io_uring", "--export"),
        f"vhost-user-blk,id=export,node-name=disk,writable=on,addr.type=unix,addr.path={socket}",
    ]


def initrd(load: Path) -> bytes:
    """Return an initramfs of a guest with disks, and with the program that puts load on them."""
    image = artifacts.disk_initramfs(artifacts.kernel("cloud")).read_bytes()
    entries = newc_entry(1, "load", 0o100755, load.read_bytes()) + newc_entry(
        0, "TRAILER!!!", 0, b""
    )
    # Each archive begins at a multiple of four bytes.
    return image + bytes(-len(image) % 4) + entries


def measure(folder: Path, given: argparse.Namespace) -> None:
    """Measure as the arguments say, and write `figures.json` into `$RIG_OUT`."""
    deadline = time.monotonic() + given.seconds
    scratch = Path(tempfile.mkdtemp(prefix="bench-", dir="/dev/shm"))
    figures: dict[str, dict[str, list[Figure]]] = {}
    chosen = [load for load in LOADS if re.search(given.loads, load.name)]
    with ExitStack() as stack:
        stack.callback(shutil.rmtree, scratch)
        (scratch / "initrd").write_bytes(initrd(folder / "load"))
        running = disks(stack, scratch, given.only)
        for disk in running.values():
            disk.touch()
        for number in range(given.rounds + 1):
            for load in chosen:
                for name, disk in running.items():
                    figure = disk.measure(load, given.milliseconds)
                    if number:  # the first is not counted
                        figures.setdefault(load.name, {}).setdefault(name, []).append(figure)
            print(f"round {number} of {given.rounds}", flush=True)
            (Path(os.environ["RIG_OUT"]) / "figures.json").write_text(json.dumps(figures))
            if time.monotonic() > deadline:
                break


def table(figures: Mapping[str, Mapping[str, Sequence[Sequence[float]]]]) -> str:
    """Return the figures as text, each way beside QEMU's better one: medians of the rounds.

    A ratio compares two figures of the same round, so that changes of speed cancel out.
    """
    lines = [
        f"{'':32}{'requests':>10}  {'ratio':>9}{'rounds':>13}{'same daemon':>13}{'CPU each':>12}"
    ]
    for load, found in figures.items():
        lines.append(load)
        rates = {name: [one[0] for one in rounds] for name, rounds in found.items()}
        medians = {name: statistics.median(rounds) for name, rounds in rates.items()}
        best = max(
            (name for name in BASELINES if name in rates), key=medians.__getitem__, default=""
        )
        for name, rounds in rates.items():
            ratios = _ratios(rounds, rates.get(best, ()))
            line = f"  {name:30}{medians[name]:10.0f}/s{_median(ratios)}"
            line += f"{f'{min(ratios):.2f}-{max(ratios):.2f}' if ratios else '-':>13}"
            others = rates.get(_QEMU_DAEMON, ()) if name == _DAEMON else ()
            cpu = statistics.median(one[1] for one in found[name])
            lines.append(f"{line}{_median(_ratios(rounds, others)):>13}{cpu:9.0f} us")
    return "\n".join(lines)


def _ratios(own: Sequence[float], theirs: Sequence[float]) -> list[float]:
    return [one / other for one, other in zip(own, theirs, strict=False)]


def _median(ratios: Sequence[float]) -> str:
    return f"{statistics.median(ratios):9.2f}" if ratios else f"{'-':>9}"


def main() -> int:
    """Measure, print the table, and write the JSON file."""
    parser = argparse.ArgumentParser(
        prog="bench/disk", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--milliseconds", type=int, default=800, help="of each measurement")
    parser.add_argument("--only", default="", metavar="REGEX", help="disks with this in the name")
    parser.add_argument("--loads", default="", metavar="REGEX", help="loads with this in the name")
    parser.add_argument("--seconds", type=float, default=3600, help="begin no round after that")
    parser.add_argument("--json", type=Path, default=ROOT / "out" / "disk.json")
    parser.add_argument("--here", action="store_true", help="on this machine")
    parser.add_argument("--show", action="store_true", help="measure nothing")
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.measure:
        measure(given.measure, given)
        return 0
    known = json.loads(given.json.read_text()) if given.json.exists() else {}
    if given.show:
        print(table(known))
        return 0
    with tempfile.TemporaryDirectory(prefix="bench-") as scratch:
        folder = Path(scratch)
        source = ROOT / "bench" / "disk.c"
        subprocess.run(["gcc", "-O2", "-static", "-o", folder / "load", source], check=True)
        command = (sys.executable, __file__, "--measure", scratch, *sys.argv[1:])
        if given.here:
            environment = {**os.environ, "RIG_OUT": scratch}
            status = subprocess.run(command, check=False, env=environment).returncode
        else:
            status = _rig(command, folder).run()
        if status != 0:
            print(f"bench/disk: measuring failed with status {status}", file=sys.stderr)
            return 1
        figures = json.loads((folder / "figures.json").read_text())
    print(f"\n{table(figures)}")
    given.json.parent.mkdir(parents=True, exist_ok=True)
    given.json.write_text(json.dumps({**known, **figures}, indent=2) + "\n")
    print(f"written: {given.json}")
    return 0


def _rig(command: tuple[str, ...], out: Path) -> Rig:
    kernel = artifacts.kernel("cloud").vmlinuz
    return Rig(
        command=command,
        cpus=1,
        memory=8 << 30,
        timeout_s=3600,
        copies_words=True,
        stages=(*project_stages(ROOT), *qemu_stages(), Stage(kernel)),
        out=out,
    )


if __name__ == "__main__":
    sys.exit(main())
