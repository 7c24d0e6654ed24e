"""A job: a function of a machine, as a function that Dask can call on any worker."""

from collections.abc import Callable
from typing import Concatenate, Generic, ParamSpec, TypeVar

from distributed import Reschedule, get_worker

from vmd.config.values import memory_of
from vmm_fleet.host import LostError
from vmm_fleet.snapshots import file_name, obtain
from vmm_fleet.worker import CPUS, MEMORY, host_of, sources_of
from vmm_pytest.machine import Machine
from vmm_pytest.templates import Settings

_MIB = 1 << 20

_Arguments = ParamSpec("_Arguments")
_Result = TypeVar("_Result")


class InVm(Generic[_Arguments, _Result]):
    """A callable for `client.map` and `client.submit`, which gives each call a fresh machine.

    Its `resources` have to go along, and `pure=False`: equal calls are not one job.
    """

    def __init__(
        self,
        job: Callable[Concatenate[Machine, _Arguments], _Result],
        *,
        snapshot: str = "",
        **settings: object,
    ) -> None:
        """Wrap `job`, whose first argument is the machine.

        `settings` are the keywords of the marker `vm` of the pytest plugin: `kernel`, `image`,
        `memory`, `cpus` and others. Paths are those of the workers' hosts. With `snapshot`, the
        digest of one, machines go on from that, and have to fit into `memory` and `cpus`.

        Raises:
            ValueError: no digest.
            TypeError: there is no such setting.
            ValueRefusedError: no memory size.
        """
        known = Settings(**settings)  # type: ignore[arg-type] # refuses what there is not
        if snapshot:
            file_name(snapshot)
            if settings.keys() - {"memory", "cpus", "timeout"}:
                raise TypeError("a snapshot says what its machine is, but for memory and cpus")
        self._job = job
        self._snapshot = snapshot
        self._settings = settings
        self.__name__ = getattr(job, "__name__", type(job).__name__)
        self.resources = {MEMORY: memory_of(known.memory) // _MIB, CPUS: known.cpus}
        """What a call needs of a worker."""

    def __call__(self, *args: _Arguments.args, **kwargs: _Arguments.kwargs) -> _Result:
        """Do the job in a fresh machine; called by a worker that has preloaded `worker`.

        Raises:
            Reschedule: the daemon has ended meanwhile; Dask begins the job anew.
            MissingError: no worker's host has the snapshot.
        """
        worker = get_worker()
        host = host_of(worker)
        snapshot = ""
        if self._snapshot:
            snapshot = obtain(self._snapshot, lambda: sources_of(worker, self._snapshot))
        try:
            return host.run(
                lambda machine: self._job(machine, *args, **kwargs), self._settings, snapshot
            )
        except LostError:
            raise Reschedule from None
