"""Growing and shrinking disk images in place.

The header of a qcow2 image changes in one write, after everything that it refers to is durable: an
interrupted resize leaves the old size or the new one.
"""

import os
import stat
import struct

from vmm_kvm.bits import align_up
from vmm_kvm.block.file import HostFile
from vmm_kvm.block.image import Format
from vmm_kvm.block.locks import lock
from vmm_kvm.block.qcow2.header import Header, Incompatible, l1_entries, read_header
from vmm_kvm.errors import ImageError
from vmm_kvm.images.opening import image_chain, open_image

_SIZE_AT = 24
_SIZE_FIELDS = struct.Struct(">QII")  # size, encryption method, L1 entries
_L1_ENTRY = 8


def resize(path: str, disk_format: Format, size: int, *, may_shrink: bool = False) -> None:
    """Make the disk in the image at `path` `size` bytes large, a multiple of 512.

    Added space reads as zero. Shrinking, which loses data, needs `may_shrink`.

    Raises:
        ImageError: the image is in use, no file, corrupt, or cannot have that size.
        OSError: it cannot be written.
    """
    try:
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
    except (OSError, ValueError) as err:
        text = err.strerror if isinstance(err, OSError) else str(err)
        raise ImageError(f"{path}: {text}") from err
    file = HostFile(fd, path, is_read_only=False)
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise ImageError(f"{path}: not a regular file")
        lock(fd, path, writes=True)
        if disk_format is Format.QCOW2:
            _resize_qcow2(file, size, may_shrink=may_shrink)
        else:
            _check_shrinking(path, file.size(), size, may_shrink=may_shrink)
            os.ftruncate(fd, size)
            os.fsync(fd)
    finally:
        file.close()


def _check_shrinking(path: str, before: int, size: int, *, may_shrink: bool) -> None:
    if size < before and not may_shrink:
        raise ImageError(f"{path}: {before} bytes: to cut some off, say --shrink")


def _resize_qcow2(file: HostFile, size: int, *, may_shrink: bool) -> None:
    header = read_header(file)
    _check_shrinking(file.name, header.size, size, may_shrink=may_shrink)
    if header.incompatible & (Incompatible.CORRUPT | Incompatible.DIRTY):
        raise ImageError(f"{file.name}: damaged, or not closed: run it, or image check, first")
    if header.snapshot_count:
        raise ImageError(f"{file.name}: has internal snapshots, which keep its size")
    entries = l1_entries(size, header.cluster_bits, header.l2_bits)
    room = align_up(max(header.l1_size, 1) * _L1_ENTRY, header.cluster_size) // _L1_ENTRY
    if entries > room:
        raise ImageError(f"{file.name}: its table has no room for that: use create -i and -s")
    if size < header.size:
        _forget(file, header, size, header.size)
    if entries > header.l1_size:
        start = header.l1_offset + header.l1_size * _L1_ENTRY
        file.write(start, bytes((entries - header.l1_size) * _L1_ENTRY))
    file.sync()
    l1_size = max(entries, header.l1_size)
    file.write(_SIZE_AT, _SIZE_FIELDS.pack(size, 0, l1_size))
    file.sync()
    if size > header.size:
        _forget(file, header, header.size, size)


def _forget(file: HostFile, header: Header, start: int, end: int) -> None:
    """Make a part of the disk read as zero: of the image's last cluster, and of a longer base."""
    bases = image_chain(file.name, Format.QCOW2)[1:]
    image = open_image(os.dup(file.fd), Format.QCOW2, False, name=file.name, bases=bases)
    try:
        if not bases and end > header.size:  # nothing can be behind the last cluster
            end = min(end, align_up(start, header.cluster_size))
        image.write_zeroes(start, end - start, may_unmap=True)
    finally:
        image.close()
