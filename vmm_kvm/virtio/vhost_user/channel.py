"""Messages and descriptors over a UNIX stream socket, in both directions.

A message is read to its last byte and not further, so that descriptors, which a stream keeps in
place among its bytes, arrive with the message that they belong to. Every descriptor that is
received has an owner from then on: the `Fds` of its message, which closes those that were not
taken.

Source: unix(7), "SCM_RIGHTS"; QEMU docs/interop/vhost-user.
"""

import array
import os
import socket
import stat
from collections.abc import Iterator, Sequence
from typing import NamedTuple, Self

from vmm_kvm.virtio.vhost_user.messages import (
    FDS_MAX,
    HEADER_SIZE,
    VERSION,
    Header,
    VhostUserError,
    request_name,
)

_INT_SIZE = array.array("i").itemsize
# The kernel passes up to 253 at once; it closes those that do not fit, and says so.
_ANCILLARY_SIZE = socket.CMSG_SPACE(FDS_MAX * _INT_SIZE)


class Fds:
    """Received descriptors; a context manager that closes those that were not taken."""

    __slots__ = ("_fds",)

    def __init__(self, fds: Sequence[int] = ()) -> None:
        """Take ownership of `fds`."""
        self._fds = list(fds)

    def __len__(self) -> int:
        return len(self._fds)

    def __iter__(self) -> Iterator[int]:
        """Yield those that are left; they stay this object's."""
        return iter(self._fds)

    def add(self, fds: Sequence[int]) -> None:
        """Take ownership of more, behind those that are there."""
        self._fds += fds

    def take(self) -> int:
        """Hand the first descriptor over to the caller, who closes it.

        Raises:
            VhostUserError: none is left.
        """
        if not self._fds:
            raise VhostUserError("a descriptor is missing")
        return self._fds.pop(0)

    def close(self) -> None:
        """Close the remaining ones; idempotent."""
        while self._fds:
            os.close(self._fds.pop())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


class Message(NamedTuple):
    """One message; its receiver closes `fds`, by using them as a context manager."""

    request: int
    flags: int
    payload: bytes
    fds: Fds


class Channel:
    """One end of a connection; owns its socket. Not for two threads at once.

    The socket may block or not: a message that has not fully arrived is kept, and `receive` goes
    on with it when it is called again.
    """

    __slots__ = ("_data", "_fds", "_header", "socket")

    def __init__(self, connection: socket.socket) -> None:
        """Take ownership of `connection`, a connected UNIX stream socket."""
        self.socket = connection
        self._data = b""
        self._fds = Fds()
        self._header: Header | None = None

    def close(self) -> None:
        """Close the socket and descriptors of an unfinished message; idempotent."""
        self._fds.close()
        self.socket.close()

    def fileno(self) -> int:
        """Return the socket's descriptor, to wait for."""
        return self.socket.fileno()

    def receive(self) -> Message | None:
        """Return the next message, or None at the peer's orderly end.

        Raises:
            BlockingIOError: the message has not arrived fully, and the socket does not block.
            VhostUserError: what arrived is no message, it is cut short, or has a socket with it.
            OSError: the connection is broken, or a socket that blocks timed out.
        """
        if self._header is None:
            if not self._fill(HEADER_SIZE):
                if self._data:
                    raise VhostUserError("the connection ended in a message")
                return None
            self._header = Header.unpack(self._data)
            self._data = b""
        header = self._header
        if not self._fill(header.size):
            raise VhostUserError(f"{request_name(header.request)}: the connection ended in it")
        message = Message(header.request, header.flags, self._data, self._fds)
        self._header, self._data, self._fds = None, b"", Fds()
        return message

    def send(
        self, request: int, payload: bytes = b"", *, flags: int = 0, fds: Sequence[int] = ()
    ) -> None:
        """Send a message; `fds` stay the caller's.

        A message fits any socket's buffer, so a peer that does not take it is treated as broken.

        Raises:
            VhostUserError: the peer does not take it.
            OSError: the connection is broken.
        """
        data = Header(request, VERSION | flags, len(payload)).pack() + payload
        ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        try:
            sent = self.socket.sendmsg([data], ancillary, socket.MSG_NOSIGNAL)
        except BlockingIOError as err:
            raise VhostUserError("the peer does not read") from err
        if sent != len(data):
            raise VhostUserError("the peer does not read")

    def _fill(self, size: int) -> bool:
        """Read until `size` bytes of data are there; False if the connection ends before."""
        while len(self._data) < size:
            # Not socket.recv_fds, which ignores its flags (python/cpython#107898).
            data, ancillary, flags, _ = self.socket.recvmsg(
                size - len(self._data), _ANCILLARY_SIZE, socket.MSG_CMSG_CLOEXEC
            )
            for level, kind, block in ancillary:
                if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                    whole = len(block) - len(block) % _INT_SIZE
                    self._fds.add(array.array("i", block[:whole]))
                    _refuse_sockets(self._fds)
            if flags & socket.MSG_CTRUNC or len(self._fds) > FDS_MAX:
                raise VhostUserError(f"more than {FDS_MAX} descriptors")
            if not data:
                return False
            self._data += data
        return True


def _refuse_sockets(fds: Fds) -> None:
    """Raise VhostUserError if there is a socket among the descriptors: no message has one.

    It could be the other end of the connection itself, which would then never end.
    """
    for fd in fds:
        if stat.S_ISSOCK(os.fstat(fd).st_mode):
            raise VhostUserError("a socket among the descriptors")
