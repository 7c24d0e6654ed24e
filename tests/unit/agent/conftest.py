"""Agents as processes of this host."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.agents import HostAgent
from vmctl.guest.agent import Agent


@pytest.fixture
def host(tmp_path: Path) -> Iterator[HostAgent]:
    """An agent that runs on this host."""
    with HostAgent(tmp_path / "agent") as host:
        yield host


@pytest.fixture
def agent(host: HostAgent) -> Agent:
    """The client's end of it."""
    return host.agent
