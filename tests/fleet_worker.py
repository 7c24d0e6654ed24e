"""What a worker of the fleet's tests preloads: the agents of its guests are one process here.

The environment has TMPDIR, a directory of the worker's host, and what tests/clones_agent.py needs.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from distributed import Worker

from tests.agents import CLONES_AGENT, HostAgent
from vmm_fleet.worker import VmHost, install

_agents: list[HostAgent] = []


async def dask_setup(worker: Worker) -> None:
    """Prepare a worker that has not registered yet; Dask calls it."""
    # The agent ends with this process, whatever ends it.
    path = Path(tempfile.mkdtemp(prefix="agent-")) / f"{os.getpid()}"
    agent = HostAgent(path, program=CLONES_AGENT)
    _agents.append(agent)
    await install(worker, VmHost(agent_of=lambda _name: agent.agent))
