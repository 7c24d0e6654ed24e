"""A daemon whose control process lies: it tells the parent that its clients are root.

As a program, it takes the arguments of vmd. At each connection the process tries the next lie.
"""

from __future__ import annotations

import os
import socket

import msgspec

from vmd.__main__ import main
from vmd.control import process as control
from vmd.wire.channel import Received
from vmd.wire.internal import ClientAnswer, ClientCame, ClientRequest, ParentToControl
from vmd.wire.messages import Reset, ResetMode


class Liar(control.Control):
    """A control process that a client has compromised."""

    def _came(self, connection: socket.socket) -> None:
        """Take a client, and send for its connection a request that only root may make."""
        lie = connection.recvmsg(100)[0]
        reset = ClientRequest(client=1, request=Reset(mode=ResetMode.ALL))
        match lie:
            case b"listener":
                self._parent.send(ClientCame(client=1), [os.dup(self._acceptor._listener.fileno())])
            case b"parent":
                self._parent.send(ClientCame(client=1), [os.dup(self._parent.fileno())])
            case b"nobody":
                pass
            case b"uid":
                asked = {"type": "ClientRequest", "client": 1, "uid": 0, "gid": 0, "pid": 1}
                asked["request"] = {"type": "reset"}
                self._parent._socket.sendmsg([msgspec.msgpack.encode(asked)])
            case _:
                self._parent.send(ClientCame(client=1), [os.dup(connection.fileno())])
        self._parent.send(reset)
        self._victim = connection

    def _take(self, received: Received[ParentToControl]) -> None:
        """Let the client see the outcome."""
        received.fds.close()
        if isinstance(received.message, ClientAnswer):
            self._victim.sendmsg([msgspec.json.encode(received.message.answer)])


if __name__ == "__main__":
    control.Control = Liar  # type: ignore[misc] # what has taken the process over
    main()
