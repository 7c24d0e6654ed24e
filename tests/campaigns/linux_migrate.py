"""Campaign: Linux guests under load migrate between two daemons, and back.

The daemons, in network namespaces whose bridges are connected, are as two hosts, with a real ssh
and disks that both see. Guests of 1, 2 and 4 vCPUs do what those of `linux_state.py` do, and write
to some MiB of memory each second. A round waits for a random time and then migrates one of them,
where iperf3 goes on by the same connection, every block on the disk is as the guest's memory has
it, the clock is right, and the kernel warns of nothing. In the first of three rounds ^C ends the
command at a random moment; the guest then runs at one of the two hosts.

A line for each round has the longest time for which no echo of the guest's came, and the same
before, while it did not move.

Needs root, sshd, iperf3 and a KVM that runs a distribution kernel, as the rig's does. The same
--seed gives the same rounds.
"""

from __future__ import annotations

import argparse
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Self

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from tests import artifacts  # noqa: E402 - found by the line above
from tests.campaigns.daemon_campaign import Failure, main  # noqa: E402
from tests.campaigns.linux_state import (  # noqa: E402
    COMMAND_S,
    DISK,
    MEMORY,
    SCRIPTS,
    SHELL,
    TOLERANCE_S,
    VCPUS,
    Host,
    boot,
    check_complaints,
    initramfs,
    wait_for_count,
)
from tests.echoes import Echoes  # noqa: E402
from tests.guest.tools import tools_disk  # noqa: E402
from tests.system.vmd.daemon import Daemon  # noqa: E402
from tests.system.vmd.netns import Namespace  # noqa: E402
from tests.system.vmd.test_migrate import sshd  # noqa: E402
from tests.vmctl_driver import BOOT_TIMEOUT_S, VMCTL  # noqa: E402

ADDRESSES = "10.9.0.1", "10.9.0.2"
GUEST = "10.9.0.9"
LIMITS = "--timeout", "20", "--on-timeout", "force"
"""A guest that writes faster than it can be copied stands still then."""
_QUIET_S = 2.0
_RUN_MAX_S = 4.0
_CANCEL_MAX_S = 6.0
BRIDGE = "br9"
_CONFIG = f'switch "both" {{ interface {BRIDGE} }}\n'

MIGRATING = {
    **SCRIPTS,
    "/load/address": f"""#!/bin/sh
ip addr add {GUEST}/24 dev eth0 2>/dev/null
echo {ADDRESSES[0]} >/host
""",
    "/load/all": SCRIPTS["/load/all"].replace("console", "console memory"),
    "/load/memory": """#!/bin/sh
mkdir -p /m
mount -t tmpfs m /m
while [ ! -e /stop ]; do
    dd if=/dev/zero of=/m/dirty bs=64k count=$((RATE * 16)) conv=notrunc 2>/dev/null
    sleep 1
done
""",
}


@contextmanager
def joined(folder: Path) -> Iterator[tuple[Host, Host]]:
    """Run two daemons on one network; yields them."""
    with ExitStack() as stack:
        spaces = [stack.enter_context(Namespace()) for _ in ADDRESSES]
        ends = [f"to{number}" for number in range(len(spaces))]
        spaces[0].run(
            *("ip", "link", "add", ends[1], "type", "veth"),
            *("peer", "name", ends[0], "netns", str(spaces[1].pid)),
        )
        hosts = []
        for number, (space, address) in enumerate(zip(spaces, ADDRESSES, strict=True)):
            lladdr = f"52:54:00:00:09:{number:02}"
            space.run("ip", "link", "add", BRIDGE, "address", lladdr, "type", "bridge")
            space.run("ip", "addr", "add", f"{address}/24", "dev", BRIDGE)
            for link in (BRIDGE, ends[not number]):
                space.run("ip", "link", "set", link, "up")
            space.run("ip", "link", "set", ends[not number], "master", BRIDGE)
            place = folder / f"host{number}"
            place.mkdir()
            vmd = Daemon(place, _CONFIG, is_user=False, prefix=space.prefix)
            client = stack.enter_context(stack.enter_context(vmd).client(BOOT_TIMEOUT_S))
            hosts.append(Host(space, vmd, client, place))
        yield hosts[0], hosts[1]


@contextmanager
def way_to(host: Host, number: int, folder: Path) -> Iterator[list[str]]:
    """Run a host's sshd; yields the end of a command line of `vmctl migrate`."""
    place = folder / f"ssh{number}"
    place.mkdir()
    environment = f"VMD_SOCKET={host.socket} PATH={VMCTL.parent}:/usr/bin:/bin"
    with sshd(place, environment, host.space.prefix, ADDRESSES[number]) as ssh:
        yield ["--ssh", ssh, f"root@{ADDRESSES[number]}"]


class Move:
    """A guest, where it is, and how it gets to the other host."""

    def __init__(
        self,
        name: str,
        hosts: tuple[Host, Host],
        ways: list[list[str]],
        limits: Sequence[str] = (),
    ) -> None:
        self._name, self._hosts, self._ways, self._limits = name, hosts, ways, limits
        self.at = 0

    @property
    def host(self) -> Host:
        """Where it runs."""
        return self._hosts[self.at]

    @property
    def watcher(self) -> Host:
        """The host that asks for echoes."""
        return self._hosts[0]

    def start(self) -> subprocess.Popen[str]:
        """Begin to migrate it."""
        *options, host = self._ways[not self.at]
        return subprocess.Popen(
            [*self.host.space.prefix, VMCTL, "migrate", *options, *self._limits, self._name, host],
            env=self.host.environ,
            stdin=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )

    def settle(self, *, has_moved: bool) -> None:
        """Note where it is; raises Failure unless it runs exactly there."""
        self.at ^= has_moved
        deadline = time.monotonic() + COMMAND_S
        while (found := self._found()) != [self.at]:
            if len(found) > 1 or time.monotonic() > deadline:
                raise Failure(f"{self._name}: should run at {self.at}, runs at {found}")
            time.sleep(0.1)

    def _found(self) -> list[int]:
        return [
            number
            for number, host in enumerate(self._hosts)
            for vm in host.client.vms()
            if (vm["name"], vm["state"]) == (self._name, "running")
        ]


def check(move: Move, name: str, before: int) -> int:
    """Look at a guest that has moved, or not; returns how far its load is. Raises Failure."""
    with move.host.shell(name) as shell:
        after = wait_for_count(shell, before)
        asked = time.time()
        clock = float(shell.run("date +%s"))
        answered = time.time()
        said = shell.run("cat /bad 2>/dev/null; dmesg -r | grep '^<[0-4]>'")
    if not asked - TOLERANCE_S <= clock <= answered + TOLERANCE_S:
        raise Failure(f"{name}: its clock says {clock}, not {asked:.1f} to {answered:.1f}")
    if any(line.startswith(("read", "write", "random")) for line in said.splitlines()):
        raise Failure(f"{name}: {said}")
    check_complaints(name, said)
    return after


class Server:
    """An iperf3 server at the first host, and what it says; a context manager."""

    def __init__(self, host: Host, log: Path) -> None:
        """Start it; it writes to `log`."""
        self._log = log
        with log.open("wb") as file:
            command = [*host.space.prefix, "iperf3", "-s", "--forceflush"]
            self._process = subprocess.Popen(command, stdout=file)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self._process.kill()
        self._process.wait()

    def connections(self) -> int:
        """Return how many clients it has had."""
        return self._log.read_text().count("Accepted connection")

    def seconds(self) -> int:
        """Return for how many seconds bytes have come."""
        return len(re.findall(r" sec +(?!0\.00 )[0-9.]+ [KM]?Bytes", self._log.read_text()))


def wait_for_bytes(move: Move, name: str, server: Server, beyond: int) -> None:
    """Wait until iperf3 has brought more bytes. Raises Failure."""
    deadline = time.monotonic() + COMMAND_S
    while server.seconds() <= beyond:
        if time.monotonic() > deadline:
            with move.host.shell(name) as shell:
                said = shell.run(f"pidof iperf3; ip addr; ping -c 2 -W 5 {ADDRESSES[0]}")
            raise Failure(f"{name}: iperf3 stands still after {beyond} s: {said}")
        time.sleep(0.2)


def round_of(move: Move, name: str, server: Server, chance: random.Random, *, cancels: bool) -> str:
    """Do a round; returns a line about it. Raises Failure."""
    with move.host.shell(name) as shell:
        before = wait_for_count(shell, 0)
    with Echoes(move.watcher.space, GUEST) as echoes:
        time.sleep(_QUIET_S + chance.random() * _RUN_MAX_S)
        quiet = echoes.longest_gap()
        connections, begun = server.connections(), time.monotonic()
        command = move.start()
        if cancels:
            time.sleep(chance.random() * _CANCEL_MAX_S)
            command.send_signal(signal.SIGINT)
        errors = command.communicate(timeout=COMMAND_S)[1]
        took = time.monotonic() - begun
        has_moved = command.returncode == 0
        if not has_moved and not cancels:
            raise Failure(f"{name}: {errors}")
        move.settle(has_moved=has_moved)
        time.sleep(_QUIET_S)
        gap = echoes.longest_gap()
    after = check(move, name, before)
    wait_for_bytes(move, name, server, server.seconds())
    if server.connections() != connections:
        raise Failure(f"{name}: iperf3 has connected anew")
    what = "migrated" if has_moved else "cancelled"
    return f"{what} in {took:.1f} s, no echo for {gap:.2f} s ({quiet:.2f}), blocks {before} {after}"


def rounds(folder: Path, given: argparse.Namespace) -> int:
    """Do all rounds; returns how many were cancelled in time. Raises Failure."""
    chance = random.Random(given.seed)
    kernel = artifacts.kernel("newer-cloud")
    disk = folder / "disk"
    disk.write_bytes(bytes(DISK))
    tools = tools_disk(folder / "tools", "iperf3", scripts=MIGRATING)
    options = (
        *("-b", kernel.vmlinuz, "--initrd", initramfs(kernel), "--append", SHELL),
        *("-m", MEMORY, "-n", "both", "-d", f"raw:{tools},ro", "-d", f"raw:{disk}"),
    )
    cancelled = 0
    with joined(folder) as hosts, ExitStack() as stack:
        ways = [
            stack.enter_context(way_to(host, number, folder)) for number, host in enumerate(hosts)
        ]
        server = stack.enter_context(Server(hosts[0], folder / "iperf3"))
        for number, cpus in enumerate(VCPUS):
            name = f"linux{cpus}"
            move = Move(name, hosts, ways, LIMITS)
            boot(move.host, name, *options, "-p", str(cpus))
            with move.host.shell(name) as shell:
                shell.run(f"/load/address; export RATE={given.rate}; /load/all")
                wait_for_count(shell, 2)
            wait_for_bytes(move, name, server, server.seconds())
            share = len(range(number, given.count, len(VCPUS)))
            for turn in range(share):
                told = round_of(move, name, server, chance, cancels=turn % 3 == 0)
                cancelled += told.startswith("cancelled")
                print(f"{cpus} vCPUs, round {turn + 1} of {share}: {told}", flush=True)
            with move.host.shell(name) as shell:
                said = shell.run("/load/check")
            if "bad:" in said or "checked:" not in said:
                raise Failure(f"{name}: {said}")
            move.host.stop(name)
    return cancelled


def run(folder: Path, given: argparse.Namespace) -> str:
    """See the module; raises Failure."""
    cancelled = rounds(folder, given)
    return f"linux_migrate: {given.count} rounds, {cancelled} of them cancelled"


if __name__ == "__main__":
    options = {
        "count": (100, "rounds (100)"),
        "rate": (1, "MiB of memory that each guest writes to in a second (1)"),
        "seed": (1, "of random numbers (1)"),
    }
    os.umask(0o077)
    sys.exit(main("linux_migrate", __doc__, options, run))
