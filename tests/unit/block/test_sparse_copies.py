"""Copies of huge disks with little in them: the time is that of the data, not of the holes."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from vmctl.line.cli import main
from vmm_kvm.block.image import Format
from vmm_kvm.images.opening import open_image

MIB, GIB, TIB = 1 << 20, 1 << 30, 1 << 40
PIECES = (0, MIB + 4096, 3 * GIB - 512)
"""Where the disks have data."""

pytestmark = [pytest.mark.usefixtures("qemu_img"), pytest.mark.timeout(40)]


@pytest.fixture(autouse=True)
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Work in an empty directory."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def qemu_img(*words: str) -> None:
    """Run qemu-img; it has to succeed."""
    subprocess.run(["qemu-img", *words], check=True, capture_output=True)


def write(path: str, disk_format: Format, offset: int, data: bytes) -> None:
    """Write to an image."""
    image = open_image(path, disk_format, False)
    image.writev(offset, [memoryview(data)])
    image.close()


QCOW2 = {
    "empty": "8T",
    "cluster_size=512": "4G",
    "cluster_size=4k": "256G",
    "cluster_size=2M": "8T",
    "extended_l2=on,cluster_size=128k": "8T",
    "compat=0.10": "8T",
    "preallocation=metadata": "32G",
    "preallocation=metadata,extended_l2=on": "8G",
    "compression_type=zstd": "8T",
}


@pytest.mark.parametrize("target", list(Format))
@pytest.mark.parametrize("options", QCOW2)
def test_qcow2_images(options: str, target: Format) -> None:
    """A qcow2 image of any kind is copied from data to data, also where clusters are allocated."""
    chosen = [] if options == "empty" else ["-o", options]
    qemu_img("create", "-q", "-f", "qcow2", *chosen, "disk", QCOW2[options])
    for at in PIECES:
        write("disk", Format.QCOW2, at, b"data")
    assert main(["create", "-i", "qcow2:disk", f"{target}:copy"]) == 0
    assert Path("copy").stat().st_blocks < 16 * MIB // 512
    image = open_image("copy", target, True)
    try:
        for at in PIECES:
            data = bytearray(8)
            image.readv(at, [memoryview(data)])
            assert bytes(data) == b"data\0\0\0\0"
    finally:
        image.close()


@pytest.mark.parametrize("target", list(Format))
def test_scattered_blocks(target: Format) -> None:
    """A thousand blocks in 8 TiB cost what a thousand blocks cost; nothing is lost or moved."""
    with Path("disk").open("wb") as file:
        file.truncate(8 * TIB)
        for index in range(1000):
            os.pwrite(file.fileno(), b"%04d" % index, index * (8 * GIB + 4096) + 512)
    assert main(["create", "-i", "raw:disk", f"{target}:copy"]) == 0
    qemu_img("compare", "-f", "raw", "-F", target, "disk", "copy")


@pytest.mark.parametrize("base_format", list(Format))
def test_an_overlay(base_format: Format) -> None:
    """The holes of an overlay are those of its base, and zeros behind its end."""
    qemu_img("create", "-q", "-f", base_format, "base", "2T")
    write("base", base_format, TIB + 5, b"base")
    write("base", base_format, 2 * TIB - 4, b"last")
    assert main(["create", "-b", f"{base_format}:base", "-s", "4T", "top.qcow2"]) == 0
    write("top.qcow2", Format.QCOW2, TIB, b"over")
    image = open_image("top.qcow2", Format.QCOW2, False)
    image.write_zeroes(2 * TIB - MIB, MIB, may_unmap=True)
    image.close()
    assert main(["create", "-i", "top.qcow2", "copy.img"]) == 0
    qemu_img("compare", "-f", "qcow2", "-F", "raw", "top.qcow2", "copy.img")


@pytest.mark.parametrize("size", [512, MIB - 512, 3 * MIB + 1, 64 * MIB])
def test_data_and_holes_in_turn(size: int) -> None:
    """Small pieces of data with small holes between arrive whole, at any size of the disk."""
    data = bytearray(size)
    for at in range(0, size, 12288):
        data[at : at + 4096] = bytes([at // 12288 % 255 + 1]) * len(data[at : at + 4096])
    with Path("disk").open("wb") as file:
        file.truncate(size)
        for at in range(0, size, 12288):
            os.pwrite(file.fileno(), data[at : at + 4096], at)
    for copy in ("copy.img", "copy.qcow2"):
        assert main(["create", "-i", "raw:disk", copy]) == 0
    assert main(["create", "-i", "copy.qcow2", "again.img"]) == 0
    for copy in ("copy.img", "again.img"):
        assert Path(copy).read_bytes() == bytes(data).ljust(-(-size // MIB) * MIB, b"\0")


def loop_device(path: Path, *options: str) -> str:
    """Attach a file to a loop device."""
    command = ["losetup", "--find", "--show", *options, str(path)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return done.stdout.strip()


@pytest.fixture
def read_only_devices(tmp_path: Path) -> Iterator[dict[str, str]]:
    """Block devices that take no writes, each by another means."""
    if os.geteuid() != 0:
        pytest.skip("loop devices need root")
    found = {}
    try:
        for name in ("attached so", "set so", "a file that may not be written", "of a symlink"):
            disk = tmp_path / f"{name}.img"
            disk.write_bytes(b"disk".ljust(4 * MIB, b"\0"))
            if name.startswith("a file"):
                disk.chmod(0o400)
            found[name] = loop_device(disk, *([] if name == "set so" else ["--read-only"]))
        subprocess.run(["blockdev", "--setro", found["set so"]], check=True)
        link = tmp_path / "link"
        link.symlink_to(found["of a symlink"])
        yield {**found, "of a symlink": str(link)}
    finally:
        for device in found.values():
            subprocess.run(["losetup", "--detach", device], check=True)


def test_read_only_devices(
    read_only_devices: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    """Nothing opens a read-only device to write; all that only reads it works."""
    for device in read_only_devices.values():
        capsys.readouterr()
        said = f"{device}: the device is read-only"
        assert main(["run", "--selftest", "-d", f"raw:{device}"]) == 1
        assert said in capsys.readouterr().err
        assert main(["image", "resize", f"raw:{device}", "8M"]) == 1
        assert main(["image", "info", f"raw:{device}"]) == 0
        for words in (["-i", f"raw:{device}", "c.img"], ["-b", f"raw:{device}", "o.qcow2"]):
            assert main(["create", *words]) == 0
            Path(words[-1]).unlink()
