"""A machine in a file, from which it can be started any number of times.

    header | manifest | state | zeros up to a multiple of 2 MiB | RAM | disks

RAM lies in the file as in memory, its zeros are holes, and it begins where a huge page can, so that
it can be mapped. The header has the sha256 of manifest and state; RAM has none: computing it would
take longer than the rest of a start from the file. Disks lie in it as the guest reads them, each at
a multiple of 2 MiB, with holes for zeros.

The file has its name only when it is complete, and is its owner's alone: it holds all of a guest's
secrets.
"""

import hashlib
import os
import stat
import struct
from collections.abc import Callable, Iterator, Sequence
from errno import ENXIO
from typing import NamedTuple, Self

from vmm_kvm.bits import MIB, align_up
from vmm_kvm.errors import SnapshotError
from vmm_kvm.new_file import NewFile
from vmm_kvm.snapshot import manifest as manifests
from vmm_kvm.snapshot.fds import check_kind
from vmm_kvm.snapshot.manifest import MANIFEST_MAX, STATE_MAX, Manifest
from vmm_kvm.snapshot.ram import Ram, copy_in, runs
from vmm_kvm.snapshot.stream import check_magic

MAGIC = b"VMMKVM\0F"
MEMORY_ALIGNMENT = 2 * MIB
_HEAD = struct.Struct("<8sIIQQQ32s")


def write_file(path: str, manifest: Manifest, state: bytes, ram: Ram) -> None:
    """Write a paused machine into a new file.

    Raises:
        SnapshotError: the machine cannot be described.
        OSError: there is such a file, or it cannot be written: nothing is left of it then.
    """
    with NewFile(path) as new:
        layout = Layout.of(len(state), manifest.memory_size)
        write_into(FileWriter(new.fd, manifest, layout), state, ram)
        new.publish()


def empty_file(fd: int) -> None:
    """Empty a file for a snapshot, before anything is written there; it stays the caller's.

    Raises:
        SnapshotError: it is no regular file, or not open for writing.
        OSError: it is closed, or cannot be written.
    """
    if not stat.S_ISREG(check_kind(fd, os.O_WRONLY)):
        raise SnapshotError("not a file: a snapshot is read from any place of it")
    os.ftruncate(fd, 0)


class Layout(NamedTuple):
    """The places of a file's parts, in bytes."""

    ram: int
    disks: tuple[int, ...]
    size: int

    @classmethod
    def of(cls, state_room: int, ram_size: int, disk_sizes: Sequence[int] = ()) -> "Layout":
        """Return it for a state of at most `state_room` bytes, and disks of these sizes."""
        ram = align_up(_HEAD.size + MANIFEST_MAX + state_room, MEMORY_ALIGNMENT)
        end, disks = ram + ram_size, []
        for size in disk_sizes:
            disks.append(align_up(end, MEMORY_ALIGNMENT))
            end = disks[-1] + size
        return cls(ram, tuple(disks), end)


class FileWriter:
    """Writes a machine into an open file, in any order and more than once; see `precopy`.

    The header comes last: until then it is no snapshot.
    """

    def __init__(
        self,
        fd: int,
        manifest: Manifest,
        layout: Layout,
        is_cancelled: Callable[[], bool] = lambda: False,
        on_run: Callable[[int], None] = lambda _end: None,
    ) -> None:
        """Begin with a file that is empty, or has nothing but disks; it stays the caller's.

        Args:
            fd: of the file.
            manifest: of the machine; the size of its state is filled in.
            layout: of the file.
            is_cancelled: is asked now and then.
            on_run: is told the end of each run in RAM, in bytes, once that is written.

        Raises:
            OSError: it cannot be written.
        """
        self._fd = fd
        self._manifest = manifest
        self._is_cancelled, self._on_run = is_cancelled, on_run
        self._start = layout.ram
        self.written = 0
        """Bytes."""
        os.ftruncate(fd, layout.size)

    def write_run(self, offset: int, data: bytes) -> None:
        """Write the present RAM at `offset`.

        Raises:
            SnapshotError: it was cancelled.
            OSError: it cannot be written; the file is useless then.
        """
        if self._is_cancelled():
            raise SnapshotError("it was cancelled")
        _write(self._fd, data, self._start + offset)
        self.written += len(data)
        self._on_run(offset + len(data))

    def finish(self, state: bytes) -> None:
        """Write the state, and say that all is complete.

        Raises:
            SnapshotError: the machine cannot be described, or its state is too large.
            OSError: as `write_run`.
        """
        text = manifests.encode(self._manifest._replace(state_size=len(state)))
        if _HEAD.size + len(text) + len(state) > self._start:
            raise SnapshotError(f"state: {len(state)} bytes: more than there is room for")
        digest = hashlib.sha256(text + state).digest()
        size = self._manifest.memory_size
        head = _HEAD.pack(MAGIC, len(text), 0, len(state), self._start, size, digest)
        _write(self._fd, head + text + state, 0)


def write_into(writer: FileWriter, state: bytes, ram: Ram) -> None:
    """Write a paused machine.

    Raises:
        SnapshotError, OSError: of `writer`.
    """
    for offset, data in runs(ram):
        writer.write_run(offset, data)
    writer.finish(state)


def _write(fd: int, data: bytes, offset: int) -> None:
    view = memoryview(data)
    while view:
        count = os.pwrite(fd, view, offset)
        view, offset = view[count:], offset + count


class SnapshotFile:
    """A file that is open; a context manager that closes it."""

    def __init__(self, fd: int) -> None:
        """Take ownership of `fd`, and read everything but RAM.

        Raises:
            SnapshotError: it is no such file, or damaged.
            OSError: it cannot be read.
        """
        self._fd = fd
        try:
            self._read()
        except BaseException:
            self.close()
            raise

    def _read(self) -> None:
        size = os.fstat(self._fd).st_size
        head = os.pread(self._fd, _HEAD.size, 0)
        check_magic(head[: len(MAGIC)], MAGIC)
        if len(head) < _HEAD.size:
            raise SnapshotError("header: the file ends too early")
        _, text_size, flags, state_size, start, ram_size, digest = _HEAD.unpack(head)
        if flags or text_size > MANIFEST_MAX or state_size > STATE_MAX or start % MEMORY_ALIGNMENT:
            raise SnapshotError("header: out of range")
        if _HEAD.size + text_size + state_size > start or start + ram_size > size:
            raise SnapshotError("header: the file ends too early")
        text = self._pread(text_size, _HEAD.size)
        self.state = self._pread(state_size, _HEAD.size + text_size)
        """Of devices and vCPUs; what `state.decode` reads."""
        if hashlib.sha256(text + self.state).digest() != digest:
            raise SnapshotError("the checksum is wrong: the file is damaged")
        self.text = text
        """Of the manifest."""
        self.manifest = manifests.decode(text)
        if (self.manifest.state_size, self.manifest.memory_size) != (state_size, ram_size):
            raise SnapshotError("header: manifest of another size")
        self._start, self._end = start, start + ram_size

    def _pread(self, size: int, offset: int) -> bytes:
        data = os.pread(self._fd, size, offset)
        if len(data) != size:
            raise SnapshotError("header: the file ends too early")
        return data

    @property
    def mapped(self) -> tuple[int, int]:
        """The source of a mapping of RAM: the descriptor, and RAM's offset in the file."""
        return self._fd, self._start

    def close(self) -> None:
        """Close the file; idempotent."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def read_ram(self, ram: Ram) -> None:
        """Read RAM, a memfd that is all zeros, from the file.

        Raises:
            SnapshotError: the file has become shorter.
            OSError: it cannot be read.
        """
        for start, end in self._extents():
            copy_in(self._fd, start, ram, start - self._start, end - start)
        if os.fstat(self._fd).st_size < self._end:  # missing pages would be zeros
            raise SnapshotError("memory: the file ends too early")

    def _extents(self) -> Iterator[tuple[int, int]]:
        """Yield where the file has data of RAM."""
        start = self._start
        while start < self._end:
            try:
                data = os.lseek(self._fd, start, os.SEEK_DATA)
            except OSError as err:
                if err.errno != ENXIO:
                    raise
                return
            if data >= self._end:
                return
            start = min(os.lseek(self._fd, data, os.SEEK_HOLE), self._end)
            yield data, start
