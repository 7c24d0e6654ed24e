"""What the disk tests need of the machine."""

from __future__ import annotations

import shutil

import pytest


@pytest.fixture
def qemu_img() -> None:
    """Skip a test where QEMU's tools, which judge our images, are missing."""
    if shutil.which("qemu-img") is None or shutil.which("qemu-io") is None:
        pytest.skip("qemu-img and qemu-io are missing: apt install qemu-utils")
