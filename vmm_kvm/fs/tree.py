"""A directory of the host, and what is below it: every way to it is a descriptor and one name.

No path of more than one component is followed, and no link: each component is opened relative to a
descriptor that we hold, by openat2(2), which refuses `..`, links, and links of /proc. A name is
checked besides. What has a descriptor is opened again through /proc/self/fd, with no name at all,
once its kind is known: no FIFO and no device is ever opened.

Source: openat2(2), open(2) "O_PATH", getdents64(2), proc_pid_fd(5)
"""

import ctypes
import errno
import os
import stat
import struct
from collections.abc import Iterator
from typing import NamedTuple, NoReturn

from vmm_kvm.libc import LIBC

NAME_MAX = 255
"""Bytes of a name. Source: Linux include/uapi/linux/limits.h"""
TARGET_MAX = 4095
"""Bytes of what a symbolic link says."""

_SYS_OPENAT2 = 437
_RESOLVE_NO_MAGICLINKS, _RESOLVE_NO_SYMLINKS, _RESOLVE_BENEATH = 2, 4, 8
_RESOLVE = _RESOLVE_NO_MAGICLINKS | _RESOLVE_NO_SYMLINKS | _RESOLVE_BENEATH
_OPEN_HOW = struct.Struct("=QQQ")
_DIRENT64 = struct.Struct("=QqHB")
_TIMES = struct.Struct("=qqqq")
_UTIME_NOW, _UTIME_OMIT = 0x3FFFFFFF, 0x3FFFFFFE
_ALWAYS = os.O_CLOEXEC | os.O_NOCTTY | os.O_NONBLOCK

LIBC.getdents64.restype = ctypes.c_ssize_t
LIBC.getdents64.argtypes = (ctypes.c_int, ctypes.c_char_p, ctypes.c_size_t)


class Entry(NamedTuple):
    """An entry of a directory."""

    ino: int
    following: int
    """Where the one behind it is, for `entries`."""
    kind: int
    """DT_ constant."""
    name: bytes


class Time(NamedTuple):
    """A time to be set: seconds and nanoseconds."""

    seconds: int
    nanoseconds: int


NOW = Time(0, _UTIME_NOW)
AS_IT_IS = Time(0, _UTIME_OMIT)


def fail(number: int) -> NoReturn:
    """Raise an OSError with an error number."""
    raise OSError(number, os.strerror(number))


def check_name(name: bytes) -> None:
    """Refuse what is no name of something in a directory.

    Raises:
        OSError: it is none.
    """
    if len(name) > NAME_MAX:
        fail(errno.ENAMETOOLONG)
    if name in {b"", b".", b".."} or b"/" in name or b"\0" in name:
        fail(errno.EINVAL)


def open_root(path: str | int) -> int:
    """Open a directory, by its path or by a descriptor of it, as the root of a `Tree`.

    Raises:
        OSError: it is not there, or no directory.
    """
    flags = os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC
    if isinstance(path, int):
        return os.open(".", flags, dir_fd=path)
    return os.open(path, flags)


class Tree:
    """What a server can do on the host; owns a descriptor of /proc/self/fd.

    Directories and files are descriptors, mostly of O_PATH, which stay the caller's; results are
    new ones, which are the caller's too. All raise OSError.
    """

    def __init__(self, root: int) -> None:
        """Take `root`, from `open_root`, which stays the caller's; before the process is confined.

        Raises:
            OSError: there is no /proc.
        """
        self.root = root
        self.own = os.open("/proc/self/fd", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        """Descriptor of our descriptors, by number."""

    def close(self) -> None:
        """Close what it has; idempotent."""
        own, self.own = self.own, -1
        if own >= 0:
            os.close(own)

    # Looking

    def open_child(self, parent: int, name: bytes) -> int:
        """Open what a directory has under a name, a link itself, without looking into it."""
        check_name(name)
        return _openat2(parent, name, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)

    def open_file(self, fd: int, access: int) -> int:
        """Open a regular file: O_RDONLY, O_WRONLY or O_RDWR."""
        mode = os.fstat(fd).st_mode
        if not stat.S_ISREG(mode):
            fail(errno.EISDIR if stat.S_ISDIR(mode) else errno.EACCES)
        return os.open(self._number(fd), access | _ALWAYS, dir_fd=self.own)

    def open_directory(self, fd: int) -> int:
        """Open a directory, to read its entries."""
        if not stat.S_ISDIR(os.fstat(fd).st_mode):
            fail(errno.ENOTDIR)
        return os.open(self._number(fd), os.O_RDONLY | os.O_DIRECTORY | _ALWAYS, dir_fd=self.own)

    def link_target(self, fd: int) -> bytes:
        """Return what a symbolic link says."""
        if not stat.S_ISLNK(os.fstat(fd).st_mode):
            fail(errno.EINVAL)
        return os.readlink(b"", dir_fd=fd)

    def entries(self, fd: int, position: int, size: int) -> Iterator[Entry]:
        """Yield entries of an open directory from `position` on: 0, or some entry's `following`.

        `size`, in bytes, is about how much is asked of the kernel at once.
        """
        os.lseek(fd, position, os.SEEK_SET)
        buffer = ctypes.create_string_buffer(size)
        while True:
            count = LIBC.getdents64(fd, buffer, size)
            if count < 0:
                fail(ctypes.get_errno())
            if not count:
                return
            data, at = buffer.raw[:count], 0
            while at < count:
                ino, following, length, kind = _DIRENT64.unpack_from(data, at)
                name = data[at + _DIRENT64.size : at + length]
                yield Entry(ino, following, kind, name[: name.index(0)])
                at += length

    # Changes

    def create(self, parent: int, name: bytes, access: int, mode: int) -> int:
        """Make a regular file, and open it: O_RDONLY, O_WRONLY or O_RDWR."""
        check_name(name)
        flags = access | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | _ALWAYS
        return _openat2(parent, name, flags, mode)

    def same(self, fd: int) -> int:
        """Open what has a descriptor again, without rights to its contents."""
        return os.open(self._number(fd), os.O_PATH | os.O_CLOEXEC, dir_fd=self.own)

    def make_directory(self, parent: int, name: bytes, mode: int) -> None:
        """Make a directory."""
        check_name(name)
        os.mkdir(name, mode, dir_fd=parent)

    def make_node(self, parent: int, name: bytes, mode: int) -> None:
        """Make a FIFO or a socket without anything behind it."""
        check_name(name)
        os.mknod(name, mode, dir_fd=parent)

    def make_symlink(self, parent: int, name: bytes, target: bytes) -> None:
        """Make a symbolic link, which nothing here will follow."""
        check_name(name)
        if not 0 < len(target) <= TARGET_MAX:
            fail(errno.EINVAL)
        os.symlink(target, name, dir_fd=parent)

    def link(self, fd: int, parent: int, name: bytes) -> None:
        """Give a file one more name."""
        check_name(name)
        # The link of /proc is followed, and leads to the file itself, be it a link or not.
        os.link(
            self._number(fd),
            name,
            src_dir_fd=self.own,
            dst_dir_fd=parent,
            follow_symlinks=True,
        )

    def remove(self, parent: int, name: bytes) -> None:
        """Remove a name that is no directory's."""
        check_name(name)
        os.unlink(name, dir_fd=parent)

    def remove_directory(self, parent: int, name: bytes) -> None:
        """Remove an empty directory."""
        check_name(name)
        os.rmdir(name, dir_fd=parent)

    def rename(self, parent: int, name: bytes, to: int, new_name: bytes, flags: int) -> None:
        """Rename, with flags of renameat2(2)."""
        check_name(name)
        check_name(new_name)
        if LIBC.renameat2(parent, name, to, new_name, flags):
            fail(ctypes.get_errno())

    def set_mode(self, fd: int, mode: int) -> None:
        """Set the permissions of what is no link."""
        if stat.S_ISLNK(os.fstat(fd).st_mode):
            fail(errno.EOPNOTSUPP)
        os.chmod(self._number(fd), mode, dir_fd=self.own)

    def set_times(self, fd: int, accessed: Time, modified: Time) -> None:
        """Set times, of a link itself."""
        if LIBC.utimensat(self.own, self._number(fd), _TIMES.pack(*accessed, *modified), 0):
            fail(ctypes.get_errno())

    def allocate(self, fd: int, mode: int, offset: int, size: int) -> None:
        """Allocate, punch or zero a part of an open file, as fallocate(2) does."""
        if LIBC.fallocate(fd, mode, offset, size):
            fail(ctypes.get_errno())

    def _number(self, fd: int) -> bytes:
        return b"%d" % fd


def _openat2(directory: int, name: bytes, flags: int, mode: int = 0) -> int:
    how = _OPEN_HOW.pack(flags, mode, _RESOLVE)
    while True:
        fd: int = LIBC.syscall(_SYS_OPENAT2, directory, name, how, len(how))
        if fd >= 0:
            return fd
        number = ctypes.get_errno()
        # With RESOLVE_BENEATH the kernel gives up where something was renamed meanwhile.
        if number not in {errno.EINTR, errno.EAGAIN}:
            fail(number)
