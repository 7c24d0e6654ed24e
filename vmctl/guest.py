"""The way to a guest's agent, for the commands that need one: a connected stream.

A word with a slash in it is the path of a VM's vsock socket, as with `vmctl run --vsock` and
Firecracker; any other one names a VM of the daemon.
"""

import socket
import time

from vmctl.agent import Agent, AgentError
from vmctl.agent_frames import PORT
from vmctl.client import Client, CommandError, RefusedError, parse_target
from vmctl.ports import await_guest

_CONNECT_S = 30.0
_NO_AGENT = "the guest has no agent: nobody listens on its vsock port"
_REFUSALS = {
    "EINVAL": "the vm has no vsock device",
    "ENOENT": "vm not found",
}


def agent_of(word: str, deadline: float | None = None, *, daemon: str | None = None) -> Agent:
    """Return the agent of the VM that is named on a command line; nothing is connected yet.

    `deadline` is of the monotonic clock: connecting takes no longer. `daemon` is the daemon's
    socket, by default the commands'.
    """
    return Agent(lambda: _connected(word, deadline, daemon))


def _connected(word: str, deadline: float | None, daemon: str | None) -> socket.socket:
    """Connect to the agent.

    Raises:
        AgentError: there is none that answers.
        CommandError: there is no VM, or no daemon.
        TimeoutError: the deadline has come.
    """
    left = _CONNECT_S if deadline is None else min(_CONNECT_S, deadline - time.monotonic())
    try:
        if "/" in word:
            return _through_socket(word, left)
        return _through_daemon(word, left, daemon)
    except TimeoutError:
        if deadline is not None and time.monotonic() >= deadline:
            raise
        raise AgentError("the guest does not answer") from None


def _through_daemon(word: str, seconds: float, daemon: str | None) -> socket.socket:
    target = parse_target(word)
    with Client(daemon) as client:
        try:
            return client.connect(target.id or target.name, PORT, seconds)
        except RefusedError as err:
            raise CommandError(_REFUSALS.get(err.code) or str(err)) from None
        except CommandError as err:
            if str(err).endswith("connection refused"):
                raise AgentError(_NO_AGENT) from None
            raise


def _through_socket(path: str, seconds: float) -> socket.socket:
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
            stream.sendall(f"CONNECT {PORT}\n".encode())
            await_guest(stream, seconds)
        except ConnectionError:
            raise AgentError(_NO_AGENT) from None
    except BaseException:
        stream.close()
        raise
    return stream
