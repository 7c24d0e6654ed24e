"""A slice of the campaign of broken units of AgentX; all of it is in tests/campaigns."""

from __future__ import annotations

from tests.campaigns.fuzz_agentx import campaign


def test_broken_units_do_no_harm() -> None:
    """Whatever a master sends, the process answers, or leaves and comes back."""
    sessions, deviation = campaign(1500, seed=2)
    assert deviation is None
    assert sessions > 100
