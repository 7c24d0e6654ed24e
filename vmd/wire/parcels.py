"""Files of clients within sockets, so that nobody waits for their file systems.

The file system of a client may let close(2) wait for ever (flush of a FUSE file system), and so may
it the last reference that goes. That includes a process that forks, as the child closes what it is
not to have. So the long-lived processes have no such descriptor: they pass on a *parcel*, a UNIX
SOCK_SEQPACKET socket in which one message waits that has the file with it. A process that uses
the file takes a descriptor out by MSG_PEEK, which leaves the file in the parcel for later.

A *keeper* is the other end of the parcel: it tells, by a hang-up, when nobody has the parcel any
more. The process that holds the keeper and the file has the last reference.

Source: unix(7), recv(2) "MSG_PEEK"; Linux fs/fuse/file.c, fuse_flush, fuse_release
"""

import errno
import os
import socket
from collections.abc import Iterable

from vmd.wire.ancillary import descriptors, rights

_ROOM = socket.CMSG_SPACE(4)


def wrap(fd: int) -> tuple[int, int]:
    """Return a parcel with a file, and its keeper; all three descriptors are the caller's.

    Raises:
        OSError: this process or its user has no descriptors left.
    """
    keeper, parcel = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with keeper, parcel:
        keeper.sendmsg([b"\0"], rights([fd]), socket.MSG_DONTWAIT)
        return parcel.detach(), keeper.detach()


def unwrap(fd: int) -> int | None:
    """Return a new descriptor of the file in a parcel; None if `fd` is no parcel.

    The file is the same open one each time: with one position, and one set of locks.

    Raises:
        OSError: this process has no descriptors left, or nothing is in it.
    """
    try:
        parcel = socket.socket(fileno=fd)
    except OSError as err:
        if err.errno not in {errno.ENOTSOCK, errno.EBADF}:  # the latter with O_PATH
            raise
        return None
    try:
        if parcel.family != socket.AF_UNIX or parcel.type != socket.SOCK_SEQPACKET:
            return None
        flags = socket.MSG_PEEK | socket.MSG_DONTWAIT | socket.MSG_CMSG_CLOEXEC
        ancillary = parcel.recvmsg(1, _ROOM, flags)[1]
    finally:
        parcel.detach()
    found = descriptors(ancillary)
    if not found:
        raise OSError(errno.EBADF, "no descriptor left, or no file in a parcel")
    return found[0]


def opened(fds: Iterable[int]) -> list[int]:
    """Take files out of their parcels for good, in the process that uses them; takes over `fds`.

    What is in no parcel stays as it is.

    Raises:
        OSError: as `unwrap`; all are closed.
    """
    files = list(fds)
    try:
        for place, fd in enumerate(files):
            if (file := unwrap(fd)) is not None:
                files[place] = file
                os.close(fd)
    except BaseException:
        for fd in files:
            os.close(fd)
        raise
    return files
