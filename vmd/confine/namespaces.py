"""Empty namespaces: a process that sees no file and no network interface.

Only root can make them; see `sandbox`. No filter allows a call of System V's IPC or of POSIX
message queues, so there is no namespace for these.

Source: unshare(2), mount(2), pivot_root(2)
"""

import ctypes
import errno
import os

from vmd.confine.syscalls import SYSCALLS
from vmm_kvm.libc import LIBC

_CLONE_NEWNS = 0x00020000
_CLONE_NEWPID = 0x20000000
_CLONE_NEWNET = 0x40000000
_MS_RDONLY = 1
_MS_NOSUID = 2
_MS_NODEV = 4
_MS_NOEXEC = 8
_MS_REMOUNT = 32
_MS_MOVE = 8192
_MS_REC = 16384
_MS_PRIVATE = 1 << 18
_MNT_DETACH = 2

_MOUNT_POINT = "/proc"
"""A directory that every host has; the mount there is in our namespace alone."""
_FLAGS = _MS_NOSUID | _MS_NODEV | _MS_NOEXEC


def number_children_anew() -> None:
    """Put the processes that we fork from now on into a pid namespace; the next is its first.

    Needs CAP_SYS_ADMIN. When the first one ends, the kernel kills all others.

    Raises:
        OSError: the kernel refused.

    Source: pid_namespaces(7)
    """
    _call("unshare", _CLONE_NEWPID)


def leave_everything() -> None:
    """Move into namespaces with an empty, read-only root directory and no network.

    Needs CAP_SYS_ADMIN; open descriptors stay usable.

    Raises:
        OSError: the kernel refused; the message says at what.
    """
    _call("unshare", _CLONE_NEWNS | _CLONE_NEWNET)
    _mount(None, "/", None, _MS_REC | _MS_PRIVATE)
    _mount("none", _MOUNT_POINT, "tmpfs", _FLAGS, "mode=0555,nr_inodes=1,size=4k")
    os.chdir(_MOUNT_POINT)
    if LIBC.syscall(SYSCALLS["pivot_root"], b".", b".") == 0:
        _call("umount2", b".", _MNT_DETACH)
    elif ctypes.get_errno() == errno.EINVAL:  # the root is an initramfs, which cannot be moved away
        _mount(".", "/", None, _MS_MOVE)
        os.chroot(".")
    else:
        raise _error("pivot_root")
    os.chdir("/")
    _mount(None, "/", None, _MS_REMOUNT | _MS_RDONLY | _FLAGS)


def _mount(
    source: str | None, target: str, kind: str | None, flags: int, options: str | None = None
) -> None:
    encoded = [None if text is None else text.encode() for text in (source, target, kind, options)]
    _call("mount", *encoded[:3], flags, encoded[3])


def _call(name: str, *arguments: bytes | int | None) -> None:
    if getattr(LIBC, name)(*arguments):
        raise _error(name)


def _error(name: str) -> OSError:
    number = ctypes.get_errno()
    return OSError(number, f"{name}: {os.strerror(number)}")
