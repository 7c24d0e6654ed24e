"""A part of the campaign of broken frames; tests/campaigns has all of it."""

from __future__ import annotations

from tests.campaigns.fuzz_local import campaign


def test_broken_frames_do_no_harm() -> None:
    """Broken frames raise nothing, and some are still right enough to be answered."""
    answered, deviation = campaign(5000, seed=2)
    assert deviation is None
    assert answered > 100
