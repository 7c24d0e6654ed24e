"""Split virtqueues, the device's side: available chains in, used chains out.

`chain` decodes the chains.

Ordering: x86 keeps loads in order among loads and stores among stores, and taking a chain or
publishing a used one needs no more. The exceptions, where a load must not overtake an earlier
store, go through `_full_fence`.

A queue belongs to one thread, its device's; `stop` alone may be called from others.
"""

import threading
from collections.abc import Sequence
from typing import NamedTuple

from vmm_kvm.errors import VirtqueueError
from vmm_kvm.virtio.abi import (
    VIRTIO_RING_F_EVENT_IDX,
    VIRTIO_RING_F_INDIRECT_DESC,
    VRING_AVAIL_F_NO_INTERRUPT,
    VRING_USED_F_NO_NOTIFY,
)
from vmm_kvm.virtio.chain import Chain, Decoder, Memory

SIZE_MAX = 32768
"""Of a split virtqueue (virtio 1.2 §2.7)."""

_DESCRIPTOR_ALIGNMENT, _AVAILABLE_ALIGNMENT, _USED_ALIGNMENT = 16, 2, 4
_USED_HEADER, USED_ELEMENT_SIZE = 4, 8
USED_RING_SIZE = _USED_HEADER + 2
"""Bytes of a used ring without its elements: flags, index, and the event index behind them."""
_INDEX_MASK = 0xFFFF
# Positions in the rings, in 16-bit words.
_FLAGS, _INDEX, _RING = 0, 1, 2


class Ring(NamedTuple):
    """A queue's place by the driver's word, as the transport learnt it."""

    size: int
    """Descriptors, a power of two up to 32768."""
    descriptors: int
    """Guest-physical address of the descriptor table, a multiple of 16."""
    available: int
    """Of the available ring ("driver area"), a multiple of 2."""
    used: int
    """Of the used ring ("device area"), a multiple of 4."""


class Virtqueue:
    """One split virtqueue that the driver has enabled.

    Source: virtio 1.2 §2.7
    """

    __slots__ = (
        "_avail_event",
        "_available",
        "_decoder",
        "_fence",
        "_has_event_idx",
        "_is_stopped",
        "_mask",
        "_next_available",
        "_next_used",
        "_seen_available",
        "_signalled_used",
        "_used",
        "_used_elements",
        "_used_event",
        "_used_place",
        "_writes",
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
        has_indirect = bool(features >> VIRTIO_RING_F_INDIRECT_DESC & 1)
        self._decoder = Decoder(memory, ring.descriptors, size, has_indirect=has_indirect)
        self._available = memory.view(ring.available, 2 * (_RING + size + 1)).cast("H")
        elements_end = _USED_HEADER + USED_ELEMENT_SIZE * size
        used = memory.view(ring.used, elements_end + 2)
        self._used = used.cast("H")
        self._used_elements = used[_USED_HEADER:elements_end].cast("Q")
        self._used_place = ring.used, elements_end + 2
        self._writes = memory.writes
        self._used_event = _RING + size  # in the available ring
        self._avail_event = elements_end // 2  # in the used ring
        self._has_event_idx = bool(features >> VIRTIO_RING_F_EVENT_IDX & 1)
        self._next_available = self._seen_available = next_available
        self._next_used = self._signalled_used = next_used
        self._is_stopped = False
        self.is_streaming = False
        """Whether a chain with pieces was taken since `disable_kicks`: a sign of much data to
        come."""
        self._fence = threading.Lock()

    @property
    def next_available(self) -> int:
        """The number of taken chains, modulo 65536: a successor's position."""
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

        Give it back by `push`, once, in any order. With `with_pieces`, the data of a long one may
        come as `Chain.pieces`.

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
        chain = self._decoder.take(head, with_pieces)
        if with_pieces and chain.pieces is not None:
            self.is_streaming = True
        return chain

    def unpop(self) -> None:
        """Let the next `pop` return the same chain as the last one, which was not given back."""
        self._next_available = (self._next_available - 1) & _INDEX_MASK

    def push(self, chain: Chain, written: int) -> None:
        """Give `chain` back; `written` is how many bytes of `writable` were written.

        The driver sees it from now on; `needs_interrupt` tells whether to interrupt it.

        Source: virtio 1.2 §2.7.8
        """
        if self._writes.is_on:
            self._mark(chain)
        at = self._next_used
        self._used_elements[at & self._mask] = chain.head | written << 32
        self._next_used = at = (at + 1) & _INDEX_MASK
        self._used[_INDEX] = at
        if self._writes.is_on:
            self._writes.mark(*self._used_place)

    def push_together(self, chains: Sequence[tuple[Chain, int]]) -> None:
        """Give chains back as `push` does; the driver sees either none of them or all.

        For what needs several, such as a frame in merged buffers.

        Source: virtio 1.2 §5.1.6.4
        """
        if self._writes.is_on:
            for chain, _ in chains:
                self._mark(chain)
        at, elements, mask = self._next_used, self._used_elements, self._mask
        for chain, written in chains:
            elements[at & mask] = chain.head | written << 32
            at = (at + 1) & _INDEX_MASK
        self._next_used = at
        self._used[_INDEX] = at
        if self._writes.is_on:
            self._writes.mark(*self._used_place)

    def needs_interrupt(self) -> bool:
        """Tell whether the driver wants an interrupt for chains pushed since the last call.

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
        # With EVENT_IDX an index in the past does this: it stays where `enable_kicks` left it.
        if not self._has_event_idx:
            self._used[_FLAGS] = VRING_USED_F_NO_NOTIFY

    def enable_kicks(self) -> bool:
        """Ask the driver to notify again; True if something became available meanwhile.

        Then continue: there may be no notification for it.

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

    def _mark(self, chain: Chain) -> None:
        """Note all writes that the device may have done."""
        self._writes.mark_views(chain.writable)
        if chain.pieces is not None and chain.pieces.is_writable:
            self._writes.mark_views(chain.pieces)

    def _full_fence(self) -> None:
        """Let no later load overtake an earlier store.

        Taking a free lock executes a LOCK-prefixed instruction in every CPython (sem_trywait, or
        the interpreter's own mutex), and that is a full barrier (Intel SDM vol. 3 §8.2.2). The
        driver has the matching one between its index and its look at ours.
        """
        self._fence.acquire()
        self._fence.release()
