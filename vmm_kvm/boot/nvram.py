"""A UEFI guest's variables: the contents of its flash memory, in a file of the VM's own.

The contents are read once and live in this process's memory, which the machine maps; what the
guest changes is written to the file as it happens, so that a killed VM has lost nothing. Nothing
maps the file: one that somebody truncates would end the VM.
"""

import mmap
import os
from contextlib import suppress
from pathlib import Path
from typing import Self

from vmm_kvm.bits import PAGE_SIZE
from vmm_kvm.block.image import Format, Image
from vmm_kvm.errors import BootError
from vmm_kvm.images.opening import open_image
from vmm_kvm.limits import FIRMWARE_MAX
from vmm_kvm.new_file import NewFile, write_whole


class Variables:
    """Flash contents, and the file that keeps them, if any; a context manager.

    Owns the memory and the file. May serve one machine after another, never two at once.
    """

    __slots__ = ("_image", "array", "size")

    def __init__(self, contents: bytes, image: Image | None) -> None:
        """Begin with `contents`, whole pages; `image` holds the same, and is taken over."""
        self.size = len(contents)
        # Private: a fork of the process, a clone, has its own.
        self.array = mmap.mmap(-1, self.size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self.array[:] = contents
        self._image = image

    @classmethod
    def of(cls, image: Image) -> Self:
        """Begin with what `image` holds, and keep changes there; takes it over.

        Raises:
            BootError: it is no whole number of pages, or larger than firmware can be.
            OSError, ImageError: it cannot be read.
        """
        try:
            _check_size("UEFI variables", image.size)
            contents = bytearray(image.size)
            image.readv(0, [memoryview(contents)])
        except BaseException:
            image.close()
            raise
        return cls(bytes(contents), image)

    @property
    def is_kept(self) -> bool:
        """Whether the guest's changes outlive this process."""
        return self._image is not None

    def store(self, offset: int, data: memoryview) -> None:
        """Keep the guest's change at `offset`.

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

    With None they are a copy that is not kept.

    Raises:
        BootError: the template or the directory is missing, or the sizes differ.
        ImageError: the file cannot be opened, or another VM uses it.
    """
    initial = _read(template)
    _check_size(template, len(initial))
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


def open_copy(path: str, template: int) -> int:
    """Return the descriptor of the variables at `path`, for reading and writing; the caller's.

    They are made if need be, as a copy of the file at the descriptor `template`; their directory
    too, for this user alone.

    Raises:
        BootError: the template is no contents of a flash memory.
        OSError: something else failed.
    """
    flags = os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW
    with suppress(FileNotFoundError):
        return os.open(path, flags)
    contents = os.pread(template, FIRMWARE_MAX + 1, 0)
    _check_size("template", len(contents))
    directory = Path(path).parent
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    _create(path, contents)
    return os.open(path, flags)


def _check_size(name: str, size: int) -> None:
    if not 0 < size <= FIRMWARE_MAX or size % PAGE_SIZE:
        raise BootError(f"{name}: not the contents of a flash memory")


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
    """Make the file, unless another VM's start has done so meanwhile."""
    try:
        with suppress(FileExistsError), NewFile(path) as new:
            write_whole(new.fd, (contents,))
            new.publish()
    except OSError as err:
        raise BootError(f"{path}: {err.strerror}") from err
