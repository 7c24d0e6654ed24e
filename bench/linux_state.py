"""Time saving a Linux guest, beside QEMU: in the rig, by the counted clock.

The guest is Debian's cloud kernel with a shell, 256 MiB of memory and one vCPU; it has filled
TOUCHED MiB of a tmpfs, and runs. All files are in the rig's memory. It measures the time from the
request for a snapshot, or in QEMU for a migration into a file, to its end, and the bytes of the
file; one round of each does not count.

`python -m bench.linux_state [--rounds N] [--touched MIB] [--json FILE]`
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Self

from bench.boot import COMMAND_LINE, MEMORY, ROOT, qemu_stages
from tests import artifacts
from tests.rig.machine import Rig, Stage, project_stages
from tests.system.vmd.daemon import Client, Daemon, vm_block

_MIB = 1 << 20
_PROMPT = b"# "
_LOOK_S = 0.02
_PATIENCE_S = 420.0
_BANDWIDTH = 64 << 30

Times = dict[str, list[float]]


class Guest:
    """A program that shows a guest's console; a context manager that kills it."""

    def __init__(self, arguments: Sequence[str]) -> None:
        """Start it."""
        self._program = subprocess.Popen(
            arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self._program.kill()
        self._program.communicate()

    def type(self, text: bytes) -> None:
        """Type something."""
        os.write(_fd(self._program.stdin), text)

    def wait_for(self, text: bytes) -> None:
        """Wait for output."""
        seen = b""
        while text not in seen:
            data = os.read(_fd(self._program.stdout), 65536)
            if not data:
                raise SystemExit(f"linux_state: a program ended with {seen!r}")
            seen = seen[-len(text) :] + data

    def boot(self, touched: int) -> None:
        """Wait for the shell, and have it touch so many MiB."""
        self.wait_for(_PROMPT)
        self.type(_touch(touched))
        self.wait_for(b"touched")


def _fd(stream: IO[bytes] | None) -> int:
    assert stream
    return stream.fileno()


def _touch(size: int) -> bytes:
    return f"mkdir /t; mount -t tmpfs t /t; yes | head -c {size}M >/t/f; echo tou''ched\n".encode()


class Qemu:
    """QEMU's monitor."""

    def __init__(self, path: Path) -> None:
        """Connect."""
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.connect(str(path))
        self._file = self._socket.makefile("rb")
        self._file.readline()
        self.ask("qmp_capabilities")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self._file.close()
        self._socket.close()

    def ask(self, command: str, **arguments: object) -> dict[str, object]:
        """Send a command; returns its answer."""
        request = {"execute": command, "arguments": arguments}
        self._socket.sendall(json.dumps(request).encode())
        while "return" not in (answer := json.loads(self._file.readline())):
            if "error" in answer:
                raise SystemExit(f"linux_state: QEMU: {answer}")
        told: dict[str, object] = answer["return"]
        return told

    def go_on(self) -> None:
        """Let the guest run again after `save`."""
        while self.ask("query-status")["status"] != "postmigrate":
            time.sleep(_LOOK_S)
        self.ask("cont")

    def save(self, path: Path) -> float:
        """Write the guest into a file; returns the seconds until it is there."""
        capability = {"capability": "events", "state": True}
        self.ask("migrate-set-capabilities", capabilities=[capability])
        self.ask("migrate-set-parameters", **{"max-bandwidth": _BANDWIDTH})
        begun = time.perf_counter()
        self.ask("migrate", uri=f"file:{path}")
        while True:
            told = json.loads(self._file.readline())
            status = told.get("data", {}).get("status")
            if status == "failed":
                raise SystemExit(f"linux_state: QEMU: {told}")
            if status == "completed":
                return time.perf_counter() - begun


def measure(rounds: int, touched: int) -> Times:
    """Measure everything; prints each time as it comes."""
    kernel, image = str(artifacts.kernel("cloud").vmlinuz), str(artifacts.plain_initramfs())
    times: Times = defaultdict(list)

    def note(name: str, took: float, number: int) -> None:
        print(f"{name}: {took:.3f} s{'' if number else ', warming up'}", flush=True)
        if number:
            times[name].append(took)

    with tempfile.TemporaryDirectory(prefix="bench-") as scratch:
        folder = Path(scratch)
        qemu_saved = folder / "qemu.saved"
        qemu = [
            *("qemu-system-x86_64", "-M", "pc", "-accel", "kvm", "-cpu", "host"),
            *("-m", f"{MEMORY // _MIB}M", "-nodefaults", "-no-user-config", "-display", "none"),
            *("-serial", "stdio", "-kernel", kernel, "-initrd", image, "-append", COMMAND_LINE),
        ]
        config = vm_block(
            "vm",
            f'initrd "{image}"',
            f'append "{COMMAND_LINE}"',
            boot=Path(kernel),
            memory=f"{MEMORY // _MIB}M",
        )
        with _daemon(folder / "daemon", config) as (vmd, client):
            _ask(client, "start", name="vm", is_template=True)
            with client.console("vm") as console:
                console.expect(_PROMPT)
                print("the template has booted", flush=True)
                console.type(_touch(touched))
                console.expect(b"touched")
            for number in range(rounds + 1):
                begun = time.perf_counter()
                _ask(client, "snapshot", name="vm", snapshot=f"s{number}")
                note("save: vmd", time.perf_counter() - begun, number)
            saved = next((vmd.socket.parent / "state" / "snapshots").glob(f"*/s{rounds}.snapshot"))
            monitor = folder / "monitor"
            with Guest([*qemu, "-qmp", f"unix:{monitor},server=on,wait=off"]) as guest:
                guest.boot(touched)
                with Qemu(monitor) as told:
                    for number in range(rounds + 1):
                        qemu_saved.unlink(missing_ok=True)
                        note("save: QEMU", told.save(qemu_saved), number)
                        told.go_on()
            for name, path in (("vmd", saved), ("QEMU", qemu_saved)):
                print(f"file: {name}: {path.stat().st_blocks * 512 / _MIB:.1f} MiB", flush=True)
    return times


@contextmanager
def _daemon(folder: Path, config: str) -> Iterator[tuple[Daemon, Client]]:
    folder.mkdir()
    with Daemon(folder, config, is_user=os.geteuid() != 0) as vmd, vmd.client() as client:
        yield vmd, client


def _ask(client: Client, kind: str, **fields: object) -> None:
    answer = client.ask(kind, (), **fields)
    if answer["type"] == "failed":
        raise SystemExit(f"linux_state: {kind}: {answer}")


def table(times: Times) -> str:
    """Return the medians, and the ratio to QEMU's."""
    base = statistics.median(times["save: QEMU"])
    lines = []
    for name, taken in times.items():
        took = statistics.median(taken)
        spread = f"{min(taken):.3f} to {max(taken):.3f}"
        lines.append(f"{name:12}{took:8.3f} s ({spread}) {took / base:8.3f} of QEMU's")
    return "\n".join(lines)


def main() -> int:
    """Measure in the rig, print a table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--touched", type=int, default=16, help="MiB")
    parser.add_argument("--json", type=Path, default=ROOT / "out" / "linux_state.json")
    parser.add_argument("--here", action="store_true", help="on this machine, by its own clock")
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.inside or given.here:
        times = measure(given.rounds, given.touched)
        out = Path(os.environ["RIG_OUT"]) / "times.json" if given.inside else given.json
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(times, indent=1))
        print(table(times), flush=True)
        return 0
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    subprocess.run([sys.executable, "-m", "compileall", "-q", str(ROOT)], check=True)
    inner = [sys.executable, "-m", "bench.linux_state", "--inside"]
    inner += ["--rounds", str(given.rounds), "--touched", str(given.touched)]
    with tempfile.TemporaryDirectory(prefix="bench-") as scratch:
        # See bench/boot: the processor is kept busy, and files that are read are in memory.
        busy = "chrt --idle 0 sh -c 'while :; do :; done' & "
        status = Rig(
            command=("sh", "-c", f"{busy}cd {shlex.quote(str(ROOT))}; {shlex.join(inner)}"),
            memory=6 << 30,
            timeout_s=3600,
            is_counted=True,
            stages=(
                *project_stages(ROOT),
                *qemu_stages(),
                Stage(artifacts.kernel("cloud").vmlinuz),
                Stage(artifacts.plain_initramfs()),
            ),
            out=Path(scratch),
            patience_s=_PATIENCE_S,
        ).run()
        if status == 0:
            given.json.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(Path(scratch) / "times.json", given.json)
    return status


if __name__ == "__main__":
    sys.exit(main())
