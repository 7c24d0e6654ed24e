"""A slice of the campaign of killed networks; all of it is in tests/campaigns."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.campaigns.kill_networks import run
from tests.system.vmd.conftest import missing_separation

pytestmark = [
    pytest.mark.kvm,
    pytest.mark.root,
    pytest.mark.skipif(shutil.which("nft") is None, reason="nft is not installed"),
    pytest.mark.skipif(not Path("/dev/net/tun").exists(), reason="there is no /dev/net/tun"),
    pytest.mark.skipif(missing_separation() is not None, reason=str(missing_separation())),
]


def test_nothing_is_left_behind() -> None:
    """Forty starts, stops and kills of VMs and processes: the network is as it was before."""
    assert run(40, seed=3) == 0
