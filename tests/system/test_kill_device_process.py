"""A slice of the campaign of killed device processes; all of it is in tests/campaigns."""

from __future__ import annotations

from tests.campaigns.image_rounds import OPTIONS
from tests.campaigns.kill_device_process import campaign


def test_flushed_data_survive() -> None:
    """One kill for each kind of image: it is sound, and what was flushed is there."""
    operations, deviations = campaign(len(OPTIONS), seed=1)
    assert deviations == []
    assert operations > len(OPTIONS)
