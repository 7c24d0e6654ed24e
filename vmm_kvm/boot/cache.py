"""Unpacked kernels, kept between starts.

`<directory>/<digest>` is what an image with a payload of that SHA-256 unpacks to, followed by the
SHA-256 of the file itself. The content is the key: an image that is copied, touched or downloaded
again finds its kernel. Hashing a payload costs more than all else of a start, so a second kind of
file, `<directory>/<stamp>.stamp`, remembers that the image file in the state `stamp` (device,
inode, size, modification and change time) had this digest, and which state the unpacked file was in
when its own digest was last checked. While both states are the same, nothing is hashed.

This assumes that a file whose change time stands still was not written. No program can set the
change time, and a stamp is only kept once the image has been left alone for longer than time stamps
are coarse. When either state differs, the digests decide, and a damaged file is thrown away. The
directory must belong to the user and be writable by nobody else: this guards against accidents and
other users, not against the user, who can boot what they like anyhow.

Files appear by rename, so readers and other starts see all of one or nothing. If anything is wrong
with the cache, the kernel is unpacked again.
"""

import os
import stat
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import Protocol

from vmm_kvm.boot.source import FileSource, Stamp, stamp_of
from vmm_kvm.clock import NANOSECONDS
from vmm_kvm.errors import BootError
from vmm_kvm.log import Log
from vmm_kvm.new_file import NewFile, write_whole

log = Log(__name__)

DIGEST_SIZE = 32
_KEPT = 8
"""Kernels; the least recently used go first."""
_STAMPS_KEPT = 32
_TICK_NS = 100_000_000
"""Linux takes the time of a file from a clock that moves every 1 to 10 ms."""
_COARSE_NS = 2_000_000_000
"""The coarsest time stamps of file systems in use (FAT) are two seconds apart."""
_ABANDONED_S = 3600
_STAMP_SUFFIX = ".stamp"


def default_directory() -> str | None:
    """Return where this user's cache is, or None if there is no home directory.

    Source: XDG base directory specification.
    """
    base = os.environ.get("XDG_CACHE_HOME", "")
    if not base.startswith("/"):
        home = os.environ.get("HOME", "")
        if not home.startswith("/"):
            return None
        base = f"{home}/.cache"
    return f"{base}/vmm-kvm/kernels"


class Kernels(Protocol):
    """Keeps unpacked kernels: the cache, or a process with access to one."""

    def find(self, image: FileSource) -> FileSource | None:
        """Return the unpacked kernel of `image` if both are known to be unchanged."""

    def find_digest(self, image: FileSource, digest: str) -> FileSource | None:
        """Return the unpacked kernel of the payload with SHA-256 `digest`."""

    def keep(self, image: FileSource, digest: str, kernel: Sequence[bytes | memoryview]) -> None:
        """Keep the unpacked payload of `image`, whose SHA-256 is `digest`."""


def has_settled(status: os.stat_result) -> bool:
    """Tell whether a file was left alone for longer than its time stamps are coarse.

    Only then does a change from now on show in its stamp.
    """
    age_ns = time.time_ns() - max(status.st_ctime_ns, status.st_mtime_ns)
    return age_ns >= (_TICK_NS if status.st_ctime_ns % NANOSECONDS else _COARSE_NS)


def settled_stamp(status: os.stat_result) -> Stamp:
    """Return a file's stamp, empty where a change from now on might not show in it."""
    return stamp_of(status) if has_settled(status) else Stamp("")


class KernelCache:
    """The cache in one directory, which is made when something is to be kept."""

    __slots__ = ("_directory",)

    def __init__(self, directory: str) -> None:
        self._directory = directory

    def find(self, image: FileSource) -> FileSource | None:
        """Return the unpacked kernel of `image` if both are known to be unchanged."""
        try:
            self._check_directory()
            stamp = self._stamp_path(image)
            with open(stamp, encoding="ascii") as file:
                digest, expected = file.read().split()
            kernel = FileSource.open(self._path(digest))
        except (OSError, ValueError, BootError) as err:
            log.debug("%s: no stamp in the kernel cache: %s", image.name, err)
            return None
        if kernel.stamp != expected:
            kernel.close()
            return None
        kernel.size -= DIGEST_SIZE
        kernel.name = image.name  # for errors
        self._touch(stamp)
        return kernel

    def find_digest(self, image: FileSource, digest: str) -> FileSource | None:
        """Return the unpacked kernel of the payload with SHA-256 `digest`, after checking it."""
        import hashlib  # noqa: PLC0415 - not needed by a start that finds a stamp

        path = self._path(digest)
        try:
            self._check_directory()
            kernel = FileSource.open(path)
        except (OSError, BootError) as err:
            log.debug("%s: not in the kernel cache: %s", image.name, err)
            return None
        try:
            size = kernel.size - DIGEST_SIZE
            expected = kernel.read(size, DIGEST_SIZE)
            if hashlib.sha256(kernel.read(0, size)).digest() == expected:
                kernel.size = size
                kernel.name = image.name  # for errors
                self._keep_stamp(image, digest, kernel.stamp)
                return kernel
        except BootError as err:
            log.debug("%s", err)
        log.debug("%s: damaged in the kernel cache: %s", image.name, path)
        kernel.close()
        _remove(path)
        return None

    def keep(self, image: FileSource, digest: str, kernel: Sequence[bytes | memoryview]) -> None:
        """Keep the unpacked payload of `image`, whose SHA-256 is `digest`."""
        import hashlib  # noqa: PLC0415 - not needed by a start that finds a stamp

        checksum = hashlib.sha256()
        for piece in kernel:
            checksum.update(piece)
        try:
            os.makedirs(self._directory, mode=0o700, exist_ok=True)
            self._check_directory()
            path = self._path(digest)
            self._write(path, (*kernel, checksum.digest()), durable=True)
            self._keep_stamp(image, digest, stamp_of(os.stat(path)))
            self._prune()
        except (OSError, ValueError) as err:
            log.debug("%s: not kept in the kernel cache: %s", image.name, err)

    def _path(self, digest: str) -> str:
        if len(digest) != 2 * DIGEST_SIZE or not digest.isalnum():
            raise ValueError(f"not a digest: {digest!r}")
        return f"{self._directory}/{digest}"

    def _stamp_path(self, image: FileSource) -> str:
        return f"{self._directory}/{image.stamp}{_STAMP_SUFFIX}"

    def _check_directory(self) -> None:
        status = os.stat(self._directory)
        if status.st_uid != os.geteuid() or status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            raise PermissionError(f"{self._directory}: others can write there")

    def _keep_stamp(self, image: FileSource, digest: str, state: Stamp) -> None:
        """Remember the state of the image and of the unpacked file, unless the image is too new."""
        try:
            status = os.fstat(image.fd)
            if stamp_of(status) != image.stamp or not has_settled(status):
                return
            line = (f"{digest} {state}\n".encode("ascii"),)
            self._write(self._stamp_path(image), line, durable=False)
        except OSError as err:
            log.debug("%s: no stamp kept: %s", image.name, err)

    def _write(self, path: str, pieces: Sequence[bytes | memoryview], *, durable: bool) -> None:
        """Make a file that is complete as soon as it can be seen."""
        with NewFile(path, replaces=True) as new:
            write_whole(new.fd, pieces)
            new.publish(durable=durable)

    def _touch(self, stamp: str) -> None:
        """Note the use of a kernel in the stamp's time: the kernel's own must not change."""
        try:
            os.utime(stamp)
        except OSError as err:
            log.debug("%s: %s", stamp, err)

    def _prune(self) -> None:
        """Remove the kernels and stamps that were not used for longest, and abandoned files."""
        used: dict[str, int] = {}
        stamps: list[tuple[int, str]] = []
        for name in os.listdir(self._directory):
            path = f"{self._directory}/{name}"
            status = os.lstat(path)
            if name.startswith("."):
                if status.st_mtime + _ABANDONED_S < time.time():
                    _remove(path)
            elif name.endswith(_STAMP_SUFFIX):
                stamps.append((status.st_mtime_ns, path))
                with open(path, encoding="ascii", errors="replace") as file:
                    digest = file.read().partition(" ")[0]
                used[digest] = max(used.get(digest, 0), status.st_mtime_ns)
            else:
                used[name] = max(used.get(name, 0), status.st_mtime_ns)
        for digest in sorted(used, key=lambda name: used[name], reverse=True)[_KEPT:]:
            _remove(self._path(digest))
        for _, path in sorted(stamps, reverse=True)[_STAMPS_KEPT:]:
            _remove(path)


def _remove(path: str) -> None:
    with suppress(FileNotFoundError):
        os.unlink(path)
