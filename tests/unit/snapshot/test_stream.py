"""A machine through a pipe: whole, or refused in one line."""

from __future__ import annotations

import hashlib
import struct
import zlib
from pathlib import Path

import pytest

from tests.unit.snapshot.samples import (
    MANIFEST,
    STATE,
    STATE_BYTES,
    Buffer,
    contents,
    empty,
    filled,
    stream,
)
from vmm_kvm.bits import MIB, PAGE_SIZE
from vmm_kvm.errors import SnapshotError
from vmm_kvm.snapshot import state as states
from vmm_kvm.snapshot.state import State
from vmm_kvm.snapshot.stream import StreamReader, head, parse_head, write_stream

GOLDEN = Path(__file__).with_name("golden.stream")
WRITTEN = "41e484a5eb956c195981ab819c42279370614880d168bc1c641cbf7d26c95c19"
RECORD = struct.Struct("<BxxxIQQ")
HEADER = len(stream()) - 32 - RECORD.size - 3 * RECORD.size - 2 * PAGE_SIZE - 8192
"""Bytes before the first record."""


def read(data: bytes, most: int = 1 << 20) -> list[bytes]:
    """Read a stream into memory; return the memory's contents."""
    reader = StreamReader(Buffer(data, most))
    with empty() as memory:
        assert reader.read_state() == STATE_BYTES
        reader.read_ram(memory)
        return contents(memory)


def refusal(data: bytes) -> str:
    """Return the refusal of a stream."""
    with pytest.raises(SnapshotError) as caught:
        read(data)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("compresses", [False, True])
@pytest.mark.parametrize("most", [1, 1 << 20])
def test_what_is_sent_is_received(compresses: bool, most: int) -> None:
    """Memory, state and manifest arrive unchanged, in pieces of any size."""
    data = stream(compresses=compresses)
    with filled() as memory:
        wanted = contents(memory)
    assert read(data, most) == wanted
    assert StreamReader(Buffer(data)).manifest == MANIFEST


def test_a_stream_of_the_first_version_is_read() -> None:
    """The stream kept with the tests is read, and the written form stays the same."""
    assert hashlib.sha256(stream()).hexdigest() == WRITTEN
    with filled() as memory:
        assert read(GOLDEN.read_bytes()) == contents(memory)


def test_zeros_are_not_sent() -> None:
    """A stream has the pages with contents, and hardly more."""
    assert len(stream()) == HEADER + 4 * RECORD.size + 4 * PAGE_SIZE + 32
    assert len(stream(compresses=True)) < HEADER + 1500


def test_another_reader_may_have_read_the_manifest() -> None:
    """A reader continues after the manifest that another one has read."""
    buffer = Buffer(stream())
    text = StreamReader(buffer).text
    reader = StreamReader(buffer, text)
    with empty() as memory, filled() as wanted:
        assert reader.read_state() == STATE_BYTES
        reader.read_ram(memory)
        assert contents(memory) == contents(wanted)
    assert buffer.position == len(buffer.data)


def test_nothing_behind_the_checksum_is_read() -> None:
    """Data after a stream stay in the pipe."""
    buffer = Buffer(stream() + b"next")
    reader = StreamReader(buffer)
    reader.read_state()
    with empty() as memory:
        reader.read_ram(memory)
    assert buffer.data[buffer.position :] == b"next"


def test_a_stream_that_breaks_off_is_refused() -> None:
    """A stream that breaks off anywhere is refused."""
    data = stream()
    for end in (0, 5, 12, 40, HEADER - 1, HEADER, HEADER + 5, HEADER + 100, len(data) - 1):
        assert refusal(data[:end]).endswith("the stream ends too early")


def test_a_damaged_stream_is_refused() -> None:
    """A flipped bit in memory fails the checksum."""
    data = bytearray(stream())
    data[HEADER + RECORD.size + 7] ^= 1
    assert refusal(bytes(data)) == "the checksum is wrong: the stream is damaged"


def test_what_is_no_stream_is_refused() -> None:
    """Other data are refused in OpenBSD's words, and so is an older OpenBSD's dump."""
    assert refusal(b"OpenBSDVMM58".ljust(4096, b"\0")) == "incompatible dump signature"


@pytest.mark.parametrize(
    ("record", "body", "message"),
    [
        ((1, 4096, 3 * MIB, 4096), b"", "a record of 4096 bytes at 0x300000: outside RAM"),
        ((1, 8192, 2 * MIB - 4096, 8192), b"", "8192 bytes at 0x1ff000: outside RAM"),
        ((1, 4096, (1 << 64) - 4096, 4096), b"", "outside RAM"),
        ((1, 0, 0, 0), b"", "a record of 0 bytes at 0x0: out of place"),
        ((1, 2 * MIB, 0, 2 * MIB), b"", "a record of 2097152 bytes at 0x0: out of place"),
        ((1, 5, 0, 4096), b"", "a record that is none"),
        ((3, 4096, 0, 4096), b"", "a record that is none"),
        ((2, 4096, 0, 4096), b"", "a record that is none"),
        ((0, 1, 0, 0), b"", "a record that is none"),
        ((2, 4, 0, 4096), b"junk", "incorrect header check"),
        ((2, 1037, 0, 4096), zlib.compress(bytes(MIB)), "a compressed record of another size"),
        ((2, 12, 0, 8192), zlib.compress(b"\0\0\0\0"), "a compressed record of another size"),
    ],
)
def test_a_record_out_of_place_is_refused(
    record: tuple[int, int, int, int], body: bytes, message: str
) -> None:
    """No record writes outside RAM, or yields more bytes than it announces."""
    assert message in refusal(stream()[:HEADER] + RECORD.pack(*record) + body)


def test_records_go_forward() -> None:
    """No byte of RAM is written twice: a stream is at most as long as memory."""
    one = RECORD.pack(1, 4096, 4096, 4096) + bytes(4096)
    assert refusal(stream()[:HEADER] + one + one).endswith("at 0x1000: out of place")


def test_a_promise_of_much_state_takes_no_memory() -> None:
    """A stream that announces much state, and ends, is refused for its end."""
    large = MANIFEST._replace(state_size=100 * MIB)
    with pytest.raises(SnapshotError, match="state: the stream ends too early"):
        StreamReader(Buffer(stream(large)[:8000])).read_state()


def test_private_memory_and_files_are_read_alike() -> None:
    """Memory in a file, whose holes are known, makes the same stream as private memory."""
    one, other = Buffer(), Buffer()
    with filled() as shared, filled(is_private=True) as private:
        write_stream(one, MANIFEST, STATE_BYTES, shared)
        write_stream(other, MANIFEST, STATE_BYTES, private)
    assert one.data == other.data


def test_state_is_bytes_and_comes_back() -> None:
    """Parts and KVM's structures are read back unchanged."""
    assert states.decode(STATE_BYTES) == STATE
    assert states.decode(states.encode(State({}, {}))) == State({}, {})


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"\0", "state: cut short"),
        (b"\xff\xff\xff\xff", "state: cut short"),
        (b"\x02\0\0\0{}", "state: parts: no object"),
        (b'\x17\0\0\0{"parts":[],"blobs":[]}', "state: parts: no object"),
        (b'\x1c\0\0\0{"parts":{},"blobs":[["a"]]}', "state: blobs: 0: 1 long, not 2"),
        (states.encode(State({}, {"a": b"1"}))[:-1], "state: blob 'a': cut short"),
        (states.encode(State({}, {"a": b"1"})) + b"2", "state: bytes behind the last blob"),
    ],
)
def test_state_that_is_none_is_refused(data: bytes, message: str) -> None:
    """State that is cut short, or malformed, is refused in one line."""
    with pytest.raises(SnapshotError) as caught:
        states.decode(data)
    assert message in str(caught.value)


LEFT = head(MANIFEST) + STATE_BYTES
"""What a clone continues from, besides RAM."""


def test_what_is_left_for_clones_is_read() -> None:
    """Manifest and state come out of it unchanged, and the state as views."""
    manifest, state = parse_head(memoryview(LEFT))
    assert (manifest, states.decode(state)) == (MANIFEST, STATE)


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (b"", "header: the stream ends too early"),
        (LEFT[:11], "header: the stream ends too early"),
        (b"X" + LEFT[1:], "incompatible dump signature"),
        (LEFT[:13], "manifest: the stream ends too early"),
        (LEFT[:8] + b"\xff" * 4 + LEFT[12:], "manifest: 4294967295 bytes, at most 65536 are"),
        (LEFT[:-1], f"state: {len(STATE_BYTES) - 1} bytes, not {len(STATE_BYTES)}"),
        (LEFT + b"\0", f"state: {len(STATE_BYTES) + 1} bytes, not {len(STATE_BYTES)}"),
    ],
)
def test_what_is_left_for_clones_and_damaged_is_refused(data: bytes, text: str) -> None:
    """In one line."""
    with pytest.raises(SnapshotError) as caught:
        parse_head(memoryview(data))
    assert str(caught.value).startswith(text)
