"""The FUSE server: each request on a real directory, and limits on a guest's use."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import ParamSpec

import pytest

from tests.fuse_client import OWN_INODE, FuseClient
from vmm_kvm.fs import abi
from vmm_kvm.fs.server import DATA_MAX
from vmm_kvm.fs.values import VALID_S

ROOT = abi.FUSE_ROOT_ID
P = ParamSpec("P")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A directory with something of each kind."""
    folder = tmp_path / "shared"
    (folder / "sub" / "deep").mkdir(parents=True)
    (folder / "file").write_bytes(b"contents")
    (folder / "sub" / "deep" / "data").write_bytes(bytes(range(256)) * 1000)
    (folder / "link").symlink_to("/etc/passwd")
    os.mkfifo(folder / "fifo")
    (tmp_path / "outside").write_bytes(b"secret")
    return folder


@pytest.fixture
def client(folder: Path) -> Iterator[FuseClient]:
    """A client that may write."""
    with FuseClient(folder) as client:
        yield client


@pytest.fixture
def reader(folder: Path) -> Iterator[FuseClient]:
    """A client that may only read."""
    with FuseClient(folder, is_writable=False) as client:
        yield client


def refused(call: Callable[P, object], *arguments: P.args, **named: P.kwargs) -> int:
    """Return the error number of a call, 0 if there is none."""
    try:
        call(*arguments, **named)
    except OSError as err:
        return err.errno or -1
    return 0


def test_the_session(reader: FuseClient) -> None:
    """Version 7, the features that the driver knows too, and pages of a mebibyte."""
    major, minor, readahead, flags, _, _, write, granularity, pages, *rest = reader.begin()
    assert (major, minor, readahead, write, granularity) == (7, 38, 1 << 17, DATA_MAX, 1)
    assert pages * 4096 == DATA_MAX
    assert flags & abi.FUSE_DO_READDIRPLUS
    assert not any(rest)
    body = abi.INIT_IN.pack(7, 31, 0, 0)
    assert abi.INIT_OUT.unpack(reader.call(abi.FUSE_INIT, body=body))[3] == 0


def test_other_versions(reader: FuseClient) -> None:
    """An older one is refused; a newer one is told ours, and has to ask again."""
    assert refused(reader.call, abi.FUSE_INIT, 0, abi.INIT_IN.pack(6, 0, 0, 0)) == errno.EPROTO
    answer = reader.call(abi.FUSE_INIT, 0, abi.INIT_IN.pack(8, 0, 0, 0))
    assert abi.INIT_OUT.unpack(answer)[0] == 7
    assert refused(reader.look_up, b"file") == errno.ENOTCONN
    reader.begin()
    assert reader.look_up(b"file").node


def test_what_is_there(reader: FuseClient, folder: Path) -> None:
    """Names lead to nodes with the host's attributes; links and FIFOs are themselves."""
    for path in ("file", "sub", "sub/deep/data", "link", "fifo"):
        found, status = reader.walk(path).attributes, (folder / path).lstat()
        assert (found.ino & OWN_INODE, found.size, found.mode) == (
            status.st_ino,
            status.st_size,
            status.st_mode,
        )
        assert (found.uid, found.nlink) == (status.st_uid, status.st_nlink)
        assert found.mtime * 10**9 + found.mtimensec == status.st_mtime_ns
    assert reader.walk("file") == reader.walk("file")
    assert reader.link_target(reader.look_up(b"link").node) == b"/etc/passwd"
    assert refused(reader.look_up, b"none") == errno.ENOENT
    assert refused(reader.link_target, reader.look_up(b"file").node) == errno.EINVAL


def test_reading(reader: FuseClient, folder: Path) -> None:
    """A file is read in pieces, from anywhere, and ends where it ends."""
    data = (folder / "sub/deep/data").read_bytes()
    node = reader.walk("sub/deep/data").node
    assert reader.content(node) == data
    handle = reader.open(node)
    assert reader.read(handle, 255_990) == data[255_990:]
    assert reader.read(handle, 1 << 40) == b""
    assert refused(reader.read, handle, 1 << 63) == errno.EINVAL
    reader.release(handle)
    assert refused(reader.read, handle) == errno.EBADF
    assert refused(reader.release, handle) == errno.EBADF


@pytest.mark.parametrize("plus", [False, True])
@pytest.mark.parametrize("size", [512, 65536])
def test_listing(reader: FuseClient, folder: Path, plus: bool, size: int) -> None:
    """A directory is listed whole, in pieces as large as the guest asks for."""
    many = folder / "sub" / "many"
    many.mkdir()
    for number in range(300):
        (many / f"{number:04}-{'x' * (number % 50)}").touch()
    listed = reader.listing(reader.walk("sub/many").node, size=size, plus=plus)
    assert sorted(one.name for one in listed) == sorted(
        os.fsencode(path.name) for path in many.iterdir()
    )
    inodes = {os.fsencode(path.name): path.stat().st_ino for path in many.iterdir()}
    assert {one.name: one.ino & OWN_INODE for one in listed} == inodes
    for one in listed[:20]:
        assert bool(one.node) == plus
        if plus:
            assert reader.attributes(one.node).ino == one.ino


def test_the_root_has_no_parent(reader: FuseClient, folder: Path) -> None:
    """The parent of the shared directory has not even a number."""
    handle, *_ = abi.OPEN_OUT.unpack(reader.call(abi.FUSE_OPENDIR, ROOT, abi.OPEN_IN.pack(0, 0)))
    piece = {entry.name: entry.ino for entry, _ in reader.list_piece(handle, 0, 4096, plus=False)}
    assert piece[b".."] == folder.stat().st_ino
    reader.release(handle)


def test_a_reader_changes_nothing(reader: FuseClient, folder: Path) -> None:
    """Each call that changes something is refused, also opening for it."""
    before = sorted(folder.rglob("*"))
    node = reader.look_up(b"file").node
    handle = reader.open(node)
    for call in (
        lambda: reader.create(b"new"),
        lambda: reader.make_node(b"new", stat.S_IFREG | 0o644),
        lambda: reader.make_directory(b"new"),
        lambda: reader.make_symlink(b"new", b"file"),
        lambda: reader.link(node, b"new"),
        lambda: reader.unlink(b"file"),
        lambda: reader.remove_directory(b"sub"),
        lambda: reader.rename(b"file", b"new"),
        lambda: reader.set_attributes(node, abi.FATTR_MODE, mode=0),
        lambda: reader.write(handle, b"x"),
        lambda: reader.open(node, os.O_RDWR),
    ):
        assert refused(call) == errno.EROFS
    assert sorted(folder.rglob("*")) == before
    assert (folder / "file").read_bytes() == b"contents"


def test_making_and_writing(client: FuseClient, folder: Path) -> None:
    """Files are made, written, cut, synced; other opens see the same."""
    found, handle = client.create(b"new", mode=0o640)
    assert stat.S_IMODE((folder / "new").stat().st_mode) == 0o640
    data = bytes(range(256)) * 4096
    assert client.write(handle, data, 3) == len(data) == DATA_MAX
    client.call(abi.FUSE_FSYNC, 0, abi.FSYNC_IN.pack(handle, 0, 0))
    client.call(abi.FUSE_FSYNC, 0, abi.FSYNC_IN.pack(handle, 1, 0))
    assert (folder / "new").read_bytes() == bytes(3) + data
    client.set_attributes(found.node, abi.FATTR_SIZE | abi.FATTR_FH, size=5, fh=handle)
    assert client.set_attributes(found.node, abi.FATTR_SIZE, size=4).size == 4
    client.release(handle)
    assert client.content(found.node) == bytes(3) + b"\0"
    assert refused(client.create, b"new") == errno.EEXIST
    again, handle = client.create(b"new", flags=os.O_RDWR)
    assert again.node == found.node
    client.release(handle)
    reading = client.open(found.node)
    assert refused(client.write, reading, b"x") == errno.EBADF
    client.release(reading)


def test_holes(client: FuseClient, folder: Path) -> None:
    """Space is allocated and punched, and holes are found."""
    _, handle = client.create(b"sparse")
    client.write(handle, b"x" * 65536, 1 << 20)
    body = abi.LSEEK_IN.pack(handle, 0, os.SEEK_DATA, 0)
    found = abi.LSEEK_OUT.unpack(client.call(abi.FUSE_LSEEK, 0, body))
    assert found in {(1 << 20,), (0,)}  # of a file system without holes
    client.call(abi.FUSE_FALLOCATE, 0, abi.FALLOCATE_IN.pack(handle, 0, 2 << 20, 0, 0))
    assert (folder / "sparse").stat().st_size == 2 << 20
    wrong = abi.FALLOCATE_IN.pack(handle, 0, 4096, 8, 0)
    assert refused(client.call, abi.FUSE_FALLOCATE, 0, wrong) == errno.EOPNOTSUPP
    assert (
        refused(client.call, abi.FUSE_LSEEK, 0, abi.LSEEK_IN.pack(handle, 0, os.SEEK_SET, 0))
        == errno.EINVAL
    )
    client.release(handle)


def test_names(client: FuseClient, folder: Path) -> None:
    """Directories, links of both kinds, FIFOs and renames are the host's."""
    made = client.make_directory(b"dir", mode=0o700)
    client.make_symlink(b"sym", b"../../anywhere", made.node)
    assert (folder / "dir/sym").readlink() == Path("../../anywhere")
    client.make_node(b"pipe", stat.S_IFIFO | 0o600, made.node)
    assert (folder / "dir/pipe").is_fifo()
    client.make_node(b"plain", stat.S_IFREG | 0o600, made.node)
    file = client.look_up(b"file")
    assert client.link(file.node, b"second", made.node).node == file.node
    assert (folder / "dir/second").samefile(folder / "file")
    sym = client.look_up(b"sym", made.node)
    client.link(sym.node, b"sym2")
    assert (folder / "sym2").is_symlink()
    assert refused(client.link, made.node, b"twice") == errno.EPERM
    client.rename(b"plain", b"moved", made.node)
    assert (folder / "moved").is_file()
    assert refused(client.rename, b"moved", b"file", flags=1) == errno.EEXIST
    client.rename(b"moved", b"file", flags=2)
    assert (folder / "moved").read_bytes() == b"contents"
    assert client.look_up(b"moved").node == file.node
    assert refused(client.rename, b"moved", b"x", flags=4) == errno.EINVAL
    assert refused(client.remove_directory, b"dir") == errno.ENOTEMPTY
    for name in (b"sym", b"pipe", b"second"):
        client.unlink(name, made.node)
    client.remove_directory(b"dir")
    assert not (folder / "dir").exists()


@pytest.fixture
def no_mask() -> Iterator[None]:
    """Modes are taken as they come, as in the process of a share."""
    before = os.umask(0)
    yield
    os.umask(before)


@pytest.mark.usefixtures("no_mask")
def test_nothing_special_is_made(client: FuseClient, folder: Path) -> None:
    """No devices; no bits that would lend the user's rights; owners stay as they are."""
    for kind in (stat.S_IFCHR, stat.S_IFBLK, stat.S_IFDIR, 0):
        assert refused(client.make_node, b"device", kind | 0o666) == errno.EPERM
    found, handle = client.create(b"tool", mode=0o6755)
    client.release(handle)
    client.make_directory(b"d", mode=0o7777)
    client.make_node(b"p", stat.S_IFIFO | 0o6666)
    modes = [stat.S_IMODE((folder / name).stat().st_mode) for name in ("tool", "d", "p")]
    assert modes == [0o755, 0o1777, 0o666]
    client.set_attributes(found.node, abi.FATTR_MODE, mode=0o6711)
    owner = (folder / "tool").stat()
    after = client.set_attributes(found.node, abi.FATTR_UID | abi.FATTR_GID, uid=4711, gid=4711)
    assert (after.uid, after.gid) == (owner.st_uid, owner.st_gid)
    assert stat.S_IMODE((folder / "tool").stat().st_mode) == 0o711


def test_times(client: FuseClient, folder: Path) -> None:
    """Times are set one by one, of a link itself, and before 1970 too."""
    node = client.look_up(b"file").node
    before = (folder / "file").stat()
    client.set_attributes(node, abi.FATTR_MTIME, mtime=1000, mtimensec=7)
    after = (folder / "file").stat()
    assert (after.st_mtime_ns, after.st_atime_ns) == (1000 * 10**9 + 7, before.st_atime_ns)
    client.set_attributes(node, abi.FATTR_ATIME, atime=(1 << 64) - 100)
    assert (folder / "file").stat().st_atime == -100
    client.set_attributes(node, abi.FATTR_MTIME | abi.FATTR_MTIME_NOW)
    assert (folder / "file").stat().st_mtime > 10**9
    link = client.look_up(b"link").node
    client.set_attributes(link, abi.FATTR_MTIME, mtime=5)
    assert (folder / "link").lstat().st_mtime == 5
    assert refused(client.set_attributes, link, abi.FATTR_MODE, mode=0) == errno.EOPNOTSUPP
    assert refused(client.set_attributes, node, abi.FATTR_ATIME, atimensec=10**9) == errno.EINVAL


def test_what_is_not_opened(client: FuseClient) -> None:
    """FIFOs and directories are no files, and nothing of them is ever opened."""
    assert refused(client.open, client.look_up(b"fifo").node) == errno.EACCES
    assert refused(client.open, client.look_up(b"link").node) == errno.EACCES
    assert refused(client.open, client.look_up(b"sub").node) == errno.EISDIR
    assert refused(client.create, b"fifo", flags=os.O_RDWR) == errno.EACCES
    assert refused(client.create, b"link", flags=os.O_RDWR) == errno.EACCES
    assert refused(client.listing, client.look_up(b"file").node) == errno.ENOTDIR
    assert refused(client.open, client.look_up(b"file").node, 3) == errno.EINVAL


def test_statistics(reader: FuseClient, folder: Path) -> None:
    """Of the file system the host's numbers."""
    fields = abi.STATFS_OUT.unpack(reader.call(abi.FUSE_STATFS, ROOT))
    found = os.statvfs(folder)
    assert (fields[0], fields[5], fields[6]) == (found.f_blocks, found.f_bsize, found.f_namemax)


@pytest.mark.parametrize(
    "opcode", [21, 22, 23, 24, 25, 31, 34, 39, 40, 47, 48, 51, 4096, 2**32 - 1]
)
def test_what_is_not_served(reader: FuseClient, opcode: int) -> None:
    """Extended attributes, locks, ioctls and unknown requests are refused."""
    assert refused(reader.call, opcode, ROOT, bytes(64)) == errno.ENOSYS


def test_nodes_are_forgotten(client: FuseClient) -> None:
    """A node lives until it has been forgotten as often as it was looked up, lies do not matter."""
    assert len(client.server.nodes) == 1
    data = client.walk("sub/deep/data")
    assert len(client.server.nodes) == 4
    client.look_up(b"file")
    file = client.look_up(b"file")
    client.forget(file.node)
    assert client.attributes(file.node).ino
    client.forget(file.node, 1 << 63)
    client.forget(file.node)
    client.forget(ROOT, 1 << 40)
    client.forget(12345)
    assert refused(client.attributes, file.node) == errno.ESTALE
    sub = client.look_up(b"sub").node
    client.forget(sub, 2)
    deep = client.look_up(b"deep", sub).node
    client.forget(deep, 2)
    assert client.content(data.node)
    pairs = abi.FORGET_ONE.pack(data.node, 1) + abi.FORGET_ONE.pack(77, 1)
    client.call(abi.FUSE_BATCH_FORGET, 0, abi.BATCH_FORGET_IN.pack(9999, 0) + pairs)
    assert len(client.server.nodes) == 1


def test_more_files_than_descriptors(folder: Path) -> None:
    """A node that was not used of late loses its descriptor, and is opened again by its name."""
    names = [b"f%d" % number for number in range(400)]
    deep = folder / "sub" / "deep"
    for name in names:
        (deep / os.fsdecode(name)).write_bytes(name)
    with FuseClient(folder, descriptors=32) as client:
        parent = client.walk("sub/deep").node
        nodes = [client.look_up(name, parent).node for name in names]
        held = client.open(nodes[0])
        assert client.server.nodes.open_descriptors == 15
        assert [client.content(node) for node in nodes] == names
        client.rename(b"deep", b"moved", client.look_up(b"sub").node)
        client.rename(b"f7", b"g7", parent)
        assert client.content(nodes[7]) == b"f7"
        assert [client.content(node) for node in nodes] == names
        # Another file in its place is not the same, and a removed one stays gone.
        (folder / "moved/f9").rename(folder / "moved/f10")
        for node in nodes[20:60]:
            client.attributes(node)
        assert refused(client.attributes, nodes[10]) == errno.ESTALE
        assert refused(client.attributes, nodes[9]) == errno.ESTALE
        client.unlink(b"f0", parent)
        assert client.attributes(nodes[0]).nlink == 0
        assert client.read(held) == b"f0"
        client.release(held)


def test_tables_have_an_end(folder: Path) -> None:
    """A guest with full tables is refused more, and works on with what it has."""
    for number in range(30):
        (folder / f"f{number}").touch()
    with FuseClient(folder, nodes_max=16, handles_max=8) as client:
        found = [client.look_up(b"f%d" % number).node for number in range(15)]
        assert refused(client.look_up, b"f20") == errno.ENFILE
        assert refused(client.create, b"new") == errno.ENFILE
        listed = client.listing(plus=True)
        assert sum(1 for one in listed if one.node) <= 15
        assert len(listed) == 34
        for node in found[:8]:
            client.open(node)
        assert refused(client.open, found[9]) == errno.ENFILE
        assert refused(client.listing) == errno.ENFILE
        assert (client.server.open_handles, len(client.server.nodes)) == (8, 16)
        client.begin()
        assert (client.server.open_handles, len(client.server.nodes)) == (0, 1)
        assert client.look_up(b"f20").node


def test_values_of_time(client: FuseClient) -> None:
    """The guest may cache attributes for a second: the host changes files too."""
    answer = client.call(abi.FUSE_LOOKUP, ROOT, b"file\0")
    assert abi.ENTRY_OUT.unpack_from(answer)[2:4] == (VALID_S, VALID_S) == (1, 1)


def test_mount_points_below() -> None:
    """File systems mounted below are shared, and their inode numbers differ from the root's."""
    with FuseClient(Path("/"), is_writable=False) as client:
        root = client.attributes(ROOT)
        proc = client.look_up(b"proc").attributes
        assert root.ino == Path("/").stat().st_ino
        assert proc.ino == Path("/proc").stat().st_ino + (1 << 56)
        assert client.look_up(b"proc").attributes.ino == proc.ino
