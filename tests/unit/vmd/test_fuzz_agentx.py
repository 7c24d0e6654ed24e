"""A part of the campaign of broken AgentX PDUs; tests/campaigns has all of it."""

from __future__ import annotations

from tests.campaigns.fuzz_agentx import campaign


def test_broken_units_do_no_harm() -> None:
    """After any PDU of a master the process answers, or disconnects and connects again."""
    sessions, deviation = campaign(1500, seed=2)
    assert deviation is None
    assert sessions > 100
