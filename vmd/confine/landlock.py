"""Landlock: no files, no TCP, no signals to others and no abstract sockets for this process.

One that needs some files is given the directories that they are in; one that opens files anywhere
may still neither make nor remove, list nor execute any.

Descriptors that are open already stay usable. It restricts what the running kernel supports; a
kernel without Landlock restricts nothing, and the caller is told.

Source: Linux include/uapi/linux/landlock.h; landlock(7)
"""

import ctypes
import errno
import os
from collections.abc import Sequence
from typing import NamedTuple

from vmd.confine.syscalls import SYSCALLS
from vmm_kvm.libc import LIBC

_CREATE_RULESET_VERSION = 1
# How many kinds of file access each version of the interface can restrict, from version 1 on.
_FILE_RIGHTS = (13, 14, 15, 15, 16)
_TCP_SINCE = 4
_SCOPES_SINCE = 6
_TCP_RIGHTS = 0b11  # bind, connect
_SCOPES = 0b11  # abstract UNIX sockets, signals
_RULE_PATH_BENEATH = 1
_WRITE_AND_READ_FILE = 0b110
_EXECUTE, _READ_FILE, _READ_DIR = 1 << 0, 1 << 2, 1 << 3
_CHANGES = (
    1 << 1  # writing files
    | 0b11 << 4  # removing directories and files
    | 0b111 << 7  # making directories, files, sockets
    | 1 << 10  # FIFOs
    | 1 << 12  # symbolic links
    | 0b11 << 13  # names in other directories, truncating
)
_CONTENTS = _WRITE_AND_READ_FILE | 0b11 << 14
"""Reading, writing, truncating and device controls: an open file keeps them for others too."""


class _LandlockRulesetAttr(ctypes.Structure):
    """struct landlock_ruleset_attr."""

    _fields_ = (
        ("handled_access_fs", ctypes.c_uint64),
        ("handled_access_net", ctypes.c_uint64),
        ("scoped", ctypes.c_uint64),
    )


class _LandlockPathBeneathAttr(ctypes.Structure):
    """struct landlock_path_beneath_attr."""

    _pack_ = 1
    _layout_ = "ms"  # implied by `_pack_`; Python 3.14 wants it explicit
    _fields_ = (("allowed_access", ctypes.c_uint64), ("parent_fd", ctypes.c_int32))


class Subtree(NamedTuple):
    """A directory below which files may be used by descriptor and name."""

    fd: int
    is_writable: bool


def version() -> int:
    """Return the version of the kernel's interface, 0 if it has none or it is switched off."""
    found = LIBC.syscall(
        SYSCALLS["landlock_create_ruleset"], None, ctypes.c_size_t(0), _CREATE_RULESET_VERSION
    )
    return max(0, int(found))


def missing() -> str | None:
    """Return a line for the operator if the kernel has no Landlock, else None."""
    if version():
        return None
    return (
        "this kernel has no Landlock, or it is switched off: only system call filters and"
        " namespaces keep the processes of VMs from files and from each other"
    )


def restrict(
    writable: Sequence[str] = (),
    *,
    opens_files: bool = False,
    subtree: Subtree | None = None,
    programs: Sequence[str] = (),
) -> bool:
    """Restrict this thread and its later threads and children; needs no_new_privs.

    Files below the directories of `writable` can still be opened, to be read and written; those of
    `programs` can be read and executed. One that is not there is passed over. With `opens_files`,
    files that exist can be everywhere. Below `subtree` files and directories can be read, and made,
    changed and removed if it is writable.

    Returns False where the kernel has no Landlock.

    Raises:
        OSError: the kernel refused.
    """
    found = version()
    if not found:
        return False
    known = (1 << _FILE_RIGHTS[min(found, len(_FILE_RIGHTS)) - 1]) - 1
    attr = _LandlockRulesetAttr(
        handled_access_fs=known & ~_CONTENTS if opens_files else known,
        handled_access_net=_TCP_RIGHTS if found >= _TCP_SINCE else 0,
        scoped=_SCOPES if found >= _SCOPES_SINCE else 0,
    )
    # An older kernel takes a larger structure if the part that it does not know is zero.
    fd = _call("landlock_create_ruleset", ctypes.byref(attr), ctypes.c_size_t(ctypes.sizeof(attr)))
    try:
        for path in writable:
            _allow(fd, path, _WRITE_AND_READ_FILE)
        for path in programs:
            _allow(fd, path, _EXECUTE | _READ_FILE)
        if subtree:
            rights = _READ_FILE | _READ_DIR | (_CHANGES if subtree.is_writable else 0)
            _allow_below(fd, subtree.fd, rights & known)
        _call("landlock_restrict_self", fd)
    finally:
        os.close(fd)
    return True


def _allow(ruleset_fd: int, path: str, rights: int) -> None:
    try:
        directory = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except FileNotFoundError:
        return
    try:
        _allow_below(ruleset_fd, directory, rights)
    finally:
        os.close(directory)


def _allow_below(ruleset_fd: int, directory: int, rights: int) -> None:
    attr = _LandlockPathBeneathAttr(rights, directory)
    _call("landlock_add_rule", ruleset_fd, _RULE_PATH_BENEATH, ctypes.byref(attr))


def _call(name: str, *arguments: object) -> int:
    result = int(LIBC.syscall(SYSCALLS[name], *arguments, 0))
    if result < 0:
        number = ctypes.get_errno() or errno.EINVAL
        raise OSError(number, f"{name}: {os.strerror(number)}")
    return result
