"""A port for frames without a host: frames for a device, and the frames that it sends."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

from vmm_kvm.net.ethernet import Filter
from vmm_kvm.virtio.net import CSUM, TSO4


class FakePort:
    """Frames in, frames out, headers unchanged: a `FramePort` of one thread."""

    def __init__(self, *, pairs: int = 1, has_filter: bool = True) -> None:
        self.fds: tuple[int, ...] = tuple(range(77, 77 + pairs))
        self.offloads = CSUM | TSO4
        self.has_filter = has_filter
        self.arrived: deque[bytes] = deque()
        """Frames for the device, oldest first."""
        self.sent: list[bytes] = []
        self.queues = pairs
        """The number of queues with frames."""
        self.is_full = False

    def set_offloads(self, offloads: int) -> None:
        """Ignore them."""

    def set_queues(self, count: int) -> None:
        """Record it."""
        self.queues = count

    def set_filter(self, wanted: Filter | None) -> None:
        """Ignore it."""

    def receive(self, _queue: int, buffers: Sequence[memoryview]) -> int:
        """Take the oldest frame; drop the part without room."""
        if not self.arrived:
            return 0
        data, at = self.arrived.popleft(), 0
        for buffer in buffers:
            piece = data[at : at + len(buffer)]
            buffer[: len(piece)] = piece
            at += len(piece)
        return at

    def send(self, _queue: int, buffers: Sequence[memoryview | bytes]) -> bool:
        """Keep a frame, unless the port is full."""
        if not self.is_full:
            self.sent.append(b"".join(buffers))
        return not self.is_full

    def close(self) -> None:
        """Do nothing: it holds no resource."""
