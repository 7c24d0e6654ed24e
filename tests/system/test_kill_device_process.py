"""A part of the campaign that kills device processes; tests/campaigns has all of it."""

from __future__ import annotations

from tests.campaigns.image_rounds import OPTIONS
from tests.campaigns.kill_device_process import campaign


def test_flushed_data_survive() -> None:
    """After a kill, each kind of image is sound, and flushed data are there."""
    operations, deviations = campaign(len(OPTIONS), seed=1)
    assert deviations == []
    assert operations > len(OPTIONS)
