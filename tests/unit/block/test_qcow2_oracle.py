"""A slice of the campaign of random images that QEMU judges."""

from __future__ import annotations

import pytest

from tests.campaigns.qcow2_oracle import run_case


@pytest.mark.usefixtures("qemu_img")
@pytest.mark.parametrize("seed", range(1000, 1024))
def test_qemu_agrees(seed: int) -> None:
    """QEMU reads what we write and the reverse, and finds every image clean."""
    assert run_case(seed) is None
