"""The use of this host when a vm.conf is read."""

from __future__ import annotations

import os
from errno import EFBIG, EISDIR, ELOOP, ENOENT
from pathlib import Path

import pytest

from vmd.config.check import check
from vmd.config.host import SIZE_MAX, SystemHost, secrecy_complaint
from vmd.config.parser import parse_config

HOST = SystemHost("/")


def write(path: Path, data: bytes = b"", mode: int = 0o600) -> Path:
    """Make a file."""
    path.write_bytes(data)
    path.chmod(mode)
    return path


@pytest.mark.parametrize(
    ("mode", "complaint"),
    [
        (0o600, None),
        (0o644, None),
        (0o664, "group writable or world writable"),
        (0o646, "group writable or world writable"),
    ],
)
def test_files_that_others_can_write(tmp_path: Path, mode: int, complaint: str | None) -> None:
    """Files that others can write are read, with a warning; world-readable ones are fine."""
    path = write(tmp_path / "f", b"data", mode)
    assert HOST.read_file(str(path)) == (b"data", complaint)


@pytest.mark.parametrize(
    ("uid", "complaint"),
    [(0, None), (1000, None), (1001, "owner not root or current user")],
)
def test_files_of_others(tmp_path: Path, uid: int, complaint: str | None) -> None:
    """A file must belong to root or the user."""
    fields = list(write(tmp_path / "f").stat())
    fields[4] = uid
    assert secrecy_complaint(os.stat_result(fields), 1000) == complaint


def test_a_device_is_nobodys_matter() -> None:
    """Write permission of a device or pipe does not matter."""
    assert HOST.read_file("/dev/null") == (b"", None)


@pytest.mark.parametrize(
    ("name", "number"), [("none", ENOENT), (".", EISDIR), ("large", EFBIG), ("loop", ELOOP)]
)
def test_files_that_cannot_be_read(tmp_path: Path, name: str, number: int) -> None:
    """A directory, a loop of links, or a file that is too large is an error."""
    with write(tmp_path / "large").open("wb") as file:
        file.truncate(SIZE_MAX + 1)
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(OSError, match=r"\[Errno") as caught:
        HOST.read_file(str(tmp_path / name))
    assert caught.value.errno == number


def test_an_endless_file_is_not_read_for_ever() -> None:
    """Reading stops at the largest size of a vm.conf."""
    lines, status = check("/dev/zero", {})
    assert (lines, status) == (["vmd: failed to open /dev/zero: File too large"], 1)


def test_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A path becomes absolute, from the directory of the start, and links are followed."""
    monkeypatch.chdir(tmp_path)
    host = SystemHost()
    monkeypatch.chdir("/")
    path = write(tmp_path / "disk")
    (tmp_path / "link").symlink_to("disk")
    assert host.read_file("disk") == host.read_file(str(path))
    assert [
        host.resolve(each) for each in ("disk", "./link", f"{tmp_path}/../{tmp_path.name}/disk")
    ] == [str(path.resolve())] * 3


@pytest.mark.parametrize("path", ["", "none", "none/x", "link", "\udcff"])
def test_paths_of_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str) -> None:
    """A missing file, or an empty name, has no path."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link").symlink_to("none")
    with pytest.raises(OSError, match="No such file or directory") as caught:
        SystemHost().resolve(path)
    assert caught.value.errno == ENOENT


def test_users_and_groups() -> None:
    """Names of users and groups are the host's."""
    assert (HOST.find_user("root"), HOST.find_group("root")) == (0, 0)
    name = "no-such-name-\udcff"
    assert (HOST.find_user(name), HOST.find_group(name)) == (None, None)


def test_a_file_on_this_host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Includes, disks and owners of one file are found on this host."""
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "disk.img")
    write(tmp_path / "part.conf", b"owner = root\n")
    write(
        tmp_path / "vm.conf",
        b'who = root\ninclude "more.conf"\nvm x { disk "disk.img"\n\towner $who\n}\n',
    )
    write(tmp_path / "more.conf", b"local inet6\n", 0o622)
    config = parse_config("vm.conf", {})
    assert config.vms[0].disks[0].path == str((tmp_path / "disk.img").resolve())
    assert config.vms[0].owner.uid == 0
    assert config.warnings == ("more.conf: group writable or world writable",)
    lines, status = check("vm.conf", {})
    assert (lines, status) == ([f"vmd: {config.warnings[0]}", "configuration OK"], 0)


def test_patterns(tmp_path: Path) -> None:
    """Matches come in the order of their names, from the host's directory; there may be none.

    Hidden files do not match, and a file whose name is the pattern is that file.
    """
    for name in ("b.conf", "a.conf", ".hidden.conf", "a.conf~", "x[1].conf"):
        (tmp_path / name).touch()
    host = SystemHost(str(tmp_path))
    assert host.glob("*.conf") == ["a.conf", "b.conf", "x[1].conf"]
    assert host.glob(f"{tmp_path}/?.conf") == [f"{tmp_path}/a.conf", f"{tmp_path}/b.conf"]
    assert host.glob("none*") == host.glob("none/*.conf") == []
    assert host.glob("x[1].conf") == ["x[1].conf"]


def test_a_pipe_that_nobody_writes_holds_nobody_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The daemon reads files for its clients: it must not wait for ever, writer or not."""
    monkeypatch.setattr("vmd.config.host.PATIENCE_S", 1)
    path = tmp_path / "fifo"
    os.mkfifo(path)
    for flags in (None, os.O_RDWR):
        writer = None if flags is None else os.open(path, flags)
        with pytest.raises(OSError, match="nothing to read for 1 s"):
            HOST.read_file(str(path))
        if writer is not None:
            os.close(writer)


def test_a_pipe_that_is_written_is_read() -> None:
    """As the shell's `vmd -f <(command)`."""
    reader, writer = os.pipe()
    os.write(writer, b"data")
    os.close(writer)
    try:
        assert HOST.read_file(f"/dev/fd/{reader}").data == b"data"
    finally:
        os.close(reader)
