"""A slice of the campaign of broken frames; all of it is in tests/campaigns."""

from __future__ import annotations

from tests.campaigns.fuzz_local import campaign


def test_broken_frames_do_no_harm() -> None:
    """Nothing is raised, and some frames are still right enough to be answered."""
    answered, deviation = campaign(5000, seed=2)
    assert deviation is None
    assert answered > 100
