"""A part of the campaign that kills networks; tests/campaigns has all of it."""

from __future__ import annotations

import pytest

from tests.campaigns.kill_networks import run

pytestmark = [
    pytest.mark.kvm,
    pytest.mark.root,
    pytest.mark.usefixtures("networks"),
]


def test_nothing_is_left_behind() -> None:
    """Forty starts, stops and kills of VMs and processes leave the network as before."""
    assert run(40, seed=3) == 0
