"""Campaign: floods of valid requests, against a daemon with VMs.

Many connections of a user without rights send valid requests as fast as the daemon takes them: some
read their answers at once, some a little at a time, some never. Meanwhile another user asks for the
status, and stops and starts a VM. No VM is lost, the status arrives within a second, a forced stop
within two, and the memory of control and of the parent stays below a limit.

Others start VMs under ever new names, which fail, and leave nothing; or ask for events by the
thousand. Each request is answered once, a VM starts within a second, and the daemon ends at
SIGTERM. Others, who own VMs, send all that an owner may ask for, and more, and leave the answers
with their descriptors unread.

Any deviation is printed, and the exit status is 1.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import select
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from tests.campaigns import daemon_campaign  # noqa: E402
from tests.campaigns.daemon_campaign import Failure  # noqa: E402
from tests.campaigns.hostile_clients import NOBODY, as_nobody  # noqa: E402
from tests.system.vmd.daemon import READY, Daemon, vm_block  # noqa: E402
from vmd.shared.log import LINES_AT_ONCE, LINES_PER_S  # noqa: E402

STATUS = b'{"type":"status","statistics":true}'
EVENTS = 150_000
EVENTS_CONNECTIONS = 8
START_MAX_S = 1.0
END_MAX_S = 10.0
STATUS_MAX_S = 1.0
STOP_MAX_S = 2.0
RSS_MAX = 64 << 20
"""Bytes of control and of the parent."""
_VMS = 20
_PROBES_S = 0.2
_SLOW_READS = 4  # packets that a slow reader takes in a round
_ROUND_S = 0.05
_PACKET_MAX = 1 << 20
_PATIENCE_S = 20.0
_READERS = ("fast", "slow", "never")


class Figures(NamedTuple):
    """The results."""

    answers: int
    """Answers that the flood has read."""
    statuses: int
    slowest_status_s: float
    slowest_stop_s: float
    control_rss: int
    parent_rss: int

    def __str__(self) -> str:
        """Return one line."""
        return (
            f"{self.answers} answers read; {self.statuses} statuses of another user, the slowest "
            f"{self.slowest_status_s * 1e3:.0f} ms; slowest stop -f {self.slowest_stop_s * 1e3:.0f}"
            f" ms; at most {self.control_rss >> 20} MiB in control, {self.parent_rss >> 20} MiB in "
            "the parent"
        )


def _connect(path: Path) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with as_nobody():
        sock.connect(str(path))
    sock.setblocking(False)
    return sock


class Flood:
    """Connections with a constant supply of requests, on a thread of its own."""

    def __init__(self, path: Path, count: int, packet: bytes) -> None:
        self.make: Callable[[], bytes] = lambda: packet
        """Makes the next packet."""
        self._sockets = [_connect(path) for _ in range(count)]
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self.answers = 0

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def stop(self) -> None:
        """Stop, and close the connections."""
        self._is_over.set()
        self._thread.join()
        for sock in self._sockets:
            sock.close()

    def _run(self) -> None:
        poll = select.poll()
        for at, sock in enumerate(self._sockets):
            reads = select.POLLIN if _READERS[at % len(_READERS)] == "fast" else 0
            poll.register(sock, select.POLLOUT | reads)
        by_fd = {sock.fileno(): (sock, _READERS[at % 3]) for at, sock in enumerate(self._sockets)}
        slow_at = 0.0
        while not self._is_over.is_set():
            for fd, events in poll.poll(_ROUND_S * 1000):
                sock, _reader = by_fd[fd]
                if events & select.POLLIN:
                    self._read(sock, _PACKET_MAX)
                if events & select.POLLOUT:
                    self._write(sock)
            if time.monotonic() > slow_at:
                slow_at = time.monotonic() + _ROUND_S
                for sock, reader in by_fd.values():
                    if reader == "slow":
                        self._read(sock, _SLOW_READS)

    def _read(self, sock: socket.socket, count: int) -> None:
        try:
            for _ in range(count):
                if not sock.recv(_PACKET_MAX):
                    return
                self.answers += 1
        except OSError:  # no room for more, or it has been cut off
            return

    def _write(self, sock: socket.socket) -> None:
        try:
            while True:
                sock.send(self.make())
        except OSError:
            return


@contextmanager
def flooded(path: Path, count: int, packet: bytes = STATUS) -> Iterator[Flood]:
    """Have `count` connections send `packet` without end."""
    flood = Flood(path, count, packet)
    flood.start()
    try:
        yield flood
    finally:
        flood.stop()


def rss(pid: int) -> int:
    """Return the resident memory of a process, bytes."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def run(directory: Path, connections: int, seconds: float) -> Figures:
    """Flood a daemon; returns the figures.

    Raises:
        Failure: the daemon has a fault.
    """
    is_user = os.geteuid() != 0
    directory.chmod(0o711)
    config = "" if is_user else f"socket owner {NOBODY}\n"
    names = [f"vm{number}" for number in range(_VMS)]
    config += "".join(vm_block(name, enabled=True, memory="4M") for name in names)
    config += "staggered start parallel 4 delay 0\n"
    with Daemon(directory, config, is_user=is_user) as vmd:
        with vmd.client() as client:
            pids = {name: client.wait_for_state(name, "running")["pid"] for name in names}
        try:
            return _flood(vmd, pids, connections, seconds)
        except BaseException:
            print(vmd.log.read_text()[-3000:], file=sys.stderr)
            raise


def _flood(vmd: Daemon, pids: dict[str, object], connections: int, seconds: float) -> Figures:
    victim, *others = pids
    control = vmd.child("vmd: control")
    statuses, slowest, slowest_stop, largest = 0, 0.0, 0.0, [0, 0]
    with flooded(vmd.socket, connections) as flood:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            begun = time.monotonic()
            with vmd.client() as client:
                found = {str(vm["name"]): vm["pid"] for vm in client.vms()}
            slowest = max(slowest, time.monotonic() - begun)
            statuses += 1
            if lost := [name for name in others if found.get(name) != pids[name]]:
                raise Failure(f"lost {lost}")
            slowest_stop = max(slowest_stop, _stop_and_start(vmd, victim))
            for at, pid in enumerate((control, vmd.process.pid)):
                largest[at] = max(largest[at], rss(pid))
            time.sleep(_PROBES_S)
        figures = Figures(flood.answers, statuses, slowest, slowest_stop, largest[0], largest[1])
    if slowest > STATUS_MAX_S or slowest_stop > STOP_MAX_S or max(largest) > RSS_MAX:
        raise Failure(str(figures))
    return figures


def _stop_and_start(vmd: Daemon, name: str) -> float:
    """Force a VM to stop, and start it again; returns the seconds of the stop."""
    with vmd.client() as client:
        begun = time.monotonic()
        answer = client.ask("stop", name=name, force=True, wait=True)
        taken = time.monotonic() - begun
        if answer["type"] != "terminated":
            raise Failure(f"stop -f: {answer}")
        time.sleep(6.1)  # sooner starts count as too quick
        answer = client.ask("start", name=name)
        if answer["type"] != "started":
            raise Failure(f"start: {answer}")
    return taken


def _ask_for_events(path: Path, connections: int, count: int, told: socket.socket) -> None:
    """Ask on each connection `count` times; send how many were answered how often, and granted."""
    answers = [[0] * count for _ in range(connections)]
    granted = 0
    asked = [0] * connections
    sockets = [_connect(path) for _ in range(connections)]
    poll = select.poll()
    for sock in sockets:
        poll.register(sock, select.POLLIN | select.POLLOUT)
    by_fd = {sock.fileno(): at for at, sock in enumerate(sockets)}
    told.send(b"ready")
    left = connections * count
    while left:
        if not (ready := poll.poll(_PATIENCE_S * 1000)):
            break
        for fd, events in ready:
            at = by_fd[fd]
            if events & select.POLLIN:
                answer = json.loads(sockets[at].recv(_PACKET_MAX))
                if answer["type"] != "event":
                    answers[at][answer["serial"]] += 1
                    left -= 1
                    granted += answer["type"] == "done"
            if events & select.POLLOUT:
                with suppress(BlockingIOError):
                    while asked[at] < count:
                        sockets[at].send(b'{"type":"events","serial":%d}' % asked[at])
                        asked[at] += 1
                if asked[at] == count:
                    poll.modify(fd, select.POLLIN)
    wrong = sum(times != 1 for each in answers for times in each)
    told.send(json.dumps([wrong, granted]).encode())
    for sock in sockets:
        sock.close()


def run_events(directory: Path, count: int) -> str:
    """Ask for events `count` times; returns a line to print.

    Raises:
        Failure: a start took long, a request was not answered once, or the daemon did not end.
    """
    is_user = os.geteuid() != 0
    directory.chmod(0o711)
    config = ("" if is_user else f"socket owner {NOBODY}\n") + vm_block("one") + vm_block("two")
    with Daemon(directory, config, is_user=is_user) as vmd:
        with vmd.client() as client:  # the first start waits for the zygote
            client.ask("start", name="two")
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        each = count // EVENTS_CONNECTIONS
        asker = get_context("fork").Process(
            target=_ask_for_events, args=(vmd.socket, EVENTS_CONNECTIONS, each, theirs)
        )
        asker.start()
        ours.recv(_PACKET_MAX)
        with vmd.client() as client:
            begun = time.monotonic()
            started = client.ask("start", name="one")["type"]
            start_s = time.monotonic() - begun
        is_asking = not select.select([ours], [], [], 0)[0]
        wrong, granted = json.loads(ours.recv(_PACKET_MAX))
        ours.close()
        theirs.close()
        asker.join()
        lines = vmd.log.read_text().count("\n")
        begun = time.monotonic()
        with flooded(vmd.socket, EVENTS_CONNECTIONS, b'{"type":"events"}'):
            vmd.stop()
        end_s = time.monotonic() - begun
    told = (
        f"{count} requests for events, {wrong} not answered once; a start took "
        f"{start_s * 1e3:.0f} ms, the end {end_s:.1f} s; {lines} lines in the log"
    )
    if (
        started != "started"
        or wrong
        or granted != EVENTS_CONNECTIONS
        or not is_asking
        or start_s > START_MAX_S
        or end_s > END_MAX_S
    ):
        raise Failure(told)
    return told


def run_starts(directory: Path, seconds: float) -> str:
    """Have a user fail to start VMs under new names; returns a line to print.

    Raises:
        Failure: another user waits too long, or a start leaves something.
    """
    is_user = os.geteuid() != 0
    directory.chmod(0o711)
    (directory / "none").mkdir(exist_ok=True)
    owner = "" if is_user else f", owner {NOBODY}"
    template = vm_block("base", f"allow instance {{ disk{owner} }}")
    config = ("" if is_user else f"socket owner {NOBODY}\n") + template + vm_block("one")
    with Daemon(directory, config, is_user=is_user) as vmd:
        with vmd.client() as client:
            client.ask("start", name="one")
        flood = Flood(vmd.socket, EVENTS_CONNECTIONS, b"")
        names = itertools.count()

        def packet() -> bytes:
            disk = {"path": f"{directory}/none/disk.raw"}
            start = {"type": "start", "name": f"x{next(names)}", "instance": "base"}
            return json.dumps({**start, "disks": [disk]}).encode()

        flood.make = packet
        flood.start()
        slowest = 0.0
        try:
            end = time.monotonic() + seconds
            while time.monotonic() < end:
                begun = time.monotonic()
                with vmd.client() as client:
                    client.vm("one")
                slowest = max(slowest, time.monotonic() - begun)
                time.sleep(_PROBES_S)
        finally:
            flood.stop()
        with vmd.client() as client:
            client.ask("stop", name="one", force=True, wait=True)
            time.sleep(6.1)  # a sooner start counts as too quick
            last = client.ask("start", name="one")
            left = [vm["name"] for vm in client.vms() if str(vm["name"]).startswith("x")]
        lines = vmd.log.read_text().count("\n")
    told = (
        f"{flood.answers} starts under new names answered; the slowest status of another user "
        f"{slowest * 1e3:.0f} ms; {lines} lines in the log"
    )
    most = 4 * (LINES_AT_ONCE + LINES_PER_S * (seconds + 10))
    if last["type"] != "started" or left or slowest > STATUS_MAX_S or lines > most:
        raise Failure(f"{told}; then {last}, left {left[:3]}")
    return told


def _of_owners() -> Iterator[dict[str, object]]:
    """Return requests of each type about VMs called `his` and `base`, without end."""
    vm = {"name": "his"}
    for number in itertools.count():
        name = f"x{number}"
        yield {"type": "status", "statistics": True, "interfaces": True, "devices": True}
        yield {"type": "status", "gone": True}
        yield {"type": "history", **vm}
        yield {"type": "counts"}
        yield {"type": "open-snapshot", "snapshot": "kept"}
        yield {"type": "snapshots"}
        yield {"type": "snapshot", "snapshot": name, **vm}
        yield {"type": "remove-snapshot", "snapshot": name}
        yield {"type": "connect", "port": number % 65536, **vm}
        yield {"type": "console", **vm}
        yield {"type": "debug", **vm}
        yield {"type": "clone", "clone": name, **vm}
        yield {"type": "clone", "clone": "x%d", "count": 256, **vm}
        yield {"type": ("pause", "unpause")[number % 2], **vm}
        yield {"type": "wait", **vm}
        yield {"type": "stop", "in_order": True, "name": "base"}
        yield {
            "type": "receive",
            "name": name,
            "stream": 0,
            "manifest": "x" * 60_000,
            "is_snapshot": True,
            "is_copy": True,
            "memory": 1 << 26,
            "cpus": 1,
        }
        yield {
            "type": "start",
            "name": name,
            "instance": "base",
            "shares": [{"path": f"/nowhere/{name}", "tag": "t"}],
        }
        yield {"type": "start", "name": name, "instance": "base", "append": "\x1b[2J\n" * 500}
        for kind in ("hold", "reload", "source", "reset"):
            yield {"type": kind}
        yield {"type": "log", "level": 2}
        yield {"type": "load", "path": "/etc/passwd"}
        yield {"type": "send", "stream": 0, **vm}
        yield {"type": "events"}


TYPES_OF_OWNERS = frozenset(str(request["type"]) for request in itertools.islice(_of_owners(), 60))


def run_owners(directory: Path, connections: int, seconds: float, *, patience: float = 1.0) -> str:
    """Have an owner of VMs send requests of each type; returns a line to print. Needs root.

    On a busy host, others may wait `patience` times as long as else.

    Raises:
        Failure: another user waits too long, cannot open a console, or loses a VM.
    """
    directory.chmod(0o711)
    config = f"socket owner {NOBODY}\nlimit vms 4\nlimit snapshots 2\n"
    owner = f"owner {NOBODY}"
    config += vm_block("base", f"allow instance {{ boot, share, {owner} }}", memory="4M")
    lines = (owner, "vsock", "allow snapshot")
    config += vm_block("his", *lines, enabled=True, memory="4M")
    config += vm_block("mine", enabled=True, memory="4M")
    with Daemon(directory, config, is_user=False) as vmd:
        with vmd.client() as client:
            client.wait_for_state("his", "running")
            mine = client.wait_for_state("mine", "running")["pid"]
        with as_nobody():
            client = vmd.client()
        with client:
            if (answer := client.ask("snapshot", name="his", snapshot="kept"))["type"] != "done":
                raise Failure(f"snapshot: {answer}")
        control = vmd.child("vmd: control")
        requests = _of_owners()
        flood = Flood(vmd.socket, connections, b"")
        flood.make = lambda: json.dumps(next(requests)).encode()
        slowest, slowest_console, largest, are_lost = 0.0, 0.0, [0, 0], False
        flood.start()
        try:
            end = time.monotonic() + seconds
            while time.monotonic() < end:
                begun = time.monotonic()
                with vmd.client() as client:
                    found = client.vm("mine")["pid"]
                slowest = max(slowest, time.monotonic() - begun)
                are_lost = are_lost or found != mine
                begun = time.monotonic()
                with vmd.client() as client, client.console("mine") as console:
                    console.expect(READY)
                slowest_console = max(slowest_console, time.monotonic() - begun)
                for at, pid in enumerate((control, vmd.process.pid)):
                    largest[at] = max(largest[at], rss(pid))
                time.sleep(_PROBES_S)
        except BaseException:
            print(vmd.log.read_text()[-3000:], file=sys.stderr)
            raise
        finally:
            flood.stop()
        log = vmd.log.read_text()
    told = (
        f"{flood.answers} answers to requests of {len(TYPES_OF_OWNERS)} types; another user's "
        f"slowest status {slowest * 1e3:.0f} ms, slowest console {slowest_console * 1e3:.0f} ms; "
        f"at most {largest[0] >> 20} MiB in control, {largest[1] >> 20} MiB in the parent"
    )
    are_slow = slowest > STATUS_MAX_S * patience or slowest_console > STATUS_MAX_S * patience
    if are_slow or are_lost or max(largest) > RSS_MAX:
        raise Failure(told)
    if "\x1b" in log or "Traceback" in log:
        raise Failure(f"{told}; the log has an escape sequence, or a bug")
    return told


def main() -> int:
    """Run the campaign; returns the exit status."""

    def run_all(directory: Path, given: argparse.Namespace) -> str:
        events = run_events(directory, given.events)
        starts = run_starts(directory, min(given.seconds, 30))
        if os.geteuid() == 0:
            starts += f"; {run_owners(directory, given.connections, min(given.seconds, 60))}"
        return f"{events}; {starts}; {run(directory, given.connections, given.seconds)}; no VM lost"

    options = {
        "connections": (256, "of the flood"),
        "seconds": (300, "it goes on"),
        "events": (EVENTS, "requests for events"),
    }
    return daemon_campaign.main("valid_floods", __doc__, options, run_all)


if __name__ == "__main__":
    sys.exit(main())
