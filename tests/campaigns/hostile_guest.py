"""Campaign: the hostile guest of bios/, which writes at random wherever a guest can write.

COUNT accesses are divided among several machines, each with its own seed and in a process of
its own. Each must reach the guest's own end and power off; its process may neither fail, nor
print more than a handful of lines, nor grow, nor leak descriptors.

Any deviation is printed, and the exit status is 1. The same --seed gives the same accesses.
"""

from __future__ import annotations

import argparse
import random
import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from tests.vmctl_driver import ConsoleProcess, ConsoleTimeoutError  # noqa: E402

IMAGE = ROOT / "bios" / "hostile.bin"
MEMORY = 64 << 20
# Log lines that a guest can cause are limited per device: this many are a flood.
LINES_MAX = 100
# Beyond the guest's RAM; an idle machine takes less than 30 MiB.
GROWTH_MAX = 64 << 20
# Accesses per second on the slowest machine that counts: KVM that emulates, shared by others.
SLOWEST_RATE = 5_000


def machine(count: int, seed: int) -> int:
    """Run one machine in this process; return the exit status, and print faults on stderr."""
    # For the child process alone: the campaign itself needs no hypervisor.
    from vmm_kvm.arch.x86.image import open_image  # noqa: PLC0415
    from vmm_kvm.kvm.system import Kvm  # noqa: PLC0415
    from vmm_kvm.kvm.vcpu import install_kick_signal  # noqa: PLC0415
    from vmm_kvm.loop import EventLoop  # noqa: PLC0415
    from vmm_kvm.machine.machine import Machine  # noqa: PLC0415
    from vmm_kvm.machine.spec import Ending, MachineSpec, Outcome  # noqa: PLC0415
    from vmm_kvm.primitives import Vmm  # noqa: PLC0415

    outcomes: list[Outcome] = []
    install_kick_signal()
    spec = MachineSpec(image=open_image(str(IMAGE)), memory_size=MEMORY, name="hostile")
    before = set(Path("/proc/self/fd").iterdir())
    with Kvm() as kvm, Vmm(kvm) as vmm, EventLoop() as loop:

        def end(outcome: Outcome) -> None:
            outcomes.append(outcome)
            loop.call_soon(loop.stop)

        def show(data: bytes) -> None:
            sys.stdout.buffer.write(data)
            sys.stdout.buffer.flush()

        with Machine(
            spec, vmm, loop, transmit=show, on_receive_room=lambda: None, on_outcome=end
        ) as guest:
            guest.fw_cfg.add_file("opt/hostile/count", count.to_bytes(8, "little"))
            guest.fw_cfg.add_file("opt/hostile/seed", seed.to_bytes(8, "little"))
            guest.start()
            loop.run()
    wrong = []
    if outcomes != [Ending.POWER_OFF]:
        wrong.append(f"the guest ended by {outcomes}")
    leaked = set(Path("/proc/self/fd").iterdir()) - before
    if leaked:
        wrong.append(f"descriptors left: {sorted(leaked)}")
    status = Path("/proc/self/status").read_text()
    peak = re.search(r"^VmHWM:\s+(\d+) kB", status, re.MULTILINE)
    if peak is None or int(peak[1]) << 10 > MEMORY + GROWTH_MAX:
        wrong.append(f"peak memory: {peak and peak[1]} KiB")
    for line in wrong:
        print(line, file=sys.stderr)
    return 1 if wrong else 0


def watch(count: int, seed: int) -> list[str]:
    """Run one machine in a child process; return the deviations, a line each."""
    arguments = [sys.executable, __file__, "--machine", str(count), "--seed", str(seed)]
    wrong = []
    with ConsoleProcess(arguments) as process:
        try:
            status = process.wait(60 + count / SLOWEST_RATE)
        except ConsoleTimeoutError as error:
            return [str(error)]
        told = process.errors.decode(errors="replace")
        if status != 0:
            wrong.append(f"exit status {status}: {told[-2000:]}")
        if told.count("\n") > LINES_MAX:
            wrong.append(f"{told.count(chr(10))} lines on standard error")
        if b"hostile: done" not in process.output:
            wrong.append(f"the guest ended early: {process.output[-300:]!r}")
    return wrong


def main(arguments: Sequence[str]) -> int:
    """Run the campaign and print its summary."""
    parser = argparse.ArgumentParser(
        prog="hostile_guest", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--count", type=int, default=10_000_000, help="accesses in all")
    parser.add_argument("--machines", type=int, default=4)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--machine", type=int, help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    if given.machine is not None:
        return machine(given.machine, given.seed)
    chance = random.Random(given.seed)
    deviations = 0
    begun = time.monotonic()
    for number in range(given.machines):
        seed = chance.getrandbits(64)
        wrong = watch(given.count // given.machines, seed)
        deviations += bool(wrong)
        for line in wrong:
            print(f"machine {number}, seed {seed:#x}: {line}", flush=True)
    taken = time.monotonic() - begun
    print(
        f"{given.count:,} accesses by {given.machines} machines in {taken:.0f} s:"
        f" {deviations} deviated"
    )
    return 1 if deviations else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
