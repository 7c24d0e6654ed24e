"""A slice of the campaign of random front-ends; all of it is in tests/campaigns."""

from __future__ import annotations

import pytest

from tests.campaigns.fuzz_vhost_user import campaign


@pytest.mark.parametrize("seed", [1, 2])
def test_random_front_ends(seed: int) -> None:
    """After each of them vmm-blk serves an honest one, and has neither grown nor complained."""
    assert campaign(60, seed) == []
