"""Guests of `vmctl run` whose host has no room left: they are told, or stand still until it has."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from tests.filling_guest import (
    HAS_WRITTEN,
    WAS_REFUSED,
    is_filled,
    make_disk,
    small_file_system,
)
from tests.vmctl_driver import ConsoleProcess, vmctl_run
from vmm_kvm.block.image import Format

pytestmark = pytest.mark.kvm

STANDS_STILL = "vmctl: disk0: No space left on device: paused until it succeeds"


def end(guest: ConsoleProcess) -> None:
    """End a guest that listens to nothing, in order."""
    for number in (signal.SIGTERM, signal.SIGINT):  # two of one kind may be taken for one
        guest.signal(number)
    assert guest.wait(30) == 143


@pytest.mark.parametrize("disk_format", list(Format))
@pytest.mark.parametrize("options", ["error=stop", "error=stop,process", "error=stop,queues=2"])
def test_a_guest_stands_still_until_there_is_room(
    disk_format: Format, options: str, tmp_path: Path
) -> None:
    """It is not told of anything, and all that it wrote is there."""
    with small_file_system(tmp_path / "small") as small:
        disk = small.place / "disk.img"
        make_disk(disk, disk_format)
        command = vmctl_run("-m", "64M", "-d", f"{disk_format}:{disk},{options}")
        with ConsoleProcess([*command, "--timeout", "80"]) as guest:
            guest.expect_errors(STANDS_STILL, 80)
            small.free()
            guest.expect(HAS_WRITTEN.decode(), 80)
            end(guest)
            assert guest.errors.count(STANDS_STILL.encode()) == 1
        assert is_filled(disk, disk_format)


@pytest.mark.parametrize("options", ["", ",error=report", ",error=report,process"])
def test_a_guest_is_told_that_there_is_no_room(options: str, tmp_path: Path) -> None:
    """By default, or where that was asked for, the write fails and the guest goes on."""
    with small_file_system(tmp_path / "small") as small:
        disk = small.place / "disk.img"
        make_disk(disk, Format.RAW)
        command = vmctl_run("-m", "64M", "-d", f"raw:{disk}{options}", "--timeout", "80")
        with ConsoleProcess(command) as guest:
            guest.expect(WAS_REFUSED.decode(), 80)
            end(guest)
            assert b"disk0: write at sector " in guest.errors
            assert guest.errors.count(b"No space left on device") == 1
