"""The store of snapshots, in a directory of the test's."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from vmd.config.model import Limits
from vmd.parent.snapshots import SnapshotStore, StoreError
from vmd.rules.policy import Users
from vmd.wire.messages import ErrorCode

ROOT = 0
PAGE = 4096


def user() -> int:
    """Return a user who owns files that this process makes."""
    return os.getuid()


def store(directory: Path, limits: Limits | None = None, *, is_free: bool = False) -> SnapshotStore:
    """Make a store whose only user is an ordinary one, unless it is free."""
    users = Users(frozenset({user()} if is_free else ()), lambda _uid, _gid: False)
    return SnapshotStore(str(directory / "snapshots"), users, lambda: limits or Limits())


def put(found: SnapshotStore, name: str, size: int = PAGE) -> None:
    """Make a snapshot of some bytes."""
    new = found.begin(user(), name)
    try:
        os.write(new.fd, b"x" * size)
        os.fsync(new.fd)
        new.publish()
    finally:
        new.close()


def refusal(found: SnapshotStore, name: str, size: int = PAGE) -> tuple[ErrorCode, str]:
    """Return the reason for which a snapshot is refused."""
    with pytest.raises(StoreError) as caught:
        put(found, name, size)
    return caught.value.code, str(caught.value)


def test_a_snapshot_is_its_users_alone(tmp_path: Path) -> None:
    """Only its user can open the file; it is there under its name, listed, and opened."""
    found = store(tmp_path)
    put(found, "one")
    directory = tmp_path / "snapshots" / str(user())
    (path,) = directory.iterdir()
    assert path.name == "one.snapshot"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert path.stat().st_uid == user()
    assert {stat.S_IMODE(each.stat().st_mode) for each in (directory, directory.parent)} == {0o700}
    (info,) = found.list(user())
    assert (info.name, info.size) == ("one", PAGE)
    with os.fdopen(found.open(user(), "one"), "rb") as file:
        assert file.read() == b"x" * PAGE
    assert found.list(user() + 1) == ()


def test_nothing_is_left_of_one_that_is_not_finished(tmp_path: Path) -> None:
    """A snapshot that is closed before its publication leaves nothing."""
    found = store(tmp_path)
    new = found.begin(user(), "one")
    os.write(new.fd, b"half of it")
    new.close()
    assert list((tmp_path / "snapshots" / str(user())).iterdir()) == []


def test_a_name_is_used_once_and_free_again(tmp_path: Path) -> None:
    """A snapshot never replaces another; a removed one is gone."""
    found = store(tmp_path)
    put(found, "one")
    assert refusal(found, "one") == (ErrorCode.EEXIST, "there is a snapshot one already")
    found.remove(user(), "one")
    put(found, "one")
    found.remove(user(), "one")
    with pytest.raises(StoreError, match="there is no snapshot one"):
        found.remove(user(), "one")
    with pytest.raises(StoreError, match="there is no snapshot one"):
        found.open(user(), "one")


@pytest.mark.parametrize("name", ["", ".", "..", "../0/one", "a/b", "-x", "a" * 64, "a\0b"])
def test_a_name_leads_nowhere_else(name: str, tmp_path: Path) -> None:
    """An invalid name is refused before anything is opened."""
    found = store(tmp_path)
    for act in (found.begin, found.open, found.remove):
        with pytest.raises(StoreError, match="invalid snapshot name"):
            act(user(), name)
    assert list(tmp_path.iterdir()) == []


def test_what_a_user_may_have_is_limited(tmp_path: Path) -> None:
    """A user's number and storage are limited, by existing files; an administrator's are not."""
    limits = Limits(snapshots=2, storage=3 * PAGE)
    found = store(tmp_path, limits)
    put(found, "one")
    assert refusal(found, "large", 3 * PAGE) == (
        ErrorCode.EPERM,
        "limit of 12.0K storage of one user's snapshots",
    )
    put(found, "two")
    assert refusal(found, "three") == (ErrorCode.EPERM, "limit of 2 snapshots of one user")
    assert [one.name for one in found.list(user())] == ["two", "one"]
    free = store(tmp_path, limits, is_free=True)
    put(free, "three", 5 * PAGE)


def test_what_is_no_snapshot_is_not_listed(tmp_path: Path) -> None:
    """Files that a killed daemon, or a user, has left there are ignored."""
    found = store(tmp_path)
    put(found, "one")
    directory = tmp_path / "snapshots" / str(user())
    (directory / ".one.snapshot.0123.part").touch()
    (directory / "notes").touch()
    assert [one.name for one in found.list(user())] == ["one"]


def test_without_a_directory_there_are_none() -> None:
    """A daemon of a user without a home says so."""
    users = Users(frozenset(), lambda _uid, _gid: False)
    with pytest.raises(StoreError, match="no directory for snapshots: HOME is not set"):
        SnapshotStore(None, users, Limits).begin(user(), "one")
