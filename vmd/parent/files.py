"""Files by the names that users give them, opened with the rights of whom it is for.

A name is resolved once, to a descriptor with which nothing can be done (O_PATH): opening it waits
for nobody and wakes no device. What that descriptor leads to is judged, and then opened through it,
so that a change of the path in between makes no difference. The links of /proc which lead to what
another process has open are not followed. Whether the user may search the directories on the way,
and read or write the file, the kernel says: this thread is that user for the time.

Source: openat2(2), open(2) "O_PATH", setfsuid(2), credentials(7)
"""

import ctypes
import errno
import os
import pwd
import stat
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext

from vmd.confine.syscalls import SYSCALLS

_AT_FDCWD = -100
_RESOLVE_NO_MAGICLINKS = 0x02
_UNCHANGED = 0xFFFF_FFFF
_NOGROUP = 65534

# File systems whose files are no data but the kernel's own affairs: to read or write one may do
# anything. Source: Linux include/uapi/linux/magic.h, and each file system's own source.
_PSEUDO = {
    0x9FA0: "procfs",
    0x62656572: "sysfs",
    0x64626720: "debugfs",
    0x74726163: "tracefs",
    0x73636673: "securityfs",
    0x62656570: "configfs",
    0x27E0EB: "cgroup",
    0x63677270: "cgroup2",
    0xCAFE4A11: "bpf",
    0xDE5E81E4: "efivarfs",
    0x6165676C: "pstore",
    0x42494E4D: "binfmt_misc",
    0xF97CFF8C: "selinuxfs",
    0x43415D53: "smackfs",
    0x5A3C69F0: "apparmorfs",
    0x19800202: "mqueue",
    0x1CD1: "devpts",
    0x6E736673: "nsfs",
    0x50495045: "pipefs",
    0x534F434B: "sockfs",
    0x09041934: "anon_inodefs",
    0x50494446: "pidfs",
    0x444D4142: "dmabuf",
    0x5345434D: "secretmem",
    0x67596969: "rpc_pipefs",
    0x6E667364: "nfsd",
    0x65735543: "fusectl",
    0x6C6F6F70: "binderfs",
    0x7655821: "resctrl",
    0xABBA1974: "xenfs",
}

_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long


class _OpenHow(ctypes.Structure):
    """struct open_how."""

    _fields_ = (
        ("flags", ctypes.c_uint64),
        ("mode", ctypes.c_uint64),
        ("resolve", ctypes.c_uint64),
    )


class _Statfs(ctypes.Structure):
    """struct statfs of x86-64: its type, and all else."""

    _fields_ = (("f_type", ctypes.c_long), ("rest", ctypes.c_long * 14))


class FileError(Exception):
    """A file is not to be had; `str()` is why, without the file's name."""

    def __init__(self, message: str, number: int) -> None:
        """`number` is the errno that goes with it."""
        super().__init__(message)
        self.errno = number


class FileKindError(FileError):
    """It is no regular file, and no permitted device."""


def open_file(path: str, user: int | None, *, writes: bool, allows_devices: bool) -> int:
    """Open a regular file, and nothing else, to read it, or to read and write it.

    `user` is the id of the user with whose rights; None for our own. With `allows_devices` it may
    be a block device too. Only for a process with one thread.

    Returns a descriptor, which is the caller's.

    Raises:
        FileError: there is no such file, or the user may not do this with it.
        FileKindError: it is of a wrong kind.
    """
    try:
        with ExitStack() as stack:
            stack.enter_context(nullcontext() if user is None else _acting_as(user))
            found = _resolve(path)
            stack.callback(os.close, found)
            _judge(found, allows_devices=allows_devices)
            # This link of /proc is our own, and leads to what was judged.
            flags = (os.O_RDWR if writes else os.O_RDONLY) | os.O_CLOEXEC | os.O_NONBLOCK
            return os.open(f"/proc/self/fd/{found}", flags | os.O_NOCTTY)
    except OSError as err:
        raise FileError(err.strerror or str(err), err.errno or errno.EIO) from err
    except ValueError as err:  # a null character, or one that is in no file's name
        raise FileError("not the name of a file", errno.EINVAL) from err


def _resolve(path: str) -> int:
    """Return an O_PATH descriptor of what a path leads to."""
    name = os.fsencode(path)
    if b"\0" in name:
        raise ValueError("embedded null byte")
    how = _OpenHow(flags=os.O_PATH | os.O_CLOEXEC, mode=0, resolve=_RESOLVE_NO_MAGICLINKS)
    fd = int(
        _libc.syscall(
            SYSCALLS["openat2"],
            _AT_FDCWD,
            ctypes.c_char_p(name),
            ctypes.byref(how),
            ctypes.c_size_t(ctypes.sizeof(how)),
        )
    )
    if fd < 0:
        number = ctypes.get_errno()
        if number == errno.ELOOP:
            raise OSError(number, "a link of /proc to an open file, or too many symbolic links")
        raise OSError(number, os.strerror(number))
    return fd


def _judge(fd: int, *, allows_devices: bool) -> None:
    mode = os.fstat(fd).st_mode
    if not stat.S_ISREG(mode) and not (allows_devices and stat.S_ISBLK(mode)):
        raise FileKindError("not a regular file", errno.EPERM)
    found = _Statfs()
    if _libc.fstatfs(fd, ctypes.byref(found)):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    kind = _PSEUDO.get(found.f_type & 0xFFFF_FFFF)
    # The node of a device may be anywhere; what it leads to is on no file system.
    if kind is not None and stat.S_ISREG(mode):
        raise FileKindError(f"a file of {kind}", errno.EPERM)


@contextmanager
def _acting_as(uid: int) -> Iterator[None]:
    """Have a user's rights over files, and no others, in this thread.

    The kernel takes away all of root's rights over files with the user id.
    """
    gid, groups = _groups_of(uid)
    before = os.getgroups()
    os.setgroups(groups)
    try:
        _set_ids(uid, gid)
        yield
    finally:
        _set_ids(os.geteuid(), os.getegid())
        os.setgroups(before)


def _groups_of(uid: int) -> tuple[int, list[int]]:
    """Return a user's own group, and all of them; an unknown user is in none."""
    try:
        user = pwd.getpwuid(uid)
    except KeyError:
        return _NOGROUP, []
    return user.pw_gid, os.getgrouplist(user.pw_name, user.pw_gid)


def _set_ids(uid: int, gid: int) -> None:
    _libc.setfsgid(ctypes.c_uint(gid))
    _libc.setfsuid(ctypes.c_uint(uid))
    # Neither says whether it has worked, but what the id is.
    if (
        _libc.setfsuid(ctypes.c_uint(_UNCHANGED)) != uid
        or _libc.setfsgid(ctypes.c_uint(_UNCHANGED)) != gid
    ):
        raise OSError(errno.EPERM, f"cannot have the rights of user {uid}")
