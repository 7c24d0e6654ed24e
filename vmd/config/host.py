"""The host as the reader of a vm.conf needs it: files, paths, users and groups."""

import grp
import os
import pwd
import select
import stat
from errno import EAGAIN, EFBIG, EISDIR, ENOENT
from typing import NamedTuple, Protocol

SIZE_MAX = 4 << 20
"""Bytes of a file; more is not a vm.conf."""
PATIENCE_S = 5
"""How long to wait for data of a file that is a pipe or a terminal."""


class FileText(NamedTuple):
    """A file's contents, and a warning about its write permissions."""

    data: bytes
    complaint: str | None = None


class Host(Protocol):
    """The host on which a configuration is read. OSError names a missing thing, and the reason."""

    def read_file(self, path: str) -> FileText:
        """Read a file; raises OSError."""

    def glob(self, pattern: str) -> list[str]:
        """Return the paths that match a pattern, as it is written, in the order of their names."""

    def resolve(self, path: str) -> str:
        """Return the absolute path, without links, of an existing file; raises OSError."""

    def absolute(self, path: str) -> str:
        """Return a path that means the same wherever this process goes; nothing need be there."""

    def memory_size(self) -> int:
        """Return how much RAM there is, in bytes."""

    def find_user(self, name: str) -> int | None:
        """Return the uid of a user; None if there is none."""

    def find_group(self, name: str) -> int | None:
        """Return the gid of a group; None if there is none."""


class SystemHost:
    """This host."""

    def __init__(self, directory: str | None = None) -> None:
        """Let relative paths begin in `directory`; None for the present working directory.

        One that has been removed has the name by which Linux calls it, `... (deleted)`, where
        nothing is found.
        """
        self._directory = os.readlink("/proc/self/cwd") if directory is None else directory

    def read_file(self, path: str) -> FileText:
        """Read a file, at most SIZE_MAX bytes; raises OSError.

        A pipe or a terminal that gives nothing for PATIENCE_S holds nobody up any longer.
        """
        if not path:
            raise OSError(ENOENT, os.strerror(ENOENT), path)
        fd = os.open(self.absolute(path), os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
        try:
            status = os.fstat(fd)
            if stat.S_ISDIR(status.st_mode):
                raise OSError(EISDIR, os.strerror(EISDIR), path)
            data = _read(fd, path)
        finally:
            os.close(fd)
        if len(data) > SIZE_MAX:
            raise OSError(EFBIG, os.strerror(EFBIG), path)
        return FileText(data, secrecy_complaint(status, os.getuid()))

    def glob(self, pattern: str) -> list[str]:
        """Return the paths that match a pattern, as it is written, in the order of their names.

        A file with exactly this name matches alone.
        """
        from glob import glob  # noqa: PLC0415 - every child would inherit all that it imports

        if os.path.lexists(self.absolute(pattern)):
            return [pattern]
        return sorted(glob(pattern, root_dir=self._directory))

    def resolve(self, path: str) -> str:
        """Return the absolute path, without links, of an existing file; raises OSError."""
        if not path:
            raise OSError(ENOENT, os.strerror(ENOENT), path)
        return os.path.realpath(self.absolute(path), strict=True)

    def absolute(self, path: str) -> str:
        """Return a path that means the same wherever this process goes; nothing need be there."""
        return os.path.join(self._directory, path)

    def memory_size(self) -> int:
        """Return how much RAM there is, in bytes."""
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")

    def find_user(self, name: str) -> int | None:
        """Return the uid of a user; None if there is none."""
        try:
            return pwd.getpwnam(name).pw_uid
        except KeyError:
            return None

    def find_group(self, name: str) -> int | None:
        """Return the gid of a group; None if there is none."""
        try:
            return grp.getgrnam(name).gr_gid
        except KeyError:
            return None


def _read(fd: int, path: str) -> bytes:
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    pieces, size = [], 0
    while size <= SIZE_MAX:
        if not poll.poll(PATIENCE_S * 1000):
            raise OSError(EAGAIN, f"nothing to read for {PATIENCE_S} s", path)
        piece = os.read(fd, SIZE_MAX + 1 - size)
        if not piece:
            break
        pieces.append(piece)
        size += len(piece)
    return b"".join(pieces)


def secrecy_complaint(status: os.stat_result, uid: int) -> str | None:
    """Complain if users other than root and `uid` can change a regular file.

    Such a file is read nevertheless, and the operator is told. OpenBSD's vmd has this check, but
    does not apply it to vm.conf, which holds no secret: it may be read by everyone.
    """
    if not stat.S_ISREG(status.st_mode):
        return None
    if status.st_uid not in {0, uid}:
        return "owner not root or current user"
    if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        return "group writable or world writable"
    return None
