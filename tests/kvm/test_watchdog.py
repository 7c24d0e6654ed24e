"""The watchdog of a machine: it waits with the vCPUs, and the next machine knows of its bite."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests import guests
from tests.vmctl_driver import vmctl_run
from vmm_kvm.arch.x86.image import open_firmware
from vmm_kvm.bits import MIB
from vmm_kvm.kvm.system import Kvm
from vmm_kvm.kvm.vcpu import install_kick_signal
from vmm_kvm.loop import EventLoop
from vmm_kvm.machine.machine import Machine
from vmm_kvm.machine.spec import BASIC_DEVICES, Ending, MachineSpec, Outcome
from vmm_kvm.pci.i6300esb import WatchdogSpec
from vmm_kvm.primitives import Vmm

pytestmark = pytest.mark.kvm

SECOND = 1_000_000_000
DEADLINE_S = 30
END_STATUS = 42 << 1 | 1


@pytest.mark.parametrize("how", ["one held", "throttled"])
def test_it_waits_while_the_guest_cannot_run(how: str, tmp_path: Path) -> None:
    """It bites after two seconds in which the guest could have run, and not before."""
    image = tmp_path / "firmware"
    image.write_bytes(guests.firmware(guests.hanging(2)))
    outcomes: list[Outcome] = []
    install_kick_signal()
    with Kvm() as kvm, Vmm(kvm) as vmm, EventLoop() as loop:
        spec = MachineSpec(
            image=open_firmware(str(image)),
            memory_size=16 * MIB,
            cpus=2,
            devices=(*BASIC_DEVICES, WatchdogSpec()),
        )

        def ended(outcome: Outcome) -> None:
            outcomes.append(outcome)
            loop.call_soon(loop.stop)

        def run(seconds: float) -> None:
            timer = loop.timer(loop.stop)
            timer.arm(loop.monotonic_ns() + int(seconds * SECOND))
            loop.run()
            timer.cancel()

        with Machine(
            spec,
            vmm,
            loop,
            transmit=lambda _data: None,
            on_receive_room=lambda: None,
            on_outcome=ended,
        ) as machine:
            stops: dict[str, Callable[[bool], None]] = {
                "one held": lambda stops: machine.hold((1,) if stops else ()),
                "throttled": machine.throttle,
            }
            machine.start()
            run(0.2)
            stops[how](True)
            run(3)
            assert (outcomes, machine.has_timed_out) == ([], False)
            stops[how](False)
            run(DEADLINE_S)
            assert (outcomes, machine.has_timed_out) == ([Ending.REBOOT], True)


def test_the_guest_learns_who_has_reset_it(tmp_path: Path) -> None:
    """The machine after the reset has a watchdog that has timed out."""
    image = tmp_path / "firmware"
    image.write_bytes(guests.firmware(guests.hanging_once(2)))
    done = subprocess.run(
        vmctl_run("--firmware", image, "-m", "16M", "--watchdog", "--timeout", str(DEADLINE_S)),
        check=False,
        capture_output=True,
        stdin=subprocess.DEVNULL,
        timeout=2 * DEADLINE_S,
    )
    assert done.returncode == END_STATUS
    assert b"watchdog: the guest hangs, and is reset" in done.stderr
