"""Chains that a device has taken and cannot give back yet: it waits for input, or for time."""

from collections import deque

from vmm_kvm.errors import VirtqueueError
from vmm_kvm.virtio.chain import Chain
from vmm_kvm.virtio.queue import Virtqueue


class Backlog:
    """The chains of one queue that wait for the device, oldest first.

    A queue that the driver has reset and enabled again is another one: what was taken from the old
    one is forgotten.
    """

    __slots__ = ("_chains", "_queue")

    def __init__(self) -> None:
        self._chains: deque[Chain] = deque()
        self._queue: Virtqueue | None = None

    def collect(self, queue: Virtqueue) -> deque[Chain]:
        """Take all that is available in `queue`; returns what waits, for the caller to shorten.

        Raises:
            VirtqueueError: a chain is malformed, or the driver offers one a second time.
            GuestMemoryError: a buffer is not inside one region of RAM.
        """
        if queue is not self._queue:
            self.clear()
            self._queue = queue
        while (chain := queue.pop()) is not None:
            if len(self._chains) == queue.size:
                raise VirtqueueError(f"more than {queue.size} chains at once")
            self._chains.append(chain)
        return self._chains

    def clear(self) -> None:
        """Forget everything."""
        self._chains.clear()
        self._queue = None
