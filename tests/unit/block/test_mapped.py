"""Raw images as memory."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from vmm_kvm.bits import MIB
from vmm_kvm.block.image import Format
from vmm_kvm.block.mapped import MappedImage
from vmm_kvm.errors import ImageError
from vmm_kvm.images.opening import open_image

SIZE = 2 * MIB


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    """An image of one piece."""
    path = tmp_path / "disk.img"
    path.write_bytes(b"before" + bytes(SIZE - 6))
    return path


def test_writes_reach_the_file(disk: Path) -> None:
    """The mapping is the file, in both directions."""
    with MappedImage(str(disk)) as image:
        assert image.size == len(image.view) == SIZE
        assert bytes(image.view[:6]) == b"before"
        image.view[:6] = b"behind"
        image.flush()
        image.close()
    assert disk.read_bytes()[:6] == b"behind"


def test_private_writes_vanish(disk: Path) -> None:
    """A private mapping never changes the file, and needs no write permission."""
    disk.chmod(0o400)
    with MappedImage(str(disk), is_private=True) as image:
        image.view[:6] = b"behind"
        image.flush()
        assert bytes(image.view[:6]) == b"behind"
    assert disk.read_bytes()[:6] == b"before"


def test_one_writer(disk: Path) -> None:
    """A shared mapping is a writer, private ones are readers, and locks tell them apart."""
    with MappedImage(str(disk)), pytest.raises(ImageError, match=r"in use|writes to it"):
        open_image(str(disk), Format.RAW, read_only=False)
    with MappedImage(str(disk), is_private=True), MappedImage(str(disk), is_private=True):
        pass


@pytest.mark.parametrize("size", [0, 512, SIZE + 4096])
def test_sizes_that_are_refused(tmp_path: Path, size: int) -> None:
    """Linux takes memory in units of 2 MiB: other sizes are refused."""
    path = tmp_path / "disk.img"
    path.write_bytes(bytes(size))
    with pytest.raises(ImageError) as caught:
        MappedImage(str(path))
    assert str(caught.value) == f"{path}: {size} bytes, not a multiple of 2 MiB"


def test_files_that_are_refused(tmp_path: Path) -> None:
    """A missing file is refused, and so is a directory or device."""
    with pytest.raises(ImageError, match=r"missing: No such file or directory$"):
        MappedImage(str(tmp_path / "missing"))
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(ImageError, match=r"fifo: not a regular file$"):
        MappedImage(str(tmp_path / "fifo"))
