"""Unmodified Debian kernels under `vmctl run`: the machine that they find, and their ends."""

from __future__ import annotations

import signal
from collections.abc import Callable

import pytest

from tests import artifacts
from tests.guest.linux_guest import GIB, MIB, Report, ours
from tests.vmctl_driver import ConsoleTimeoutError

pytestmark = [pytest.mark.guest, pytest.mark.slow, pytest.mark.timeout(600)]

QemuReport = Callable[[artifacts.Kernel], Report]

# A `struct page` for each page of RAM, and hash tables that grow with it.
KERNEL_SHARE_OF_RAM = 0.025
# With memory above 4 GiB the kernel reserves buffers for devices that cannot reach it.
BOUNCE_BUFFERS = 64 * MIB


@pytest.mark.parametrize(
    ("cpus", "memory"), [(1, 128 * MIB), (2, 256 * MIB), (4, 5 * GIB)], ids=["1", "2", "4"]
)
def test_a_kernel_sees_the_machine_that_was_asked_for(
    kernel: artifacts.Kernel, cpus: int, memory: int, qemu_report: QemuReport
) -> None:
    """The guest finds its vCPUs and memory, complains no more than QEMU's, and powers off."""
    with ours(kernel, "report", cpus=cpus, memory=memory) as guest:
        guest.expect("report: end")
        status = guest.wait()
    report = Report.parse(guest.output.decode("latin-1"))
    theirs = qemu_report(kernel)
    assert status == 0, guest.errors
    assert guest.errors == b""
    assert report.release == kernel.release
    assert report.nproc == cpus
    # The ranges leave out addresses from 640 KiB to 1 MiB, and tables.
    assert memory - MIB <= report.ram <= memory
    taken_by_kernel = theirs.ram - theirs.memory + KERNEL_SHARE_OF_RAM * memory
    if memory > 4 * GIB:
        taken_by_kernel += BOUNCE_BUFFERS
    assert memory - taken_by_kernel <= report.memory <= memory
    assert report.complaints - theirs.complaints == frozenset()


def test_power_off_exits_with_0(cloud_kernel: artifacts.Kernel) -> None:
    """If a guest powers off by ACPI, the command ends with status 0 and prints nothing."""
    with ours(cloud_kernel, "poweroff") as guest:
        assert guest.wait() == 0, guest.errors
    assert guest.errors == b""
    assert b"init: up" in guest.output


@pytest.mark.parametrize("way", ["a", "k", "t", "p"])
def test_each_way_to_reboot_is_one(cloud_kernel: artifacts.Kernel, way: str) -> None:
    """ACPI, the keyboard controller, a triple fault and 0xcf9 all end a run with --no-reboot.

    Some kernels reboot by a triple fault, but it looks like a crash: status 1.
    """
    with ours(cloud_kernel, f"reboot reboot={way}", options=["--no-reboot"]) as guest:
        guest.expect("init: up")
        status = guest.wait()
    assert status == (1 if way == "t" else 0), guest.errors


def test_a_reboot_stays_in_the_process(kernel: artifacts.Kernel) -> None:
    """A guest that reboots boots again, in the same process, and can then power off."""
    with ours(kernel, "shell") as guest:
        guest.expect("# ")
        guest.send("reboot -f\n")
        guest.expect("init: up")
        guest.expect("# ")
        guest.send("poweroff -f\n")
        assert guest.wait() == 0, guest.errors
    assert guest.output.count(b"init: up") == 2


def test_sigterm_presses_the_power_button(kernel: artifacts.Kernel) -> None:
    """SIGTERM presses the guest's ACPI power button; if the guest obeys, the status is 0."""
    with ours(kernel, "button", cpus=2) as guest:
        guest.expect("init: waiting for the button")
        guest.signal(signal.SIGTERM)
        assert guest.wait() == 0, guest.errors
    assert b"init: power button" in guest.output


def test_a_panic_is_a_crash(kernel: artifacts.Kernel) -> None:
    """If a guest's kernel panics, pvpanic reports it; the status is 1, with one line about it."""
    with ours(kernel, "panic") as guest:
        assert guest.wait() == 1
    assert b"init: up" in guest.output
    (line,) = guest.errors.decode().splitlines()
    assert line.startswith("vmctl: ")
    assert "panic" in line


def test_a_guest_that_does_not_end_times_out(cloud_kernel: artifacts.Kernel) -> None:
    """--timeout ends a running guest with status 124, at any stage of its boot."""
    with ours(cloud_kernel, "idle", options=["--timeout", "10"]) as guest:
        assert guest.wait() == 124


def test_a_second_sigterm_kills(cloud_kernel: artifacts.Kernel) -> None:
    """A second SIGTERM kills a guest that ignores the power button.

    A signal that comes while the same one is pending is lost, so the test waits after the first.
    """
    with ours(cloud_kernel, "idle") as guest:
        guest.expect("init: idle")
        guest.signal(signal.SIGTERM)
        with pytest.raises(ConsoleTimeoutError):
            guest.wait(timeout_s=3)
        guest.signal(signal.SIGTERM)
        assert guest.wait() == 143


def test_the_console_takes_input(cloud_kernel: artifacts.Kernel) -> None:
    """Piped input reaches the guest's shell, and every byte of its output comes back."""
    with ours(cloud_kernel, "shell") as guest:
        guest.expect("# ")
        guest.send("stty -onlcr; seq 1 500; poweroff -f\n")
        assert guest.wait() == 0, guest.errors
    expected = "".join(f"{number}\n" for number in range(1, 501))
    assert expected in guest.output.decode("latin-1")
