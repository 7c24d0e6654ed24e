"""A part of the campaign of hostile network drivers; tests/campaigns has all of it."""

from __future__ import annotations

import pytest

from tests.campaigns.fuzz_net import campaign


@pytest.mark.parametrize("seed", [1, 2])
def test_hostile_drivers(seed: int) -> None:
    """No hostile driver gets an exception, a foreign frame or a broken one out of the device."""
    assert campaign(300, seed) == []
