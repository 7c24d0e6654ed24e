"""Locks on image files that this program, and QEMU, take and respect: one writer, or readers.

QEMU's convention, which is stable because its processes of different versions meet on one file:
open-file-description locks of single bytes, all of them shared. Byte 100 + p says "I use
permission p", byte 200 + p says "I let nobody else use permission p". A process takes its bytes,
then checks whether another holds an opposing one, and gives way if so; of two that start at once at
least one sees the other. (Seen in /proc/locks beside qemu-io 10.0: a writer has 100, 101, 103, 201
and 203, a reader 100, 201 and 203.)

A lock belongs to the open file description: it goes when the last descriptor of it is closed, in
whatever process that is, so a descriptor can be locked here and handed to another process.
"""

import errno
import fcntl
import os
import struct
from collections.abc import Sequence
from contextlib import suppress
from enum import IntEnum

from vmm_kvm.errors import ImageError

_USED = 100
_NOT_SHARED = 200
_LOCKS = 200  # bytes from the first on, all of which are locks
_FLOCK = struct.Struct("hhqqi4x")  # struct flock of x86-64: type, whence, start, length, pid


class Permission(IntEnum):
    """Uses of an image; QEMU's numbers."""

    CONSISTENT_READ = 0
    WRITE = 1
    RESIZE = 3


_READER = (Permission.CONSISTENT_READ,)
_WRITER = (Permission.CONSISTENT_READ, Permission.WRITE, Permission.RESIZE)
_EXCLUSIVE = (Permission.WRITE, Permission.RESIZE)


def lock(fd: int, name: str, *, writes: bool) -> None:
    """Lock the image open at `fd` as its writer, or as one of its readers, who exclude writers.

    On failure nothing is locked by `fd`. A file system without locks is no reason to refuse an
    image: there, nothing is locked.

    Raises:
        ImageError: another process uses the image; messages call it `name`.
    """
    try:
        _lock(fd, name, _WRITER if writes else _READER)
    except ImageError as err:
        unlock(fd)
        if isinstance(err, _UsedError):  # bytes locked now are locked by others
            raise ImageError(f"{err}{_holders(fd)}") from err
        raise


class _UsedError(ImageError):
    """Another process uses the image."""


def unlock(fd: int) -> None:
    """Release the locks of the open file description of `fd`, of any process that has made them.

    Raises:
        OSError: the file system has failed.
    """
    record = _FLOCK.pack(fcntl.F_UNLCK, os.SEEK_SET, _USED, _LOCKS, 0)
    fcntl.fcntl(fd, fcntl.F_OFD_SETLK, record)


def is_written(fd: int) -> bool:
    """Tell whether another open file description is locked for writing to the image.

    True as well where the file system has no locks, and does not tell.
    """
    try:
        return _is_held(fd, _USED + Permission.WRITE)
    except OSError:
        return True


def _lock(fd: int, name: str, used: Sequence[Permission]) -> None:
    try:
        for permission in used:
            _set(fd, _USED + permission)
        for permission in _EXCLUSIVE:
            _set(fd, _NOT_SHARED + permission)
        for permission in used:
            if _is_held(fd, _NOT_SHARED + permission):
                raise _UsedError(f"{name}: in use by another process")
        for permission in _EXCLUSIVE:
            if _is_held(fd, _USED + permission):
                raise _UsedError(f"{name}: another process writes to it")
    except OSError as err:
        if err.errno in {errno.EAGAIN, errno.EACCES}:
            raise _UsedError(f"{name}: locked by another process") from err
        if err.errno not in {errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL}:
            raise ImageError(f"{name}: {err.strerror}") from err


def _set(fd: int, byte: int) -> None:
    record = _FLOCK.pack(fcntl.F_RDLCK, os.SEEK_SET, byte, 1, 0)
    fcntl.fcntl(fd, fcntl.F_OFD_SETLK, record)


def _is_held(fd: int, byte: int) -> bool:
    """Tell whether another open file description has a lock on `byte`."""
    record = _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, byte, 1, 0)
    kind: int = _FLOCK.unpack(fcntl.fcntl(fd, fcntl.F_OFD_GETLK, record))[0]
    return kind != fcntl.F_UNLCK


def _holders(fd: int) -> str:
    """Return which processes have the file locked, as far as this one may see: `: pid 7 (qemu)`.

    The kernel does not say whose a lock of an open file description is, but which descriptors have
    one. Where it does not, those that have the file open are named.

    Source: proc(5), "fdinfo"
    """
    ours = os.fstat(fd)
    found: dict[bool, list[str]] = {True: [], False: []}
    with suppress(OSError):  # no /proc here
        for pid in filter(str.isdecimal, os.listdir("/proc")):  # noqa: PTH208 - pathlib costs 8 ms
            with suppress(OSError):  # gone, or another user's
                has_lock = None if int(pid) == os.getpid() else _has_lock(pid, ours)
                if has_lock is not None:
                    with open(f"/proc/{pid}/comm", encoding="utf-8", errors="replace") as file:  # noqa: PTH123 - the same
                        found[has_lock].append(f"pid {pid} ({file.read().strip()})")
    named = found[True] or found[False]
    return f": {', '.join(named)}" if named else ""


def _has_lock(pid: str, ours: os.stat_result) -> bool | None:
    """Tell whether a process has a lock on the file; None if it does not have it open."""
    found = None
    for entry in os.listdir(f"/proc/{pid}/fd"):  # noqa: PTH208 - pathlib costs 8 ms
        with suppress(OSError):  # closed meanwhile
            if os.path.samestat(os.stat(f"/proc/{pid}/fd/{entry}"), ours):  # noqa: PTH116 - the same
                found = False
                with open(f"/proc/{pid}/fdinfo/{entry}", "rb") as file:  # noqa: PTH123 - the same
                    if b"\nlock:" in file.read():
                        return True
    return found
