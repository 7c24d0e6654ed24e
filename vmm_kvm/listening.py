"""Listening UNIX sockets in the file system, which replace stale ones."""

import errno
import os
import socket
import stat
from pathlib import Path

from vmm_kvm.errors import SpecError


def listen(
    path: str, kind: socket.SocketKind, *, mode: int, backlog: int, server: str
) -> socket.socket:
    """Make a listening UNIX socket at `path` with the permissions `mode`.

    A stale socket, without a listener, is replaced; messages call the other listener `server`.

    Raises:
        SpecError: another program listens there, or another file is there.
        OSError: it cannot be made.
    """
    sock = socket.socket(socket.AF_UNIX, kind)
    # No other user may connect before the mode is set.
    before = os.umask(~mode & 0o777)
    try:
        try:
            sock.bind(path)
        except OSError as err:
            if err.errno != errno.EADDRINUSE:
                raise
            _remove_stale(path, kind, server)
            sock.bind(path)
        Path(path).chmod(mode)
        sock.listen(backlog)
    except BaseException:
        sock.close()
        raise
    finally:
        os.umask(before)
    return sock


def _remove_stale(path: str, kind: socket.SocketKind, server: str) -> None:
    if not stat.S_ISSOCK(os.lstat(path).st_mode):
        raise SpecError(f"{path}: is there, and no socket")
    with socket.socket(socket.AF_UNIX, kind) as probe:
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            Path(path).unlink()
            return
    raise SpecError(f"{path}: another {server} serves it")
