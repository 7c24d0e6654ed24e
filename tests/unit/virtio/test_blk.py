"""virtio-blk: right and wrong requests of drivers, on a disk in memory."""

from __future__ import annotations

import errno
import struct
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.virtio_driver import Buffer, DriverQueue, PlainMemory
from vmm_kvm.block.image import LastingError
from vmm_kvm.errors import GuestError, HaltError, HaltReason, VirtqueueError
from vmm_kvm.virtio import abi
from vmm_kvm.virtio.blk import QUEUE_SIZE, VirtioBlk

SIZE = 1 << 20
SECTORS = SIZE // 512
HEADER, DATA, STATUS = 0x8000, 0x10000, 0x9000
OK, IOERR, UNSUPP = abi.VIRTIO_BLK_S_OK, abi.VIRTIO_BLK_S_IOERR, abi.VIRTIO_BLK_S_UNSUPP
IN, OUT, FLUSH = abi.VIRTIO_BLK_T_IN, abi.VIRTIO_BLK_T_OUT, abi.VIRTIO_BLK_T_FLUSH
DISCARD, ZEROES = abi.VIRTIO_BLK_T_DISCARD, abi.VIRTIO_BLK_T_WRITE_ZEROES
NO_STATUS = 0xEE
FLUSH_FEATURE = 1 << abi.VIRTIO_BLK_F_FLUSH


class MemoryImage:
    """An `Image` in memory that records calls; `fault` makes every call fail."""

    def __init__(self, *, is_read_only: bool = False) -> None:
        self.size = SIZE
        self.is_read_only = is_read_only
        self.bytes = bytearray(range(256)) * (SIZE // 256)
        self.calls: list[str] = []
        self.fault: int | None = None
        self.fault_lasts = False

    def _note(self, call: str) -> None:
        self.calls.append(call)
        if self.fault is not None:
            raise (LastingError if self.fault_lasts else OSError)(self.fault, "fault")

    def readv(self, offset: int, buffers: Sequence[memoryview]) -> None:
        """Fill the buffers."""
        self._note("read")
        for buffer in buffers:
            assert offset + len(buffer) <= SIZE
            buffer[:] = self.bytes[offset : offset + len(buffer)]
            offset += len(buffer)

    def writev(self, offset: int, buffers: Sequence[memoryview]) -> None:
        """Take the buffers."""
        self._note("write")
        for buffer in buffers:
            self.bytes[offset : offset + len(buffer)] = buffer
            offset += len(buffer)
        assert len(self.bytes) == SIZE

    def flush(self) -> None:
        """Note it."""
        self._note("flush")

    def discard(self, offset: int, length: int) -> None:
        """Note it."""
        self._note(f"discard {offset}+{length}")

    def write_zeroes(self, offset: int, length: int, *, may_unmap: bool) -> None:
        """Write zeros."""
        self._note(f"zero {offset}+{length} {'unmap' if may_unmap else 'keep'}")
        self.bytes[offset : offset + length] = bytes(length)
        assert len(self.bytes) == SIZE

    def close(self) -> None:
        """Note it."""
        self._note("close")


class Bench:
    """A disk, and a driver with one queue."""

    def __init__(
        self,
        *,
        is_read_only: bool = False,
        features: int = FLUSH_FEATURE,
        stops_at_errors: bool = False,
    ) -> None:
        self.memory = PlainMemory()
        self.image = MemoryImage(is_read_only=is_read_only)
        self.disk = VirtioBlk(
            self.image, name="disk0", serial="serial-0", stops_at_errors=stops_at_errors
        )
        self.disk.start(features)
        self.driver = DriverQueue(self.memory, 16)
        self.queue = self.driver.device(self.memory)

    def serve(self, *buffers: Buffer) -> tuple[int, int]:
        """Make a chain available and serve it; returns the written bytes, and the status."""
        self.memory.bytes[STATUS] = NO_STATUS
        self.driver.add(*buffers)
        self.disk.process(0, self.queue)
        ((_, written),) = self.driver.used()
        return written, self.memory.bytes[STATUS]

    def request(self, kind: int, sector: int, *data: Buffer) -> tuple[int, int]:
        """Serve a request in every driver's usual layout."""
        struct.pack_into("<IIQ", self.memory.bytes, HEADER, kind, 0, sector)
        return self.serve((HEADER, 16, False), *data, (STATUS, 1, True))

    def segments(self, kind: int, *segments: tuple[int, int, int]) -> int:
        """Discard or zero; returns the status."""
        data = b"".join(struct.pack("<QII", *segment) for segment in segments)
        self.memory.bytes[DATA : DATA + len(data)] = data
        return self.request(kind, 0, (DATA, len(data), False))[1]


@pytest.fixture
def bench() -> Bench:
    """A writable disk with a driver that knows FLUSH."""
    return Bench()


def test_read(bench: Bench) -> None:
    """Sectors arrive in the buffers; the length counts the status byte."""
    assert bench.request(IN, 3, (DATA, 512, True), (DATA + 0x1000, 1024, True)) == (1537, OK)
    assert bench.memory.bytes[DATA : DATA + 512] == bench.image.bytes[1536:2048]
    assert bench.memory.bytes[DATA + 0x1000 : DATA + 0x1400] == bench.image.bytes[2048:3072]
    assert bench.image.calls == ["read"]


def test_write(bench: Bench) -> None:
    """Sectors arrive in the image; only the status is written to the guest."""
    bench.memory.bytes[DATA : DATA + 1024] = b"ab" * 512
    assert bench.request(OUT, 5, (DATA, 1024, False)) == (1, OK)
    assert bench.image.bytes[2560:3584] == b"ab" * 512
    assert bench.image.calls == ["write"]


def test_flush(bench: Bench) -> None:
    """FLUSH flushes."""
    assert bench.request(FLUSH, 0) == (1, OK)
    assert bench.image.calls == ["flush"]


def test_a_driver_without_flush_gets_write_through() -> None:
    """For a driver without FLUSH every write is flushed."""
    bench = Bench(features=0)
    bench.request(OUT, 0, (DATA, 512, False))
    bench.segments(ZEROES, (0, 1, 0))
    assert bench.image.calls == ["write", "flush", "zero 0+512 keep", "flush"]


@pytest.mark.parametrize(("room", "expected"), [(20, b"serial-0" + bytes(12)), (4, b"seri")])
def test_identity(bench: Bench, room: int, expected: bytes) -> None:
    """The serial is 20 bytes, or as many as fit."""
    kind = abi.VIRTIO_BLK_T_GET_ID
    assert bench.request(kind, 0, (DATA, room, True)) == (room + 1, OK)
    assert bench.memory.bytes[DATA : DATA + room] == expected


def test_discard_and_zeroes(bench: Bench) -> None:
    """Each segment is done, in order, with its flag."""
    assert bench.segments(DISCARD, (1, 2, 0), (SECTORS - 1, 1, 0)) == OK
    assert bench.segments(ZEROES, (0, 1, 1), (4, 4, 0)) == OK
    assert bench.image.calls == [
        "discard 512+1024",
        f"discard {SIZE - 512}+512",
        "zero 0+512 unmap",
        "zero 2048+2048 keep",
    ]


@pytest.mark.parametrize(
    ("kind", "segments", "status"),
    [
        (DISCARD, [(0, 1, 0), (SECTORS, 1, 0)], IOERR),
        (DISCARD, [(SECTORS - 1, 2, 0)], IOERR),
        (DISCARD, [((1 << 64) - 1, 1, 0)], IOERR),
        (ZEROES, [(0, 0xFFFF_FFFF, 0)], IOERR),
        (DISCARD, [(0, 1, 1)], UNSUPP),
        (ZEROES, [(0, 1, 2)], UNSUPP),
        (ZEROES, [(0, 1, 0)] * 17, IOERR),
        (ZEROES, [], None),
    ],
)
def test_impossible_segments(
    bench: Bench, kind: int, segments: list[tuple[int, int, int]], status: int | None
) -> None:
    """A segment outside the disk, or with an unknown flag, fails the request before any is done."""
    if status is None:
        assert bench.request(kind, 0)[1] == IOERR
    else:
        assert bench.segments(kind, *segments) == status
    assert bench.image.calls == []


def test_half_a_segment(bench: Bench) -> None:
    """A partial segment is an error."""
    assert bench.request(DISCARD, 0, (DATA, 24, False))[1] == IOERR


@pytest.mark.parametrize("kind", [IN, OUT])
@pytest.mark.parametrize(
    ("sector", "size"), [(SECTORS, 512), (SECTORS - 1, 1024), ((1 << 64) - 1, 512), (0, 100)]
)
def test_transfers_outside_the_disk(bench: Bench, kind: int, sector: int, size: int) -> None:
    """Missing sectors, and parts of sectors, are an error; nothing is read."""
    written = 0 if kind == IN else 1  # the status follows the part that was not read
    assert bench.request(kind, sector, (DATA, size, kind == IN)) == (written, IOERR)
    assert bench.image.calls == []


@pytest.mark.parametrize("kind", [2, 3, 10, 14, 16, 0x8000_0000])
def test_unknown_requests(bench: Bench, kind: int) -> None:
    """A request that was not offered is unsupported; none of its buffers counts as written."""
    assert bench.request(kind, 0, (DATA, 512, True)) == (0, UNSUPP)


@pytest.mark.parametrize("kind", [OUT, DISCARD, ZEROES])
def test_read_only(kind: int) -> None:
    """A read-only disk says so, refuses changes, and can be read."""
    bench = Bench(is_read_only=True)
    assert bench.disk.features >> abi.VIRTIO_BLK_F_RO & 1
    assert not bench.disk.features >> abi.VIRTIO_BLK_F_DISCARD & 1
    assert bench.request(kind, 0, (DATA, 512, False))[1] == IOERR
    assert bench.image.calls == []
    assert bench.request(IN, 0, (DATA, 512, True))[1] == OK


@pytest.mark.parametrize("error", [errno.EIO, errno.ENOSPC])
def test_faults(bench: Bench, error: int, caplog: pytest.LogCaptureFixture) -> None:
    """A fault of the image fails the request, is logged once, and the next one may succeed."""
    bench.image.fault = error
    for _ in range(3):
        assert bench.request(OUT, 7, (DATA, 512, False))[1] == IOERR
    assert caplog.messages == ["disk0: write at sector 7: fault"]
    assert bench.request(IN, 7, (DATA, 512, True)) == (0, IOERR)
    bench.image.fault = None
    assert bench.request(OUT, 7, (DATA, 512, False))[1] == OK


# Layouts of requests: the ends of buffers mean nothing


def test_everything_in_two_buffers(bench: Bench) -> None:
    """Header and data may share a buffer, and so may data and status."""
    struct.pack_into("<IIQ", bench.memory.bytes, HEADER, OUT, 0, 2)
    bench.memory.bytes[HEADER + 16 : HEADER + 16 + 512] = b"x" * 512
    assert bench.serve((HEADER, 528, False), (STATUS, 1, True)) == (1, OK)
    assert bench.image.bytes[1024:1536] == b"x" * 512
    struct.pack_into("<IIQ", bench.memory.bytes, HEADER, IN, 0, 2)
    assert bench.serve((HEADER, 16, False), (STATUS - 512, 513, True)) == (513, OK)
    assert bench.memory.bytes[STATUS - 512 : STATUS] == b"x" * 512


def test_a_header_in_pieces(bench: Bench) -> None:
    """A header may come in any number of buffers."""
    struct.pack_into("<IIQ", bench.memory.bytes, HEADER, IN, 0, 1)
    pieces = ((HEADER, 3, False), (HEADER + 3, 13, False))
    assert bench.serve(*pieces, (DATA, 512, True), (STATUS, 1, True)) == (513, OK)
    assert bench.memory.bytes[DATA : DATA + 512] == bench.image.bytes[512:1024]


@pytest.mark.parametrize(
    ("buffers", "message"),
    [
        (((HEADER, 16, False),), "disk0: a request without room for its status"),
        (((HEADER, 15, False), (STATUS, 1, True)), "disk0: a request header of 15 bytes"),
        (((STATUS, 1, True),), "disk0: a request header of 0 bytes"),
    ],
)
def test_requests_that_are_none(bench: Bench, buffers: Sequence[Buffer], message: str) -> None:
    """A request without a header or a place for the status stops the device."""
    bench.driver.add(*buffers)
    with pytest.raises(VirtqueueError) as caught:
        bench.disk.process(0, bench.queue)
    assert str(caught.value) == message


def test_configuration(bench: Bench) -> None:
    """The configuration equals struct virtio_blk_config, field by field."""
    config = VirtioBlk(bench.image, name="disk0", queues=3).config()
    assert len(config) == 60
    assert struct.unpack_from("<Q", config, 0) == (SECTORS,)
    assert struct.unpack_from("<I", config, 12) == (QUEUE_SIZE - 2,)  # seg_max
    assert struct.unpack_from("<I", config, 20) == (512,)  # blk_size
    assert struct.unpack_from("<BBHI", config, 24) == (3, 0, 8, 0)  # topology
    assert struct.unpack_from("<H", config, 34) == (3,)  # num_queues
    assert struct.unpack_from("<III", config, 36) == (1 << 22, 16, 8)  # discard
    assert struct.unpack_from("<IIB", config, 48) == (1 << 22, 16, 1)  # write zeroes


def test_several_queues_are_a_feature(bench: Bench) -> None:
    """MQ is offered when there is more than one queue."""
    assert not bench.disk.features >> abi.VIRTIO_BLK_F_MQ & 1
    several = VirtioBlk(bench.image, name="disk0", queues=2)
    assert several.features >> abi.VIRTIO_BLK_F_MQ & 1
    assert several.queue_sizes == (QUEUE_SIZE, QUEUE_SIZE)


def test_close(bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
    """Closing the device closes its image; an error at the close is logged."""
    bench.image.fault = errno.EIO
    bench.disk.close()
    assert bench.image.calls == ["close"]
    assert caplog.messages == [f"disk0: close: [Errno {errno.EIO}] fault"]


def test_a_borrowed_image_outlives_the_device(bench: Bench) -> None:
    """An image that is not the device's stays open: after a reboot another device uses it."""
    VirtioBlk(bench.image, name="disk0", owns_image=False).close()
    assert bench.image.calls == []


# Hostile guests


@given(
    st.sampled_from([IN, OUT, FLUSH, 8, DISCARD, ZEROES, 99]),
    st.one_of(st.integers(0, SECTORS + 2), st.integers(0, (1 << 64) - 1)),
    st.lists(st.tuples(st.integers(0, 0x20000), st.integers(0, 2048), st.booleans()), max_size=8),
    st.binary(max_size=64),
)
def test_any_request_is_survived(
    kind: int, sector: int, buffers: list[Buffer], data: bytes
) -> None:
    """Any chain is answered, or the device stops; the image keeps its size."""
    bench = Bench()
    bench.memory.bytes[DATA : DATA + len(data)] = data
    struct.pack_into("<IIQ", bench.memory.bytes, HEADER, kind, 0, sector)
    bench.driver.add((HEADER, 16, False), *buffers)
    try:
        bench.disk.process(0, bench.queue)
    except GuestError:
        return
    ((_, written),) = bench.driver.used()
    assert written <= sum(size for _, size, is_writable in buffers if is_writable)


REQUESTS = [
    (IN, (DATA, 512, True), 513),
    (OUT, (DATA, 512, False), 1),
    (FLUSH, None, 1),
    (DISCARD, (DATA, 16, False), 1),
    (ZEROES, (DATA, 16, False), 1),
]


@pytest.mark.parametrize(("kind", "data", "written"), REQUESTS)
@pytest.mark.parametrize("fault", [errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.ESTALE])
def test_a_request_waits_for_the_host(
    kind: int, data: Buffer | None, written: int, fault: int
) -> None:
    """A disk that stops at errors returns no request before the host has done it."""
    bench = Bench(stops_at_errors=True)
    struct.pack_into("<QII", bench.memory.bytes, DATA, 0, 1, 0)
    struct.pack_into("<IIQ", bench.memory.bytes, HEADER, kind, 0, 0)
    bench.memory.bytes[STATUS] = NO_STATUS
    bench.driver.add((HEADER, 16, False), *([data] if data else []), (STATUS, 1, True))
    bench.image.fault = fault
    for _ in range(2):
        with pytest.raises(HaltError, match="disk0: ") as caught:
            bench.disk.process(0, bench.queue)
        assert bench.driver.used() == []
        assert bench.memory.bytes[STATUS] == NO_STATUS
    is_full = fault in {errno.ENOSPC, errno.EDQUOT}
    assert caught.value.reason is (HaltReason.NO_SPACE if is_full else HaltReason.IO_ERROR)
    bench.image.fault = None
    bench.disk.process(0, bench.queue)
    assert [length for _, length in bench.driver.used()] == [written]
    assert bench.memory.bytes[STATUS] == OK
    assert len(bench.image.calls) == 3


def test_what_came_before_a_fault_is_given_back() -> None:
    """Requests are served in order: those before the waiting one are done, and none after it."""
    bench = Bench(stops_at_errors=True)
    struct.pack_into("<IIQ", bench.memory.bytes, HEADER, abi.VIRTIO_BLK_T_GET_ID, 0, 0)
    struct.pack_into("<IIQ", bench.memory.bytes, HEADER + 16, OUT, 0, 7)
    first = bench.driver.add((HEADER, 16, False), (DATA, 20, True), (STATUS, 1, True))
    bench.driver.add((HEADER + 16, 16, False), (DATA, 512, False), (STATUS + 1, 1, True))
    bench.driver.add((HEADER, 16, False), (DATA, 20, True), (STATUS + 2, 1, True))
    bench.image.fault = errno.ENOSPC
    with pytest.raises(HaltError):
        bench.disk.process(0, bench.queue)
    assert [head for head, _ in bench.driver.used()] == [first]
    bench.image.fault = None
    bench.disk.process(0, bench.queue)
    assert len(bench.driver.used()) == 2


def test_a_fault_that_stays_is_reported() -> None:
    """An error that can never succeed is reported, even if the disk stops at errors."""
    bench = Bench(stops_at_errors=True)
    bench.image.fault, bench.image.fault_lasts = errno.EIO, True
    assert bench.request(OUT, 0, (DATA, 512, False)) == (1, IOERR)
    assert bench.request(FLUSH, 0) == (1, IOERR)


def test_what_cannot_be_is_reported() -> None:
    """A guest's own mistakes are reported at once."""
    bench = Bench(stops_at_errors=True)
    assert bench.request(OUT, SECTORS, (DATA, 512, False)) == (1, IOERR)
    assert bench.request(99, 0, (DATA, 512, False)) == (1, UNSUPP)
