"""New disk images: raw, qcow2, and copies of other disks."""

import os
import struct
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from errno import ENAMETOOLONG, ERANGE

from vmm_kvm.bits import MIB
from vmm_kvm.block.image import Format, Layer, StoredImage
from vmm_kvm.block.qcow2.header import (
    BACKING_PATH_MAX,
    EXTENSION,
    EXTENSION_BACKING_FORMAT,
    L1_BYTES_MAX,
    MAGIC,
    VERSION_2,
    VERSION_3,
    VERSION_3_LENGTH,
    Backing,
    l1_entries,
)
from vmm_kvm.images.opening import image_chain, open_image
from vmm_kvm.new_file import NewFile

_CLUSTER_BITS = 16
_CLUSTER_SIZE = 1 << _CLUSTER_BITS
_L2_BITS = _CLUSTER_BITS - 3
_REFCOUNT_ORDER = 4  # 16 bits
_COUNTS_PER_BLOCK = _CLUSTER_SIZE // 2
_BLOCKS_PER_TABLE_CLUSTER = _CLUSTER_SIZE // 8
_BLOCK_SIZE = 64 << 10
_PIECE = 1 << 20


def create_raw(path: str, size: int) -> None:
    """Create a raw image of `size` bytes, sparse, at `path`, where no file may be yet.

    Raises:
        OSError: it cannot be made; nothing is left of it.
    """
    create_image(path, Format.RAW, size)


def create_qcow2(
    path: str, size: int, base: str | None = None, base_format: Format = Format.QCOW2
) -> None:
    """Create a qcow2 image of `size` bytes at `path`, where no file may be yet.

    `base` is the path of an image, for the header, and `base_format` its format. A path that
    readers would take for a protocol, such as `nbd:host`, is written as `./nbd:host`.

    Raises:
        OSError: it cannot be made, ERANGE because it would be too large; nothing is left of it.

    Source: section 19.2 of OpenBSD's behaviour; qcow2 specification. Unlike OpenBSD's, the
    header names the format of the base, so that no reader has to guess it.
    """
    if base is not None and ":" in base.partition("/")[0]:
        base = f"./{base}"
    with NewFile(path) as new:
        _write_qcow2(new.fd, size, None if base is None else Backing(base, base_format))
        new.publish(durable=False)  # the disk is all zeros: nothing of value is lost


def _write_qcow2(fd: int, size: int, base: Backing | None) -> None:
    """Fill an empty file with an empty image."""
    entries = max(1, l1_entries(size, _CLUSTER_BITS, _L2_BITS))
    l1_clusters = -(-entries * 8 >> _CLUSTER_BITS)
    covered = _BLOCKS_PER_TABLE_CLUSTER * _COUNTS_PER_BLOCK * _CLUSTER_SIZE
    table_clusters = max(1, -(-size // covered))
    clusters = 1 + l1_clusters + table_clusters + 1
    if entries * 8 > L1_BYTES_MAX or clusters > _COUNTS_PER_BLOCK:
        raise OSError(ERANGE, os.strerror(ERANGE))
    table_offset = (1 + l1_clusters) << _CLUSTER_BITS
    block_offset = (clusters - 1) << _CLUSTER_BITS
    header = _header(size, entries, table_offset, table_clusters, base)
    os.ftruncate(fd, clusters << _CLUSTER_BITS)
    os.pwrite(fd, struct.pack(f">{clusters}H", *[1] * clusters), block_offset)
    os.pwrite(fd, block_offset.to_bytes(8, "big"), table_offset)
    os.pwrite(fd, header, 0)


def _header(
    size: int, entries: int, table_offset: int, table_clusters: int, base: Backing | None
) -> bytes:
    extensions = EXTENSION.pack(0, 0)
    path = b""
    if base is not None:
        path = os.fsencode(base.path)
        if len(path) > BACKING_PATH_MAX:
            text = f"a base's path has at most {BACKING_PATH_MAX} bytes"
            raise OSError(ENAMETOOLONG, text)
        named = (base.disk_format or "").encode()
        extensions = EXTENSION.pack(EXTENSION_BACKING_FORMAT, len(named)) + named.ljust(8, b"\0")
        extensions += EXTENSION.pack(0, 0)
    return b"".join(
        (
            VERSION_2.pack(
                *(MAGIC, 3, VERSION_3_LENGTH + len(extensions) if path else 0, len(path)),
                *(_CLUSTER_BITS, size, 0, entries, _CLUSTER_SIZE, table_offset, table_clusters),
                *(0, 0),
            ),
            VERSION_3.pack(0, 0, 0, _REFCOUNT_ORDER, VERSION_3_LENGTH),
            extensions,
            path,
        )
    )


def create_image(path: str, disk_format: Format, size: int) -> None:
    """Create an image of either format.

    Raises:
        OSError: see `create_raw` and `create_qcow2`.
    """
    with new_image(path, disk_format, size) as new:
        new.publish(durable=False)  # the disk is all zeros: nothing of value is lost


@contextmanager
def new_image(path: str, disk_format: Format, size: int) -> Iterator[NewFile]:
    """Make an image that is to appear at `path`, where no file may be yet, when it is published.

    Raises:
        OSError: it cannot be made.
    """
    with NewFile(path) as new:
        if disk_format is Format.QCOW2:
            _write_qcow2(new.fd, size, None)
        else:
            os.ftruncate(new.fd, size)
        yield new


def open_snapshot(path: str, disk_format: Format | None, scratch: int) -> StoredImage:
    """Open the image at `path` so that what is written to it goes to the file at `scratch`.

    That file, which stays the caller's, is empty, or holds what was written before over the same
    image. The image and its bases are locked as for reading.

    Raises:
        ImageError: a file is missing, in use, of a wrong or unsupported kind, or corrupt.
        OSError: `scratch` cannot be written.
    """
    return open_overlay(os.dup(scratch), image_chain(path, disk_format), path)


def open_overlay(scratch: int, bases: Sequence[Layer], name: str) -> StoredImage:
    """Open what was written over an image, as `open_snapshot` does; `bases` are the image and its.

    Takes ownership of `scratch`, and of those in `bases` that are descriptors, whatever happens.
    `name` is for messages. The formats of all are known.

    Raises:
        ImageError: see `open_image`.
        OSError: `scratch` cannot be written.
    """
    with ExitStack() as stack:
        for descriptor in (scratch, *(base.source for base in bases)):
            if isinstance(descriptor, int):
                stack.callback(os.close, descriptor)
        if not os.fstat(scratch).st_size:
            first, *others = map(_duplicate, bases)
            image = open_image(
                first.source, first.disk_format, True, name=name, bases=others, window=first.window
            )
            image.close()
            # The path is not followed: the bases are handed over.
            _write_qcow2(scratch, image.size, Backing("base", first.disk_format))
        stack.pop_all()
    return open_image(scratch, Format.QCOW2, False, name=name, bases=bases)


def _duplicate(layer: Layer) -> Layer:
    """Return a layer with a descriptor of its own, if it has one."""
    return layer if isinstance(layer.source, str) else layer._replace(source=os.dup(layer.source))


class SourceError(OSError):
    """The disk that is copied cannot be read."""


def copy(source: StoredImage, target: StoredImage, advance: Callable[[int], None]) -> None:
    """Copy a disk into a new image, whose disk is as large or larger.

    Blocks of zeros are not written. `advance` is called with each number of bytes copied.

    Raises:
        SourceError: the disk cannot be read.
        OSError: the new image cannot be written.
    """
    buffer = memoryview(bytearray(_PIECE))
    for start, size, is_empty in _pieces(source):
        if not is_empty:
            piece = buffer[:size]
            try:
                source.readv(start, [piece])
            except OSError as err:
                raise SourceError(err.errno, err.strerror) from err
            _write_blocks(target, start, piece)
        advance(size)
    target.flush()


def _pieces(source: StoredImage) -> Iterator[tuple[int, int, bool]]:
    """Yield start and size of the parts of a disk, and whether each is known to be zeros.

    Parts with data have at most `_PIECE` bytes; short runs of zeros belong to the data.

    Raises:
        SourceError: the disk cannot be read.
    """
    start = at = 0
    parts = source.parts(0, source.size)
    while at < source.size:
        try:
            size, is_empty = next(parts)
        except OSError as err:
            raise SourceError(err.errno, err.strerror) from err
        is_gap = is_empty and size >= _BLOCK_SIZE
        at += 0 if is_gap else size
        while at - start >= _PIECE or (is_gap and at > start):
            piece = min(_PIECE, at - start)
            yield start, piece, False
            start += piece
        if is_gap:
            yield at, size, True
            at += size
            start = at
    if at > start:
        yield start, at - start, False


def _write_blocks(target: StoredImage, start: int, piece: memoryview) -> None:
    """Write those blocks of `piece` that are not zeros, as few runs."""
    zeros = bytes(_BLOCK_SIZE)
    begin = None
    for at in range(0, len(piece), _BLOCK_SIZE):
        block = piece[at : at + _BLOCK_SIZE]
        is_zero = block == zeros[: len(block)]
        if is_zero and begin is not None:
            target.writev(start + begin, [piece[begin:at]])
            begin = None
        elif not is_zero and begin is None:
            begin = at
    if begin is not None:
        target.writev(start + begin, [piece[begin:]])


def rounded_up(size: int) -> int:
    """Return `size` in whole megabytes, as a copy of a disk has it."""
    return -(-size // MIB) * MIB
