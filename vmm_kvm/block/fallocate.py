"""fallocate(2) with its modes, which Python's `os` lacks."""

import ctypes
import os
from errno import EINTR

from vmm_kvm.libc import LIBC

_FALLOC_FL_KEEP_SIZE = 0x01
_FALLOC_FL_PUNCH_HOLE = 0x02
_FALLOC_FL_ZERO_RANGE = 0x10


def allocate(fd: int, offset: int, size: int) -> None:
    """Give a range its blocks, so that a later write needs none; what it reads as stays.

    Raises:
        OSError: EOPNOTSUPP where the file system cannot, ENOSPC, or an I/O fault.
    """
    _call(fd, _FALLOC_FL_KEEP_SIZE, offset, size)


def punch_hole(fd: int, offset: int, size: int) -> None:
    """Give the blocks of a range back to the file system; it then reads as zero.

    Raises:
        OSError: EOPNOTSUPP where the file system cannot, or an I/O fault.
    """
    _call(fd, _FALLOC_FL_PUNCH_HOLE | _FALLOC_FL_KEEP_SIZE, offset, size)


def zero_range(fd: int, offset: int, size: int) -> None:
    """Make a range read as zero and keep blocks allocated for it.

    Raises:
        OSError: EOPNOTSUPP where the file system cannot, ENOSPC, or an I/O fault.
    """
    _call(fd, _FALLOC_FL_ZERO_RANGE | _FALLOC_FL_KEEP_SIZE, offset, size)


def _call(fd: int, mode: int, offset: int, size: int) -> None:
    while LIBC.fallocate(fd, mode, offset, size) != 0:
        number = ctypes.get_errno()
        if number != EINTR:
            raise OSError(number, os.strerror(number))
