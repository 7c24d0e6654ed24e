"""Raw images: transfers, bounds, holes, and refusals."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from vmm_kvm.block.image import Format, Image, LastingError, Layer
from vmm_kvm.errors import ImageError
from vmm_kvm.images.opening import image_chain, open_image, probe


def read(image: Image, offset: int, size: int) -> bytes:
    """Read through two buffers of unequal length."""
    data = bytearray(b"?" * size)
    view = memoryview(data)
    image.readv(offset, [view[: size // 3], view[size // 3 :]])
    return bytes(data)


def write(image: Image, offset: int, data: bytes) -> None:
    """Write through two buffers of unequal length."""
    view = memoryview(data)
    image.writev(offset, [view[: len(data) // 3], view[len(data) // 3 :]])


@pytest.fixture
def path(tmp_path: Path) -> str:
    """Return the path of an image of 1 MiB, each byte the number of its KiB."""
    made = tmp_path / "disk.raw"
    made.write_bytes(b"".join(bytes([number % 256]) * 1024 for number in range(1024)))
    return str(made)


def test_transfers(path: str) -> None:
    """Written data are read back, in this opening and in the next."""
    image = open_image(path, Format.RAW, False)
    assert image.size == 1 << 20
    write(image, 1000, b"hello world")
    assert read(image, 990, 30) == bytes(10) + b"hello world" + bytes(9)
    image.flush()
    image.close()
    image.close()
    again = open_image(path, None, True)
    assert read(again, 1000, 11) == b"hello world"
    again.close()


def test_more_buffers_than_one_call_takes(path: str) -> None:
    """A request of thousands of buffers is transferred whole."""
    image = open_image(path, Format.RAW, False)
    data = bytearray(os.urandom(5000))
    image.writev(77, [memoryview(data)[at : at + 1] for at in range(5000)])
    back = bytearray(5000)
    image.readv(77, [memoryview(back)[at : at + 1] for at in range(5000)])
    assert data == back
    image.close()


def test_a_size_of_part_sectors(tmp_path: Path) -> None:
    """A partial last sector of the file belongs to the disk; its rest reads as zero."""
    path = tmp_path / "odd"
    path.write_bytes(b"x" * 700)
    image = open_image(str(path), Format.RAW, False)
    assert image.size == 1024
    assert read(image, 600, 1000) == b"x" * 100 + bytes(900)
    write(image, 1020, b"last")
    assert read(image, 1020, 8) == b"last" + bytes(4)
    image.close()


def test_what_others_append_is_not_the_disk(path: str) -> None:
    """A disk keeps the size that it had when it was opened."""
    image = open_image(path, Format.RAW, True)
    with Path(path).open("ab") as file:
        file.write(b"secret")
    assert read(image, (1 << 20) - 2, 8) == b"\xff\xff" + bytes(6)
    assert read(image, (1 << 20) + 2, 2) == bytes(2)
    image.close()


@pytest.mark.parametrize(
    ("change", "number"),
    [
        (lambda image: write(image, (1 << 20) - 2, b"four"), errno.EINVAL),
        (lambda image: image.discard(1 << 20, 512), errno.EINVAL),
        (lambda image: image.write_zeroes(0, (1 << 20) + 1, may_unmap=True), errno.EINVAL),
    ],
)
def test_beyond_the_end(path: str, change: Callable[[Image], None], number: int) -> None:
    """Nothing is written beyond the end of the disk."""
    image = open_image(path, Format.RAW, False)
    with pytest.raises(OSError, match="beyond the end") as caught:
        change(image)
    image.close()
    assert caught.value.errno == number
    assert Path(path).stat().st_size == 1 << 20


@pytest.mark.parametrize(
    "change",
    [
        lambda image: write(image, 0, b"four"),
        lambda image: image.discard(0, 512),
        lambda image: image.write_zeroes(0, 512, may_unmap=False),
    ],
)
def test_read_only(path: str, change: Callable[[Image], None]) -> None:
    """A read-only image is not written; its flush does nothing."""
    image = open_image(path, Format.RAW, True)
    with pytest.raises(OSError, match="Read-only") as caught:
        change(image)
    image.flush()
    image.close()
    assert caught.value.errno == errno.EROFS


@pytest.mark.parametrize("may_unmap", [True, False])
def test_zeroes(path: str, may_unmap: bool) -> None:
    """Zeroing clears exactly the requested range; unmapped zeros use no space."""
    image = open_image(path, Format.RAW, False)
    before = Path(path).stat().st_blocks
    image.write_zeroes(8192 + 100, 65536, may_unmap=may_unmap)
    assert read(image, 8192, 65536 + 200) == b"\x08" * 100 + bytes(65536) + b"\x48" * 100
    image.close()
    assert (Path(path).stat().st_blocks < before) is may_unmap


def test_discard_frees(path: str) -> None:
    """A discarded range uses no space."""
    image = open_image(path, Format.RAW, False)
    image.discard(0, 1 << 20)
    assert read(image, 0, 100) == bytes(100)
    image.close()
    assert Path(path).stat().st_blocks == 0


@pytest.mark.parametrize(
    ("name", "error"),
    [
        ("missing", "{}: No such file or directory"),
        (".", "{}: Is a directory"),
        ("fifo", "{}: neither a regular file nor a block device"),
    ],
)
def test_not_an_image(tmp_path: Path, name: str, error: str) -> None:
    """Anything but a file or block device is refused in one line, without waiting for a FIFO."""
    os.mkfifo(tmp_path / "fifo")
    path = f"{tmp_path}/{name}"
    with pytest.raises(ImageError) as caught:
        open_image(path, Format.RAW, False)
    assert str(caught.value) == error.format(path)


def test_a_descriptor_is_taken_over(path: str) -> None:
    """An image takes ownership of its descriptor, and closes it, also when it is refused."""
    descriptor = os.open(path, os.O_RDONLY)
    image = open_image(descriptor, Format.RAW, True, name="disk0")
    image.close()
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(descriptor)
    descriptor = os.open(path, os.O_RDONLY)
    with pytest.raises(ImageError, match="disk0: invalid magic numbers"):
        open_image(descriptor, Format.QCOW2, True, name="disk0")
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(descriptor)


def test_probe(path: str) -> None:
    """Four bytes tell qcow2; all else is raw. A given format is not questioned."""
    assert probe(b"QFI\xfb\0\0\0\3") is Format.QCOW2
    assert probe(b"QFI") is Format.RAW
    with Path(path).open("r+b") as file:
        file.write(b"QFI\xfb\0\0\0\3")
    image = open_image(path, Format.RAW, True)
    assert read(image, 0, 4) == b"QFI\xfb"
    image.close()
    assert image_chain(path, Format.RAW) == [Layer(path, Format.RAW)]


HEADERS = {
    "qcow2": b"QFI\xfb\0\0\0\3",
    "QED": b"QED\0",
    "VMDK": b"KDMV",
    "VMDK text": b"# Disk DescriptorFile\n\nversion=1\n",
    "VHDX": b"vhdxfile",
    "VHD": b"conectix",
    "VDI": bytes(0x40) + b"\x7f\x10\xda\xbe",
}


@pytest.mark.parametrize("header", HEADERS.values(), ids=HEADERS)
def test_a_probed_disk_stays_raw(path: str, header: bytes) -> None:
    """On a disk with a probed format a guest cannot write another format's header."""
    image = open_image(path, None, False)
    sector = header.ljust(512, b"x")
    before = read(image, 0, 2048)
    for data in (sector, sector + bytes(512)):
        with pytest.raises(LastingError, match="a disk of which nobody has said"):
            write(image, 0, data)
    write(image, 0, header[:2])
    with pytest.raises(LastingError):  # nor piece by piece
        write(image, 2, header[2:])
    write(image, 512, sector)
    assert read(image, 512, 512) == sector
    write(image, 0, before)
    assert read(image, 0, 2048) == before
    image.close()
    said = open_image(path, Format.RAW, False)
    write(said, 0, sector)
    assert read(said, 0, 512) == sector
    said.close()


def test_a_probed_disk_takes_a_large_write(path: str) -> None:
    """The first sector is copied and checked; the rest of the request is written with it."""
    image = open_image(path, None, False)
    data = os.urandom(3 * 4096)
    image.writev(0, [memoryview(data)[at : at + 100] for at in range(0, len(data), 100)])
    assert read(image, 0, len(data)) == data
    boot = b"\xfa" + bytes(509) + b"\x55\xaa"
    write(image, 0, boot)
    write(image, 0, b"LUKS\xba\xbe".ljust(512, b"\0"))
    image.close()
