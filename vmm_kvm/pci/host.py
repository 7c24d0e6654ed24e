"""The PCI host bridge: bus 0, its configuration mechanisms, and where BARs are decoded.

Configuration space is reached through ports 0xcf8 and 0xcfc and through ECAM. Functions are
conventional and single: function 0 of up to 32 devices. A BAR answers while its command bit is
set and its address lies in a window of the machine and overlaps nothing; otherwise nothing does.

Locks: `PciHost.lock` guards the configuration of every function; ECAM uses the same one. Within it
only a Bus's own lock and those of a function's parts (INTx, MSI-X) are taken, which in turn never
lead back here.
"""

import threading
from collections.abc import Callable, Iterator
from typing import Annotated, Literal, NamedTuple

from vmm_kvm.arch.x86 import layout
from vmm_kvm.arch.x86.layout import line_index
from vmm_kvm.bits import GIB, PAGE_SIZE, align_up, all_ones
from vmm_kvm.bus import Bus
from vmm_kvm.errors import BusError, SpecError, StateError
from vmm_kvm.log import Log
from vmm_kvm.pci.config import Bar, BarKind, PciFunction, PciFunctionState
from vmm_kvm.pci.ids import (
    CLASS_HOST_BRIDGE,
    DEVICE_OPENBSD_PCHB,
    SLOTS,
    VENDOR_OPENBSD,
    Command,
    Register,
)
from vmm_kvm.state import U8, U32, PartState, Range

log = Log(__name__)

SIZE = 8
"""I/O ports of configuration mechanism 1."""


class Port:
    """Offsets of the ports."""

    CONFIG_ADDRESS = 0
    RESET_CONTROL = 1
    CONFIG_DATA = 4


class ResetControl:
    """The reset control register, as PC chipsets have it."""

    SYSTEM_RESET = 1 << 1
    RESET_CPU = 1 << 2
    FULL_RESET = 1 << 3


_ADDRESS_ENABLE = 1 << 31
_ADDRESS_BITS = 0x80FF_FFFC
_RESET_CONTROL_STORED = ResetControl.SYSTEM_RESET | ResetControl.RESET_CPU | ResetControl.FULL_RESET
_HIGH_MEMORY = 4 * GIB  # what only 64-bit BARs reach


class PciHostState(PartState):
    """Everything that a guest can observe of a PciHost and its functions' configuration."""

    address: U32
    reset_control: U8
    functions: tuple[tuple[Annotated[int, Range(0, SLOTS - 1)], PciFunctionState], ...]
    """By slot."""
    version: Literal[1] = 1


class _Decoded(NamedTuple):
    """A BAR's range on a bus."""

    bus: Bus
    base: int
    bar: Bar


class PciHost:
    """The host bridge with bus 0; a BusDevice of 8 ports, for 0xcf8.

    `pio` and `mmio` are where BARs appear. `on_reset` is called when the guest sets the reset bit
    of the reset control register, with the lock held, on a vCPU thread; it must not wait.

    `bridge` is the function in slot 0, by default OpenBSD's; `hole_start` is where RAM below 4 GiB
    ends at most.

    Source: PCI LB 3.0 §3.2.2.3.2; OpenBSD vmd/pci.c
    """

    __slots__ = (
        "_address",
        "_decoded",
        "_functions",
        "_hole_start",
        "_mmio",
        "_on_reset",
        "_pio",
        "_reset_control",
        "lock",
    )

    def __init__(
        self,
        pio: Bus,
        mmio: Bus,
        *,
        on_reset: Callable[[], None],
        bridge: PciFunction | None = None,
        hole_start: int = layout.PCI_HOLE_START,
    ) -> None:
        self.lock = threading.Lock()
        self._pio = pio
        self._mmio = mmio
        self._on_reset = on_reset
        self._hole_start = hole_start
        self._address = 0
        self._reset_control = 0
        self._functions: dict[int, PciFunction] = {}
        self._decoded: dict[tuple[int, int], _Decoded] = {}
        self.add(
            bridge
            or PciFunction(
                vendor_id=VENDOR_OPENBSD,
                device_id=DEVICE_OPENBSD_PCHB,
                class_code=CLASS_HOST_BRIDGE,
                subsystem_vendor_id=VENDOR_OPENBSD,
            )
        )

    # Building

    @property
    def next_slot(self) -> int:
        """The slot, 1 to 31, that `add` will use; 32 when the bus is full."""
        return next(slot for slot in range(SLOTS + 1) if slot not in self._functions)

    def add(self, function: PciFunction, slot: int | None = None) -> int:
        """Put `function` into the next slot, or into `slot`, 1 to 31, and return that slot.

        Raises:
            SpecError: all 32 slots are taken, or this one is.
        """
        with self.lock:
            if slot is None:
                slot = self.next_slot
            if slot >= SLOTS:
                raise SpecError(f"more than {SLOTS - 1} PCI devices")
            if slot in self._functions:
                raise SpecError(f"PCI slot {slot} is taken")
            self._functions[slot] = function
            self._route_interrupt(slot, function)
            self._decode()
            return slot

    def assign_bars(self, *, mmio64: tuple[int, int] | None = None) -> None:
        """Give every BAR an address and enable its decoding, as firmware would.

        For guests that start without firmware, before their first instruction; again after a
        reset. The windows are those of the layout; `mmio64`, an address and size in bytes, is
        where 64-bit BARs go that do not fit below 4 GiB.

        Raises:
            SpecError: a window is too small.
        """
        io = _Window(layout.PCI_IO_START, layout.PCI_IO_SIZE)
        low = _Window(layout.PCI_MMIO32_START, layout.PCI_MMIO32_SIZE)
        high = _Window(*mmio64) if mmio64 else None
        with self.lock:
            bars = [
                (function, bar) for function in self._functions.values() for bar in function.bars
            ]
            # Largest first, so that alignment wastes nothing.
            for function, bar in sorted(bars, key=lambda pair: -pair[1].size):
                if bar.kind is BarKind.IO:
                    address = io.allocate(bar.size)
                else:
                    size = max(bar.size, PAGE_SIZE)
                    address = low.allocate(size)
                    if address is None and high and bar.kind is BarKind.MEMORY64:
                        address = high.allocate(size)
                if address is None:
                    raise SpecError(f"PCI: no room for a BAR of {bar.size:#x} ({bar.kind.value})")
                function.write_config(bar.register, bar.width, address)
                space = Command.IO_SPACE if bar.kind is BarKind.IO else Command.MEMORY_SPACE
                function.write_config(Register.COMMAND, 2, function.command | space)
            self._decode()

    @staticmethod
    def _route_interrupt(slot: int, function: PciFunction) -> None:
        pin = function.interrupt_pin
        if pin:
            irq = layout.PIC_PCI_INTX[line_index(slot, pin)]
            function.write_config(Register.INTERRUPT_LINE, 1, irq)

    # The guest's side; the bus holds the lock

    def read(self, offset: int, size: int) -> int:
        """Read the address or reset control register, or configuration data.

        Accesses of other sizes to the address register are not its own and read as all ones, by
        which drivers tell this mechanism from an older one.
        """
        if offset >= Port.CONFIG_DATA and offset + size <= SIZE:
            target = self._selected()
            if target is None:
                return all_ones(size)
            return target.read_config(self._register(offset), size)
        match offset, size:
            case Port.CONFIG_ADDRESS, 4:
                return self._address
            case Port.RESET_CONTROL, 1:
                return self._reset_control
            case _:
                return all_ones(size)

    def write(self, offset: int, size: int, value: int) -> None:
        """Write the address or reset control register, or configuration data."""
        if offset >= Port.CONFIG_DATA and offset + size <= SIZE:
            target = self._selected()
            if target and target.write_config(self._register(offset), size, value):
                self._decode()
            return
        match offset, size:
            case Port.CONFIG_ADDRESS, 4:
                self._address = value & _ADDRESS_BITS
            case Port.RESET_CONTROL, 1:
                resets = value & ~self._reset_control & ResetControl.RESET_CPU
                self._reset_control = value & _RESET_CONTROL_STORED
                if resets:
                    self._on_reset()
            case _:
                pass

    def _selected(self) -> PciFunction | None:
        address = self._address
        if not address & _ADDRESS_ENABLE:
            return None
        return self._find(address >> 16 & 0xFF, address >> 11 & 0x1F, address >> 8 & 0x7)

    def _register(self, offset: int) -> int:
        return self._address & 0xFC | offset - Port.CONFIG_DATA

    def _find(self, bus: int, slot: int, function: int) -> PciFunction | None:
        return self._functions.get(slot) if bus == 0 and function == 0 else None

    def read_ecam(self, offset: int, size: int) -> int:
        """Read configuration space at an ECAM offset; called with the lock held."""
        target = self._find(offset >> 20, offset >> 15 & 0x1F, offset >> 12 & 0x7)
        return target.read_config(offset & 0xFFF, size) if target else all_ones(size)

    def write_ecam(self, offset: int, size: int, value: int) -> None:
        """Write configuration space at an ECAM offset; called with the lock held."""
        target = self._find(offset >> 20, offset >> 15 & 0x1F, offset >> 12 & 0x7)
        if target and target.write_config(offset & 0xFFF, size, value):
            self._decode()

    # Decoding

    def _decode(self) -> None:
        """Update the buses from the command registers and BARs."""
        wanted = dict(self._wanted())
        for key, decoded in list(self._decoded.items()):
            if wanted.get(key) != decoded:
                decoded.bus.remove(decoded.base)
                del self._decoded[key]
                if decoded.bar.on_decode:
                    decoded.bar.on_decode(None)
        for key, decoded in wanted.items():
            if key in self._decoded:
                continue
            try:
                decoded.bus.insert(decoded.base, decoded.bar.size, decoded.bar.device)
            except BusError as err:
                log.debug("pci 00:%02x.0 BAR %d: %s", *key, err)
            else:
                self._decoded[key] = decoded
                if decoded.bar.on_decode:
                    decoded.bar.on_decode(decoded.base)

    def _wanted(self) -> Iterator[tuple[tuple[int, int], _Decoded]]:
        for slot, function in self._functions.items():
            for bar in function.bars:
                if not function.is_decoded(bar):
                    continue
                base = function.bar_address(bar)
                if self._is_in_window(bar, base):
                    bus = self._pio if bar.kind is BarKind.IO else self._mmio
                    yield (slot, bar.number), _Decoded(bus, base, bar)
                else:
                    log.debug("pci 00:%02x.0 BAR %d: %#x is in no window", slot, bar.number, base)

    def _is_in_window(self, bar: Bar, base: int) -> bool:
        end = base + bar.size
        if bar.kind is BarKind.IO:
            return base >= layout.PCI_IO_START and end <= layout.PCI_IO_START + layout.PCI_IO_SIZE
        # Firmware allocates downward from the IOAPIC, above the window that ours starts with.
        return (base >= self._hole_start and end <= layout.IOAPIC_ADDRESS) or (
            base >= _HIGH_MEMORY and end <= self._mmio.size
        )

    # The outside; these take the lock

    def reset(self) -> None:
        """Return every function to the unconfigured state; no BAR is decoded."""
        with self.lock:
            self._address = self._reset_control = 0
            for slot, function in self._functions.items():
                function.reset()
                self._route_interrupt(slot, function)
            self._decode()

    def save(self) -> PciHostState:
        """Return a snapshot; any thread."""
        with self.lock:
            return PciHostState(
                address=self._address,
                reset_control=self._reset_control,
                functions=tuple(
                    (slot, function.save()) for slot, function in self._functions.items()
                ),
            )

    def restore(self, state: PciHostState) -> None:
        """Continue from a snapshot of a host with the same functions.

        Raises:
            StateError: the slots differ, or the function in one of them.
        """
        with self.lock:
            if [slot for slot, _ in state.functions] != list(self._functions):
                raise StateError("functions: in other slots")
            self._address = state.address & _ADDRESS_BITS
            self._reset_control = state.reset_control & _RESET_CONTROL_STORED
            for slot, function in state.functions:
                try:
                    self._functions[slot].restore(function)
                except StateError as err:
                    raise StateError(f"slot {slot}: {err}") from err
            self._decode()


class EcamWindow:
    """Memory-mapped configuration space of a host; a BusDevice of 1 MiB per bus.

    It shares the host's lock. Functions are conventional, so the last 3840 bytes of each read as
    all ones.

    Source: PCI Express 4.0 §7.2.2
    """

    __slots__ = ("_host", "lock")

    def __init__(self, host: PciHost) -> None:
        self.lock = host.lock
        self._host = host

    def read(self, offset: int, size: int) -> int:
        """Read configuration space."""
        return self._host.read_ecam(offset, size)

    def write(self, offset: int, size: int, value: int) -> None:
        """Write configuration space."""
        self._host.write_ecam(offset, size, value)


class _Window:
    """A range of addresses that is given out from its start."""

    def __init__(self, start: int, size: int) -> None:
        self._next = start
        self._end = start + size

    def allocate(self, size: int) -> int | None:
        """Return a free address aligned to `size`, a power of two; None when there is no room."""
        address = align_up(self._next, size)
        if address + size > self._end:
            return None
        self._next = address + size
        return address
