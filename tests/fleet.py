"""Two hosts of a fleet: network namespaces with a vmd each, a scheduler, a worker on each."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Self

from tests.agents import wait_until
from tests.fleet_jobs import MEMORY_MIB
from tests.system.vmd.daemon import ROOT, Daemon, is_alive
from tests.system.vmd.netns import Namespace

SLOTS = 4
"""Machines that each host declares room for."""
_PORT = 8786
_LOOK_S = 0.02


class FleetHost:
    """A network namespace with a vmd of its own; a context manager."""

    def __init__(self, name: str, directory: Path) -> None:
        """Start both in `directory`, which is also the host's directory of temporary files."""
        self.name = name
        self.directory = directory
        directory.mkdir()
        self.environ = {
            "FLEET_HOST": name,
            "TMPDIR": str(directory),
            "TOLD": str(directory / "told"),
            "REFUSES": str(directory / "refuses"),
            "VMD_SOCKET": str(directory / "vmd.sock"),
            "XDG_DATA_HOME": str(directory / "data"),
        }
        self.space = Namespace()
        self._worker: subprocess.Popen[bytes] | None = None
        self.vmd = self._started()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        try:
            self.vmd.stop()
        finally:
            self.space.__exit__()

    def _started(self) -> Daemon:
        return Daemon(self.directory, "", prefix=self.space.prefix, environ=self.environ)

    def kill_vmd(self) -> None:
        """End the daemon by SIGKILL."""
        self.vmd.process.kill()
        self.vmd.process.wait()

    def start_vmd(self) -> None:
        """Start another one in its place."""
        self.vmd = self._started()

    @contextmanager
    def worker(self, scheduler: str) -> Iterator[None]:
        """Run a worker, which ends by SIGTERM."""
        with self.process(
            *("-m", "distributed.cli.dask_worker", scheduler, "--name", self.name),
            *("--no-dashboard", "--nthreads", str(SLOTS)),
            *("--resources", f"vm_memory={SLOTS * MEMORY_MIB} vm_cpus={SLOTS}"),
            *("--preload", "tests.fleet_worker"),
        ) as self._worker:
            yield

    def kill_worker(self) -> None:
        """End by SIGKILL the process that has the jobs; Dask's nanny starts another one."""
        assert self._worker
        (worker,) = [
            int(pid)
            for path in Path(f"/proc/{self._worker.pid}/task").glob("*/children")
            for pid in path.read_text().split()
            if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()
        ]
        os.kill(worker, signal.SIGKILL)

    @contextmanager
    def process(self, *words: str) -> Iterator[subprocess.Popen[bytes]]:
        """Run a program of Python on this host; it ends by SIGTERM, and its log is beside vmd's."""
        with (self.directory / f"log.{words[1]}").open("ab") as log:
            process = subprocess.Popen(
                [*self.space.prefix, sys.executable, *words],
                cwd=ROOT,
                env={**os.environ, **self.environ},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        try:
            yield process
        finally:
            process.terminate()
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
                raise

    def vms(self) -> list[str]:
        """Return the names of the daemon's VMs."""
        with self.vmd.client() as client:
            return [str(vm["name"]) for vm in client.vms()]

    def processes(self) -> list[int]:
        """Return this host's processes, of vmd's and of the workers'."""
        found = []
        for path in Path("/proc").glob("[0-9]*"):
            pid = int(path.name)
            if is_of(pid, self.name, str(self.directory)) and is_alive(pid):
                found.append(pid)
        return found


def is_of(pid: int, name: str, directory: str) -> bool:
    """Tell whether a process is of a host: so its environment says."""
    try:
        environ = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:  # it has ended
        return False
    return {f"FLEET_HOST={name}".encode(), f"TMPDIR={directory}".encode()} <= set(environ)


class Watch:
    """A thread that counts the VMs' processes of hosts; a context manager.

    It asks no daemon, so it also sees what a killed one has left.
    """

    def __init__(self, hosts: list[FleetHost]) -> None:
        """Begin with `with`."""
        self._hosts = hosts
        self._known: dict[int, str] = {}
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._body)
        self.peaks = dict.fromkeys((host.name for host in hosts), 0)
        """The most at a time, by host."""
        self.looks = 0

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._is_over.set()
        self._thread.join()

    def _body(self) -> None:
        while not self._is_over.wait(_LOOK_S):
            counts = dict.fromkeys(self.peaks, 0)
            for path in Path("/proc").glob("[0-9]*/comm"):
                host = self._host_of(path)
                if host:
                    counts[host] += 1
            self.peaks = {name: max(most, counts[name]) for name, most in self.peaks.items()}
            self.looks += 1

    def _host_of(self, path: Path) -> str:
        """Return the host of a VM's process; empty if it is none."""
        pid = int(path.parent.name)
        try:
            if not path.read_bytes().startswith(b"vm/fleet") or not is_alive(pid):
                self._known.pop(pid, None)
                return ""
        except OSError:  # it has ended
            return ""
        if pid not in self._known:
            of = [one.name for one in self._hosts if is_of(pid, one.name, str(one.directory))]
            self._known[pid] = of[0] if of else ""
        return self._known[pid]


@contextmanager
def two_hosts(directory: Path) -> Iterator[tuple[FleetHost, FleetHost, str]]:
    """Yield two hosts with workers, and the address of their scheduler, on the first."""
    with (
        FleetHost("one", directory / "one") as one,
        FleetHost("two", directory / "two") as two,
        ExitStack() as processes,
    ):
        one.space.connect(two.space, "10.0.0.1/24", "10.0.0.2/24")
        address = f"tcp://10.0.0.1:{_PORT}"
        words = ("--host", "10.0.0.1", "--port", str(_PORT), "--no-dashboard")
        processes.enter_context(one.process("-m", "distributed.cli.dask_scheduler", *words))
        wait_until(lambda: one.space.within(_listens))
        for host in (one, two):
            processes.enter_context(host.worker(address))
        yield one, two, address
        processes.close()
        for host in (one, two):
            wait_until(lambda host=host: not host.vms())  # type: ignore[misc] # a bound variable


def _listens() -> bool:
    try:
        socket.create_connection(("10.0.0.1", _PORT), 1).close()
    except OSError:
        return False
    return True
