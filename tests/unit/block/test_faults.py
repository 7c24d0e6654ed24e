"""Faults of the host's disk: the user sees them, and the image stays sound and usable."""

from __future__ import annotations

import errno
import os
import random
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.unit.block.crash import History, checked, contents
from tests.unit.block.test_crash import LENGTHS, SEED, SIZE, make
from vmm_kvm.block.file import HostFile
from vmm_kvm.block.image import Format
from vmm_kvm.block.qcow2.header import read_header
from vmm_kvm.block.qcow2.image import Qcow2Image
from vmm_kvm.images.opening import open_image

COUNT = max(int(os.environ.get("VMM_FUZZ_COUNT", "0")) // 10, 12)


class FaultyFile(HostFile):
    """A file on a disk that is full, or fails to read, while a test wants it to."""

    __slots__ = ("chance", "is_full", "is_unreadable", "share")

    def __init__(self, path: str, chance: random.Random) -> None:
        """Open the file at `path`, without faults."""
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        super().__init__(descriptor, path, is_read_only=False)
        self.chance = chance
        self.share = 1.0
        self.is_full = self.is_unreadable = False

    def _fails(self) -> bool:
        return self.chance.random() < self.share

    def writev(self, offset: int, buffers: Sequence[memoryview]) -> None:
        """Write, or write a part and fail."""
        if self.is_full and self._fails():
            data = memoryview(b"".join(buffers))
            part = self.chance.randrange(len(data) + 1) // 512 * 512
            super().writev(offset, [data[:part]])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        super().writev(offset, buffers)

    def reserve(self, offset: int, size: int) -> None:
        """Reserve, or fail."""
        if self.is_full and self._fails():
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        super().reserve(offset, size)

    def readv(self, offset: int, buffers: Sequence[memoryview]) -> None:
        """Read, or fail."""
        if self.is_unreadable and self._fails():
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        super().readv(offset, buffers)


def open_faulty(
    path: str, base: str | None, chance: random.Random
) -> tuple[FaultyFile, Qcow2Image]:
    """Open an image on a disk that a test can make fail."""
    file = FaultyFile(path, chance)
    lower = open_image(base, Format.RAW, True) if base else None
    return file, Qcow2Image(file, read_header(file), lower)


@pytest.mark.usefixtures("qemu_img")
@pytest.mark.parametrize("seed", range(SEED, SEED + COUNT))
def test_faults_at_random(seed: int, tmp_path: Path) -> None:
    """After a fault the disk holds old or new data; with room again it works, without leaks."""
    chance = random.Random(seed)
    path, base = make(tmp_path, chance)
    history = History(contents(path, base))
    base_path = None
    if base is not None:
        base.close()
        base_path = str(tmp_path / "base.raw")
    file, image = open_faulty(path, base_path, chance)
    faults: set[int | None] = set()
    for _ in range(40):
        file.is_full, file.is_unreadable = chance.random() < 0.3, chance.random() < 0.1
        file.share = chance.choice((0.2, 0.5, 1.0))
        offset = chance.randrange(SIZE // 512) * 512
        size = min(chance.choice(LENGTHS), SIZE - offset)
        data = chance.randbytes(size)
        what = chance.choice(("write", "write", "write", "zero", "unmap", "discard", "flush"))
        try:
            match what:
                case "write":
                    history.write(offset, data)
                    image.writev(offset, [memoryview(data)])
                case "zero" | "unmap":
                    history.write(offset, bytes(size))
                    image.write_zeroes(offset, size, may_unmap=what == "unmap")
                case "discard":
                    history.write(offset, bytes(size))
                    image.discard(offset, size)
                case _:
                    image.flush()
        except OSError as err:
            faults.add(err.errno)
        file.is_full = file.is_unreadable = False
        disk = bytearray(SIZE)
        image.readv(0, [memoryview(disk)])
        assert history.lost(bytes(disk)) == []
        history = History(bytes(disk))  # these contents stay until the next change
    image.flush()
    image.close()
    assert faults <= {errno.ENOSPC, errno.EIO}
    assert faults
    report = checked(path)
    assert (report.errors, report.leaked_clusters) == ((), 0)
    lower = open_image(base_path, Format.RAW, True) if base_path else None
    assert history.lost(contents(path, lower)) == []
    if lower:
        lower.close()


def test_a_lost_flush_stays_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once data may be lost no flush succeeds any more, even if the kernel reports success."""
    path = tmp_path / "disk.raw"
    path.write_bytes(bytes(4096))
    image = open_image(str(path), Format.RAW, False)

    def fail(_: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as patched:
        patched.setattr(os, "fdatasync", fail)
        with pytest.raises(OSError, match="Input/output error"):
            image.flush()
    with pytest.raises(OSError, match="an earlier flush failed"):
        image.flush()
    image.writev(0, [memoryview(b"on")])
    image.close()
    assert path.read_bytes()[:2] == b"on"
