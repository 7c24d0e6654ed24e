"""Campaign: VMs with four interfaces each, started, stopped and killed, and the daemon with them.

Each round starts a VM in a network namespace of its own, or stops it, by force or by kill -9 of its
process, or kills one of the processes that move its frames; now and then it kills priv, local, vmm
or the whole daemon, while VMs start. All the while frames go to every interface. After each
round a stopped VM has no tap left, and a running one has all four. At the end, interfaces,
addresses, rules and namespaces are as before.

Any deviation is printed, and the exit status is 1. The same --seed does the same, but not at the
same moments. Needs root, nft and /dev/kvm.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from tests.system.vmd.daemon import Daemon, descendants, process_title, vm_block  # noqa: E402
from tests.system.vmd.netns import Namespace  # noqa: E402

# Broadcasts to every interface, as fast as on a busy network.
TRAFFIC = """
import socket, time
frame = b"\\xff" * 6 + bytes.fromhex("525400000099") + b"\\x88\\xb5" + bytes(1000)
while True:
    for _, name in socket.if_nameindex():
        try:
            with socket.socket(socket.AF_PACKET, socket.SOCK_RAW) as out:
                out.bind((name, 0))
                for _ in range(20):
                    out.send(frame)
        except OSError:
            continue
    time.sleep(0.01)
"""
# The daemon refuses a VM that starts three times within 6 s of the time before: have many.
VMS = tuple(f"vm{number}" for number in range(1, 41))
RUNNING_MAX = 6
WAIT_S = 30.0
# More than five ends of one kind within 10 s end the daemon, as they should.
BETWEEN_KILLS_S = 2.5
CHANCE_OF_KILL = 0.05
CHANCE_OF_STOP, CHANCE_OF_MOVER = 0.4, 0.25  # of a running VM; else it is killed
_PROCESSES = ("vmd: priv", "vmd: local", "vmd: vmm", "vmd")


def config() -> str:
    """Return a vm.conf whose VMs have every kind of interface."""
    text = (
        "local prefix 100.64.0.0/10 nat\nlocal inet6 prefix fd12::/64\n"
        'switch "own" {\ncreate\naddress "10.0.0.1/24"\nlocked lladdr\n}\n'
        'switch "theirs" { interface br7 }\n'
    )
    for number, name in enumerate(VMS):
        text += vm_block(
            name,
            f'local interface {{\nforward tcp "*" {8080 + number} to 80\nlocked lladdr\n}}',
            "local interface",
            'interface {\nmtu 9000\nswitch "own"\n}',
            'interface {\nswitch "theirs"\ngroup "guests"\n}',
        )
    return text


class Campaign:
    """One run of the campaign."""

    def __init__(self, space: Namespace, directory: Path, seed: int) -> None:
        self.space = space
        self.directory = directory
        self.chance = random.Random(seed)
        self.daemon = self._daemon()
        self.counts: Counter[str] = Counter()
        self.last_kill = time.monotonic()

    def _daemon(self) -> Daemon:
        return Daemon(self.directory, config(), is_user=False, prefix=self.space.prefix)

    def round(self) -> list[str]:
        """Act on a VM, and perhaps on the daemon; returns the deviations afterwards."""
        with self.daemon.client() as client:
            running = [name for name in VMS if client.vm(name)["pid"] is not None]
            name = self.chance.choice(running if len(running) >= RUNNING_MAX else VMS)
            pid = client.vm(name)["pid"]
            if pid is None:
                client.send("start", name=name)
                self.counts["starts"] += 1
                if not self._kill_something():
                    answer = client.receive()[0]
                    if answer["type"] != "started" and "too quickly" not in str(answer):
                        return [f"start of {name}: {answer}"]
            elif (deed := self.chance.random()) < CHANCE_OF_STOP:
                client.send("stop", name=name, force=True, wait=True)
                self.counts["stops"] += 1
                if not self._kill_something():
                    client.receive()
            elif deed < CHANCE_OF_STOP + CHANCE_OF_MOVER:
                self._kill_mover(name)
            else:
                assert isinstance(pid, int)
                os.kill(pid, signal.SIGKILL)
                self.counts["VM processes killed"] += 1
        return self.check()

    def _kill_mover(self, name: str) -> None:
        """Kill a process that moves a VM's frames, if it has one; the VM runs on without."""
        pids = descendants(self.daemon.process.pid)
        movers = [pid for pid in pids if process_title(pid) == f"nic/{name}"]
        if movers:
            with suppress(ProcessLookupError):
                os.kill(self.chance.choice(movers), signal.SIGKILL)
            self.counts["device processes killed"] += 1

    def _kill_something(self) -> bool:
        """Perhaps kill a process of the daemon; True if a client's answer may be lost."""
        is_early = time.monotonic() - self.last_kill < BETWEEN_KILLS_S
        if is_early or self.chance.random() > CHANCE_OF_KILL:
            return False
        title = self.chance.choice(_PROCESSES)
        time.sleep(self.chance.random() * 0.1)
        self.counts[f"{title} killed"] += 1
        if title == "vmd":
            self.daemon.process.kill()
            self.daemon.process.wait()
            self.daemon = self._daemon()
        else:
            os.kill(self._oldest(title), signal.SIGKILL)
        self.last_kill = time.monotonic()
        return True

    def _oldest(self, title: str) -> int:
        """Return the process with this title; processes that it has just forked have it too."""
        pids = descendants(self.daemon.process.pid)
        return min(pid for pid in pids if process_title(pid) == title)

    def check(self) -> list[str]:
        """Wait until the taps are those of running VMs; return the deviations if they never are."""
        deadline = time.monotonic() + WAIT_S
        while True:
            wrong = self._wrong()
            if not wrong or time.monotonic() > deadline:
                return wrong
            time.sleep(0.05)

    def _wrong(self) -> list[str]:
        aliases = self._aliases()
        with self.daemon.client() as client:
            expected = {
                f"vm{vm['id']}-if{index}-{name}"
                for name in VMS
                if (vm := client.vm(name))["pid"] is not None
                for index in range(4)
            }
        wrong = [f"left behind: {alias}" for alias in sorted(aliases - expected)]
        wrong += [f"missing: {alias}" for alias in sorted(expected - aliases)]
        locked = self.space.rules().count("hook ingress")
        if locked != len(expected) // 2:
            wrong.append(f"{locked} locked interfaces, not {len(expected) // 2}")
        return wrong

    def _aliases(self) -> set[str]:
        shown = self.space.run("ip", "-o", "link")
        words = [line.partition("alias ")[2].strip() for line in shown.splitlines()]
        return {word for word in words if word.startswith("vm") and ":" not in word}


def run(count: int, seed: int, *, is_quiet: bool = False) -> int:
    """Run `count` rounds; returns the exit status."""
    namespaces = subprocess.run(["ip", "netns"], check=True, capture_output=True).stdout
    problems: list[str] = []
    with Namespace() as space, tempfile.TemporaryDirectory(prefix="vmd-networks-") as directory:
        space.run("ip", "link", "add", "br7", "address", "52:54:00:00:00:07", "type", "bridge")
        space.run("ip", "link", "set", "br7", "addrgenmode", "none", "up")
        before = space.state()
        campaign = Campaign(space, Path(directory), seed)
        begin = time.monotonic()
        with subprocess.Popen([*space.prefix, sys.executable, "-c", TRAFFIC]) as traffic:
            try:
                for number in range(count):
                    wrong = campaign.round()
                    problems += (f"round {number}: {text}" for text in wrong)
                    if len(problems) > 20:
                        break
            finally:
                traffic.kill()
        elapsed = time.monotonic() - begin
        if campaign.daemon.stop() != 0:
            problems.append("the daemon failed")
        log = campaign.daemon.log.read_text()
        if "Traceback" in log:
            problems.append(log[log.index("Traceback") - 200 :][:3000])
        deadline = time.monotonic() + WAIT_S
        while (after := space.state()) != before and time.monotonic() < deadline:
            time.sleep(0.1)
        if after != before:
            problems.append(f"before: {before}\nafter: {after}")
    if subprocess.run(["ip", "netns"], check=True, capture_output=True).stdout != namespaces:
        problems.append("namespaces are left")
    told = ", ".join(f"{value} {name}" for name, value in sorted(campaign.counts.items()))
    if not is_quiet or problems:
        print(f"seed {seed}: {count} rounds in {elapsed:.0f} s: {told}; {len(problems)} problems")
    for problem in problems:
        print(problem)
    return 1 if problems else 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Read the command line and run."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--count", type=int, default=2000, help="rounds (2000)")
    parser.add_argument("--seed", type=int, default=1)
    given = parser.parse_args(arguments)
    return run(given.count, given.seed)


if __name__ == "__main__":
    sys.exit(main())
