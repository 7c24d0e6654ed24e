"""Costs of images: system calls and space, and errors without space."""

from __future__ import annotations

import errno
import os
import subprocess
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from tests.unit.block.crash import checked
from vmm_kvm.block.file import HostFile
from vmm_kvm.block.image import Format
from vmm_kvm.block.qcow2.header import read_header
from vmm_kvm.block.qcow2.image import Qcow2Image
from vmm_kvm.images.create import create_qcow2
from vmm_kvm.images.opening import open_image

MIB = 1 << 20
CLUSTER = 65536


class CountingFile(HostFile):
    """A file that counts its calls."""

    __slots__ = ("calls",)

    def __init__(self, path: str) -> None:
        """Open the file at `path`."""
        super().__init__(os.open(path, os.O_RDWR | os.O_CLOEXEC), path, is_read_only=False)
        self.calls: Counter[str] = Counter()

    def readv(self, offset: int, buffers: Sequence[memoryview]) -> None:
        """Count a read."""
        self.calls["read"] += 1
        super().readv(offset, buffers)

    def writev(self, offset: int, buffers: Sequence[memoryview]) -> None:
        """Count a write."""
        self.calls["write"] += 1
        super().writev(offset, buffers)

    def sync(self) -> None:
        """Count a sync that has something to do."""
        self.calls["sync"] += self._is_written
        super().sync()

    def since(self) -> dict[str, int]:
        """Return the counts since the last call."""
        found = dict(self.calls)
        self.calls.clear()
        return found


@pytest.fixture
def counted(tmp_path: Path) -> Iterator[tuple[CountingFile, Qcow2Image]]:
    """Open an empty image of 1 GiB that counts its system calls."""
    path = str(tmp_path / "disk.qcow2")
    create_qcow2(path, 1 << 30)
    file = CountingFile(path)
    image = Qcow2Image(file, read_header(file), None)
    image.flush()
    file.since()
    yield file, image
    image.close()
    report = checked(path)
    assert (report.errors, report.leaked_clusters) == ((), 0)


def test_sequential_transfers(counted: tuple[CountingFile, Qcow2Image]) -> None:
    """A large request is one system call, to new clusters or old, in one piece or many."""
    file, image = counted
    data = memoryview(bytearray(MIB))
    image.writev(0, [data])
    file.since()  # the first has read a refcount block
    for start in range(MIB, 16 * MIB, MIB):
        image.writev(start, [data])
    assert file.since() == {"write": 15}
    image.writev(0, [data[at : at + 4096] for at in range(0, MIB, 4096)])
    assert file.since() == {"write": 1}
    image.readv(5 * MIB, [data])
    image.readv(5 * MIB + 1000, [data[:70000]])
    assert file.since() == {"read": 2}


def test_small_writes(counted: tuple[CountingFile, Qcow2Image]) -> None:
    """A small write to a new cluster at the end of the file writes only its data."""
    file, image = counted
    image.writev(0, [memoryview(b"x" * 512)])
    file.since()
    image.writev(5 * CLUSTER + 8192, [memoryview(b"x" * 512)])
    image.writev(5 * CLUSTER + 1024, [memoryview(b"x" * 512)])
    assert file.since() == {"write": 2}
    assert os.fstat(file.fd).st_blocks * 512 < 8 * CLUSTER


def test_flushes(counted: tuple[CountingFile, Qcow2Image]) -> None:
    """A flush makes only pending changes durable, in as few steps as their order allows."""
    file, image = counted
    image.flush()
    assert file.since() == {"sync": 0}
    image.writev(0, [memoryview(b"x" * CLUSTER)])
    file.since()
    image.flush()  # counts; a new table; its L1 entry
    assert file.since() == {"write": 3, "sync": 2}
    image.writev(0, [memoryview(b"y" * CLUSTER)])
    image.flush()
    assert file.since() == {"write": 1, "sync": 1}
    for cluster in range(1, 1000):
        image.writev(cluster * CLUSTER, [memoryview(b"x" * 512)])
    file.since()
    image.flush()  # counts; entries of the table
    assert file.since() == {"write": 2, "sync": 2}


def test_discard_frees_and_the_space_is_used_anew(tmp_path: Path) -> None:
    """Discarded clusters go back to the file system, and later writes use them again."""
    path = tmp_path / "disk.qcow2"
    create_qcow2(str(path), 1 << 30)
    image = open_image(str(path), Format.QCOW2, False)
    data = memoryview(b"x" * (16 * MIB))
    image.writev(0, [data])
    image.flush()
    size = path.stat().st_size
    image.discard(0, 16 * MIB)
    image.flush()
    assert path.stat().st_blocks * 512 < MIB
    image.writev(512 * MIB, [data])
    image.close()
    assert path.stat().st_size <= size + 2 * CLUSTER
    report = checked(str(path))
    assert (report.errors, report.leaked_clusters) == ((), 0)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """Mount a file system with room for 8 MiB."""
    path = tmp_path / "small"
    path.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8M", "none", path], check=True)
    try:
        yield path
    finally:
        subprocess.run(["umount", "-l", path], check=True)


@pytest.mark.root
def test_a_full_disk(small_disk: Path) -> None:
    """On a full disk writes fail and nothing is lost; with room again writes succeed."""
    ballast = small_disk / "ballast"
    ballast.write_bytes(bytes(4 * MIB))
    path = small_disk / "disk.qcow2"
    create_qcow2(str(path), 64 * MIB)
    image = open_image(str(path), Format.QCOW2, False)
    written = []
    for number in range(64):
        try:
            image.writev(number * MIB, [memoryview(bytes([number + 1]) * MIB)])
        except OSError as err:
            failure = err.errno
            break
        written.append(number)
    assert failure == errno.ENOSPC
    assert 2 <= len(written) <= 4
    ballast.unlink()
    image.flush()
    image.writev(40 * MIB, [memoryview(b"on" * 1000)])
    image.discard(0, MIB)
    image.flush()
    found = bytearray(MIB)
    for number in written[1:]:
        image.readv(number * MIB, [memoryview(found)])
        assert found == bytes([number + 1]) * MIB
    image.close()
    report = checked(str(path))
    assert (report.errors, report.leaked_clusters) == ((), 0)


@pytest.mark.root
def test_discard_makes_room_on_a_full_disk(small_disk: Path) -> None:
    """A write on a full disk uses space that the guest has discarded, even before a flush."""
    path = small_disk / "disk.qcow2"
    create_qcow2(str(path), 64 * MIB)
    image = open_image(str(path), Format.QCOW2, False)
    for number in range(6):
        image.writev(number * MIB, [memoryview(b"x" * MIB)])
    image.discard(0, 4 * MIB)
    for number in range(20, 24):
        image.writev(number * MIB, [memoryview(b"y" * MIB)])
    image.close()
    report = checked(str(path))
    assert (report.errors, report.leaked_clusters) == ((), 0)
