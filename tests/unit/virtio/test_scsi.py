"""virtio-scsi: requests in their chains, however those are cut, and the drive behind them."""

from __future__ import annotations

import struct
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.virtio_driver import Buffer, DriverQueue, PlainMemory
from vmm_kvm.errors import GuestError, VirtqueueError
from vmm_kvm.scsi.mmc import BLOCK_SIZE
from vmm_kvm.virtio.device import Backend
from vmm_kvm.virtio.scsi import CONTROL_QUEUE, EVENT_QUEUE, REQUEST_QUEUE, VirtioScsi

DRIVE = bytes.fromhex("01 00 40 00 00000000")
OK, OVERRUN, BAD_TARGET, REJECTED, INCORRECT_LUN = 0, 1, 3, 11, 12
REQUEST_SIZE, RESPONSE_SIZE = 51, 108
REQUEST, RESPONSE, DATA = 0x4000, 0x5000, 0x8000


class Disc:
    """An Image whose blocks start with their numbers; a bad one cannot be read."""

    is_read_only = True

    def __init__(self, blocks: int, bad: int | None = None) -> None:
        self.size = blocks * BLOCK_SIZE
        self.bad = bad
        self.is_closed = False

    def readv(self, offset: int, buffers: Sequence[memoryview]) -> None:
        """Fill the buffers."""
        content = bytearray()
        for block in range(offset // BLOCK_SIZE, (offset + sum(map(len, buffers))) // BLOCK_SIZE):
            if block == self.bad:
                raise OSError(5, "Input/output error")
            content += block.to_bytes(4, "big").ljust(BLOCK_SIZE, b".")
        for buffer in buffers:
            buffer[:] = content[: len(buffer)]
            del content[: len(buffer)]

    def writev(self, offset: int, buffers: Sequence[memoryview]) -> None:
        """Fail: nothing may write."""
        raise AssertionError(offset, buffers)

    def flush(self) -> None:
        """Fail: nothing may flush."""
        raise AssertionError

    def discard(self, offset: int, length: int) -> None:
        """Fail: nothing may discard."""
        raise AssertionError(offset, length)

    def write_zeroes(self, offset: int, length: int, *, may_unmap: bool) -> None:
        """Fail: nothing may write."""
        raise AssertionError(offset, length, may_unmap)

    def close(self) -> None:
        """Remember it."""
        self.is_closed = True


class Rig:
    """A device with an adapter's three queues, and a driver that waits for each answer."""

    def __init__(self, disc: Disc | None) -> None:
        self.device = VirtioScsi(disc)
        self.memory = PlainMemory()
        self.queues = [
            DriverQueue(self.memory, size=64, base=0x1000 * (1 + index)) for index in range(3)
        ]
        self.sides = [queue.device(self.memory) for queue in self.queues]
        self.device.start(0)

    def submit(self, index: int, *buffers: Buffer) -> int:
        """Have a chain served; returns the number of bytes that the device reports written."""
        self.queues[index].add(*buffers)
        self.device.process(index, self.sides[index])
        ((_, written),) = self.queues[index].used()
        return written

    def command(
        self, cdb: str, room: int = 0, lun: bytes = DRIVE
    ) -> tuple[int, int, int, bytes, bytes]:
        """Send a command; returns response, status, residual, sense data and data."""
        request = lun + bytes(11) + bytes.fromhex(cdb).ljust(32, b"\0")
        self.put(REQUEST, request)
        data: list[Buffer] = [(DATA, room, True)] if room else []
        written = self.submit(
            REQUEST_QUEUE,
            (REQUEST, REQUEST_SIZE, False),
            (RESPONSE, RESPONSE_SIZE, True),
            *data,
        )
        sense_size, residual, _, status, response = struct.unpack_from(
            "<IIHBB", self.memory.bytes, RESPONSE
        )
        assert written == RESPONSE_SIZE + room - residual
        sense = self.get(RESPONSE + 12, sense_size)
        return response, status, residual, sense, self.get(DATA, room - residual)

    def manage(self, request: bytes) -> int:
        """Send a control request with a response of one byte; returns it."""
        self.put(REQUEST, request)
        self.put(RESPONSE, b"\xee")
        written = self.submit(CONTROL_QUEUE, (REQUEST, len(request), False), (RESPONSE, 1, True))
        assert written == 1
        return self.memory.bytes[RESPONSE]

    def put(self, address: int, data: bytes) -> None:
        """Write guest memory."""
        self.memory.bytes[address : address + len(data)] = data

    def get(self, address: int, size: int) -> bytes:
        """Read guest memory."""
        return bytes(self.memory.bytes[address : address + size])


@pytest.fixture
def rig() -> Rig:
    """An adapter with a disc of 100 blocks, of which number 66 is bad."""
    return Rig(Disc(100, bad=66))


def test_configuration(rig: Rig) -> None:
    """The adapter has one request queue, standard sizes, and all that OpenBSD's driver needs."""
    backend: Backend = rig.device
    fields = struct.unpack("<IIIIIIIHHI", backend.config())
    assert len(backend.config()) == 36
    assert fields[0] == 1
    assert fields[1] >= 17  # segments of OpenBSD's 64 KiB transfers
    assert fields[4:7] == (16, 96, 32)
    assert fields[7:] == (0, 1, 0)


def test_a_command_with_data(rig: Rig) -> None:
    """INQUIRY's data follow the response; the rest of the buffer is the residual."""
    response, status, residual, sense, data = rig.command("12 00 00 00ff 00", 255)
    assert (response, status, sense) == (OK, 0, b"")
    assert len(data) == 255 - residual == 36
    assert data[8:16] == b"OpenBSD "


def test_a_read_goes_into_the_guests_buffer(rig: Rig) -> None:
    """READ(10) puts two blocks into the guest's buffer."""
    response, status, residual, _, data = rig.command("28 00 00000007 00 0002 00", 2 * BLOCK_SIZE)
    assert (response, status, residual) == (OK, 0, 0)
    assert [data[at : at + 4] for at in (0, BLOCK_SIZE)] == [b"\0\0\0\7", b"\0\0\0\x08"]


def test_a_failed_command_has_sense_data(rig: Rig) -> None:
    """A failed command has CHECK CONDITION and 18 bytes of sense data, without other data."""
    response, status, residual, sense, _ = rig.command("28 00 00000064 00 0001 00", BLOCK_SIZE)
    assert (response, status, residual) == (OK, 2, BLOCK_SIZE)
    assert (len(sense), sense[2], sense[12]) == (18, 5, 0x21)


def test_an_unreadable_block_is_a_medium_error(rig: Rig) -> None:
    """The host's EIO is the guest's medium error; other blocks can be read."""
    _, status, residual, sense, _ = rig.command("28 00 00000040 00 0004 00", 4 * BLOCK_SIZE)
    assert (status, residual) == (2, 4 * BLOCK_SIZE)
    assert (sense[2], sense[12]) == (3, 0x11)
    assert rig.command("28 00 00000041 00 0001 00", BLOCK_SIZE)[1] == 0


def test_a_buffer_that_is_too_small_is_overrun(rig: Rig) -> None:
    """A buffer that is too small is an overrun: neither data nor blocks are cut."""
    assert rig.command("28 00 00000000 00 0002 00", BLOCK_SIZE)[0] == OVERRUN
    assert rig.command("12 00 00 0024 00", 35)[0] == OVERRUN
    assert rig.command("12 00 00 0023 00", 35)[0] == OK


def test_no_blocks_are_no_error(rig: Rig) -> None:
    """A READ of no blocks succeeds."""
    assert rig.command("28 00 00000000 00 0000 00") == (OK, 0, 0, b"", b"")


@pytest.mark.parametrize(
    "lun",
    [
        "01 01 40 00 00000000",
        "01 00 40 01 00000000",
        "01 00 41 00 00000000",
        "01 ff 00 00 00000000",
        "00 00 40 00 00000000",
        "01 00 80 00 00000000",
        "01 00 40 00 00000001",
        "c1 01 00 00 00000000",
    ],
)
def test_there_is_one_drive(rig: Rig, lun: str) -> None:
    """Other targets, units and forms of LUNs are bad targets."""
    answer = rig.command("12 00 00 0024 00", 36, bytes.fromhex(lun))
    assert answer == (BAD_TARGET, 0, 36, b"", b"")


def test_both_forms_of_a_single_level_lun(rig: Rig) -> None:
    """Peripheral and flat addressing name the same unit."""
    assert rig.command("00" * 6, 0, bytes.fromhex("01 00 00 00 00000000"))[0] == OK


def test_an_empty_drive() -> None:
    """Without a disc, the drive exists and is not ready."""
    rig = Rig(None)
    assert rig.command("12 00 00 0024 00", 36)[:2] == (OK, 0)
    _, status, _, sense, _ = rig.command("00" * 6)
    assert (status, sense[2], sense[12]) == (2, 2, 0x3A)
    rig.device.close()


@pytest.mark.parametrize("cut", [1, 7, 19, 50])
def test_buffers_may_be_cut_anywhere(rig: Rig, cut: int) -> None:
    """Request, response and data may start in any buffer of the chain."""
    rig.put(REQUEST, DRIVE + bytes(11) + bytes.fromhex("12 00 00 0024 00").ljust(32, b"\0"))
    whole = RESPONSE_SIZE + 36
    rig.submit(
        REQUEST_QUEUE,
        (REQUEST, cut, False),
        (REQUEST + cut, REQUEST_SIZE - cut, False),
        (RESPONSE, cut, True),
        (RESPONSE + cut, whole - 2 * cut, True),
        (RESPONSE + whole - cut, cut, True),
    )
    assert rig.get(RESPONSE, 12) == bytes(12)
    assert rig.get(RESPONSE + RESPONSE_SIZE + 8, 8) == b"OpenBSD "


@pytest.mark.parametrize(("readable", "writable"), [(REQUEST_SIZE - 1, 200), (REQUEST_SIZE, 107)])
def test_a_short_command_stops_the_device(rig: Rig, readable: int, writable: int) -> None:
    """A request without room for its headers stops the device."""
    with pytest.raises(VirtqueueError):
        rig.submit(REQUEST_QUEUE, (REQUEST, readable, False), (RESPONSE, writable, True))


def test_the_driver_may_change_the_sizes(rig: Rig) -> None:
    """Sense data and commands of other sizes move the later parts; a reset restores the sizes."""
    rig.device.write_config(20, (8).to_bytes(4, "little"))
    rig.device.write_config(24, (16).to_bytes(4, "little"))
    assert struct.unpack_from("<II", rig.device.config(), 20) == (8, 16)
    rig.put(REQUEST, DRIVE + bytes(11) + b"\xff".ljust(16, b"\0"))
    assert rig.submit(REQUEST_QUEUE, (REQUEST, 35, False), (RESPONSE, 20, True)) == 20
    assert rig.get(RESPONSE, 20) == bytes.fromhex(
        "08000000 00000000 0000 02 00  70 00 05 00000000 0a"
    )
    rig.device.reset()
    assert struct.unpack_from("<II", rig.device.config(), 20) == (96, 32)


@pytest.mark.parametrize(
    ("offset", "data"),
    [(20, b"\xfd\0\0\0"), (24, bytes(4)), (24, b"\0\2\0\0"), (20, b"\1"), (0, b"\2\0\0\0")],
)
def test_other_writes_to_the_configuration_are_ignored(rig: Rig, offset: int, data: bytes) -> None:
    """Writes of impossible sizes, parts of a field, and read-only fields are ignored."""
    before = rig.device.config()
    rig.device.write_config(offset, data)
    assert rig.device.config() == before


def task(function: int, lun: bytes = DRIVE) -> bytes:
    """Return a task management request."""
    return struct.pack("<II8sQ", 0, function, lun, 7)


def test_there_is_never_a_task_to_manage(rig: Rig) -> None:
    """Every known function is complete at once; unknown ones are rejected."""
    assert [rig.manage(task(function)) for function in range(8)] == [OK] * 8
    assert rig.manage(task(8)) == REJECTED


def test_management_of_other_units(rig: Rig) -> None:
    """A missing target is a bad one; another LUN is an incorrect one."""
    assert rig.manage(task(0, bytes.fromhex("01 01 40 00 00000000"))) == BAD_TARGET
    assert rig.manage(task(0, bytes.fromhex("01 00 40 01 00000000"))) == INCORRECT_LUN


def test_a_reset_of_the_unit_reaches_the_drive(rig: Rig) -> None:
    """After a reset of the unit the next command reports it."""
    assert rig.manage(task(5)) == OK
    assert rig.command("00" * 6)[3][12:14] == b"\x29\x03"
    assert rig.command("00" * 6)[1] == 0


@pytest.mark.parametrize("kind", [1, 2])
def test_there_are_no_asynchronous_events(rig: Rig, kind: int) -> None:
    """Queries and subscriptions succeed, with no event."""
    rig.put(REQUEST, struct.pack("<I8sI", kind, DRIVE, 0x7E))
    rig.put(RESPONSE, b"\xee" * 5)
    assert rig.submit(CONTROL_QUEUE, (REQUEST, 16, False), (RESPONSE, 5, True)) == 5
    assert rig.get(RESPONSE, 5) == bytes(5)


@pytest.mark.parametrize("request_", [b"\0\0\0", task(0)[:23], struct.pack("<I", 9).ljust(24)])
def test_a_malformed_control_request_stops_the_device(rig: Rig, request_: bytes) -> None:
    """A short or unknown control request stops the device."""
    with pytest.raises(VirtqueueError):
        rig.manage(request_)


def test_event_buffers_stay(rig: Rig) -> None:
    """The device takes buffers for events, and returns none."""
    rig.queues[EVENT_QUEUE].add((DATA, 16, True))
    rig.device.process(EVENT_QUEUE, rig.sides[EVENT_QUEUE])
    assert rig.queues[EVENT_QUEUE].used() == []
    assert not rig.sides[EVENT_QUEUE].enable_kicks()


def test_closing_closes_the_image() -> None:
    """The device owns the image, unless it is borrowed."""
    mine, yours = Disc(1), Disc(1)
    VirtioScsi(mine).close()
    VirtioScsi(yours, owns_image=False).close()
    assert mine.is_closed
    assert not yours.is_closed


BUFFERS = st.lists(
    st.tuples(st.integers(0x4000, 0x9000), st.integers(1, 0x2000), st.booleans()), min_size=1,
    max_size=8,
)  # fmt: skip


@given(
    st.sampled_from([CONTROL_QUEUE, REQUEST_QUEUE]),
    BUFFERS,
    st.binary(min_size=1, max_size=64),
    st.lists(st.tuples(st.integers(0, 40), st.binary(max_size=8)), max_size=2),
)
def test_a_hostile_driver_gets_an_answer_or_a_fault(
    index: int, buffers: list[Buffer], request: bytes, writes: list[tuple[int, bytes]]
) -> None:
    """Any bytes in any buffers end in a used chain within them, or in a GuestError."""
    rig = Rig(Disc(4))
    for offset, data in writes:
        rig.device.write_config(offset, data)
    rig.put(REQUEST, DRIVE + bytes(11) + request)
    # A queue itself refuses readable buffers after writable ones.
    ordered = sorted(buffers, key=lambda buffer: buffer[2])
    try:
        written = rig.submit(index, *ordered)
    except GuestError:
        return
    assert written <= sum(size for _, size, is_writable in ordered if is_writable)
