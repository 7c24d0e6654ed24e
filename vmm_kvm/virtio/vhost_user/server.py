"""A vhost-user server: one backend, one socket, one front-end at a time.

While a front-end is connected, others wait in the socket's backlog.
"""

import os
import socket
from collections.abc import Callable

from vmm_kvm import listening
from vmm_kvm.accepting import Acceptor
from vmm_kvm.errors import SpecError
from vmm_kvm.log import Log
from vmm_kvm.loop import EventLoop
from vmm_kvm.virtio.device import Backend
from vmm_kvm.virtio.vhost_user.channel import Channel
from vmm_kvm.virtio.vhost_user.session import Session

log = Log(__name__)

_BACKLOG = 4
_OWNER_ONLY = 0o600


class Server:
    """Serves `backend` on the event loop's thread; `close` ends it. The backend stays the caller's.

    `on_end` is called, on the loop's thread, when there is nothing more to serve: the connection
    has ended, and there is no listening socket, or it is for one front-end only.
    """

    def __init__(
        self,
        sock: socket.socket,
        backend: Backend,
        loop: EventLoop,
        *,
        is_one_shot: bool = False,
        on_end: Callable[[], None],
    ) -> None:
        """Take ownership of `sock`: a UNIX stream socket that listens, or that is connected."""
        self._socket: socket.socket | None = None
        self._backend = backend
        self._loop = loop
        self._is_one_shot = is_one_shot
        self._on_end = on_end
        self._session: Session | None = None
        sock.setblocking(False)
        self._acceptor = Acceptor(loop, sock, self._accepted)
        if sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
            self._socket = sock
            self._acceptor.start()
        else:
            self._begin(sock)

    def close(self) -> None:
        """End the connection and stop listening; idempotent."""
        if self._session:
            self._session.close()
            self._session = None
        if self._socket:
            self._acceptor.stop()
            self._socket.close()
            self._socket = None

    def _accepted(self, connection: socket.socket) -> None:
        connection.setblocking(False)
        self._acceptor.stop()
        self._begin(connection)

    def _begin(self, connection: socket.socket) -> None:
        self._session = Session(Channel(connection), self._backend, self._loop, self._ended)

    def _ended(self, reason: str | None) -> None:
        self._session = None
        if reason is not None:
            log.warning("%s", reason)
        if self._socket is None or self._is_one_shot:
            self._on_end()
        else:
            self._acceptor.start()


def listen(path: str) -> socket.socket:
    """Make a listening UNIX socket at `path` that only this user may connect to.

    A stale socket, without a listener, is replaced.

    Raises:
        SpecError: another program listens there, or another file is there.
        OSError: it cannot be made.
    """
    return listening.listen(
        path, socket.SOCK_STREAM, mode=_OWNER_ONLY, backlog=_BACKLOG, server="process"
    )


def inherited(fd: int) -> socket.socket:
    """Take ownership of `fd`, a UNIX stream socket that this process was started with.

    Raises:
        SpecError: it is none.
    """
    try:
        sock = socket.socket(fileno=fd)
    except OSError as err:
        raise SpecError(f"descriptor {fd}: {err.strerror}") from err
    if sock.family != socket.AF_UNIX or sock.type != socket.SOCK_STREAM:
        sock.detach()
        raise SpecError(f"descriptor {fd}: not a UNIX stream socket")
    os.set_inheritable(fd, False)
    return sock
