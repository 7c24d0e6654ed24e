"""A guest's agent as a process of this host, for tests of the host's side."""

from __future__ import annotations

import select
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Self

from vmctl.guest.agent import Agent
from vmctl.guest.frames import PORT

ROOT = Path(__file__).resolve().parents[1]
AGENT = ROOT / "vmm_agent" / "agent.py"
CLONES_AGENT = ROOT / "tests" / "clones_agent.py"
"""An agent that records a clone's identity, instead of changing this host."""
BOUND_S = 60.0
"""The limit for any step, on a busy machine."""


class HostAgent:
    """An agent that listens on a UNIX socket; a context manager that ends it and its commands."""

    def __init__(
        self,
        path: Path,
        *,
        interpreter: str = sys.executable,
        through: Sequence[str] = (),
        program: Path = AGENT,
    ) -> None:
        """Listen at `path`; the kernel queues connections until the agent accepts them.

        `through` is a program that runs the agent, such as unshare(1), with its arguments.
        `program` is the agent.
        """
        self.path = path
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
            listener.bind(str(path))
            listener.listen(64)
            fd = listener.fileno()
            self.process = subprocess.Popen(
                [*through, interpreter, "-I", program, "--fd", str(fd)],
                pass_fds=(fd,),
                stdin=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
            )
        self.agent = Agent(self.connect)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.process.terminate()
        _, errors = self.process.communicate(timeout=BOUND_S)
        assert errors == b"", errors.decode()

    def connect(self) -> socket.socket:
        """Return a new connection."""
        stream = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            stream.connect(str(self.path))
        except BaseException:
            stream.close()
            raise
        return stream


class Vsock:
    """A VM's vsock socket whose guest is this host; a context manager.

    Each connection has an agent of its own. Source: Firecracker's docs/vsock.md.
    """

    def __init__(
        self,
        path: Path,
        others: Mapping[int, Sequence[str | Path]] | None = None,
        *,
        through: Sequence[str] = (),
        program: Path = AGENT,
    ) -> None:
        """Listen at `path`.

        `others` are programs for further ports, with a connection as their standard streams.
        `through` and `program` are as for HostAgent.
        """
        self._agent = (*through, sys.executable, "-I", str(program))
        self._programs: dict[int, Sequence[str | Path]] = dict(others or {})
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listener.bind(str(path))
        self._listener.listen(64)
        self._agents: list[subprocess.Popen[bytes]] = []
        self._thread = threading.Thread(target=self._accept)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._thread.join()
        self._listener.close()
        for agent in self._agents:
            agent.terminate()
            agent.wait(BOUND_S)

    @property
    def pids(self) -> list[int]:
        """The agents, in the order of their connections."""
        return [agent.pid for agent in self._agents]

    def _accept(self) -> None:
        while True:
            try:
                stream, _ = self._listener.accept()
            except OSError:
                return
            with stream:
                try:
                    port = _port(stream)
                    if port != PORT and port not in self._programs:
                        continue
                    stream.sendall(b"OK 1073741824\n")
                except ConnectionError:  # the client has ended meanwhile
                    continue
                fd = stream.fileno()
                if port == PORT:
                    arguments = [*self._agent, "--fd", str(fd)]
                    started = subprocess.Popen(arguments, pass_fds=(fd,))
                else:
                    started = subprocess.Popen(self._programs[port], stdin=fd, stdout=fd)
                self._agents.append(started)


def _port(stream: socket.socket) -> int:
    """Read which port a client wants; 0 if it does not say so."""
    line = b""
    while not line.endswith(b"\n"):
        byte = stream.recv(1)
        if not byte:
            return 0
        line += byte
    return int(line.removeprefix(b"CONNECT "))


def spliced(near: socket.socket, far: socket.socket) -> threading.Thread:
    """Join two streams after the daemon's answer; returns the thread that copies."""

    def work() -> None:
        with near, far:
            with suppress(ConnectionError):  # the loop below finds the end
                near.sendall(b"OK 1073741824\n")
            while True:
                for one in select.select([near, far], [], [])[0]:
                    try:
                        data = one.recv(65536)
                        (far if one is near else near).sendall(data)
                    except ConnectionError:
                        data = b""
                    if not data:
                        return

    thread = threading.Thread(target=work)
    thread.start()
    return thread


def parent_of(pid: int) -> int:
    """Return the parent of a process."""
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def is_running(pid: int) -> bool:
    """Tell whether a process exists, and is no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def wait_until(condition: Callable[[], bool], seconds: float = BOUND_S) -> None:
    """Wait until a condition holds, for at most `seconds`."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        select.select((), (), (), 0.01)


def left_in_group(group: int) -> Iterator[int]:
    """Yield the processes of a process group."""
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            continue
        if int(fields[2]) == group and fields[0] != "Z":
            yield int(path.parent.name)
