"""A FUSE client in Python: a guest's kernel as a server meets it, honest or not."""

from __future__ import annotations

import ctypes
import errno
import os
import stat
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple, Self

from vmd.confine import landlock
from vmm_kvm.fs import abi
from vmm_kvm.fs.server import REQUEST_MAX, FuseServer
from vmm_kvm.fs.tree import Tree, open_root
from vmm_kvm.libc import LIBC

ROOM = 1 << 16
OWN_INODE = (1 << 56) - 1
"""The host's part of an inode number: a mask."""
_INIT_FLAGS = 0xFFFF_FFFF
_PR_SET_NO_NEW_PRIVS = 38


class Attributes(NamedTuple):
    """A fuse_attr."""

    ino: int
    size: int
    blocks: int
    atime: int
    mtime: int
    ctime: int
    atimensec: int
    mtimensec: int
    ctimensec: int
    mode: int
    nlink: int
    uid: int
    gid: int
    rdev: int
    blksize: int
    flags: int


class Found(NamedTuple):
    """A fuse_entry_out."""

    node: int
    attributes: Attributes


class Listed(NamedTuple):
    """An entry of a directory."""

    name: bytes
    ino: int
    kind: int
    node: int
    """0 where the server has said none."""


def _attributes(data: bytes) -> Attributes:
    return Attributes(*abi.ATTR.unpack(data[: abi.ATTR.size]))


def _found(data: bytes) -> Found:
    node, *_ = abi.ENTRY_OUT.unpack_from(data)
    return Found(node, _attributes(data[abi.ENTRY_OUT.size :]))


Exchange = Callable[[bytes, bytes, int], bytes]
"""From a request, the data behind it and the room for an answer to what follows its header."""


class FuseCalls:
    """Calls of a server, however it is reached. What the server refuses is OSError."""

    def __init__(self, exchange: Exchange) -> None:
        self._exchange = exchange
        self._unique = 0

    def call(
        self, opcode: int, node: int = 0, body: bytes = b"", *, data: bytes = b"", room: int = ROOM
    ) -> bytes:
        """Make a request; returns what follows the header of its answer."""
        self._unique += 1
        size = abi.IN_HEADER.size + len(body) + len(data)
        header = abi.IN_HEADER.pack(size, opcode, self._unique, node, 0, 0, 1, 0, 0)
        return self._exchange(header + body, data, room)

    def begin(self) -> tuple[int, ...]:
        """Begin a session; returns the fields of the answer."""
        body = abi.INIT_IN.pack(7, 38, 1 << 17, _INIT_FLAGS)
        return abi.INIT_OUT.unpack(self.call(abi.FUSE_INIT, body=body))

    # Names

    def look_up(self, name: bytes, parent: int = abi.FUSE_ROOT_ID) -> Found:
        """Look a name up."""
        return _found(self.call(abi.FUSE_LOOKUP, parent, name + b"\0"))

    def walk(self, path: str) -> Found:
        """Look up one name after the other."""
        found = Found(abi.FUSE_ROOT_ID, self.attributes(abi.FUSE_ROOT_ID))
        for name in path.split("/"):
            found = self.look_up(os.fsencode(name), found.node)
        return found

    def forget(self, node: int, count: int = 1) -> None:
        """Forget a node."""
        self.call(abi.FUSE_FORGET, node, abi.FORGET_IN.pack(count))

    def attributes(self, node: int) -> Attributes:
        """Return attributes."""
        answer = self.call(abi.FUSE_GETATTR, node, abi.GETATTR_IN.pack(0, 0, 0))
        return _attributes(answer[abi.ATTR_OUT.size :])

    def set_attributes(self, node: int, valid: int, **fields: int) -> Attributes:
        """Set attributes."""
        order = (
            *("valid", "padding", "fh", "size", "lock_owner", "atime", "mtime", "ctime"),
            *("atimensec", "mtimensec", "ctimensec", "mode", "unused4", "uid", "gid", "unused5"),
        )
        assert fields.keys() <= set(order)
        values = {"valid": valid} | fields
        body = abi.SETATTR_IN.pack(*(values.get(name, 0) for name in order))
        return _attributes(self.call(abi.FUSE_SETATTR, node, body)[abi.ATTR_OUT.size :])

    def link_target(self, node: int) -> bytes:
        """Read a symbolic link."""
        return self.call(abi.FUSE_READLINK, node)

    # Files

    def open(self, node: int, flags: int = os.O_RDONLY) -> int:
        """Open a file; returns the handle."""
        handle, *_ = abi.OPEN_OUT.unpack(self.call(abi.FUSE_OPEN, node, abi.OPEN_IN.pack(flags, 0)))
        return int(handle)

    def release(self, handle: int, opcode: int = abi.FUSE_RELEASE) -> None:
        """Close a handle."""
        self.call(opcode, 0, abi.RELEASE_IN.pack(handle, 0, 0, 0))

    def read(self, handle: int, offset: int = 0, size: int = ROOM) -> bytes:
        """Read from a file."""
        body = abi.READ_IN.pack(handle, offset, size, 0, 0, 0, 0)
        return self.call(abi.FUSE_READ, 0, body, room=size)

    def write(self, handle: int, data: bytes, offset: int = 0) -> int:
        """Write to a file; returns how many bytes were written."""
        body = abi.WRITE_IN.pack(handle, offset, len(data), 0, 0, 0, 0)
        count, _ = abi.WRITE_OUT.unpack(self.call(abi.FUSE_WRITE, 0, body, data=data))
        return int(count)

    def content(self, node: int) -> bytes:
        """Return all of a file."""
        handle = self.open(node)
        try:
            content = b""
            while piece := self.read(handle, len(content)):
                content += piece
            return content
        finally:
            self.release(handle)

    # Directories

    def listing(
        self, node: int = abi.FUSE_ROOT_ID, *, size: int = ROOM, plus: bool = False
    ) -> list[Listed]:
        """Return the entries of a directory, all but `.` and `..`."""
        answer = self.call(abi.FUSE_OPENDIR, node, abi.OPEN_IN.pack(0, 0))
        handle, *_ = abi.OPEN_OUT.unpack(answer)
        try:
            entries, at = [], 0
            while piece := self.list_piece(handle, at, size, plus=plus):
                for entry, following in piece:
                    at = following
                    if entry.name not in {b".", b".."}:
                        entries.append(entry)
            return entries
        finally:
            self.release(handle, abi.FUSE_RELEASEDIR)

    def list_piece(
        self, handle: int, offset: int, size: int, *, plus: bool
    ) -> list[tuple[Listed, int]]:
        """Return entries of an open directory, and of each where the next one is."""
        opcode = abi.FUSE_READDIRPLUS if plus else abi.FUSE_READDIR
        body = abi.READ_IN.pack(handle, offset, size, 0, 0, 0, 0)
        answer = self.call(opcode, 0, body, room=size)
        assert len(answer) <= size
        at, found = 0, []
        while at < len(answer):
            node = 0
            if plus:
                node, *_ = abi.ENTRY_OUT.unpack_from(answer, at)
                at += abi.ENTRY_OUT.size + abi.ATTR.size
            ino, following, length, kind = abi.DIRENT.unpack_from(answer, at)
            name = answer[at + abi.DIRENT.size : at + abi.DIRENT.size + length]
            found.append((Listed(name, ino, kind, node), following))
            at += abi.DIRENT.size + length + -length % 8
        return found

    # Changes

    def create(
        self,
        name: bytes,
        parent: int = abi.FUSE_ROOT_ID,
        *,
        mode: int = 0o644,
        flags: int = os.O_RDWR | os.O_EXCL,
    ) -> tuple[Found, int]:
        """Make and open a file; returns it and the handle."""
        body = abi.CREATE_IN.pack(flags | os.O_CREAT, mode | stat.S_IFREG, 0, 0)
        answer = self.call(abi.FUSE_CREATE, parent, body + name + b"\0")
        front = abi.ENTRY_OUT.size + abi.ATTR.size
        handle, *_ = abi.OPEN_OUT.unpack(answer[front:])
        return _found(answer[:front]), handle

    def make_node(self, name: bytes, mode: int, parent: int = abi.FUSE_ROOT_ID) -> Found:
        """Make a file that is no directory."""
        body = abi.MKNOD_IN.pack(mode, 0, 0, 0)
        return _found(self.call(abi.FUSE_MKNOD, parent, body + name + b"\0"))

    def make_directory(
        self, name: bytes, parent: int = abi.FUSE_ROOT_ID, mode: int = 0o755
    ) -> Found:
        """Make a directory."""
        body = abi.MKDIR_IN.pack(mode, 0)
        return _found(self.call(abi.FUSE_MKDIR, parent, body + name + b"\0"))

    def make_symlink(self, name: bytes, target: bytes, parent: int = abi.FUSE_ROOT_ID) -> Found:
        """Make a symbolic link."""
        body = name + b"\0" + target + b"\0"
        return _found(self.call(abi.FUSE_SYMLINK, parent, body))

    def link(self, node: int, name: bytes, parent: int = abi.FUSE_ROOT_ID) -> Found:
        """Give a file one more name."""
        body = abi.LINK_IN.pack(node) + name + b"\0"
        return _found(self.call(abi.FUSE_LINK, parent, body))

    def unlink(self, name: bytes, parent: int = abi.FUSE_ROOT_ID) -> None:
        """Remove a file's name."""
        self.call(abi.FUSE_UNLINK, parent, name + b"\0")

    def remove_directory(self, name: bytes, parent: int = abi.FUSE_ROOT_ID) -> None:
        """Remove a directory."""
        self.call(abi.FUSE_RMDIR, parent, name + b"\0")

    def rename(
        self,
        name: bytes,
        new_name: bytes,
        parent: int = abi.FUSE_ROOT_ID,
        to: int = abi.FUSE_ROOT_ID,
        flags: int = 0,
    ) -> None:
        """Rename something."""
        body = abi.RENAME2_IN.pack(to, flags, 0) + name + b"\0" + new_name + b"\0"
        self.call(abi.FUSE_RENAME2, parent, body)


class FuseClient(FuseCalls):
    """Calls of a server in this process; a context manager that closes it.

    The server runs in a thread of its own, which Landlock keeps to the directory around the served
    one: a test of a server that follows a name out of it, as root, would else change this host.
    """

    def __init__(self, folder: Path, *, is_writable: bool = True, **limits: int) -> None:
        """Serve a directory, and begin a session."""
        super().__init__(self._ask)
        self._thread = ThreadPoolExecutor(1, "server", _keep_to, (folder.parent,))
        self._root = open_root(str(folder))
        self.server = FuseServer(Tree(self._root), is_writable=is_writable, **limits)
        self.begin()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self._thread.submit(self.server.close).result()
        self._thread.shutdown()
        os.close(self._root)

    def _ask(self, request: bytes, data: bytes, room: int) -> bytes:
        space = bytearray(room)
        answer = self._thread.submit(
            self.server.answer,
            request[:REQUEST_MAX],
            [memoryview(data)] if data else [],
            [memoryview(space)] if room else [],
        ).result()
        if answer is None:
            return b""
        return bytes(space[:answer]) if isinstance(answer, int) else answer


def _keep_to(folder: Path) -> None:
    """Let this thread use files below a directory alone."""
    if LIBC.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0):
        raise OSError(ctypes.get_errno(), "no_new_privs")
    fd = os.open(folder, os.O_PATH | os.O_CLOEXEC)
    try:
        if not landlock.restrict(subtree=landlock.Subtree(fd, is_writable=True)):
            raise OSError(errno.EOPNOTSUPP, "no Landlock keeps this test from the host's files")
    finally:
        os.close(fd)
