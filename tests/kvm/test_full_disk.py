"""Guests of `vmctl run` on a full host disk: they get an error, or pause until there is room."""

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
    """End a guest that ignores the power button."""
    for number in (signal.SIGTERM, signal.SIGINT):  # two of one kind may merge
        guest.signal(number)
    assert guest.wait(30) == 143


@pytest.mark.parametrize("disk_format", list(Format))
@pytest.mark.parametrize("options", ["error=stop", "error=stop,process", "error=stop,queues=2"])
def test_a_guest_stands_still_until_there_is_room(
    disk_format: Format, options: str, tmp_path: Path
) -> None:
    """The guest sees no error, and all its writes are on the disk."""
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
    """By default, or with `error`, the write fails and the guest runs on."""
    with small_file_system(tmp_path / "small") as small:
        disk = small.place / "disk.img"
        make_disk(disk, Format.RAW)
        command = vmctl_run("-m", "64M", "-d", f"raw:{disk}{options}", "--timeout", "80")
        with ConsoleProcess(command) as guest:
            guest.expect(WAS_REFUSED.decode(), 80)
            end(guest)
            assert b"disk0: write at sector " in guest.errors
            assert guest.errors.count(b"No space left on device") == 1
