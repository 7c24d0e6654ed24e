"""The way to a guest's agent, and to other ports of its vsock device: a connected stream.

A word with a slash in it is the path of a VM's vsock socket, as with `vmctl run --vsock` and
Firecracker; any other one names a VM of the daemon.
"""

import socket
import time
from collections.abc import Iterator

from vmctl.client import Client, CommandError, RefusedError, parse_target
from vmctl.guest.agent import Agent, AgentError
from vmctl.guest.frames import PORT
from vmctl.ports import await_guest

_CONNECT_S = 30.0
_PAUSE_MIN_S, _PAUSE_MAX_S = 0.05, 2.0
_NO_AGENT = "the guest has no agent: nobody listens on its vsock port"
_REFUSALS = {
    "EINVAL": "the vm has no vsock device",
    "ENOENT": "vm not found",
}


def pauses() -> Iterator[float]:
    """Yield the seconds between attempts to reach a guest that is not ready, without an end.

    They grow: each attempt costs the host time, which a guest on a slow host needs for its start.
    """
    pause = _PAUSE_MIN_S
    while True:
        yield pause
        pause = min(1.25 * pause, _PAUSE_MAX_S)


class NobodyListensError(AgentError):
    """The guest does not accept a connection to that port."""


def agent_of(word: str, deadline: float | None = None, *, daemon: str | None = None) -> Agent:
    """Return the agent of the VM that is named on a command line; nothing is connected yet.

    `deadline` is of the monotonic clock: connecting takes no longer. `daemon` is the daemon's
    socket, by default the commands'.
    """
    return Agent(lambda: _agents_stream(word, deadline, daemon))


def _agents_stream(word: str, deadline: float | None, daemon: str | None) -> socket.socket:
    try:
        return connect_port(word, PORT, deadline, daemon=daemon)
    except NobodyListensError:
        raise AgentError(_NO_AGENT) from None


def connect_port(
    word: str, port: int, deadline: float | None = None, *, daemon: str | None = None
) -> socket.socket:
    """Connect to a vsock port of the VM that is named on a command line; see `agent_of`.

    Raises:
        NobodyListensError: no program listens there.
        AgentError: it does not answer.
        CommandError: there is no VM, or no daemon.
        TimeoutError: the deadline has come.
    """
    left = _CONNECT_S if deadline is None else min(_CONNECT_S, deadline - time.monotonic())
    try:
        if "/" in word:
            return _through_socket(word, port, left)
        return _through_daemon(word, port, left, daemon)
    except TimeoutError:
        if deadline is not None and time.monotonic() >= deadline:
            raise
        raise AgentError("the guest does not answer") from None


def _through_daemon(word: str, port: int, seconds: float, daemon: str | None) -> socket.socket:
    target = parse_target(word)
    with Client(daemon) as client:
        try:
            return client.connect(target.id or target.name, port, seconds)
        except RefusedError as err:
            raise CommandError(_REFUSALS.get(err.code) or str(err)) from None
        except CommandError as err:
            if str(err).endswith("connection refused"):
                raise NobodyListensError(str(err)) from None
            raise


def _through_socket(path: str, port: int, seconds: float) -> socket.socket:
    """Connect by a VM's vsock socket.

    Source: Firecracker's docs/vsock.md, "Host-Initiated Connections".
    """
    stream = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        try:
            stream.connect(path)
        except OSError as err:
            raise AgentError(f"connect: {path}: {err.strerror or err}") from err
        try:
            stream.sendall(f"CONNECT {port}\n".encode())
            await_guest(stream, seconds)
        except ConnectionError:
            raise NobodyListensError(f"port {port}: connection refused") from None
    except BaseException:
        stream.close()
        raise
    return stream
