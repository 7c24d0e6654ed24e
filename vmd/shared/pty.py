"""Consoles of VMs as terminals of the host, which the parent makes and hands to VM processes.

A console's terminal has the same name as long as the VM runs, over reboots. Its slave side is raw,
so that nothing a guest prints is echoed back to it as typed. See also `terminal_watch`.

A pty carries no BREAK on Linux; the console streams of the control protocol do.

Source: section 11 of OpenBSD's behaviour; pty(7)
"""

import errno
import grp
import os
import tty
from contextlib import ExitStack, nullcontext
from typing import NamedTuple

from vmd.confine.sandbox import owning
from vmd.shared.ring import make_ring

_TERMINAL_GROUP = "tty"
_READ_ONLY = {errno.EROFS}


class Pty(NamedTuple):
    """A VM's console; the holder owns the descriptors."""

    name: str
    """Path of the slave side."""
    master: int
    ring: int
    """See `ring`."""

    def close(self) -> None:
        """Give the terminal back, and close all descriptors; once."""
        for fd in self[1:]:
            os.close(fd)


def open_pty(name: str, uid: int, gid: int | None) -> Pty:
    """Make the console of the VM `name`; its terminal belongs to `uid` and `gid`, or group tty.

    An ordinary user's terminals stay the user's.

    Raises:
        OSError: the host has no terminals or descriptors left, or its terminal cannot be given to
            them, on a file system that can be written.
    """
    is_root = os.geteuid() == 0
    group, mode = _group_and_mode(gid)
    with ExitStack() as stack:
        with owning(uid, group) if is_root else nullcontext():
            master, slave = os.openpty()
            stack.callback(os.close, master)
            try:
                tty.setraw(slave)
                path = os.ttyname(slave)
                if is_root:
                    os.fchown(slave, -1, group)
                os.fchmod(slave, mode)
            except OSError as err:
                if err.errno not in _READ_ONLY:
                    raise
            finally:
                # The first closing of the slave side makes the master tell whether it is open.
                os.close(slave)
        os.set_blocking(master, False)
        ring = make_ring(name)
        stack.pop_all()
    return Pty(path, master, ring)


def _group_and_mode(gid: int | None) -> tuple[int, int]:
    """Return the group and the mode of a terminal; without a group, `tty` may write to it."""
    if gid is not None:
        return gid, 0o660
    try:
        return grp.getgrnam(_TERMINAL_GROUP).gr_gid, 0o620
    except KeyError:
        return 0, 0o600
