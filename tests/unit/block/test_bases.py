"""Bases of overlays: those that somebody writes, in any way, and those that nobody could open."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import pytest

from vmctl.line.cli import main
from vmm_kvm.block.image import Format
from vmm_kvm.images.create import create_image, create_qcow2
from vmm_kvm.images.opening import open_image

MIB = 1 << 20
ANOTHER = 4321
"""A user's number."""


@pytest.fixture(autouse=True)
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Work in an empty directory."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@contextmanager
def qemu(path: str, disk_format: str, *options: str, user: int = 0) -> Iterator[None]:
    """Have QEMU hold an image open to write."""
    command = ["qemu-io", "-f", disk_format, *options, path]
    with subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        user=user or None,
        group=user or None,
    ) as process:
        assert process.stdin
        assert process.stdout
        try:
            process.stdin.write(b"read 0 512\n")
            process.stdin.flush()
            while b"read 512/512" not in process.stdout.readline():
                assert process.poll() is None
            yield
        finally:
            process.stdin.close()
            process.wait(60)


@contextmanager
def ours(path: str, disk_format: str) -> Iterator[None]:
    """Hold an image open to write as our programs do."""
    image = open_image(path, Format(disk_format), False)
    try:
        yield
    finally:
        image.close()


NAMES = {
    "itself": lambda path: path,
    "absolute": os.path.abspath,
    "a symbolic link": lambda path: _linked(path, Path.symlink_to),
    "a hard link": lambda path: _linked(path, Path.hardlink_to),
    "said to be raw": lambda path: f"raw:{path}",
}


def _linked(path: str, link: Callable[[Path, str], None]) -> str:
    other = Path(f"link.{path.rpartition('.')[2]}")
    link(other, path)
    return str(other)


@pytest.mark.usefixtures("qemu_img")
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("base", ["disk.qcow2", "disk.raw"])
def test_a_base_that_qemu_writes(base: str, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """A base that another program writes is refused by any of its names, with the process."""
    disk_format = base.rpartition(".")[2]
    create_image(base, Format(disk_format), 4 * MIB)
    named = NAMES[name](base)
    with qemu(base, disk_format):
        assert main(["create", "-b", named, "x.qcow2"]) == 1
        assert ": another process writes to it: pid " in capsys.readouterr().err
        assert main(["create", "-i", named, "x.qcow2"]) == 1
        assert main(["image", "resize", named, "8M"]) == 1
    assert not Path("x.qcow2").exists()
    assert main(["create", "-b", named, "x.qcow2"]) == 0


@pytest.mark.usefixtures("qemu_img")
def test_a_base_that_another_user_writes(
    directory: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whose process writes to the base makes no difference."""
    if os.geteuid() != 0:
        pytest.skip("only root becomes another user")
    for parent in (directory, *directory.parents[:2]):
        parent.chmod(0o755)
    create_qcow2("disk.qcow2", 4 * MIB)
    os.chown("disk.qcow2", ANOTHER, ANOTHER)
    with qemu("disk.qcow2", "qcow2", user=ANOTHER):
        assert main(["create", "-b", "disk.qcow2", "x.qcow2"]) == 1
    assert "another process writes to it" in capsys.readouterr().err


@pytest.mark.usefixtures("qemu_img")
@pytest.mark.parametrize("holder", [qemu, ours])
@pytest.mark.parametrize("depth", [1, 2])
def test_a_base_below_the_base(
    holder: Callable[[str, str], AbstractContextManager[None]],
    depth: int,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A writer anywhere in the chain is named."""
    create_qcow2("0.qcow2", 4 * MIB)
    for index in range(depth):
        assert main(["create", "-b", f"{index}.qcow2", f"{index + 1}.qcow2"]) == 0
    capsys.readouterr()
    with holder("0.qcow2", "qcow2"):
        assert main(["create", "-b", f"{depth}.qcow2", "x.qcow2"]) == 1
    assert "0.qcow2: another process writes to it" in capsys.readouterr().err
    with qemu("0.qcow2", "qcow2", "-r"):
        assert main(["create", "-b", f"{depth}.qcow2", "x.qcow2"]) == 0


@pytest.mark.usefixtures("qemu_img")
@pytest.mark.parametrize(
    ("base", "what"),
    [
        ("itself.qcow2", "more than 3 base images"),
        ("first.qcow2", "more than 3 base images"),
        ("orphan.qcow2", "gone.qcow2: No such file or directory"),
        ("remote.qcow2", "base image nbd://host/disk: not a path"),
        ("split.qcow2", "external data file"),
        ("short.qcow2", "past the end of the file"),
        ("fifo", "neither a regular file nor a block device"),
        ("folder", "neither a regular file nor a block device"),
        ("/dev/zero", "neither a regular file nor a block device"),
        ("x" * 300, "File name too long"),
    ],
    ids=lambda value: value[:20],
)
def test_no_base_that_nobody_can_open(
    base: str, what: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """The refusal names the image of the chain that is the reason, and leaves no overlay."""
    for name, below in (
        ("itself.qcow2", "././itself.qcow2"),
        ("first.qcow2", "second.qcow2"),
        ("second.qcow2", "first.qcow2"),
        ("orphan.qcow2", "gone.qcow2"),
    ):
        create_qcow2(name, 4 * MIB, below)
    for options in (
        ["-o", "data_file=data.raw", "split.qcow2"],
        ["-u", "-b", "nbd://host/disk", "-F", "raw", "remote.qcow2"],
    ):
        words = ["qemu-img", "create", "-q", "-f", "qcow2", *options, "4M"]
        subprocess.run(words, check=True)
    create_qcow2("short.qcow2", 4 * MIB)
    os.truncate("short.qcow2", 70000)
    os.mkfifo("fifo")
    Path("folder").mkdir()
    assert main(["create", "-b", base, "x"]) == 1
    assert main(["create", "-b", base, "x.qcow2"]) == 1
    told = capsys.readouterr().err.splitlines()
    assert what in told[-1]
    assert not Path("x.qcow2").exists()


@pytest.mark.usefixtures("qemu_img")
@pytest.mark.parametrize(
    "base",
    ["a:b.qcow2", "nbd:x.qcow2", "json:{}.qcow2", "c:/d.qcow2", "./e:f.qcow2", "g/h:i.qcow2"],
)
@pytest.mark.parametrize("is_absolute", [False, True])
def test_a_base_with_a_colon(base: str, is_absolute: bool, directory: Path) -> None:
    """A path like a protocol's address is written so that we, and QEMU, take it for a path."""
    Path(base).parent.mkdir(exist_ok=True)
    create_qcow2(base, 4 * MIB)
    image = open_image(base, Format.QCOW2, False)
    image.writev(0, [memoryview(b"base")])
    image.close()
    named = str(directory / base) if is_absolute else base
    assert main(["create", "-b", named, "x.qcow2"]) == 0
    data = bytearray(4)
    image = open_image("x.qcow2", Format.QCOW2, True)
    image.readv(0, [memoryview(data)])
    image.close()
    assert bytes(data) == b"base"
    subprocess.run(["qemu-img", "compare", "-q", "x.qcow2", f"./{base}"], check=True)


def test_a_base_with_a_path_that_no_header_holds(capsys: pytest.CaptureFixture[str]) -> None:
    """A path of more than 1023 bytes is named as that."""
    create_qcow2("disk.qcow2", 4 * MIB)
    base = "./" * 600 + "disk.qcow2"
    assert main(["create", "-b", base, "x.qcow2"]) == 1
    assert capsys.readouterr().err.endswith(": a base's path has at most 1023 bytes\n")
    assert not Path("x.qcow2").exists()


def test_a_directory_that_was_removed(
    directory: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In a directory that is gone nothing is made, and the reason is its absence."""
    create_qcow2("disk.qcow2", 4 * MIB)
    Path("gone").mkdir()
    monkeypatch.chdir("gone")
    (directory / "gone").rmdir()
    for words in (["-s", "1M", "x.img"], ["-b", f"{directory}/disk.qcow2", "x.qcow2"]):
        assert main(["create", *words]) == 1
        assert capsys.readouterr().err.endswith(": No such file or directory\n")
