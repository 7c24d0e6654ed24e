"""An installed Debian: through firmware and GRUB to its login prompt, and fio's verified load.

A part of tests/campaigns/installed.py.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from tests import installed
from tests.debian import Debian, debian

pytestmark = [pytest.mark.guest, pytest.mark.slow, pytest.mark.timeout(900)]

MEGABYTES = 4


@pytest.fixture
def system() -> Debian:
    """The system, from the cache."""
    return debian()


@pytest.mark.parametrize("firmware", ["pc", "efi"])
def test_debian_boots_twice(firmware: str, system: Debian, tmp_path: Path) -> None:
    """Debian boots twice from a qcow2 image of `vmctl create`; file system and image stay clean."""
    image, raw = tmp_path / "disk.qcow2", tmp_path / "disk.raw"
    installed.create("-i", system.disk, image)
    options = installed.firmware_options(firmware, tmp_path / "nvram")
    for number in (1, 2):
        installed.boot_to_login(f"qcow2:{image}", *options, firmware=firmware)
        installed.check_qcow2(image, raw)
        assert installed.boots(raw) == number


def test_debian_boots_from_an_overlay(system: Debian, tmp_path: Path) -> None:
    """Debian boots from an overlay on a read-only base; writes go to the overlay alone."""
    base, overlay, raw = tmp_path / "base.qcow2", tmp_path / "disk.qcow2", tmp_path / "disk.raw"
    installed.create("-i", system.disk, base)
    base.chmod(0o400)
    before = hashlib.sha256(base.read_bytes()).digest()
    installed.create("-b", base, overlay)
    installed.boot_to_login(f"qcow2:{overlay}")
    installed.check_qcow2(overlay, raw)
    assert installed.boots(raw) == 1
    assert hashlib.sha256(base.read_bytes()).digest() == before


def test_fio_verifies_what_it_wrote(system: Debian, tmp_path: Path) -> None:
    """Random writes, trims and flushes by fio verify, on a raw disk and an overlay."""
    fio = installed.Fio(system, tmp_path, MEGABYTES)
    raw, overlay = fio.raw("raw"), fio.overlay("overlay", "zstd")
    fio.under_ours({"raw": f"raw:{raw}", "overlay": f"qcow2:{overlay},process"})
    installed.run("qemu-img", "check", "-q", "-f", "qcow2", overlay)
    # fio's last writes depend on its seed alone, and the rest is zeroed.
    installed.compare(raw, overlay)
