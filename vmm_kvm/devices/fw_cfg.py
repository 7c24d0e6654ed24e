"""fw_cfg: named and numbered byte strings that firmware and kernels read from the machine.

Both interfaces are there: byte by byte through the data port, and DMA. Nothing is writable, so a
write through DMA is an error and a write to the data port is lost.
"""

import struct
import threading
from typing import Literal

from vmm_kvm.bits import all_ones
from vmm_kvm.errors import GuestMemoryError, SpecError
from vmm_kvm.log import Log
from vmm_kvm.memory import GuestMemory
from vmm_kvm.state import U16, U32, PartState

log = Log(__name__)

SIZE = 12
"""I/O ports."""


class Key:
    """Selectors of numbered items (QEMU docs/specs/fw_cfg and its users' names)."""

    SIGNATURE = 0x00
    ID = 0x01
    RAM_SIZE = 0x03
    NOGRAPHIC = 0x04
    NB_CPUS = 0x05
    MAX_CPUS = 0x0F
    FILE_DIR = 0x19
    FILE_FIRST = 0x20


class Register:
    """Offsets of the I/O port interface."""

    SELECTOR = 0
    DATA = 1
    DMA_ADDRESS_HIGH = 4
    DMA_ADDRESS_LOW = 8


class Control:
    """The low half of a DMA request's control word; the high half is a selector."""

    ERROR = 1 << 0
    READ = 1 << 1
    SKIP = 1 << 2
    SELECT = 1 << 3
    WRITE = 1 << 4


SIGNATURE = b"QEMU"
FEATURES = 0b11
"""Item ID: the traditional and the DMA interface."""
DMA_SIGNATURE = b"QEMU CFG"
FILE_NAME_SIZE = 56
"""Bytes of a name in the directory, with its terminating zero."""

_WRITE_CHANNEL = 0x4000  # bit of the selector without a meaning of its own today
_REQUEST = struct.Struct(">IIQ")  # control, length in bytes, guest-physical address
_CONTROL = struct.Struct(">I")
_DIRECTORY_COUNT = struct.Struct(">I")
_DIRECTORY_ENTRY = struct.Struct(f">IHH{FILE_NAME_SIZE}s")  # size, selector, reserved, name
# A guest may ask for all of its RAM to be filled; between two pieces, other threads run.
_CHUNK = 1 << 18


class FwCfgState(PartState):
    """Everything that a guest can observe of a FwCfg besides the items."""

    key: U16
    position: U32
    """Bytes of the selected item that were read or skipped."""
    dma_address_high: U32
    version: Literal[1] = 1


class FwCfg:
    """A fw_cfg device; a BusDevice of 12 ports.

    DMA happens within the access that asks for it, on the vCPU's thread. A request outside guest
    RAM ends with the error bit in its control word, if that can be written at all.

    Source: QEMU docs/specs/fw_cfg
    """

    __slots__ = (
        "_dma_address_high",
        "_files",
        "_item",
        "_items",
        "_key",
        "_memory",
        "_position",
        "lock",
    )

    def __init__(self, memory: GuestMemory) -> None:
        self.lock = threading.Lock()
        self._memory = memory
        self._items: dict[int, bytes] = {
            Key.SIGNATURE: SIGNATURE,
            Key.ID: struct.pack("<I", FEATURES),
        }
        self._files: dict[str, int] = {}
        self._items[Key.FILE_DIR] = self._directory()
        self._dma_address_high = 0
        self._select(Key.SIGNATURE)

    def add_item(self, key: int, data: bytes) -> None:
        """Provide `data` under selector `key`, 0 to 0xffff without bit 14.

        Raises:
            SpecError: the key is out of range or taken.
        """
        if not 0 <= key <= 0xFFFF or key & _WRITE_CHANNEL:
            raise SpecError(f"fw_cfg key {key:#x}: out of range")
        with self.lock:
            self._add(key, data)

    def add_file(self, name: str, data: bytes) -> None:
        """Provide `data` as a file, under the next selector from 0x20.

        Raises:
            SpecError: the name is empty, not ASCII, longer than 55 bytes, or taken.
        """
        if not name.isascii() or not 0 < len(name) < FILE_NAME_SIZE:
            raise SpecError(f"fw_cfg file {name!r}: not a name of 1 to 55 ASCII characters")
        with self.lock:
            if name in self._files:
                raise SpecError(f"fw_cfg file {name!r}: exists")
            key = Key.FILE_FIRST + len(self._files)
            self._add(key, data)
            self._files[name] = key
            self._items[Key.FILE_DIR] = self._directory()

    def _add(self, key: int, data: bytes) -> None:
        if key in self._items:
            raise SpecError(f"fw_cfg key {key:#x}: exists")
        self._items[key] = bytes(data)

    def _directory(self) -> bytes:
        return _DIRECTORY_COUNT.pack(len(self._files)) + b"".join(
            _DIRECTORY_ENTRY.pack(len(self._items[key]), key, 0, name.encode())
            for name, key in sorted(self._files.items())
        )

    # The guest's side; the bus holds the lock

    def read(self, offset: int, size: int) -> int:
        """Read the data port (one byte of the item, zero behind its end) or the DMA signature."""
        if offset == Register.DATA and size == 1:
            return self._read_data()
        value = all_ones(size)
        for i in range(size):
            at = offset + i
            if at == Register.DATA:
                byte = self._read_data()
            elif Register.DMA_ADDRESS_HIGH <= at < SIZE:
                byte = DMA_SIGNATURE[at - Register.DMA_ADDRESS_HIGH]
            else:
                continue
            value = value & ~(0xFF << (8 * i)) | byte << (8 * i)
        return value

    def write(self, offset: int, size: int, value: int) -> None:
        """Select an item, or give the address of a DMA request; other writes are lost."""
        match offset, size:
            case Register.SELECTOR, 2:
                self._select(value & 0xFFFF)
            case Register.DMA_ADDRESS_HIGH, 4:
                self._dma_address_high = _swap(value, 4)
            case Register.DMA_ADDRESS_LOW, 4:
                address = self._dma_address_high << 32 | _swap(value, 4)
                self._dma_address_high = 0
                self._dma(address)
            case Register.DMA_ADDRESS_HIGH, 8:
                self._dma_address_high = 0
                self._dma(_swap(value, 8))
            case _:
                pass

    def _select(self, key: int) -> None:
        self._key = key & ~_WRITE_CHANNEL
        self._item = self._items.get(self._key, b"")
        self._position = 0

    def _read_data(self) -> int:
        at = self._position
        if at >= len(self._item):
            return 0
        self._position = at + 1
        return self._item[at]

    def _dma(self, address: int) -> None:
        try:
            control, length, target = _REQUEST.unpack(self._memory.read(address, _REQUEST.size))
        except GuestMemoryError as err:
            log.debug("fw_cfg request: %s", err)
            self._finish(address, Control.ERROR)
            return
        if control & Control.SELECT:
            self._select(control >> 16)
        result = 0
        if control & Control.READ:
            try:
                self._read_to_guest(target, length)
            except GuestMemoryError as err:
                log.debug("fw_cfg read: %s", err)
                result = Control.ERROR
        elif control & Control.WRITE:
            result = Control.ERROR
        elif control & Control.SKIP:
            self._position = min(self._position + length, len(self._item))
        self._finish(address, result)

    def _finish(self, address: int, result: int) -> None:
        try:
            self._memory.write(address, _CONTROL.pack(result))
            self._memory.writes.mark(address, _CONTROL.size)
        except GuestMemoryError as err:
            log.debug("fw_cfg result: %s", err)

    def _read_to_guest(self, target: int, length: int) -> None:
        # One view for all of it: a request that is partly outside RAM changes nothing.
        view = self._memory.view(target, length)
        data = memoryview(self._item)[self._position : self._position + length]
        self._position += len(data)
        for at in range(0, len(data), _CHUNK):
            piece = data[at : at + _CHUNK]
            view[at : at + len(piece)] = piece
        zeros = bytes(min(_CHUNK, length - len(data)))
        for at in range(len(data), length, _CHUNK):
            count = min(_CHUNK, length - at)
            view[at : at + count] = zeros[:count]
        if length:
            self._memory.writes.mark(target, length)

    # The outside; these take the lock

    def reset(self) -> None:
        """Select the signature and forget half of an address; the items stay."""
        with self.lock:
            self._dma_address_high = 0
            self._select(Key.SIGNATURE)

    def save(self) -> FwCfgState:
        """Return a snapshot, without the items; any thread."""
        with self.lock:
            return FwCfgState(
                key=self._key,
                position=self._position,
                dma_address_high=self._dma_address_high,
            )

    def restore(self, state: FwCfgState) -> None:
        """Continue from a snapshot; the items have been added before."""
        with self.lock:
            self._select(state.key)
            self._position = min(max(state.position, 0), len(self._item))
            self._dma_address_high = state.dma_address_high


def _swap(value: int, size: int) -> int:
    """Turn the bus's value into the big-endian register value that the guest meant."""
    return int.from_bytes((value & all_ones(size)).to_bytes(size, "little"), "big")
