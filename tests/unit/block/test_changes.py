"""Copying a disk while it changes."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from vmm_kvm.block.changes import BLOCK, PIECE, Change, ChangeLog, LoggedImage
from vmm_kvm.block.image import Format, StoredImage
from vmm_kvm.images.create import create_image
from vmm_kvm.images.opening import open_image

SIZE = 5 * PIECE + 512


def opened(path: Path, kind: Format, size: int = SIZE) -> StoredImage:
    """Make an image, and open it."""
    create_image(str(path), kind, size)
    return open_image(str(path), kind, False)


def contents(image: StoredImage) -> bytes:
    """Return all of an image."""
    data = bytearray(image.size)
    image.readv(0, [memoryview(data)])
    return bytes(data)


def copy_next(log: ChangeLog, source: StoredImage, target: StoredImage) -> Change:
    """Copy the next change, as a receiver of it does."""
    change = log.take(source)
    if change.is_zero:
        target.write_zeroes(change.start, change.size, may_unmap=True)
    elif change.size:
        data = bytearray(change.size)
        source.readv(change.start, [memoryview(data)])
        target.writev(change.start, [memoryview(data)])
    return change


@pytest.mark.parametrize("kind", list(Format))
def test_a_copy_is_equal_whatever_happens(tmp_path: Path, kind: Format) -> None:
    """Writes, zeroes and discards between any two pieces end up in the copy."""
    chance = random.Random(7)
    source, target = opened(tmp_path / "a", kind), opened(tmp_path / "b", kind)
    source.writev(PIECE, [memoryview(chance.randbytes(2 * PIECE))])
    log = ChangeLog(source.size)
    guest = LoggedImage(source, log)
    for _ in range(200):
        offset = chance.randrange(SIZE // 512) * 512
        length = min(chance.choice([512, 4096, 3 * BLOCK]), SIZE - offset)
        match chance.randrange(3):
            case 0:
                guest.writev(offset, [memoryview(chance.randbytes(length))])
            case 1:
                guest.write_zeroes(offset, length, may_unmap=True)
            case _:
                guest.discard(offset, length)
        copy_next(log, source, target)
    left = copy_next(log, source, target)
    while left.size:
        left = copy_next(log, source, target)
    assert left == Change(0, 0, 0, 0)
    assert contents(target) == contents(source)
    for image in (source, target):
        image.close()


def test_only_what_has_changed_is_copied_again(tmp_path: Path) -> None:
    """After a first copy, a write of one byte's sector costs one block."""
    source = opened(tmp_path / "a", Format.RAW, 4 * PIECE)
    log = ChangeLog(source.size)
    assert log.take(source) == Change(0, 4 * PIECE, True, 0)  # all zeros at once
    guest = LoggedImage(source, log)
    guest.writev(3 * BLOCK + 512, [memoryview(b"x" * 512)])
    guest.writev(3 * BLOCK, [memoryview(b"y" * 512)])
    guest.writev(PIECE - 512, [memoryview(b"z" * 1024)])
    assert log.take(source) == Change(3 * BLOCK, BLOCK, False, 2 * BLOCK)
    assert log.take(source) == Change(PIECE - BLOCK, 2 * BLOCK, False, 0)
    assert log.take(source).size == 0
    source.close()


def test_a_large_disk_needs_little_memory(tmp_path: Path) -> None:
    """The marks of 64 TiB fit into 16 MiB; the end of the disk is inside of the last block."""
    size = (64 << 40) - 512
    source = opened(tmp_path / "a", Format.QCOW2, size)
    log = ChangeLog(size)
    for at in range(0, size, 1 << 40):
        log.mark(at, 1)
    first = log.take(source)
    assert (first.start, first.is_zero) == (0, True)
    assert first.size <= 1 << 30
    log.mark(size - 512, 512)
    source.close()
