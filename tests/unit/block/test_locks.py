"""One writer or many readers of an image: among ourselves and with QEMU."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from vmm_kvm.block.image import Format
from vmm_kvm.errors import ImageError
from vmm_kvm.images.create import create_qcow2
from vmm_kvm.images.opening import open_image

MIB = 1 << 20


@pytest.fixture
def path(tmp_path: Path) -> str:
    """Return the path of an image that has a base."""
    create_qcow2(str(tmp_path / "base.qcow2"), 4 * MIB)
    path = str(tmp_path / "disk.qcow2")
    create_qcow2(path, 4 * MIB, "base.qcow2")
    return path


@contextmanager
def qemu_io(path: str, *options: str) -> Iterator[None]:
    """Let QEMU keep an image open."""
    process = subprocess.Popen(
        ["qemu-io", "-f", "qcow2", *options, path],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        process.stdin.write(b"length\n")
        process.stdin.flush()
        assert process.stdout.read(len(b"qemu-io> 4 MiB\n")) == b"qemu-io> 4 MiB\n"
        yield
    finally:
        process.communicate()


def locked_bytes(path: str) -> dict[str, set[int]]:
    """Return the locked bytes of a file, and how they are locked, by the kernel's list."""
    inode = Path(path).stat().st_ino
    found: dict[str, set[int]] = {}
    for line in Path("/proc/locks").read_text().splitlines():
        fields = line.split()
        if fields[1] == "OFDLCK" and fields[5].endswith(f":{inode}"):
            held = range(int(fields[6]), int(fields[7]) + 1)
            found.setdefault(fields[3], set()).update(held)
    return found


@pytest.mark.usefixtures("qemu_img")
@pytest.mark.parametrize(("options", "read_only"), [((), False), (("-r",), True)])
def test_we_lock_what_qemu_locks(path: str, options: tuple[str, ...], read_only: bool) -> None:
    """We lock the same bytes as QEMU, of an image and of its base."""
    base = str(Path(path).with_name("base.qcow2"))
    with qemu_io(path, *options):
        wanted = locked_bytes(path), locked_bytes(base)
    image = open_image(path, Format.QCOW2, read_only)
    found = locked_bytes(path), locked_bytes(base)
    image.close()
    assert found == wanted
    assert locked_bytes(path) == {}


def test_one_writer(path: str) -> None:
    """A writer excludes readers and writers; readers exclude writers, not readers."""
    writer = open_image(path, Format.QCOW2, False)
    for read_only in (True, False):
        with pytest.raises(ImageError, match=r"disk.qcow2: (in use by|another process writes)"):
            open_image(path, Format.QCOW2, read_only)
    writer.close()
    readers = [open_image(path, Format.QCOW2, True) for _ in range(2)]
    with pytest.raises(ImageError, match=r"disk.qcow2: in use by another process"):
        open_image(path, Format.QCOW2, False)
    for reader in readers:
        reader.close()
    open_image(path, Format.QCOW2, False).close()


def test_a_base_is_not_written_to(path: str) -> None:
    """While an overlay is in use its base cannot be written; other overlays may use it."""
    base = str(Path(path).with_name("base.qcow2"))
    overlay = open_image(path, Format.QCOW2, False)
    with pytest.raises(ImageError, match=r"base.qcow2: in use by another process"):
        open_image(base, Format.QCOW2, False)
    open_image(base, Format.QCOW2, True).close()
    overlay.close()


@pytest.mark.usefixtures("qemu_img")
def test_qemu_keeps_us_out(path: str) -> None:
    """While QEMU writes to an image we cannot even read it; while it reads we cannot write."""
    with qemu_io(path), pytest.raises(ImageError, match=r"disk.qcow2: another process writes"):
        open_image(path, Format.QCOW2, True)
    with qemu_io(path, "-r"):
        open_image(path, Format.QCOW2, True).close()
        with pytest.raises(ImageError, match=r"disk.qcow2: in use by another process"):
            open_image(path, Format.QCOW2, False)


@pytest.mark.usefixtures("qemu_img")
@pytest.mark.parametrize(
    ("read_only", "options", "is_refused"),
    [(False, (), True), (False, ("-r",), True), (True, (), True), (True, ("-r",), False)],
)
def test_we_keep_qemu_out(
    path: str, read_only: bool, options: tuple[str, ...], is_refused: bool
) -> None:
    """QEMU refuses an image that we use, except to read with us."""
    image = open_image(path, Format.QCOW2, read_only)
    done = subprocess.run(
        ["qemu-io", "-f", "qcow2", *options, "-c", "length", path],
        check=False,
        capture_output=True,
        text=True,
    )
    image.close()
    assert (done.returncode != 0) is is_refused
    assert ("lock" in done.stderr) is is_refused


def test_a_lock_goes_with_the_descriptor(path: str) -> None:
    """A process that gets a locked descriptor has its lock, until both are closed."""
    first = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    second = os.dup(first)
    image = open_image(first, Format.RAW, False)
    image.close()
    with pytest.raises(ImageError, match="in use"):
        open_image(path, Format.RAW, False)
    os.close(second)
    open_image(path, Format.RAW, False).close()


@pytest.mark.parametrize("wants_to_write", [False, True])
def test_who_has_the_lock_is_named(path: str, wants_to_write: bool) -> None:
    """The error names the lock's holder, not other users of the file or its earlier holder."""
    fd = os.open(path, os.O_RDWR if wants_to_write else os.O_RDONLY)
    with subprocess.Popen(["sleep", "100"], pass_fds=[fd]) as other:
        try:
            with qemu_io(path), pytest.raises(ImageError) as caught:
                open_image(fd, Format.QCOW2, not wants_to_write, name=path)
        finally:
            other.kill()
    assert "(qemu-io)" in str(caught.value)
    assert str(other.pid) not in str(caught.value)
