"""Split virtqueues, the device's side: available chains in, used chains out.

What the driver wrote is copied once, then checked, then used. A chain is a list of views of guest
memory, so the data themselves are never copied here.

Ordering: x86 keeps loads in order among loads and stores among stores, which is all that taking a
chain and publishing a used one need. The exceptions, where a load must not overtake an earlier
store, go through `_full_fence`.

A queue belongs to one thread, its device's; `stop` alone may be called from others.
"""

import struct
import threading
from collections.abc import Sequence
from typing import NamedTuple, Protocol

from vmm_kvm.errors import GuestMemoryError, VirtqueueError
from vmm_kvm.scatter import Scatter
from vmm_kvm.virtio.abi import (
    VIRTIO_RING_F_EVENT_IDX,
    VIRTIO_RING_F_INDIRECT_DESC,
    VRING_AVAIL_F_NO_INTERRUPT,
    VRING_DESC_F_INDIRECT,
    VRING_DESC_F_NEXT,
    VRING_DESC_F_WRITE,
    VRING_USED_F_NO_NOTIFY,
)
from vmm_kvm.virtio.tables import LONG_MAX, LONG_MIN, Span

SIZE_MAX = 32768
"""Of a split virtqueue (virtio 1.2 §2.7)."""
INDIRECT_MAX = 1024
"""Descriptors in an indirect table that we take: as many as preadv(2) takes buffers."""

_DESCRIPTOR_SIZE = 16
_DESCRIPTOR_ALIGNMENT, _AVAILABLE_ALIGNMENT, _USED_ALIGNMENT = 16, 2, 4
_USED_HEADER, _USED_ELEMENT_SIZE = 4, 8
_DESCRIPTOR = struct.Struct("<QIHH")  # address, length, flags, next
_unpack_descriptor, _unpack_table = _DESCRIPTOR.unpack_from, _DESCRIPTOR.iter_unpack
_KNOWN_IN_TABLE = VRING_DESC_F_NEXT | VRING_DESC_F_WRITE
_INDEX_MASK = 0xFFFF
_ADDRESS_BITS = 47  # no more is mapped below 128 TiB
_HIGH_START = 1 << 32
_LONG, _TOO_LONG = LONG_MIN * _DESCRIPTOR_SIZE, LONG_MAX * _DESCRIPTOR_SIZE + 1
# Positions in the rings, in 16-bit words.
_FLAGS, _INDEX, _RING = 0, 1, 2


class Memory(Protocol):
    """Guest-physical memory, as far as a queue needs it."""

    def view(self, gpa: int, size: int) -> memoryview:
        """Return a writable view of `size` bytes at `gpa`; raises GuestMemoryError."""


class Ring(NamedTuple):
    """Where the driver put a queue: what a transport learns and hands on."""

    size: int
    """Descriptors, a power of two up to 32768."""
    descriptors: int
    """Guest-physical address of the descriptor table, a multiple of 16."""
    available: int
    """Of the available ring ("driver area"), a multiple of 2."""
    used: int
    """Of the used ring ("device area"), a multiple of 4."""


class Chain:
    """One descriptor chain: the buffers of one request.

    The guest can change their contents at any time: copy first, then check, then use.
    """

    __slots__ = ("head", "pieces", "readable", "writable")

    def __init__(
        self,
        head: int,
        readable: list[memoryview],
        writable: list[memoryview],
        pieces: Scatter | None = None,
    ) -> None:
        self.head = head
        """Number of its first descriptor, which names the chain."""
        self.readable = readable
        """What the driver wrote for the device, in order; none is empty."""
        self.writable = writable
        """Where the device may write, in order; none is empty."""
        self.pieces = pieces
        """What is between the first that is readable and the last that is writable, and then they
        are the only ones; for who asked for it."""

    def spread(self) -> None:
        """Move `pieces` to where they belong."""
        pieces, self.pieces = self.pieces, None
        if pieces and pieces.is_writable:
            self.writable[:0] = pieces
        elif pieces:
            self.readable += pieces


class Virtqueue:
    """One split virtqueue that the driver has enabled.

    Source: virtio 1.2 §2.7
    """

    __slots__ = (
        "_avail_event",
        "_available",
        "_descriptors",
        "_fence",
        "_has_event_idx",
        "_has_indirect",
        "_is_stopped",
        "_low",
        "_low_end",
        "_mask",
        "_memory",
        "_next_available",
        "_next_used",
        "_seen_available",
        "_signalled_used",
        "_spans",
        "_used",
        "_used_elements",
        "_used_event",
        "_view",
        "is_streaming",
        "size",
    )

    def __init__(
        self,
        memory: Memory,
        ring: Ring,
        features: int,
        *,
        next_available: int = 0,
        next_used: int = 0,
    ) -> None:
        """Look at a queue in `memory` with the negotiated `features`, a mask.

        `next_available` and `next_used`, 0 to 65535, are where a queue that has been served
        before goes on.

        Raises:
            VirtqueueError: the size is not one, or a part is misaligned.
            GuestMemoryError: a part is not inside one region of RAM.
        """
        size = ring.size
        if not 0 < size <= SIZE_MAX or size & (size - 1):
            raise VirtqueueError(f"queue size {size}: not a power of two up to {SIZE_MAX}")
        if (
            ring.descriptors % _DESCRIPTOR_ALIGNMENT
            or ring.available % _AVAILABLE_ALIGNMENT
            or ring.used % _USED_ALIGNMENT
        ):
            raise VirtqueueError(
                f"queue at {ring.descriptors:#x}, {ring.available:#x}, {ring.used:#x}: misaligned"
            )
        self.size = size
        self._mask = size - 1
        self._memory = memory
        self._view = memory.view
        # Nearly every buffer is there: a slice of it takes half the time of a call.
        self._low = _longest_view(memory, 0)
        self._low_end = len(self._low)
        self._descriptors = memory.view(ring.descriptors, _DESCRIPTOR_SIZE * size)
        self._available = memory.view(ring.available, 2 * (_RING + size + 1)).cast("H")
        elements_end = _USED_HEADER + _USED_ELEMENT_SIZE * size
        used = memory.view(ring.used, elements_end + 2)
        self._used = used.cast("H")
        self._used_elements = used[_USED_HEADER:elements_end].cast("Q")
        self._used_event = _RING + size  # in the available ring
        self._avail_event = elements_end // 2  # in the used ring
        self._has_indirect = bool(features >> VIRTIO_RING_F_INDIRECT_DESC & 1)
        self._has_event_idx = bool(features >> VIRTIO_RING_F_EVENT_IDX & 1)
        self._next_available = self._seen_available = next_available
        self._next_used = self._signalled_used = next_used
        self._is_stopped = False
        self._spans: list[Span] | None = None  # not looked for yet
        self.is_streaming = False
        """Whether pieces were taken since `disable_kicks`: much data, and more to come."""
        self._fence = threading.Lock()

    @property
    def next_available(self) -> int:
        """How many chains were taken, modulo 65536: where a successor goes on."""
        return self._next_available

    @property
    def next_used(self) -> int:
        """How many chains were given back, modulo 65536."""
        return self._next_used

    def stop(self) -> None:
        """Let `pop` find nothing more, at the latest after one round of the ring; any thread."""
        self._is_stopped = True

    def pop(self, *, with_pieces: bool = False) -> Chain | None:
        """Take the next available chain; None when there is none.

        Give it back by `push`, once, in any order. Who asks `with_pieces` gets long ones with
        those, where that can be.

        Raises:
            VirtqueueError: the ring or the chain is malformed.
            GuestMemoryError: a buffer is not inside one region of RAM.

        Source: virtio 1.2 §2.7.5, §2.7.6
        """
        at = self._next_available
        if at == self._seen_available:
            if self._is_stopped:
                return None
            seen = self._available[_INDEX]
            if seen == at:
                return None
            if (seen - at) & _INDEX_MASK > self.size:
                raise VirtqueueError(f"available index {seen} after {at}: more than the queue has")
            self._seen_available = seen
        head = self._available[_RING + (at & self._mask)]
        self._next_available = (at + 1) & _INDEX_MASK
        limit = left = self.size
        if head >= limit:
            raise VirtqueueError(f"descriptor {head} of {limit}")
        readable: list[memoryview] = []
        writable: list[memoryview] = []
        low, low_end, view = self._low, self._low_end, self._view
        table: memoryview | bytes = self._descriptors
        link, is_indirect = head, False
        while True:
            address, length, flags, following = _unpack_descriptor(table, link << 4)
            if flags & VRING_DESC_F_INDIRECT:
                if is_indirect:
                    raise VirtqueueError(f"descriptor {head}: an indirect table in another")
                table = self._indirect_table(address, length, flags)
                if not (readable or writable):
                    if with_pieces and _LONG <= length < _TOO_LONG:
                        spans = self._find_spans() if self._spans is None else self._spans
                        for span in spans:
                            if parts := span.divide(table):
                                header, pieces, status = parts
                                self.is_streaming = True
                                return Chain(head, [header], [status], pieces)
                    if chain := self._in_order(head, table):
                        return chain
                limit = left = length // _DESCRIPTOR_SIZE
                link, is_indirect = 0, True
                continue
            if not length:
                raise VirtqueueError(f"descriptor {head}: an empty buffer")
            end = address + length
            buffer = low[address:end] if end <= low_end else view(address, length)
            if flags & VRING_DESC_F_WRITE:
                writable.append(buffer)
            elif writable:
                raise VirtqueueError(f"descriptor {head}: a readable buffer after a writable one")
            else:
                readable.append(buffer)
            if not flags & VRING_DESC_F_NEXT:
                return Chain(head, readable, writable)
            left -= 1
            if not left:
                raise VirtqueueError(f"descriptor {head}: a chain of more than {limit}")
            if following >= limit:
                raise VirtqueueError(f"descriptor {head}: leads to {following} of {limit}")
            link = following

    def unpop(self) -> None:
        """Let the next `pop` return anew what the last one did, which was not given back."""
        self._next_available = (self._next_available - 1) & _INDEX_MASK

    def _in_order(self, head: int, table: bytes) -> Chain | None:
        """Return the chain of an indirect table whose links lead from each entry to the next.

        So does every driver's, and to follow no links takes two thirds of the time. None for a
        table that is otherwise, or that is wrong.
        """
        readable: list[memoryview] = []
        writable: list[memoryview] = []
        low, low_end = self._low, self._low_end
        for number, (address, length, flags, following) in enumerate(_unpack_table(table), 1):
            end = address + length
            if not length or end > low_end or flags > _KNOWN_IN_TABLE:
                return None
            if flags & VRING_DESC_F_WRITE:
                writable.append(low[address:end])
            elif writable:
                return None
            else:
                readable.append(low[address:end])
            if not flags & VRING_DESC_F_NEXT:
                return Chain(head, readable, writable)
            if following != number:
                return None
        return None

    def _find_spans(self) -> list[Span]:
        high = _longest_view(self._memory, _HIGH_START)
        self._spans = [
            Span(memory, start) for start, memory in ((0, self._low), (_HIGH_START, high)) if memory
        ]
        return self._spans

    def _indirect_table(self, address: int, length: int, flags: int) -> bytes:
        if not self._has_indirect:
            raise VirtqueueError("an indirect descriptor, which was not negotiated")
        if flags & VRING_DESC_F_NEXT:
            raise VirtqueueError("an indirect descriptor that has a next one")
        if length % _DESCRIPTOR_SIZE or not 0 < length <= INDIRECT_MAX * _DESCRIPTOR_SIZE:
            raise VirtqueueError(f"an indirect table of {length} bytes")
        end = address + length
        return bytes(
            self._low[address:end] if end <= self._low_end else self._view(address, length)
        )

    def push(self, chain: Chain, written: int) -> None:
        """Give `chain` back; `written` is how many bytes of `writable` were written.

        The driver sees it from now on; whether it must be told, `needs_interrupt` says.

        Source: virtio 1.2 §2.7.8
        """
        at = self._next_used
        self._used_elements[at & self._mask] = chain.head | written << 32
        self._next_used = at = (at + 1) & _INDEX_MASK
        self._used[_INDEX] = at

    def push_together(self, chains: Sequence[tuple[Chain, int]]) -> None:
        """Give chains back as `push` does; the driver sees either none of them or all.

        For what needs several, such as a frame in merged buffers.

        Source: virtio 1.2 §5.1.6.4
        """
        at, elements, mask = self._next_used, self._used_elements, self._mask
        for chain, written in chains:
            elements[at & mask] = chain.head | written << 32
            at = (at + 1) & _INDEX_MASK
        self._next_used = at
        self._used[_INDEX] = at

    def needs_interrupt(self) -> bool:
        """Tell whether the driver wants to be interrupted for what was pushed since the last call.

        Source: virtio 1.2 §2.7.7.2
        """
        new, old = self._next_used, self._signalled_used
        if new == old:
            return False
        self._signalled_used = new
        self._full_fence()  # the driver's wish must be read after the index was published
        if self._has_event_idx:
            event = self._available[self._used_event]
            return (new - event - 1) & _INDEX_MASK < (new - old) & _INDEX_MASK
        return not self._available[_FLAGS] & VRING_AVAIL_F_NO_INTERRUPT

    def disable_kicks(self) -> None:
        """Ask the driver not to notify: the queue is being served; a hint only.

        Source: virtio 1.2 §2.7.10
        """
        self.is_streaming = False
        # With EVENT_IDX an index in the past does it: it stays where `enable_kicks` left it.
        if not self._has_event_idx:
            self._used[_FLAGS] = VRING_USED_F_NO_NOTIFY

    def enable_kicks(self) -> bool:
        """Ask the driver to notify again; True if something became available meanwhile.

        Then go on: there may be no notification for it.

        Source: virtio 1.2 §2.7.10
        """
        if self._is_stopped:
            return False
        if self._has_event_idx:
            self._used[self._avail_event] = self._next_available
        else:
            self._used[_FLAGS] = 0
        self._full_fence()  # the driver's index must be read after our wish is there
        return self._available[_INDEX] != self._next_available

    def _full_fence(self) -> None:
        """Let no later load overtake an earlier store.

        To take a free lock is a LOCK-prefixed instruction in every CPython (sem_trywait, or the
        interpreter's own mutex), and that is a full barrier (Intel SDM vol. 3 §8.2.2). The driver
        has the matching one between its index and its look at ours.
        """
        self._fence.acquire()
        self._fence.release()


def _longest_view(memory: Memory, start: int) -> memoryview:
    """Return the longest view of `memory` from an address: RAM lies from 0, and from 4 GiB."""
    size = 0
    for bit in reversed(range(_ADDRESS_BITS)):
        try:
            memory.view(start, size | 1 << bit)
        except GuestMemoryError:
            continue
        size |= 1 << bit
    return memory.view(start, size) if size else memoryview(b"")
