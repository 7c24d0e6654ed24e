"""A slice of the campaign with agents, which `make soak` runs in full."""

from __future__ import annotations

from tests.campaigns import agent_load

MIB = 1 << 20


def test_commands_side_by_side() -> None:
    """Commands that run twenty at a time have each its own input, output and status."""
    agent_load.commands(60)


def test_much_data() -> None:
    """What goes through a command in a guest comes back, and is kept by nobody."""
    agent_load.through(16 * MIB)
