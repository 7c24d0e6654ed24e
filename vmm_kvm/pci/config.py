"""A PCI function: its type 0 configuration space, its BARs, its capabilities, its INTx pin.

A mask per byte says which bits the guest may change, so read-only fields are protected and the
sizing protocol of BARs needs no code. `host` decides where a BAR is decoded.

Locks: the configuration space is guarded by the lock of the host that the function is added to.
`_intx_lock` guards the pin alone, is innermost, and is held only while the line is set.
"""

import enum
import threading
from collections.abc import Callable
from typing import Annotated, Literal, NamedTuple

from vmm_kvm.bits import align_up, all_ones
from vmm_kvm.bus import BusDevice
from vmm_kvm.errors import SpecError, StateError
from vmm_kvm.irq import IrqLine
from vmm_kvm.pci.ids import BARS, CONFIG_SIZE, Command, Register, Status
from vmm_kvm.state import Length, PartState

_COMMAND_WRITABLE = (
    Command.IO_SPACE
    | Command.MEMORY_SPACE
    | Command.BUS_MASTER
    | Command.PARITY_ERROR_RESPONSE
    | Command.SERR_ENABLE
    | Command.INTERRUPT_DISABLE
)
_STATUS_CLEARABLE = (
    Status.MASTER_PARITY_ERROR
    | Status.SIGNALED_TARGET_ABORT
    | Status.RECEIVED_TARGET_ABORT
    | Status.RECEIVED_MASTER_ABORT
    | Status.SIGNALED_SYSTEM_ERROR
    | Status.PARITY_ERROR
)
_BAR_IO = 0b01
_BAR_MEMORY_64 = 0b100
_BAR_PREFETCHABLE = 0b1000
_IO_SIZE_MIN, _IO_SIZE_MAX = 4, 256
_MEMORY_SIZE_MIN = 16


class BarKind(enum.Enum):
    """The address space and width of a BAR."""

    IO = "io"
    MEMORY32 = "memory32"
    MEMORY64 = "memory64"


class Bar(NamedTuple):
    """A base address register and what answers behind it."""

    number: int
    """0 to 5; a 64-bit BAR occupies the next one too."""
    kind: BarKind
    size: int
    """Bytes or ports, a power of two."""
    device: BusDevice
    on_decode: Callable[[int | None], None] | None = None
    """Called with the address from which on it is decoded, or None when it is not any more."""

    @property
    def register(self) -> int:
        """Its offset in configuration space."""
        return Register.BAR0 + 4 * self.number

    @property
    def width(self) -> int:
        """Bytes of configuration space that it occupies."""
        return 8 if self.kind is BarKind.MEMORY64 else 4

    @property
    def flag_bits(self) -> int:
        """The mask of the low bits that are not part of the address."""
        return 0b11 if self.kind is BarKind.IO else 0b1111


class Capability(NamedTuple):
    """A capability, or registers outside of the list: place, and callbacks of accesses."""

    offset: int
    size: int
    """Bytes, with a capability's two-byte header."""
    on_read: Callable[[int, int], None] | None
    on_write: Callable[[int, int], None] | None


class PciFunctionState(PartState):
    """Everything that a guest can observe of a function's configuration space."""

    config: Annotated[bytes, Length(CONFIG_SIZE, CONFIG_SIZE)]
    is_intx_asserted: bool
    version: Literal[1] = 1


class PciFunction:
    """A conventional PCI function with up to 256 bytes of configuration space.

    Make it, add BARs and capabilities, then add it to a host. `read_config` and `write_config` are
    the host's to call, with its lock held.

    Source: PCI LB 3.0 §6
    """

    def __init__(
        self,
        *,
        vendor_id: int,
        device_id: int,
        class_code: int,
        revision_id: int = 0,
        subsystem_vendor_id: int = 0,
        subsystem_id: int = 0,
        interrupt_pin: int = 0,
        intx: IrqLine | None = None,
    ) -> None:
        """Make a function without BARs and capabilities.

        Args:
            vendor_id: 16 bits.
            device_id: 16 bits.
            class_code: 24 bits: base class, subclass, programming interface.
            revision_id: 8 bits.
            subsystem_vendor_id: 16 bits.
            subsystem_id: 16 bits.
            interrupt_pin: 1 to 4 for INTA to INTD, 0 for a function that has none.
            intx: where that pin leads; level-triggered, set from any thread.

        Raises:
            SpecError: there is a pin without a line, a line without a pin, or pin 5.
        """
        if not 0 <= interrupt_pin <= 4 or bool(interrupt_pin) != (intx is not None):
            raise SpecError(f"pci function: interrupt pin {interrupt_pin} and its line disagree")
        self._config = bytearray(CONFIG_SIZE)
        self._writable = bytearray(CONFIG_SIZE)
        self._clearable = bytearray(CONFIG_SIZE)
        self._put(Register.VENDOR_ID, 2, vendor_id)
        self._put(Register.DEVICE_ID, 2, device_id)
        self._put(Register.REVISION_ID, 1, revision_id)
        self._put(Register.CLASS_CODE, 3, class_code)
        self._put(Register.SUBSYSTEM_VENDOR_ID, 2, subsystem_vendor_id)
        self._put(Register.SUBSYSTEM_ID, 2, subsystem_id)
        self._put(Register.INTERRUPT_PIN, 1, interrupt_pin)
        self._allow(Register.COMMAND, _COMMAND_WRITABLE.to_bytes(2, "little"))
        self._allow(Register.CACHE_LINE_SIZE, b"\xff")
        self._allow(Register.LATENCY_TIMER, b"\xff")
        self._allow(Register.INTERRUPT_LINE, b"\xff")
        self._clearable[Register.STATUS + 1] = _STATUS_CLEARABLE >> 8
        self._bars: list[Bar] = []
        self._capabilities: list[Capability] = []
        self._capabilities_end = Register.END
        self._capability_link = Register.CAPABILITIES  # where the next one's offset goes
        self._intx = intx
        self._intx_lock = threading.Lock()
        self._is_intx_asserted = False
        self._is_intx_disabled = False
        self._is_intx_high = False
        self._reset_config = bytes(self._config)

    # Building

    def add_bar(
        self,
        index: int,
        kind: BarKind,
        size: int,
        device: BusDevice,
        *,
        is_prefetchable: bool = False,
        on_decode: Callable[[int | None], None] | None = None,
    ) -> None:
        """Put `device` behind BAR `index`.

        Args:
            index: 0 to 5; a 64-bit BAR takes the next one too.
            kind: the address space and width.
            size: a power of two: 4 to 256 ports, or 16 bytes to 2 GiB (64-bit: any).
            device: the device for reads and writes, at offsets into the BAR.
            is_prefetchable: for memory without side effects of reads.
            on_decode: told where on the bus it is decoded, and with None that it is not any more;
                called with the host's lock held.

        Raises:
            SpecError: the index is out of range or taken, or the size is impossible.
        """
        bar = Bar(index, kind, size, device, on_decode)
        taken = {i for b in self._bars for i in range(b.number, b.number + b.width // 4)}
        wanted = set(range(index, index + bar.width // 4))
        if index < 0 or max(wanted) >= BARS or wanted & taken:
            raise SpecError(f"BAR {index}: out of range or taken")
        low, high = (
            (_IO_SIZE_MIN, _IO_SIZE_MAX)
            if kind is BarKind.IO
            else (_MEMORY_SIZE_MIN, 1 << (8 * bar.width - 1))
        )
        if not low <= size <= high or size & (size - 1):
            raise SpecError(f"BAR {index}: {size:#x} is not a size of {kind.value} BARs")
        flags = {BarKind.IO: _BAR_IO, BarKind.MEMORY32: 0, BarKind.MEMORY64: _BAR_MEMORY_64}[kind]
        if is_prefetchable and kind is not BarKind.IO:
            flags |= _BAR_PREFETCHABLE
        self._put(bar.register, bar.width, flags)
        mask = all_ones(bar.width) & ~(size - 1)
        self._allow(bar.register, mask.to_bytes(bar.width, "little"))
        self._bars.append(bar)
        self._reset_config = bytes(self._config)

    def add_capability(
        self,
        capability_id: int,
        body: bytes,
        *,
        writable: bytes = b"",
        on_read: Callable[[int, int], None] | None = None,
        on_write: Callable[[int, int], None] | None = None,
    ) -> int:
        """Append a capability to the list; returns its offset in configuration space.

        Args:
            capability_id: 8 bits.
            body: what follows the ID and the link.
            writable: which bits of `body` the guest may change; shorter means none of the rest.
            on_read: called before the guest reads within the capability, on_write after it wrote
                there or a snapshot was restored; with offset (from the capability's start) and
                size, in bytes, with the host's lock held. Both may use `peek` and `poke`.
            on_write: see on_read.

        Raises:
            SpecError: configuration space is full.
        """
        offset = self._capabilities_end
        size = 2 + len(body)
        if offset + size > CONFIG_SIZE:
            raise SpecError(f"PCI capability {capability_id:#x}: configuration space is full")
        self._put(self._capability_link, 1, offset)
        self._capability_link = offset + 1
        self._config[offset : offset + size] = bytes((capability_id, 0)) + body
        self._allow(offset + 2, writable[: len(body)])
        status = int.from_bytes(self._config[Register.STATUS : Register.STATUS + 2], "little")
        self._put(Register.STATUS, 2, status | Status.CAPABILITIES)
        self._capabilities.append(Capability(offset, size, on_read, on_write))
        self._capabilities_end = align_up(offset + size, 4)
        self._reset_config = bytes(self._config)
        return offset

    def add_registers(
        self,
        offset: int,
        data: bytes,
        *,
        writable: bytes = b"",
        on_write: Callable[[int, int], None] | None = None,
    ) -> None:
        """Put registers of the device's own at `offset`; capabilities go behind them.

        Args:
            offset: after the header and earlier capabilities.
            data: their contents after a reset.
            writable: as of a capability.
            on_write: as of a capability.

        Raises:
            SpecError: the place is taken, or outside configuration space.
        """
        end = offset + len(data)
        if not self._capabilities_end <= offset <= end <= CONFIG_SIZE:
            raise SpecError(f"PCI registers at {offset:#x}: the place is taken")
        self._config[offset:end] = data
        self._allow(offset, writable[: len(data)])
        self._capabilities.append(Capability(offset, len(data), None, on_write))
        self._capabilities_end = align_up(end, 4)
        self._reset_config = bytes(self._config)

    def _put(self, offset: int, size: int, value: int) -> None:
        self._config[offset : offset + size] = value.to_bytes(size, "little")

    def _allow(self, offset: int, mask: bytes) -> None:
        self._writable[offset : offset + len(mask)] = mask

    # Configuration space; the host holds its lock

    def read_config(self, offset: int, size: int) -> int:
        """Read `size` bytes at `offset`; behind the 256 bytes all ones."""
        end = offset + size
        if not 0 <= offset <= end <= CONFIG_SIZE:
            return all_ones(size)
        for capability in self._capabilities:
            if capability.on_read and _overlap(capability, offset, size):
                capability.on_read(offset - capability.offset, size)
        value = int.from_bytes(self._config[offset:end], "little")
        if offset <= Register.STATUS < end and self._is_intx_asserted:
            value |= Status.INTERRUPT << (8 * (Register.STATUS - offset))
        return value

    def write_config(self, offset: int, size: int, value: int) -> bool:
        """Write the bits that may be written; returns whether decoding of BARs may have changed."""
        end = offset + size
        if not 0 <= offset <= end <= CONFIG_SIZE:
            return False
        for at, byte in enumerate((value & all_ones(size)).to_bytes(size, "little"), offset):
            writable = self._writable[at]
            kept = self._config[at] & ~(byte & self._clearable[at])
            self._config[at] = kept & ~writable | byte & writable
        if offset < Register.STATUS and end > Register.COMMAND:
            self._update_intx_disable()
        for capability in self._capabilities:
            if capability.on_write and _overlap(capability, offset, size):
                capability.on_write(offset - capability.offset, size)
        return (offset < Register.STATUS and end > Register.COMMAND) or (
            offset < Register.BAR0 + 4 * BARS and end > Register.BAR0
        )

    def peek(self, offset: int, size: int) -> int:
        """Return configuration bytes without side effects; for capabilities' callbacks."""
        return int.from_bytes(self._config[offset : offset + size], "little")

    def poke(self, offset: int, size: int, value: int) -> None:
        """Replace configuration bytes, also read-only ones; for capabilities' callbacks."""
        self._put(offset, size, value & all_ones(size))

    @property
    def command(self) -> int:
        """The command register."""
        return self.peek(Register.COMMAND, 2)

    @property
    def is_bus_master(self) -> bool:
        """Whether the function may access guest memory and send MSIs; any thread."""
        return bool(self._config[Register.COMMAND] & Command.BUS_MASTER)

    @property
    def bars(self) -> tuple[Bar, ...]:
        """The BARs, in the order in which they were added."""
        return tuple(self._bars)

    @property
    def interrupt_pin(self) -> int:
        """1 to 4 for INTA to INTD, 0 for none."""
        return self._config[Register.INTERRUPT_PIN]

    def bar_address(self, bar: Bar) -> int:
        """Return the address that a BAR holds, whether or not it is decoded."""
        return self.peek(bar.register, bar.width) & ~bar.flag_bits

    def is_decoded(self, bar: Bar) -> bool:
        """Tell whether the command register enables the address space of a BAR."""
        space = Command.IO_SPACE if bar.kind is BarKind.IO else Command.MEMORY_SPACE
        return bool(self._config[Register.COMMAND] & space)

    # INTx

    def set_intx(self, is_asserted: bool) -> None:
        """Assert or deassert the interrupt pin; any thread, also with a device's lock held.

        Nothing happens for a function without a pin.
        """
        with self._intx_lock:
            self._is_intx_asserted = is_asserted
            self._drive_intx()

    def _update_intx_disable(self) -> None:
        with self._intx_lock:
            self._is_intx_disabled = bool(self.command & Command.INTERRUPT_DISABLE)
            self._drive_intx()

    def _drive_intx(self) -> None:
        level = self._is_intx_asserted and not self._is_intx_disabled
        if self._intx and level != self._is_intx_high:
            self._is_intx_high = level
            self._intx.set(level)

    # Snapshots; the host holds its lock

    def reset(self) -> None:
        """Return to the unconfigured state; the pin is deasserted.

        BARs and the command register are cleared, so the host has to decode anew.
        """
        self._set(self._reset_config, is_intx_asserted=False)

    def save(self) -> PciFunctionState:
        """Return a snapshot."""
        return PciFunctionState(config=bytes(self._config), is_intx_asserted=self._is_intx_asserted)

    def restore(self, state: PciFunctionState) -> None:
        """Continue from a snapshot of a function of the same make.

        Raises:
            StateError: a read-only register differs.
        """
        for at, (old, new) in enumerate(zip(self._config, state.config, strict=True)):
            if (old ^ new) & ~(self._writable[at] | self._clearable[at]):
                raise StateError(f"register {at:#x}: {new:#x} is not {old:#x}")
        self._set(state.config, is_intx_asserted=state.is_intx_asserted)

    def _set(self, config: bytes, *, is_intx_asserted: bool) -> None:
        self._config[:] = config
        self._update_intx_disable()
        self.set_intx(is_intx_asserted)
        for capability in self._capabilities:
            if capability.on_write:
                capability.on_write(0, capability.size)


def _overlap(capability: Capability, offset: int, size: int) -> bool:
    return offset < capability.offset + capability.size and offset + size > capability.offset
