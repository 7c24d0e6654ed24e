"""A part of the campaign that kills VMs; tests/campaigns has all of it."""

from __future__ import annotations

import pytest

from tests.campaigns.kill_vm import campaign

pytestmark = [pytest.mark.kvm, pytest.mark.slow]


def test_acknowledged_writes_survive_the_vm() -> None:
    """After SIGKILL the disk has all acknowledged writes, and the image is sound."""
    writes, deviations = campaign(2, seed=1)
    assert deviations == []
    assert writes > 0
