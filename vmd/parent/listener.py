"""The control socket, as the parent makes it.

Source: section 6 of OpenBSD's behaviour.
"""

import grp
import os
import socket
from pathlib import Path

from vmd.config.model import Owner
from vmm_kvm import listening
from vmm_kvm.errors import SpecError

GROUP = "vmd"
"""The group whose members may connect to root's daemon, if it exists."""
_BACKLOG = 128
_MODE = 0o660


class ListenerError(Exception):
    """The control socket cannot be made; `str()` is one line."""


def listen(path: str) -> socket.socket:
    """Make the control socket at `path`, in place of an abandoned one.

    Raises:
        ListenerError: another program serves it, or it cannot be made.
    """
    try:
        return listening.listen(
            path, socket.SOCK_SEQPACKET, mode=_MODE, backlog=_BACKLOG, server="vmd"
        )
    except SpecError as err:
        raise ListenerError(str(err)) from err
    except OSError as err:
        raise ListenerError(f"{path}: {err.strerror or err}") from err


def default_owner() -> Owner:
    """Return the owner of the socket of root's daemon if vm.conf names none: root, and `GROUP`.

    Without such a group, it is root's. OpenBSD's is root:wheel, which Debian has not.
    """
    try:
        return Owner(0, grp.getgrnam(GROUP).gr_gid)
    except KeyError:
        return Owner(0, 0)


def present_owner(path: str) -> Owner:
    """Return the owner that a socket has, which the service manager gave it.

    Raises:
        ListenerError: the socket is gone.
    """
    try:
        status = Path(path).stat()
    except OSError as err:
        raise ListenerError(f"{path}: {err.strerror}") from err
    return Owner(status.st_uid, status.st_gid)


def set_owner(path: str, owner: Owner) -> None:
    """Let `owner` connect to root's daemon; without a group, members of root's may too.

    Raises:
        ListenerError: the socket is gone.
    """
    try:
        os.chown(path, owner.uid or 0, owner.gid or 0)
    except OSError as err:
        raise ListenerError(f"{path}: {err.strerror}") from err
