"""A part of the campaign of random front-ends; tests/campaigns has all of it."""

from __future__ import annotations

import pytest

from tests.campaigns.fuzz_vhost_user import campaign


@pytest.mark.parametrize("seed", [1, 2])
def test_random_front_ends(seed: int) -> None:
    """After each random front-end vmm-blk serves an honest one; it neither grows nor complains."""
    assert campaign(60, seed) == []
