"""The control socket, as the parent makes it.

Source: section 6 of OpenBSD's behaviour.
"""

import errno
import os
import socket
import stat
from pathlib import Path

from vmd.config.model import Owner

_BACKLOG = 128
_MODE = 0o660
_OTHERS = 0o117  # what a umask takes for that mode


class ListenerError(Exception):
    """There can be no control socket; `str()` is one line."""


def listen(path: str) -> socket.socket:
    """Make the control socket at `path`, instead of one that nobody serves any more.

    Raises:
        ListenerError: somebody serves it, or it cannot be made.
    """
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    before = os.umask(_OTHERS)
    try:
        try:
            sock.bind(path)
        except OSError as err:
            if err.errno != errno.EADDRINUSE:
                raise
            _remove_stale(path)
            sock.bind(path)
        Path(path).chmod(_MODE)
        sock.listen(_BACKLOG)
    except OSError as err:
        sock.close()
        raise ListenerError(f"{path}: {err.strerror or err}") from err
    except ListenerError:
        sock.close()
        raise
    finally:
        os.umask(before)
    return sock


def set_owner(path: str, owner: Owner | None) -> None:
    """Let `owner` speak to a daemon of root; without one only root and its group may.

    Raises:
        ListenerError: the socket is gone.
    """
    try:
        os.chown(path, (owner and owner.uid) or 0, (owner and owner.gid) or 0)
    except OSError as err:
        raise ListenerError(f"{path}: {err.strerror}") from err


def _remove_stale(path: str) -> None:
    if not stat.S_ISSOCK(os.lstat(path).st_mode):
        raise ListenerError(f"{path}: is there, and no socket")
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as probe:
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            Path(path).unlink()
            return
    raise ListenerError(f"{path}: another vmd serves it")
