"""Fuzz target: requests of a guest to a shared directory.

What is not served is answered with an error number; nothing outside of the directory is read or
changed; nodes, handles and descriptors are bounded, and none is left.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

from tests.fuse_client import FuseClient
from tests.fuzz.inputs import Input
from vmm_kvm.fs import abi

STEPS_MAX = 100
NODES_MAX, HANDLES_MAX = 24, 8
ROOM_MAX = 1 << 16
ERRNO_MAX = 512
"""The largest error number that the kernel accepts from a server."""
SECRET = b"not for guests"
_CALLS = sorted(
    value
    for name, value in vars(abi).items()
    if name.startswith("FUSE_") and 0 < value <= 46 and name != "FUSE_KERNEL_MINOR_VERSION"
)
_NAMES = (
    *(b"file", b"dir", b"link", b"fifo", b"new", b"other", b"deep", b".", b"..", b"", b"/"),
    *(b"../secret", b"dir/deep", b"x" * 255, b"x" * 256, b"a\0b", b"\xff"),
)
_NUMBERS = (0, 1, 2, 3, 7, 8, 64, 4096, 0x1FF, 0o100644, 0o010644, 1 << 31, 1 << 63, (1 << 64) - 1)


def _make(folder: Path) -> Path:
    (folder / "secret").write_bytes(SECRET)
    tree = folder / "tree"
    (tree / "dir" / "deep").mkdir(parents=True)
    (tree / "file").write_bytes(bytes(range(200)))
    (tree / "link").symlink_to("../secret")
    os.mkfifo(tree / "fifo")
    return tree


class Session:
    """A server, and what its guest remembers."""

    def __init__(self, folder: Path, *, is_writable: bool) -> None:
        self.client = FuseClient(
            _make(folder),
            is_writable=is_writable,
            descriptors=64,
            nodes_max=NODES_MAX,
            handles_max=HANDLES_MAX,
        )
        self.nodes = [abi.FUSE_ROOT_ID]
        self.handles = [1, 2]

    def step(self, given: Input) -> None:
        """Make a request."""
        call = given.choice(_CALLS) if given.number(1) % 8 else given.number(4)
        node = given.choice(self.nodes) if given.number(1) % 8 else given.number(8)
        body = self._body(given, call)
        data = given.piece(given.number(1)) if call == abi.FUSE_WRITE else b""
        room = ROOM_MAX if given.number(1) % 4 else given.number(2)
        try:
            answer = self.client.call(call, node, body, data=data, room=room)
            error = 0
        except OSError as err:
            answer, error = b"", err.errno or -1
        if error:
            assert 0 < error < ERRNO_MAX
            return
        assert SECRET not in answer
        if call in {abi.FUSE_LOOKUP, abi.FUSE_CREATE, abi.FUSE_MKDIR, abi.FUSE_MKNOD}:
            self.nodes.append(abi.ENTRY_OUT.unpack_from(answer)[0])
        if call == abi.FUSE_CREATE:
            front = abi.ENTRY_OUT.size + abi.ATTR.size
            self.handles.append(abi.OPEN_OUT.unpack_from(answer, front)[0])
        if call in {abi.FUSE_OPEN, abi.FUSE_OPENDIR}:
            self.handles.append(abi.OPEN_OUT.unpack_from(answer)[0])
        if call == abi.FUSE_INIT:
            self.nodes, self.handles = [abi.FUSE_ROOT_ID], [1, 2]

    def _body(self, given: Input, call: int) -> bytes:
        """Return arguments: numbers of which some are handles and nodes, and names, or anything."""
        if not given.number(1) % 8:
            return given.piece(given.number(2) % 512)
        handle = given.choice(self.handles)
        numbers = [given.choice(_NUMBERS) for _ in range(3)]
        names = given.choice(_NAMES) + b"\0" + given.choice(_NAMES) + b"\0"
        node = given.choice(self.nodes)
        small = [number & 0xFFFF_FFFF for number in numbers]
        match call:
            case abi.FUSE_LOOKUP | abi.FUSE_UNLINK | abi.FUSE_RMDIR | abi.FUSE_SYMLINK:
                return names
            case abi.FUSE_INIT:
                return abi.INIT_IN.pack(7, *small)
            case abi.FUSE_READ | abi.FUSE_READDIR | abi.FUSE_READDIRPLUS | abi.FUSE_WRITE:
                return abi.READ_IN.pack(handle, numbers[0], small[1], 0, 0, 0, 0)
            case abi.FUSE_OPEN | abi.FUSE_OPENDIR:
                return abi.OPEN_IN.pack(small[0], 0)
            case abi.FUSE_CREATE:
                return abi.CREATE_IN.pack(small[0], small[1], 0, 0) + names
            case abi.FUSE_MKNOD:
                return abi.MKNOD_IN.pack(small[0], 0, 0, 0) + names
            case abi.FUSE_MKDIR:
                return abi.MKDIR_IN.pack(small[0], 0) + names
            case abi.FUSE_LINK | abi.FUSE_RENAME:
                return abi.LINK_IN.pack(node) + names
            case abi.FUSE_RENAME2:
                return abi.RENAME2_IN.pack(node, small[0], 0) + names
            case abi.FUSE_SETATTR:
                # No size: a file of exbibytes is one, and takes long to remove.
                valid = small[0] & ~abi.FATTR_SIZE
                return abi.SETATTR_IN.pack(
                    *(valid, 0, handle, 0, 0, *numbers, *small, small[1], 0, 0, 0, 0)
                )
            case abi.FUSE_FALLOCATE:
                return abi.FALLOCATE_IN.pack(handle, numbers[0] % 4096, 4096, small[1], 0)
            case abi.FUSE_BATCH_FORGET:
                return abi.BATCH_FORGET_IN.pack(small[0], 0) + abi.FORGET_ONE.pack(node, numbers[1])
            case _:
                return abi.LSEEK_IN.pack(handle, numbers[0], small[1], 0)

    def check(self) -> None:
        """Hold the server to its bounds."""
        assert len(self.client.server.nodes) <= NODES_MAX
        assert self.client.server.open_handles <= HANDLES_MAX


def run(data: bytes) -> None:
    """Run a session."""
    given = Input(data)
    folder = Path(tempfile.mkdtemp(dir="/dev/shm"))
    try:
        session = Session(folder, is_writable=bool(given.number(1) % 8))
        with session.client:
            for _ in range(STEPS_MAX):
                if given.is_over:
                    break
                session.step(given)
                session.check()
        assert (folder / "secret").read_bytes() == SECRET
        assert sorted(path.name for path in folder.iterdir()) == ["secret", "tree"]
    finally:
        _remove(folder)


def _remove(folder: Path) -> None:
    for path, folders, _files in os.walk(folder):
        for name in folders:
            if not (Path(path) / name).is_symlink():
                (Path(path) / name).chmod(0o700)
    shutil.rmtree(folder)


def seeds() -> list[bytes]:
    """Return sessions that use each call on something that is there, and then on the rest."""
    begin = bytes([1])

    def step(call: int, node: int, body: bytes, rest: bytes = b"") -> bytes:
        """Return a step with a known call and node; `rest` is the data of a write."""
        return bytes([1, _CALLS.index(call), 1, node, 1]) + body + rest + bytes([1])

    def numbers(*choices: int) -> bytes:
        """Return the choices of a body: handle, three numbers, two names, node."""
        return bytes((*choices, *[0] * (7 - len(choices))))

    names = [step(abi.FUSE_LOOKUP, 0, numbers(0, 0, 0, 0, name)) for name in range(len(_NAMES))]
    every = [step(call, 0, numbers(), b"\0" * (call == abi.FUSE_WRITE)) for call in _CALLS]
    read = step(abi.FUSE_OPEN, 1, numbers()) + step(abi.FUSE_READ, 1, numbers(2, 0, 7))
    listing = step(abi.FUSE_OPENDIR, 0, numbers()) + step(abi.FUSE_READDIR, 0, numbers(3, 0, 7))
    plus = step(abi.FUSE_READDIRPLUS, 0, numbers(3, 0, 7)) + step(
        abi.FUSE_READDIRPLUS, 0, numbers(3, 0, 12)
    )
    made = step(abi.FUSE_CREATE, 0, numbers(0, 2, 9, 0, 4))
    write = step(abi.FUSE_WRITE, 0, numbers(2, 7, 6), bytes([64]) + bytes(64))
    changes = [
        step(abi.FUSE_MKDIR, 0, numbers(0, 8, 0, 0, 5)),
        step(abi.FUSE_MKNOD, 0, numbers(0, 10, 0, 0, 4)),
        step(abi.FUSE_SYMLINK, 0, numbers(0, 0, 0, 0, 4, 11)),
        step(abi.FUSE_LINK, 0, numbers(0, 0, 0, 0, 5, 0, 1)),
        step(abi.FUSE_RENAME2, 0, numbers(0, 0, 0, 0, 0, 4)),
        step(abi.FUSE_RENAME2, 0, numbers(0, 2, 0, 0, 4, 1)),
        step(abi.FUSE_SETATTR, 1, numbers(0, 13, 3, 5)),
        step(abi.FUSE_FALLOCATE, 0, numbers(2, 0, 0)),
        step(abi.FUSE_UNLINK, 0, numbers(0, 0, 0, 0, 4)),
        step(abi.FUSE_RMDIR, 0, numbers(0, 0, 0, 0, 5)),
    ]
    return [
        begin + b"".join(names[:9]),
        begin + b"".join(names),
        begin + b"".join(every),
        begin + names[0] + read + listing + plus,
        begin + made + write + b"".join(changes),
        begin + names[0] + made + b"".join(changes) + read + b"".join(every),
        bytes([0]) + names[0] + read + made + write + b"".join(changes),
        begin + made * 12 + (names[0] + read) * 6 + listing * 9 + bytes(64),
        begin + bytes(range(256)) * 4,
    ]
