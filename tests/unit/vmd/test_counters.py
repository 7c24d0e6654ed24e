"""Counters of a device: two processes see the same numbers, and transfers are counted."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from vmd.shared.counters import CountedImage, Counters, make_counters
from vmm_kvm.block.image import Format
from vmm_kvm.images.opening import open_image

SIZE = 1 << 16


def test_what_an_image_moves_is_counted(tmp_path: Path) -> None:
    """Failed transfers do not count; every process with the memory reads the same numbers."""
    path = tmp_path / "image"
    path.write_bytes(bytes(SIZE))
    fd = make_counters()
    seen = Counters(os.dup(fd))
    image = CountedImage(open_image(str(path), Format.RAW, read_only=False), Counters(fd))
    image.writev(512, [memoryview(b"a" * 512), memoryview(b"b" * 1024)])
    image.readv(0, [memoryview(bytearray(512))])
    with pytest.raises(OSError, match="beyond the end"):
        image.writev(SIZE, [memoryview(bytes(512))])
    image.flush()
    image.close()
    assert (seen.read, seen.written) == (512, 1536)
    assert path.read_bytes()[512:1024] == b"a" * 512


def test_nobody_cuts_the_memory_off() -> None:
    """A hostile process cannot truncate the memory and so end the one that reads it."""
    fd = make_counters()
    with pytest.raises(PermissionError):
        os.ftruncate(fd, 0)
    os.close(fd)
