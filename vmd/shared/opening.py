"""Opening and checking the files of a VM, with this process's rights.

The parent does this itself for files that vm.conf names, and for administrators; for other clients
a process with the client's rights does it, see `vmd.opener`. A file is named, or the client has
opened it and passed its descriptor. The result is descriptors alone; no path is followed any more.

Source: sections 2.5, 7.5 and 9.3 of OpenBSD's behaviour.
"""

import errno
import os
import time
from collections.abc import Iterable
from typing import Self

from vmd.config.disks import DiskKind
from vmd.shared.files import FileError, FileKindError, check_open_file, open_file
from vmd.wire.channel import ChannelError, Fds, MalformedError
from vmd.wire.files import FileUse, FoundFile, WantedFile
from vmd.wire.messages import ErrorCode
from vmm_kvm.block.image import Format
from vmm_kvm.block.locks import lock
from vmm_kvm.boot.cache import settled_stamp
from vmm_kvm.errors import ImageError
from vmm_kvm.images.opening import image_chain

_MISSING = {
    FileUse.BOOT: ErrorCode.ENOENT,
    FileUse.FIRMWARE: ErrorCode.BIOS_MISSING,
    FileUse.INITRD: ErrorCode.EINVAL,
    FileUse.CDROM: ErrorCode.CDROM_MISSING,
    FileUse.DISK: ErrorCode.DISK_MISSING,
    FileUse.MEMORY: ErrorCode.DISK_MISSING,
}
_DISKS = {FileUse.DISK, FileUse.MEMORY}
_STAMPED = {FileUse.BOOT, FileUse.FIRMWARE}
_LOCK_LOOK_S = 0.02
_DENIED = {errno.EACCES, errno.EPERM}


class OpeningError(Exception):
    """A file is unavailable or unsuitable; `str()` is one line."""

    def __init__(self, code: ErrorCode, message: str) -> None:
        super().__init__(message)
        self.code = code


class Files:
    """Open files; a context manager, which closes those that were not taken."""

    def __init__(self) -> None:
        """Begin without any."""
        self.found: list[FoundFile] = []
        """In the order in which they were wanted."""
        self.fds: list[int] = []
        """The descriptors that `found` indexes."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        Fds(self.take()).close()

    def take(self) -> list[int]:
        """Hand over the descriptors."""
        fds, self.fds = self.fds, []
        return fds

    def open(
        self, wanted: Iterable[WantedFile], passed: Fds, *, lock_patience_s: float = 0
    ) -> None:
        """Open and check files; takes those of `passed` that they name.

        A lock may be another's for `lock_patience_s`.

        Raises:
            OpeningError: one is not to be had.
        """
        for one in wanted:
            try:
                self.found.append(_Opening(one, passed, self.fds, lock_patience_s).file())
            except MalformedError as err:
                raise OpeningError(ErrorCode.EINVAL, str(err)) from err
            except OSError as err:
                text = f"{one.use} {one.path}: {err.strerror or err}"
                raise OpeningError(ErrorCode.EIO, text) from err
            except ChannelError as err:
                raise OpeningError(ErrorCode.EAGAIN, str(err)) from err


class _Opening:
    """One file; its descriptors are added to `fds`."""

    def __init__(
        self, wanted: WantedFile, passed: Fds, fds: list[int], lock_patience_s: float
    ) -> None:
        self._wanted = wanted
        self._lock_patience_s = lock_patience_s
        self._passed = [passed.take(index) for index in wanted.passed]
        self._next = 0
        self._fds = fds
        self._chain: list[int] = []
        # From now on they are closed with the others.
        self._first = len(fds)
        fds += self._passed

    def file(self) -> FoundFile:
        """Return the result."""
        wanted = self._wanted
        if wanted.use is FileUse.DISK:
            formats = self._image()
        else:
            self._layer(wanted.path)
            formats = ()
        if self._passed and self._next != len(self._passed):
            text = f"{wanted.path}: more base images than it refers to"
            raise OpeningError(ErrorCode.DISK_MISSING, text)
        stamp = ""
        if wanted.use in _STAMPED:
            stamp = settled_stamp(os.fstat(self._fds[self._chain[0]]))
        return FoundFile(chain=tuple(self._chain), formats=formats, stamp=stamp)

    def _image(self) -> tuple[DiskKind, ...]:
        """Open a disk's image and its bases; returns their formats."""
        wanted = self._wanted
        said = None if wanted.format is DiskKind.PROBE else Format(wanted.format)
        try:
            layers = image_chain(wanted.path, said, self._layer)
        except ImageError as err:
            raise OpeningError(ErrorCode.DISK_MISSING, str(err)) from err
        return tuple(DiskKind(layer.disk_format or Format.RAW) for layer in layers)

    def _layer(self, path: str) -> int:
        """Open the file, or the next base of it; returns its descriptor."""
        wanted = self._wanted
        writes = wanted.writes and not self._chain
        is_disk = wanted.use in _DISKS
        try:
            if self._has_passed(path):
                index = self._first + self._next
                self._next += 1
                check_open_file(self._fds[index], writes=writes, allows_devices=is_disk)
            else:
                index = len(self._fds)
                self._fds.append(open_file(path, writes=writes, allows_devices=is_disk))
        except FileError as err:
            raise OpeningError(self._code(err), f"{self._name()} {path}: {err}") from err
        if is_disk and wanted.locks and not self._chain:
            self._lock(self._fds[index], path, writes=writes)
        self._chain.append(index)
        return self._fds[index]

    def _lock(self, fd: int, path: str, *, writes: bool) -> None:
        deadline = time.monotonic() + self._lock_patience_s
        while True:
            try:
                lock(fd, path, writes=writes)
            except ImageError as err:
                if time.monotonic() >= deadline:
                    raise OpeningError(ErrorCode.DISK_MISSING, str(err)) from err
                time.sleep(_LOCK_LOOK_S)
            else:
                return

    def _has_passed(self, path: str) -> bool:
        """Tell whether the next file came along; it has to if the first did."""
        wanted = self._wanted
        if self._next < len(self._passed):
            return True
        if self._passed and not wanted.follows_bases:
            text = f"{wanted.path}: its base image {path} did not come along"
            raise OpeningError(ErrorCode.DISK_MISSING, text)
        return False

    def _name(self) -> str:
        if self._chain:
            return "base image"
        return "disk" if self._wanted.use in _DISKS else self._wanted.use

    def _code(self, err: FileError) -> ErrorCode:
        if self._wanted.use is FileUse.CDROM and isinstance(err, FileKindError):
            return ErrorCode.CDROM_INVALID
        return ErrorCode.EPERM if err.errno in _DENIED else _MISSING[self._wanted.use]
