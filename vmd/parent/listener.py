"""The control socket, as the parent makes it.

Source: section 6 of OpenBSD's behaviour.
"""

import grp
import os
import socket
import struct
from contextlib import suppress
from pathlib import Path

from vmd.config.model import Owner
from vmd.confine.sandbox import owning
from vmm_kvm import listening
from vmm_kvm.errors import SpecError

GROUP = "vmd"
"""The group whose members may connect to root's daemon, if it exists."""
_BACKLOG = 128
_MODE = 0o660
_ACCESS = "system.posix_acl_access"
_ACL_VERSION = 2
_USER_OBJ, _USER, _GROUP_OBJ, _MASK, _OTHER = 1, 2, 4, 0x10, 0x20
_RW = 6
_NOBODY = 0xFFFF_FFFF


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

    The socket stays its user's, as root's daemon has no CAP_CHOWN: another one is let in by its
    access control list, and its own user no longer, unless that is root.

    Raises:
        ListenerError: the socket is gone, or its file system has no such lists.
    """
    uid, gid = owner.uid or 0, owner.gid or 0
    try:
        own = Path(path).stat().st_uid
        with owning(own, gid):
            with suppress(OSError):  # there is none
                os.removexattr(path, _ACCESS)
            os.chown(path, -1, gid)
            Path(path).chmod(_MODE)
            if uid != own:
                os.setxattr(path, _ACCESS, _access(uid, keeps_own=own == 0))
    except OSError as err:
        raise ListenerError(f"{path}: {err.strerror}") from err


def _access(uid: int, *, keeps_own: bool) -> bytes:
    """Return an access control list: a user and the group may connect.

    Source: acl(5); Linux include/uapi/linux/posix_acl_xattr.h
    """
    entries = (
        (_USER_OBJ, _RW if keeps_own else 0, _NOBODY),
        (_USER, _RW, uid),
        (_GROUP_OBJ, _RW, _NOBODY),
        (_MASK, _RW, _NOBODY),
        (_OTHER, 0, _NOBODY),
    )
    return struct.pack("<I", _ACL_VERSION) + b"".join(
        struct.pack("<HHI", *entry) for entry in entries
    )
