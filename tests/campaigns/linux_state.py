"""Campaign: Linux guests under load are written at random moments, and continue elsewhere.

Guests of 1, 2 and 4 vCPUs under vmd, in a network namespace of their own, do all of this at once:
write blocks of random bytes to a disk and read others back past the page cache, send to the host
by iperf3, read from /dev/hwrng, and write to their console. Each round takes one of them, waits for
a random time, and then one of two things happens:

- a snapshot is made, and a copy started from it, which shows the time by the policy `frozen` or
  `now`. In the copy the load ends, and each block on the disk is as the guest's memory has it. The
  copy gets an address by DHCP and reaches the host. The source runs on meanwhile.
- it is sent, through a pipe, to a VM of another name, which takes its place in the next round.

No guest's kernel warns of anything. Then, with a kernel that has a driver for the VM generation
identifier and one that has none, eight copies of one snapshot read 1 KiB of /dev/urandom each:
pairwise different on the former, as told on the latter.

Needs root, nft, iperf3 and a KVM that runs a distribution kernel, as the rig's does. The same
--seed gives the same rounds.
"""

from __future__ import annotations

import argparse
import os
import random
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from tests import artifacts  # noqa: E402 - found by the line above
from tests.campaigns.daemon_campaign import Failure, main  # noqa: E402
from tests.guest.linux_guest import COMMAND_LINE  # noqa: E402
from tests.guest.tools import MODULES, UNPACK, tools_disk  # noqa: E402
from tests.system.vmd.daemon import Client, Daemon, Stream, vm_block  # noqa: E402
from tests.system.vmd.netns import Namespace  # noqa: E402
from tests.vmctl_driver import BOOT_TIMEOUT_S, VMCTL  # noqa: E402

VCPUS = (1, 2, 4)
MEMORY = "128M"
SHELL = f"{COMMAND_LINE} test=shell"
COPIES = 8
BYTES = 1024
DISK = 4 << 20
COMMAND_S = 240.0
TOLERANCE_S = 2.0
"""The tolerance of a guest's clock, besides the question's time: it has seconds."""
_RUN_MAX_S = 4.0
_PROGRESS_S = 120.0
_BLOCK, _BLOCKS = 16 << 10, 128
# Messages of a kernel on a busy host.
_OF_THE_HOSTS_LOAD = ("hrtimer: interrupt took", "clocksource: Long readout interval")

SCRIPTS = {
    "/load/disk": f"""#!/bin/sh
n=0
while [ ! -e /stop ]; do
    o=$((n % {_BLOCKS}))
    head -c {_BLOCK} /dev/urandom >/w/new
    dd if=/w/new of=/dev/vdb bs={_BLOCK} seek=$o conv=notrunc oflag=direct 2>/dev/null ||
        echo "write $o" >>/bad
    mv /w/new /w/$o
    r=$(((n * 7 + 3) % {_BLOCKS}))
    [ ! -e /w/$r ] || dd if=/dev/vdb bs={_BLOCK} skip=$r count=1 iflag=direct 2>/dev/null |
        cmp -s - /w/$r || echo "read $r" >>/bad
    n=$((n + 1))
    echo $n >/count.new
    mv /count.new /count
done
echo >/stopped
""",
    "/load/net": """#!/bin/sh
while [ ! -e /stop ]; do
    /load/address && iperf3 -c $(cat /host) -b 2M -t 36000 >/dev/null 2>&1
    sleep 1
done
""",
    "/load/random": """#!/bin/sh
while [ ! -e /stop ]; do
    dd if=/dev/hwrng bs=64 count=1 2>/dev/null | md5sum >/w-random || echo random >>/bad
    sleep 1
done
""",
    "/load/console": """#!/bin/sh
while [ ! -e /stop ]; do
    echo "................................................................" >/dev/console
    sleep 1
done
""",
    "/load/address": """#!/bin/sh
ip addr flush dev eth0
udhcpc -i eth0 -n -q -t 5 -s /load/lease >/dev/null 2>&1
""",
    "/load/lease": """#!/bin/sh
[ "$1" = bound ] || exit 0
ip addr add $ip/$mask dev $interface
echo $router >/host
""",
    "/load/all": """#!/bin/sh
mkdir -p /w
echo 0 >/count
for one in disk net random console; do
    setsid /load/$one </dev/null >/dev/null 2>&1 &
done
""",
    "/load/check": f"""#!/bin/sh
touch /stop
while [ ! -e /stopped ]; do sleep 0.1; done
killall iperf3 2>/dev/null
for f in /w/[0-9]*; do
    dd if=/dev/vdb bs={_BLOCK} skip=${{f#/w/}} count=1 iflag=direct 2>/dev/null |
        cmp -s - $f || echo "bad: block ${{f#/w/}}"
done
sed 's/^/bad: /' /bad 2>/dev/null
dmesg -r | grep '^<[0-4]>' | sed 's/^/dmesg: /'
/load/address || echo "bad: no address"
ping -c 2 -W 5 $(cat /host) >/dev/null || echo "bad: no answer"
echo "checked: $(ls /w | wc -l)"
""",
}


class Shell:
    """The shell on a guest's console, with other output between."""

    def __init__(self, console: Stream) -> None:
        self._console = console

    def run(self, command: str) -> str:
        """Run a command; returns its output."""
        console, start = self._console, len(self._console.output)
        mark = os.urandom(4).hex()
        # The echo of the command has quotes in the middle of the marks.
        console.type(f"echo '<'{mark}; {command}; echo '>'{mark}\n".encode())
        console.expect(f">{mark}".encode())
        shown = console.output[start:].decode(errors="replace").replace("\r", "")
        told = shown.partition(f"<{mark}\n")[2].partition(f">{mark}")[0]
        return re.sub(r"^\.+\n", "", told, flags=re.MULTILINE).strip()


class Host:
    """The daemon, and operations on its VMs."""

    def __init__(self, space: Namespace, vmd: Daemon, client: Client, folder: Path) -> None:
        self.space, self.client, self.folder = space, client, folder
        self.socket = vmd.socket
        self.environ = {**os.environ, "VMD_SOCKET": str(vmd.socket)}

    def vmctl(self, *words: str | Path) -> str:
        """Run vmctl; raises Failure if it fails."""
        done = subprocess.run(
            [VMCTL, *words],
            env=self.environ,
            capture_output=True,
            text=True,
            timeout=COMMAND_S,
            check=False,
        )
        if done.returncode != 0:
            raise Failure(f"vmctl {' '.join(map(str, words))}: {done.stderr}")
        return done.stdout

    def move(self, name: str, to: str) -> None:
        """Send a VM through a pipe to another name."""
        with subprocess.Popen(
            [VMCTL, "send", name], env=self.environ, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        ) as sender:
            receiver = subprocess.run(
                [VMCTL, "receive", to],
                env=self.environ,
                stdin=sender.stdout,
                capture_output=True,
                timeout=COMMAND_S,
                check=False,
            )
            _, errors = sender.communicate(timeout=COMMAND_S)
            if sender.returncode or receiver.returncode:
                raise Failure(f"sending {name} to {to}: {errors!r} {receiver.stderr!r}")

    @contextmanager
    def shell(self, name: str) -> Iterator[Shell]:
        """Yield the shell of a guest."""
        with self.client.console(name) as console:
            yield Shell(console)

    def stop(self, name: str) -> None:
        """Stop a VM, as if its power had failed."""
        self.vmctl("stop", "-fw", name)


def boot(host: Host, name: str, *options: str | Path) -> None:
    """Start a guest with options of `vmctl start`, and prepare it for its load."""
    host.vmctl("start", *options, name)
    with host.client.console(name) as console:
        console.expect(b"# ")
        shell = Shell(console)
        shell.run(f"dmesg -n 1; {UNPACK}; ip link set lo up; ip link set eth0 up")
    check_kernel(host, name)


def complaints(told: str) -> list[str]:
    """Return warnings of a kernel."""
    lines = (line for line in told.splitlines() if re.match(r"(dmesg: )?<[0-4]>", line))
    return [line for line in lines if not any(text in line for text in _OF_THE_HOSTS_LOAD)]


_boot_complaints: dict[str, int] = {}


def check_kernel(host: Host, name: str) -> None:
    """Remember a kernel's messages from before the campaign."""
    with host.shell(name) as shell:
        found = complaints(shell.run("dmesg -r | grep '^<[0-4]>'"))
    _boot_complaints[name.partition("-")[0]] = len(found)


def wait_for_count(shell: Shell, beyond: int) -> int:
    """Wait until a guest's load has gone on; returns how far. Raises Failure."""
    deadline = time.monotonic() + _PROGRESS_S
    while (count := int(shell.run("cat /count") or 0)) <= beyond:
        if time.monotonic() > deadline:
            raise Failure(f"a guest's load stands still at {count}")
        time.sleep(0.2)
    return count


def snapshot_round(host: Host, name: str, policy: str) -> str:
    """Make a snapshot, and check a copy; returns a line about it."""
    path = host.folder / "snapshot"
    path.unlink(missing_ok=True)
    copy = "copy"
    with host.shell(name) as shell:
        before = wait_for_count(shell, 0)
    earliest, monotonic = time.time(), time.monotonic()
    host.vmctl("snapshot", "-o", path, name)
    latest = time.time()
    took = time.monotonic() - monotonic
    host.vmctl("snapshot", "--check", path)
    resumed = time.time()
    host.vmctl("start", copy, "--from", path, "--clock", policy)
    with host.shell(copy) as shell:
        asked = time.time()
        told = float(shell.run("date +%s"))
        answered = time.time()
        ages = asked - answered, answered - resumed
        if policy == "now":
            low, high = asked, answered
        else:
            low, high = earliest, latest + ages[1]
        if not low - TOLERANCE_S <= told <= high + TOLERANCE_S:
            raise Failure(f"{name}, clock {policy}: {told}, not {low:.1f} to {high:.1f}")
        after = int(shell.run("cat /count"))
        said = shell.run("/load/check")
    if "bad:" in said or "checked:" not in said or after < before:
        raise Failure(f"{name}, a copy ({before} to {after}): {said}")
    check_complaints(name, said)
    host.stop(copy)
    with host.shell(name) as shell:
        gone_on = wait_for_count(shell, before)
    return f"snapshot {took:.1f} s, clock {policy}, blocks {before} {after} {gone_on}"


def check_complaints(name: str, said: str) -> None:
    """Raise Failure for a warning that the kernel did not have after its boot."""
    found = complaints(said)
    known = _boot_complaints[name.partition("-")[0]]
    if len(found) > known:
        raise Failure(f"{name}: {found[known:]}")


def move_round(host: Host, name: str) -> tuple[str, str]:
    """Send a VM to another name; returns that, and a line about it."""
    stem, _, number = name.partition("-")
    to = f"{stem}-{int(number or 0) + 1}"
    with host.shell(name) as shell:
        before = wait_for_count(shell, 0)
    begun = time.monotonic()
    host.move(name, to)
    took = time.monotonic() - begun
    with host.shell(to) as shell:
        after = wait_for_count(shell, before)
        said = shell.run("cat /bad 2>/dev/null; dmesg -r | grep '^<[0-4]>'")
        clock = abs(float(shell.run("date +%s")) - time.time())
    if re.search(r"^(read|write|random)", said, re.MULTILINE):
        raise Failure(f"{to}: {said}")
    if clock > TOLERANCE_S + COMMAND_S / 20:
        raise Failure(f"{to}: its clock is {clock:.1f} s wrong")
    check_complaints(to, said)
    return to, f"sent in {took:.1f} s, blocks {before} {after}"


def rounds(host: Host, count: int, chance: random.Random) -> None:
    """Do all rounds; raises Failure."""
    with ExitStack() as stack:
        for number, cpus in enumerate(VCPUS):
            name = f"linux{cpus}"
            boot(host, name)
            server = [*host.space.prefix, "iperf3", "-s"]
            process = stack.enter_context(subprocess.Popen(server, stdout=subprocess.DEVNULL))
            stack.callback(process.kill)
            with host.shell(name) as shell:
                shell.run("/load/all")
                wait_for_count(shell, 2)
            share = len(range(number, count, len(VCPUS)))
            for turn in range(share):
                time.sleep(chance.random() * _RUN_MAX_S)
                if turn % 3 == 1:
                    name, told = move_round(host, name)
                else:
                    told = snapshot_round(host, name, chance.choice(("frozen", "now")))
                print(f"{cpus} vCPUs, round {turn + 1} of {share}: {told}", flush=True)
            host.stop(name)
            process.kill()


def randoms(host: Host, name: str, *, expected: Callable[[int], bool]) -> str:
    """Have copies of one snapshot read random bytes; returns a line about them."""
    host.vmctl("start", name)
    with host.client.console(name) as console:
        console.expect(b"# ")
        shell = Shell(console)
        shell.run("dmesg -n 1")
        begun = wait_until_ready(shell)
        release = shell.run("uname -r")
    path = host.folder / "random"
    host.vmctl("snapshot", "-o", path, name)
    found = []
    names = [name, *(f"copy{number}" for number in range(COPIES))]
    for copy in names[1:]:
        host.vmctl("start", copy, "--from", path)
    for copy in names:
        with host.shell(copy) as shell:
            found.append(shell.run(f"head -c {BYTES} /dev/urandom | sha256sum"))
    for copy in names:
        host.stop(copy)
    path.unlink()
    different = len(set(found))
    told = f"{release}: {different} of {len(found)} read other bytes (random ready: {begun})"
    if not expected(different) or any(len(one) < 64 for one in found):
        raise Failure(told)
    return told


def wait_until_ready(shell: Shell) -> str:
    """Wait until the kernel's random numbers are; returns its message."""
    deadline = time.monotonic() + _PROGRESS_S
    while not (told := shell.run("dmesg | grep 'crng init done'")):
        if time.monotonic() > deadline:
            return "not told"
        time.sleep(1)
    return told


def initramfs(kernel: artifacts.Kernel) -> Path:
    """Return the guests' initramfs."""
    return artifacts.initramfs_with(kernel, (*MODULES, "virtio_rng"), "state")


def linux(name: str, kernel: artifacts.Kernel, *lines: str) -> str:
    """Return a VM with a shell on its console."""
    boot = (f'initrd "{initramfs(kernel)}"', f'append "{SHELL}"')
    return vm_block(name, *boot, *lines, boot=kernel.vmlinuz, memory=MEMORY)


def run(folder: Path, given: argparse.Namespace) -> str:
    """Do so many rounds, and look at random numbers; raises Failure."""
    newer, older = artifacts.kernel("newer-cloud"), artifacts.kernel("cloud")
    disk = folder / "disk"
    disk.write_bytes(bytes(DISK))
    tools = tools_disk(folder / "tools", "iperf3", scripts=SCRIPTS)
    blocks = ["local prefix 100.64.0.0/10\n"]
    for cpus in VCPUS:
        lines = (
            f"cpus {cpus}",
            f'disk "{tools}" {{ ro }}',
            f'disk "{disk}" format raw',
            "local interface",
        )
        blocks.append(linux(f"linux{cpus}", newer, *lines))
    blocks += [linux("newer", newer), linux("older", older)]
    told = []
    with (
        Namespace() as space,
        Daemon(folder, "".join(blocks), is_user=False, prefix=space.prefix) as vmd,
        vmd.client(BOOT_TIMEOUT_S) as client,
    ):
        host = Host(space, vmd, client, folder)
        told.append(randoms(host, "newer", expected=lambda different: different == COPIES + 1))
        print(told[-1], flush=True)
        if older.release != newer.release:
            told.append(randoms(host, "older", expected=lambda different: different >= 1))
            print(told[-1], flush=True)
        rounds(host, given.count, random.Random(given.seed))
    return f"linux_state: {given.count} rounds; {'; '.join(told)}"


if __name__ == "__main__":
    options = {"count": (100, "rounds (100)"), "seed": (1, "of random numbers (1)")}
    sys.exit(main("linux_state", __doc__, options, run))
