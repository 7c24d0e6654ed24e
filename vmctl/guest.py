"""The way to a guest's agent, for the commands that need one: a connected stream.

A word with a slash in it is the path of a VM's vsock socket, as `vmctl run --vsock` and Firecracker
have it.
"""

import socket
import time

from vmctl.agent import Agent, AgentError
from vmctl.agent_frames import PORT
from vmctl.client import CommandError

_CONNECT_S = 30.0
_ANSWER_MAX = 64


def agent_of(word: str) -> Agent:
    """Return the agent of the VM that is named on a command line; nothing is connected yet."""
    return Agent(lambda: _connected(word))


def _connected(word: str) -> socket.socket:
    if "/" in word:
        return _through_socket(word)
    raise CommandError(f"invalid id: {word}")


def _through_socket(path: str) -> socket.socket:
    """Connect by a VM's vsock socket.

    Raises:
        AgentError: nobody listens, there or in the guest.

    Source: Firecracker's docs/vsock.md, "Host-Initiated Connections".
    """
    stream = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        stream.settimeout(_CONNECT_S)
        stream.connect(path)
        stream.sendall(f"CONNECT {PORT}\n".encode())
        _check_answer(stream)
    except OSError as err:
        stream.close()
        raise AgentError(f"connect: {path}: {err.strerror or err}") from err
    except BaseException:
        stream.close()
        raise
    return stream


def _check_answer(stream: socket.socket) -> None:
    answer = b""
    until = time.monotonic() + _CONNECT_S
    # What the agent says follows at once: not a byte of it may be taken here.
    while not answer.endswith(b"\n"):
        one = stream.recv(1)
        if not one or len(answer) >= _ANSWER_MAX or time.monotonic() > until:
            raise AgentError("the guest has no agent: nobody listens on its port")
        answer += one
    if not answer.startswith(b"OK "):
        raise AgentError("not a socket of a VM's vsock")
