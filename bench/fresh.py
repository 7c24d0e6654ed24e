"""Time a fresh machine for a test: Debian's cloud kernel with an agent, ours beside QEMU's.

- ours: what the pytest plugin's fixture `vm` and `vm.succeed("true")` do: a clone of a paused
  template, which its agent makes another machine (entropy, clock, identity), and a command;
- QEMU: `qemu-system-x86_64 -M pc -loadvm` of a guest with the same kernel, initramfs, command line
  and memory, until its shell, which stood at its prompt, has run `true`. It stays the machine that
  was saved: the same random numbers, clock and names.

The two take turns. Each time is the clock's, and that of the rig's only processor, which others on
the machine do not change. The guest's share is the time in which the processor ran the guest.

`tests/rig/rig run --copy-words --cpus 1 --mem 4096 --project -- .venv/bin/python -m bench.fresh`
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import socket
import statistics
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple, TextIO

from tests import artifacts
from tests.guest.agent_guest import APPEND, initramfs
from tests.guest.linux_guest import COMMAND_LINE
from tests.rig.machine import processor_ns
from tests.vmctl_driver import ConsoleProcess
from vmctl.client import Client
from vmm_pytest.run import Run
from vmm_pytest.templates import Template, Templates

_MEMORY_MIB = 256
_BOOT_S = 300.0
_PROMPT = "~ # "
_SNAPSHOT = "ready"
_AGENT_S = 5.0  # until an agent that begins with the prompt serves
_FAULTS, _GUEST_TIME = 10, 43  # fields of /proc/PID/stat: proc(5)


class Times(NamedTuple):
    """Seconds of one machine."""

    clock: float
    processor: float
    guest: float
    """In which its vCPU ran the guest."""
    faults: float
    """Of its process, the guest's first touches of pages included."""


class Guest(NamedTuple):
    """What both boot."""

    kernel: Path
    initrd: Path
    append: str


def main() -> None:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    with TemporaryDirectory(prefix="bench-") as scratch, Run() as run:
        folder = Path(scratch)
        guest = _guest(folder)
        template = Templates(run, run.agent_of, folder).get(
            kernel=guest.kernel,
            initrd=guest.initrd,
            append=guest.append,
            memory=f"{_MEMORY_MIB}M",
            timeout=_BOOT_S,
        )
        print("the template is ready", flush=True)
        words = _qemu(guest, folder)
        _save(words, folder)
        print("QEMU's snapshot is saved", flush=True)
        ours, theirs = [], []
        for number in range(options.rounds + 1):
            pair = _ours(template), _theirs(words)
            for name, times in zip(("ours", "QEMU"), pair, strict=True):
                print(_line(name, [times]), flush=True)
            if number:  # the first one fills caches
                ours.append(pair[0])
                theirs.append(pair[1])
    print(_line("ours, p50", ours))
    print(_line("QEMU -loadvm, p50", theirs))
    for what in ("clock", "processor"):
        mine, others = (_p50(times, what) for times in (ours, theirs))
        print(f"ours / QEMU by the {what}: {mine / others:.3f}")


def _p50(times: Sequence[Times], what: str) -> float:
    return float(statistics.median(getattr(one, what) for one in times))


def _line(name: str, times: Sequence[Times]) -> str:
    return (
        f"{name}: {_p50(times, 'clock'):.2f} s, processor {_p50(times, 'processor'):.2f} s, "
        f"of which guest {_p50(times, 'guest'):.2f} s, {_p50(times, 'faults'):.0f} page faults"
    )


def _guest(folder: Path) -> Guest:
    """Return the guest, with its files in the rig's memory."""
    kernel = artifacts.kernel("cloud")
    copy = folder / "vmlinuz"
    shutil.copy(kernel.vmlinuz, copy)
    return Guest(copy, initramfs(kernel, folder / "initrd"), f"{COMMAND_LINE} {APPEND}")


def _times(clock: float, processor: int, pid: int) -> Times:
    """Return what has passed since both began, and the guest's share of that process."""
    clock, used = time.perf_counter() - clock, processor_ns() - processor
    return Times(clock, used / 1e9, *guest_share(pid))


def guest_share(pid: int) -> tuple[float, int]:
    """Return the seconds in which a process ran its guest, and its page faults."""
    # The fields behind the name begin with the third.
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    guest = int(fields[_GUEST_TIME - 3]) / os.sysconf("SC_CLK_TCK")
    return guest, int(fields[_FAULTS - 3])


def _ours(template: Template) -> Times:
    clock, processor = time.perf_counter(), processor_ns()
    machine = template.clone()
    try:
        machine.succeed("true")
        times = _times(clock, processor, process_of(template.run, machine.name))
    finally:
        machine.close()
    return times


def _theirs(words: list[str]) -> Times:
    clock, processor = time.perf_counter(), processor_ns()
    with ConsoleProcess([*words, "-loadvm", _SNAPSHOT]) as guest:
        guest.send("true && echo do''ne\n")
        guest.expect("done", _BOOT_S)
        return _times(clock, processor, guest.pid)


def process_of(run: Run, name: str) -> int:
    """Return the pid of a VM of a run."""
    with Client(run.daemon) as client:
        vm = client.vm(name)
        assert vm is not None
        assert vm.pid is not None
        return vm.pid


def _qemu(guest: Guest, folder: Path) -> list[str]:
    """Return QEMU's command line; its snapshot goes to an image without a device."""
    image = folder / "state.qcow2"
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", image, "1M"], check=True)
    return [
        *("qemu-system-x86_64", "-M", "pc", "-accel", "kvm", "-cpu", "host"),
        *("-m", f"{_MEMORY_MIB}M", "-nodefaults", "-no-user-config", "-display", "none"),
        *("-no-reboot", "-serial", "stdio", "-drive", f"if=none,format=qcow2,file={image}"),
        *("-kernel", str(guest.kernel), "-initrd", str(guest.initrd)),
        *("-append", guest.append),
    ]


def _save(words: list[str], folder: Path) -> None:
    """Boot the guest to its prompt, and save it."""
    path = folder / "qmp"
    with ConsoleProcess([*words, "-qmp", f"unix:{path},server=on,wait=off"]) as guest:
        guest.expect(_PROMPT, _BOOT_S)
        time.sleep(_AGENT_S)
        guest.send("true\n")
        guest.expect(_PROMPT, _BOOT_S)
        with socket.socket(socket.AF_UNIX) as control:
            control.settimeout(_BOOT_S)
            control.connect(str(path))
            with control.makefile("rw") as stream:
                _ask(stream, "qmp_capabilities")
                line = {"command-line": f"savevm {_SNAPSHOT}"}
                if said := _ask(stream, "human-monitor-command", line):
                    raise SystemExit(f"fresh: QEMU: {said}")


def _ask(stream: TextIO, command: str, arguments: dict[str, str] | None = None) -> object:
    """Ask QEMU's monitor; returns its answer, and passes over events."""
    stream.write(json.dumps({"execute": command, "arguments": arguments or {}}) + "\n")
    stream.flush()
    for line in stream:
        answer = json.loads(line)
        if "error" in answer:
            raise SystemExit(f"fresh: QEMU: {answer['error']}")
        if "return" in answer:
            return answer["return"]
    raise SystemExit("fresh: QEMU has ended")


if __name__ == "__main__":
    main()
