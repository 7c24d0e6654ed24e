"""The priv process: the only one that may change the host's network interfaces.

It has root's user and CAP_NET_ADMIN, and there are no networks in this release: it waits for the
parent's end.
"""

import socket


def serve(connection: socket.socket) -> None:
    """Wait until the parent is gone; it has nothing to say yet. Takes over `connection`."""
    with connection:
        while connection.recv(1):
            pass
