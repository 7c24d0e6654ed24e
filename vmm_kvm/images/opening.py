"""Opening a disk image: the format of a file, its chain of bases, and write locks.

An overlay is opened with its whole chain of bases, each read-only. A process that may not open
files by name gets their descriptors instead: `image_chain` tells the files that an image needs, and
`open_image` takes them as `bases`.
"""

import os
import stat
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING

from vmm_kvm.block.device import is_read_only_device
from vmm_kvm.block.file import FileWindow, HostFile
from vmm_kvm.block.headers import SECTOR_SIZE, foreign
from vmm_kvm.block.image import Format, Layer, StoredImage
from vmm_kvm.block.locks import lock
from vmm_kvm.block.raw import RawImage
from vmm_kvm.errors import ImageError

if TYPE_CHECKING:
    from vmm_kvm.block.qcow2.header import Backing, Header

CHAIN_MAX = 4
"""Files in one chain: an image and at most three bases. Source: section 1 of OpenBSD's limits."""

_DISC_MARK, _DISC_MARK_AT = b"CD001", 0x8001
"""Source: ECMA-119 §8.1."""
_QCOW2_MAGIC = b"QFI\xfb"


def probe(data: bytes) -> Format:
    """Tell the format of a file by its first four bytes.

    Only if the user has not named the format: the guest of a raw disk can write any signature.

    Source: section 2.5 of OpenBSD's behaviour.
    """
    return Format.QCOW2 if data[:4] == _QCOW2_MAGIC else Format.RAW


def open_image(
    source: str | int,
    disk_format: Format | None,
    read_only: bool,
    *,
    name: str | None = None,
    bases: Sequence[Layer] | None = None,
    window: tuple[int, int] | None = None,
) -> StoredImage:
    """Open a disk image and, read-only, its bases; each is locked as QEMU locks it.

    Takes ownership of `source`, and of those in `bases`, if they are descriptors, whatever
    happens. `name` is for messages, by default the path. Without `bases` they are found by the
    paths and formats in the images; with them, no path is followed. `window` is as of `Layer`.

    Raises:
        ImageError: a file is missing, in use, of a wrong or unsupported kind, or corrupt.
    """
    with ExitStack() as stack:
        for descriptor in (source, *(base.source for base in bases or ())):
            if isinstance(descriptor, int):
                stack.callback(os.close, descriptor)
        handed = None if bases is None else list(bases)
        layer = Layer(source, disk_format, window)
        is_probed = disk_format is None
        files: list[tuple[HostFile, Header | None]] = []
        while True:
            file = _open_file(layer.source, name, stack, writes=not (read_only or files))
            if layer.window is not None:
                file = FileWindow(file.fd, file.name, layer.window)
            header = _header(file, layer.disk_format)
            files.append((file, header))
            if header is None or header.backing is None:
                break
            if len(files) == CHAIN_MAX:
                raise ImageError(f"{files[0][0].name}: more than {CHAIN_MAX - 1} base images")
            if handed is None:
                layer = _base(layer.source, header.backing)
            elif handed:
                layer = handed.pop(0)
            else:
                raise ImageError(f"{file.name}: its base image is missing")
            name = None
        if handed:
            raise ImageError(f"{files[0][0].name}: more base images than it refers to")
        image: StoredImage | None = None
        while files:
            image = _make(*files.pop(), image, is_probed=is_probed)
        assert image is not None
        stack.pop_all()
        return image


def open_disc(source: str | int, name: str | None = None) -> StoredImage:
    """Open the image of a disc: its bytes as they are, to be read only.

    Takes ownership of `source` if it is a descriptor, whatever happens.

    Raises:
        ImageError: it cannot be opened, or is plainly no disc but an image of a disk, compressed,
            or an archive.
    """
    image = open_image(source, Format.RAW, read_only=True, name=name)
    called = name or str(source)
    try:
        problem = _no_disc(image, called)
    except OSError as err:
        problem = f"{called}: {err.strerror}"
    if problem:
        image.close()
        raise ImageError(problem)
    return image


def _no_disc(image: StoredImage, called: str) -> str:
    """Say what an image is that is plainly none of a disc; empty if it may be one."""

    def read(offset: int, size: int) -> bytes:
        data = bytearray(max(0, min(size, image.size - offset)))
        if data:
            image.readv(offset, [memoryview(data)])
        return bytes(data)

    if read(_DISC_MARK_AT, len(_DISC_MARK)) == _DISC_MARK:
        return ""
    first = read(0, SECTOR_SIZE)
    if probe(first) is Format.QCOW2:
        return f"{called}: a qcow2 image, not a disc's"
    last = read(max(0, image.size - SECTOR_SIZE), SECTOR_SIZE)
    return (foreign(called, first, last) or "").partition(", or say ")[0]


def image_chain(
    path: str, disk_format: Format | None, open_file: Callable[[str], int] | None = None
) -> list[Layer]:
    """Return the files that the image at `path` needs: itself, then its bases, all by path.

    Nothing is locked. Every layer's format is known in the result. With `open_file`, it is called
    once for each of them in this order, and returns a descriptor for reading, which stays the
    caller's: each path is looked up once.

    Raises:
        ImageError: a file is missing, of an unsupported kind, or its header is corrupt.
    """
    chain: list[Layer] = []
    layer: Layer | None = Layer(path, disk_format)
    while layer is not None:
        if len(chain) == CHAIN_MAX:
            raise ImageError(f"{path}: more than {CHAIN_MAX - 1} base images")
        with ExitStack() as stack:
            source = layer.source if open_file is None else open_file(str(layer.source))
            file = _open_file(source, str(layer.source), stack, writes=False, locks=False)
            header = _header(file, layer.disk_format)
        chain.append(Layer(layer.source, Format.QCOW2 if header else Format.RAW))
        layer = _base(layer.source, header.backing) if header and header.backing else None
    return chain


def check_kind(descriptor: int, name: str) -> None:
    """Refuse what no image can be in.

    Raises:
        ImageError: it is neither a regular file nor a block device.
    """
    mode = os.fstat(descriptor).st_mode
    if not stat.S_ISREG(mode) and not stat.S_ISBLK(mode):
        raise ImageError(f"{name}: neither a regular file nor a block device")


def _open_file(
    source: str | int, name: str | None, stack: ExitStack, *, writes: bool, locks: bool = True
) -> HostFile:
    if isinstance(source, int):
        descriptor = source
        name = name or f"descriptor {source}"
    else:
        name = name or source
        # Do not wait for a writer if the path turns out to be a FIFO.
        flags = os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY
        try:
            descriptor = os.open(source, flags | (os.O_RDWR if writes else os.O_RDONLY))
        except OSError as err:
            raise ImageError(f"{name}: {err.strerror}") from err
        except ValueError as err:  # a null character
            raise ImageError(f"{name!r}: {err}") from err
        stack.callback(os.close, descriptor)
    check_kind(descriptor, name)
    if writes and stat.S_ISBLK(os.fstat(descriptor).st_mode) and is_read_only_device(descriptor):
        raise ImageError(f"{name}: the device is read-only")
    if locks:
        lock(descriptor, name, writes=writes)
    try:
        return HostFile(descriptor, name, is_read_only=not writes)
    except OSError as err:  # a file of /proc, which has no end
        raise ImageError(f"{name}: {err.strerror}") from err


def _header(file: HostFile, disk_format: Format | None) -> "Header | None":
    """Return the header of a qcow2 image, None for a raw one."""
    try:
        if disk_format is None:
            disk_format = _found_out(file)
        if disk_format is Format.RAW:
            return None
        # A raw disk needs nothing of the other format.
        from vmm_kvm.block.qcow2.header import read_header  # noqa: PLC0415

        return read_header(file)
    except OSError as err:
        raise ImageError(f"{file.name}: {err.strerror}") from err


def _found_out(file: HostFile) -> Format:
    """Return the format of a file whose format the user has not named."""
    size = file.size()
    first = bytes(file.read(0, min(size, SECTOR_SIZE)))
    last = bytes(file.read(max(0, size - SECTOR_SIZE), min(size, SECTOR_SIZE)))
    problem = foreign(file.name, first, last)
    if problem:
        raise ImageError(problem)
    return probe(first)


def _base(source: str | int, backing: "Backing") -> Layer:
    """Return where the base of the image at `source` is said to be."""
    path = backing.path
    if ":" in path.partition("/")[0]:  # a protocol, or QEMU's options in JSON
        raise ImageError(f"base image {path}: not a path")
    if not path.startswith("/"):
        if isinstance(source, int):
            raise ImageError(f"base image {path}: a relative path, and no directory to begin at")
        path = os.path.join(os.path.dirname(source), path)  # noqa: PTH118, PTH120 - bytes as they are
    named = backing.disk_format
    if named is None:
        return Layer(path, None)
    try:
        return Layer(path, Format(named))
    except ValueError:
        raise ImageError(f"base image {path}: format {named} is not supported") from None


def _make(
    file: HostFile, header: "Header | None", base: StoredImage | None, *, is_probed: bool
) -> StoredImage:
    try:
        if header is None:
            return RawImage(file, is_probed=is_probed)
        # A raw disk needs nothing of the other format.
        from vmm_kvm.block.qcow2.image import Qcow2Image  # noqa: PLC0415

        return Qcow2Image(file, header, base)
    except OSError as err:
        raise ImageError(f"{file.name}: {err.strerror}") from err
