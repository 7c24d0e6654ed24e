"""Guests of a `vmctl run` whose standard input, output or error is closed or cannot be written."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests import artifacts
from tests.closed_streams import COMBINATIONS, PRINTED, Ended, image, run_closed
from tests.vmctl_driver import vmctl_run

pytestmark = pytest.mark.kvm

STATUS = 42 << 1 | 1


def run(closed: str, disk: str, *, redirection: str = "") -> Ended:
    """Boot from a disk with these descriptors closed, or with this redirection of the shell."""
    command = vmctl_run("-m", "64M", "-b", artifacts.seabios(), "--timeout", "80", "-d", disk)
    if redirection:
        command = ["/bin/sh", "-c", f'exec "$@" {redirection}', "sh", *command]
    return run_closed(closed, command)


@pytest.mark.parametrize("closed", COMBINATIONS)
def test_a_closed_descriptor_is_never_a_disk(closed: str, tmp_path: Path) -> None:
    """With any of 0 to 2 closed, the image holds exactly the guest's writes."""
    disk, expected = image(tmp_path / "disk.img")
    ended = run(closed, f"raw:{disk}")
    # Compare without showing: a difference would print both images.
    assert (disk.read_bytes() == expected, ended.status) == (True, STATUS)
    line = "vmctl: standard output: Bad file descriptor\n" if "1" in closed else ""
    assert ended.errors == ("" if "2" in closed else line)
    assert ("U" * 100 in ended.output) == ("1" not in closed)


@pytest.mark.parametrize("options", [",process", ",queues=2"])
def test_a_closed_descriptor_is_never_a_disk_elsewhere(options: str, tmp_path: Path) -> None:
    """The same holds if a process of its own serves the disk, and with several queues."""
    disk, expected = image(tmp_path / "disk.img")
    ended = run("012", f"raw:{disk}{options}")
    assert (disk.read_bytes() == expected, ended.status) == (True, STATUS)


def test_all_that_a_guest_prints_is_there(tmp_path: Path) -> None:
    """With every descriptor open, the guest's output arrives, each byte once."""
    disk, expected = image(tmp_path / "disk.img")
    ended = run("", f"raw:{disk}")
    assert (disk.read_bytes() == expected, ended.status) == (True, STATUS)
    printed = ended.output[ended.output.index("U" * 100) :]
    assert (len(printed), set(printed)) == (PRINTED, {"U"})


def test_a_full_output_changes_no_status(tmp_path: Path) -> None:
    """Failing output causes one line; the guest runs on and chooses the status."""
    disk, expected = image(tmp_path / "disk.img")
    ended = run("", f"raw:{disk}", redirection=">/dev/full")
    assert (disk.read_bytes() == expected, ended.status) == (True, STATUS)
    assert ended.errors == "vmctl: standard output: No space left on device\n"


def test_a_full_error_output_changes_no_status(tmp_path: Path) -> None:
    """If even that line cannot be written, nothing else changes."""
    disk, expected = image(tmp_path / "disk.img")
    ended = run("1", f"raw:{disk}", redirection="2>/dev/full")
    assert (disk.read_bytes() == expected, ended.status) == (True, STATUS)
