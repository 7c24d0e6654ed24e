"""The control socket, as the parent makes it.

Source: section 6 of OpenBSD's behaviour.
"""

import os
import socket

from vmd.config.model import Owner
from vmm_kvm import listening
from vmm_kvm.errors import SpecError

_BACKLOG = 128
_MODE = 0o660


class ListenerError(Exception):
    """There can be no control socket; `str()` is one line."""


def listen(path: str) -> socket.socket:
    """Make the control socket at `path`, instead of one that nobody serves any more.

    Raises:
        ListenerError: somebody serves it, or it cannot be made.
    """
    try:
        return listening.listen(
            path, socket.SOCK_SEQPACKET, mode=_MODE, backlog=_BACKLOG, server="vmd"
        )
    except SpecError as err:
        raise ListenerError(str(err)) from err
    except OSError as err:
        raise ListenerError(f"{path}: {err.strerror or err}") from err


def set_owner(path: str, owner: Owner | None) -> None:
    """Let `owner` speak to a daemon of root; without one only root and its group may.

    Raises:
        ListenerError: the socket is gone.
    """
    try:
        os.chown(path, (owner and owner.uid) or 0, (owner and owner.gid) or 0)
    except OSError as err:
        raise ListenerError(f"{path}: {err.strerror}") from err
