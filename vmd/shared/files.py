"""Files by the names that users give them, and files that users have opened.

A name is resolved once, to an O_PATH descriptor, which does no I/O: opening it waits for no other
end and wakes no device. The file behind the descriptor is checked, and then opened through it, so
that a change of the path in between makes no difference. Links of /proc to other processes' open
files are not followed. The kernel checks the rights of this process to search the directories and
to read or write the file.

Source: openat2(2), open(2) "O_PATH"
"""

import ctypes
import errno
import fcntl
import os
import stat

from vmd.confine.syscalls import SYSCALLS
from vmm_kvm.libc import LIBC

_AT_FDCWD = -100
_RESOLVE_NO_MAGICLINKS = 0x02
_SHARED = ("/tmp/", "/var/tmp/")  # noqa: S108 - which a unit may have for itself

# File systems whose files are kernel interfaces, not data: reading or writing one may do anything.
# Source: Linux include/uapi/linux/magic.h, and each file system's own source.
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
    """A file is unavailable; `str()` is the reason, without the file's name."""

    def __init__(self, message: str, number: int) -> None:
        """`number` is the errno that goes with it."""
        super().__init__(message)
        self.errno = number


class FileKindError(FileError):
    """It is no regular file, and no permitted device."""


def open_file(path: str, *, writes: bool, allows_devices: bool) -> int:
    """Open a regular file, and nothing else, to read it, or to read and write it.

    With `allows_devices` it may be a block device too. Returns a descriptor, which is the caller's.

    Raises:
        FileError: there is no such file, or this process may not do this with it.
        FileKindError: it is of a wrong kind.
    """
    try:
        found = _resolve(path)
        try:
            _judge(found, allows_devices=allows_devices)
            # This link of /proc is our own, and leads to the checked file.
            flags = (os.O_RDWR if writes else os.O_RDONLY) | os.O_NONBLOCK | os.O_NOCTTY
            return _openat2(b"/proc/self/fd/%d" % found, flags, 0)
        finally:
            os.close(found)
    except OSError as err:
        raise FileError(_reason(err, path), err.errno or errno.EIO) from err
    except ValueError as err:  # a null character, or one that is in no file's name
        raise FileError("not the name of a file", errno.EINVAL) from err


def check_open_file(fd: int, *, writes: bool, allows_devices: bool) -> None:
    """Accept a file that another process has opened if `open_file` would return it.

    Raises:
        FileError: it was opened for something else.
        FileKindError: it is of a wrong kind.
    """
    try:
        _judge(fd, allows_devices=allows_devices)
        flags = fcntl.fcntl(fd, fcntl.F_GETFL)
        if flags & os.O_PATH or flags & os.O_ACCMODE == os.O_WRONLY:
            raise FileError("not open for reading", errno.EBADF)
        if writes and flags & os.O_ACCMODE != os.O_RDWR:
            raise FileError("not open for writing", errno.EBADF)
        if writes and flags & os.O_APPEND:
            raise FileError("open for appending", errno.EBADF)
        if flags & os.O_DIRECT:
            raise FileError("open for direct transfers", errno.EBADF)
    except OSError as err:
        raise FileError(err.strerror or str(err), err.errno or errno.EIO) from err


def _reason(err: OSError, path: str) -> str:
    """Say why a file cannot be opened, and what of the service's unit may be the cause."""
    text = err.strerror or str(err)
    if err.errno == errno.EROFS and "NOTIFY_SOCKET" in os.environ:
        return f"{text}: for other directories the unit of vmd needs ReadWritePaths="
    if err.errno == errno.ENOENT and path.startswith(_SHARED) and _has_own(_SHARED):
        return f"{text}: the unit of vmd has a directory of its own there"
    return text


def _has_own(directories: tuple[str, ...]) -> bool:
    """Tell whether the service manager has given this process one of these for itself.

    Source: systemd.exec(5), PrivateTmp=; proc(5), "mountinfo"
    """
    places = [directory.rstrip("/") for directory in directories]
    with open("/proc/self/mountinfo", encoding="utf-8", errors="replace") as mounts:  # noqa: PTH123
        roots = [fields[3] for fields in map(str.split, mounts) if fields[4] in places]
    return any("/systemd-private-" in root for root in roots)


def _resolve(path: str) -> int:
    """Return an O_PATH descriptor of the file at a path."""
    name = os.fsencode(path)
    if b"\0" in name:
        raise ValueError("embedded null byte")
    try:
        return _openat2(name, os.O_PATH, _RESOLVE_NO_MAGICLINKS)
    except OSError as err:
        if err.errno != errno.ELOOP:
            raise
        text = "a link of /proc to an open file, or too many symbolic links"
        raise OSError(err.errno, text) from err


def _openat2(name: bytes, flags: int, resolve: int) -> int:
    how = _OpenHow(flags=flags | os.O_CLOEXEC, mode=0, resolve=resolve)
    fd = int(
        LIBC.syscall(
            SYSCALLS["openat2"],
            _AT_FDCWD,
            ctypes.c_char_p(name),
            ctypes.byref(how),
            ctypes.c_size_t(ctypes.sizeof(how)),
        )
    )
    if fd < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return fd


def _judge(fd: int, *, allows_devices: bool) -> None:
    mode = os.fstat(fd).st_mode
    if not stat.S_ISREG(mode) and not (allows_devices and stat.S_ISBLK(mode)):
        raise FileKindError("not a regular file", errno.EPERM)
    found = _Statfs()
    if LIBC.fstatfs(fd, ctypes.byref(found)):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    kind = _PSEUDO.get(found.f_type & 0xFFFF_FFFF)
    # A device node may be anywhere; the device itself is on no file system.
    if kind is not None and stat.S_ISREG(mode):
        raise FileKindError(f"a file of {kind}", errno.EPERM)
