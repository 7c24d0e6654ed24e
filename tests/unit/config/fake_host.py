"""A host for tests of vm.conf: a directory of files, a few images, users and groups."""

from __future__ import annotations

import errno
import fnmatch
import os
from collections.abc import Mapping
from pathlib import Path

from vmd.config.host import FileText

IMAGES = frozenset(
    {
        *("disk0.img", "disk1.img", "disk2.img", "disk3.img", "disk4.img", "a,b disk.img"),
        *("bsd.rd", "vmlinuz", "initrd.img", "modules.img", "OVMF.fd", "disk.sock"),
    }
)
"""Existing files, in the directory /vm."""
USERS = {"root": 0, "alice": 1000}
GROUPS = {"root": 0, "staff": 50}


def error(number: int, path: str) -> OSError:
    """Return the error of a system call."""
    return OSError(number, os.strerror(number), path)


class FakeHost:
    """Files come from a mapping of their names."""

    def __init__(self, files: Mapping[str, bytes]) -> None:
        self._files = files

    def read_file(self, path: str) -> FileText:
        """Read a file of the mapping; `unreadable.conf` is not readable."""
        if path == "unreadable.conf":
            raise error(errno.EACCES, path)
        if path not in self._files:
            raise error(errno.ENOENT, path)
        return FileText(self._files[path], "group writable" if path.startswith("open") else None)

    def glob(self, pattern: str) -> list[str]:
        """Return the names of the mapping that match."""
        return sorted(fnmatch.filter(self._files, pattern))

    def resolve(self, path: str) -> str:
        """Find an image by its name, or by its path in /vm; `long.img` has a very long path."""
        name = path.removeprefix("/vm/")
        if name in IMAGES:
            return f"/vm/{name}"
        if name == "long.img":
            return f"/{'x' * 1020}/{name}"
        if name == "secret.img":
            raise error(errno.EACCES, path)
        raise error(errno.ENOENT, path)

    def absolute(self, path: str) -> str:
        """Return a path unchanged."""
        return path

    def memory_size(self) -> int:
        """Return the size of a host with 1 TiB of RAM."""
        return 1 << 40

    def find_user(self, name: str) -> int | None:
        """Return the uid of one of USERS."""
        return USERS.get(name)

    def find_group(self, name: str) -> int | None:
        """Return the gid of one of GROUPS."""
        return GROUPS.get(name)


def directory(path: Path) -> dict[str, bytes]:
    """Return the files of a directory."""
    return {each.name: each.read_bytes() for each in path.iterdir() if each.is_file()}
