"""Campaign: kill -9 of processes that move the frames of Linux guests.

Three guests under vmd, in a network namespace of its own, are on one switch, and have a local
interface each. Two send to the third, which sends to the host, as fast as they can (iperf3). The
campaign kills, one after the other: the process that moves the first one's frames (on the path that
has one), the VM of the second, priv, and at last the daemon. After each of the first three, the
third guest reaches the host on both of its interfaces, and its stream continues; taps and rules of
the killed one are gone. After the last one, `ip link`, `ip addr`, `nft list ruleset` and `ip netns`
print the same as before, also after another daemon has come and gone.

Each round does all of it on both data paths. Needs root, nft, iperf3 and a KVM that runs a
distribution kernel, as the rig's does.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from tests import artifacts  # noqa: E402 - found by the line above
from tests.campaigns.daemon_campaign import Failure, main  # noqa: E402
from tests.guest.daemon_guest import Shell, linux, without_vhost  # noqa: E402
from tests.guest.tools import UNPACK, tools_disk  # noqa: E402
from tests.system.vmd.daemon import (  # noqa: E402
    Client,
    Daemon,
    descendants,
    is_alive,
    process_title,
)
from tests.system.vmd.netns import Namespace  # noqa: E402
from tests.vmctl_driver import BOOT_TIMEOUT_S  # noqa: E402

PATHS = ("vhost", "process")
HOST = "10.0.0.1"
# The guest whose process of frames is killed, the one whose VM is, and the one that runs on.
MOVER, VICTIM, OTHER = "mover", "victim", "other"
VMS = {MOVER: "10.0.0.2", VICTIM: "10.0.0.3", OTHER: "10.0.0.4"}
PORTS = {MOVER: 5201, VICTIM: 5202, OTHER: 5203}
WAIT_S = 60.0
_MOVED = 100_000
"""Bytes that show that a stream continues."""


def wait_until(what: str, is_so: Callable[[], bool]) -> None:
    """Wait until a condition holds; raises Failure if it never does."""
    deadline = time.monotonic() + WAIT_S
    while not is_so():
        if time.monotonic() > deadline:
            raise Failure(what)
        time.sleep(0.1)


class Guests:
    """The guests of a daemon, and their traffic."""

    def __init__(self, space: Namespace, client: Client, stack: ExitStack) -> None:
        """Start all guests."""
        self._space, self._client = space, client
        self._shells: dict[str, Shell] = {}
        self._taps: dict[str, list[str]] = {}
        self._routers: dict[str, str] = {}
        for name in VMS:
            answer = client.ask("start", name=name)
            if answer["type"] != "started":
                raise Failure(f"start of {name}: {answer}")
        for name, address in VMS.items():
            client.wait_for_state(name, "running")
            interfaces = self._interfaces(name)
            self._taps[name] = [str(one["tap"]) for one in interfaces]
            self._routers[name] = _first(interfaces[1], "host_addresses").partition("/")[0]
            self._shells[name] = shell = Shell(stack.enter_context(client.console(name)))
            shell.run(f"{UNPACK}; ip addr add {address}/24 dev eth0")
            mine = _first(interfaces[1], "guest_addresses")
            shell.run(f"ip link set eth1 up; ip addr add {mine} dev eth1")

    def send(self, stack: ExitStack) -> None:
        """Have all of them send without end."""
        server = [*self._space.prefix, "iperf3", "-s", "-p", str(PORTS[OTHER]), "-B", HOST]
        process = stack.enter_context(subprocess.Popen(server, stdout=subprocess.DEVNULL))
        stack.callback(process.kill)
        for name in (MOVER, VICTIM):
            self._shells[OTHER].run(f"iperf3 -s -D -p {PORTS[name]}")
        for name, shell in self._shells.items():
            to = HOST if name == OTHER else VMS[OTHER]
            shell.run(f"(sleep 1; iperf3 -c {to} -p {PORTS[name]} -t 3600 >/log 2>&1) & true")
        self.check_streams(*VMS)

    def check_streams(self, *names: str) -> None:
        """Wait until more bytes of these guests' streams arrive; raises Failure if none do."""
        for name in names:
            wanted = self._sent(name) + _MOVED
            wait_until(f"the stream of {name} stands still", partial(self._has_sent, name, wanted))

    def check_other(self) -> None:
        """Check that the third guest reaches the host on both interfaces; raises Failure."""
        for address in (HOST, self._routers[OTHER]):
            if not self._shells[OTHER].reaches(address):
                raise Failure(f"the other guest does not reach {address}")

    def check_gone(self, name: str) -> None:
        """Wait until a VM has left nothing; raises Failure."""
        wait_until(f"{name} has left something", partial(self._is_gone, set(self._taps[name])))

    def _is_gone(self, taps: set[str]) -> bool:
        rules = self._space.rules()
        return not taps & self._space.links() and not any(f'"{tap}"' in rules for tap in taps)

    def _sent(self, name: str) -> int:
        shown = self._space.run("ip", "-s", "-j", "link", "show", "dev", self._taps[name][0])
        return int(json.loads(shown)[0]["stats64"]["rx"]["bytes"])

    def _has_sent(self, name: str, wanted: int) -> bool:
        return self._sent(name) >= wanted

    def _interfaces(self, name: str) -> list[dict[str, object]]:
        vms = self._client.ask("status", name=name, interfaces=True)["vms"]
        assert isinstance(vms, list)
        found: list[dict[str, object]] = vms[0]["interfaces"]
        return found


def _first(interface: dict[str, object], name: str) -> str:
    addresses = interface[name]
    assert isinstance(addresses, list)
    return str(addresses[0])


def processes(vmd: Daemon, title: str) -> list[int]:
    """Return the daemon's processes with a title."""
    return [pid for pid in descendants(vmd.process.pid) if process_title(pid) == title]


def config(disk: Path) -> str:
    """Return a vm.conf of the three guests."""
    kernel = artifacts.kernel("cloud")
    lines = (
        f'disk "{disk}" {{ ro }}',
        'interface {\nswitch "lan"\nlocked lladdr\n}',
        "local interface { locked lladdr }",
    )
    return (
        f'local prefix 100.64.0.0/10 nat\nswitch "lan" {{\ncreate\naddress "{HOST}/24"\n}}\n'
    ) + "".join(linux(name, kernel, *lines, enabled=False) for name in VMS)


def round_of(path: str, folder: Path) -> str:
    """Kill each process once; returns the names of the killed. Raises Failure."""
    told = []
    text = config(tools_disk(folder / "tools", "iperf3"))
    with Namespace() as space:
        before = state(space)
        prefix = [*space.prefix, *(() if path == "vhost" else without_vhost(folder))]
        vmd = Daemon(folder, text, is_user=False, prefix=prefix)
        try:
            with ExitStack() as stack:
                client = stack.enter_context(vmd.client(BOOT_TIMEOUT_S))
                guests = Guests(space, client, stack)
                guests.send(stack)

                movers = processes(vmd, f"nic/{MOVER}")
                if len(movers) != (2 if path == "process" else 0):
                    raise Failure(f"{path}: {MOVER} has {len(movers)} processes for its frames")
                for pid in movers:
                    os.kill(pid, signal.SIGKILL)
                    told.append("process of frames")
                guests.check_other()
                guests.check_streams(VICTIM, OTHER)
                if client.vm(MOVER)["state"] != "running":
                    raise Failure(f"{MOVER} has ended with its process of frames")

                os.kill(vmd.child(f"vm/{VICTIM}"), signal.SIGKILL)
                told.append("VM")
                guests.check_gone(VICTIM)
                guests.check_other()
                guests.check_streams(OTHER)

                (priv,) = processes(vmd, "vmd: priv")
                os.kill(priv, signal.SIGKILL)
                told.append("priv")
                guests.check_other()
                guests.check_streams(OTHER)
                wait_until("no other priv", lambda: processes(vmd, "vmd: priv") not in ([], [priv]))
                guests.check_other()

                pids = descendants(vmd.process.pid)
                vmd.process.kill()
                vmd.process.wait()
                told.append("daemon")
                wait_until("processes are left", lambda: not any(map(is_alive, pids)))
        finally:
            vmd.stop()
        check_state(space, before)
        if Daemon(folder, text, is_user=False, prefix=prefix).stop() != 0:
            raise Failure("the next daemon failed")
        check_state(space, before)
    return f"{path}: killed {', '.join(told)}"


def state(space: Namespace) -> tuple[str, ...]:
    """Return the state in which leftovers would show."""
    shown = subprocess.run(["ip", "netns"], check=True, capture_output=True, text=True).stdout
    return (*space.state(), shown)


def check_state(space: Namespace, before: tuple[str, ...]) -> None:
    """Wait until the state is as before; raises Failure."""
    deadline = time.monotonic() + WAIT_S
    while (after := state(space)) != before:
        if time.monotonic() > deadline:
            raise Failure(f"before: {before}\nafter: {after}")
        time.sleep(0.1)


def run(folder: Path, given: argparse.Namespace) -> str:
    """Do the rounds on each path; raises Failure."""
    for number in range(given.count):
        for path in PATHS:
            print(f"round {number + 1}: {round_of(path, folder)}", flush=True)
    return f"{given.count} rounds on {len(PATHS)} data paths"


if __name__ == "__main__":
    sys.exit(main("kill_guests", __doc__, {"count": (3, "rounds (3)")}, run))
