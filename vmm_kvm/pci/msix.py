"""MSI-X: one interrupt message per vector, each with a mask and a pending bit.

The table and the pending bits share one BAR: the table at its start, the bits in its second half.

Locks: `Msix.lock` is taken by the bus, by devices' notifications, and inside the lock of the PCI
host when the guest writes the capability; `send` and `on_route_change` run under it.
"""

import threading
from collections.abc import Callable
from typing import Annotated, Literal, NamedTuple

from vmm_kvm.bits import PAGE_SIZE, all_ones
from vmm_kvm.errors import SpecError, StateError
from vmm_kvm.pci.config import BarKind, PciFunction
from vmm_kvm.pci.ids import CapabilityId
from vmm_kvm.state import PartState, Range

VECTORS_MAX = 2048
ENTRY_SIZE = 16
CONTROL_ENABLE = 1 << 15
"""Message control (PCI LB 3.0 §6.8.2.3)."""
CONTROL_FUNCTION_MASK = 1 << 14
VECTOR_MASKED = 1 << 0
"""Vector control (PCI LB 3.0 §6.8.2.9)."""

_CONTROL_OFFSET = 2  # of message control in the capability
_DATA_OFFSET = 8  # in a table entry
_VECTOR_CONTROL_OFFSET = 12
_ADDRESS_RESERVED = 0b11  # messages are dwords
_RESET_ENTRY = bytes(_VECTOR_CONTROL_OFFSET) + bytes((VECTOR_MASKED, 0, 0, 0))


class MsixMessage(NamedTuple):
    """A vector's write to interrupt: 32 bits of `data` at the 64-bit `address`."""

    address: int
    data: int


class MsixState(PartState):
    """Everything that a guest can observe of an Msix besides its capability."""

    table: bytes
    pending: frozenset[Annotated[int, Range(0, VECTORS_MAX - 1)]]
    is_enabled: bool
    is_masked: bool
    version: Literal[1] = 1


class Msix:
    """The MSI-X capability of one function; the BusDevice of the BAR that holds its table.

    `send` delivers a message now. `on_route_change` is told whenever what a vector would deliver
    changes; None means that it delivers nothing, being masked or disabled. Both are called with the
    lock held, must not wait, and must not call back.

    Source: PCI LB 3.0 §6.8.2
    """

    __slots__ = (
        "_function",
        "_is_enabled",
        "_is_masked",
        "_offset",
        "_on_route_change",
        "_pending",
        "_routes",
        "_send",
        "_table",
        "bar_size",
        "lock",
        "vectors",
    )

    def __init__(
        self,
        vectors: int,
        send: Callable[[int, int], None],
        *,
        on_route_change: Callable[[int, MsixMessage | None], None] | None = None,
    ) -> None:
        """Make `vectors` vectors, 1 to 2048, all masked.

        Raises:
            SpecError: the count is out of range.
        """
        if not 1 <= vectors <= VECTORS_MAX:
            raise SpecError(f"MSI-X: {vectors} vectors, not 1 to {VECTORS_MAX}")
        self.lock = threading.Lock()
        self.vectors = vectors
        self.bar_size = 2 * max(PAGE_SIZE, 1 << (vectors * ENTRY_SIZE - 1).bit_length())
        self._send = send
        self._on_route_change = on_route_change
        self._table = bytearray(_RESET_ENTRY * vectors)
        self._pending: set[int] = set()
        self._routes: list[MsixMessage | None] = [None] * vectors
        self._is_enabled = False
        self._is_masked = False
        self._function: PciFunction | None = None
        self._offset = 0

    @property
    def pba_offset(self) -> int:
        """The offset of the pending bits in the BAR."""
        return self.bar_size // 2

    def attach(self, function: PciFunction, bar: int) -> None:
        """Give `function` the capability, and BAR `bar` for the table; called once, before use.

        Raises:
            SpecError: the BAR is taken or configuration space is full.
        """
        function.add_bar(bar, BarKind.MEMORY32, self.bar_size, self)
        body = (
            (self.vectors - 1).to_bytes(2, "little")
            + bar.to_bytes(4, "little")
            + (self.pba_offset | bar).to_bytes(4, "little")
        )
        self._function = function
        self._offset = function.add_capability(
            CapabilityId.MSI_X,
            body,
            writable=(CONTROL_ENABLE | CONTROL_FUNCTION_MASK).to_bytes(2, "little"),
            on_write=self._write_capability,
        )

    @property
    def is_enabled(self) -> bool:
        """Whether the guest chose MSI-X, so that the function must not use INTx; any thread."""
        return self._is_enabled

    def notify(self, vector: int) -> None:
        """Interrupt through `vector`, or remember it while it is masked; any thread.

        Nothing happens while MSI-X is disabled, and for vectors that do not exist.
        """
        with self.lock:
            if not self._is_enabled or not 0 <= vector < self.vectors:
                return
            route = self._routes[vector]
            if route is None:
                self._pending.add(vector)
            else:
                self._send(route.address, route.data)

    # The guest's side; the bus holds the lock

    def read(self, offset: int, size: int) -> int:
        """Read the table or the pending bits; bytes between and after them read as zero."""
        end = offset + size
        if offset < self.pba_offset:
            return int.from_bytes(self._table[offset:end], "little")
        first = 8 * (offset - self.pba_offset)
        return sum(
            1 << (vector - first) for vector in self._pending if first <= vector < first + 8 * size
        )

    def write(self, offset: int, size: int, value: int) -> None:
        """Write the table; pending bits are read-only."""
        end = min(offset + size, len(self._table))
        if offset >= end:
            return
        data = (value & all_ones(size)).to_bytes(size, "little")
        self._table[offset:end] = data[: end - offset]
        for vector in range(offset // ENTRY_SIZE, (end - 1) // ENTRY_SIZE + 1):
            at = vector * ENTRY_SIZE
            self._table[at] &= ~_ADDRESS_RESERVED & 0xFF
            control = at + _VECTOR_CONTROL_OFFSET
            self._table[control : control + 4] = bytes(
                (self._table[control] & VECTOR_MASKED, 0, 0, 0)
            )
            self._update(vector)

    def _write_capability(self, _offset: int, _size: int) -> None:
        if self._function is None:
            return
        control = self._function.peek(self._offset + _CONTROL_OFFSET, 2)
        with self.lock:
            self._is_enabled = bool(control & CONTROL_ENABLE)
            self._is_masked = bool(control & CONTROL_FUNCTION_MASK)
            self._update_all()

    def _update_all(self) -> None:
        for vector in range(self.vectors):
            self._update(vector)

    def _update(self, vector: int) -> None:
        """Recompute what `vector` delivers, and deliver what waited for it."""
        at = vector * ENTRY_SIZE
        route = None
        if (
            self._is_enabled
            and not self._is_masked
            and not self._table[at + _VECTOR_CONTROL_OFFSET] & VECTOR_MASKED
        ):
            data = at + _DATA_OFFSET
            route = MsixMessage(
                int.from_bytes(self._table[at:data], "little"),
                int.from_bytes(self._table[data : data + 4], "little"),
            )
        if route != self._routes[vector]:
            self._routes[vector] = route
            if self._on_route_change:
                self._on_route_change(vector, route)
        if route and vector in self._pending:
            self._pending.remove(vector)
            self._send(route.address, route.data)

    # The outside; these take the lock

    def reset(self) -> None:
        """Mask and clear every vector; the capability is reset with its function."""
        with self.lock:
            self._table[:] = _RESET_ENTRY * self.vectors
            self._pending.clear()
            self._is_enabled = self._is_masked = False
            self._update_all()

    def save(self) -> MsixState:
        """Return a snapshot; any thread."""
        with self.lock:
            return MsixState(
                table=bytes(self._table),
                pending=frozenset(self._pending),
                is_enabled=self._is_enabled,
                is_masked=self._is_masked,
            )

    def restore(self, state: MsixState) -> None:
        """Continue from a snapshot of as many vectors.

        Raises:
            StateError: it is of another number of vectors.
        """
        if len(state.table) != len(self._table) or max(state.pending, default=0) >= self.vectors:
            raise StateError(f"msix: not of {self.vectors} vectors")
        with self.lock:
            self._table[:] = state.table
            self._pending = set(state.pending)
            self._is_enabled = state.is_enabled
            self._is_masked = state.is_masked
            self._update_all()
