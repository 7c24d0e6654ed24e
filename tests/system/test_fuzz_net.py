"""A slice of the campaign of hostile network drivers; all of it is in tests/campaigns."""

from __future__ import annotations

import pytest

from tests.campaigns.fuzz_net import campaign


@pytest.mark.parametrize("seed", [1, 2])
def test_hostile_drivers(seed: int) -> None:
    """None of them gets anything out of the device, or past it, that is not allowed."""
    assert campaign(300, seed) == []
