"""Campaign: tcpdump sees the same frames inside a guest and outside, with right checksums.

A guest's tap and a veth pair's end are on a bridge. A peer has the other end; the pair has no
offloads, so that frames on it are segmented and have their checksums, as on a network card.
Streams and datagrams of many sizes go both ways, between guest and peer and between guest
and host, with the guest's offloads and without, by IPv4 and IPv6, MEBIBYTES in all. Then:

- the guest's capture of its interface and the host's of the tap have the same frames, in the same
order: lengths, and the first bytes of each; except frames, of streams at full speed, that the
tap's queue of 500 has dropped by the host's count;
- no receiver has counted a wrong checksum (a trial shows that it would), and tcpdump finds
none among the first frames on the wire;
- no datagram, sent at a moderate rate, is lost.

Any deviation is printed, and the exit status is 1. Needs root, tcpdump, ethtool and iperf3, and a
KVM that runs a distribution kernel, as the rig's does.
"""

from __future__ import annotations

import argparse
import re
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from itertools import zip_longest
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from tests import artifacts  # noqa: E402 - found by the line above
from tests.guest.linux_guest import COMMAND_LINE, Shell  # noqa: E402
from tests.guest.networks import Namespace, namespace  # noqa: E402
from tests.guest.tools import MODULES, UNPACK, missing, tools_disk  # noqa: E402
from tests.vmctl_driver import ConsoleProcess, vmctl_run  # noqa: E402

PROGRAMS = ("tcpdump", "ethtool", "iperf3")
PATHS = {"vhost": "", "thread": ",user", "process": ",process"}
GUEST, HOST, PEER = "2", "1", "3"
NET4, NET6 = "10.97.0.", "fd97::"
MIB = 1 << 20
SNAPLEN = 96
BOOT_S, PHASE_S = 400.0, 600.0
_ALL_ON = "tx on tso on gso on"
_NO_SEGMENTS = "tso off gso off"
_NOTHING = "tso off gso off tx off"
_FILTER = "(ip or ip6) and not icmp and not icmp6"
_LOOKED_AT = 2000
"""Frames on the wire whose checksums tcpdump verifies, in each phase."""
_GUEST_BUFFER_KIB, _HOST_BUFFER_KIB = 32768, 131072
_BAD_PORT = 9
_SHOWN = 12
"""Frames of each capture that are shown from the first difference on."""


Frame = tuple[int, bytes]
"""A frame's length, and its first bytes."""


class Phase(NamedTuple):
    """Traffic of one kind."""

    name: str
    server: str
    """PEER or HOST."""
    options: str
    """Options of iperf3 in the guest."""
    share: float = 0.0
    """Its share of all bytes; 0 for datagrams, whose number is fixed."""
    offloads: str = _ALL_ON
    """Offloads of the guest's interface, as ethtool -K takes them."""
    is_ipv6: bool = False


PHASES = (
    Phase("to the peer", PEER, "", 0.26),
    Phase("from the peer", PEER, "-R", 0.26),
    Phase("to the host", HOST, "", 0.18),
    Phase("from the host", HOST, "-R", 0.18),
    Phase("to the peer, IPv6", PEER, "", 0.03, is_ipv6=True),
    Phase("from the host, IPv6", HOST, "-R", 0.03, is_ipv6=True),
    Phase("to the peer, no segments", PEER, "", 0.03, _NO_SEGMENTS),
    Phase("to the peer, no offloads", PEER, "", 0.02, _NOTHING),
    Phase("to the peer, small segments", PEER, "-M 536", 0.01),
    *(
        Phase(f"datagrams of {size}{way}", PEER, f"-u -l {size} -b {rate}{option} -k {count}")
        for size, rate, count in ((16, "50K", 800), (512, "1M", 800), (1472, "2M", 800))
        for way, option in ((" to the peer", ""), (" from the peer", " -R"))
    ),
    Phase("datagrams in fragments", PEER, "-u -l 8000 -b 2M -k 100"),
    Phase("datagrams without offloads", PEER, "-u -l 1000 -b 1M -k 300", 0.0, _NOTHING),
    Phase("datagrams, IPv6", PEER, "-u -l 1000 -b 1M -k 300", is_ipv6=True),
)


class Place(NamedTuple):
    """The host, the peer and the guest."""

    host: Namespace
    peer: Namespace
    shell: Shell
    folder: Path


@contextmanager
def networks() -> Iterator[tuple[Namespace, Namespace]]:
    """Make the host's side and the peer, each in a namespace."""
    with namespace("-host") as host, namespace("-peer") as peer:
        host.ip("link", "add", "br0", "type", "bridge")
        host.ip("link", "add", "wire", "type", "veth", "peer", "name", "wire", "netns", peer.name)
        host.ip("tuntap", "add", "dev", "tap0", "mode", "tap", "vnet_hdr")
        for name in ("wire", "tap0"):
            host.ip("link", "set", name, "master", "br0", "up")
        host.ip("link", "set", "br0", "up")
        peer.ip("link", "set", "wire", "up")
        for where, link, number in ((host, "br0", HOST), (peer, "wire", PEER)):
            where.ip("addr", "add", f"{NET4}{number}/24", "dev", link)
            where.ip("addr", "add", f"{NET6}{number}/64", "dev", link, "nodad")
        for where in (host, peer):
            where.run(
                "ethtool",
                "-K",
                "wire",
                *["tx", "off", "rx", "off", "tso", "off", "gso", "off", "gro", "off"],
            )
        yield host, peer


def checksum_errors(snmp: str, snmp6: str) -> int:
    """Return the number of received packets with a wrong checksum, by /proc/net."""
    total = 0
    rows = [line.split() for line in snmp.splitlines()]
    for names, values in zip(rows[::2], rows[1::2], strict=True):
        total += sum(
            int(value)
            for name, value in zip(names, values, strict=True)
            if name in {"InCsumErrors", "InHdrErrors"}
        )
    return total + sum(
        int(value)
        for name, value in (line.split() for line in snmp6.splitlines())
        if name.endswith(("InCsumErrors", "Ip6InHdrErrors"))
    )


def counted(where: Namespace) -> int:
    """Return the number of wrong checksums that a namespace has received."""
    return checksum_errors(where.run("cat", "/proc/net/snmp"), where.run("cat", "/proc/net/snmp6"))


def counted_by(shell: Shell) -> int:
    """Return the number of those that the guest has received."""
    return checksum_errors(shell.run("cat /proc/net/snmp"), shell.run("cat /proc/net/snmp6"))


def drops(host: Namespace) -> int:
    """Return the number of frames to the guest that its tap has dropped."""
    return int(host.run("cat", "/sys/class/net/tap0/statistics/tx_dropped"))


def frames(capture: Path) -> list[Frame]:
    """Return the length and the first bytes of each frame of a capture."""
    data, at, found = capture.read_bytes(), 24, []
    while at + 16 <= len(data):
        kept, length = struct.unpack_from("<8xII", data, at)
        found.append((length, data[at + 16 : at + 16 + kept]))
        at += 16 + kept
    return found


def differences(
    inside: Sequence[Frame], outside: Sequence[Frame], dropped: int
) -> tuple[list[str], int]:
    """Return the differences of two captures, for each sender by itself; and the lost frames.

    The host counts frames that the tap's queue had no room for, `dropped`, after tcpdump has seen
    them: so many may be missing inside. It also counts frames that no capture has: those to groups
    that the guest has not joined.
    """
    told, absent = [], 0
    for sender in sorted({frame[1][6:12] for frame in (*inside, *outside)}):
        mine, theirs = (
            [frame for frame in each if frame[1][6:12] == sender] for each in (inside, outside)
        )
        rest = iter(theirs)
        if all(frame in rest for frame in mine):  # the same, in the same order, or some of them
            absent += len(theirs) - len(mine)
            continue
        first = next(at for at, pair in enumerate(zip_longest(mine, theirs)) if pair[0] != pair[1])
        told.append(f"of {sender.hex(':')} {len(mine)} frames inside, {len(theirs)} outside")
        for name, each in (("inside", mine), ("outside", theirs)):
            told += [
                f"{name} {at}: {length} bytes: {data.hex()}"
                for at, (length, data) in enumerate(each[first : first + _SHOWN], first)
            ]
    if absent > dropped:
        told.append(f"{absent} frames are missing inside, {dropped} were dropped")
    return told, absent


class Capture:
    """A tcpdump of the host's side; `stop` ends it."""

    def __init__(self, where: Namespace, link: str, place: Path, *options: str) -> None:
        """Start it; it captures when this returns."""
        self._where = where
        self._process = subprocess.Popen(
            where.command(
                *("tcpdump", "-Z", "root", "-i", link, "-n", "-B", str(_HOST_BUFFER_KIB)),
                *("-w", str(place), *options, _FILTER),
            ),
            stderr=subprocess.PIPE,
            text=True,
        )
        assert self._process.stderr is not None
        for line in self._process.stderr:
            if "listening on" in line:
                break

    def stop(self) -> list[str]:
        """Stop it; returns a line if it has missed frames."""
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGINT)
        _, said = self._process.communicate(timeout=60)
        lost = re.search(r"([1-9]\d*) packets? dropped by kernel", said)
        return [f"tcpdump outside missed {lost[1]} frames"] if lost else []


def run_phase(place: Place, phase: Phase, mebibytes: int) -> tuple[list[str], int, int]:
    """Run one phase; returns its deviations, and the bytes and frames that the guest has seen."""
    host, peer, shell, folder = place
    where = peer if phase.server == PEER else host
    address = (NET6 if phase.is_ipv6 else NET4) + phase.server
    options = phase.options
    if phase.share:
        options += f" -n {max(1, round(mebibytes * phase.share))}M"
    shell.run(f"ethtool -K eth0 {phase.offloads} gro off >/dev/null 2>&1; true")
    shell.run(
        f"tcpdump -Z root -i eth0 -n -s {SNAPLEN} -B {_GUEST_BUFFER_KIB} -w /in '{_FILTER}'"
        " 2>/told & for i in $(seq 60); do grep -q 'listening on' /told 2>/dev/null && break;"
        " sleep 1; done; grep -q 'listening on' /told || { cat /told; false; }"
    )
    dropped_before = drops(host)
    outside = Capture(host, "tap0", folder / "out", "-s", str(SNAPLEN))
    wire = Capture(peer, "wire", folder / "wire", "-c", str(_LOOKED_AT))
    with subprocess.Popen(
        where.command("iperf3", "-s", "-1", "-B", address), stdout=subprocess.DEVNULL
    ):
        shell.run(
            f"sleep 1; iperf3 -c {address} {options} >/log 2>&1 || {{ cat /log; false; }}", PHASE_S
        )
    shell.run("sleep 2; kill -INT $(pidof tcpdump); wait; true")
    problems = [*outside.stop(), *wire.stop()]
    said = shell.run("cat /told; rm /told")
    if missed := re.search(r"([1-9]\d*) packets? dropped by kernel", said):
        problems.append(f"tcpdump inside missed {missed[1]} frames")
    shell.run("mkdir -p /www; mv /in /www/in; pidof httpd >/dev/null || httpd -h /www")
    host.run("busybox", "wget", "-q", "-O", str(folder / "in"), f"http://{NET4}{GUEST}/in")
    inside = frames(folder / "in")
    dropped = drops(host) - dropped_before
    told, lost = differences(inside, frames(folder / "out"), dropped)
    problems += told
    shown = host.run("tcpdump", "-n", "-vv", "-r", str(folder / "wire"))
    if wrong := len(re.findall(r"incorrect|bad.cksum|bad udp cksum", shown)):
        problems.append(f"tcpdump finds {wrong} wrong checksums on the wire")
    if phase.server == PEER and "correct" not in shown and "udp sum ok" not in shown:
        problems.append("tcpdump has seen no checksum")
    if not phase.share:
        said = shell.run("grep receiver /log || cat /log")
        if " 0/" not in said or lost:
            problems.append(f"datagrams were lost: {said}; {lost} before the guest")
    if lost and phase.share:
        print(f"{phase.name}: the tap's queue had no room for {lost} frames", flush=True)
    return problems, sum(length for length, _ in inside), len(inside)


def try_detection(place: Place) -> list[str]:
    """Send the peer a datagram with a wrong checksum; returns a line if the peer counts none."""
    before = counted(place.peer)
    lladdr = bytes.fromhex(
        place.peer.run("cat", "/sys/class/net/wire/address").strip().replace(":", "")
    )
    payload = b"wrong"
    udp = struct.pack(">HHHH", _BAD_PORT, _BAD_PORT, 8 + len(payload), 0x1234) + payload
    head = struct.pack(
        ">BBHHHBBH4s4s",
        *(0x45, 0, 20 + len(udp), 1, 0, 64, 17, 0),
        *(socket.inet_aton(f"{NET4}{number}") for number in (HOST, PEER)),
    )
    total = sum(struct.unpack(">10H", head))
    total = (total & 0xFFFF) + (total >> 16)
    head = head[:10] + struct.pack(">H", ~(total + (total >> 16)) & 0xFFFF) + head[12:]
    frame = lladdr + bytes(6) + b"\x08\x00" + head + udp
    code = (
        "import socket, sys\n"
        "s = socket.socket(socket.AF_PACKET, socket.SOCK_RAW)\n"
        "s.bind(('wire', 0))\n"
        "s.send(bytes.fromhex(sys.argv[1]))\n"
    )
    place.host.run(sys.executable, "-c", code, frame.hex())
    time.sleep(1)
    return [] if counted(place.peer) == before + 1 else ["a wrong checksum is not counted"]


def campaign(path: str, mebibytes: int, *, folder: Path) -> list[str]:
    """Run all phases on one data path; returns the deviations."""
    kernel = artifacts.kernel("cloud")
    disk = tools_disk(folder / "tools", *PROGRAMS)
    with ExitStack() as stack:
        host, peer = stack.enter_context(networks())
        command = vmctl_run(
            *("-m", "768M", "-b", kernel.vmlinuz),
            *("--initrd", artifacts.initramfs_with(kernel, MODULES, "tools")),
            *("-i", f"tap:tap0{PATHS[path]}", "-d", f"raw:{disk},ro"),
            *("--append", f"{COMMAND_LINE} test=shell"),
        )
        console = stack.enter_context(ConsoleProcess(host.command(*command)))
        console.expect("# ", BOOT_S)
        shell = Shell(console)
        shell.run(f"dmesg -n 1; ip link set lo up; {UNPACK}")
        shell.run("echo 0 >/proc/sys/net/ipv6/conf/eth0/accept_dad")
        shell.run(f"ip addr add {NET4}{GUEST}/24 dev eth0; ip addr add {NET6}{GUEST}/64 dev eth0")
        shell.run(f"ip link set eth0 up; sleep 2; ping -c 2 {NET4}{PEER}; ping -c 2 {NET6}{PEER}")
        place = Place(host, peer, shell, folder)
        problems = try_detection(place)
        before = counted(host), counted(peer), counted_by(shell)
        total_bytes = total_frames = 0
        for phase in PHASES:
            found, size, count = run_phase(place, phase, mebibytes)
            problems += [f"{phase.name}: {line}" for line in found]
            total_bytes, total_frames = total_bytes + size, total_frames + count
            verdict = "; ".join(found) or "same"
            print(f"{path}: {phase.name}: {size} bytes, {count} frames: {verdict}", flush=True)
        after = counted(host), counted(peer), counted_by(shell)
        if after != before:
            problems.append(f"wrong checksums: {before} became {after} (host, peer, guest)")
        shell.console.send("poweroff -f\n")
        shell.console.wait()
    told = f"{total_bytes / MIB:.0f} MiB in {total_frames} frames"
    print(f"{path}: {told}; {len(problems)} problems", flush=True)
    return problems


def main() -> int:
    """Read the command line and run."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--mebibytes", type=int, default=1024, help="of streams, on each path")
    parser.add_argument("--path", action="append", choices=sorted(PATHS), help="default: all")
    given = parser.parse_args()
    if lack := missing(PROGRAMS):
        print(f"captures: {lack}", file=sys.stderr)
        return 1
    problems: list[str] = []
    for path in given.path or PATHS:
        with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
            problems += campaign(path, given.mebibytes, folder=Path(folder))
    for line in problems:
        print(line)
    return bool(problems)


if __name__ == "__main__":
    sys.exit(main())
