"""NOR flash with Intel's command set: where UEFI firmware keeps its variables.

While the chip is in its reading mode the machine maps the array as read-only memory, so that reads
cost nothing; a write is a command, which takes the chip out of that mode, and then every access
comes here. One chip of 8 bits width.

As QEMU's does, and unlike silicon: a program operation may set bits again, and clearing the status
register clears its ready bit too, by which OVMF tells flash from ROM.

Source: Intel 28FxxxJ3 datasheet §9 to §11; JEDEC JESD68.01 (CFI); QEMU hw/block/pflash_cfi01.c
"""

import threading
from collections.abc import Callable
from enum import IntEnum, IntFlag
from typing import Annotated, Literal

from vmm_kvm.errors import StateError
from vmm_kvm.log import Log
from vmm_kvm.state import U8, U32, Blob, Length, PartState, Range

log = Log(__name__)

BLOCK_SIZE = 4096
"""Bytes that are erased together."""
BUFFER_SIZE = 64
"""Bytes of one buffered write."""
BUFFER_COUNT_MAX = 256
"""Bytes of the largest one that a guest can ask for; it is refused."""


class Command(IntEnum):
    """Commands, and what confirms them."""

    PROGRAM_ALTERNATE = 0x10
    ERASE = 0x20
    PROGRAM = 0x40
    CLEAR_STATUS = 0x50
    LOCK = 0x60
    READ_STATUS = 0x70
    READ_ID = 0x90
    QUERY = 0x98
    CONFIRM = 0xD0
    WRITE_BUFFER = 0xE8
    READ_ARRAY = 0xFF


class Status(IntFlag):
    """The status register."""

    PROGRAM_ERROR = 1 << 4
    ERASE_ERROR = 1 << 5
    READY = 1 << 7


class Mode(IntEnum):
    """The result of a read, and the meaning of the next write."""

    ARRAY = 0
    STATUS = 1
    ID = 2
    QUERY = 3
    PROGRAM = 4
    ERASE = 5
    LOCK = 6
    BUFFER_COUNT = 7
    BUFFER_DATA = 8
    BUFFER_CONFIRM = 9


_READY = int(Status.READY)
_BAD_SEQUENCE = int(Status.PROGRAM_ERROR | Status.ERASE_ERROR)
_MANUFACTURER, _DEVICE = 0x89, 0x18  # Intel, 28F128J3
_ERASED = 0xFF


class PflashState(PartState):
    """Everything that a guest can observe of a Pflash."""

    mode: Mode
    status: U8
    buffer_start: U32
    buffer_left: Annotated[int, Range(0, BUFFER_COUNT_MAX)]
    buffer: Annotated[tuple[tuple[U32, U8], ...], Length(0, BUFFER_SIZE)]
    """(offset, byte) of a buffered write in progress."""
    array: Blob
    version: Literal[1] = 1


class Pflash:
    """A flash chip; a BusDevice of as many bytes as its array.

    `array` is what the machine maps. `set_mapped` is told whether reads go straight to it or come
    here; `store` gets (offset, bytes) of each change, in order, and may raise OSError: then it gets
    the same change again with the next one. Both are called on a vCPU's thread, with the lock held.
    """

    __slots__ = (
        "_array",
        "_buffer",
        "_buffer_left",
        "_buffer_start",
        "_dirty",
        "_has_failed",
        "_mode",
        "_set_mapped",
        "_status",
        "_store",
        "lock",
    )

    def __init__(
        self,
        array: memoryview,
        *,
        set_mapped: Callable[[bool], None],
        store: Callable[[int, memoryview], None],
    ) -> None:
        """Make a chip in its reading mode; `array` is a multiple of 4096 bytes."""
        self.lock = threading.Lock()
        self._array = array
        self._set_mapped = set_mapped
        self._store = store
        self._mode = Mode.ARRAY
        self._status = _READY
        self._buffer_start = 0
        self._buffer_left = 0
        self._buffer: list[tuple[int, int]] = []
        self._dirty: tuple[int, int] | None = None
        self._has_failed = False

    # The guest's side; the bus holds the lock

    def read(self, offset: int, size: int) -> int:
        """Read the array, the status or the chip's identification, byte by byte."""
        if self._mode is Mode.ARRAY:
            return int.from_bytes(self._array[offset : offset + size], "little")
        return int.from_bytes(bytes(map(self._read_byte, range(offset, offset + size))), "little")

    def _read_byte(self, offset: int) -> int:
        match self._mode:
            case Mode.ID:
                return {0: _MANUFACTURER, 1: _DEVICE}.get(offset % BLOCK_SIZE, 0)
            case Mode.QUERY:
                at = offset % BLOCK_SIZE
                table = _query_table(len(self._array))
                return table[at] if at < len(table) else 0
            case _:
                return self._status

    def write(self, offset: int, size: int, value: int) -> None:
        """Take a command or its operand; a wider write is one byte after another."""
        for i in range(size):
            self._write_byte(offset + i, value >> (8 * i) & 0xFF)

    def _write_byte(self, offset: int, value: int) -> None:
        match self._mode:
            case Mode.PROGRAM:
                self._program(offset, value)
                self._finish(0)
            case Mode.ERASE:
                if value == Command.CONFIRM:
                    self._erase(offset)
                self._finish(0 if value == Command.CONFIRM else _BAD_SEQUENCE)
            case Mode.LOCK:
                self._finish(0)  # nothing can be locked
            case Mode.BUFFER_COUNT:
                self._buffer.clear()
                self._buffer_left = value + 1
                self._mode = Mode.BUFFER_DATA
                if self._buffer_left > BUFFER_SIZE:
                    self._finish(_BAD_SEQUENCE)
            case Mode.BUFFER_DATA:
                self._fill_buffer(offset, value)
            case Mode.BUFFER_CONFIRM:
                if value == Command.CONFIRM:
                    for at, byte in self._buffer:
                        self._program(at, byte)
                self._buffer.clear()
                self._finish(0 if value == Command.CONFIRM else _BAD_SEQUENCE)
            case _:
                self._command(offset, value)

    def _command(self, offset: int, value: int) -> None:
        match value:
            case Command.PROGRAM | Command.PROGRAM_ALTERNATE:
                self._enter(Mode.PROGRAM)
            case Command.ERASE:
                self._enter(Mode.ERASE)
            case Command.LOCK:
                self._enter(Mode.LOCK)
            case Command.WRITE_BUFFER:
                self._status |= _READY
                self._buffer_start = offset - offset % BLOCK_SIZE
                self._enter(Mode.BUFFER_COUNT)
            case Command.READ_STATUS:
                self._enter(Mode.STATUS)
            case Command.READ_ID:
                self._enter(Mode.ID)
            case Command.QUERY:
                self._enter(Mode.QUERY)
            case Command.CLEAR_STATUS:
                self._status = 0
                self._enter(Mode.ARRAY)
            case _:  # READ_ARRAY, or something that other chips know
                self._enter(Mode.ARRAY)

    def _enter(self, mode: Mode) -> None:
        was_mapped, self._mode = self._mode is Mode.ARRAY, mode
        is_mapped = mode is Mode.ARRAY
        if is_mapped:
            self._save()
        if is_mapped != was_mapped:
            self._set_mapped(is_mapped)

    def _finish(self, errors: int) -> None:
        self._status |= _READY | errors
        self._enter(Mode.STATUS)

    def _fill_buffer(self, offset: int, value: int) -> None:
        if not self._buffer_start <= offset < self._buffer_start + BLOCK_SIZE:
            self._finish(_BAD_SEQUENCE)
            return
        self._buffer.append((offset, value))
        self._buffer_left -= 1
        if not self._buffer_left:
            self._mode = Mode.BUFFER_CONFIRM

    def _program(self, offset: int, value: int) -> None:
        if offset < len(self._array):
            self._array[offset] = value
            self._touch(offset, 1)

    def _erase(self, offset: int) -> None:
        start = offset - offset % BLOCK_SIZE
        self._array[start : start + BLOCK_SIZE] = bytes((_ERASED,)) * BLOCK_SIZE
        self._touch(start, BLOCK_SIZE)

    def _touch(self, start: int, size: int) -> None:
        """Remember a change; one that is far from the last is another write."""
        end = start + size
        if self._dirty:
            first, last = self._dirty
            if start <= last and end >= first:
                self._dirty = min(first, start), max(last, end)
                return
            self._save()
            if self._dirty:  # could not be stored: all in between goes with it
                self._dirty = min(first, start), max(last, end)
                return
        self._dirty = start, end

    def _save(self) -> None:
        if not self._dirty:
            return
        start, end = self._dirty
        try:
            self._store(start, self._array[start:end])
        except OSError as err:
            if not self._has_failed:
                log.warning("flash: cannot keep what the guest wrote: %s", err.strerror)
            self._has_failed = True
        else:
            self._dirty = None
            self._has_failed = False

    # The outside; these take the lock

    def reset(self) -> None:
        """Return to the reading mode, as at power-on."""
        with self.lock:
            self._status = _READY
            self._buffer.clear()
            self._enter(Mode.ARRAY)

    def close(self) -> None:
        """Store pending changes."""
        with self.lock:
            self._save()

    def save(self) -> PflashState:
        """Return a snapshot."""
        with self.lock:
            return PflashState(
                mode=self._mode,
                status=self._status,
                buffer_start=self._buffer_start,
                buffer_left=self._buffer_left,
                buffer=tuple(self._buffer),
                array=bytes(self._array),
            )

    def restore(self, state: PflashState) -> None:
        """Continue from a snapshot, whose array is stored.

        Raises:
            StateError: the array is of another size, or the buffered write cannot be.
        """
        if len(state.array) != len(self._array):
            raise StateError(f"array: {len(state.array)} bytes, not {len(self._array)}")
        if state.mode is Mode.BUFFER_DATA and not (
            0 < state.buffer_left <= BUFFER_SIZE - len(state.buffer)
        ):
            raise StateError(f"buffer_left: {state.buffer_left}")
        with self.lock:
            self._array[:] = state.array
            self._touch(0, len(self._array))
            self._status = state.status
            self._buffer_start = state.buffer_start
            self._buffer_left = state.buffer_left
            self._buffer = list(state.buffer)
            self._enter(state.mode)
            self._save()


def _query_table(size: int) -> bytes:
    """Return the CFI query structure of a chip of `size` bytes. Source: JESD68.01 §2."""
    blocks = size // BLOCK_SIZE
    table = bytearray(0x31)
    table[0x10:0x13] = b"QRY"
    table[0x13:0x17] = b"\x01\x00\x31\x00"  # Intel's extended command set, its own table
    table[0x1B:0x1F] = b"\x45\x55\x00\x00"  # 4.5 to 5.5 V, no programming voltage
    # Typical times, as powers of two: byte, buffer (µs), block, chip (ms); then how much longer.
    table[0x1F:0x27] = b"\x07\x07\x0a\x00\x04\x04\x04\x00"
    table[0x27] = (size - 1).bit_length()
    table[0x28:0x2A] = b"\x00\x00"  # 8 bits wide
    table[0x2A:0x2C] = (BUFFER_SIZE.bit_length() - 1).to_bytes(2, "little")
    table[0x2C] = 1  # one region of equal blocks
    table[0x2D:0x2F] = (blocks - 1).to_bytes(2, "little")
    table[0x2F:0x31] = (BLOCK_SIZE >> 8).to_bytes(2, "little")
    return bytes(table)
