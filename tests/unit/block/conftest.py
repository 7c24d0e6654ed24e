"""Requirements of the disk tests."""

from __future__ import annotations

import shutil

import pytest


@pytest.fixture
def qemu_img() -> None:
    """Skip a test without QEMU's tools, which check our images."""
    if shutil.which("qemu-img") is None or shutil.which("qemu-io") is None:
        pytest.skip("qemu-img and qemu-io are missing: apt install qemu-utils")
