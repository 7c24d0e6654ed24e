"""The driver's side of a virtqueue, in plain memory: actions of a guest, honest or not."""

from __future__ import annotations

import struct
from collections.abc import Sequence

from vmm_kvm.errors import GuestMemoryError
from vmm_kvm.virtio.abi import (
    VIRTIO_RING_F_EVENT_IDX,
    VIRTIO_RING_F_INDIRECT_DESC,
    VRING_DESC_F_INDIRECT,
    VRING_DESC_F_NEXT,
    VRING_DESC_F_WRITE,
)
from vmm_kvm.virtio.queue import Ring, Virtqueue
from vmm_kvm.write_log import WriteLog

MEMORY_SIZE = 1 << 20
INDIRECT = 1 << VIRTIO_RING_F_INDIRECT_DESC
EVENT_IDX = 1 << VIRTIO_RING_F_EVENT_IDX

Descriptor = tuple[int, int, int, int]
"""Address, length, flags, next."""
Buffer = tuple[int, int, bool]
"""Address, length, whether the device may write."""


class PlainMemory:
    """Guest-physical memory from address 0, a `Memory`."""

    def __init__(self, size: int = MEMORY_SIZE) -> None:
        self.bytes = bytearray(size)
        self._view = memoryview(self.bytes)
        self.writes = WriteLog()

    def view(self, gpa: int, size: int) -> memoryview:
        """Return a view of `size` bytes at `gpa`."""
        if not 0 <= gpa <= gpa + size <= len(self.bytes):
            raise GuestMemoryError(gpa, size)
        return self._view[gpa : gpa + size]


class DriverQueue:
    """A virtqueue as its driver sees it; descriptors are given out in turn and never freed."""

    def __init__(self, memory: PlainMemory | memoryview, size: int = 8, base: int = 0x1000) -> None:
        self.memory = memory if isinstance(memory, memoryview) else memory.bytes
        self.ring = Ring(size, base, base + 16 * size, base + 16 * size + 4 * size + 64 & ~3)
        self.next_descriptor = 0
        self.added = 0
        """Chains made available."""
        self.seen = 0
        """Used chains that were collected."""

    def device(self, memory: PlainMemory, features: int = INDIRECT | EVENT_IDX) -> Virtqueue:
        """Return the device's side."""
        return Virtqueue(memory, self.ring, features)

    def put(self, offset: int, layout: str, *values: int) -> None:
        """Write numbers, little-endian, anywhere in memory."""
        struct.pack_into(f"<{layout}", self.memory, offset, *values)

    def get(self, offset: int) -> int:
        """Read 16 bits from anywhere in memory."""
        return int.from_bytes(self.memory[offset : offset + 2], "little")

    def describe(self, number: int, descriptor: Descriptor) -> None:
        """Fill one descriptor of the table."""
        self.put(self.ring.descriptors + 16 * number, "QIHH", *descriptor)

    def make_available(self, head: int) -> None:
        """Put a chain in the available ring and publish it."""
        self.put(self.ring.available + 4 + 2 * (self.added % self.ring.size), "H", head)
        self.added += 1
        self.put(self.ring.available + 2, "H", self.added & 0xFFFF)

    def add(self, *buffers: Buffer) -> int:
        """Make a chain of direct descriptors available; returns its head."""
        size = self.ring.size
        numbers = [(self.next_descriptor + i) % size for i in range(len(buffers))]
        self.next_descriptor = (self.next_descriptor + len(buffers)) % size
        for descriptor, number in zip(_linked(buffers, numbers), numbers, strict=True):
            self.describe(number, descriptor)
        self.make_available(numbers[0])
        return numbers[0]

    def add_indirect(self, table: int, *buffers: Buffer) -> int:
        """Make a chain available whose descriptors lie in a table at address `table`."""
        numbers = list(range(len(buffers)))
        for descriptor, number in zip(_linked(buffers, numbers), numbers, strict=True):
            self.put(table + 16 * number, "QIHH", *descriptor)
        head = self.next_descriptor
        self.next_descriptor = (head + 1) % self.ring.size
        self.describe(head, (table, 16 * len(buffers), VRING_DESC_F_INDIRECT, 0))
        self.make_available(head)
        return head

    @property
    def used_index(self) -> int:
        """The used ring's index."""
        return self.get(self.ring.used + 2)

    def used(self) -> list[tuple[int, int]]:
        """Collect the used chains since the last call: (head, bytes written)."""
        found = []
        while self.seen & 0xFFFF != self.used_index:
            at = self.ring.used + 4 + 8 * (self.seen % self.ring.size)
            found.append(struct.unpack_from("<II", self.memory, at))
            self.seen += 1
        return found

    def set_used_event(self, index: int) -> None:
        """Ask to be interrupted once the used index passes `index`."""
        self.put(self.ring.available + 4 + 2 * self.ring.size, "H", index & 0xFFFF)

    @property
    def avail_event(self) -> int:
        """The available index at whose passing the device wants a notification."""
        return self.get(self.ring.used + 4 + 8 * self.ring.size)

    def set_no_interrupt(self, flag: int) -> None:
        """Set the flags of the available ring."""
        self.put(self.ring.available, "H", flag)

    @property
    def used_flags(self) -> int:
        """The flags of the used ring."""
        return self.get(self.ring.used)


def _linked(buffers: Sequence[Buffer], numbers: Sequence[int]) -> list[Descriptor]:
    descriptors = []
    for i, (address, length, is_writable) in enumerate(buffers):
        is_last = i == len(buffers) - 1
        flags = (VRING_DESC_F_WRITE if is_writable else 0) | (0 if is_last else VRING_DESC_F_NEXT)
        descriptors.append((address, length, flags, 0 if is_last else numbers[i + 1]))
    return descriptors
