"""Networks of guests, beside QEMU's: TCP both ways, small packets, round trips, processor time.

Four guests run at once, each with a tap of its own: ours and QEMU's with vhost-net, ours and
QEMU's with frames moved by the program itself. Same kernel, same initramfs, one vCPU. They are
measured in turn, A B C D A B C D, and the medians of the rounds are compared, each of ours with
QEMU's of the same path.

Runs in the rig on its plain clock, as root in a namespace of its own; `--here` measures on this
machine's KVM. Processor time is that of the whole machine, guest included, per GiB of TCP. Round
trips do not overlap: a ping is sent when the one before has long been answered.

Prints a table and writes JSON. `--path` measures one path and QEMU's, in half of the time.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
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
from tests.rig.machine import Rig, project_stages  # noqa: E402
from tests.vmctl_driver import ConsoleProcess, vmctl_run  # noqa: E402

MEMORY_MIB = 256
SMALL = 64
"""Bytes of payload of a small packet."""
GIB = 1 << 30
_BOOT_S = 400.0
_PINGS, _PING_INTERVAL_S = 30, 0.1
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
    """Whom to compare with."""


GUESTS = (
    Guest("vhost, ours", True, "", "vhost, QEMU"),
    Guest("vhost, QEMU", False, ",vhost=on", None),
    Guest("user, ours", True, ",process", "user, QEMU"),
    Guest("user, QEMU", False, ",vhost=off", None),
)


@dataclass(slots=True)
class Sample:
    """What one round measured."""

    to_host: float
    """TCP, bytes per second."""
    to_guest: float
    small_to_host: float
    """Packets per second that arrived, of 64 bytes of payload over UDP."""
    small_to_guest: float
    round_trip_s: float
    cpu_s_per_gib_to_host: float
    cpu_s_per_gib_to_guest: float


class Running(NamedTuple):
    """A guest that runs, and where."""

    guest: Guest
    shell: Shell
    where: Namespace
    host: str


def busy_s() -> float:
    """Return the seconds that processors of this machine have worked."""
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
            found.append(Running(guest, shell, where, f"{net}.1"))
        yield found


def iperf(run: Running, *options: str) -> tuple[dict[str, float], float]:
    """Run iperf3 from the guest; returns what arrived, and the machine's busy seconds."""
    with subprocess.Popen(
        run.where.command("iperf3", "-s", "-1", "-J", "-B", run.host),
        stdout=subprocess.PIPE,
    ) as server:
        client = f"iperf3 -c {run.host} {' '.join(options)} --connect-timeout 5000"
        begin = busy_s()
        run.shell.run(f"sleep 1; {client} >/iperf.log 2>&1 || {{ cat /iperf.log; false; }}")
        spent = busy_s() - begin
        assert server.stdout is not None
        report = json.loads(server.stdout.read())
    if "-R" in options:
        shown = run.shell.run("grep receiver /iperf.log")
        return {"receiver": _receiver(shown, is_udp="-u" in options)}, spent
    end = report["end"]
    if "-u" in options:
        arrived = end["sum"]["packets"] - end["sum"]["lost_packets"]
        return {"receiver": arrived / end["sum"]["seconds"]}, spent
    return {"receiver": end["sum_received"]["bits_per_second"] / 8}, spent


def _receiver(shown: str, *, is_udp: bool) -> float:
    """Return what iperf3's last line says: bytes per second, or packets per second."""
    words = shown.splitlines()[-1].split()
    unit = next(at for at, word in enumerate(words) if word.endswith("bits/sec"))
    scale = {"K": 1e3, "M": 1e6, "G": 1e9}.get(words[unit][0], 1.0)
    rate = float(words[unit - 1]) * scale / 8
    return rate / SMALL if is_udp else rate


def measure(run: Running, seconds: int) -> Sample:
    """Measure one guest once."""
    time = ("-t", str(seconds))
    small = ("-u", "-b", "0", "-l", str(SMALL))
    up, up_s = iperf(run, *time)
    down, down_s = iperf(run, *time, "-R")
    small_up, _ = iperf(run, *time, *small)
    small_down, _ = iperf(run, *time, *small, "-R")
    shown = run.shell.run(f"ping -q -c {_PINGS} -i {_PING_INTERVAL_S} {run.host}")
    average_ms = float(shown.splitlines()[-1].split("=")[1].split("/")[1])
    return Sample(
        up["receiver"],
        down["receiver"],
        small_up["receiver"],
        small_down["receiver"],
        average_ms / 1e3,
        up_s / (up["receiver"] * seconds / GIB),
        down_s / (down["receiver"] * seconds / GIB),
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
    """Return medians, their ratio to QEMU's where it is measured too, and the spread of rounds.

    Above 1 a ratio is in our favour. The spread is the largest deviation from the median.
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
                other = statistics.median(values[guest.peer][at])
                ratio = value / other if is_more_better else other / value
                shown += f" ({ratio:.2f})"
            line += f"{shown:>24}"
        lines.append(line)
    return lines


def measure_all(rounds: int, seconds: int, path: str | None, out: Path) -> None:
    """Measure guests of one path, or all, in turn, and write what was measured to `out`."""
    guests = [guest for guest in GUESTS if path in {None, guest.name.partition(",")[0]}]
    kernel = artifacts.kernel("6.1-cloud")
    samples: dict[str, list[dict[str, float]]] = {guest.name: [] for guest in guests}
    with (
        tempfile.TemporaryDirectory() as folder,
        namespace("-bench") as where,
        running(where, guests, kernel, Path(folder)) as found,
    ):
        for number in range(rounds):
            for run in found:
                sample = measure(run, seconds)
                samples[run.guest.name].append(asdict(sample))
                print(f"round {number + 1}: {run.guest.name}: {sample}", flush=True)
        for run in found:
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
    artifacts.initramfs_with(artifacts.kernel("6.1-cloud"), MODULES, "bench-net")
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
