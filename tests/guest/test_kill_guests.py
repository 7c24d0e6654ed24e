"""A slice of the campaign of kills under traffic; all of it is in tests/campaigns."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.campaigns.kill_guests import round_of
from tests.guest.tools import missing
from tests.system.vmd.conftest import missing_separation

pytestmark = [
    *(pytest.mark.guest, pytest.mark.root, pytest.mark.slow, pytest.mark.timeout(900)),
    pytest.mark.skipif(missing_separation() is not None, reason=str(missing_separation())),
    pytest.mark.skipif(bool(missing(("nft", "iperf3"))), reason=missing(("nft", "iperf3"))),
]


def test_kills_under_traffic(tmp_path: Path) -> None:
    """Device process, VM, priv and daemon are killed; another guest goes on, nothing is left."""
    killed = round_of("process", tmp_path)
    assert killed == "process: killed process of frames, process of frames, VM, priv, daemon"
