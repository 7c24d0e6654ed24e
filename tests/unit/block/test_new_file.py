"""Files that appear when they are whole, by the means of each file system."""

from __future__ import annotations

import errno
import os
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from vmm_kvm.new_file import NewFile, write_whole


@pytest.fixture(params=["unnamed", "linked", "renamed"])
def place(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Path]:
    """Give a directory of a file system with unnamed files, with links alone, with neither."""
    opened, linked = os.open, os.link

    def open_named(path: str, flags: int, mode: int = 0o777, **more: int) -> int:
        if flags & os.O_TMPFILE == os.O_TMPFILE:
            raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP), path)
        return opened(path, flags, mode, **more)

    def link_nothing(source: str, target: str, **_more: int) -> None:
        del target
        raise OSError(errno.EPERM, os.strerror(errno.EPERM), source)

    if request.param != "unnamed":
        monkeypatch.setattr(os, "open", open_named)
    if request.param == "renamed":
        monkeypatch.setattr(os, "link", link_nothing)
    yield tmp_path
    monkeypatch.setattr(os, "open", opened)
    monkeypatch.setattr(os, "link", linked)


def names(place: Path) -> set[str]:
    """Return the names in a directory."""
    return {path.name for path in place.iterdir()}


@pytest.mark.parametrize("replaces", [False, True])
def test_a_file_appears_when_it_is_published(place: Path, replaces: bool) -> None:
    """Before publication no file has the name; then it is there, whole, for its owner alone."""
    path = place / "disk.img"
    with NewFile(str(path), replaces=replaces) as new:
        write_whole(new.fd, (b"whole", b" disk"))
        assert "disk.img" not in names(place)
        new.publish()
        assert path.read_bytes() == b"whole disk"
    assert names(place) == {"disk.img"}
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


@pytest.mark.parametrize("replaces", [False, True])
def test_a_file_that_is_not_published_is_gone(place: Path, replaces: bool) -> None:
    """A block that ends without publication leaves nothing."""
    with NewFile(str(place / "disk.img"), replaces=replaces) as new:
        write_whole(new.fd, (b"half",))
    assert names(place) == set()


def test_a_file_that_is_there_stays(place: Path) -> None:
    """A new file replaces no other: not one that exists, nor one made meanwhile."""
    path = place / "disk.img"
    with NewFile(str(path)) as new:
        write_whole(new.fd, (b"mine",))
        path.write_bytes(b"theirs")
        with pytest.raises(FileExistsError):
            new.publish()
    with pytest.raises(FileExistsError), NewFile(str(path)):
        pass
    assert (names(place), path.read_bytes()) == ({"disk.img"}, b"theirs")


def test_a_link_that_leads_nowhere_is_a_file_that_is_there(place: Path) -> None:
    """A new file is never made at the target of a symbolic link."""
    (place / "disk.img").symlink_to("elsewhere")
    with pytest.raises(FileExistsError), NewFile(str(place / "disk.img")):
        pass
    assert names(place) == {"disk.img"}


def test_a_replacement_takes_the_place(place: Path) -> None:
    """A file that replaces another does so at once."""
    path = place / "stamp"
    path.write_bytes(b"old")
    with NewFile(str(path), replaces=True) as new:
        write_whole(new.fd, (b"new",))
        assert path.read_bytes() == b"old"
        new.publish(durable=False)
    assert (names(place), path.read_bytes()) == ({"stamp"}, b"new")


def test_long_names(place: Path) -> None:
    """A name may have the file system's full length; the temporary one is no longer."""
    path = place / ("d" * 255)
    with NewFile(str(path)) as new:
        new.publish()
    assert names(place) == {path.name}


@pytest.mark.parametrize(
    ("name", "error"),
    [
        ("missing/disk.img", FileNotFoundError),
        ("directory/", IsADirectoryError),
        ("directory", FileExistsError),
        (".", IsADirectoryError),
        ("d" * 256, OSError),
        ("file/disk.img", NotADirectoryError),
        ("nul\0", ValueError),
    ],
)
def test_names_that_cannot_be(place: Path, name: str, error: type[Exception]) -> None:
    """A file that cannot be made is an error before anything is written."""
    (place / "directory").mkdir()
    (place / "file").touch()
    with pytest.raises(error), NewFile(f"{place}/{name}"):
        pass
    assert names(place) == {"directory", "file"}


def test_a_relative_name(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A bare name is a file in the working directory."""
    monkeypatch.chdir(place)
    with NewFile("disk.img") as new:
        new.publish()
    assert names(place) == {"disk.img"}


KILLED = """
import os
from vmm_kvm.new_file import NewFile
with NewFile("disk.img") as new:
    os.ftruncate(new.fd, 1 << 20)
    os.kill(os.getpid(), 9)
"""
NO_UNNAMED = """
opened = os.open
def refuse(path, flags, mode=0o777):
    if flags & os.O_TMPFILE == os.O_TMPFILE:
        raise OSError(95, "Operation not supported")
    return opened(path, flags, mode)
os.open = refuse
"""


def test_a_killed_process_leaves_no_name(tmp_path: Path) -> None:
    """SIGKILL in the middle leaves nothing if the file system has unnamed files."""
    ended = subprocess.run([sys.executable, "-c", KILLED], cwd=tmp_path, check=False)
    assert (ended.returncode, names(tmp_path)) == (-9, set())


def test_a_killed_process_leaves_a_part(tmp_path: Path) -> None:
    """Elsewhere SIGKILL leaves a file whose name ends in `.part` and tells of which file."""
    program = KILLED.replace("with New", f"{NO_UNNAMED}with New")
    ended = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, check=False)
    (left,) = names(tmp_path)
    assert (ended.returncode, left[:10], left[-5:]) == (-9, ".disk.img.", ".part")
