"""Memory with a descriptor, which other processes can map; made only here.

The kernel gives a memfd the mode 0777: a process that may look into another's /proc/PID/fd could
open it anew. Here its mode is 0600, no program can be executed from it, and seals keep every holder
of a descriptor from changing its size, or its contents, more than its use requires.

Source: memfd_create(2), fcntl(2) "File Sealing", Linux Documentation/userspace-api/mfd_noexec.rst
"""

import errno
import fcntl
import os
from collections.abc import Iterable

_MFD_NOEXEC_SEAL = 0x8
_FLAGS = os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING
MODE = 0o600
"""Permissions of every memfd."""

SIZE_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
"""The size is fixed: no process that maps it faults because another has truncated it."""
ALL_SEALS = SIZE_SEALS | fcntl.F_SEAL_WRITE
"""The contents are fixed too."""


def make_scratch(name: str) -> int:
    """Return the descriptor of an empty memfd that can grow; the caller owns it.

    `name` is for /proc alone.

    Raises:
        OSError: the host has no memory or descriptors left.
    """
    try:
        fd = os.memfd_create(name, _FLAGS | _MFD_NOEXEC_SEAL)
    except OSError as err:
        if err.errno != errno.EINVAL:  # before Linux 6.3
            raise
        fd = os.memfd_create(name, _FLAGS)
    try:
        os.fchmod(fd, MODE)
    except BaseException:
        os.close(fd)
        raise
    return fd


def make_memory(name: str, size: int) -> int:
    """Return the descriptor of `size` bytes of zeros, sealed at that size; the caller owns it.

    Raises:
        OSError: the host has no memory or descriptors left.
    """
    fd = make_scratch(name)
    try:
        os.ftruncate(fd, size)
        seal(fd, SIZE_SEALS)
    except BaseException:
        os.close(fd)
        raise
    return fd


def make_constant(name: str, pieces: Iterable[bytes | memoryview]) -> int:
    """Return the descriptor of memory that holds `pieces`, and can never change; the caller's.

    Raises:
        OSError: the host has no memory or descriptors left.
    """
    fd = make_scratch(name)
    try:
        for piece in pieces:
            view = memoryview(piece)
            while view:
                view = view[os.write(fd, view) :]
        seal(fd, ALL_SEALS)
    except BaseException:
        os.close(fd)
        raise
    return fd


def seal(fd: int, seals: int) -> None:
    """Keep everyone from changing memory in these ways from now on.

    Raises:
        OSError: it is no such memory, or it can still be written: it is mapped for writing.
    """
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
