"""A part of a file as a raw image."""

from __future__ import annotations

import os
from pathlib import Path

from vmm_kvm.block.image import Format, Layer, StoredImage
from vmm_kvm.images.create import open_overlay
from vmm_kvm.images.opening import open_image

START, SIZE = 3 << 20, 1 << 20


def read(image: StoredImage, offset: int, size: int) -> bytes:
    """Read a range."""
    data = bytearray(size)
    image.readv(offset, [memoryview(data)])
    return bytes(data)


def make(path: Path) -> Path:
    """Make a file with something before, in and behind the part."""
    with path.open("wb") as file:
        file.write(b"before" * 100_000)
        file.truncate(START + SIZE + 4096)
        file.seek(START + 4096)
        file.write(b"inside")
        file.seek(START + SIZE)
        file.write(b"behind")
    return path


def test_a_part_is_a_disk(tmp_path: Path) -> None:
    """A window has the size of its part, and nothing of the file around it."""
    fd = os.open(make(tmp_path / "file"), os.O_RDONLY)
    image = open_image(fd, Format.RAW, True, window=(START, SIZE))
    try:
        assert (image.size, image.is_read_only) == (SIZE, True)
        assert read(image, 0, SIZE) == bytes(4096) + b"inside" + bytes(SIZE - 4096 - 6)
        assert read(image, SIZE - 512, 1024) == bytes(1024)
        assert image.reads_zero(SIZE - 4096, 4096)
        assert not image.reads_zero(4096, 4096)
    finally:
        image.close()


def test_what_is_written_over_a_part_leaves_the_file(tmp_path: Path) -> None:
    """An overlay reads the part, and keeps its own writes."""
    path = make(tmp_path / "file")
    before = path.read_bytes()
    scratch = os.open(tmp_path / "scratch", os.O_RDWR | os.O_CREAT)
    base = Layer(os.open(path, os.O_RDONLY), Format.RAW, (START, SIZE))
    image = open_overlay(scratch, [base], "disk")
    try:
        assert image.size == SIZE
        image.writev(0, [memoryview(b"x" * 512)])
        assert read(image, 0, 513) == b"x" * 512 + b"\0"
        assert read(image, 4096, 6) == b"inside"
    finally:
        image.close()
    assert path.read_bytes() == before
