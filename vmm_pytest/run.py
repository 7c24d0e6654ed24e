"""A test process's share of a run: the daemon, and the keeper that ends with the last process.

Processes of one run, such as the workers of pytest-xdist, have a folder, a keeper and with it a
daemon in common. `vmm_pytest.keeper` describes what is left when one of them is killed: nothing.
"""

import fcntl
import hashlib
import itertools
import json
import os
import select
import socket
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Self
from uuid import uuid4

from vmctl.client import Client, CommandError
from vmctl.guest.access import agent_of
from vmctl.guest.agent import Agent

KEEPER_S = 120.0
"""How long the daemon may take to start, and to end before another one starts."""
_KVM = "/dev/kvm"
_TOP = Path(__file__).resolve().parent.parent
_AGAIN_S = 0.02


class NoMachinesError(Exception):
    """This host runs no VMs for this user; `str()` says why."""


class RunError(Exception):
    """The daemon of a run has not started; `str()` says why."""


class Run:
    """See the module; a context manager, which ends this process's VMs."""

    def __init__(
        self, identifier: str = "", daemon: str | None = None, kind: str = "pytest"
    ) -> None:
        """Join the run `identifier`, or begin one; nothing is started yet.

        `daemon` is the socket of a running vmd, of which this run's VMs will be. `kind` begins
        their names.

        Raises:
            NoMachinesError: KVM is missing here.
        """
        if daemon is None:
            _check_kvm()
        word = hashlib.sha256((identifier or uuid4().hex).encode()).hexdigest()[:12]
        self.folder = Path(tempfile.gettempdir()) / f"vmm-{kind}-{word}"
        """The directory that the processes of the run share; the keeper removes it."""
        self.name = f"{kind}-{word[:6]}"
        """The prefix of the names of all its VMs."""
        self.daemon = os.path.abspath(daemon) if daemon else str(self.folder / "vmd.sock")
        """The daemon's socket."""
        self._own = f"{self.name}-{uuid4().hex[:4]}"
        self._numbers = itertools.count(1)
        self._given = daemon
        self._keeper: socket.socket | None = None

    def __enter__(self) -> Self:
        with self.locked("lock"):
            self._keeper = self._connected() or self._started()
            self._tell(mine=f"{self._own}-")
        return self

    def __exit__(self, *exc: object) -> None:
        if self._keeper:
            self._keeper.close()

    def agent_of(self, name: str) -> Agent:
        """Return the agent of a VM."""
        return agent_of(name, daemon=self.daemon)

    def new_name(self) -> str:
        """Return the name of another VM of this process."""
        return f"{self._own}-{next(self._numbers)}"

    def has_keeper(self) -> bool:
        """Tell whether the keeper is there; without it nobody ends the VMs of a killed process."""
        # It says nothing unless it is asked: anything to read is its end.
        return self._keeper is not None and not select.select([self._keeper], [], [], 0)[0]

    def keep(self, name: str) -> None:
        """Let a VM of this process run on when the run has ended, with its daemon."""
        self._tell(keep=name)

    @contextmanager
    def locked(self, name: str) -> Iterator[None]:
        """Hold a lock of the run, that of a file in its folder."""
        fd = self._lock(name)
        try:
            yield
        finally:
            os.close(fd)

    def _lock(self, name: str) -> int:
        path = self.folder / name
        while True:
            self._make_folder()
            try:
                fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            except FileNotFoundError:  # the keeper of others has just ended
                continue
            fcntl.flock(fd, fcntl.LOCK_EX)
            try:
                if os.path.samestat(os.fstat(fd), path.stat()):
                    return fd
            except FileNotFoundError:  # the same, while we waited
                pass
            os.close(fd)

    def _make_folder(self) -> None:
        try:
            self.folder.mkdir(mode=0o700)
        except FileExistsError:
            found = self.folder.lstat()
            if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid():
                raise RunError(f"{self.folder}: not a directory of ours") from None

    def _connected(self) -> socket.socket | None:
        """Return a connection to the run's keeper; None if there is none."""
        keeper = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            keeper.connect(str(self.folder / "keeper"))
        except (FileNotFoundError, ConnectionRefusedError):
            keeper.close()
            return None
        return keeper

    def _started(self) -> socket.socket:
        """Start a keeper; returns a connection to it.

        Raises:
            RunError: it, or its daemon, does not start.
        """
        words = [str(self.folder), self.name, *([self.daemon] if self._given else [])]
        with subprocess.Popen(
            [sys.executable, "-m", "vmm_pytest.keeper", *words],
            cwd=_TOP,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        ) as first:
            # The first process ends once the keeper, a process of no parent here, serves.
            try:
                told, _ = first.communicate(timeout=KEEPER_S)
            except subprocess.TimeoutExpired:
                first.kill()
                raise RunError("vmd does not start") from None
        keeper = self._connected() if first.returncode == 0 else None
        if keeper is None:
            raise RunError(told.strip() or f"the keeper ended with {first.returncode}")
        return keeper

    def _tell(self, **fields: str) -> None:
        assert self._keeper
        try:
            self._keeper.send(json.dumps(fields).encode())
            self._keeper.settimeout(KEEPER_S)
            is_done = self._keeper.recv(1) == b"."
        except OSError:
            is_done = False
        if not is_done:
            raise RunError("the process that keeps the daemon has ended")


def _check_kvm() -> None:
    try:
        os.close(os.open(_KVM, os.O_RDWR | os.O_CLOEXEC))
    except OSError as err:
        raise NoMachinesError(f"{_KVM}: {err.strerror}") from err


def stop_all(daemon: str, prefix: str, kept: set[str]) -> None:
    """End the VMs of a daemon whose names begin so, but for those that are `kept`.

    Raises:
        CommandError: the daemon is gone, and they with it.
    """
    with Client(daemon) as client:
        for vm in client.list():
            if vm.name.startswith(prefix) and vm.name not in kept and vm.pid is not None:
                try:
                    client.stop(vm.name, force=True)
                except CommandError:
                    if client.vm(vm.name) is not None:  # it has not just ended by itself
                        raise


def wait_until_gone(daemon: str, names: set[str], seconds: float) -> bool:
    """Wait until a daemon has none of these VMs; tells whether that is so."""
    deadline = time.monotonic() + seconds
    while True:
        with Client(daemon) as client:
            if not names & {vm.name for vm in client.list()}:
                return True
        if time.monotonic() > deadline:
            return False
        time.sleep(_AGAIN_S)
