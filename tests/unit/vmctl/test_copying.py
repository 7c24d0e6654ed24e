"""`vmctl cp` with an agent on this host: both ways, and bounds for a hostile one."""

from __future__ import annotations

import hashlib
import io
import os
import random
import socket
import subprocess
import tarfile
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from tests.agents import BOUND_S, Vsock
from tests.vmctl_driver import VMCTL
from vmctl.guest.frames import Kind, frame

MIB = 1 << 20


@pytest.fixture
def guest(tmp_path: Path) -> Iterator[str]:
    """The name of a guest on a command line; the guest is this host."""
    with Vsock(tmp_path / "vsock"):
        yield f"{tmp_path}/vsock"


def _cp(*words: str | Path, stdin: bytes | None = None) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        [VMCTL, "cp", *words],
        input=stdin,
        stdin=subprocess.DEVNULL if stdin is None else None,
        capture_output=True,
        check=False,
        timeout=BOUND_S,
        umask=0o022,
    )


def _is_silent(done: subprocess.CompletedProcess[bytes]) -> bool:
    assert (done.returncode, done.stderr) == (0, b"")
    return True


def _tree(top: Path) -> dict[str, object]:
    """Return all files below a directory: kinds, modes, contents, targets."""
    found: dict[str, object] = {}
    for path in sorted(top.rglob("*")):
        name = str(path.relative_to(top))
        if path.is_symlink():
            found[name] = str(path.readlink())
        elif path.is_dir():
            found[name] = path.stat().st_mode
        else:
            found[name] = (path.stat().st_mode, hashlib.sha256(path.read_bytes()).hexdigest())
    return found


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A directory with odd names, modes, links, empty and large files, and a socket."""
    top = tmp_path / "tree"
    chance = random.Random(7)
    for number in range(20):
        folder = top / f"d{number % 4}" / ("deep" * (number % 3 + 1))
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"f{number}").write_bytes(
            chance.randbytes(chance.choice((0, 1, 511, 512, 70000)))
        )
    (top / "run").write_text("#!/bin/sh\n")
    (top / "run").chmod(0o755)
    (top / "empty").mkdir()
    (top / os.fsdecode(b"no text \xff\xfe")).write_text("x")
    (top / ("long " * 40)).write_text("y")
    (top / "d0" / "up").symlink_to("../run")
    (top / "d1" / "beside").symlink_to("deep")
    (top / ("l" * 150)).symlink_to("empty/" + "x" * 120)
    return top


def test_a_file_in_and_out(guest: str, tmp_path: Path) -> None:
    """A file that goes in and comes out is unchanged, under the requested name."""
    data = os.urandom(3 * MIB + 17)
    (tmp_path / "a").write_bytes(data)
    (tmp_path / "a").chmod(0o751)
    assert _is_silent(_cp(tmp_path / "a", f"{guest}:{tmp_path}/b"))
    assert _is_silent(_cp(f"{guest}:{tmp_path}/b", tmp_path / "c"))
    assert (tmp_path / "c").read_bytes() == data
    assert (tmp_path / "b").stat().st_mode & 0o777 == 0o751
    assert (tmp_path / "c").stat().st_mode & 0o777 == 0o751
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "c", "vsock"]


def test_into_a_directory(guest: str, tmp_path: Path) -> None:
    """If the target is a directory, the copy gets the source's name in it."""
    (tmp_path / "in").mkdir()
    (tmp_path / "out").mkdir()
    (tmp_path / "a").write_text("one")
    assert _is_silent(_cp(tmp_path / "a", f"{guest}:{tmp_path}/in"))
    assert _is_silent(_cp(f"{guest}:{tmp_path}/in/a", tmp_path / "out"))
    assert (tmp_path / "out" / "a").read_text() == "one"


def test_a_file_is_replaced(guest: str, tmp_path: Path) -> None:
    """A file that exists keeps its mode, here, and is replaced as a whole."""
    (tmp_path / "a").write_text("new")
    (tmp_path / "b").write_text("old and longer")
    (tmp_path / "b").chmod(0o600)
    (tmp_path / "link").symlink_to("b")
    assert _is_silent(_cp(f"{guest}:{tmp_path}/a", tmp_path / "link"))
    assert (tmp_path / "b").read_text() == "new"
    assert (tmp_path / "b").stat().st_mode & 0o777 == 0o600
    assert (tmp_path / "link").is_symlink()


def test_streams(guest: str, tmp_path: Path) -> None:
    """A dash is standard input or output: a file's contents, or a tar stream with -r."""
    data = os.urandom(MIB)
    assert _is_silent(_cp("-", f"{guest}:{tmp_path}/file", stdin=data))
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o644
    done = _cp(f"{guest}:{tmp_path}/file", "-")
    assert (done.returncode, done.stdout) == (0, data)


def test_tar_streams(guest: str, tree: Path, tmp_path: Path) -> None:
    """A tree is written as a tar stream, which a guest can unpack again."""
    done = _cp("-r", f"{guest}:{tree}", "-")
    assert (done.returncode, done.stderr) == (0, b"")
    with tarfile.open(fileobj=io.BytesIO(done.stdout)) as archive:
        assert "tree/run" in archive.getnames()
    (tmp_path / "to").mkdir()
    assert _is_silent(_cp("-r", "-", f"{guest}:{tmp_path}/to", stdin=done.stdout))
    assert _tree(tmp_path / "to" / "tree") == _tree(tree)


def test_a_tree_in_and_out(guest: str, tree: Path, tmp_path: Path) -> None:
    """A tree is unchanged after both ways; sockets are left out; a name is the target's."""
    before = _tree(tree)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tree / "socket"))
        assert _is_silent(_cp("-r", tree, f"{guest}:{tmp_path}/in"))
        assert _is_silent(_cp("-r", f"{guest}:{tmp_path}/in", tmp_path / "out"))
    assert _tree(tmp_path / "in") == before
    assert _tree(tmp_path / "out") == before


def test_a_tree_into_a_directory(guest: str, tree: Path, tmp_path: Path) -> None:
    """In a directory the tree gets its name; with a dot at its end, its contents go there."""
    for name in ("in", "out", "dot"):
        (tmp_path / name).mkdir()
    assert _is_silent(_cp("-r", tree, f"{guest}:{tmp_path}/in"))
    assert _is_silent(_cp("-r", f"{guest}:{tmp_path}/in/tree/", f"{tmp_path}/out/"))
    assert _is_silent(_cp("-r", f"{guest}:{tmp_path}/in/tree/.", tmp_path / "dot"))
    expected = _tree(tree)
    assert _tree(tmp_path / "out" / "tree") == _tree(tmp_path / "dot") == expected


def test_a_tree_over_another(guest: str, tree: Path, tmp_path: Path) -> None:
    """Files are replaced; other files of the target stay, and so do modes of directories."""
    out = tmp_path / "out"
    (out / "tree" / "d0").mkdir(parents=True)
    (out / "tree" / "d0").chmod(0o700)
    (out / "tree" / "run").write_text("old")
    (out / "tree" / "mine").write_text("mine")
    assert _is_silent(_cp("-r", f"{guest}:{tree}", out))
    expected = _tree(tree)
    expected["d0"] = (out / "tree" / "d0").stat().st_mode
    found = _tree(out / "tree")
    assert found.pop("mine")
    assert found == expected
    assert (out / "tree" / "d0").stat().st_mode & 0o777 == 0o700


def test_links_that_lead_out(guest: str, tmp_path: Path) -> None:
    """A link that leads out of the tree is left out, with a line and status 1."""
    top = tmp_path / "top"
    (top / "d" / "e").mkdir(parents=True)
    targets = {
        "abs": "/etc/passwd",
        "up": "../vsock",
        "late": "d/e/../..",
        "good": "d/e",
        "d/e/two": "../..",
        "d/e/three": "../../..",
        "d/here": ".",
    }
    for name, target in targets.items():
        (top / name).symlink_to(target)
    done = _cp("-r", f"{guest}:{top}", tmp_path / "out")
    left = sorted(line.split(": ")[1] for line in done.stderr.decode().splitlines())
    assert done.returncode == 1
    assert left == ["out/abs", "out/d/e/three", "out/late", "out/up"]
    assert {name for name in targets if (tmp_path / "out" / name).is_symlink()} == {
        *("good", "d/e/two", "d/here")
    }


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["{top}/a", "{top}/b"], "one of the two has to be in a guest: id:path"),
        (["{guest}:{top}/a", "{guest}:{top}/b"], "one of the two has to be in a guest: id:path"),
        (["{top}/none", "{guest}:{top}/b"], "{top}/none: No such file or directory"),
        (["{guest}:{top}/none", "{top}/b"], "{top}/none: No such file or directory"),
        (["{top}", "{guest}:{top}/b"], "{top}: is a directory: -r copies it"),
        (["{guest}:{top}", "{top}/b"], "{top}: Is a directory"),
        (["{top}/a", "{guest}:{top}/none/b"], "{top}/none/b: No such file or directory"),
        (["-r", "{guest}:{top}", "{top}/none/b"], "{top}/none: No such file or directory"),
        (["{guest}:", "{top}/b"], "{guest}:: there is no path behind the colon"),
        (["{top}/a", ""], "a name is empty"),
        (["{guest}:{top}/a", "/dev/full"], "No space left on device"),
    ],
)
def test_what_cannot_be_copied(guest: str, tmp_path: Path, words: Sequence[str], told: str) -> None:
    """What cannot be copied is one line and status 1, and nothing half made is left."""
    top = tmp_path / "top"
    top.mkdir()
    (top / "a").write_text("x" * 100)
    places = {"guest": guest, "top": top}
    done = _cp(*(word.format_map(places) for word in words))
    line = done.stderr.decode()
    assert done.returncode == 1
    assert line.startswith("vmctl: ")
    assert told.format_map(places) in line
    assert len(line.splitlines()) == 1
    assert [path.name for path in top.iterdir()] == ["a"]


def _answering(path: Path, answer: bytes) -> threading.Thread:
    """Run an agent at `path` that sends this once."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.bind(str(path))
    listener.listen()

    def serve() -> None:
        with listener:
            stream, _ = listener.accept()
        with stream:
            stream.recv(100)
            stream.sendall(b"OK 1\n" + frame(Kind.HELLO, b'{"protocol": 1, "version": "1"}'))
            stream.recv(4096)
            stream.sendall(frame(Kind.STARTED, b'{"mode": 511}') + answer)

    thread = threading.Thread(target=serve)
    thread.start()
    return thread


@pytest.mark.parametrize(
    "answer",
    [
        b"",
        frame(Kind.OUTPUT, b"half"),
        frame(Kind.OUTPUT, b"half") + frame(Kind.FAILED, b'{"code": "EIO", "message": "disk"}'),
    ],
)
def test_half_a_file(tmp_path: Path, answer: bytes) -> None:
    """A file whose end the agent does not send leaves nothing, and an existing one stays."""
    (tmp_path / "old").write_text("old")
    for number, name in enumerate(("old", "new")):
        thread = _answering(tmp_path / f"vsock{number}", answer)
        done = _cp(f"{tmp_path}/vsock{number}:/x", tmp_path / name)
        thread.join()
        assert done.returncode == 1
        assert len(done.stderr.splitlines()) == 1
    assert (tmp_path / "old").read_text() == "old"
    assert {path.name for path in tmp_path.iterdir()} == {"old", "vsock0", "vsock1"}


def test_a_hostile_name_for_a_file(tmp_path: Path) -> None:
    """The command line chooses the copy's name, and set-user-ID bits are dropped."""
    thread = _answering(
        tmp_path / "vsock", frame(Kind.OUTPUT, b"data") + frame(Kind.DONE, b'{"name": "../evil"}')
    )
    (tmp_path / "out").mkdir()
    assert _is_silent(_cp(f"{tmp_path}/vsock:/etc/some", tmp_path / "out"))
    thread.join()
    assert _tree(tmp_path / "out").keys() == {"some"}
    assert (tmp_path / "out" / "some").stat().st_mode & 0o7777 == 0o755


def _archive(*members: tuple[str, bytes, str]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, kind, target in members:
            member = tarfile.TarInfo(name)
            member.type, member.linkname, member.mode = kind, target, 0o6777
            member.size = 4 if kind == tarfile.REGTYPE else 0
            archive.addfile(member, io.BytesIO(b"evil"))
    return buffer.getvalue()


FILE, FOLDER, SYMLINK = tarfile.REGTYPE, tarfile.DIRTYPE, tarfile.SYMTYPE


@pytest.mark.parametrize(
    ("archive", "told"),
    [
        (_archive(("x/../../evil", FILE, "")), "x/../../evil: leads out of the tree"),
        (_archive(("/evil", FILE, "")), "/evil: leads out of the tree"),
        (_archive(("..", FOLDER, "")), "../: leads out of the tree"),
        (
            _archive(("x", FOLDER, ""), ("x/l", SYMLINK, "."), ("x/l/evil", FILE, "")),
            "out/l/evil: a link or a file is in the way",
        ),
        (
            _archive(("x", FOLDER, ""), ("x/mine/evil", FILE, "")),
            "out/mine/evil: a link or a file is in the way",
        ),
        (_archive(("x", FOLDER, ""), ("x/mine", FOLDER, "")), "out/mine: a link or a file is in"),
        (_archive(("x", tarfile.LNKTYPE, "../victim")), "x: neither file, directory nor link"),
        (_archive(("x", tarfile.CHRTYPE, "")), "x: neither file, directory nor link"),
        (_archive(("x", tarfile.FIFOTYPE, "")), "x: neither file, directory nor link"),
        (_archive(("\x1b[2J/..", FILE, "")), "\\x1b[2J/..: leads out of the tree"),
        (b"no tar stream" * 100, "tar: not a tar stream"),
        (
            _archive(("x", FOLDER, ""), ("x/evil", FILE, ""))[:1026],
            "tar: the stream ends too early",
        ),
        (b"", "tar: the stream ends too early"),
    ],
)
def test_hostile_trees(tmp_path: Path, archive: bytes, told: str) -> None:
    """Nothing is written outside the target, through no link, old or new."""
    (tmp_path / "victim").write_text("victim")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "to" / "out").mkdir(parents=True)
    (tmp_path / "to" / "out" / "mine").symlink_to("../../elsewhere")
    thread = _answering(tmp_path / "vsock", frame(Kind.OUTPUT, archive) + frame(Kind.DONE, b"{}"))
    done = _cp("-r", f"{tmp_path}/vsock:/some/out", tmp_path / "to")
    thread.join()
    assert done.returncode == 1
    assert told in done.stderr.decode()
    assert len(done.stderr.splitlines()) == 1
    assert {path.name for path in tmp_path.iterdir()} == {"victim", "elsewhere", "to", "vsock"}
    assert (tmp_path / "victim").read_text() == "victim"
    assert list((tmp_path / "elsewhere").iterdir()) == []
    assert {path.name for path in (tmp_path / "to").iterdir()} == {"out"}
    assert not list((tmp_path / "to").rglob("evil"))


def test_a_file_in_the_place_of_a_link(tmp_path: Path) -> None:
    """A file with the name of a link replaces the link, not the link's target."""
    (tmp_path / "victim").write_text("victim")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "x").symlink_to("../victim")
    archive = _archive(("t", FOLDER, ""), ("t/x", FILE, ""))
    thread = _answering(tmp_path / "vsock", frame(Kind.OUTPUT, archive) + frame(Kind.DONE, b"{}"))
    assert _is_silent(_cp("-r", f"{tmp_path}/vsock:/some/.", tmp_path / "out"))
    thread.join()
    assert (tmp_path / "victim").read_text() == "victim"
    assert (tmp_path / "out" / "x").read_text() == "evil"
    assert (tmp_path / "out" / "x").stat().st_mode & 0o7777 == 0o755
