"""What `dask worker --preload vmm_fleet.worker` does: it has machines of its host's vmd for jobs.

The worker declares the memory and the processors for them, and Dask sends it no more jobs than have
room in there.
"""

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from functools import partial
from typing import TypeVar

from distributed import Worker, WorkerPlugin

from vmctl.guest.agent import Agent
from vmm_fleet.host import Host, HostError
from vmm_fleet.snapshots import MissingError, Part, Source, read

PLUGIN = "vmm-host"
"""The plugin's name in a worker."""
MEMORY, CPUS = "vm_memory", "vm_cpus"
"""The resources: MiB of guests' memory, and virtual CPUs."""

_READ = "vmm_snapshot"
"""The request between workers for a part of a snapshot."""
_ANSWER_S = 60.0

_Told = TypeVar("_Told")


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
        worker.handlers[_READ] = _read
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


async def _read(digest: str, offset: int) -> tuple[int, int, bytes] | None:
    """Answer another worker's request for a part of a snapshot."""
    return await asyncio.to_thread(read, digest, offset)


def sources_of(worker: Worker, digest: str) -> Iterator[Source]:
    """Yield the workers that have a snapshot, as sources; for a thread of jobs."""
    message = {"op": _READ, "digest": digest, "offset": 0}
    told = _ask(worker, lambda: worker.scheduler.broadcast(msg=message, on_error="ignore"))
    for address, found in told.items():
        if isinstance(found, list | tuple) and address != worker.address:
            yield partial(_part, worker, address, digest)


def _part(worker: Worker, address: str, digest: str, offset: int) -> Part | None:
    told = _ask(worker, lambda: getattr(worker.rpc(address), _READ)(digest=digest, offset=offset))
    return None if told is None else Part(*told)


def _ask(worker: Worker, ask: Callable[[], Awaitable[_Told]]) -> _Told:
    """Have the worker's event loop ask something.

    Raises:
        MissingError: there is no answer in time.
    """

    async def asked() -> _Told:
        return await asyncio.wait_for(ask(), _ANSWER_S)

    try:
        return asyncio.run_coroutine_threadsafe(asked(), worker.loop.asyncio_loop).result()
    except (OSError, TimeoutError) as err:
        raise MissingError(f"a worker does not answer: {err}") from None
