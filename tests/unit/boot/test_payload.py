"""Payloads: every format the kernel's build knows, whole and damaged."""

from __future__ import annotations

import struct
from contextlib import suppress

import pytest
import zstandard

from tests.unit.boot.images import vmlinux
from tests.unit.boot.packing import PACKERS
from vmm_kvm.boot.payload import payload_format, unpack
from vmm_kvm.errors import BootError

DATA = vmlinux() * 3
LIMIT = 1 << 20


@pytest.mark.parametrize("kind", PACKERS)
def test_unpacks(kind: str) -> None:
    """Each format is recognised by its magic and unpacks to the packed data."""
    packed = PACKERS[kind](DATA)
    assert (kind, DATA) == (payload_format(packed), unpack("k", packed, LIMIT))


def test_several_lz4_blocks() -> None:
    """LZ4's legacy frame is a sequence of blocks of 8 MiB."""
    data = bytes(9 << 20) + DATA
    assert data == unpack("k", PACKERS["LZ4"](data), 16 << 20)


def test_unknown_format() -> None:
    """LZO, which the host cannot unpack, is no known format."""
    assert payload_format(b"\x89LZO\0\r\n\x1a\n") is None


@pytest.mark.parametrize("kind", PACKERS)
def test_exactly_the_limit(kind: str) -> None:
    """The limit itself is allowed, one byte more is not."""
    packed = PACKERS[kind](DATA)
    assert len(DATA) == len(unpack("k", packed, len(DATA)))
    with pytest.raises(BootError, match=rf"^k: {kind} payload: unpacks to 0x\w+ bytes, not"):
        unpack("k", packed, len(DATA) - 1)


@pytest.mark.parametrize("kind", PACKERS)
def test_says_less_than_it_is(kind: str) -> None:
    """A payload that unpacks to more than its header says stops there: no bomb goes off."""
    bomb = PACKERS[kind](bytes(64 << 20))
    bomb = bomb[:-4] + struct.pack("<I", 0x1000)
    with pytest.raises(BootError, match=rf"^k: {kind} payload: damaged: "):
        unpack("k", bomb, LIMIT)


@pytest.mark.parametrize("kind", PACKERS)
def test_says_more_than_it_is(kind: str) -> None:
    """A payload that unpacks to less than its header says is damaged."""
    packed = PACKERS[kind](DATA)[:-4] + struct.pack("<I", len(DATA) + 1)
    with pytest.raises(BootError, match=rf"^k: {kind} payload: damaged: "):
        unpack("k", packed, LIMIT)


@pytest.mark.parametrize("kind", PACKERS)
@pytest.mark.parametrize("keep", [0.1, 0.5, 0.99])
def test_truncated(kind: str, keep: float) -> None:
    """A payload without its middle is damaged, wherever it breaks off."""
    packed = PACKERS[kind](DATA)
    body = packed[: max(8, int((len(packed) - 4) * keep))]
    with pytest.raises(BootError, match=rf"^k: {kind} payload: damaged: "):
        unpack("k", body + struct.pack("<I", len(DATA)), LIMIT)


@pytest.mark.parametrize("kind", PACKERS)
def test_damaged_in_the_middle(kind: str) -> None:
    """Nonsense in a payload is an error, or yields other contents of the same size."""
    packed = bytearray(PACKERS[kind](DATA))
    middle = len(packed) // 2
    packed[middle : middle + 8] = b"\xff" * 8
    with suppress(BootError):
        assert len(DATA) == len(unpack("k", bytes(packed), LIMIT))


def test_only_a_magic() -> None:
    """A payload that is shorter than its own frame is truncated."""
    with pytest.raises(BootError, match=r"^k: LZ4 payload: truncated$"):
        unpack("k", b"\x02\x21\x4c\x18\0\0", LIMIT)


def test_empty_lz4_block() -> None:
    """A block of no bytes, which would never end, is an error."""
    with pytest.raises(BootError, match="block of 0 bytes"):
        unpack("k", b"\x02\x21\x4c\x18" + bytes(64) + struct.pack("<I", 100), LIMIT)


def test_zstd_with_a_huge_window() -> None:
    """A frame that needs more memory than the kernel's own unpacker has is refused."""
    parameters = zstandard.ZstdCompressionParameters(window_log=30, enable_ldm=False)
    compressor = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    packed = compressor.compress(DATA) + compressor.flush() + struct.pack("<I", len(DATA))
    with pytest.raises(BootError, match=r"^k: zstd payload: damaged: "):
        unpack("k", packed, LIMIT)
