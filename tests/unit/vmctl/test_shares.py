"""Shares of `vmctl run`: their options, and a device process of one, as a driver uses it."""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import pytest

from tests.fuse_client import FuseCalls
from tests.virtio_driver import DriverQueue
from tests.virtio_pci_driver import PciDriver
from vmctl.foreground.shares import ShareOption, open_shares, parse_share
from vmd.confine import landlock
from vmm_kvm.bits import MIB
from vmm_kvm.errors import SpecError
from vmm_kvm.fs import abi
from vmm_kvm.memory import GuestMemory
from vmm_kvm.virtio.abi import VIRTIO_F_VERSION_1
from vmm_kvm.virtio.vhost_user.fs import RemoteFsSpec, make_remote_fs

RAM_SIZE = 8 * MIB
_REQUEST, _DATA, _ANSWER, _ROOM = MIB, 2 * MIB, 4 * MIB, 6 * MIB
_SILENT = {abi.FUSE_FORGET, abi.FUSE_BATCH_FORGET, abi.FUSE_INTERRUPT}
_SPLIT = 10
"""The offset at which a driver may split a header."""


class Guest(FuseCalls):
    """A driver of a file system, by PCI and virtqueues."""

    def __init__(self, spec: RemoteFsSpec, stack: ExitStack) -> None:
        """Have a process serve it; `start` comes when all are there."""
        super().__init__(self._ask)
        memory = GuestMemory(((0, RAM_SIZE),), "test", is_private=False)
        stack.callback(memory.close)
        self.pci = PciDriver(make_remote_fs(spec, memory))
        stack.callback(self.pci.device.close)
        self._ram = memory.view(0, RAM_SIZE)
        self.queues = {index: DriverQueue(self._ram, 64, 0x4000 * (index + 1)) for index in (0, 1)}

    def start(self) -> None:
        """Reset the device, and start it anew."""
        self.pci.status = 0
        for queue in self.queues.values():
            queue.seen = queue.added = 0
            self._ram[queue.ring.available : queue.ring.used + 1024] = bytes(
                queue.ring.used + 1024 - queue.ring.available
            )
        self.pci.start(self.queues, features=1 << VIRTIO_F_VERSION_1, msix=False)

    def tag(self) -> bytes:
        """Return the tag in the configuration space."""
        return bytes(self.pci.device_config(at, 1) for at in range(36)).rstrip(b"\0")

    def _ask(self, request: bytes, data: bytes, room: int) -> bytes:
        opcode = int.from_bytes(request[4:8], "little")
        is_silent = opcode in _SILENT
        ram, queue = self._ram, self.queues[0 if is_silent else 1]
        ram[_REQUEST : _REQUEST + len(request)] = request
        ram[_DATA : _DATA + len(data)] = data
        buffers = [(_REQUEST, _SPLIT, False), (_REQUEST + _SPLIT, len(request) - _SPLIT, False)]
        if data:
            buffers.append((_DATA, len(data), False))
        if not is_silent:
            buffers += [(_ANSWER, 16, True), (_ROOM, max(room, 16), True)]
        queue.add(*buffers)
        self.pci.notify(0 if is_silent else 1)
        while not (used := queue.used()):
            assert self.pci.pin_rose()
            assert not self.pci.isr() & 2, "the device has failed"
        ((_, written),) = used
        if is_silent:
            assert written == 0
            return b""
        size, error, unique = struct.unpack_from("=IiQ", ram, _ANSWER)
        assert (size, unique) == (written, struct.unpack_from("=Q", request, 8)[0])
        if error:
            raise OSError(-error, os.strerror(-error))
        return bytes(ram[_ROOM : _ROOM + size - 16])


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
    with pytest.raises(SpecError, match=r".*") as err:
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
            if opcode in {abi.FUSE_INIT, abi.FUSE_DESTROY, *_SILENT}:
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
