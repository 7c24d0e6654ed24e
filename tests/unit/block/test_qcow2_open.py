"""Refusals when a qcow2 image is opened, by name; chains of bases; the feature bits."""

from __future__ import annotations

import errno
import os
import struct
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from vmm_kvm.block.image import Format, Layer, StoredImage
from vmm_kvm.errors import ImageError
from vmm_kvm.images.create import create_qcow2, create_raw
from vmm_kvm.images.opening import image_chain, open_image

MIB = 1 << 20


def patched(path: str, changes: dict[int, bytes]) -> None:
    """Overwrite parts of a file."""
    with Path(path).open("r+b") as file:
        for offset, data in changes.items():
            file.seek(offset)
            file.write(data)


def u32(value: int) -> bytes:
    """Return a 32-bit number in qcow2's byte order."""
    return value.to_bytes(4, "big")


def u64(value: int) -> bytes:
    """Return a 64-bit number in qcow2's byte order."""
    return value.to_bytes(8, "big")


def extension(kind: int, data: bytes) -> bytes:
    """Return a header extension."""
    return struct.pack(">II", kind, len(data)) + data.ljust(-(-len(data) // 8) * 8, b"\0")


def read(image: StoredImage, offset: int, size: int) -> bytes:
    """Read from an image."""
    data = bytearray(size)
    image.readv(offset, [memoryview(data)])
    return bytes(data)


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({0: b"QFI\0"}, "invalid magic numbers"),
        ({4: u32(1)}, "unknown qcow2 version 1, QCOW: use qemu-img convert -O qcow2"),
        ({4: u32(4)}, "unknown qcow2 version 4"),
        ({20: u32(8)}, "cluster size of 2^8 bytes: not 2^9 to 2^21"),
        ({20: u32(22)}, "cluster size of 2^22 bytes: not 2^9 to 2^21"),
        ({32: u32(1)}, "encrypted (AES): not supported"),
        ({32: u32(2)}, "encrypted (LUKS): not supported"),
        ({32: u32(9)}, "encrypted (method 9): not supported"),
        ({72: u64(4)}, "unsupported features 0x4 (external data file)"),
        ({72: u64(1 << 63)}, "unsupported features 0x8000000000000000 (bit 63)"),
        (
            {72: u64(0x44), 104: extension(0x6803F857, b"\0\6" + b"shiny".ljust(46, b"\0"))},
            "unsupported features 0x44 (external data file, shiny)",
        ),
        (
            {72: u64(0x40), 104: extension(0x6803F857, b"\0\6" + b"a\x1b[2J".ljust(46, b"\0"))},
            "unsupported features 0x40 (bit 6)",
        ),
        ({96: u32(7)}, "unsupported refcount size 2^7 bits"),
        ({100: u32(96)}, "header of 96 bytes"),
        ({100: u32(108)}, "header of 108 bytes"),
        ({100: u32(1 << 17)}, "header of 131072 bytes"),
        ({100: u32(112), 104: b"\1"}, "compression type contradicts the feature bits"),
        ({72: u64(8)}, "compression type contradicts the feature bits"),
        ({72: u64(8), 100: u32(112), 104: b"\7"}, "unsupported compression type 7"),
        ({72: u64(16), 20: u32(12)}, "extended L2 entries need clusters of 16 KiB or more"),
        ({36: u32((4 << 20) + 1)}, "L1 table too large"),
        ({36: u32(0)}, "L1 table too small for the disk"),
        ({24: u64(1 << 60)}, "L1 table too small for the disk"),
        ({40: u64(512)}, "L1 table at invalid offset 0x200"),
        ({40: u64(1 << 40)}, "unable to read qcow2 L1 table: past the end of the file"),
        ({48: u64(1 << 40)}, "refcount table past the end of the file"),
        ({48: u64(512)}, "refcount table at invalid offset 0x200"),
        ({56: u32(1 << 31)}, "refcount table too large"),
        ({56: u32(0)}, "no refcount table"),
        ({60: u32(65537)}, "snapshot table too large"),
        ({64: u64(512)}, "snapshot table at invalid offset 0x200"),
        ({8: u64(200), 16: u32(1024)}, "path of the base image too long"),
        ({8: u64(65535), 16: u32(10)}, "could not read path of the base image"),
        ({8: u64(200), 16: u32(10)}, "path of the base image has a null character"),
        ({104: u32(5) + u32(1 << 20)}, "header extension 0x5 too large"),
    ],
)
def test_refused(tmp_path: Path, changes: dict[int, bytes], error: str) -> None:
    """Each header that is wrong or not supported is refused in one line that says why."""
    path = str(tmp_path / "disk.qcow2")
    create_qcow2(path, 4 * MIB)
    patched(path, changes)
    with pytest.raises(ImageError) as caught:
        open_image(path, Format.QCOW2, False)
    assert str(caught.value) == f"{path}: {error}"


@pytest.mark.parametrize("size", [0, 3, 71])
def test_too_short(tmp_path: Path, size: int) -> None:
    """A file that is shorter than a header is refused."""
    path = tmp_path / "disk.qcow2"
    create_qcow2(str(path), MIB)
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(ImageError, match=r"disk.qcow2: short read on header"):
        open_image(str(path), Format.QCOW2, True)


def test_marked_as_corrupt(tmp_path: Path) -> None:
    """An image that is marked as corrupt can be read, not written."""
    path = str(tmp_path / "disk.qcow2")
    create_qcow2(path, MIB)
    patched(path, {72: u64(2)})
    with pytest.raises(ImageError, match="marked as corrupt: it can only be opened read-only"):
        open_image(path, Format.QCOW2, False)
    image = open_image(path, Format.QCOW2, True)
    assert read(image, 0, 4) == bytes(4)
    image.close()


def test_unknown_autoclear_features_are_cleared(tmp_path: Path) -> None:
    """A writer clears unknown autoclear features; a reader leaves them."""
    path = tmp_path / "disk.qcow2"
    create_qcow2(str(path), MIB)
    patched(str(path), {88: u64(0xF0)})
    open_image(str(path), Format.QCOW2, True).close()
    assert path.read_bytes()[88:96] == u64(0xF0)
    open_image(str(path), Format.QCOW2, False).close()
    assert path.read_bytes()[88:96] == u64(0)


@pytest.mark.parametrize(
    ("offset", "entry", "error"),
    [
        (65536, 0x8000000000050200, "L2 table 0 at invalid offset 0x50200"),
        (4 * 65536, 0x8000000000060200, "cluster at invalid offset 0x60200"),
    ],
)
@pytest.mark.parametrize("read_only", [False, True])
def test_corrupt_tables(
    tmp_path: Path, offset: int, entry: int, error: str, read_only: bool
) -> None:
    """A corrupt table causes EIO; a written image is then marked as corrupt, for good."""
    path = tmp_path / "disk.qcow2"
    create_qcow2(str(path), MIB)
    image = open_image(str(path), Format.QCOW2, False)
    image.writev(0, [memoryview(b"data")])
    image.close()
    patched(str(path), {offset: u64(entry)})
    image = open_image(str(path), Format.QCOW2, read_only)
    with pytest.raises(OSError, match=error) as caught:
        read(image, 0, 512)
    assert caught.value.errno == errno.EIO
    if not read_only:
        with pytest.raises(OSError, match="corrupt"):
            image.writev(MIB // 2, [memoryview(b"data")])
    image.close()
    assert path.read_bytes()[79] == (0 if read_only else 2)


def test_counts_that_would_overwrite_metadata(tmp_path: Path) -> None:
    """An allocation never yields a cluster with metadata, even if the counts say it is free."""
    path = tmp_path / "disk.qcow2"
    create_qcow2(str(path), MIB)
    patched(str(path), {3 * 65536: bytes(8)})
    before = path.read_bytes()
    image = open_image(str(path), Format.QCOW2, False)
    with pytest.raises(OSError, match="a cluster with metadata has no reference count"):
        image.writev(0, [memoryview(b"data")])
    image.close()
    after = bytearray(path.read_bytes())
    assert after[79] == 2
    after[79] = 0
    assert bytes(after) == before


@pytest.mark.usefixtures("qemu_img")
@pytest.mark.parametrize("snapshot", [False, True])
def test_an_image_that_was_not_closed(tmp_path: Path, snapshot: bool) -> None:
    """Counts that QEMU had deferred are repaired before anything is written."""
    path = tmp_path / "disk.qcow2"
    options = "lazy_refcounts=on,cluster_size=4096"
    subprocess.run(
        ["qemu-img", "create", "-q", "-f", "qcow2", "-o", options, path, "8M"], check=True
    )
    subprocess.run(["qemu-io", "-c", "write -P 1 0 64k", path], check=True, capture_output=True)
    if snapshot:
        subprocess.run(["qemu-img", "snapshot", "-c", "one", path], check=True)
    commands = ("-c", "write -P 5 32k 5M", "-c", "flush", "-c", "sigraise 9")
    subprocess.run(["qemu-io", *commands, path], check=False, capture_output=True)
    assert path.read_bytes()[79] == 1
    reader = open_image(str(path), Format.QCOW2, True)
    assert read(reader, 32768, 8) == b"\5" * 8
    reader.close()
    assert path.read_bytes()[79] == 1
    image = open_image(str(path), Format.QCOW2, False)
    image.writev(4096, [memoryview(b"new" * 2000)])
    image.close()
    assert path.read_bytes()[79] == 0
    subprocess.run(["qemu-img", "check", "-q", path], check=True)
    image = open_image(str(path), Format.QCOW2, True)
    assert read(image, 4094, 5) == b"\1\1new"
    assert read(image, 5 * MIB, 8) == b"\5" * 8
    image.close()


@pytest.mark.usefixtures("qemu_img")
def test_snapshots_survive(tmp_path: Path) -> None:
    """Writes after an internal snapshot do not change the snapshot."""
    path = tmp_path / "disk.qcow2"
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", path, "8M"], check=True)
    subprocess.run(["qemu-io", "-c", "write -P 1 0 4M", path], check=True, capture_output=True)
    subprocess.run(["qemu-img", "snapshot", "-c", "one", path], check=True)
    image = open_image(str(path), Format.QCOW2, False)
    image.writev(MIB + 5, [memoryview(b"\2" * MIB)])
    image.discard(3 * MIB, MIB)
    image.write_zeroes(0, 65536, may_unmap=False)
    image.close()
    subprocess.run(["qemu-img", "check", "-q", path], check=True)
    subprocess.run(["qemu-img", "snapshot", "-a", "one", path], check=True)
    image = open_image(str(path), Format.QCOW2, True)
    assert read(image, 0, 8 * MIB) == b"\1" * (4 * MIB) + bytes(4 * MIB)
    image.close()


def chain(directory: Path, names: list[str], link: Callable[[str], str]) -> str:
    """Make images, each on the one before, and write another byte to each."""
    for number, name in enumerate(names):
        path = str(directory / name)
        if number == 0:
            create_raw(path, 4 * MIB)
        else:
            create_qcow2(path, 4 * MIB, link(names[number - 1]))
            if number == 1:  # the base is raw: its format is 3 letters, not 5
                patched(path, {108: u32(3) + b"raw\0\0"})
        image = open_image(path, None, False)
        image.writev(number * 65536, [memoryview(bytes([number + 1]))])
        image.close()
    return str(directory / names[-1])


@pytest.mark.parametrize("is_relative", [False, True])
def test_a_chain_of_four(tmp_path: Path, is_relative: bool) -> None:
    """Four files are read as one disk; their paths may be relative to the overlay's directory."""
    names = ["a.raw", "b.qcow2", "c.qcow2", "d.qcow2"]
    top = chain(tmp_path, names, lambda name: name if is_relative else str(tmp_path / name))
    assert image_chain(top, None) == [
        Layer(str(tmp_path / name), Format.RAW if name == "a.raw" else Format.QCOW2)
        for name in reversed(names)
    ]
    image = open_image(top, Format.QCOW2, False)
    assert [read(image, at * 65536, 1)[0] for at in range(4)] == [1, 2, 3, 4]
    image.close()


def test_a_chain_of_five(tmp_path: Path) -> None:
    """A chain of five files is refused, and so is one that loops."""
    names = ["a.raw", "b.qcow2", "c.qcow2", "d.qcow2", "e.qcow2"]
    with pytest.raises(ImageError, match=r"e.qcow2: more than 3 base images"):
        chain(tmp_path, names, str)
    path = str(tmp_path / "loop.qcow2")
    create_qcow2(path, MIB, "loop.qcow2")
    with pytest.raises(ImageError, match=r"loop.qcow2: more than 3 base images"):
        open_image(path, Format.QCOW2, True)
    with pytest.raises(ImageError, match=r"loop.qcow2: more than 3 base images"):
        image_chain(path, None)


def test_bases_by_descriptor(tmp_path: Path) -> None:
    """Given descriptors, no path is opened; each of them is closed in any case."""
    made = tmp_path / "made"
    made.mkdir()
    chain(made, ["a.raw", "b.qcow2", "c.qcow2"], str)
    for name in ("a.raw", "b.qcow2", "c.qcow2"):
        (made / name).rename(tmp_path / f"x-{name}")
    top = str(tmp_path / "x-c.qcow2")
    layers = [
        Layer(os.open(tmp_path / "x-b.qcow2", os.O_RDONLY), Format.QCOW2),
        Layer(os.open(tmp_path / "x-a.raw", os.O_RDONLY), Format.RAW),
    ]
    image = open_image(os.open(top, os.O_RDWR), Format.QCOW2, False, name="disk0", bases=layers)
    assert [read(image, at * 65536, 1)[0] for at in range(3)] == [1, 2, 3]
    image.close()
    layers = [Layer(os.open(tmp_path / "x-b.qcow2", os.O_RDONLY), Format.QCOW2)]
    with pytest.raises(ImageError, match="its base image is missing"):
        open_image(os.open(top, os.O_RDWR), Format.QCOW2, False, bases=layers)
    layers = [Layer(os.open(tmp_path / "x-a.raw", os.O_RDONLY), Format.RAW) for _ in range(2)]
    with pytest.raises(ImageError, match="disk0: more base images than it refers to"):
        open_image(os.open(top, os.O_RDWR), Format.QCOW2, False, name="disk0", bases=layers)


@pytest.mark.parametrize(
    ("base", "error"),
    [
        ("gone.qcow2", "{0}/gone.qcow2: No such file or directory"),
        ("nbd://host/disk", "base image nbd://host/disk: not a path"),
        ('json:{"driver":"raw"}', 'base image json:{"driver":"raw"}: not a path'),
    ],
)
def test_a_base_that_cannot_be_opened(tmp_path: Path, base: str, error: str) -> None:
    """A base that is missing, or no file, is refused by name."""
    image, written = tmp_path / "disk.qcow2", "b" * len(base)
    create_qcow2(str(image), MIB, written)
    image.write_bytes(image.read_bytes().replace(written.encode(), base.encode(), 1))
    with pytest.raises(ImageError) as caught:
        open_image(str(image), Format.QCOW2, True)
    assert str(caught.value) == error.replace("{0}", str(tmp_path))


def test_the_format_of_a_base(tmp_path: Path) -> None:
    """A base has the format that its overlay names: it is not probed, and no other is allowed."""
    path = str(tmp_path / "disk.qcow2")
    create_qcow2(str(tmp_path / "base"), MIB)
    create_qcow2(path, MIB, "base")
    patched(path, {108: u32(3) + b"raw\0\0"})
    image = open_image(path, Format.QCOW2, True)
    assert read(image, 0, 4) == b"QFI\xfb"
    image.close()
    patched(path, {108: u32(4) + b"vmdk\0"})
    with pytest.raises(ImageError, match="/base: format vmdk is not supported"):
        open_image(path, Format.QCOW2, True)


def test_a_short_base(tmp_path: Path) -> None:
    """Past the end of a base an overlay reads as zero, also after its own first write there."""
    (tmp_path / "base").write_bytes(b"x" * 700)
    path = str(tmp_path / "disk.qcow2")
    create_qcow2(path, MIB, "base")
    patched(path, {108: u32(3) + b"raw\0\0"})
    image = open_image(path, Format.QCOW2, False)
    assert read(image, 698, 4) == b"xx\0\0"
    image.writev(1000, [memoryview(b"y")])
    assert read(image, 698, 4) == b"xx\0\0"
    assert read(image, 999, 3) == b"\0y\0"
    assert read(image, 0, 2) == b"xx"
    image.close()
