"""Fuzz target: qcow2 images, opened, read, written, checked, on a base or alone.

Each step has a result, or an ImageError or OSError of one line. If the check finds an image sound,
it holds what is written to it, and is sound when it is closed.
"""

from __future__ import annotations

import os
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

from tests.fuzz.inputs import Input, check_line
from vmm_kvm.block.file import HostFile
from vmm_kvm.block.image import Format, Layer, StoredImage
from vmm_kvm.block.qcow2.check import check
from vmm_kvm.block.qcow2.header import Header, read_header
from vmm_kvm.block.qcow2.snapshots import read_snapshots
from vmm_kvm.errors import ImageError
from vmm_kvm.images.opening import open_image

STEPS_MAX = 12
PIECE_MAX = 70_000
IMAGE_MAX = 512 << 10
_STEP_SIZE = 8
BASE = bytes(range(1, 256)) * 300
KINDS = (
    "cluster_size=512",
    "cluster_size=512,compat=0.10",
    "cluster_size=512,refcount_bits=1",
    "cluster_size=16384,extended_l2=on",
    "cluster_size=1024,compression_type=zstd",
    "cluster_size=512,lazy_refcounts=on,refcount_bits=64",
    "cluster_size=2048",
)
BASED = KINDS[:2]
SEED_SIZE = 24 << 10


class Model:
    """The contents of the written parts of an image: bytes, by their offset."""

    def __init__(self) -> None:
        self._known: list[tuple[int, bytes]] = []

    def note(self, offset: int, data: bytes) -> None:
        """Note the contents of a piece."""
        self._known.append((offset, data))

    def check(self, offset: int, found: bytes) -> None:
        """Compare read bytes with all that was written; the last write counts."""
        expected = bytearray(found)
        for start, data in self._known:
            first, last = max(start, offset), min(start + len(data), offset + len(found))
            if first < last:
                expected[first - offset : last - offset] = data[first - start : last - start]
        assert bytes(expected) == found, f"{offset:#x}: it reads as something else"


_DAMAGED = "a compressed cluster is corrupt"
"""Data of a sound image may be damaged: check decompresses nothing, nor does qemu-img's."""


def run(data: bytes) -> None:
    """Use an image; the input has a count, steps, and then the image."""
    given = Input(data)
    steps = given.piece(_STEP_SIZE * (given.number(1) % (STEPS_MAX + 1)))
    image = given.rest()[:IMAGE_MAX]
    fd = os.memfd_create("image", os.MFD_CLOEXEC)
    try:
        os.write(fd, image)
        was_sound = _attempt(lambda: _check(fd)) is True
        _attempt(lambda: _use(fd, steps, Model() if was_sound else None))
        if was_sound:
            assert _attempt(lambda: _check(fd)), "it was sound, and is not any more"
    finally:
        os.close(fd)


def _attempt(action: Callable[[], bool]) -> bool | None:
    """Return the action's result; None for an error, which must be one line."""
    try:
        return action()
    except (ImageError, OSError) as err:
        check_line(str(err))
        return None


def _check(fd: int) -> bool:
    """Tell whether the check finds no fault in an image; leaks are none."""
    file = HostFile(os.dup(fd), "image", is_read_only=True)
    try:
        header = read_header(file)
        read_snapshots(file, header)
        report = check(file, header)
    finally:
        file.close()
    for line in report.errors:
        check_line(line)
    return not report.error_count


def _use(fd: int, steps: bytes, model: Model | None) -> bool:
    """Use the image as a machine does: reads, writes, and the rest, and open it again between."""
    image = _open(fd, is_read_only=False)
    try:
        given = Input(steps)
        while not given.is_over:
            if given.number(1) % 16 == 15:
                image.close()
                image = _open(fd, is_read_only=False)
            else:
                _step(image, given, model)
    finally:
        image.close()
    return True


def _open(fd: int, *, is_read_only: bool) -> StoredImage:
    header = _header(fd)
    bases = []
    if header.backing is not None:
        base = os.memfd_create("base", os.MFD_CLOEXEC)
        os.write(base, BASE)
        bases = [Layer(base, Format.RAW)]
    return open_image(os.dup(fd), Format.QCOW2, is_read_only, name="image", bases=bases)


def _header(fd: int) -> Header:
    file = HostFile(os.dup(fd), "image", is_read_only=True)
    try:
        return read_header(file)
    finally:
        file.close()


def _step(image: StoredImage, given: Input, model: Model | None) -> None:
    kind, offset, size = given.number(1), given.number(3), given.number(3)
    if kind & 0x80:  # near the end
        offset = max(0, image.size - offset)
    size = min(size % PIECE_MAX & ~511, image.size - offset)
    offset &= ~511
    if size <= 0 or offset + size > image.size:
        return
    fault = ""
    try:
        match kind % 6:
            case 0 | 1:
                view = memoryview(bytearray(size))
                image.readv(offset, [view[: size // 2], view[size // 2 :]])
                if model:
                    model.check(offset, bytes(view))
            case 2 | 3:
                data = bytes([kind]) * size
                image.writev(offset, [memoryview(data)])
                if model:
                    model.note(offset, data)
            case 4:
                image.write_zeroes(offset, size, may_unmap=bool(kind & 0x40))
                if model:
                    model.note(offset, bytes(size))
            case _:
                if kind & 0x40:
                    image.flush()
                elif not model:
                    image.discard(offset, size)
    except OSError as err:
        fault = str(err)
        check_line(fault)
        if _DAMAGED in fault:
            raise  # the write may have ended anywhere
    # A failed write may have written a part.
    assert not (fault and model), f"it is sound, and {fault}"


def seeds() -> list[bytes]:
    """Return sound images of every kind that QEMU writes, with steps; needs qemu-img."""
    steps = bytes([8])
    for step in (0, 2, 0, 4, 3, 0x45, 5, 0x81):
        steps += bytes([0, step]) + (step << 9).to_bytes(3, "little") + b"\x00\x28\x00"
    found = []
    with tempfile.TemporaryDirectory() as folder:
        base, path = Path(folder, "base"), Path(folder, "image")
        base.write_bytes(BASE)
        for kind in KINDS:
            for backing in ((), ("-b", str(base), "-F", "raw")):
                if backing and kind not in BASED:
                    continue
                create = ("qemu-img", "create", "-q", "-f", "qcow2", "-o", kind, *backing)
                subprocess.run((*create, str(path), str(SEED_SIZE)), check=True)
                for command in ("write -P 1 2k 3k", "write -z 8k 4k", "write -c -P 3 16k 4k"):
                    io = ("qemu-io", "-c", command, str(path))
                    subprocess.run(io, check=False, capture_output=True)
                if "refcount_bits=1" not in kind:
                    subprocess.run(("qemu-img", "snapshot", "-c", "one", str(path)), check=True)
                write = ("qemu-io", "-c", "write -P 4 3k 1k", str(path))
                subprocess.run(write, check=True, capture_output=True)
                found.append(steps + path.read_bytes())
    return found
