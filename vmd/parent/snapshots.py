"""The store of snapshots: a directory for each user, in it a file for each snapshot.

The directories are the daemon's alone. A file belongs to the user that asked for it, so that it
counts towards that user's quota, and has its name only when it is complete. The parent reads
nothing of a file: what is in it was written by a VM's process.
"""

import os
from collections.abc import Callable, Sequence
from contextlib import nullcontext, suppress
from errno import EEXIST, ENOENT
from pathlib import Path
from typing import NamedTuple

from vmd.config.model import Limits
from vmd.config.sizes import fmt_scaled
from vmd.confine.sandbox import owning
from vmd.rules.policy import Users, is_name
from vmd.wire.messages import ErrorCode
from vmd.wire.transfers import SnapshotInfo
from vmm_kvm.new_file import NewFile

LISTED_MAX = 512
"""Snapshots that an answer has room for; those of an administrator have no other limit."""
_DIRECTORY_MODE = 0o700
_ENDING = ".snapshot"
_BLOCK_SIZE = 512  # of st_blocks, always


class StoreError(Exception):
    """A snapshot cannot be made or found; `str()` is one line."""

    def __init__(self, code: ErrorCode, message: str) -> None:
        super().__init__(message)
        self.code = code


class _Stored(NamedTuple):
    name: str
    created_at: float
    size: int


class NewSnapshot:
    """A snapshot that is being written; one that is closed before it is published never was."""

    def __init__(self, store: "SnapshotStore", uid: int, name: str, new: NewFile) -> None:
        """Own `new`, which is open."""
        self._store = store
        self.uid = uid
        """The user whose it is."""
        self._name = name
        self._new = new

    @property
    def fd(self) -> int:
        """The file; it stays the snapshot's."""
        return self._new.fd

    @property
    def size(self) -> int:
        """Bytes of the host's storage, by now."""
        return os.fstat(self._new.fd).st_blocks * _BLOCK_SIZE

    def publish(self) -> None:
        """Give it its name: a VM's process has written it, and made it durable.

        Raises:
            StoreError: there is one of that name by now, it is larger than its user may have, or
                the host does not let it be.
        """
        self._store.check_room(self.uid, self.size)
        try:
            self._new.publish(durable=False)
        except OSError as err:
            raise _refusal(self._name, err) from err

    def close(self) -> None:
        """Close the file; without a name nothing is left of it."""
        self._new.__exit__(None, None, None)


class SnapshotStore:
    """All snapshots of all users."""

    def __init__(self, directory: str | None, users: Users, limits: Callable[[], Limits]) -> None:
        """Keep them in `directory`, which is made when there is something to keep.

        `limits` returns what an ordinary user may have.
        """
        self.directory = directory
        """May change with the configuration; snapshots elsewhere are not seen then."""
        self._users = users
        self._limits = limits

    def begin(self, uid: int, name: str) -> NewSnapshot:
        """Make a file for a snapshot that a user wants.

        Raises:
            StoreError: there is one of that name, the user has as many as it may, or the host does
                not let it be.
        """
        path = self._path(uid, name)
        self.check_room(uid, 0)
        new = NewFile(path)
        try:
            for directory in (self.directory or "", self._directory_of(uid)):
                Path(directory).mkdir(_DIRECTORY_MODE, parents=True, exist_ok=True)
            with owning(uid, os.getegid()) if os.geteuid() != uid else nullcontext():
                new.__enter__()
        except OSError as err:
            raise _refusal(name, err) from err
        return NewSnapshot(self, uid, name, new)

    def check_room(self, uid: int, size: int) -> None:
        """Go on if a user may have one more snapshot, of `size` bytes.

        Raises:
            StoreError: it may not.
        """
        if uid in self._users.administrators:
            return
        limits = self._limits()
        stored = self._stored(uid)
        if len(stored) >= limits.snapshots:
            text = f"limit of {limits.snapshots} snapshots of one user"
            raise StoreError(ErrorCode.EPERM, text)
        used = sum(one.size for one in stored)
        if used + size > limits.storage or used >= limits.storage:
            text = f"limit of {fmt_scaled(limits.storage)} storage of one user's snapshots"
            raise StoreError(ErrorCode.EPERM, text)

    def list(self, uid: int) -> tuple[SnapshotInfo, ...]:
        """Return a user's snapshots, the latest first."""
        stored = sorted(self._stored(uid), key=lambda one: one.created_at, reverse=True)
        return tuple(
            SnapshotInfo(name=one.name, created_at=one.created_at, size=one.size)
            for one in stored[:LISTED_MAX]
        )

    def open(self, uid: int, name: str) -> int:
        """Open a user's snapshot for reading; returns the descriptor, which is the caller's.

        Raises:
            StoreError: there is none.
        """
        try:
            return os.open(self._path(uid, name), os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        except OSError as err:
            raise _refusal(name, err) from err

    def remove(self, uid: int, name: str) -> None:
        """Remove a user's snapshot; processes that have it open keep it.

        Raises:
            StoreError: there is none, or it cannot be removed.
        """
        try:
            os.unlink(self._path(uid, name))  # noqa: PTH108 - the plainest way
        except OSError as err:
            raise _refusal(name, err) from err

    def _directory_of(self, uid: int) -> str:
        if self.directory is None:
            text = "no directory for snapshots: HOME is not set"
            raise StoreError(ErrorCode.EIO, text)
        return f"{self.directory}/{uid}"

    def _path(self, uid: int, name: str) -> str:
        if not is_name(name):
            raise StoreError(ErrorCode.EINVAL, "invalid snapshot name")
        return f"{self._directory_of(uid)}/{name}{_ENDING}"

    def _stored(self, uid: int) -> Sequence[_Stored]:
        found = []
        with suppress(FileNotFoundError), os.scandir(self._directory_of(uid)) as entries:
            for entry in entries:
                name = entry.name.removesuffix(_ENDING)
                if name == entry.name or not is_name(name):
                    continue
                with suppress(FileNotFoundError):
                    status = entry.stat(follow_symlinks=False)
                    size = status.st_blocks * _BLOCK_SIZE
                    found.append(_Stored(name, status.st_mtime, size))
        return found


def _refusal(name: str, err: OSError) -> StoreError:
    if err.errno == EEXIST:
        return StoreError(ErrorCode.EEXIST, f"there is a snapshot {name} already")
    if err.errno == ENOENT:
        return StoreError(ErrorCode.ENOENT, f"there is no snapshot {name}")
    return StoreError(ErrorCode.EIO, f"snapshot {name}: {err.strerror}")
