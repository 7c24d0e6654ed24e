"""Debian, installed: through firmware and GRUB to its login prompt, and fio's verified load.

A slice of tests/campaigns/installed.py.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests import installed
from tests.debian import Debian, debian
from tests.guest.linux_guest import needs_cr8

pytestmark = [pytest.mark.guest, pytest.mark.slow, pytest.mark.timeout(900)]

MEGABYTES = 4


@pytest.fixture
def system() -> Debian:
    """The system, from the cache."""
    return debian()


def test_debian_boots_twice(system: Debian, tmp_path: Path) -> None:
    """From a qcow2 image of `vmctl create`; the file system and the image are clean after each."""
    image, raw = tmp_path / "disk.qcow2", tmp_path / "disk.raw"
    installed.create("-i", system.disk, image)
    for number in (1, 2):
        installed.boot_to_login(f"qcow2:{image}")
        installed.check_qcow2(image, raw)
        assert installed.boots(raw) == number


def test_fio_verifies_what_it_wrote(system: Debian, tmp_path: Path) -> None:
    """Random writes, trims and flushes, on a raw disk and on an overlay of a compressed base."""
    fio = installed.Fio(system, tmp_path, MEGABYTES)
    raw, overlay = fio.raw("raw"), fio.overlay("overlay", "zstd")
    fio.under_ours({"raw": f"raw:{raw}", "overlay": f"qcow2:{overlay},process"})
    installed.run("qemu-img", "check", "-q", "-f", "qcow2", overlay)
    # What fio wrote last depends on its seed alone, and the rest is zeroed.
    installed.compare(raw, overlay)


@needs_cr8
def test_debian_boots_by_uefi(system: Debian, tmp_path: Path) -> None:
    """OVMF finds GRUB on the EFI system partition, and that the kernel."""
    image, raw = tmp_path / "disk.qcow2", tmp_path / "disk.raw"
    installed.create("-i", system.disk, image)
    options = ("--firmware", "uefi", "--nvram", tmp_path / "nvram")
    installed.boot_to_login(f"qcow2:{image}", *options, firmware="efi")
    installed.check_qcow2(image, raw)
