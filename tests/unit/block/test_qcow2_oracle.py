"""A part of the campaign of random images, which QEMU checks."""

from __future__ import annotations

import pytest

from tests.campaigns.qcow2_oracle import run_case


@pytest.mark.usefixtures("qemu_img")
@pytest.mark.parametrize("seed", range(1000, 1024))
def test_qemu_agrees(seed: int) -> None:
    """QEMU reads our writes and we read QEMU's, and QEMU finds every image clean."""
    assert run_case(seed) is None
