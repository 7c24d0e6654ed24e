"""Snapshots by their digests: fetched from other hosts at first use, checked, and kept.

`python -m vmm_fleet.snapshots FILE` puts a file of `vmctl snapshot -o` into this host's store, and
prints its digest. Jobs name it by that, and hosts that lack it get it from one that has it. The
store is this user's alone, because a snapshot has all of a guest's secrets; it keeps the eight that
were used last, and `vmctl image prune` empties it.
"""

import hashlib
import os
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

from vmctl.client import CommandError
from vmctl.images.digests import parse_digest
from vmctl.images.layer import write_sparse
from vmctl.images.store import ImageStore, snapshots_directory
from vmm_kvm.errors import SnapshotError
from vmm_kvm.snapshot.file import SnapshotFile
from vmm_kvm.snapshot.manifest import Manifest

KEPT_MAX = 8
SIZE_MAX = 64 << 30
_PIECE = 64 << 10
_PIECES = 32
"""Of an answer."""


class MissingError(Exception):
    """A snapshot cannot be had; `str()` is one line."""


class Part(NamedTuple):
    """A part of a snapshot's file."""

    size: int
    """Of the whole file."""
    length: int
    """Of this part."""
    data: bytes
    """Empty if it is zeros."""


Source = Callable[[int], Part | None]
"""Returns the part of a snapshot at an offset; None from a host that lacks it."""


def file_name(digest: str) -> str:
    """Return the name of a snapshot in the store.

    Raises:
        ValueError: it is not named by a sha256 digest.
    """
    try:
        found = parse_digest(digest)
    except CommandError as err:
        raise ValueError(str(err)) from None
    if found.algorithm != "sha256":
        raise ValueError(f"invalid digest: {digest}: not of sha256")
    return str(found)


def read(digest: str, offset: int) -> Part | None:
    """Return the part of a snapshot of this host at an offset; None if it is not here.

    Raises:
        ValueError: it is not named by a digest, or the offset cannot be.
    """
    if offset < 0:
        raise ValueError(f"invalid offset: {offset}")
    try:
        fd = os.open(_store().path(file_name(digest)), os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    try:
        data = os.pread(fd, _PIECES * _PIECE, offset)
        size = os.fstat(fd).st_size
    finally:
        os.close(fd)
    return Part(size, len(data), data if data.strip(b"\0") else b"")


def add(path: str) -> str:
    """Put a file into this host's store; returns its digest.

    Raises:
        MissingError: it is no snapshot.
        OSError: it cannot be read or stored.
    """
    with Path(path).open("rb") as file:
        digest = f"sha256:{hashlib.file_digest(file, 'sha256').hexdigest()}"

        def part(offset: int) -> Part:
            data = os.pread(file.fileno(), _PIECES * _PIECE, offset)
            return Part(os.fstat(file.fileno()).st_size, len(data), data)

        obtain(digest, lambda: [part])
    return digest


def obtain(digest: str, sources: Callable[[], Iterable[Source]]) -> str:
    """Return the path of a snapshot; it is fetched from one of `sources` if it is not here.

    Another process of this host that fetches it is waited for.

    Raises:
        ValueError: it is not named by a digest.
        MissingError: no source has it, or what they have is something else.
        OSError: it cannot be stored.
    """
    name, store = file_name(digest), _store()
    path = store.path(name)
    if not Path(path).exists():
        Path(store.directory).mkdir(mode=0o700, parents=True, exist_ok=True)
        with store.partial(name, lambda: None) as fd:
            if fd is not None:
                _fetch(store, name, fd, sources())
    os.utime(path)  # the others are removed before it
    return path


def manifest_of(path: str) -> Manifest:
    """Return the description of a snapshot's machine.

    Raises:
        MissingError: it is none, or damaged.
        OSError: it cannot be read.
    """
    try:
        with SnapshotFile(os.open(path, os.O_RDONLY | os.O_CLOEXEC)) as file:
            return file.manifest
    except SnapshotError as err:
        raise MissingError(f"{path}: {err}") from None


def _store() -> ImageStore:
    return ImageStore(snapshots_directory())


def _fetch(store: ImageStore, name: str, fd: int, sources: Iterable[Source]) -> None:
    problem = "no worker's host has it"
    for source in sources:
        try:
            size = _copy(fd, source)
        except (MissingError, OSError) as err:
            problem = str(err)
            continue
        if size is None:
            continue
        if _digest(fd) == name:
            try:
                manifest_of(f"/proc/self/fd/{fd}")
            except MissingError as err:
                store.drop(name)
                raise MissingError(f"{name}: {str(err).rpartition(': ')[2]}") from None
            _make_room(store)
            store.publish(fd, name, "")
            return
        problem = "a host has other contents of this digest"
        os.ftruncate(fd, 0)
    if not os.fstat(fd).st_size:
        store.drop(name)
    raise MissingError(f"{name}: {problem}")


def _copy(fd: int, source: Source) -> int | None:
    """Go on with a copy; returns the size of the file, or None if the source lacks it."""
    offset = os.lseek(fd, 0, os.SEEK_END)
    try:
        while True:
            part = source(offset)
            if part is None:
                return None
            if not 0 < part.size <= SIZE_MAX:
                raise MissingError(f"a host has {part.size} bytes of it")
            if offset >= part.size:
                return part.size
            room = os.statvfs(f"/proc/self/fd/{fd}")
            if part.data and part.length > room.f_bavail * room.f_frsize:
                raise MissingError("no space is left for it")
            if not 0 < part.length <= min(_PIECES * _PIECE, part.size - offset) or (
                part.data and len(part.data) != part.length
            ):
                raise MissingError("a host sends another part than was asked for")
            offset += part.length
            for at in range(0, part.length, _PIECE):
                length = min(_PIECE, part.length - at)
                write_sparse(fd, part.data[at : at + length] or bytes(length))
    finally:
        os.ftruncate(fd, os.lseek(fd, 0, os.SEEK_CUR))


def _digest(fd: int) -> str:
    with Path(f"/proc/self/fd/{fd}").open("rb") as file:
        return f"sha256-{hashlib.file_digest(file, 'sha256').hexdigest()}"


def _make_room(store: ImageStore) -> None:
    """Remove what was used the longest time ago; machines that go on from it keep it."""
    kept = sorted(store.images(), key=lambda one: one.pulled)
    for one in kept[: max(0, len(kept) + 1 - KEPT_MAX)]:
        store.remove(one.digest)


def main() -> int:
    """Put the files of the command line into the store; returns the exit status."""
    for path in sys.argv[1:]:
        try:
            sys.stdout.write(f"{add(path)} {path}\n")
        except (MissingError, OSError) as err:
            sys.stderr.write(f"vmm_fleet: {path}: {err}\n")
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
