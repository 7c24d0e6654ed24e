"""Which users the clients of the control process are: asked of the kernel, not of control.

control accepts connections and hands each over once, before the first request that comes from it.
The kernel noted who connected, and tells it of the connection itself. So control can ask for
nothing in the name of a user who has not connected, whatever becomes of it.

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
    """The users of the connections of one control process after another, and what they wait for.

    control gives each client no more to wait for than it may: one that does is not control.
    """

    def __init__(self, address: str | bytes) -> None:
        """Know nobody; `address` is that of the listening socket, as the kernel tells it."""
        self._address = address
        self._peers: dict[int, _Peer] = {}

    def came(self, client: int, fds: Fds) -> None:
        """Note whose connection came along, and close it here.

        If control or we had no room for its descriptor, nobody is known under this number.

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

        Others that control has name root as their peer: its own to us, and the listening one.
        """
        return (
            connection.family is socket.AF_UNIX
            and connection.type is socket.SOCK_SEQPACKET
            and not connection.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
            and connection.getsockname() == self._address
        )

    def asks(self, client: int) -> int | None:
        """Return which user asks as this client; None for one that cannot be told.

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
