"""A part of the campaign with agents; `make soak` runs all of it."""

from __future__ import annotations

from tests.campaigns import agent_load

MIB = 1 << 20


def test_commands_side_by_side() -> None:
    """Of twenty commands at a time, each has its own input, output and status."""
    agent_load.commands(60)


def test_much_data() -> None:
    """Data come back unchanged through a command in a guest, and no process buffers them."""
    agent_load.through(16 * MIB)
