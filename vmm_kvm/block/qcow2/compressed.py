"""Compressed clusters: their places, and their contents.

Source: qcow2 specification, "Compressed Clusters Descriptor".
"""

import errno
import zlib
from typing import Protocol

from vmm_kvm.block.file import HostFile
from vmm_kvm.block.image import LastingError
from vmm_kvm.block.qcow2.header import Compression, Header
from vmm_kvm.errors import ImageError

_SECTOR_SIZE = 512
_CACHE_BYTES = 4 << 20
_WINDOW_MAX = 8 << 20  # zstd: images with clusters of 2 MiB need no more memory


class _Unpack(Protocol):
    def __call__(self, data: bytearray, size: int) -> bytes:
        """Return at most `size` bytes of what `data` begins with."""


class CompressedClusters:
    """Unpacks the compressed clusters of one image, and remembers the latest."""

    def __init__(self, file: HostFile, header: Header) -> None:
        """Read from `file`.

        Raises:
            ImageError: the decompressor is not installed.
        """
        self._file = file
        self._cluster_size = header.cluster_size
        self._cluster_bits = header.cluster_bits
        self._size_shift = 62 - (header.cluster_bits - 8)
        self._unpack = _unpacker(header.compression, file.name)
        self._cache: dict[int, bytes] = {}
        self._cache_max = max(_CACHE_BYTES >> header.cluster_bits, 2)

    def extent(self, entry: int) -> tuple[int, int]:
        """Return where the data of an L2 entry begin in the file, and how long they may be."""
        offset = entry & ((1 << self._size_shift) - 1)
        sectors = (entry >> self._size_shift & ((1 << (62 - self._size_shift)) - 1)) + 1
        return offset, sectors * _SECTOR_SIZE - offset % _SECTOR_SIZE

    def clusters(self, entry: int) -> tuple[int, int]:
        """Return the host clusters that an L2 entry refers to: first, how many."""
        offset, size = self.extent(entry)
        first = offset >> self._cluster_bits
        return first, (offset + size - 1 >> self._cluster_bits) - first + 1

    def read(self, entry: int) -> bytes:
        """Return the cluster of an L2 entry.

        Raises:
            OSError: it cannot be read, or EIO: it does not unpack to a cluster.
        """
        data = self._cache.get(entry)
        if data is None:
            data = self._unpack(self._file.read(*self.extent(entry)), self._cluster_size)
            if len(data) != self._cluster_size:
                raise LastingError(errno.EIO, "a compressed cluster is corrupt")
            if len(self._cache) >= self._cache_max:
                del self._cache[next(iter(self._cache))]
            self._cache[entry] = data
        return data

    def forget(self, entry: int) -> None:
        """Forget a cluster that is released: its place in the file may be used anew."""
        self._cache.pop(entry, None)


def _unpacker(compression: Compression, name: str) -> _Unpack:
    if compression is Compression.ZLIB:
        return _unpack_deflate
    try:
        import zstandard  # noqa: PLC0415 - only some images need it
    except ImportError:
        raise ImageError(f"{name}: zstandard, to read compressed clusters, is missing") from None
    decompressor = zstandard.ZstdDecompressor(max_window_size=_WINDOW_MAX)

    def unpack_zstd(data: bytearray, size: int) -> bytes:
        try:
            with decompressor.stream_reader(data, read_across_frames=False) as reader:
                return reader.read(size)
        except zstandard.ZstdError as err:
            raise LastingError(errno.EIO, f"a compressed cluster is corrupt: {err}") from err

    return unpack_zstd


def _unpack_deflate(data: bytearray, size: int) -> bytes:
    try:
        return zlib.decompressobj(-zlib.MAX_WBITS).decompress(data, size)
    except zlib.error as err:
        raise LastingError(errno.EIO, f"a compressed cluster is corrupt: {err}") from err
