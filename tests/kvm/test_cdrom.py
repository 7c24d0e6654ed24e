"""The CD-ROM drive on real KVM: SeaBIOS boots discs made here."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.iso import BOOT_IMAGE, SECTOR, bootable_iso
from tests.kvm.test_disks import GOOD, STATUS, boot_sector, disk
from tests.vmctl_driver import ConsoleProcess, vmctl_run

pytestmark = pytest.mark.kvm

OTHER = 7
BIOS_S = 60.0


def run(*arguments: str | Path) -> tuple[int, bytes]:
    """Run whatever firmware finds; returns the exit status and the errors."""
    with ConsoleProcess(vmctl_run("-m", "64M", "--timeout", "60", *arguments)) as guest:
        return guest.wait(), guest.errors


def disc(path: Path, *further: bytes) -> Path:
    """Write a disc that reports the first byte of the sector after its boot image."""
    path.write_bytes(bootable_iso(boot_sector(0x42, BOOT_IMAGE + 1), *further))
    return path


def test_firmware_boots_from_a_disc(tmp_path: Path) -> None:
    """Without -b or --firmware, the installed BIOS boots the disc and reads a sector for it."""
    image = disc(tmp_path / "boot.iso", bytes((GOOD,)) * SECTOR)
    assert run("-r", image) == (STATUS, b"")


def test_a_sector_behind_the_end(tmp_path: Path) -> None:
    """Reading past the last sector is an error that the BIOS reports."""
    assert run("-r", disc(tmp_path / "boot.iso")) == (1 << 1 | 1, b"")


@pytest.mark.parametrize(
    ("device", "status"), [("cdrom", STATUS), ("disk", OTHER << 1 | 1)], ids=["cdrom", "disk"]
)
def test_what_firmware_boots_from(tmp_path: Path, device: str, status: int) -> None:
    """With a bootable disk and a bootable disc, -B chooses."""
    image = disc(tmp_path / "boot.iso", bytes((GOOD,)) * SECTOR)
    other = disk(tmp_path / "disk.img", boot_sector(0x42, 1), bytes((OTHER,)) * 512)
    assert run("-B", device, "-r", image, "-d", f"raw:{other}") == (status, b"")


def test_a_disc_that_nothing_boots_from(tmp_path: Path) -> None:
    """Any file serves as a disc; the BIOS shows the drive's name, and finds nothing to boot."""
    image = tmp_path / "data.iso"
    image.write_bytes(bytes(20 * SECTOR))
    with ConsoleProcess(vmctl_run("-m", "64M", "--timeout", "60", "-r", image)) as guest:
        guest.expect("Booting from DVD/CD", BIOS_S)
        guest.expect("No bootable device", BIOS_S)


def test_discs_may_be_shared(tmp_path: Path) -> None:
    """A disc is only read, so several machines may have it at once."""
    image = disc(tmp_path / "boot.iso", bytes((GOOD,)) * SECTOR)
    with ConsoleProcess(vmctl_run("--selftest", "-r", image, "--timeout", "60")) as guest:
        guest.expect("selftest: ready", BIOS_S)
        assert run("-r", image) == (STATUS, b"")


def test_firmware_knows_the_machine(tmp_path: Path) -> None:
    """The BIOS finds our SMBIOS tables: it prints the system's UUID, derived from the name."""
    image = disc(tmp_path / "boot.iso", bytes((GOOD,)) * SECTOR)
    uuids = set()
    for name in ("one", "two", "one"):
        with ConsoleProcess(vmctl_run("-m", "64M", "--timeout", "60", "-r", image, name)) as guest:
            uuids.add(guest.expect("Machine UUID ([0-9a-f-]{36})", BIOS_S)[1])
    assert len(uuids) == 2
