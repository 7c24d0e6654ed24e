"""A UEFI guest's variables: the contents of its flash memory, in a file of the VM's own.

The contents are read once and live in this process's memory, which the machine maps; what the
guest changes is written to the file as it happens, so that a killed VM has lost nothing. Nothing
maps the file: one that somebody truncates would end the VM.
"""

import mmap
import os
from pathlib import Path
from typing import Self

from vmm_kvm.bits import PAGE_SIZE
from vmm_kvm.block.image import Format, Image, open_image
from vmm_kvm.boot.layout import FIRMWARE_MAX
from vmm_kvm.errors import BootError


class Variables:
    """Flash contents, and the file that keeps them, if any; a context manager.

    Owns the memory and the file. May serve one machine after another, never two at once.
    """

    __slots__ = ("_image", "array", "size")

    def __init__(self, contents: bytes, image: Image | None) -> None:
        """Begin with `contents`, whole pages; `image` holds the same, and is taken over."""
        self.size = len(contents)
        self.array = mmap.mmap(-1, self.size)
        self.array[:] = contents
        self._image = image

    def store(self, offset: int, data: memoryview) -> None:
        """Keep what the guest changed at `offset`.

        Raises:
            OSError: the file cannot be written.
        """
        if self._image:
            self._image.writev(offset, [data])

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file; idempotent. The memory goes when nothing maps it any more."""
        if self._image:
            self._image.close()


def open_variables(template: str, path: str | None) -> Variables:
    """Open the variables at `path`, a copy of `template` if there is no such file yet.

    With None they are a copy that nobody keeps.

    Raises:
        BootError: the template or the directory is missing, or the sizes differ.
        ImageError: the file cannot be opened, or another VM uses it.
    """
    initial = _read(template)
    if not 0 < len(initial) <= FIRMWARE_MAX or len(initial) % PAGE_SIZE:
        raise BootError(f"{template}: not the contents of a flash memory")
    if path is None:
        return Variables(initial, None)
    if not Path(path).exists():
        _create(path, initial)
    image = open_image(path, Format.RAW, read_only=False)
    try:
        contents = _read_image(image, path, len(initial))
    except BaseException:
        image.close()
        raise
    return Variables(contents, image)


def _read_image(image: Image, path: str, size: int) -> bytes:
    if image.size != size:
        raise BootError(f"{path}: {image.size} bytes, but this firmware has {size}")
    contents = bytearray(size)
    image.readv(0, [memoryview(contents)])
    return bytes(contents)


def _read(path: str) -> bytes:
    try:
        with Path(path).open("rb") as file:
            return file.read(FIRMWARE_MAX + 1)
    except OSError as err:
        raise BootError(f"{path}: {err.strerror}") from err


def _create(path: str, contents: bytes) -> None:
    """Make the file, all of it or nothing."""
    scratch = Path(f"{path}.{os.getpid()}.part")
    try:
        scratch.write_bytes(contents)
        scratch.rename(path)
    except OSError as err:
        scratch.unlink(missing_ok=True)
        raise BootError(f"{path}: {err.strerror}") from err
