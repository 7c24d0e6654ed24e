"""The ELF executable inside a bzImage: unpacked on the host, from the cache where possible.

The kernel's build packs vmlinux, then appends the relocations that its decompressor needs to move
the kernel. Here it is loaded where it was linked, so nothing is relocated. What is kept in the
cache is the same executable without its headers, symbols and pages of zeros: a third less to copy
into guest memory on each start.
"""

import struct
from collections.abc import Iterator

from vmm_kvm.bits import MIB, PAGE_SIZE, align_up
from vmm_kvm.boot.cache import Kernels
from vmm_kvm.boot.elf import (
    EM_X86_64,
    ET_EXEC,
    MAGIC,
    PT_LOAD,
    Elf,
    ElfSegment,
    check_high,
    read_elf,
)
from vmm_kvm.boot.payload import MAGIC_SIZE, CodecMissingError, payload_format, unpack
from vmm_kvm.boot.source import BytesSource, FileSource
from vmm_kvm.errors import BootError
from vmm_kvm.log import Log

log = Log(__name__)

_GAP = 16 * PAGE_SIZE
"""Shorter runs of zeros are copied: one more segment costs more."""
_EHDR64 = struct.Struct("<16sHHIQQQIHHHHHH")
_PHDR64 = struct.Struct("<IIQQQQQQ")
_IDENT64 = MAGIC + b"\x02\x01\x01" + bytes(9)


def find_vmlinux(
    image: FileSource, offset: int, size: int, limit: int, cache: Kernels | None
) -> Elf | None:
    """Return the executable that the payload, `size` bytes at `offset` of `image`, unpacks to.

    It occupies at most `limit` bytes, in the file as in memory. None if the payload is in a format
    that only the kernel's own decompressor knows, or is not a 64-bit executable.

    Raises:
        BootError: the payload is damaged, or the image cannot be read.
    """
    if size < MAGIC_SIZE:
        return None
    kind = payload_format(image.read(offset, MAGIC_SIZE))
    if kind is None:
        log.debug("%s: payload in an unknown format", image.name)
        return None
    if cache is not None and (kernel := cache.find(image)) is not None:
        return _executable(kernel)
    data = image.read(offset, size)
    digest = ""
    if cache is not None:
        import hashlib  # noqa: PLC0415 - not needed by a start that finds its kernel

        digest = hashlib.sha256(data).hexdigest()
        if (kernel := cache.find_digest(image, digest)) is not None:
            return _executable(kernel)
    try:
        vmlinux = unpack(image.name, data, limit)
    except CodecMissingError as err:
        log.debug("%s: %s", image.name, err)
        return None
    elf = _executable(BytesSource(image.name, vmlinux))
    if elf is not None and cache is not None:
        cache.keep(image, digest, trim(elf, vmlinux))
    return elf


def _executable(source: BytesSource | FileSource) -> Elf | None:
    """Return the executable in `source` if it is what can be entered directly."""
    try:
        elf = read_elf(source)
        check_high(elf)
    except BootError as err:
        log.debug("%s", err)
        return None
    if not elf.is_64 or elf.machine != EM_X86_64 or elf.type != ET_EXEC:
        log.debug("%s: not a 64-bit executable inside", source.name)
        return None
    if not elf.holds_physical(elf.entry):
        log.debug("%s: entered at %#x, outside its segments", source.name, elf.entry)
        return None
    return elf


def trim(elf: Elf, data: bytes) -> list[bytes | memoryview]:
    """Return the pieces of an executable that loads the same as `elf`, whose file is `data`.

    It has neither sections nor notes nor, within its segments, long runs of zeros; a segment that
    is larger in memory than in the file stands for those at the end.
    """
    segments: list[ElfSegment] = []
    for segment in elf.loads:
        extents = list(_extents(data, segment.offset, segment.file_size))
        if not extents or extents[0][0] > 0:
            # The first page stays, so that the segment still begins where it began.
            extents.insert(0, (0, min(PAGE_SIZE, segment.file_size)))
        for index, (start, size) in enumerate(extents):
            is_last = index == len(extents) - 1
            segments.append(
                ElfSegment(
                    PT_LOAD,
                    segment.flags,
                    segment.offset + start,
                    segment.vaddr + start,
                    segment.paddr + start,
                    size,
                    segment.memory_size - start if is_last else size,
                    PAGE_SIZE,
                )
            )
    at = align_up(_EHDR64.size + len(segments) * _PHDR64.size, PAGE_SIZE)
    head = bytearray(at)
    _EHDR64.pack_into(
        head, 0, _IDENT64, ET_EXEC, EM_X86_64, 1, elf.entry, _EHDR64.size, 0, 0, _EHDR64.size,
        _PHDR64.size, len(segments), 0, 0, 0,
    )  # fmt: skip
    pieces: list[bytes | memoryview] = [bytes(head)]
    view = memoryview(data)
    for index, segment in enumerate(segments):
        padding = align_up(segment.file_size, PAGE_SIZE) - segment.file_size
        _PHDR64.pack_into(
            head, _EHDR64.size + index * _PHDR64.size, PT_LOAD, segment.flags, at, segment.vaddr,
            segment.paddr, segment.file_size, segment.memory_size, PAGE_SIZE,
        )  # fmt: skip
        pieces += [view[segment.offset : segment.offset + segment.file_size], bytes(padding)]
        at += segment.file_size + padding
    pieces[0] = bytes(head)
    return pieces


def _extents(data: bytes, offset: int, size: int) -> Iterator[tuple[int, int]]:
    """Yield (start, bytes) of the data that are not zero in `size` bytes at `offset`."""
    zeros = bytes(MIB)
    start = end = 0
    at = 0
    while at < size:
        # Long runs of zeros first, then page by page.
        step = min(MIB, size - at)
        if data[offset + at : offset + at + step] == zeros[:step]:
            at += step
            continue
        for page in range(at, at + step, PAGE_SIZE):
            length = min(PAGE_SIZE, size - page)
            if data[offset + page : offset + page + length] == zeros[:length]:
                continue
            if page - end > _GAP and end > start:
                yield start, end - start
                start = page
            elif end == start:
                start = page
            end = page + length
        at += step
    if end > start:
        yield start, end - start
