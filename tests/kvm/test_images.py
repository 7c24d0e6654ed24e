"""An image of the store and a seed, as a guest has them: SeaBIOS boots one and reads the other."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from tests.kvm.test_disks import boot_sector, run

pytestmark = pytest.mark.kvm

SECOND = 0x81
TERMINATOR = 17 * 4
"""The sector of 512 bytes whose first byte, 255, ends the descriptors of an ISO image."""


def test_a_stored_image_and_a_seed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The image boots, unchanged; the seed of --ssh-key is the next disk, with an ISO image."""
    monkeypatch.setenv("VMCTL_IMAGES", str(tmp_path / "store"))
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    content = boot_sector(0x42, TERMINATOR, SECOND).ljust(1 << 20, b"\0")
    digest = hashlib.sha256(content).hexdigest()
    (tmp_path / "store" / "names").mkdir(parents=True)
    (tmp_path / "store" / f"sha256-{digest}").write_bytes(content)
    (tmp_path / "store" / "names" / "boot").symlink_to(f"../sha256-{digest}")
    key = tmp_path / "key.pub"
    key.write_text("ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIFrikGGJGsPSsM+ivZDCFUk7O2IwRWV5 me\n")
    status, errors = run("-d", "image:boot,snapshot", "--ssh-key", str(key))
    assert (status, errors) == (255, b"")
    assert (tmp_path / "store" / f"sha256-{digest}").read_bytes() == content
