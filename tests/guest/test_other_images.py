"""Guests that are not Linux: memtest86+, a bzImage, and SeaBIOS, a flat firmware image."""

from __future__ import annotations

import pytest

from tests import artifacts
from tests.vmctl_driver import ConsoleProcess, vmctl_run

pytestmark = [pytest.mark.guest, pytest.mark.slow, pytest.mark.timeout(300)]


def test_memtest_starts_its_test_on_the_serial_console() -> None:
    """memtest86+ shows its screen and the progress of its first test on ttyS0."""
    arguments = vmctl_run(
        *("-m", "64M", "-b", artifacts.memtest(), "--append", "console=ttyS0,115200")
    )
    with ConsoleProcess(arguments) as guest:
        guest.expect("Memtest86")
        guest.expect(r"Test|Pass")
        guest.expect(r"#")


def test_seabios_says_who_it_is() -> None:
    """SeaBIOS prints its banner on the debug port, which -v shows."""
    arguments = vmctl_run("-m", "64M", "-b", artifacts.seabios())
    arguments.insert(1, "-v")
    with ConsoleProcess(arguments) as guest:
        guest.expect_errors(r"SeaBIOS \(version")
