"""A slice of the campaign of killed VMs; all of it is in tests/campaigns."""

from __future__ import annotations

import pytest

from tests.campaigns.kill_vm import campaign

pytestmark = [pytest.mark.kvm, pytest.mark.slow]


def test_acknowledged_writes_survive_the_vm() -> None:
    """What a VM's guest was told is done is on the disk after SIGKILL, and the image is sound."""
    writes, deviations = campaign(2, seed=1)
    assert deviations == []
    assert writes > 0
