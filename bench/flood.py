"""Measure pings of guests, ours and QEMU's, while another guest floods the network.

Four guests are on one bridge, each with a tap of the same kind: of ours and of QEMU's, one that
pings the host, and one that floods. Guests without a part are stopped. In each case ours pings,
and then QEMU's:

- quiet: no other guest does anything;
- spin: our guest, and then QEMU's, computes without end and sends nothing;
- ours, QEMU: a guest's kernel (pktgen) sends datagrams of 64 bytes, to the host, to an unused
  lladdr (the bridge sends such frames to every port), or as broadcasts; as fast as it can, or at
  most `--rate` of them a second, so that ours sends no more than QEMU's.

Two differences are our doing: how much longer our pings take than QEMU's in the same flood, and how
much longer pings of either take in our flood than in QEMU's of the same rate. The rest is due to
the processor and the bridge, which all share. Prints a table. Runs as root in a network namespace
of its own, in the rig:
`tests/rig/rig run --cpus 1 --mem 4096 --project -- .venv/bin/python bench/flood.py`.
"""

from __future__ import annotations

import argparse
import os
import re
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from bench.net import Guest, arguments  # noqa: E402 - found by the line above
from tests import artifacts  # noqa: E402
from tests.guest.linux_guest import COMMAND_LINE, Shell  # noqa: E402
from tests.guest.networks import Namespace, namespace  # noqa: E402
from tests.guest.tools import MODULES, missing, tools_disk  # noqa: E402
from tests.vmctl_driver import ConsoleProcess, vmctl_run  # noqa: E402

NET = "10.96.0."
HOST = "1"
PINGING = {"ours": "2", "QEMU": "3"}
FLOODING = {"ours": "4", "QEMU": "5"}
"""The flooding guests, by the end of their address."""
LLADDR = "02:00:00:00:00:0"
TARGETS = {
    "the host": (f"{LLADDR}{HOST}", HOST),
    "nobody": ("02:00:00:00:00:99", "99"),
    "all": ("ff:ff:ff:ff:ff:ff", "255"),
}
"""The target of a flood: lladdr, and the end of the address."""
PATHS = {
    "vhost": ("", ",vhost=on"),
    "thread": (",user", ",vhost=off"),
    "process": (",process", ",vhost=off"),
}
"""Options of our interface, and of the interface of QEMU's that it is compared with."""
_BOOT_S = 400.0
_INTERVAL_S = 0.1
_SETTLE_S = 5
"""The time for a flood to fill all queues, and for a guest to empty them."""
_FRAME = 64 + 42
"""Bytes of a frame: headers, and 64 of payload."""
_PORT = 9


class Round(NamedTuple):
    """Results of the guests that ping the host, in the order of PINGING."""

    times: tuple[float, ...]
    """Median round trips, in ms."""
    lost: tuple[int, ...]
    """Pings without an answer."""
    rate: float
    """Frames per second that guests have sent meanwhile, pings included."""


class Place(NamedTuple):
    """The bridge and its guests."""

    where: Namespace
    shells: dict[str, Shell]
    pings: int
    targets: Sequence[str]
    rates: Sequence[int]
    """Frames per second of floods; 0 for no limit."""


def pktgen(lladdr: str, address: str, rate: int) -> tuple[str, str]:
    """Return the commands that begin and end a flood to a neighbour."""
    place = "/proc/net/pktgen"
    settings = (
        *("count 0", f"ratep {rate}" if rate else "delay 0", f"pkt_size {_FRAME}"),
        *(f"dst {NET}{address}", f"dst_mac {lladdr}"),
        *(f"udp_dst_min {_PORT}", f"udp_dst_max {_PORT}"),
    )
    begin = (
        f"echo rem_device_all >{place}/kpktgend_0",
        f"echo add_device eth0 >{place}/kpktgend_0",
        *(f"echo '{setting}' >{place}/eth0" for setting in settings),
        f"(echo start >{place}/pgctrl) & sleep {_SETTLE_S}",
    )
    return "; ".join(begin), f"echo stop >{place}/pgctrl; wait; grep Result -A 1 {place}/eth0"


SPIN = f"(while :; do :; done) & echo $! >/pid; sleep {_SETTLE_S}", "kill -9 $(cat /pid); sleep 1"
"""The commands that begin and end an endless computation."""


@contextmanager
def awake(shell: Shell) -> Iterator[None]:
    """Let a stopped guest run, and empty its queues."""
    os.killpg(shell.console.pid, signal.SIGCONT)
    try:
        yield
    finally:
        os.killpg(shell.console.pid, signal.SIGSTOP)


@contextmanager
def busy(shell: Shell, begin: str, end: str) -> Iterator[None]:
    """Run a guest's command meanwhile."""
    with awake(shell):
        time.sleep(_SETTLE_S)
        shell.run(begin)
        try:
            yield
        finally:
            shell.run(end)


def frames(place: Place) -> int:
    """Return the number of frames that guests have sent."""
    links = [f"/sys/class/net/tap{number}/statistics/rx_packets" for number in place.shells]
    return sum(int(line) for line in place.where.run("cat", *links).split())


def ping(place: Place, shell: Shell) -> tuple[float, int, float]:
    """Return the median round trip in ms, the number of lost pings, and frames per second."""
    begin, before = time.monotonic(), frames(place)
    shown = shell.run(f"ping -c {place.pings} -i {_INTERVAL_S} {NET}{HOST} || true", 300)
    rate = (frames(place) - before) / (time.monotonic() - begin)
    times = [float(found) for found in re.findall(r"time=([\d.]+)", shown)]
    return statistics.median(times or [float("inf")]), place.pings - len(times), rate


def measure(place: Place, flooding: str | None = None, does: tuple[str, str] = ("", "")) -> Round:
    """Have each guest ping the host, while another one runs a command."""
    found = []
    for number in PINGING.values():
        shell = place.shells[number]
        with ExitStack() as stack:
            stack.enter_context(awake(shell))
            if flooding:
                stack.enter_context(busy(place.shells[flooding], *does))
            else:
                time.sleep(_SETTLE_S)
            found.append(ping(place, shell))
    times, lost, rates = zip(*found, strict=True)
    return Round(times, lost, statistics.mean(rates))


def one_round(place: Place) -> Iterator[tuple[str, Round]]:
    """Measure every case once."""
    yield "quiet", measure(place)
    for name, number in FLOODING.items():
        yield f"spin, {name}", measure(place, number, SPIN)
    for target in place.targets:
        for rate in place.rates:
            for name, number in FLOODING.items():
                case = f"{name} to {target}" + (f", {rate}/s" if rate else "")
                yield case, measure(place, number, pktgen(*TARGETS[target], rate))


@contextmanager
def running(path: str, folder: Path) -> Iterator[tuple[Namespace, dict[str, Shell]]]:
    """Boot the four guests on one bridge, and stop them."""
    kernel = artifacts.kernel("cloud")
    initramfs = artifacts.initramfs_with(kernel, (*MODULES, "pktgen"), "flood")
    disk = tools_disk(folder / "tools.img")  # QEMU's guest always has one
    options, of_qemu = PATHS[path]
    with ExitStack() as stack:
        where = stack.enter_context(namespace("-flood"))
        where.ip("link", "add", "br0", "address", TARGETS["the host"][0], "type", "bridge")
        where.ip("link", "set", "br0", "up")
        where.ip("addr", "add", f"{NET}{HOST}/24", "dev", "br0")
        consoles = {}
        qemus = (PINGING["QEMU"], FLOODING["QEMU"])
        for number in (*PINGING.values(), *FLOODING.values()):
            tap = f"tap{number}"
            where.ip("tuntap", "add", "dev", tap, "mode", "tap", "vnet_hdr")
            where.ip("link", "set", tap, "master", "br0", "up")
            command = (
                arguments(Guest("QEMU", False, of_qemu, None), kernel, initramfs, tap, disk)
                if number in qemus
                else vmctl_run(
                    *("-m", "256M", "-b", kernel.vmlinuz, "--initrd", initramfs),
                    *("-i", f"tap:{tap}{options}", "-d", f"raw:{disk},ro"),
                    *("--append", f"{COMMAND_LINE} test=shell"),
                )
            )
            consoles[number] = stack.enter_context(ConsoleProcess(where.command(*command)))
        shells = {}
        for number, console in consoles.items():
            console.expect("# ", _BOOT_S)
            shells[number] = shell = Shell(console)
            shell.run("dmesg -n 1; ip link set lo up")
            shell.run(f"ip link set eth0 address {LLADDR}{number}")
            shell.run(f"ip addr add {NET}{number}/24 dev eth0 && ip link set eth0 up; sleep 1")
            shell.run(f"ping -c 2 {NET}{HOST}")
        print(f"{path}: guests are up", flush=True)
        for console in consoles.values():
            os.killpg(console.pid, signal.SIGSTOP)
        yield where, shells
        for console in consoles.values():
            os.killpg(console.pid, signal.SIGCONT)
            console.send("poweroff -f\n")
            console.wait()


def table(found: dict[str, list[Round]]) -> list[str]:
    """Return medians of rounds, ratios of ours to QEMU's, lost pings and sent frames."""
    names = "".join(f"{f'{name}, ms':>10}" for name in PINGING)
    lines = [f"{'':24}{names}{'ratio':>8}{'lost':>10}{'frames/s':>10}"]
    for name, rounds in found.items():
        medians = zip(*(one.times for one in rounds), strict=True)
        times = "".join(f"{statistics.median(each):>10.2f}" for each in medians)
        ratio = statistics.median(one.times[0] / one.times[1] for one in rounds)
        lost = ", ".join(str(sum(each)) for each in zip(*(one.lost for one in rounds), strict=True))
        rate = statistics.median(one.rate for one in rounds)
        lines.append(f"{name:24}{times}{ratio:>8.2f}{lost:>10}{rate:>10.0f}")
    return lines


def main() -> int:
    """Read the command line and measure."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--path", action="append", choices=sorted(PATHS), help="default: all")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--pings", type=int, default=20, help="of each guest in each case")
    parser.add_argument("--rate", action="append", type=int, help="frames/s; default: all it can")
    parser.add_argument("--target", action="append", choices=list(TARGETS), help="default: all")
    given = parser.parse_args()
    if lack := missing(["qemu-system-x86_64"]):
        print(f"bench/flood: {lack}", file=sys.stderr)
        return 1
    for path in given.path or PATHS:
        found: dict[str, list[Round]] = {}
        with (
            tempfile.TemporaryDirectory(dir="/dev/shm") as folder,
            running(path, Path(folder)) as (where, shells),
        ):
            rates = given.rate or [0]
            place = Place(where, shells, given.pings, given.target or list(TARGETS), rates)
            for _ in range(given.rounds):
                for name, measured in one_round(place):
                    found.setdefault(name, []).append(measured)
                    print(f"{path}: {name}: {measured}", flush=True)
        print("\n".join((path, *table(found))), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
