"""Campaign: hostile clients, against a daemon that runs a VM.

Packets of random bytes, damaged requests, requests cut short, packets that are too large, absurd
numbers and depths, descriptors by the dozen, floods of requests, connections that send nothing,
that send after a long time, that are half closed, that never read; and at the end as many
connections as one user gets. As root, all come from a user without rights. Nine in ten packets
are no request that the daemon understands.

Meanwhile another client asks for the status. The answer comes within a second, each time; memory
does not grow, no descriptor is left, and the VM and all of the daemon's processes run on.

Any deviation is printed, and the exit status is 1. The same --seed gives the same packets.
"""

from __future__ import annotations

import argparse
import array
import json
import os
import random
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from tests.campaigns import daemon_campaign  # noqa: E402
from tests.campaigns.daemon_campaign import Failure  # noqa: E402
from tests.system.vmd.daemon import Daemon, descendants, process_title, vm_block  # noqa: E402

NOBODY = 65534
CONNECTIONS = 1000
STATUS_MAX_S = 1.0
GROWTH_MAX = 8 << 20
"""Bytes that all of the daemon's processes together may grow, after a warm-up."""
_FLOOD = 20
_HELD_MAX = 60
_VALID_SHARE_MAX = 0.2
_STATUS_EVERY = 200
_WARM_UP = 2000
_PACKET_MAX = 300 << 10
_FDS = 100
_FDS_MAX = 253  # the kernel's limit for a message
_FDS_REFUSED = 65
_FLOOD_SHARE = 0.005
_RESUMED_SHARE = 0.2
_DEPTH = 5000

REQUESTS: tuple[dict[str, object], ...] = (
    {"type": "status", "serial": 1},
    {"type": "start", "serial": 2, "name": "one", "kernel": 0, "memory": 1 << 26},
    {"type": "start", "name": "x" * 64, "disks": [{"path": "/etc/shadow"}]},
    {"type": "stop", "name": "one", "force": True, "wait": True},
    {"type": "wait", "name": "one"},
    {"type": "console", "id": 1},
    {"type": "pause", "id": 1},
    {"type": "load", "path": "/etc/passwd"},
    {"type": "reset", "mode": "all"},
    {"type": "log", "level": 2},
    {"type": "events"},
    {"type": "hold"},
    {"type": "unpause", "name": "one", "force": True},
    {"type": "connect", "name": "one", "port": 22},
    {"type": "debug", "name": "one"},
    {"type": "history", "name": "one"},
    {"type": "counts"},
    {"type": "source"},
    {"type": "reload"},
    {"type": "send", "name": "one", "stream": 0, "replies": 1, "copies_storage": True},
    {
        "type": "receive",
        "name": "two\n",
        "stream": 0,
        "manifest": "\x1b[2J" * 99,
        "is_snapshot": True,
        "is_copy": True,
        "memory": 1 << 26,
        "cpus": 1,
        "boot": "/etc/shadow",
    },
    {"type": "snapshot", "name": "one", "snapshot": "../../etc", "file": 0},
    {"type": "snapshots"},
    {"type": "open-snapshot", "snapshot": "../0/one"},
    {"type": "remove-snapshot", "snapshot": "\x1b]0;x\x07"},
    {"type": "clone", "name": "one", "clone": "%d%d\n", "count": 256},
    {
        "type": "start",
        "name": "y",
        "instance": "one",
        "has_tpm": True,
        "has_vsock": True,
        "shares": [{"path": "/root\x1b[1m", "tag": "t"}],
        "interfaces": [
            {"is_local": True, "forwards": [{"protocol": "tcp", "port": 22, "to_port": 22}]}
        ],
    },
)
"""At least one of each type."""


@contextmanager
def as_nobody() -> Iterator[None]:
    """Become a user without rights, if possible; the daemon sees the user of a connection."""
    if os.geteuid() != 0:
        yield
        return
    os.setegid(NOBODY)
    os.seteuid(NOBODY)
    try:
        yield
    finally:
        os.seteuid(0)
        os.setegid(0)


class Attacker:
    """Makes connections and abuses them."""

    def __init__(self, path: Path, seed: int, requests: tuple[dict[str, object], ...]) -> None:
        self._path = path
        self._requests = requests
        self._random = random.Random(seed)
        self._held: list[socket.socket] = []
        self.sent = self.valid = self.connections = 0
        self._null = os.open(os.devnull, os.O_RDONLY)

    def close(self) -> None:
        """Close everything."""
        for held in self._held:
            held.close()
        self._held.clear()
        os.close(self._null)

    def connect(self) -> socket.socket:
        """Make a connection that does not block."""
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            with as_nobody():
                connection.connect(str(self._path))
        except OSError:
            connection.close()
            raise
        connection.setblocking(False)
        self.connections += 1
        return connection

    def attack(self) -> None:
        """Use one connection until it ends or has had its share."""
        connection = self._resumed() or self.connect()
        try:
            if self._random.random() < _FLOOD_SHARE:
                for _ in range(_FLOOD):
                    self._send(connection, self._request(), is_valid=True)
            else:
                # An invalid request ends its connection: the daemon reads the first of these.
                ways = (self._noise, self._damaged, self._cut, self._large, self._absurd)
                self._send(connection, self._random.choice(ways)())
        except OSError:  # the daemon has closed it, or does not read any more
            pass
        self._leave(connection)

    def _resumed(self) -> socket.socket | None:
        """Return a connection that has been silent, or incomplete, for some time."""
        if self._held and self._random.random() < _RESUMED_SHARE:
            return self._held.pop(self._random.randrange(len(self._held)))
        return None

    def _send(self, connection: socket.socket, data: bytes, *, is_valid: bool = False) -> None:
        fds = [self._null] * self._random.choice((0, 0, 0, 1, 3, 64, _FDS, _FDS_MAX))
        rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))
        connection.sendmsg([data], [rights] if fds else [])
        self.sent += 1
        self.valid += is_valid and len(fds) < _FDS_REFUSED
        if self._random.random() < 0.5:
            with suppress(BlockingIOError):
                connection.recv(1 << 16)

    def _leave(self, connection: socket.socket) -> None:
        """Close it, or keep it half open, or leave it silent for now."""
        fate = self._random.random()
        if fate < 0.1:
            with suppress(OSError):
                connection.shutdown(self._random.choice((socket.SHUT_WR, socket.SHUT_RD)))
        if fate > 0.2:
            connection.close()
            return
        self._held.append(connection)
        if len(self._held) > _HELD_MAX:
            self._held.pop(self._random.randrange(_HELD_MAX)).close()
        if fate > 0.15:  # another silent one
            self._held.append(self.connect())

    def _noise(self) -> bytes:
        return self._random.randbytes(self._random.randrange(1, 400))

    def _request(self) -> bytes:
        return json.dumps(self._random.choice(self._requests)).encode()

    def _damaged(self) -> bytes:
        data = bytearray(self._request())
        for _ in range(self._random.randrange(1, 4)):
            data[self._random.randrange(len(data))] = self._random.randrange(256)
        return bytes(data)

    def _cut(self) -> bytes:
        data = self._request()
        return data[: self._random.randrange(1, len(data))]

    def _large(self) -> bytes:
        size = self._random.choice((1 << 10, 1 << 16, 1 << 17, _PACKET_MAX))
        return b'{"type":"status","name":"' + b"n" * size + b'"}'

    def _absurd(self) -> bytes:
        """Return JSON that is no request of ours."""
        return self._random.choice(
            (
                b"[" * _DEPTH,
                b'{"type":"status","id":' + b"9" * 400 + b"}",
                b'{"type":"start","name":"x","memory":-1}',
                b'{"type":"status","serial":1e400}',
                b'{"type":"wait","name":"\\ud800"}',
                b'{"type":"stop","name":null}',
                b'{"type":"stop","name":"one","force":"yes"}',
                b'{"type":"nothing"}',
                b'{"type":"status"}{"type":"status"}',
                b'{"serial":1}',
                b"null",
                b"\xff\xfe{\0}\0",
                b'{"version":99,"type":"status"}x',
            )
        )


class Watch:
    """Properties that must not change during the attack."""

    def __init__(self, vmd: Daemon, patience: float) -> None:
        self._vmd = vmd
        self._status_max_s = STATUS_MAX_S * patience
        self.slowest_s = 0.0
        self._processes = self._titles()
        self._memory = 0
        self._fds = 0

    def ask(self) -> None:
        """Ask for the status as an honest client does."""
        begun = time.monotonic()
        with self._vmd.client() as client:
            state = client.vm("one")["state"]
        taken = time.monotonic() - begun
        self.slowest_s = max(self.slowest_s, taken)
        if state != "running":
            raise Failure(f"the VM is {state}")
        if taken > self._status_max_s:
            raise Failure(f"a status took {taken:.2f} s")

    def remember(self) -> None:
        """Note them before the attack."""
        self._memory, self._fds = self.memory(), self._open_fds()

    def look(self) -> None:
        """Compare them, once all hostile connections are closed."""
        if (titles := self._titles()) != self._processes:
            raise Failure(f"processes were {self._processes}, are {titles}")
        if (grown := self.memory() - self._memory) > GROWTH_MAX:
            raise Failure(f"memory has grown by {grown >> 10} KiB")
        deadline = time.monotonic() + 10
        while self._open_fds() > self._fds:
            if time.monotonic() > deadline:
                raise Failure(f"{self._open_fds() - self._fds} descriptors are left")
            time.sleep(0.05)

    def memory(self) -> int:
        """Return the resident memory of the processes that clients can connect to, bytes."""
        pages = [
            int(Path(f"/proc/{pid}/statm").read_text().split()[1])
            for pid in (self._vmd.process.pid, self._vmd.child("vmd: control"))
        ]
        return sum(pages) * os.sysconf("SC_PAGE_SIZE")

    def _open_fds(self) -> int:
        return sum(
            len(list(Path(f"/proc/{pid}/fd").iterdir()))
            for pid in (self._vmd.process.pid, self._vmd.child("vmd: control"))
        )

    def _titles(self) -> dict[int, str]:
        """Return the processes by pid, except those that wait to be a VM or to serve a disk."""
        vmm = self._vmd.child("vmd: vmm")
        below = set(descendants(vmm))
        found = {pid: process_title(pid) for pid in descendants(self._vmd.process.pid)}
        return {
            pid: title
            for pid, title in found.items()
            if pid not in below or title.startswith(("vm/", "vmd: "))
        }


def run(directory: Path, count: int, seed: int, *, patience: float = 1.0) -> str:
    """Send `count` packets, then open many connections; returns a line to print.

    On a busy host, a status may take `patience` times as long as else.

    Raises:
        Failure: the daemon has a fault.
    """
    is_user = os.geteuid() != 0
    directory.chmod(0o711)
    config = f"socket owner {NOBODY}\n" if not is_user else ""
    with Daemon(directory, config + vm_block("one", enabled=True), is_user=is_user) as vmd:
        with vmd.client() as client:
            client.wait_for_state("one", "running")
        watch = Watch(vmd, patience)
        # A daemon of an ordinary user grants every right to any client of its socket.
        attacker = Attacker(vmd.socket, seed, REQUESTS[:1] if is_user else REQUESTS)
        try:
            _attack(attacker, watch, min(count, _WARM_UP))
            watch.remember()
            _attack(attacker, watch, count)
            crowd = _crowd(attacker, watch)
        except BaseException:
            print(vmd.log.read_text()[-3000:], file=sys.stderr)
            raise
        finally:
            attacker.close()
        watch.look()
        watch.ask()
    if attacker.valid > attacker.sent * _VALID_SHARE_MAX:
        raise Failure(f"{attacker.valid} of {attacker.sent} packets were requests: too tame")
    return (
        f"{attacker.sent} packets, {attacker.valid} of them requests, on {attacker.connections} "
        f"connections, {crowd} at once; slowest status {watch.slowest_s * 1e3:.0f} ms"
    )


def _attack(attacker: Attacker, watch: Watch, until: int) -> None:
    asked = attacker.sent
    while attacker.sent < until:
        attacker.attack()
        if attacker.sent - asked >= _STATUS_EVERY:
            asked = attacker.sent
            watch.ask()


def _crowd(attacker: Attacker, watch: Watch) -> int:
    """Connect as often as possible, and ask for the status in between; returns the number."""
    crowd = []
    try:
        for number in range(CONNECTIONS):
            crowd.append(attacker.connect())
            if number % 100 == 0:
                watch.ask()
        watch.ask()
        return len(crowd)
    finally:
        for connection in crowd:
            connection.close()


def main() -> int:
    """Run the campaign; returns the exit status."""

    def run_all(directory: Path, given: argparse.Namespace) -> str:
        return f"{run(directory, given.count, given.seed)}: answered throughout, nothing left"

    options = {"count": (100_000, "packets"), "seed": (1, "of what is sent")}
    return daemon_campaign.main("hostile_clients", __doc__, options, run_all)


if __name__ == "__main__":
    sys.exit(main())
