"""Long indirect tables taken as a whole: the same as following each descriptor, or nothing."""

from __future__ import annotations

import errno
import mmap
import os
import struct
import tempfile
from ctypes import addressof, c_char
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.virtio_driver import INDIRECT, DriverQueue, PlainMemory
from vmm_kvm.block.file import HostFile
from vmm_kvm.block.image import Format
from vmm_kvm.errors import GuestError, GuestMemoryError
from vmm_kvm.images.opening import open_image
from vmm_kvm.scatter import Scatter, total
from vmm_kvm.virtio import abi
from vmm_kvm.virtio.abi import VRING_DESC_F_INDIRECT, VRING_DESC_F_NEXT, VRING_DESC_F_WRITE
from vmm_kvm.virtio.blk import VirtioBlk
from vmm_kvm.virtio.chain import LONG_MAX, LONG_MIN, Chain, Span
from vmm_kvm.virtio.queue import Virtqueue

NEXT, WRITE = VRING_DESC_F_NEXT, VRING_DESC_F_WRITE
MEMORY_SIZE = 1 << 17
TABLE_AT = 0x8000
HIGH = 1 << 32
Entry = tuple[int, int, int, int]

# Here sums of an address and a length are largest, or pass an end by one.
ADDRESSES = st.one_of(
    st.integers(0, MEMORY_SIZE),
    st.integers(MEMORY_SIZE - 3, MEMORY_SIZE + 3),
    st.sampled_from([(1 << 64) - 1, (1 << 64) - 4096, HIGH, HIGH - 1, 1 << 63]),
)
LENGTHS = st.one_of(st.integers(0, 4096), st.sampled_from([0, 1, 1 << 31, (1 << 32) - 1]))
PIECES = st.tuples(st.integers(0, MEMORY_SIZE - 4096), st.integers(1, 4096))


class HighMemory:
    """Memory with as much at 4 GiB as at 0."""

    def __init__(self) -> None:
        self.low, self.high = PlainMemory(MEMORY_SIZE), PlainMemory(MEMORY_SIZE)
        self.bytes = self.low.bytes
        self.writes = self.low.writes

    def view(self, gpa: int, size: int) -> memoryview:
        """Return a view of `size` bytes at `gpa`."""
        return self.high.view(gpa - HIGH, size) if gpa >= HIGH else self.low.view(gpa, size)


def entries(
    pieces: list[tuple[int, int]], *, is_writable: bool, start: int = 0, header: int = 16
) -> list[Entry]:
    """Return the table of a request: header, pieces, status."""
    flags = NEXT | WRITE if is_writable else NEXT
    return [
        (start + 0x100, header, NEXT, 1),
        *((start + at, size, flags, n + 2) for n, (at, size) in enumerate(pieces)),
        (start + 0x200, 1, WRITE, 0),
    ]


def pack(table: list[Entry]) -> bytes:
    """Return a table as the driver writes it."""
    return b"".join(struct.pack("<QIHH", *entry) for entry in table)


def pop(memory: PlainMemory | HighMemory, table: list[Entry], *, with_pieces: bool) -> Chain:
    """Have a device take a request with this indirect table."""
    low = memory.low if isinstance(memory, HighMemory) else memory
    driver = DriverQueue(low)
    data = pack(table)
    low.bytes[TABLE_AT : TABLE_AT + len(data)] = data
    driver.describe(0, (TABLE_AT, len(data), VRING_DESC_F_INDIRECT, 0))
    driver.make_available(0)
    chain = Virtqueue(memory, driver.ring, INDIRECT).pop(with_pieces=with_pieces)
    assert chain is not None
    return chain


def places(chain: Chain) -> list[list[tuple[int, int]]]:
    """Return the addresses of all buffers."""
    chain.spread()
    lists = chain.readable, chain.writable
    return [[(addressof(c_char.from_buffer(one)), len(one)) for one in part] for part in lists]


def outcome(memory: PlainMemory | HighMemory, table: list[Entry], *, with_pieces: bool) -> object:
    """Return the addresses of the buffers, or the error."""
    try:
        return places(pop(memory, table, with_pieces=with_pieces))
    except GuestError as err:
        return str(err)


@given(
    st.lists(PIECES, min_size=LONG_MIN, max_size=40),
    st.booleans(),
    st.none() | st.tuples(st.integers(-2, LONG_MIN), st.integers(0, 3), st.data()),
)
def test_a_table_is_what_its_descriptors_are(
    pieces: list[tuple[int, int]],
    is_writable: bool,
    fault: tuple[int, int, st.DataObject] | None,
) -> None:
    """With anything in one descriptor, the request or error is that of following them."""
    table = entries(pieces, is_writable=is_writable)
    if fault:
        number, field, data = fault
        values = (ADDRESSES, LENGTHS, st.integers(0, 15), st.integers(0, 60))[field]
        entry = list(table[number])
        entry[field] = data.draw(values)
        table[number] = (entry[0], entry[1], entry[2], entry[3])
    memory = PlainMemory(MEMORY_SIZE)
    assert outcome(memory, table, with_pieces=True) == outcome(memory, table, with_pieces=False)


@given(st.binary(min_size=16 * LONG_MIN, max_size=16 * 40), st.integers(0, 15))
def test_noise(noise: bytes, start: int) -> None:
    """A table of random bytes is not taken, and does no harm."""
    memory = PlainMemory(MEMORY_SIZE)
    noise = noise[: len(noise) // 16 * 16]
    assert Span(memory.view(0, MEMORY_SIZE), start << 30).divide(0, noise) is None


@given(
    st.lists(st.tuples(ADDRESSES, LENGTHS), min_size=LONG_MIN, max_size=LONG_MIN + 3),
    st.sampled_from([0, 0x3000, HIGH]),
)
def test_only_what_lies_inside_is_taken(pieces: list[tuple[int, int]], start: int) -> None:
    """A span has all pieces from its first byte to its last, none of them empty, or fails."""
    size = 0x2000
    view = memoryview(bytearray(size))
    table = entries(pieces, is_writable=True)
    table[0] = (start, 16, NEXT, 1)
    table[-1] = (start + size - 1, 1, WRITE, 0)
    found = Span(view, start).divide(0, pack(table))
    inside = all(start <= at and at + length <= start + size and length for at, length in pieces)
    assert (found is not None) == inside


@pytest.mark.parametrize("start", [0, HIGH])
@pytest.mark.parametrize("is_writable", [False, True])
def test_usual_requests_are_taken_as_tables(start: int, is_writable: bool) -> None:
    """A table in low or high memory is taken; one in both is not, and is followed."""
    memory = HighMemory()
    pieces = [(0x1000 * number, 0x1000) for number in range(3, 28)]
    table = entries(pieces, is_writable=is_writable, start=start)
    chain = pop(memory, table, with_pieces=True)
    assert chain.pieces is not None
    assert chain.pieces.is_writable == is_writable
    assert chain.pieces.size == total(chain.pieces) == 25 * 0x1000
    assert len(chain.pieces) == 25
    assert len(chain.readable) == len(chain.writable) == 1
    expected = outcome(memory, table, with_pieces=False)
    assert places(chain) == expected
    table[5] = (table[5][0] ^ HIGH, *table[5][1:])
    mixed = pop(memory, table, with_pieces=True)
    assert mixed.pieces is None
    assert len(mixed.readable) + len(mixed.writable) == 27


def test_the_longest_table() -> None:
    """256 descriptors are taken, even if all pieces have different sizes."""
    memory = PlainMemory(MEMORY_SIZE)
    pieces = [(64 * number, number % 1000 + 1) for number in range(LONG_MAX - 2)]
    found = Span(memory.view(0, MEMORY_SIZE), 0).divide(0, pack(entries(pieces, is_writable=True)))
    assert found is not None
    assert found.pieces is not None
    assert found.pieces.size == sum(size for _, size in pieces)
    assert [len(view) for view in found.pieces] == [size for _, size in pieces]


@pytest.mark.parametrize("number", [0, 3, -1])
@pytest.mark.parametrize("flags", range(16))
def test_flags_of_any_descriptor(number: int, flags: int) -> None:
    """Header, pieces and status are recognised by their flags, or the request is refused."""
    table = entries([(0x1000, 0x1000)] * LONG_MIN, is_writable=True)
    is_right = flags == table[number][2]
    table[number] = (*table[number][:2], flags, table[number][3])
    assert (Span(memoryview(bytearray(0x3000)), 0).divide(0, pack(table)) is not None) == is_right


def test_a_wrong_link_is_no_length() -> None:
    """In memory so large that flags could count as a length inside it, a wrong link fails."""
    fd = os.memfd_create("large")
    os.ftruncate(fd, 12 << 30)
    span = Span(memoryview(mmap.mmap(fd, 12 << 30)), 0)
    os.close(fd)
    table = entries([(0x1000, 0x1000)] * LONG_MIN, is_writable=True)
    assert span.divide(0, pack(table)) is not None
    table[3] = (*table[3][:2], table[3][2] ^ NEXT, table[3][3])
    assert span.divide(0, pack(table)) is None


@pytest.mark.parametrize("is_writable", [False, True])
def test_longer_tables_are_followed(is_writable: bool) -> None:
    """More descriptors than can be taken as a whole give the same buffers by following."""
    memory = PlainMemory(MEMORY_SIZE)
    table = entries([(64 * n, n % 64 + 1) for n in range(LONG_MAX - 1)], is_writable=is_writable)
    chain = pop(memory, table, with_pieces=True)
    assert chain.pieces is None
    assert len(chain.readable) + len(chain.writable) == LONG_MAX + 1


def test_any_number_of_kinds_of_tables() -> None:
    """A driver that never repeats a table costs no more memory than others."""
    memory = PlainMemory(MEMORY_SIZE)
    span = Span(memory.view(0, MEMORY_SIZE), 0)
    for size in range(1, 700):
        pieces = [(0x1000 + size, size)] * LONG_MIN
        found = span.divide(0, pack(entries(pieces, is_writable=False)))
        assert found is not None
        assert found.pieces is not None
        assert found.pieces.size == size * LONG_MIN
    assert len(span._kinds) <= 64
    assert len(span._recent) <= 64


@given(st.lists(st.lists(PIECES, min_size=LONG_MIN, max_size=LONG_MIN + 2), max_size=4), st.data())
def test_tables_that_come_again(kinds: list[list[tuple[int, int]]], data: st.DataObject) -> None:
    """The pieces are those of this table, after an equal or nearly equal one."""
    memory = PlainMemory(MEMORY_SIZE)
    span = Span(memory.view(0, MEMORY_SIZE), 0)
    kinds.append([(0x1000, 0x1000)] * LONG_MIN)
    kinds += [[*pieces[:-1], (pieces[-1][0], 1)] for pieces in kinds]
    for _ in range(8):
        pieces = data.draw(st.sampled_from(kinds))
        is_writable = data.draw(st.booleans())
        found = span.divide(0, pack(entries(pieces, is_writable=is_writable)))
        assert found is not None
        assert found.pieces is not None
        assert found.pieces.is_writable == is_writable
        start = addressof(c_char.from_buffer(memory.bytes))
        assert [
            (addressof(c_char.from_buffer(view)) - start, len(view)) for view in found.pieces
        ] == pieces


# The kernel's part


@pytest.fixture
def scatter() -> tuple[bytearray, Scatter]:
    """Return memory, and ten pieces of it in reverse order, of 100 bytes each."""
    data = bytearray(4096)
    address = addressof(c_char.from_buffer(data))
    iovecs = b"".join(struct.pack("<QQ", address + 3900 - 300 * n, 100) for n in range(10))
    return data, Scatter(memoryview(data), address, iovecs, 1000, is_writable=True)


def test_views_of_pieces(scatter: tuple[bytearray, Scatter]) -> None:
    """A scatter list is a sequence of views of its pieces."""
    data, pieces = scatter
    pieces[1][0] = 7
    assert data[3600] == 7
    assert [len(piece) for piece in pieces] == [100] * 10
    assert [len(piece) for piece in pieces[8:]] == [100, 100]
    assert len(pieces) == 10
    assert total(pieces) == total(list(pieces)) == 1000


def test_a_file_is_read_and_written(scatter: tuple[bytearray, Scatter]) -> None:
    """Reads past the end of the file yield zeros; every written byte is in the file."""
    data, pieces = scatter
    with tempfile.TemporaryFile() as plain:
        content = bytes(number % 251 for number in range(950))
        plain.write(content)
        plain.flush()
        file = HostFile(os.dup(plain.fileno()), "x", is_read_only=False)
        data[:] = b"\xff" * len(data)
        file.readv(20, pieces)
        assert b"".join(pieces) == content[20:] + bytes(70)
        assert data.count(0xFF) >= 4096 - 1000
        file.writev(2000, pieces)
        assert file.read(2000, 1000) == b"".join(pieces)
        assert file.end == 3000
        file.close()


def test_faults_of_the_file(scatter: tuple[bytearray, Scatter], tmp_path: Path) -> None:
    """A fault has the kernel's error number."""
    _, pieces = scatter
    path = tmp_path / "file"
    path.write_bytes(b"content")
    fd = os.open(path, os.O_RDONLY)
    with pytest.raises(OSError, match="descriptor") as caught:
        pieces.write_to(fd, 0)
    assert caught.value.errno == errno.EBADF
    os.close(fd)
    with pytest.raises(OSError, match="descriptor"):
        pieces.read_from(fd, 0)
    full = os.open("/dev/full", os.O_WRONLY)
    with pytest.raises(OSError, match="space"):
        pieces.write_to(full, 0)
    os.close(full)


@pytest.mark.parametrize("header", [16, 8])
@pytest.mark.parametrize("count", [1, LONG_MIN - 3, LONG_MIN - 2, 64])
def test_a_disk_serves_them(count: int, header: int, tmp_path: Path) -> None:
    """Requests of any length read and write the same bytes, wherever their header ends."""
    path = tmp_path / "disk"
    content = os.urandom(1 << 19)
    path.write_bytes(content)
    fd = os.open(path, os.O_RDWR)
    disk = VirtioBlk(open_image(fd, Format.RAW, read_only=False, name="disk"), name="disk")
    memory = PlainMemory(1 << 19)
    driver = DriverQueue(memory)
    queue = driver.device(memory, INDIRECT)
    pieces = [(0x20000 + 0x1000 * (count - number), 512) for number in range(count)]
    expected = bytearray(content)
    for kind, sector in ((abi.VIRTIO_BLK_T_IN, 3), (abi.VIRTIO_BLK_T_OUT, 100)):
        head = struct.pack("<IIQ", kind, 0, sector)
        is_writable = kind == abi.VIRTIO_BLK_T_IN
        buffers = [(at, size, is_writable) for at, size in pieces]
        memory.bytes[0x100:0x110] = head
        first = [(0x100, 16, False)]
        if header != 16:
            first = [(0x100, header, False), (0x100 + header, 16 - header, False)]
        driver.add_indirect(TABLE_AT, *first, *buffers, (0x200, 1, True))
        memory.bytes[0x200] = 0xEE
        queue.disable_kicks()
        disk.process(0, queue)
        assert memory.bytes[0x200] == abi.VIRTIO_BLK_S_OK
        data = b"".join(memory.bytes[at : at + size] for at, size in pieces)
        assert driver.used()[0][1] == (len(data) + 1 if is_writable else 1)
        # With a header in two parts, all buffers to write are of one kind, and so is the rest.
        is_table = len(first) + count + 1 >= LONG_MIN and (len(first) == 1 or not is_writable)
        assert queue.is_streaming == is_table
        queue.disable_kicks()
        assert not queue.is_streaming
        if is_writable:
            assert data == content[3 * 512 : (3 + count) * 512]
        else:
            expected[100 * 512 : (100 + count) * 512] = data
    disk.close()
    assert path.read_bytes() == expected


def test_memory_that_is_not_there() -> None:
    """In memory without anything at 0, no table is taken as a whole."""

    class Far(PlainMemory):
        def view(self, gpa: int, size: int) -> memoryview:
            if gpa < HIGH * 2:
                raise GuestMemoryError(gpa, size)
            return super().view(gpa - HIGH * 2, size)

    far = Far(MEMORY_SIZE)
    driver = DriverQueue(far)
    table = entries([(0x1000, 16)] * 20, is_writable=True, start=HIGH * 2)
    data = pack(table)
    far.bytes[TABLE_AT : TABLE_AT + len(data)] = data
    driver.describe(0, (HIGH * 2 + TABLE_AT, len(data), VRING_DESC_F_INDIRECT, 0))
    driver.make_available(0)
    ring = driver.ring._replace(
        descriptors=HIGH * 2 + driver.ring.descriptors,
        available=HIGH * 2 + driver.ring.available,
        used=HIGH * 2 + driver.ring.used,
    )
    chain = Virtqueue(far, ring, INDIRECT).pop(with_pieces=True)
    assert chain is not None
    assert chain.pieces is None
    assert len(chain.writable) == 21
