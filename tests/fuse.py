"""A FUSE file system of a few files, which stops answering when a test wants it to.

The server is a process of its own, which ends with the test. It speaks the kernel's protocol, so it
needs no other program or library; mounting it needs root.

Source: Linux include/uapi/linux/fuse.h, fuse(4), mount(2)
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import signal
import stat
import struct
from collections.abc import Mapping
from enum import IntEnum
from pathlib import Path
from typing import NamedTuple, NoReturn, Self

from vmm_kvm.libc import LIBC

_MS_NOSUID, _MS_NODEV = 2, 4
_MNT_DETACH = 2
_REQUEST_MAX = (128 << 10) + 4096
_VERSION = (7, 31)
_WRITEBACK_CACHE = 1 << 16
_ROOT = 1
_VALID_S = 3600  # the kernel asks for names and attributes only once
_IN = struct.Struct("=IIQQIIIHH")  # struct fuse_in_header
_OUT = struct.Struct("=IiQ")
_INIT_OUT = struct.Struct("=IIIIHHIIHHI7I")
_ENTRY = struct.Struct("=QQQQII")
_ATTR_VALID = struct.Struct("=QII")
_ATTR = struct.Struct("=QQQQQQIIIIIIIIII")
_OPEN_OUT = struct.Struct("=QII")
_READ_IN = struct.Struct("=QQI")
_WRITE_OUT = struct.Struct("=II")
_STATFS_OUT = struct.Struct("=QQQQQIIII6I")


class Call(IntEnum):
    """The kernel's requests; enum fuse_opcode."""

    LOOKUP = 1
    FORGET = 2
    GETATTR = 3
    SETATTR = 4
    OPEN = 14
    READ = 15
    WRITE = 16
    STATFS = 17
    RELEASE = 18
    FSYNC = 20
    FLUSH = 25
    INIT = 26
    OPENDIR = 27
    RELEASEDIR = 29
    ACCESS = 34
    INTERRUPT = 36
    BATCH_FORGET = 42


_UNANSWERED = {Call.FORGET, Call.INTERRUPT, Call.BATCH_FORGET}


class _File(NamedTuple):
    node: int
    data: bytes
    mode: int


class FuseMount:
    """A mounted file system; a context manager."""

    def __init__(self, folder: Path, files: Mapping[str, bytes], uid: int) -> None:
        """Mount files of the user `uid` at `folder`; others may use them too."""
        self._folder = folder
        # One byte for each call: whether the server answers it; then the number of unanswered ones.
        self._shared = mmap.mmap(-1, mmap.PAGESIZE)
        self._uid = uid
        self._files = {
            name.encode(): _File(node, data, stat.S_IFREG | 0o600)
            for node, (name, data) in enumerate(files.items(), _ROOT + 1)
        }
        fd = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
        try:
            options = f"fd={fd},rootmode=40000,user_id={uid},group_id={uid},allow_other"
            flags = _MS_NOSUID | _MS_NODEV
            if LIBC.mount(b"test", os.fsencode(folder), b"fuse", flags, options.encode()):
                raise OSError(ctypes.get_errno(), "cannot mount FUSE")
            self._pid = os.fork()
            if self._pid == 0:
                self._live(fd)
        finally:
            os.close(fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        """End the server, and unmount."""
        self.end()
        assert LIBC.umount2(os.fsencode(self._folder), _MNT_DETACH) == 0
        self._shared.close()

    def end(self) -> None:
        """End the server: waiting requests fail; idempotent."""
        if self._pid:
            os.kill(self._pid, signal.SIGKILL)
            os.waitpid(self._pid, 0)
            self._pid = 0

    def hang(self, *calls: Call) -> None:
        """Answer these calls no more."""
        for call in calls:
            self._shared[call] = 1

    def unanswered(self, call: Call) -> int:
        """Return the number of unanswered calls of one kind."""
        return self._shared[128 + call]

    # The server

    def _live(self, fd: int) -> NoReturn:
        try:
            os.closerange(3, fd)
            os.closerange(fd + 1, 4096)
            while True:
                try:
                    self._serve(fd, os.read(fd, _REQUEST_MAX))
                except OSError as err:
                    if err.errno not in {errno.ENOENT, errno.EINTR}:  # the request was aborted
                        break
        finally:
            os._exit(0)

    def _serve(self, fd: int, request: bytes) -> None:
        _size, number, unique, node, *_ = _IN.unpack_from(request)
        body = request[_IN.size :]
        if number < 128 and self._shared[number]:
            self._shared[128 + number] += 1
            return
        if number in _UNANSWERED:
            return
        try:
            data, error = self._answer(number, node, body), 0
        except OSError as err:
            data, error = b"", -(err.errno or errno.EIO)
        os.write(fd, _OUT.pack(_OUT.size + len(data), error, unique) + data)

    def _answer(self, number: int, node: int, body: bytes) -> bytes:
        match number:
            case Call.INIT:
                return _INIT_OUT.pack(
                    *(*_VERSION, 0, _WRITEBACK_CACHE, 16, 12, 64 << 10, 1, 16, 0, 0), *[0] * 7
                )
            case Call.LOOKUP:
                file = self._files.get(body.rstrip(b"\0"))
                if file is None:
                    raise OSError(errno.ENOENT, "")
                return _ENTRY.pack(file.node, 0, _VALID_S, _VALID_S, 0, 0) + self._attr(file.node)
            case Call.GETATTR | Call.SETATTR:
                return _ATTR_VALID.pack(_VALID_S, 0, 0) + self._attr(node)
            case Call.OPEN | Call.OPENDIR:
                return _OPEN_OUT.pack(0, 0, 0)
            case Call.READ:
                _handle, offset, size = _READ_IN.unpack_from(body)
                return self._file(node).data[offset : offset + size]
            case Call.WRITE:  # forget the data
                return _WRITE_OUT.pack(_READ_IN.unpack_from(body)[2], 0)
            case Call.STATFS:
                return _STATFS_OUT.pack(0, 0, 0, 0, 0, 4096, 255, 4096, *[0] * 7)
            case Call.FLUSH | Call.RELEASE | Call.RELEASEDIR | Call.FSYNC | Call.ACCESS:
                return b""
            case _:
                raise OSError(errno.ENOSYS, "")

    def _file(self, node: int) -> _File:
        for file in self._files.values():
            if file.node == node:
                return file
        return _File(_ROOT, b"", stat.S_IFDIR | 0o711)

    def _attr(self, node: int) -> bytes:
        file = self._file(node)
        size = len(file.data)
        blocks = -(-size // 512)
        owner = self._uid, self._uid
        return _ATTR.pack(*(node, size, blocks, 0, 0, 0, 0, 0, 0), file.mode, 1, *owner, 0, 4096, 0)
