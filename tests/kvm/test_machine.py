"""A machine with the self-test guest: pause and resume, outcomes, output collected by KVM."""

import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests import guests
from tests.fakes import FakeClock
from vmm_kvm import primitives
from vmm_kvm.arch.x86.image import FirmwareImage, open_image
from vmm_kvm.bits import MIB
from vmm_kvm.boot.firmware import selftest_path
from vmm_kvm.clock import Clock
from vmm_kvm.devices.uart16550 import Lsr
from vmm_kvm.errors import Refusal, RefusedError
from vmm_kvm.kvm.system import Kvm
from vmm_kvm.kvm.vcpu import install_kick_signal
from vmm_kvm.limits import TABLE_VCPUS_MAX, VCPUS_MAX
from vmm_kvm.loop import EventLoop
from vmm_kvm.machine.machine import Machine
from vmm_kvm.machine.net import NetSpec
from vmm_kvm.machine.spec import (
    Crash,
    DebugExitStatus,
    Ending,
    MachineSpec,
    Outcome,
)
from vmm_kvm.net.paths import StreamPath, Traffic
from vmm_kvm.primitives import VcpuState, Vmm
from vmm_kvm.virtio.console import ConsoleSpec
from vmm_kvm.virtio.rng import RngSpec
from vmm_kvm.virtio.scsi import ScsiCdSpec
from vmm_kvm.virtio.vmmci import VmmciSpec
from vmm_kvm.virtio.vsock import VsockSpec

pytestmark = pytest.mark.kvm

NANOSECONDS = 1_000_000_000
DEADLINE_S = 30


@dataclass
class Bench:
    """A machine on a bench: its loop, its output, its outcome."""

    vmm: Vmm
    loop: EventLoop
    output: bytearray = field(default_factory=bytearray)
    outcomes: list[Outcome] = field(default_factory=list)

    def machine(
        self,
        cpus: int = 1,
        memory_size: int = 16 * MIB,
        clock: Clock | None = None,
        image: Path | None = None,
    ) -> Machine:
        """Build the machine; nothing runs yet."""
        return Machine(
            MachineSpec(
                image=open_image(str(image or selftest_path())),
                memory_size=memory_size,
                cpus=cpus,
                name="bench",
            ),
            self.vmm,
            clock or self.loop,
            transmit=self.output.extend,
            on_receive_room=lambda: None,
            on_outcome=self.outcomes.append,
        )

    def run_until(self, condition: Callable[[], bool], seconds: float = DEADLINE_S) -> bool:
        """Run the loop until `condition` holds; False if it does not in time."""
        end_ns = self.loop.monotonic_ns() + int(seconds * NANOSECONDS)

        def look() -> None:
            if condition() or self.loop.monotonic_ns() >= end_ns:
                self.loop.stop()
            else:
                timer.arm(self.loop.monotonic_ns() + 5_000_000)

        timer = self.loop.timer(look)
        timer.arm(0)
        self.loop.run()
        return condition()

    def says(self, text: bytes, seconds: float = DEADLINE_S) -> bool:
        """Run the loop until the guest has printed `text`."""
        return self.run_until(lambda: text in self.output, seconds)


@pytest.fixture
def bench() -> Iterator[Bench]:
    """A bench whose loop and /dev/kvm are closed afterwards."""
    install_kick_signal()
    with Kvm() as kvm, Vmm(kvm) as vmm, EventLoop() as loop:
        yield Bench(vmm, loop)


@pytest.mark.parametrize("cpus", [1, 3])
def test_pause_and_resume(bench: Bench, cpus: int) -> None:
    """While paused no vCPU runs and nothing is printed; afterwards the guest continues."""
    with bench.machine(cpus) as machine:
        machine.start()
        assert bench.says(b"selftest: ready")
        machine.uart.receive(b"n")
        assert bench.says(b"\n1")
        machine.pause()
        printed = bytes(bench.output)
        assert not bench.run_until(lambda: bytes(bench.output) != printed, 1.5)
        machine.resume()
        assert bench.says(b"\n3")
        machine.uart.receive(b"xp")
        machine.pause()
        machine.resume()
        bench.run_until(lambda: bool(bench.outcomes), 5)


def test_loopback_after_output(bench: Bench, tmp_path: Path) -> None:
    """A byte in loopback is there at the guest's next read of LSR, whatever it printed before."""
    image = tmp_path / "firmware.bin"
    image.write_bytes(guests.firmware(guests.printing(3) + guests.LOOP_BACK))
    with bench.machine(image=image) as machine:
        machine.start()
        assert bench.run_until(lambda: bool(bench.outcomes))
    lsr = Lsr.THRE | Lsr.TEMT | Lsr.DR
    assert bench.outcomes == [DebugExitStatus(lsr << 8 | 0x5A)]
    assert bench.output == b"\3\2\1"


def test_a_pause_shows_all_that_was_printed(bench: Bench, tmp_path: Path) -> None:
    """Output that KVM has collected is delivered at a pause, without a timer."""
    image = tmp_path / "firmware.bin"
    image.write_bytes(guests.firmware(guests.printing(9) + guests.SPIN))
    clock = FakeClock()  # whose timers do not fire
    with bench.machine(clock=clock, image=image) as machine:
        machine.start()
        time.sleep(0.5)
        assert len(bench.output) < 9
        machine.pause()
        assert bytes(range(9, 0, -1)) == bench.output


def test_pause_a_spinning_guest(bench: Bench) -> None:
    """A guest that spins with interrupts off can be paused, resumed and ended."""
    with bench.machine() as machine:
        machine.start()
        assert bench.says(b"selftest: ready")
        machine.uart.receive(b"s")
        assert bench.says(b"spin")
        for _ in range(20):
            machine.pause()
            machine.resume()
    assert bench.outcomes == []


def test_power_button(bench: Bench) -> None:
    """The guest powers itself off when the button is pressed."""
    with bench.machine() as machine:
        machine.start()
        assert bench.says(b"selftest: ready")
        machine.press_power_button()
        assert bench.run_until(lambda: bool(bench.outcomes))
    assert bench.outcomes == [Ending.POWER_OFF]


def test_only_the_first_outcome_counts(bench: Bench) -> None:
    """A machine ends once, and its threads end with it."""
    with bench.machine(cpus=2) as machine:
        machine.start()
        assert bench.says(b"selftest: ready")
        machine.uart.receive(b"c")
        assert bench.run_until(lambda: bool(bench.outcomes))
        machine.press_power_button()
    assert bench.outcomes == [Crash("bench: the guest panicked")]
    assert [t.name for t in threading.enumerate() if t.name.startswith("vcpu")] == []


def test_a_machine_that_never_starts(bench: Bench) -> None:
    """A machine can be built and closed without running."""
    with bench.machine() as machine:
        machine.close()
        machine.close()


def test_a_machine_has_the_only_copy_of_its_firmware(bench: Bench) -> None:
    """What was read from the file is forgotten: firmware has up to 16 MiB, in each VM's process."""
    forgotten: list[int] = []

    class Contents(bytes):
        def __del__(self) -> None:
            forgotten.append(len(self))

    image = open_image(str(selftest_path()))
    assert isinstance(image, FirmwareImage)
    with Machine(
        MachineSpec(image=image._replace(rom=Contents(image.rom)), memory_size=16 * MIB),
        bench.vmm,
        bench.loop,
        transmit=bench.output.extend,
        on_receive_room=lambda: None,
        on_outcome=bench.outcomes.append,
    ) as machine:
        assert forgotten == [image.size]
        assert isinstance(machine.spec.image, FirmwareImage)
        assert machine.spec.image.rom == image.rom


def test_more_vcpus_than_kvm_allows(bench: Bench) -> None:
    """The error names the limit of vCPUs."""
    limit = min(VCPUS_MAX, bench.vmm.kvm.max_vcpus)
    with pytest.raises(RefusedError, match=rf"^{limit + 1} vCPUs: not 1 to {limit}$"):
        bench.machine(cpus=limit + 1)


def test_a_machine_is_a_vm_of_the_table(bench: Bench) -> None:
    """The table reports the machine as vmm(4) does, and can end it before it is closed."""
    with bench.machine(cpus=2) as machine:
        told = machine.info()
        assert [vm for vm in primitives.info(bench.vmm) if vm.id is not None] == [told]
        assert (told.name, told.ncpus, told.memory_size) == ("bench", 2, 16 * MIB)
        assert 0 < told.used_size <= told.memory_size
        machine.start()
        assert bench.says(b"selftest: ready")
        machine.pause()
        assert machine.info().vcpu_states == (VcpuState.STOPPED, VcpuState.STOPPED)
        machine.resume()
        machine.uart.receive(b"p")
        assert bench.run_until(lambda: bool(bench.outcomes))
        machine.resume()
        machine.pause()
        assert machine.info().vcpu_states == (VcpuState.TERMINATED, VcpuState.TERMINATED)
    assert [vm for vm in primitives.info(bench.vmm) if vm.id is not None] == []


def test_what_vmm_refuses_no_machine_has(bench: Bench) -> None:
    """A table refuses more vCPUs than vmm(4) allows, and nothing is left of the machine."""
    with ExitStack() as stack:
        most = min(VCPUS_MAX, bench.vmm.kvm.max_vcpus)
        for _ in range(TABLE_VCPUS_MAX // most):
            stack.enter_context(bench.machine(cpus=most, memory_size=MIB))
        with pytest.raises(RefusedError) as caught:
            stack.enter_context(bench.machine(cpus=most, memory_size=MIB))
        assert caught.value.refusal is Refusal.ENOMEM
    assert bench.vmm.vms == {}


def test_devices_lie_in_openbsds_order(bench: Bench) -> None:
    """Devices keep one order: entropy, interfaces, disks, drive, console, vsock, vmmci."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        net = NetSpec(b"\xfe\xe1\xbb\0\0\1", StreamPath(ours.fileno(), Traffic()), "net")
        devices = (VmmciSpec(), VsockSpec(), ConsoleSpec(), ScsiCdSpec(None), net, RngSpec())
        spec = MachineSpec(
            image=open_image(str(selftest_path())), memory_size=16 * MIB, devices=devices
        )
        with Machine(
            spec,
            bench.vmm,
            bench.loop,
            transmit=bench.output.extend,
            on_receive_room=lambda: None,
            on_outcome=bench.outcomes.append,
        ) as machine:
            ids = [machine.pci.read_ecam(slot << 15, 4) for slot in range(8)]
            assert not machine.press_power_button()
    virtio = [0x1AF4 | 0x1040 + number << 16 for number in (4, 1, 8, 3, 19)]
    assert ids[1:] == [*virtio, 0x0777_0B5D, 0xFFFF_FFFF]


def test_a_machine_without_vmmci(bench: Bench) -> None:
    """A machine has the devices of its specification, and can be paused without any."""
    spec = MachineSpec(image=open_image(str(selftest_path())), memory_size=16 * MIB, devices=())
    with Machine(
        spec,
        bench.vmm,
        bench.loop,
        transmit=bench.output.extend,
        on_receive_room=lambda: None,
        on_outcome=bench.outcomes.append,
    ) as machine:
        machine.start()
        assert bench.says(b"selftest: ready")
        machine.pause()
        machine.resume()
        machine.press_power_button()
        assert bench.run_until(lambda: bool(bench.outcomes))
    assert bench.outcomes == [Ending.POWER_OFF]
