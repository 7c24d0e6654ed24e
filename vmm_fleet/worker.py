"""What `dask worker --preload vmm_fleet.worker` does: it has machines of its host's vmd for jobs.

The worker declares the memory and the processors for them, and Dask sends it no more jobs than have
room in there.
"""

import asyncio
from collections.abc import Callable

from distributed import Worker, WorkerPlugin

from vmctl.guest.agent import Agent
from vmm_fleet.host import Host, HostError

PLUGIN = "vmm-host"
"""The plugin's name in a worker."""
MEMORY, CPUS = "vm_memory", "vm_cpus"
"""The resources: MiB of guests' memory, and virtual CPUs."""


class UndeclaredError(Exception):
    """The worker does not declare what its machines may take, or has no plugin."""


class VmHost(WorkerPlugin):  # type: ignore[misc] # distributed is not followed
    """A worker's Host."""

    def __init__(
        self, daemon: str | None = None, agent_of: Callable[[str], Agent] | None = None
    ) -> None:
        """See `Host`."""
        self.host = Host(daemon, agent_of)

    async def setup(self, worker: Worker) -> None:
        """Join; the worker has no job yet.

        Raises:
            UndeclaredError: it lacks a resource, without which no job would come.
            HostError: there is no daemon.
        """
        missing = {MEMORY, CPUS} - worker.state.total_resources.keys()
        if missing:
            raise UndeclaredError(
                f"no resource {', '.join(sorted(missing))}: "
                f'dask worker --resources "{MEMORY}=MIB {CPUS}=COUNT"'
            )
        await asyncio.to_thread(self.host.__enter__)

    async def teardown(self, worker: Worker) -> None:  # noqa: ARG002 - of the interface
        """End its machines."""
        await asyncio.to_thread(self.host.__exit__)


async def dask_setup(worker: Worker) -> None:
    """Prepare a worker that has not registered yet; Dask calls it."""
    await install(worker, VmHost())


async def install(worker: Worker, plugin: VmHost) -> None:
    """Add the plugin to a worker, or end the process: Dask would go on without it."""
    try:
        await worker.plugin_add(plugin, name=PLUGIN, catch_errors=False)
    except (UndeclaredError, HostError) as err:
        raise SystemExit(f"vmm_fleet: {err}") from None


def host_of(worker: Worker) -> Host:
    """Return a worker's Host.

    Raises:
        UndeclaredError: it has not preloaded this module.
    """
    plugin = worker.plugins.get(PLUGIN)
    if not isinstance(plugin, VmHost):
        raise UndeclaredError(f"not a worker of --preload {__name__}")
    return plugin.host
