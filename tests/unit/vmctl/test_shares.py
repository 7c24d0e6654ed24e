"""Shares of `vmctl run`: their options, and a device process of one, as a driver uses it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import pytest

from tests.fs_driver import SILENT, Guest
from vmctl.foreground.shares import open_shares
from vmd.config.shares import ShareError, ShareOption, parse_share
from vmd.confine import landlock
from vmm_kvm.bits import MIB
from vmm_kvm.errors import SpecError
from vmm_kvm.fs import abi


@contextmanager
def sharing(*texts: str) -> Iterator[list[Guest]]:
    """Share directories as `--share` does, each with a process and a driver."""
    with ExitStack() as stack:
        specs = list(open_shares(texts, stack))
        guests = [Guest(spec, stack) for spec in specs]
        for guest in guests:
            guest.start()
            guest.begin()
        yield guests


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A directory to share, and one beside it."""
    (tmp_path / "shared" / "sub").mkdir(parents=True)
    (tmp_path / "shared" / "file").write_bytes(b"contents")
    (tmp_path / "beside").write_bytes(b"secret")
    return tmp_path / "shared"


@pytest.mark.parametrize(
    ("text", "option"),
    [
        ("./src:/src", ShareOption("./src", "/src")),
        ("src:src:ro", ShareOption("src", "src", is_read_only=True)),
        ("src:src:rw", ShareOption("src", "src")),
        ("/a:b/c:tag", ShareOption("/a:b/c", "tag")),
        ("vhost-user:/run/fs:t", ShareOption("/run/fs", "t", is_server=True)),
    ],
)
def test_options(text: str, option: ShareOption) -> None:
    """A directory, a tag, and whether it is only read; or a server's socket."""
    assert parse_share(text) == option


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("src", "invalid share: src: not directory:tag"),
        (":tag", "invalid share: :tag: not directory:tag"),
        ("src:", "invalid share: src:: the tag has 1 to 36 bytes"),
        (f"src:{'t' * 37}", f"invalid share: src:{'t' * 37}: the tag has 1 to 36 bytes"),
        (
            "vhost-user:s:t:ro",
            "invalid share: vhost-user:s:t:ro: what may be written is up to its server",
        ),
    ],
)
def test_wrong_options(text: str, message: str) -> None:
    """A wrong option is reported in one line."""
    with pytest.raises(ShareError, match=r".*") as err:
        parse_share(text)
    assert str(err.value) == message


def test_what_cannot_be_shared(folder: Path) -> None:
    """No file, nothing that is not there, and no two with one tag."""
    for texts, message in (
        ((f"{folder}/file:t",), f"share {folder}/file: Not a directory"),
        ((f"{folder}/none:t",), f"share {folder}/none: No such file or directory"),
        ((f"{folder}:t", f"{folder}/sub:t:ro"), "two shares have the tag t"),
    ):
        with ExitStack() as stack, pytest.raises(SpecError) as err:
            list(open_shares(texts, stack))
        assert str(err.value) == message


def test_a_share_by_its_device(folder: Path) -> None:
    """Files are read and written through virtqueues; a driver that begins again starts anew."""
    data = os.urandom(MIB)
    with sharing(f"{folder}:src", f"{folder}/sub:only:ro") as (guest, reader):
        assert (guest.tag(), reader.tag()) == (b"src", b"only")
        assert guest.content(guest.look_up(b"file").node) == b"contents"
        found, handle = guest.create(b"new", guest.look_up(b"sub").node, mode=0o666)
        assert guest.write(handle, data) == MIB
        assert (folder / "sub/new").read_bytes() == data
        assert (folder / "sub/new").stat().st_mode & 0o777 == 0o666
        assert reader.content(reader.look_up(b"new").node) == data
        with pytest.raises(OSError, match="Read-only"):
            reader.unlink(b"new")
        guest.forget(found.node)
        assert [one.name for one in guest.listing(plus=True)] != []
        guest.rename(b"file", b"moved")
        guest.make_directory(b"d")
        guest.link(guest.look_up(b"moved").node, b"second", guest.look_up(b"d").node)
        guest.make_symlink(b"l", b"/etc/passwd")
        guest.set_attributes(
            guest.look_up(b"moved").node, abi.FATTR_MODE | abi.FATTR_MTIME, mode=0o600, mtime=1
        )
        assert (folder / "d/second").stat().st_mtime == 1
        guest.unlink(b"second", guest.look_up(b"d").node)
        guest.remove_directory(b"d")
        guest.call(abi.FUSE_STATFS, abi.FUSE_ROOT_ID)
        guest.start()
        guest.begin()
        with pytest.raises(OSError, match="Stale"):
            guest.attributes(found.node)


def test_the_process_outlives_any_request(folder: Path) -> None:
    """Calls that no kernel makes get an error number, and the next one is served."""
    with sharing(f"{folder}:src") as (guest,):
        for opcode in range(64):
            if opcode in {abi.FUSE_INIT, abi.FUSE_DESTROY, *SILENT}:
                continue
            for body in (b"", b"\xff" * 7, b"\xff" * 128):
                with suppress(OSError):
                    guest.call(opcode, 1, body)
        assert guest.content(guest.look_up(b"file").node) == b"contents"


@pytest.mark.skipif(landlock.version() == 0, reason="this kernel has no Landlock")
def test_what_leaves_the_tree_is_closed(folder: Path) -> None:
    """A directory that the host moves elsewhere is no part of the share any more."""
    (folder / "sub" / "data").write_bytes(b"data")
    with sharing(f"{folder}:src") as (guest,):
        sub = guest.look_up(b"sub").node
        data = guest.look_up(b"data", sub).node
        assert guest.content(data) == b"data"
        (folder / "sub").rename(folder.parent / "moved")
        for call in (
            lambda: guest.content(data),
            lambda: guest.listing(sub),
            lambda: guest.create(b"new", sub),
            lambda: guest.make_directory(b"new", sub),
            lambda: guest.unlink(b"data", sub),
        ):
            with pytest.raises(PermissionError):
                call()
        assert guest.content(guest.look_up(b"file").node) == b"contents"


@pytest.mark.parametrize("mode", ["", ":ro"])
def test_the_process_is_confined(folder: Path, mode: str) -> None:
    """It has a filter, no capabilities but those for files, no new privileges, and few files."""
    with ExitStack() as stack:
        (spec,) = open_shares([f"{folder}:src{mode}"], stack)
        before = children()
        connection = spec.connect()
        stack.callback(connection.close)
        (pid,) = children() - before
        status = dict(
            line.split(":\t", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines()
        )
        assert (status["Seccomp"].strip(), status["NoNewPrivs"].strip()) == ("2", "1")
        assert int(status["CapEff"], 16) & ~0b11110 == 0
        if os.geteuid() != 0:
            return  # other processes may not look at its descriptors
        opened = {str(path.readlink()) for path in Path(f"/proc/{pid}/fd").iterdir()}
        files = {path for path in opened if path.startswith("/") and not path.startswith("/dev/")}
        assert files <= {str(folder), f"/proc/{pid}/fd", standard_error()}


def standard_error() -> str:
    """Return what standard error of this process is."""
    return str(Path("/proc/self/fd/2").readlink())


def children() -> set[str]:
    """Return the pids of this process's children."""
    return set(Path(f"/proc/self/task/{os.getpid()}/children").read_text().split())
