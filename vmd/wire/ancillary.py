"""Ancillary data of UNIX sockets: descriptors, and the peer's process.

The kernel translates process numbers into the reader's pid namespace.

Source: unix(7), "SCM_RIGHTS", "SCM_CREDENTIALS", "SO_PEERCRED".
"""

import array
import socket
import struct
from collections.abc import Sequence
from typing import NamedTuple

FDS_MAX = 64
"""Descriptors with one message."""

Ancillary = Sequence[tuple[int, int, bytes]]
"""As socket.recvmsg returns it."""

_INT_SIZE = array.array("i").itemsize
_UCRED = struct.Struct("=iII")
RIGHTS_SIZE = socket.CMSG_SPACE(FDS_MAX * _INT_SIZE)
"""Bytes of room for descriptors."""
CREDENTIALS_SIZE = socket.CMSG_SPACE(_UCRED.size)
"""Bytes of room for a message's sender."""


class Credentials(NamedTuple):
    """The peer's identity when the connection was made."""

    pid: int
    uid: int
    gid: int


def peer_credentials(connection: socket.socket) -> Credentials:
    """Return the peer's identity on a connected UNIX socket."""
    data = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size)
    return Credentials(*_UCRED.unpack(data))


def rights(fds: Sequence[int]) -> list[tuple[int, int, "array.array[int]"]]:
    """Return what sends descriptors with a message."""
    return [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []


def descriptors(ancillary: Ancillary) -> list[int]:
    """Return the descriptors that came with a message, which are the caller's."""
    fds = array.array("i")
    for level, kind, block in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            fds.frombytes(block[: len(block) - len(block) % _INT_SIZE])
    return fds.tolist()


def sender_pid(ancillary: Ancillary) -> int:
    """Return the process that has sent a message; 0 if the socket does not ask for it."""
    for level, kind, block in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_CREDENTIALS:
            return Credentials(*_UCRED.unpack(block)).pid
    return 0
