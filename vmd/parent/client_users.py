"""The users of the control process's clients, as the kernel tells them, not control.

control accepts connections and hands each over once, before its first request. The kernel knows the
user of the connection itself. So even a compromised control can ask for nothing in the name of a
user who has not connected.

Source: unix(7), "SO_PEERCRED"; socket(7), "SO_ACCEPTCONN".
"""

import os
import socket

from vmd.wire.ancillary import peer_credentials
from vmd.wire.channel import Fds, MalformedError
from vmd.wire.internal import CLIENTS_MAX, CLIENTS_OF_ROOT, UNANSWERED_MAX


class _Peer:
    __slots__ = ("uid", "unanswered")

    def __init__(self, uid: int | None) -> None:
        self.uid = uid
        self.unanswered = 0


class ClientUsers:
    """The users of the connections of successive control processes, and their pending requests.

    control limits each client's pending requests: a process that exceeds the limit is not our
    control.
    """

    def __init__(self, address: str | bytes) -> None:
        """Begin without connections; `address` is the listening socket's, as the kernel has it."""
        self._address = address
        self._peers: dict[int, _Peer] = {}

    def came(self, client: int, fds: Fds) -> None:
        """Note the user of a connection, and close it here.

        If control or we had no room for its descriptor, its number stays unknown.

        Raises:
            MalformedError: it is no connection that was accepted from our socket, or the number
                is taken.
        """
        if client in self._peers:
            raise MalformedError(f"client {client} comes a second time")
        if len(self._peers) >= CLIENTS_MAX + CLIENTS_OF_ROOT:
            raise MalformedError("too many clients")
        if fds.are_lost or not len(fds):
            self._peers[client] = _Peer(None)
            return
        fd = fds.take(0)
        try:
            connection = socket.socket(fileno=fd)
        except OSError as err:
            os.close(fd)
            raise MalformedError(f"client {client} is no socket") from err
        with connection:
            if not self._is_accepted(connection):
                raise MalformedError(f"client {client} is no connection of ours")
            self._peers[client] = _Peer(peer_credentials(connection).uid)

    def _is_accepted(self, connection: socket.socket) -> bool:
        """Tell whether a socket was accepted from ours.

        Control's other sockets, its own to us and the listening one, have root as their peer.
        """
        return (
            connection.family is socket.AF_UNIX
            and connection.type is socket.SOCK_SEQPACKET
            and not connection.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
            and connection.getsockname() == self._address
        )

    def asks(self, client: int) -> int | None:
        """Return this client's user; None if it is unknown.

        Raises:
            MalformedError: no such client has come, or it waits for too many answers.
        """
        peer = self._peers.get(client)
        if peer is None:
            raise MalformedError(f"client {client} has not come")
        if peer.unanswered >= UNANSWERED_MAX:
            raise MalformedError(f"client {client} has too many requests unanswered")
        peer.unanswered += 1
        return peer.uid

    def answered(self, client: int) -> None:
        """Note that one of a client's requests has been answered."""
        if peer := self._peers.get(client):
            peer.unanswered -= 1

    def gone(self, client: int) -> None:
        """Forget a client."""
        self._peers.pop(client, None)

    def forget_all(self) -> tuple[int, ...]:
        """Forget all clients; returns their numbers."""
        clients = tuple(self._peers)
        self._peers.clear()
        return clients
