"""A FUSE server for one guest: from a request to its answer, in bytes.

Every request is complete when its answer is there; requests come one at a time, on one thread. What
a guest sends is hostile: a request that cannot be is answered with an error number, and tables are
bounded. Of a guest's users and groups the server takes no notice: it acts as the user that runs
it, and the guest's kernel checks permissions by the owners and modes that it is told.

Source: Linux include/uapi/linux/fuse.h; fuse(4); Documentation/filesystems/fuse.rst
"""

import errno
import os
import resource
import stat
import struct
from collections.abc import Callable
from typing import Final, NamedTuple

from vmm_kvm.bits import KIB, MIB, PAGE_SIZE
from vmm_kvm.fs import abi
from vmm_kvm.fs.nodes import NODES_MAX, Node, Nodes
from vmm_kvm.fs.tree import AS_IT_IS, Entry, Tree, fail
from vmm_kvm.fs.values import (
    MASK64,
    Views,
    attributes_out,
    entry_out,
    front,
    name_in,
    names_in,
    offset_in,
    time_in,
)

REQUEST_MAX = 64 * KIB
"""Bytes of a request without the data of a write; what is behind them is ignored."""
DATA_MAX = MIB
"""Bytes of one read or write."""
HANDLES_MAX = 4096
"""Files and directories that a guest has open at once."""
DESCRIPTORS = 16384
"""Descriptors that the process of a server may have."""

Answer = bytes | int | None
"""What follows the header: bytes, how many bytes of `room` were filled, or None for no answer."""

_FLAGS: Final = (
    abi.FUSE_ASYNC_READ
    | abi.FUSE_BIG_WRITES
    | abi.FUSE_AUTO_INVAL_DATA
    | abi.FUSE_DO_READDIRPLUS
    | abi.FUSE_READDIRPLUS_AUTO
    | abi.FUSE_PARALLEL_DIROPS
    | abi.FUSE_MAX_PAGES
)
_BACKGROUND, _CONGESTED = 64, 48
_PERMISSIONS = 0o1777  # a set-user-ID file of a guest's would have the host's users become ours
_ACCESS = os.O_ACCMODE
_OFFSET_MAX = (1 << 63) - 1
_MASK64 = (1 << 64) - 1
_BILLION = 10**9
_FALLOCATE_MODES = 0x1 | 0x2 | 0x10  # FALLOC_FL_KEEP_SIZE, _PUNCH_HOLE, _ZERO_RANGE
_RENAME_NOREPLACE, _RENAME_EXCHANGE = 1, 2
_SEEKS = {os.SEEK_DATA, os.SEEK_HOLE}
_LISTING_MIN, _LISTING_MAX = 1 * KIB, 64 * KIB
_INO: Final = struct.Struct("=Q")
_NO_NODE = bytes(abi.ENTRY_OUT.size + abi.ATTR.size)


class Handle(NamedTuple):
    """What a guest has open."""

    fd: int
    node: Node
    is_directory: bool
    access: int
    """O_RDONLY, O_WRONLY or O_RDWR."""


class FuseServer:
    """Serves one directory of the host to one guest; owns a `Tree` and its descriptors.

    The root stays the caller's.
    """

    def __init__(
        self,
        tree: Tree,
        *,
        is_writable: bool,
        descriptors: int = DESCRIPTORS,
        nodes_max: int = NODES_MAX,
        handles_max: int = HANDLES_MAX,
    ) -> None:
        """Serve `tree` with at most so many descriptors, nodes and handles.

        The limit of descriptors that the process has now holds besides.
        """
        descriptors = min(descriptors, resource.getrlimit(resource.RLIMIT_NOFILE)[0])
        self._tree = tree
        self._is_writable = is_writable
        # Nodes have half of them, handles a quarter; the rest is the process's own.
        self._handles_max = min(handles_max, descriptors // 4)
        self.nodes = Nodes(tree, descriptors // 2, nodes_max)
        self._handles: dict[int, Handle] = {}
        self._next_handle = 1
        self._is_ready = False
        changes: dict[int, Callable[[int, bytes], bytes]] = {
            abi.FUSE_SETATTR: self._set_attributes,
            abi.FUSE_SYMLINK: self._symlink,
            abi.FUSE_MKNOD: self._make_node,
            abi.FUSE_MKDIR: self._make_directory,
            abi.FUSE_UNLINK: self._unlink,
            abi.FUSE_RMDIR: self._remove_directory,
            abi.FUSE_RENAME: self._rename,
            abi.FUSE_RENAME2: self._rename2,
            abi.FUSE_LINK: self._link,
            abi.FUSE_CREATE: self._create,
            abi.FUSE_FALLOCATE: self._allocate,
        }
        self._changes = frozenset((*changes, abi.FUSE_WRITE))
        self._calls = changes | {
            abi.FUSE_LOOKUP: self._look_up,
            abi.FUSE_GETATTR: self._get_attributes,
            abi.FUSE_READLINK: self._read_link,
            abi.FUSE_OPEN: self._open,
            abi.FUSE_STATFS: self._statistics,
            abi.FUSE_RELEASE: self._release,
            abi.FUSE_FSYNC: self._sync,
            abi.FUSE_OPENDIR: self._open_directory,
            abi.FUSE_RELEASEDIR: self._release,
            abi.FUSE_FSYNCDIR: self._sync,
            abi.FUSE_LSEEK: self._seek,
            abi.FUSE_DESTROY: self._destroy,
        }

    @property
    def open_handles(self) -> int:
        """How many files and directories the guest has open."""
        return len(self._handles)

    def close(self) -> None:
        """Close everything; idempotent."""
        self._clear()
        self._tree.close()

    def answer(self, request: bytes, data: Views, room: Views) -> Answer:
        """Serve a request: its header and arguments, then the data of a write.

        `room` is where the answer goes, behind its header.

        Raises:
            OSError: the guest gets this error number.
        """
        try:
            return self._answer(request, data, room)
        except struct.error:  # arguments that end too early
            fail(errno.EINVAL)

    def _answer(self, request: bytes, data: Views, room: Views) -> Answer:
        _size, call, _unique, node, *_rest = abi.IN_HEADER.unpack_from(request)
        body = request[abi.IN_HEADER.size :]
        match call:
            case abi.FUSE_INIT:
                return self._begin(body)
            case abi.FUSE_FORGET:
                self.nodes.forget(node, *abi.FORGET_IN.unpack_from(body))
                return None
            case abi.FUSE_BATCH_FORGET:
                self._forget(body)
                return None
            case abi.FUSE_INTERRUPT:  # all requests before it are complete
                return None
        if not self._is_ready:
            fail(errno.ENOTCONN)
        if call in self._changes and not self._is_writable:
            fail(errno.EROFS)
        match call:
            case abi.FUSE_READ:
                return self._read(body, room)
            case abi.FUSE_WRITE:
                return self._write(body, data)
            case abi.FUSE_READDIR | abi.FUSE_READDIRPLUS:
                return self._list(body, room, with_nodes=call == abi.FUSE_READDIRPLUS)
        serve = self._calls.get(call)
        if serve is None:
            fail(errno.ENOSYS)
        return serve(node, body)

    # The session

    def _begin(self, body: bytes) -> bytes:
        major, _minor, readahead, flags = abi.INIT_IN.unpack_from(body)
        if major < abi.FUSE_KERNEL_VERSION:
            fail(errno.EPROTO)
        self._clear()
        # A driver with a larger major version asks again with ours.
        self._is_ready = major == abi.FUSE_KERNEL_VERSION
        return abi.INIT_OUT.pack(
            abi.FUSE_KERNEL_VERSION,
            abi.FUSE_KERNEL_MINOR_VERSION,
            readahead,
            flags & _FLAGS,
            _BACKGROUND,
            _CONGESTED,
            DATA_MAX,
            1,
            DATA_MAX // PAGE_SIZE,
            *[0] * 9,
        )

    def _destroy(self, _node: int, _body: bytes) -> bytes:
        self._clear()
        self._is_ready = False
        return b""

    def _clear(self) -> None:
        for handle in self._handles.values():
            os.close(handle.fd)
        self._handles.clear()
        self.nodes.clear()

    def _forget(self, body: bytes) -> None:
        count, _ = abi.BATCH_FORGET_IN.unpack_from(body)
        pairs = body[abi.BATCH_FORGET_IN.size :]
        whole = len(pairs) // abi.FORGET_ONE.size
        for number in range(min(count, whole)):
            self.nodes.forget(*abi.FORGET_ONE.unpack_from(pairs, number * abi.FORGET_ONE.size))

    # Names and attributes

    def _look_up(self, parent: int, body: bytes) -> bytes:
        return self._entry_out(*self.nodes.look_up(self.nodes.get(parent), name_in(body)))

    def _get_attributes(self, number: int, body: bytes) -> bytes:
        flags, _, handle = abi.GETATTR_IN.unpack_from(body)
        node = self.nodes.get(number)
        return self._attributes_out(self._either(node, flags & abi.FUSE_GETATTR_FH, handle))

    def _attributes_out(self, fd: int) -> bytes:
        status = os.fstat(fd)
        return attributes_out(status, self.nodes.inode_of(status))

    def _entry_out(self, node: Node, status: os.stat_result) -> bytes:
        return entry_out(node, status, self.nodes.inode_of(status))

    def _either(self, node: Node, has_handle: int, handle: int) -> int:
        """Return a descriptor of a node: of a handle, if the guest names one, or its own."""
        if has_handle and handle in self._handles and self._handles[handle].node is node:
            return self._handles[handle].fd
        return self.nodes.fd_of(node)

    def _set_attributes(self, number: int, body: bytes) -> bytes:
        valid, _, handle, size, _, accessed, modified, _, *small = abi.SETATTR_IN.unpack_from(body)
        accessed_ns, modified_ns, _changed_ns, mode, *_ = small
        node = self.nodes.get(number)
        fd = self._either(node, valid & abi.FATTR_FH, handle)
        if valid & abi.FATTR_SIZE:
            self._resize(node, handle if valid & abi.FATTR_FH else 0, offset_in(size))
        if valid & abi.FATTR_MODE:
            self._tree.set_mode(fd, mode & _PERMISSIONS)
        times = (
            time_in(valid, abi.FATTR_ATIME, abi.FATTR_ATIME_NOW, accessed, accessed_ns),
            time_in(valid, abi.FATTR_MTIME, abi.FATTR_MTIME_NOW, modified, modified_ns),
        )
        if times != (AS_IT_IS, AS_IT_IS):
            self._tree.set_times(fd, *times)
        # Owners stay as they are: all that a guest writes is its user's on the host.
        return self._attributes_out(fd)

    def _resize(self, node: Node, number: int, size: int) -> None:
        handle = self._handles.get(number)
        if handle and handle.node is node and handle.access != os.O_RDONLY:
            os.ftruncate(handle.fd, size)
            return
        fd = self._tree.open_file(self.nodes.fd_of(node), os.O_WRONLY)
        try:
            os.ftruncate(fd, size)
        finally:
            os.close(fd)

    def _read_link(self, number: int, _body: bytes) -> bytes:
        return self._tree.link_target(self._fd(number))

    def _statistics(self, number: int, _body: bytes) -> bytes:
        found = os.fstatvfs(self._fd(number))
        return abi.STATFS_OUT.pack(
            *(found.f_blocks, found.f_bfree, found.f_bavail, found.f_files, found.f_ffree),
            *(found.f_bsize, found.f_namemax, found.f_frsize),
            *[0] * 7,
        )

    def _fd(self, number: int) -> int:
        return self.nodes.fd_of(self.nodes.get(number))

    # Files

    def _open(self, number: int, body: bytes) -> bytes:
        flags, _ = abi.OPEN_IN.unpack_from(body)
        access = flags & _ACCESS
        if access not in {os.O_RDONLY, os.O_WRONLY, os.O_RDWR}:
            fail(errno.EINVAL)
        if access != os.O_RDONLY and not self._is_writable:
            fail(errno.EROFS)
        node = self.nodes.get(number)
        self._check_handles()
        return self._opened(node, self._tree.open_file(self.nodes.fd_of(node), access), access)

    def _check_handles(self) -> None:
        if len(self._handles) >= self._handles_max:
            fail(errno.ENFILE)

    def _opened(self, node: Node, fd: int, access: int, *, is_directory: bool = False) -> bytes:
        """Add a handle, which owns `fd`."""
        try:
            self.nodes.pin(node)
        except OSError:
            os.close(fd)
            raise
        number = self._next_handle
        self._next_handle += 1
        self._handles[number] = Handle(fd, node, is_directory, access)
        return abi.OPEN_OUT.pack(number, 0 if is_directory else abi.FOPEN_KEEP_CACHE, 0)

    def _release(self, _node: int, body: bytes) -> bytes:
        number, *_ = abi.RELEASE_IN.unpack_from(body)
        handle = self._handles.pop(number, None)
        if handle is None:
            fail(errno.EBADF)
        self.nodes.unpin(handle.node)
        os.close(handle.fd)
        return b""

    def _handle(self, number: int, *, is_directory: bool = False) -> Handle:
        handle = self._handles.get(number)
        if handle is None or handle.is_directory != is_directory:
            fail(errno.EBADF)
        return handle

    def _read(self, body: bytes, room: Views) -> int:
        number, offset, size, *_ = abi.READ_IN.unpack_from(body)
        buffers = front(room, min(size, DATA_MAX))
        handle = self._handle(number)
        return os.preadv(handle.fd, buffers, offset_in(offset)) if buffers else 0

    def _write(self, body: bytes, data: Views) -> bytes:
        number, offset, size, *_ = abi.WRITE_IN.unpack_from(body)
        buffers = front(data, min(size, DATA_MAX))
        handle = self._handle(number)
        done = os.pwritev(handle.fd, buffers, offset_in(offset)) if buffers else 0
        return abi.WRITE_OUT.pack(done, 0)

    def _sync(self, _node: int, body: bytes) -> bytes:
        number, flags, _ = abi.FSYNC_IN.unpack_from(body)
        handle = self._handles.get(number)
        if handle is None:
            fail(errno.EBADF)
        if flags & abi.FUSE_FSYNC_FDATASYNC:
            os.fdatasync(handle.fd)
        else:
            os.fsync(handle.fd)
        return b""

    def _seek(self, _node: int, body: bytes) -> bytes:
        number, offset, whence, _ = abi.LSEEK_IN.unpack_from(body)
        if whence not in _SEEKS:
            fail(errno.EINVAL)
        found = os.lseek(self._handle(number).fd, offset_in(offset), whence)
        return abi.LSEEK_OUT.pack(found)

    def _allocate(self, _node: int, body: bytes) -> bytes:
        number, offset, size, mode, _ = abi.FALLOCATE_IN.unpack_from(body)
        if mode & ~_FALLOCATE_MODES:
            fail(errno.EOPNOTSUPP)
        self._tree.allocate(self._handle(number).fd, mode, offset_in(offset), offset_in(size))
        return b""

    # Directories

    def _open_directory(self, number: int, _body: bytes) -> bytes:
        node = self.nodes.get(number)
        self._check_handles()
        fd = self._tree.open_directory(self.nodes.fd_of(node))
        return self._opened(node, fd, os.O_RDONLY, is_directory=True)

    def _list(self, body: bytes, room: Views, *, with_nodes: bool) -> bytes:
        number, offset, size, *_ = abi.READ_IN.unpack_from(body)
        handle = self._handle(number, is_directory=True)
        limit = min(size, sum(map(len, room)), DATA_MAX)
        before = len(_NO_NODE) if with_nodes else 0
        piece = limit // 8 if with_nodes else limit
        piece = min(max(piece, _LISTING_MIN), _LISTING_MAX)
        listing = bytearray()
        for entry in self._tree.entries(handle.fd, offset_in(offset), piece):
            length = abi.DIRENT.size + len(entry.name)
            padding = -length % 8
            if len(listing) + before + length + padding > limit:
                break
            ino = entry.ino
            if with_nodes:
                node = self._entry_of(handle.node, entry)
                listing += node
                if node is not _NO_NODE:  # of the same number as its attributes say
                    (ino,) = _INO.unpack_from(node, abi.ENTRY_OUT.size)
            if entry.name == b".." and handle.node is self.nodes.root:
                ino = handle.node.key[1]
            listing += abi.DIRENT.pack(ino, entry.following & MASK64, len(entry.name), entry.kind)
            listing += entry.name + bytes(padding)
        return bytes(listing)

    def _entry_of(self, directory: Node, entry: Entry) -> bytes:
        """Return the node of an entry; none if it cannot be had, or has a special name."""
        if entry.name in {b".", b".."} or not self.nodes.has_room():
            return _NO_NODE
        try:
            return self._entry_out(*self.nodes.look_up(directory, entry.name))
        except OSError:
            return _NO_NODE

    # Changes of names

    def _create(self, number: int, body: bytes) -> bytes:
        flags, mode, _umask, _ = abi.CREATE_IN.unpack_from(body)
        name = name_in(body[abi.CREATE_IN.size :])
        access = flags & _ACCESS
        if access not in {os.O_RDONLY, os.O_WRONLY, os.O_RDWR}:
            fail(errno.EINVAL)
        parent = self._directory_with_room(number)
        self._check_handles()
        try:
            fd = self._tree.create(self.nodes.fd_of(parent), name, access, mode & _PERMISSIONS)
        except FileExistsError:
            if flags & os.O_EXCL:
                raise
            node, status = self.nodes.look_up(parent, name)
            try:
                fd = self._tree.open_file(self.nodes.fd_of(node), access)
                if flags & os.O_TRUNC and access != os.O_RDONLY:
                    os.ftruncate(fd, 0)
            except OSError:
                self.nodes.forget(node.id, 1)
                raise
        else:
            try:
                node, status = self.nodes.add(parent, name, self._tree.same(fd))
            except OSError:
                os.close(fd)
                raise
        return self._entry_out(node, status) + self._opened(node, fd, access)

    def _directory_with_room(self, number: int) -> Node:
        """Return a directory that something is to be made in, which the guest will know."""
        if not self.nodes.has_room():
            fail(errno.ENFILE)
        return self.nodes.get(number)

    def _make_node(self, number: int, body: bytes) -> bytes:
        mode, _device, _umask, _ = abi.MKNOD_IN.unpack_from(body)
        name = name_in(body[abi.MKNOD_IN.size :])
        parent = self._directory_with_room(number)
        kind = stat.S_IFMT(mode)
        permissions = mode & _PERMISSIONS
        if kind == stat.S_IFREG:
            fd = self.nodes.fd_of(parent)
            os.close(self._tree.create(fd, name, os.O_WRONLY, permissions))
        elif kind in {stat.S_IFIFO, stat.S_IFSOCK}:
            self._tree.make_node(self.nodes.fd_of(parent), name, kind | permissions)
        else:
            fail(errno.EPERM)
        return self._entry_out(*self.nodes.look_up(parent, name))

    def _make_directory(self, number: int, body: bytes) -> bytes:
        mode, _umask = abi.MKDIR_IN.unpack_from(body)
        name = name_in(body[abi.MKDIR_IN.size :])
        parent = self._directory_with_room(number)
        self._tree.make_directory(self.nodes.fd_of(parent), name, mode & _PERMISSIONS)
        return self._entry_out(*self.nodes.look_up(parent, name))

    def _symlink(self, number: int, body: bytes) -> bytes:
        name, target = names_in(body)
        parent = self._directory_with_room(number)
        self._tree.make_symlink(self.nodes.fd_of(parent), name, target)
        return self._entry_out(*self.nodes.look_up(parent, name))

    def _link(self, number: int, body: bytes) -> bytes:
        old, name = (
            self.nodes.get(*abi.LINK_IN.unpack_from(body)),
            name_in(body[abi.LINK_IN.size :]),
        )
        parent = self._directory_with_room(number)
        if stat.S_ISDIR(old.key[2]):
            fail(errno.EPERM)
        self.nodes.pin(old)
        try:
            self._tree.link(old.fd, self.nodes.fd_of(parent), name)
        finally:
            self.nodes.unpin(old)
        return self._entry_out(*self.nodes.look_up(parent, name))

    def _unlink(self, number: int, body: bytes) -> bytes:
        self._tree.remove(self._fd(number), name_in(body))
        return b""

    def _remove_directory(self, number: int, body: bytes) -> bytes:
        self._tree.remove_directory(self._fd(number), name_in(body))
        return b""

    def _rename(self, number: int, body: bytes) -> bytes:
        (to,) = abi.RENAME_IN.unpack_from(body)
        return self._move(number, to, body[abi.RENAME_IN.size :], 0)

    def _rename2(self, number: int, body: bytes) -> bytes:
        to, flags, _ = abi.RENAME2_IN.unpack_from(body)
        return self._move(number, to, body[abi.RENAME2_IN.size :], flags)

    def _move(self, number: int, to_number: int, names: bytes, flags: int) -> bytes:
        if flags & ~(_RENAME_NOREPLACE | _RENAME_EXCHANGE):
            fail(errno.EINVAL)
        name, new_name = names_in(names)
        parent, to = self.nodes.get(number), self.nodes.get(to_number)
        self.nodes.pin(parent)
        try:
            self._tree.rename(parent.fd, name, self.nodes.fd_of(to), new_name, flags)
        finally:
            self.nodes.unpin(parent)
        self.nodes.note_move(to, new_name)
        if flags & _RENAME_EXCHANGE:
            self.nodes.note_move(parent, name)
        return b""
