"""A worker's share of its host's vmd: machines for jobs, which end with the worker.

A keeper (`vmm_pytest.keeper`) ends the machines of a worker that was killed, before another worker
of the same host and user begins.
"""

import os
import select
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Self, TypeVar

from vmctl.client import Client, CommandError
from vmctl.guest.access import pauses
from vmctl.guest.agent import Agent
from vmd.config.values import memory_of
from vmd.shared.paths import client_socket
from vmm_fleet.snapshots import manifest_of
from vmm_pytest.machine import Machine, MachineError
from vmm_pytest.run import Run, RunError
from vmm_pytest.templates import Settings, Template, Templates, adopt, run_vmctl

DAEMON_S = 300.0
"""How long a job waits for a daemon that is not there."""
_ANSWER_S = 30.0
_KIND = "fleet"

_Result = TypeVar("_Result")


class HostError(Exception):
    """The host has no daemon, or none that answers; `str()` says why."""


class LostError(Exception):
    """The daemon or the keeper has ended under a job, and its machine with it."""


class Host:
    """See the module; a context manager, which ends this process's machines."""

    def __init__(
        self, daemon: str | None = None, agent_of: Callable[[str], Agent] | None = None
    ) -> None:
        """Use the daemon of this socket, by default the commands'.

        `agent_of` is how to reach the agent of a VM by its name, unless it listens on vsock.
        """
        self.daemon = str(Path(daemon or client_socket(os.environ)).absolute())
        self._agent_of = agent_of
        self._lock = threading.Lock()
        self._joined = ExitStack()
        self._run: Run | None = None

    def __enter__(self) -> Self:
        """Wait for the daemon, and until the machines of a killed worker have ended.

        Raises:
            HostError: there is none in time, or no keeper.
        """
        self._reach().__exit__()
        self._share()
        return self

    def __exit__(self, *exc: object) -> None:
        with self._lock:
            self._run = None
            self._joined.close()

    def run(
        self,
        job: Callable[[Machine], _Result],
        settings: Mapping[str, object],
        snapshot: str = "",
    ) -> _Result:
        """Call a job with a fresh machine, and end that; any thread may.

        `settings` are those of `vmm_pytest.templates.Settings`; the machine is a clone of their
        template, or goes on from the file of a `snapshot` within them.

        Raises:
            LostError: the machine has ended, and not by the job.
            HostError: there is no daemon in time, or no keeper.
            MachineError: the machine cannot be.
        """
        with self._reach() as watch, ExitStack() as made:
            run = self._share()

            def end_later(machine: Machine) -> None:
                made.callback(machine.close)

            try:
                if snapshot:
                    return job(self._continued(run, snapshot, settings, end_later))
                return job(self._template(run, settings).clone(end_later))
            except Exception as err:
                if self._run is not run or not run.has_keeper() or not _answers(watch):
                    raise LostError(f"{self.daemon}: the daemon or the keeper has ended") from err
                raise

    def _template(self, run: Run, settings: Mapping[str, object]) -> Template:
        return Templates(run, self._agent_of or run.agent_of, Path.cwd()).get(**settings)

    def _continued(
        self,
        run: Run,
        snapshot: str,
        settings: Mapping[str, object],
        on_made: Callable[[Machine], None],
    ) -> Machine:
        """Return a machine that goes on from a snapshot, and is another one than all before."""
        bounds = Settings(**settings)  # type: ignore[arg-type] # as InVm has checked
        manifest = manifest_of(snapshot)
        if manifest.memory_size > memory_of(bounds.memory) or manifest.cpus > bounds.cpus:
            text = f"memory={manifest.memory_size >> 20}M, cpus={manifest.cpus}"
            raise MachineError(f"the snapshot is of a machine with {text}: declare them")
        name = run.new_name()
        run_vmctl(run, "start", "--from", snapshot, name, seconds=bounds.timeout)
        return adopt(run, name, self._agent_of or run.agent_of, bounds.timeout, on_made)

    def _reach(self) -> Client:
        """Connect to the daemon, as soon as it is there."""
        deadline = time.monotonic() + DAEMON_S
        for pause in pauses():
            try:
                return Client(self.daemon)
            except CommandError as err:
                if time.monotonic() + pause >= deadline:
                    raise HostError(str(err)) from None
                time.sleep(pause)
        raise AssertionError

    def _share(self) -> Run:
        """Return this process's share; another one if its keeper was killed."""
        with self._lock:
            if self._run is None or not self._run.has_keeper():
                self._joined.close()
                run = Run(f"{os.geteuid()} {self.daemon}", self.daemon, _KIND)
                try:
                    self._run = self._joined.enter_context(run)
                except RunError as err:
                    raise HostError(str(err)) from None
            return self._run


def _answers(client: Client) -> bool:
    """Tell whether the daemon of a connection is the one that it was, and serves."""
    try:
        client.send("status", {"name": _KIND})
        if not select.select([client], [], [], _ANSWER_S)[0]:
            return False
        client.receive("vms")
    except CommandError:
        return False
    return True
