"""Time a Debian guest beside QEMU's, in the rig: boots, saving, restoring, clones, fresh machines.

The guest is Debian 13 on a disk: systemd, the agent, a root shell on the console, 512 MiB of
memory, one vCPU; it has read the files of /usr/bin before it is saved. Files are in the rig's
memory.

- cold: from the start of `vmctl run`, or of QEMU, to the shell's prompt;
- save: from the request for a snapshot without disks, or a migration into a file, to its end;
- restore: from the start of `vmctl run --from`, of `vmctl start -c --from` with a daemon that runs,
  or of QEMU with `-incoming file:`, to the reply of the shell;
- clone: from the request to clone a template to the reply of the clone's shell;
- fresh: a machine of the pytest plugin's and `succeed("true")`, beside a reply after QEMU's
  `-loadvm`.

The programs take turns; the first round does not count. Each time is the clock's, and that of the
rig's only processor, which others on the machine do not change.

`python -m bench.debian [--rounds N] [--only REGEX]`
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NamedTuple

from bench.boot import ROOT, qemu_stages
from bench.debian_disk import APPEND, PROMPT, Guest, make
from bench.fresh import guest_share, process_of
from bench.linux_state import Qemu
from tests.rig.machine import Rig, Stage, processor_ns, project_stages
from tests.vmctl_driver import ConsoleProcess
from vmctl.client import Client
from vmctl.guest.agent import AgentError
from vmm_pytest.run import Run
from vmm_pytest.templates import Template, run_vmctl

_MIB = 1 << 20
_MEMORY_MIB = 512
_VMCTL = str(ROOT / ".venv" / "bin" / "vmctl")
_BOOT_S, _REPLY_S = 600.0, 120.0
_ASK, _REPLY = "echo re''ply\n", "reply"
_WARM = "cat /usr/bin/* >/dev/null; sync"
_SNAPSHOT = "ready"
_PAUSE_S = 3.0  # the daemon prepares the next process meanwhile
_RIG_S, _PATIENCE_S = 1500.0, 600.0


class Times(NamedTuple):
    """Seconds of one try."""

    clock: float
    processor: float


class Watch:
    """A stop watch, by the clock and by the rig's processor."""

    def __init__(self) -> None:
        """Start it."""
        self._began = time.perf_counter(), processor_ns()

    def read(self) -> Times:
        """Return what has passed."""
        clock, processor = self._began
        return Times(time.perf_counter() - clock, (processor_ns() - processor) / 1e9)


class Book:
    """All times by their names."""

    def __init__(self) -> None:
        """Begin."""
        self._times: dict[str, list[Times]] = defaultdict(list)

    def note(self, name: str, times: Times, *, counts: bool = True) -> None:
        """Print a time, and keep it if it counts."""
        ending = "" if counts else ", warming up"
        print(f"{name}: {times.clock:.3f} s, {times.processor:.3f} s{ending}", flush=True)
        if counts:
            self._times[name].append(times)

    def table(self) -> str:
        """Return medians, and ratios to QEMU's."""
        lines = []
        for name, taken in sorted(self._times.items()):
            kind, _, program = name.partition(": ")
            base = self._times.get(f"{'restore' if kind == 'clone' else kind}: QEMU", [])
            line = f"{name:24}"
            for what in Times._fields:
                took = _p50(taken, what)
                line += f"  {what} {took:8.3f} s"
                if base and program != "QEMU":
                    line += f" {took / _p50(base, what):6.3f}"
            lines.append(line)
        return "\n".join(lines)


def _p50(times: Sequence[Times], what: str) -> float:
    return float(statistics.median(getattr(one, what) for one in times))


def _qemu(guest: Guest, disk: Path) -> list[str]:
    return [
        *("qemu-system-x86_64", "-M", "pc", "-accel", "kvm", "-cpu", "host"),
        *("-m", f"{_MEMORY_MIB}M", "-nodefaults", "-no-user-config", "-display", "none"),
        *("-no-reboot", "-serial", "stdio", "-device", "virtio-rng-pci"),
        *("-drive", f"if=virtio,format=qcow2,file={disk}"),
        *("-kernel", str(guest.vmlinuz), "-initrd", str(guest.initrd), "-append", APPEND),
    ]


def _boot(words: Sequence[str], then: Callable[[ConsoleProcess], None] | None = None) -> Times:
    """Boot a program's guest to its prompt."""
    watch = Watch()
    with ConsoleProcess(words) as guest:
        guest.expect(re.escape(PROMPT), _BOOT_S)
        times = watch.read()
        if then:
            then(guest)
    return times


def _restored(words: Sequence[str], *, asks_again: bool = False) -> Times:
    """Start a saved guest, and ask its shell.

    QEMU's serial port forgets what comes before the guest runs, so it is asked again.
    """
    watch = Watch()
    with ConsoleProcess(words) as guest:
        guest.send(_ASK)
        while True:
            try:
                guest.expect(_REPLY, 0.05 if asks_again else _REPLY_S)
            except AssertionError:
                if not asks_again or watch.read().clock > _REPLY_S:
                    raise
                guest.send(_ASK)
            else:
                return watch.read()


def _cloned(template: Template, name: str) -> Times:
    watch = Watch()
    with Client(template.run.daemon) as client:
        (vm,) = client.ask("clone", "cloned", {"name": template.name, "clone": name, "count": 1})[
            "vms"
        ]
        if vm["code"]:
            raise SystemExit(f"debian: {vm}")
        with client.console(name) as console:
            console.write(_ASK)
            console.expect(_REPLY, _REPLY_S)
        times = watch.read()
        client.stop(name, force=True)
    return times


def _fresh(template: Template) -> Times:
    watch = Watch()
    steps = []
    machine = template.clone(on_made=lambda _: steps.append(("made", watch.read())))
    steps.append(("renewed", watch.read()))
    try:
        machine.succeed("true")
        times = watch.read()
        pid = process_of(template.run, machine.name)
        for name, step in steps:
            print(f"  {name} after {step.clock:.3f} s, {step.processor:.3f} s")
        guest, faults = guest_share(pid)
        print(f"  guest {guest:.2f} s, {faults} page faults of its process")
    finally:
        machine.close()
    return times


@contextmanager
def _saved_by_qemu(guest: Guest, folder: Path, rounds: int, book: Book) -> Iterator[list[str]]:
    """Boot QEMU's guest, and save it both ways; yields the words of QEMU without its disk."""
    disk, monitor, saved = folder / "qemu.qcow2", folder / "qmp", folder / "qemu.saved"
    base = ["-b", str(guest.disk), "-F", "raw", str(disk)]
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", *base], check=True)

    def save(console: ConsoleProcess) -> None:
        console.send(f"{_WARM}; echo wa''rm\n")
        console.expect("warm", _BOOT_S)
        console.expect(re.escape(PROMPT), _BOOT_S)
        with Qemu(monitor) as told:
            command = {"command-line": f"savevm {_SNAPSHOT}"}
            if said := told.ask("human-monitor-command", **command):
                raise SystemExit(f"debian: QEMU: {said}")
            for number in range(rounds + 1):
                saved.unlink(missing_ok=True)
                watch = Watch()
                told.save(saved)
                book.note("save: QEMU", watch.read(), counts=bool(number))
                told.go_on()
        size = saved.stat().st_blocks * 512 / _MIB
        print(f"save: QEMU: {size:.1f} MiB", flush=True)

    words = _qemu(guest, disk)
    qmp = ["-qmp", f"unix:{monitor},server=on,wait=off"]
    book.note("cold: QEMU", _boot([*words, *qmp], save))
    yield words


def measure(guest: Guest, rounds: int, only: re.Pattern[str]) -> None:
    """Measure everything, and print a table."""
    book = Book()
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="bench-")))
        run = stack.enter_context(Run())
        saved = folder / "ours.snapshot"
        template = _template(run, guest, folder)
        with Client(run.daemon) as client:
            for number in range(rounds + 1):
                saved.unlink(missing_ok=True)
                with saved.open("xb") as file:
                    watch = Watch()
                    fields = {"name": template.name, "without_disks": True, "file": 0}
                    client.ask("snapshot", "done", fields, [file.fileno()])
                    book.note("save: vmd", watch.read(), counts=bool(number))
            size = saved.stat().st_blocks * 512 / _MIB
            print(f"save: vmd: {size:.1f} MiB", flush=True)
            client.pause(template.name)
        qemu = stack.enter_context(_saved_by_qemu(guest, folder, rounds, book))
        incoming = [*qemu, "-snapshot", "-incoming", f"file:{folder / 'qemu.saved'}"]
        tries: dict[str, Callable[[], Times]] = {
            "fresh: plugin": lambda: _fresh(template),
            "fresh: QEMU": lambda: _restored([*qemu, "-loadvm", _SNAPSHOT], asks_again=True),
            "restore: QEMU": lambda: _restored(incoming, asks_again=True),
            "clone: vmd": lambda: _cloned(template, run.new_name()),
        }
        _turns(tries, rounds, only, book)
        with Client(run.daemon) as client:
            client.stop(template.name, force=True)

        def started() -> Times:
            name = run.new_name()
            environment = {"VMD_SOCKET": run.daemon}
            words = ["env", *(f"{key}={value}" for key, value in environment.items()), _VMCTL]
            times = _restored([*words, "start", "-c", "--from", str(saved), name])
            with Client(run.daemon) as client:
                client.stop(name, force=True)
            return times

        tries = {
            "restore: QEMU": lambda: _restored(incoming, asks_again=True),
            "restore: vmctl run": lambda: _restored([_VMCTL, "run", "--from", str(saved)]),
            "restore: vmctl start": started,
        }
        _turns(tries, rounds, only, book)
        if only.search("cold: vmctl run"):
            words = [_VMCTL, "run", "-m", f"{_MEMORY_MIB}M", "-b", str(guest.vmlinuz)]
            words += ["--initrd", str(guest.initrd), "--append", APPEND]
            words += ["-d", f"raw:{guest.disk},snapshot", "--vsock", str(folder / "vsock")]
            book.note("cold: vmctl run", _boot(words))
    print(book.table(), flush=True)


def _template(run: Run, guest: Guest, folder: Path) -> Template:
    """Return a template that still runs, on a disk of its own."""
    name, disk = run.new_name(), folder / "ours.raw"
    subprocess.run(["cp", "--sparse=always", guest.disk, disk], check=True)
    words = ["start", "--template", "--vsock", "auto", "-m", f"{_MEMORY_MIB}M"]
    words += ["-b", str(guest.vmlinuz), "--initrd", str(guest.initrd), "--append", APPEND]
    run_vmctl(run, *words, "-d", f"raw:{disk}", name, seconds=_BOOT_S)
    agent, until = run.agent_of(name), time.monotonic() + _BOOT_S
    while True:
        try:
            agent.run(["/bin/sh", "-c", _WARM], timeout=_BOOT_S)
        except AgentError:  # not yet there
            if time.monotonic() > until:
                raise
            time.sleep(1)
        else:
            break
    print("the template is ready", flush=True)
    return Template(run, name, run.agent_of, _BOOT_S)


def _turns(
    tries: dict[str, Callable[[], Times]], rounds: int, only: re.Pattern[str], book: Book
) -> None:
    for number in range(rounds + 1):
        for name, one in tries.items():
            if only.search(name):
                time.sleep(_PAUSE_S)
                book.note(name, one(), counts=bool(number))


def main() -> int:
    """Measure in the rig."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", default="", help="regular expression")
    parser.add_argument("--inside", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.inside:
        folder = given.inside
        guest = Guest(folder / "debian.raw", folder / "vmlinuz", folder / "initrd")
        measure(guest, given.rounds, re.compile(given.only))
        return 0
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    subprocess.run([sys.executable, "-m", "compileall", "-q", str(ROOT)], check=True)
    with tempfile.TemporaryDirectory(prefix="bench-") as scratch:
        guest = make(Path(scratch))
        inner = [sys.executable, "-m", "bench.debian", "--inside", scratch]
        inner += ["--rounds", str(given.rounds), "--only", given.only]
        return Rig(
            command=("sh", "-c", f"cd {shlex.quote(str(ROOT))}; {shlex.join(inner)}"),
            cpus=1,
            memory=6 << 30,
            timeout_s=_RIG_S,
            copies_words=True,
            stages=(*project_stages(ROOT), *qemu_stages(), *(Stage(path) for path in guest)),
            patience_s=_PATIENCE_S,
        ).run()


if __name__ == "__main__":
    sys.exit(main())
