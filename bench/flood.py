"""What a guest that floods does to another guest's pings, beside what else uses the processor.

Three guests are on one bridge: one that pings, one of ours that floods, and QEMU's with the same
kind of tap, which floods in its turn. The first pings the host and the guest that does not flood.
Its median round trips are compared between

- quiet: nobody else does anything;
- spin: our guest, and then QEMU's, computes without an end and sends nothing;
- ours, QEMU: a guest's kernel (pktgen) sends datagrams of 64 bytes as fast as it can, to the host,
  to an lladdr that nobody has (the bridge shows such frames to every port), or as broadcasts.

What `ours` costs beyond `QEMU` of the same kind is by our doing; what `spin` and `QEMU` cost is
the processor, and the bridge, that all share. Prints a table. Runs as root in a network namespace
of its own, in the rig: `tests/rig/rig run --cpus 1 --mem 4096 --project -- .venv/bin/python
bench/flood.py`.
"""

from __future__ import annotations

import argparse
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
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
HOST, PINGING, OURS, QEMU = "1", "2", "3", "4"
TARGETS = {
    "the host": ("02:00:00:00:00:01", HOST),
    "nobody": ("02:00:00:00:00:99", "99"),
    "all": ("ff:ff:ff:ff:ff:ff", "255"),
}
"""Whom a flood is sent to: lladdr, and the end of the address."""
PATHS = {
    "vhost": ("", ",vhost=on"),
    "thread": (",user", ",vhost=off"),
    "process": (",process", ",vhost=off"),
}
"""Options of our interface, and of QEMU's that it is compared with."""
_BOOT_S = 400.0
_INTERVAL_S = 0.1
_SETTLE_S = 2
_FRAME = 64 + 42
"""Bytes of a frame: headers, and 64 of payload."""
_PORT = 9


class Round(NamedTuple):
    """Median round trips of the guest that pings, in ms, and how much was sent meanwhile."""

    host: float
    guest: float
    lost: int
    rate: float
    """Frames per second that guests have sent, pings included."""


class Place(NamedTuple):
    """The bridge and who is on it."""

    where: Namespace
    shells: dict[str, Shell]
    pings: int


def pktgen(lladdr: str, address: str) -> tuple[str, str]:
    """Return the commands that begin a flood to a neighbour, and end it."""
    place = "/proc/net/pktgen"
    settings = (
        *("count 0", "delay 0", f"pkt_size {_FRAME}", f"dst {NET}{address}", f"dst_mac {lladdr}"),
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
"""The commands that begin to compute without an end, and end it."""


@contextmanager
def busy(shell: Shell, begin: str, end: str) -> Iterator[None]:
    """Have a guest do something meanwhile."""
    shell.run(begin)
    try:
        yield
    finally:
        shell.run(end)


def ping(place: Place, number: str) -> tuple[float, int]:
    """Return the median round trip, in ms, and how many pings had no answer."""
    shown = place.shells[PINGING].run(
        f"ping -c {place.pings} -i {_INTERVAL_S} {NET}{number} || true", 300
    )
    times = [float(found) for found in re.findall(r"time=([\d.]+)", shown)]
    return (statistics.median(times) if times else float("inf")), place.pings - len(times)


def frames(place: Place) -> int:
    """Return how many frames guests have sent."""
    links = [f"/sys/class/net/tap{number}/statistics/rx_packets" for number in place.shells]
    return sum(int(line) for line in place.where.run("cat", *links).split())


def measure(place: Place, other: str) -> Round:
    """Ping the host and another guest."""
    begin, before = time.monotonic(), frames(place)
    (host, lost), (guest, more) = ping(place, HOST), ping(place, other)
    rate = (frames(place) - before) / (time.monotonic() - begin)
    return Round(host, guest, lost + more, rate)


def one_round(place: Place) -> Iterator[tuple[str, Round]]:
    """Measure every case once."""
    who = {"ours": (OURS, QEMU), "QEMU": (QEMU, OURS)}
    yield "quiet", measure(place, QEMU)
    for name, (number, other) in who.items():
        with busy(place.shells[number], *SPIN):
            yield f"spin, {name}", measure(place, other)
    for target, (lladdr, address) in TARGETS.items():
        for name, (number, other) in who.items():
            with busy(place.shells[number], *pktgen(lladdr, address)):
                yield f"{name} to {target}", measure(place, other)


@contextmanager
def running(path: str, pings: int, folder: Path) -> Iterator[Place]:
    """Boot the three guests on one bridge."""
    kernel = artifacts.kernel("6.1-cloud")
    initramfs = artifacts.initramfs_with(kernel, (*MODULES, "pktgen"), "flood")
    disk = tools_disk(folder / "tools.img")  # QEMU's guest has one in any case
    options, of_qemu = PATHS[path]
    with ExitStack() as stack:
        where = stack.enter_context(namespace("-flood"))
        where.ip("link", "add", "br0", "address", TARGETS["the host"][0], "type", "bridge")
        where.ip("link", "set", "br0", "up")
        where.ip("addr", "add", f"{NET}{HOST}/24", "dev", "br0")
        consoles = {}
        for number in (PINGING, OURS, QEMU):
            tap = f"tap{number}"
            where.ip("tuntap", "add", "dev", tap, "mode", "tap", "vnet_hdr")
            where.ip("link", "set", tap, "master", "br0", "up")
            command = (
                arguments(Guest("QEMU", False, of_qemu, None), kernel, initramfs, tap, disk)
                if number == QEMU
                else vmctl_run(
                    *("-m", "256M", "-b", kernel.vmlinuz, "--initrd", initramfs),
                    *(
                        "-i",
                        f"tap:{tap},lladdr=fe:e1:bb:96:00:0{number}{options}",
                        "-d",
                        f"raw:{disk},ro",
                    ),
                    *("--append", f"{COMMAND_LINE} test=shell"),
                )
            )
            consoles[number] = stack.enter_context(ConsoleProcess(where.command(*command)))
        shells = {}
        for number, console in consoles.items():
            console.expect("# ", _BOOT_S)
            shells[number] = shell = Shell(console)
            shell.run("dmesg -n 1; ip link set lo up")
            shell.run(f"ip addr add {NET}{number}/24 dev eth0 && ip link set eth0 up; sleep 1")
            shell.run(f"ping -c 2 {NET}{HOST}")
        print(f"{path}: guests are up", flush=True)
        yield Place(where, shells, pings)
        for console in consoles.values():
            console.send("poweroff -f\n")
            console.wait()


def table(found: dict[str, list[Round]]) -> list[str]:
    """Return medians of rounds, their ratio to the quiet ones, pings lost and frames sent."""
    lines = [f"{'':24}{'host ms':>18}{'guest ms':>18}{'lost':>8}{'frames/s':>12}"]
    quiet = found["quiet"]
    for name, rounds in found.items():
        line = f"{name:24}"
        for at in (0, 1):
            value, usual = (statistics.median(one[at] for one in each) for each in (rounds, quiet))
            line += f"{f'{value:.2f} (x{value / usual:.1f})':>18}"
        lost, rate = sum(one.lost for one in rounds), statistics.median(one.rate for one in rounds)
        lines.append(f"{line}{lost:>8}{rate:>12.0f}")
    return lines


def main() -> int:
    """Read the command line and measure."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--path", action="append", choices=sorted(PATHS), help="default: all")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--pings", type=int, default=20, help="of each case, to host and guest")
    given = parser.parse_args()
    if lack := missing(["qemu-system-x86_64"]):
        print(f"bench/flood: {lack}", file=sys.stderr)
        return 1
    for path in given.path or PATHS:
        found: dict[str, list[Round]] = {}
        with (
            tempfile.TemporaryDirectory(dir="/dev/shm") as folder,
            running(path, given.pings, Path(folder)) as place,
        ):
            for _ in range(given.rounds):
                for name, measured in one_round(place):
                    found.setdefault(name, []).append(measured)
                    print(f"{path}: {name}: {measured}", flush=True)
        print("\n".join((path, *table(found))), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
