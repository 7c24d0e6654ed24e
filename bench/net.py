"""Measure networks of guests: TCP both ways, small packets, round trips, processor time.

Four guests run at once, each with a tap of its own: ours and QEMU's with vhost-net, ours and
QEMU's with frames moved by the program itself. Same kernel, same initramfs, one vCPU. They are
measured in turn, A B C D A B C D, and each round compares ours with QEMU's of the same path.

It runs in the rig on its plain clock, as root in a namespace of its own; `--here` measures on this
machine's KVM. Seconds are those that the rig's processor ran, so that other work on the machine
matters less. It counts what passes the tap once a transfer is well under way; guests that are not
measured are stopped. Processor time is that of the whole machine, guest included, per GiB of TCP;
in the rig, where one processor does it all, it says the same as the rate. Round trips, by the
clock, do not overlap: a ping is sent long after the answer to the one before.

Prints a table and writes JSON. `--path` measures one path and QEMU's, in half of the time.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from tests import artifacts  # noqa: E402 - found by the line above
from tests.guest.linux_guest import COMMAND_LINE, Shell  # noqa: E402
from tests.guest.networks import Namespace, namespace  # noqa: E402
from tests.guest.tools import MODULES, UNPACK, tools_disk  # noqa: E402
from tests.rig.machine import Rig, processor_ns, project_stages  # noqa: E402
from tests.vmctl_driver import ConsoleProcess, vmctl_run  # noqa: E402
from vmd.parent.interfaces import parse_counters  # noqa: E402

MEMORY_MIB = 256
SMALL = 64
"""Bytes of payload of a small packet."""
GIB = 1 << 30
_BOOT_S = 400.0
_PINGS, _PING_INTERVAL_S = 50, 0.05
_SETTLE_S = 0.5
_UNDER_WAY = 100
"""Frames that must have passed before a transfer counts as under way."""
_RIG_TIMEOUT_S = 3000
_RIG_MIB = 4096
_TICKS = 100  # per second, of /proc/stat
_IDLE, _IOWAIT = 3, 4
_FIGURES = "net.json"


class Guest(NamedTuple):
    """A guest to measure."""

    name: str
    is_ours: bool
    options: str
    """Of `-i tap:x` for ours, of `-netdev tap` for QEMU's."""
    peer: str | None
    """The guest that it is compared with."""


GUESTS = (
    Guest("vhost, ours", True, "", "vhost, QEMU"),
    Guest("vhost, QEMU", False, ",vhost=on", None),
    Guest("user, ours", True, ",process", "user, QEMU"),
    Guest("user, QEMU", False, ",vhost=off", None),
)


@dataclass(slots=True)
class Sample:
    """Results of one round."""

    to_host: float
    """TCP, bytes of frames per second."""
    to_guest: float
    small_to_host: float
    """Frames per second, of 64 bytes of payload over UDP."""
    small_to_guest: float
    round_trip_s: float
    """The median."""
    cpu_s_per_gib_to_host: float
    cpu_s_per_gib_to_guest: float


class Running(NamedTuple):
    """A running guest, and its tap."""

    guest: Guest
    shell: Shell
    where: Namespace
    tap: str
    host: str


def busy_s() -> float:
    """Return the seconds that this machine's processors have worked."""
    fields = [int(field) for field in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
    return sum(value for at, value in enumerate(fields) if at not in {_IDLE, _IOWAIT}) / _TICKS


def arguments(
    guest: Guest, kernel: artifacts.Kernel, initramfs: Path, tap: str, disk: Path
) -> list[str]:
    """Return the command that runs a guest."""
    line = f"{COMMAND_LINE} test=shell"
    if guest.is_ours:
        return vmctl_run(
            *("-m", f"{MEMORY_MIB}M", "-b", kernel.vmlinuz, "--initrd", initramfs),
            *("-i", f"tap:{tap}{guest.options}", "-d", f"raw:{disk},ro", "--append", line),
        )
    return [
        *("qemu-system-x86_64", "-M", "pc", "-accel", "kvm", "-cpu", "host", "-smp", "1"),
        *("-m", f"{MEMORY_MIB}M", "-nodefaults", "-no-user-config", "-display", "none"),
        *("-serial", "stdio", "-kernel", str(kernel.vmlinuz), "-initrd", str(initramfs)),
        *(
            "-append",
            line,
            "-netdev",
            f"tap,id=n,ifname={tap},script=no,downscript=no{guest.options}",
        ),
        *("-device", "virtio-net-pci,netdev=n,disable-legacy=on,mac=52:54:00:00:00:01,romfile="),
        *("-drive", f"if=none,id=d,format=raw,readonly=on,file={disk}"),
        *("-device", "virtio-blk-pci,drive=d,disable-legacy=on"),
    ]


@contextmanager
def running(
    where: Namespace, guests: Sequence[Guest], kernel: artifacts.Kernel, folder: Path
) -> Iterator[list[Running]]:
    """Boot all guests, each on its own tap."""
    initramfs = artifacts.initramfs_with(kernel, MODULES, "bench-net")
    disk = tools_disk(folder / "tools.img", "iperf3")
    with ExitStack() as stack:
        found = []
        for number, guest in enumerate(guests):
            tap, net = f"tap{number}", f"10.98.{number}"
            where.ip("tuntap", "add", "dev", tap, "mode", "tap", "vnet_hdr")
            where.ip("link", "set", tap, "up")
            where.ip("addr", "add", f"{net}.1/24", "dev", tap)
            command = where.command(*arguments(guest, kernel, initramfs, tap, disk))
            console = stack.enter_context(ConsoleProcess(command))
            console.expect("# ", _BOOT_S)
            shell = Shell(console)
            shell.run(f"dmesg -n 1; ip link set lo up; {UNPACK}")
            shell.run(f"ip addr add {net}.2/24 dev eth0 && ip link set eth0 up")
            shell.run(f"ping -c 3 {net}.1")
            print(f"{guest.name}: up", flush=True)
            found.append(Running(guest, shell, where, tap, f"{net}.1"))
        yield found


class Rate(NamedTuple):
    """Rates in one direction."""

    bytes: float
    frames: float
    cpu_s_per_gib: float
    """Seconds of the machine's processors."""


def _passed(run: Running, *, is_to_guest: bool) -> tuple[int, int]:
    """Return the number of bytes and frames that have passed the tap."""
    seen = parse_counters(Path(f"/proc/{run.shell.console.pid}/net/dev").read_text())[run.tap]
    if is_to_guest:
        return seen.sent, seen.sent_packets
    return seen.received, seen.received_packets


def iperf(run: Running, seconds: int, *options: str) -> Rate:
    """Run iperf3 from the guest for longer than `seconds`; returns the rates within those."""
    is_to_guest = "-R" in options
    client = f"iperf3 -c {run.host} {' '.join(options)} --connect-timeout 5000 -t {seconds + 3}"
    server = run.where.command("iperf3", "--forceflush", "-s", "-1", "-B", run.host)
    with subprocess.Popen(server, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        while "listening" not in process.stdout.readline():
            pass
        _, before = _passed(run, is_to_guest=is_to_guest)
        run.shell.run(f"{client} >/iperf.log 2>&1 & true")
        deadline = time.monotonic() + _BOOT_S
        while _passed(run, is_to_guest=is_to_guest)[1] < before + _UNDER_WAY:
            assert time.monotonic() < deadline, run.shell.run("cat /iperf.log")
            time.sleep(0.02)
        time.sleep(_SETTLE_S)
        begin, busy, first = processor_ns(), busy_s(), _passed(run, is_to_guest=is_to_guest)
        last = first
        while last[0] == first[0]:  # on a very busy machine TCP may stall for longer
            assert time.monotonic() < deadline, run.shell.run("cat /iperf.log")
            time.sleep(seconds)
            last = _passed(run, is_to_guest=is_to_guest)
        busy, end = busy_s() - busy, processor_ns()
        run.shell.run("wait; grep -q receiver /iperf.log || { cat /iperf.log; false; }")
        process.communicate()
    ran = (end - begin) / 1e9
    size, count = (after - before for after, before in zip(last, first, strict=True))
    spent = ran if "RIG" in os.environ else busy
    return Rate(size / ran, count / ran, spent / (size / GIB))


def measure(run: Running, seconds: int) -> Sample:
    """Measure one guest once, while the others are stopped."""
    small = ("-u", "-b", "0", "-l", str(SMALL))
    os.killpg(run.shell.console.pid, signal.SIGCONT)
    time.sleep(_SETTLE_S)
    up, down = iperf(run, seconds), iperf(run, seconds, "-R")
    small_up, small_down = iperf(run, seconds, *small), iperf(run, seconds, *small, "-R")
    shown = run.shell.run(f"ping -c {_PINGS} -i {_PING_INTERVAL_S} {run.host}")
    times = [float(found) / 1e3 for found in re.findall(r"time=([\d.]+)", shown)]
    os.killpg(run.shell.console.pid, signal.SIGSTOP)
    return Sample(
        *(up.bytes, down.bytes, small_up.frames, small_down.frames, statistics.median(times)),
        *(up.cpu_s_per_gib, down.cpu_s_per_gib),
    )


COLUMNS: tuple[tuple[str, Callable[[Sample], float], float, bool], ...] = (
    ("to host MB/s", lambda sample: sample.to_host, 1e-6, True),
    ("to guest MB/s", lambda sample: sample.to_guest, 1e-6, True),
    ("small to host k/s", lambda sample: sample.small_to_host, 1e-3, True),
    ("small to guest k/s", lambda sample: sample.small_to_guest, 1e-3, True),
    ("round trip us", lambda sample: sample.round_trip_s, 1e6, False),
    ("CPU s/GiB to host", lambda sample: sample.cpu_s_per_gib_to_host, 1, False),
    ("CPU s/GiB to guest", lambda sample: sample.cpu_s_per_gib_to_guest, 1, False),
)


def table(samples: Mapping[str, Sequence[Sample]]) -> list[str]:
    """Return medians, their ratio to QEMU's if that is measured too, and the spread of rounds.

    The ratio is the median of the rounds' ratios, whose halves had the same load of the machine;
    above 1 it is in our favour. The spread is the largest deviation from the median.
    """
    guests = [guest for guest in GUESTS if samples.get(guest.name)]
    values = {
        guest.name: [[get(one) for one in samples[guest.name]] for _, get, _, _ in COLUMNS]
        for guest in guests
    }
    width = max(len(name) for name, *_ in COLUMNS) + 2
    lines = [" " * width + "".join(f"{guest.name:>24}" for guest in guests)]
    for at, (name, _, scale, is_more_better) in enumerate(COLUMNS):
        line = f"{name:<{width}}"
        for guest in guests:
            rounds = values[guest.name][at]
            value = statistics.median(rounds)
            spread = max(abs(one - value) for one in rounds) / value
            shown = f"{value * scale:.1f} ±{spread:.0%}"
            if guest.peer in values:
                pairs = zip(rounds, values[guest.peer][at], strict=True)
                ratio = statistics.median(
                    ours / theirs if is_more_better else theirs / ours for ours, theirs in pairs
                )
                shown += f" ({ratio:.2f})"
            line += f"{shown:>24}"
        lines.append(line)
    return lines


def measure_all(rounds: int, seconds: int, path: str | None, out: Path) -> None:
    """Measure guests of one path, or all, in turn, and write the results to `out`."""
    guests = [guest for guest in GUESTS if path in {None, guest.name.partition(",")[0]}]
    kernel = artifacts.kernel("cloud")
    samples: dict[str, list[dict[str, float]]] = {guest.name: [] for guest in guests}
    with (
        tempfile.TemporaryDirectory() as folder,
        namespace("-bench") as where,
        running(where, guests, kernel, Path(folder)) as found,
    ):
        for run in found:
            os.killpg(run.shell.console.pid, signal.SIGSTOP)
        for number in range(rounds + 1):
            for run in found:
                sample = measure(run, seconds)
                if number:  # the first is not counted
                    samples[run.guest.name].append(asdict(sample))
                print(f"round {number}: {run.guest.name}: {sample}", flush=True)
        for run in found:
            os.killpg(run.shell.console.pid, signal.SIGCONT)
            run.shell.console.send("poweroff -f\n")
            run.shell.console.wait()
    out.write_text(json.dumps(samples, indent=1))


def main() -> int:
    """Read the command line and measure, here or in the rig."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--here", action="store_true", help="measure on this machine's KVM")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=int, default=3, help="of each transfer")
    parser.add_argument("--path", choices=["vhost", "user"], help="this alone")
    parser.add_argument("--json", type=Path, default=ROOT / "out" / "net.json")
    parser.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.measure:
        out = Path(os.environ["RIG_OUT"]) / _FIGURES
        measure_all(given.rounds, given.seconds, given.path, out)
        return 0
    artifacts.initramfs_with(artifacts.kernel("cloud"), MODULES, "bench-net")
    command = (
        *(str(ROOT / ".venv/bin/python"), str(ROOT / "bench/net.py"), "--measure"),
        *("--rounds", str(given.rounds), "--seconds", str(given.seconds)),
        *(("--path", given.path) if given.path else ()),
    )
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        if given.here:
            environment = {**os.environ, "RIG_OUT": folder}
            status = subprocess.run(command, check=False, env=environment).returncode
        else:
            status = Rig(
                command=command,
                cpus=1,
                memory=_RIG_MIB << 20,
                timeout_s=_RIG_TIMEOUT_S,
                stages=project_stages(ROOT),
                out=Path(folder),
            ).run()
        figures = Path(folder) / _FIGURES
        if status != 0 or not figures.exists():
            print(f"bench/net: measuring failed with status {status}", file=sys.stderr)
            return 1
        text = figures.read_text()
    samples = {name: [Sample(**one) for one in found] for name, found in json.loads(text).items()}
    print("\n".join(table(samples)))
    given.json.parent.mkdir(parents=True, exist_ok=True)
    given.json.write_text(text + "\n")
    print(f"written: {given.json}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
