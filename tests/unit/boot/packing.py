"""Payloads packed as the kernel's build packs them."""

from __future__ import annotations

import bz2
import gzip
import lzma
import struct
from collections.abc import Callable, Mapping

import lz4.block
import zstandard


def _sized(packed: bytes, data: bytes) -> bytes:
    return packed + struct.pack("<I", len(data))


def _lzma(data: bytes) -> bytes:
    return lzma.compress(data, format=lzma.FORMAT_ALONE)


def _xz(data: bytes) -> bytes:
    filters = [{"id": lzma.FILTER_X86}, {"id": lzma.FILTER_LZMA2, "dict_size": 1 << 20}]
    return lzma.compress(data, check=lzma.CHECK_CRC32, filters=filters)


def _lz4(data: bytes) -> bytes:
    packed = b"\x02\x21\x4c\x18"
    for at in range(0, len(data), 8 << 20):
        block: bytes = lz4.block.compress(data[at : at + (8 << 20)], store_size=False)
        packed += struct.pack("<I", len(block)) + block
    return packed


def _zstd(data: bytes) -> bytes:
    # As the kernel's build does: from a pipe, so that the frame does not know its size.
    compressor = zstandard.ZstdCompressor(level=3).compressobj()
    return compressor.compress(data) + compressor.flush()


PACKERS: Mapping[str, Callable[[bytes], bytes]] = {
    "gzip": lambda data: gzip.compress(data, mtime=0),
    "xz": lambda data: _sized(_xz(data), data),
    "lzma": lambda data: _sized(_lzma(data), data),
    "bzip2": lambda data: _sized(bz2.compress(data), data),
    "LZ4": lambda data: _sized(_lz4(data), data),
    "zstd": lambda data: _sized(_zstd(data), data),
}
