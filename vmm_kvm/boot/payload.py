"""Unpack the compressed kernel inside a bzImage.

The formats are those of the kernel's own build: gzip, xz, lzma, bzip2, LZ4 in its legacy frame,
zstd. Its size when unpacked is known before, from the last four bytes of the payload, and bounded
by the caller; nothing here allocates more than that, whatever the payload claims. Each codec is
loaded when it is needed, so that a start that finds its kernel in the cache loads none.
"""

import struct
from collections.abc import Callable
from typing import Protocol

from vmm_kvm.errors import BootError

_LZ4_LEGACY_MAGIC = b"\x02\x21\x4c\x18"
_LZ4_LEGACY_CHUNK = 8 << 20
_LZMA_MEMORY_MAX = 256 << 20  # the dictionary is at most as large as the kernel
_ZSTD_WINDOW_MAX = 128 << 20  # what `zstd --ultra -22` uses

MAGIC_SIZE = 6
_U32 = struct.Struct("<I")


class CodecMissingError(Exception):
    """The library that unpacks this format is not installed."""


class _Decoder(Protocol):
    """The common part of the standard library's decoders."""

    @property
    def eof(self) -> bool:
        """Whether the end of the packed data was seen, and the check sum there was right."""

    def decompress(self, data: bytes, max_length: int = ...) -> bytes:
        """Return at most `max_length` bytes."""


def _decode(decoder: _Decoder, data: bytes, size: int) -> bytes:
    # Asking for one byte more makes the decoder continue to the check sum at the end.
    unpacked = decoder.decompress(data, size + 1)
    if len(unpacked) <= size and not decoder.eof:
        raise ValueError("truncated")
    return unpacked


def _gunzip(data: bytes, size: int) -> bytes:
    import zlib  # noqa: PLC0415 - see the module's docstring

    try:
        return _decode(zlib.decompressobj(zlib.MAX_WBITS | 16), data, size)
    except zlib.error as err:
        raise ValueError(str(err)) from err


def _unxz(data: bytes, size: int) -> bytes:
    import lzma  # noqa: PLC0415 - see the module's docstring

    try:
        return _decode(lzma.LZMADecompressor(memlimit=_LZMA_MEMORY_MAX), data, size)
    except lzma.LZMAError as err:
        raise ValueError(str(err)) from err


def _bunzip2(data: bytes, size: int) -> bytes:
    import bz2  # noqa: PLC0415 - see the module's docstring

    try:
        return _decode(bz2.BZ2Decompressor(), data, size)
    except OSError as err:
        raise ValueError(str(err)) from err


def _unlz4(data: bytes, size: int) -> bytes:
    try:
        import lz4.block  # noqa: PLC0415 - see the module's docstring
    except ImportError as err:
        raise CodecMissingError("the lz4 package is not installed") from err
    view = memoryview(data)
    pieces: list[bytes] = []
    at, left = len(_LZ4_LEGACY_MAGIC), size
    while at < len(data):
        if at + 4 > len(data):
            raise ValueError("truncated")
        (length,) = _U32.unpack_from(data, at)
        at += 4
        if length == 0 or at + length > len(data):
            raise ValueError(f"block of {length} bytes with {len(data) - at} left")
        limit = min(_LZ4_LEGACY_CHUNK, left)
        try:
            piece: bytes = lz4.block.decompress(view[at : at + length], uncompressed_size=limit)
        except lz4.block.LZ4BlockError as err:
            raise ValueError(str(err)) from err
        pieces.append(piece)
        at += length
        left -= len(piece)
    return b"".join(pieces)


def _unzstd(data: bytes, size: int) -> bytes:
    try:
        import zstandard  # noqa: PLC0415 - see the module's docstring
    except ImportError as err:
        raise CodecMissingError("the zstandard package is not installed") from err
    try:
        # The frame may not say how large it is: decode by stream, never past the bound.
        decoder = zstandard.ZstdDecompressor(max_window_size=_ZSTD_WINDOW_MAX)
        with decoder.stream_reader(data) as reader:
            unpacked = bytearray(size + 1)
            filled = 0
            while filled < len(unpacked):
                count = reader.readinto(memoryview(unpacked)[filled:])
                if count == 0:
                    break
                filled += count
    except zstandard.ZstdError as err:
        raise ValueError(str(err)) from err
    return bytes(memoryview(unpacked)[:filled])


# Magic, the format's name, its decoder, and how many bytes the kernel's build appends for the size
# (gzip has it in its own trailer).
_FORMATS: tuple[tuple[bytes, str, Callable[[bytes, int], bytes], int], ...] = (
    (b"\x1f\x8b", "gzip", _gunzip, 0),
    (b"\xfd7zXZ\0", "xz", _unxz, 4),
    (b"BZh", "bzip2", _bunzip2, 4),
    (b"\x5d\0\0", "lzma", _unxz, 4),
    (_LZ4_LEGACY_MAGIC, "LZ4", _unlz4, 4),
    (b"\x28\xb5\x2f\xfd", "zstd", _unzstd, 4),
)


def payload_format(magic: bytes) -> str | None:
    """Return the name of the format that begins with `magic`, or None if it is none of ours."""
    return next((name for start, name, _, _ in _FORMATS if magic.startswith(start)), None)


def unpack(name: str, data: bytes, limit: int) -> bytes:
    """Unpack the payload `data`, whose format is known, to at most `limit` bytes.

    `name` begins error messages.

    Raises:
        BootError: the payload is damaged, or larger than `limit` when unpacked.
        CodecMissingError: a library is not installed.
        Source: Linux arch/x86/boot/compressed/Makefile, scripts/Makefile.lib (size_append).
    """
    kind, decode, appended = next(
        (kind, decode, appended)
        for start, kind, decode, appended in _FORMATS
        if data.startswith(start)
    )
    if len(data) < MAGIC_SIZE + 4:
        raise BootError(f"{name}: {kind} payload: truncated")
    (size,) = _U32.unpack_from(data, len(data) - 4)
    if not 0 < size <= limit:
        raise BootError(
            f"{name}: {kind} payload: unpacks to {size:#x} bytes, not {limit:#x} or less"
        )
    try:
        unpacked = decode(data[: len(data) - appended], size)
    except (ValueError, EOFError, MemoryError) as err:
        reason = " ".join(str(err).split()) or type(err).__name__
        raise BootError(f"{name}: {kind} payload: damaged: {reason}") from err
    if len(unpacked) != size:
        raise BootError(
            f"{name}: {kind} payload: damaged: {len(unpacked):#x} bytes instead of {size:#x}"
        )
    return unpacked
