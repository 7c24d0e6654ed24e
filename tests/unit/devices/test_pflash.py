"""The flash chip: Intel's commands, its mapping, and its file."""

from __future__ import annotations

import logging

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.fakes import Operation, exercise
from vmm_kvm.devices.pflash import BLOCK_SIZE, BUFFER_SIZE, Command, Pflash

SIZE = 4 * BLOCK_SIZE
READY, ERASE_ERROR, PROGRAM_ERROR = 0x80, 0x20, 0x10


class Rig:
    """A chip whose array counts up, and a file that records stores."""

    def __init__(self) -> None:
        self.array = bytearray(range(256)) * (SIZE // 256)
        self.file = bytearray(self.array)
        self.stores: list[tuple[int, int]] = []
        self.mapped: list[bool] = []
        self.is_full = False
        self.chip = Pflash(memoryview(self.array), set_mapped=self.mapped.append, store=self._store)

    def _store(self, offset: int, data: memoryview) -> None:
        if self.is_full:
            raise OSError(28, "No space left on device")
        self.stores.append((offset, len(data)))
        self.file[offset : offset + len(data)] = data

    def write(self, offset: int, *values: int) -> None:
        """Write single bytes to one offset, one after another."""
        for value in values:
            with self.chip.lock:
                self.chip.write(offset, 1, value)

    def read(self, offset: int, size: int = 1) -> int:
        """Read."""
        with self.chip.lock:
            return self.chip.read(offset, size)


@pytest.fixture
def rig() -> Rig:
    """A chip after power-on."""
    return Rig()


def test_it_begins_by_reading(rig: Rig) -> None:
    """At first the array can be read in any width, and is mapped."""
    assert rig.read(5) == 5
    assert rig.read(0x10, 4) == 0x13121110
    assert rig.mapped == []


def test_how_ovmf_detects_flash(rig: Rig) -> None:
    """OVMF clears the status and reads zero; programming the same byte causes no error."""
    rig.write(0, Command.CLEAR_STATUS)
    assert rig.read(0) == 0
    rig.write(0, Command.READ_STATUS)
    assert rig.mapped == [False]
    assert rig.read(0) == 0
    rig.write(0, Command.PROGRAM_ALTERNATE, 0)
    rig.write(0, Command.READ_STATUS)
    assert rig.read(0) == READY
    rig.write(0, Command.READ_ARRAY)
    assert rig.mapped == [False, True]
    assert rig.read(1) == 1


@pytest.mark.parametrize("command", [Command.PROGRAM, Command.PROGRAM_ALTERNATE])
def test_programming_a_byte(rig: Rig, command: int) -> None:
    """The array changes at once; the file when the chip returns to reading."""
    rig.write(0x123, command, 0xA5)
    assert rig.read(0x123) == READY
    assert rig.array[0x123] == 0xA5
    assert rig.stores == []
    rig.write(0x123, Command.READ_ARRAY)
    assert rig.read(0x123) == 0xA5
    assert rig.stores == [(0x123, 1)]
    assert rig.file == rig.array


def test_programming_a_run_is_one_store(rig: Rig) -> None:
    """Neighbouring bytes are stored together; a distant byte is stored after them."""
    for offset in (0x100, 0x101, 0x102, 0x300):
        rig.write(offset, Command.PROGRAM, 0x77)
    rig.write(0, Command.READ_ARRAY)
    assert rig.stores == [(0x100, 3), (0x300, 1)]


def test_erasing_a_block(rig: Rig) -> None:
    """An erasure fills the block around the offset with ones, and no other block."""
    rig.write(BLOCK_SIZE + 5, Command.ERASE, Command.CONFIRM)
    assert rig.read(0) == READY
    rig.write(0, Command.READ_ARRAY)
    assert rig.array[BLOCK_SIZE : 2 * BLOCK_SIZE] == b"\xff" * BLOCK_SIZE
    assert rig.read(BLOCK_SIZE - 1) == 0xFF  # unchanged: the last of 256
    assert rig.read(2 * BLOCK_SIZE) == 0
    assert rig.stores == [(BLOCK_SIZE, BLOCK_SIZE)]


def test_an_unconfirmed_erasure_is_an_error(rig: Rig) -> None:
    """An unconfirmed erasure erases nothing; both error bits report a wrong sequence."""
    rig.write(0, Command.ERASE, 0x00)
    assert rig.read(0) == READY | ERASE_ERROR | PROGRAM_ERROR
    rig.write(0, Command.CLEAR_STATUS)
    assert rig.read(3) == 3
    assert rig.stores == []


def test_a_buffered_write(rig: Rig) -> None:
    """A buffered write takes count, data and confirmation; before the last nothing changes."""
    rig.write(BLOCK_SIZE, Command.WRITE_BUFFER)
    assert rig.read(BLOCK_SIZE) == READY
    rig.write(BLOCK_SIZE, 2)
    for i in range(3):
        rig.write(BLOCK_SIZE + 0x10 + i, 0xB0 + i)
    assert rig.array[BLOCK_SIZE + 0x10] == 0x10
    rig.write(BLOCK_SIZE, Command.CONFIRM)
    assert rig.read(0) == READY
    rig.write(0, Command.READ_ARRAY)
    assert rig.array[BLOCK_SIZE + 0x10 : BLOCK_SIZE + 0x14] == b"\xb0\xb1\xb2\x13"
    assert rig.stores == [(BLOCK_SIZE + 0x10, 3)]


@pytest.mark.parametrize(
    "writes",
    [
        [(0, BUFFER_SIZE)],  # one byte too many
        [(0, 0), (BLOCK_SIZE, 1)],  # another block
        [(0, 0), (0, 1), (0, 0xFF)],  # not confirmed
    ],
    ids=["too long", "elsewhere", "unconfirmed"],
)
def test_a_wrong_buffered_write_is_an_error(rig: Rig, writes: list[tuple[int, int]]) -> None:
    """A wrong buffered write changes nothing; the status reports a wrong sequence."""
    before = bytes(rig.array)
    rig.write(0, Command.WRITE_BUFFER)
    for offset, value in writes:
        rig.write(offset, value)
    assert rig.read(0) == READY | ERASE_ERROR | PROGRAM_ERROR
    assert rig.array == before


def test_who_it_is(rig: Rig) -> None:
    """The chip reports manufacturer and device; no block is locked."""
    rig.write(0, Command.READ_ID)
    assert (rig.read(0), rig.read(1), rig.read(2)) == (0x89, 0x18, 0)
    assert rig.read(0, 2) == 0x1889


def test_the_query_table(rig: Rig) -> None:
    """The CFI query reports command set, size and erase blocks."""
    rig.write(0x55, Command.QUERY)
    assert bytes(map(rig.read, range(0x10, 0x13))) == b"QRY"
    assert rig.read(0x13, 2) == 1
    assert 1 << rig.read(0x27) == SIZE
    assert 1 << rig.read(0x2A, 2) == BUFFER_SIZE
    assert rig.read(0x2C) == 1
    assert (rig.read(0x2D, 2) + 1, rig.read(0x2F, 2) * 256) == (SIZE // BLOCK_SIZE, BLOCK_SIZE)
    assert rig.read(0x200) == 0


def test_locking_does_nothing(rig: Rig) -> None:
    """A driver that unlocks a block before a write succeeds."""
    rig.write(0, Command.LOCK, Command.CONFIRM)
    assert rig.read(0) == READY


@pytest.mark.parametrize("command", [0x00, 0xF0, 0xAA])
def test_an_unknown_command_reads_the_array(rig: Rig, command: int) -> None:
    """Probing for other chips leaves this one reading."""
    rig.write(0, Command.READ_ID, command)
    assert rig.read(7) == 7
    assert rig.mapped == [False, True]


def test_what_cannot_be_stored_is_stored_later(rig: Rig, caplog: pytest.LogCaptureFixture) -> None:
    """A full disk is logged once; the next successful store has all changes."""
    rig.is_full = True
    with caplog.at_level(logging.WARNING):
        for offset in (0x10, 0x2000, 0x30):
            rig.write(offset, Command.PROGRAM, 0xEE, Command.READ_ARRAY)
    assert len(caplog.records) == 1
    assert "No space left" in caplog.text
    rig.is_full = False
    rig.write(0x3000, Command.PROGRAM, 0xEE, Command.READ_ARRAY)
    assert rig.file == rig.array


def test_closing_stores_the_rest(rig: Rig) -> None:
    """Closing within a command loses no change."""
    rig.write(0x10, Command.PROGRAM, 0xEE)
    rig.chip.close()
    assert rig.file[0x10] == 0xEE


def test_reset_reads_the_array(rig: Rig) -> None:
    """A reset in any mode maps the array again."""
    rig.write(0, Command.WRITE_BUFFER, 3)
    rig.chip.reset()
    assert rig.read(9) == 9
    assert rig.mapped == [False, True]


def test_a_snapshot_continues(rig: Rig) -> None:
    """Another chip continues a buffered write, and is not mapped meanwhile."""
    rig.write(0, Command.WRITE_BUFFER, 1)
    rig.write(0x20, 0xC1)
    other = Rig()
    other.chip.restore(rig.chip.save())
    assert other.chip.save() == rig.chip.save()
    assert other.mapped == [False]
    other.write(0x21, 0xC2)
    other.write(0, Command.CONFIRM, Command.READ_ARRAY)
    assert other.array[0x20:0x22] == b"\xc1\xc2"


OPERATION = st.integers(0, 3).flatmap(
    lambda power: st.tuples(
        st.booleans(),
        st.integers(0, SIZE - (1 << power)),
        st.just(1 << power),
        st.sampled_from([*map(int, Command)]) | st.integers(0, (1 << 64) - 1),
    )
)


@given(st.lists(OPERATION, max_size=60))
def test_any_accesses_keep_file_and_array_together(operations: list[Operation]) -> None:
    """After any accesses, a reset leaves the chip mapped, and its file equal to the array."""
    rig = Rig()
    exercise(rig.chip, operations)
    rig.chip.reset()
    assert rig.file == rig.array
    assert rig.mapped[-1:] in ([], [True])
    assert all(a is not b for a, b in zip(rig.mapped, rig.mapped[1:], strict=False))
