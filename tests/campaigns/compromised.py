"""Campaign: compromised processes of the daemon, which send all that their channel can carry.

The daemon is a copy in which one kind of process is patched. A VM process floods vmm with reports,
valid and not, with descriptors and texts, or stops reading. The process of a disk or a share sends
anything to its VM. The control process sends requests in the name of clients that do not exist, as
fast as it can, and reads no answer.

A process of a VM ends its own VM, alone. Control is ended and started again. The other VMs run
on, another user's status arrives within a second, and the parent's memory stays below a limit.
"""

from __future__ import annotations

import argparse
import array
import mmap
import os
import random
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from tests.campaigns import daemon_campaign  # noqa: E402
from tests.campaigns.daemon_campaign import Failure  # noqa: E402
from tests.campaigns.valid_floods import RSS_MAX, STATUS_MAX_S, rss  # noqa: E402
from tests.system.vmd.daemon import Daemon, vm_block  # noqa: E402

EVIL = "evil"
"""The prefix of VMs whose processes are patched."""
_FLOOD = 1_000_000
_CONTROL_S = 30.0
_END_S = 10.0
_SEED = "VMD_CAMPAIGN_SEED"


# In the daemon


def _title() -> str:
    from vmd.shared import log  # noqa: PLC0415 - in the daemon only

    return log._handler.title


def _vm_says(number: int) -> Callable[[socket.socket, random.Random], None]:
    """Return the actions of the process of the VM with this number on its channel."""
    from vmd.wire import capture, internal, leaving  # noqa: PLC0415 - in the daemon only
    from vmd.wire.parts import Statistics  # noqa: PLC0415 - likewise
    from vmm_kvm.errors import HaltReason  # noqa: PLC0415 - likewise

    wire = internal.VM_AND_VMM
    statistics = internal.VmStatistics(statistics=Statistics(), memory_used=0)
    ending = internal.VmEnding(reason=internal.EndReason.CRASHED, message="m" * 16384)
    reports: list[internal.VmReport] = [
        capture.VmCaptured(),
        leaving.VmSent(),
        leaving.VmMigrating(message="m" * 16384),
        internal.VmHalted(reason=HaltReason.IO_ERROR, message="m" * 16384),
        internal.VmStarted(),
        internal.VmPaused(),
        internal.VmUnpaused(),
        statistics,
        ending,
        internal.VmUnpacked(),
    ]

    def flood(report: internal.VmReport) -> Callable[[socket.socket, random.Random], None]:
        return lambda sock, _rng: [sock.send(wire.encode(report)) for _ in range(_FLOOD)].clear()

    def mixed(sock: socket.socket, rng: random.Random) -> None:
        for _ in range(_FLOOD):
            sock.send(wire.encode(rng.choice(reports)))

    def noise(sock: socket.socket, rng: random.Random) -> None:
        for _ in range(_FLOOD):
            sock.send(rng.randbytes(rng.randrange(1, 4000)))

    def descriptors(sock: socket.socket, _rng: random.Random) -> None:
        for _ in range(_FLOOD):
            socket.send_fds(sock, [wire.encode(internal.VmUnpacked())], [2] * 60)

    def deaf(sock: socket.socket, _rng: random.Random) -> None:
        sock.send(wire.encode(internal.VmStarted()))
        while True:
            time.sleep(1)

    ways = [*map(flood, reports), mixed, noise, descriptors, deaf]
    return ways[number % len(ways)]


VM_WAYS = 14
DEAF = VM_WAYS - 1
"""The way of a process that neither sends nor reads."""


def _patch_vm(seed: int) -> None:
    from vmd.vm.process import VmProcess  # noqa: PLC0415 - in the daemon only

    run = VmProcess.run

    def patched(self: VmProcess) -> None:
        name = _title().removeprefix("vm/")
        if not name.startswith(EVIL):
            run(self)
            return
        sock = self._channel._socket
        sock.setblocking(True)
        _vm_says(int(name.removeprefix(EVIL)))(sock, random.Random(f"{seed} {name}"))

    VmProcess.run = patched  # type: ignore[method-assign]


def _patch_device(seed: int) -> None:
    from vmd.device import process, share  # noqa: PLC0415 - in the daemon only
    from vmm_kvm.virtio.device import Backend  # noqa: PLC0415 - likewise
    from vmm_kvm.virtio.vhost_user.process import serve  # noqa: PLC0415 - likewise

    def patched(sock: socket.socket, backend: Backend) -> None:
        if EVIL not in _title():
            serve(sock, backend)
            return
        rng = random.Random(f"{seed} {_title()}")
        try:
            while True:
                sock.send(rng.randbytes(rng.randrange(1, 200)))
        except OSError:
            return

    for module in (process, share):
        vars(module)["serve"] = patched


def _patch_control(seed: int) -> None:
    from vmd.control import process  # noqa: PLC0415 - in the daemon only
    from vmd.wire import internal, messages, ports, transfers  # noqa: PLC0415 - likewise

    begun = mmap.mmap(-1, mmap.PAGESIZE)  # shared with the next control process
    serve = process.Control.__init__

    def patched(self: process.Control, loop: object, parent: object, listener: object) -> None:
        begun[0] += 1
        if begun[0] > 1:
            serve(self, loop, parent, listener)  # type: ignore[arg-type]
            return
        sock: socket.socket = parent._socket  # type: ignore[attr-defined]
        sock.setblocking(True)
        rng = random.Random(seed)
        requests: list[messages.ParentRequest] = [
            messages.Status(statistics=True),
            messages.Status(interfaces=True),
            messages.Wait(name="good"),
            messages.Console(name="good"),
            messages.Start(name="x", instance="good"),
            messages.History(name="good"),
            ports.Connect(name="good", port=1),
            ports.Debug(name="good"),
            transfers.Clone(name="good", clone="x"),
            transfers.Snapshot(name="good", file=0),
            transfers.Snapshots(),
            transfers.OpenSnapshot(snapshot="x"),
        ]
        if seed % 2:  # requests with an immediate answer, so that only the answers give it away
            requests = requests[:2]
        listener.setblocking(True)  # type: ignore[attr-defined]
        connection = listener.accept()[0]  # type: ignore[attr-defined]
        for client in range(CLIENTS):
            came = internal.ClientCame(client=client)
            descriptors = array.array("i", [connection.fileno()])
            rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, descriptors)]
            sock.sendmsg([internal.CONTROL_AND_PARENT.encode(came)], rights)
        while True:
            request = rng.choice(requests)
            said = internal.ClientRequest(client=rng.randrange(CLIENTS), request=request)
            sock.sendmsg([internal.CONTROL_AND_PARENT.encode(said)])

    process.Control.__init__ = patched  # type: ignore[method-assign]


CLIENTS = 500
"""The number of clients that control claims to have."""
_PATCHES = {
    "vm": _patch_vm,
    "disk": _patch_device,
    "share": _patch_device,
    "control": _patch_control,
}


def _be_daemon(kind: str, arguments: list[str]) -> None:
    """Run a vmd with patched processes of this kind."""
    from vmd.__main__ import main as vmd  # noqa: PLC0415 - in the daemon only

    _PATCHES[kind](int(os.environ.get(_SEED, "1")))
    sys.argv[1:] = arguments
    vmd()


# The campaign


def _daemon(directory: Path, config: str, kind: str, seed: int) -> Daemon:
    os.environ[_SEED] = str(seed)
    is_user = os.geteuid() != 0
    return Daemon(directory, config, is_user=is_user, program=(__file__, "--be", kind, "--"))


def _check(vmd: Daemon, good: object) -> float:
    """Check the VM that is not compromised; returns the seconds of a status."""
    begun = time.monotonic()
    with vmd.client() as client:
        vm = client.vm("good")
    taken = time.monotonic() - begun
    if vm["pid"] != good or vm["state"] != "running":
        raise Failure(f"the other VM is {vm}")
    if taken > STATUS_MAX_S:
        raise Failure(f"a status took {taken:.2f} s")
    if (size := rss(vmd.process.pid)) > RSS_MAX:
        raise Failure(f"the parent has {size >> 20} MiB")
    return taken


def run_vms(directory: Path, kind: str, rounds: int, seed: int) -> str:
    """Compromise the VM or disk processes of `rounds` VMs, one after the other; returns a line.

    Raises:
        Failure: anything but that VM was affected.
    """
    (directory / "disk.evil").write_bytes(bytes(1 << 20))
    lines = {"disk": f'disk "{directory}/disk.evil"', "share": f'share "{directory}" tag "t"'}
    line = lines.get(kind, "")
    config = vm_block("good", enabled=True, memory="8M") + "".join(
        vm_block(f"{EVIL}{number}", line, memory="8M") for number in range(rounds)
    )
    slowest = 0.0
    with _daemon(directory, config, kind, seed) as vmd, vmd.client() as client:
        good = client.wait_for_state("good", "running")["pid"]
        for number in range(rounds):
            name = f"{EVIL}{number}"
            client.ask("start", name=name)  # the answer does not matter
            slowest = max(slowest, _check(vmd, good))
            if kind == "vm" and number % VM_WAYS == DEAF:
                for _ in range(2000):
                    client.send("console", name=name)
                    for fd in client.receive()[1]:
                        os.close(fd)
                slowest = max(slowest, _check(vmd, good))
                client.ask("stop", name=name, force=True, wait=True)
            deadline = time.monotonic() + _END_S
            while client.vm(name)["state"] != "stopped":
                if time.monotonic() > deadline:
                    raise Failure(f"{name} is {client.vm(name)['state']}")
                time.sleep(0.02)
            slowest = max(slowest, _check(vmd, good))
    return f"{rounds} {kind} processes taken over; slowest status {slowest * 1e3:.0f} ms"


def run_control(directory: Path, seed: int) -> str:
    """Compromise the control process; returns a line.

    Raises:
        Failure: a VM is lost, memory grew, or there is no other control process in time.
    """
    largest = 0
    begun = time.monotonic()
    with _daemon(directory, vm_block("good", enabled=True), "control", seed) as vmd:
        good = vmd.wait_for_child("vm/good")
        control = vmd.child("vmd: control")
        with vmd.client():
            while os.path.exists(f"/proc/{control}"):  # noqa: PTH110 - no other way is shorter
                largest = max(largest, rss(vmd.process.pid))
                if time.monotonic() - begun > _CONTROL_S:
                    raise Failure("control lives on, and reads nothing")
                time.sleep(0.05)
        taken = time.monotonic() - begun
        if largest > RSS_MAX:
            raise Failure(f"the parent had {largest >> 20} MiB")
        _check(vmd, good)
    return f"control taken over, replaced after {taken:.0f} s; {largest >> 20} MiB in the parent"


def main() -> int:
    """Run the campaign; returns the exit status."""
    if sys.argv[1:2] == ["--be"]:
        _be_daemon(sys.argv[2], sys.argv[4:])

    def run_all(directory: Path, given: argparse.Namespace) -> str:
        lines = [
            run_vms(directory, "vm", given.count, given.seed),
            run_vms(directory, "disk", given.count, given.seed),
            run_vms(directory, "share", given.count, given.seed),
            run_control(directory, 1),
            run_control(directory, 2),
        ]
        return "; ".join(lines)

    options = {"count": (VM_WAYS, "VMs of each kind"), "seed": (1, "of what is said")}
    return daemon_campaign.main("compromised", __doc__, options, run_all)


if __name__ == "__main__":
    sys.exit(main())
