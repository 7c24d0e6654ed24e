"""virtio-balloon: memory that the guest does not use goes back to the host.

The driver reports the pages that it has freed, two MiB and more at a time, and the host takes them
back at once: free page reporting. Nobody asks the guest to free anything: the target is always 0.
A driver may inflate its balloon all the same; these pages go back too.

It also tells how its memory is used, whenever it is asked: the one buffer of the statistics queue
stays with the device until the next question.

A reported page may hold anything when the guest touches it again, zeros or an older content of the
same page, as the specification says. A guest that relies on zeros in free pages does not report.

Queues of features that were not negotiated have no number: Linux and QEMU count so, not the
specification.

Source: virtio 1.3 §5.5; Linux drivers/virtio/virtio_balloon.c
"""

import struct
from collections.abc import Callable, Iterable, Iterator
from typing import Literal, NamedTuple, Protocol

from vmm_kvm.bits import PAGE_SIZE
from vmm_kvm.errors import VirtqueueError
from vmm_kvm.scatter import total
from vmm_kvm.state import U32, Part, PartState
from vmm_kvm.virtio import abi
from vmm_kvm.virtio.buffers import gather
from vmm_kvm.virtio.chain import Chain
from vmm_kvm.virtio.device import Transport
from vmm_kvm.virtio.queue import Virtqueue

QUEUE_SIZE = 128

_PAGES_MAX = 4096  # of a chain of the balloon's pages; Linux gives 256
_STATISTICS_MAX = 64  # Linux has 16
_STATISTIC = struct.Struct("<HQ")  # tag, value; packed
_PAGE_NUMBER = struct.Struct("<I")  # in pages of 4096 bytes, for any size of the guest's pages
_CONFIG = struct.Struct("<II")  # the target, the present size; in pages
_PAGES_AT = 4
_STATISTICS_QUEUE = 2


class BalloonSpec(NamedTuple):
    """A memory balloon of a machine."""

    kind: Literal["balloon"] = "balloon"


class BalloonState(PartState):
    """The driver's reports."""

    pages: U32
    """In the balloon, of 4096 bytes."""
    version: Literal[1] = 1


class GuestMemoryUse(NamedTuple):
    """How a guest uses its memory, as its driver says: nothing that can be relied on.

    Bytes, but for the faults. None: the driver does not tell.
    """

    total: int | None
    free: int | None
    available: int | None
    """Memory available without swapping."""
    caches: int | None
    """Of files."""
    swapped_in: int | None
    swapped_out: int | None
    major_faults: int | None


class Memory(Protocol):
    """Guest-physical memory, as far as a balloon needs it."""

    def view(self, gpa: int, size: int) -> memoryview:
        """Return a view of `size` bytes at `gpa`; raises GuestMemoryError."""

    def discard(self, view: memoryview) -> int:
        """Give the whole pages of a view of guest RAM back to the host; returns their bytes."""


class VirtioBalloon:
    """A memory balloon; a `virtio.device.Backend`."""

    __slots__ = (
        "_is_asked",
        "_memory",
        "_pages",
        "_roles",
        "_statistics",
        "_transport",
        "device_id",
        "features",
        "given_back",
        "memory_use",
        "queue_sizes",
    )

    def __init__(self, memory: Memory) -> None:
        """Make an empty balloon."""
        self.device_id = abi.VIRTIO_ID_BALLOON
        self.features = (
            1 << abi.VIRTIO_BALLOON_F_STATS_VQ
            | 1 << abi.VIRTIO_BALLOON_F_DEFLATE_ON_OOM
            | 1 << abi.VIRTIO_BALLOON_F_REPORTING
        )
        self.queue_sizes: tuple[int, ...] = (QUEUE_SIZE,) * 4
        self.memory_use: GuestMemoryUse | None = None
        """The driver's last answer; any thread."""
        self.given_back = 0
        """Bytes, since the device was made; memory that the guest has used again counts too."""
        self._memory = memory
        self._pages = 0
        self._roles: tuple[Callable[[Virtqueue], None], ...] = ()  # of the queues, by index
        self._is_asked = False
        self._statistics: tuple[Virtqueue, Chain] | None = None
        self._transport: Transport | None = None

    def attach(self, transport: Transport) -> None:
        """Remember `transport`, which arranges calls of `process`; before the guest runs."""
        self._transport = transport

    def ask(self) -> None:
        """Have the driver say how it uses its memory, for a later look at `memory_use`."""
        self._is_asked = True
        if self._transport:
            self._transport.notify(_STATISTICS_QUEUE)

    def config(self) -> bytes:
        """Return the target, which is 0, and how many pages the balloon has."""
        return _CONFIG.pack(0, self._pages)

    def write_config(self, offset: int, data: bytes) -> None:
        """Take from the driver how many pages the balloon has."""
        if offset == _PAGES_AT and len(data) == 4:
            self._pages = int.from_bytes(data, "little")

    def start(self, features: int) -> None:
        """Begin: the features tell which queues there are."""
        roles = [self._inflate, self._deflate]
        if features & 1 << abi.VIRTIO_BALLOON_F_STATS_VQ:
            roles.append(self._learn)
        if features & 1 << abi.VIRTIO_BALLOON_F_REPORTING:
            roles.append(self._take_back)
        self._roles = tuple(roles)

    def process(self, index: int, queue: Virtqueue) -> None:
        """Serve everything that is available in a queue.

        Raises:
            VirtqueueError: a chain is malformed, or too long.
            GuestMemoryError: a page is not in RAM.
        """
        if index < len(self._roles):
            self._roles[index](queue)

    def _inflate(self, queue: Virtqueue) -> None:
        while (chain := queue.pop()) is not None:
            size = total(chain.readable)
            if size > _PAGES_MAX * _PAGE_NUMBER.size:
                raise VirtqueueError(f"{size} bytes of page numbers at once")
            numbers = gather(chain.readable, size & -_PAGE_NUMBER.size)
            for gpa, length in _runs(number for (number,) in _PAGE_NUMBER.iter_unpack(numbers)):
                self._discard(self._memory.view(gpa, length))
            queue.push(chain, 0)

    def _deflate(self, queue: Virtqueue) -> None:
        while (chain := queue.pop()) is not None:  # the guest just uses the pages again
            queue.push(chain, 0)

    def _take_back(self, queue: Virtqueue) -> None:
        while (chain := queue.pop()) is not None:
            for page in chain.writable:
                self._discard(page)
            queue.push(chain, 0)

    def _discard(self, view: memoryview) -> None:
        self.given_back += self._memory.discard(view)

    def _learn(self, queue: Virtqueue) -> None:
        """Read the driver's answer, keep its buffer, and give it back for another question."""
        if self._statistics and self._statistics[0] is not queue:
            self._statistics = None  # the driver has reset the queue
        while (chain := queue.pop()) is not None:
            if self._statistics:
                raise VirtqueueError("a second buffer for statistics")
            self._statistics = queue, chain
            self.memory_use = _read(gather(chain.readable, _STATISTICS_MAX * _STATISTIC.size))
        if self._is_asked and self._statistics:
            self._is_asked = False
            queue.push(self._statistics[1], 0)
            self._statistics = None

    def reset(self) -> None:
        """Forget the driver's reports; the balloon is empty."""
        self._statistics = self.memory_use = None
        self._roles = ()
        self._pages = 0

    def close(self) -> None:
        """Do nothing: it owns nothing."""

    def parts(self, name: str) -> list[Part]:
        """Return itself."""
        return [Part(f"{name}/balloon", self)]

    def save(self) -> BalloonState:
        """Return the driver's reports, which cannot be requested again."""
        return BalloonState(pages=self._pages)

    def restore(self, state: BalloonState) -> None:
        """Continue with as many pages."""
        self._pages = state.pages


def _runs(numbers: Iterable[int]) -> Iterator[tuple[int, int]]:
    """Yield guest-physical address and bytes of runs of pages, ascending, none twice."""
    start = end = -1
    for number in sorted(set(numbers)):
        if number != end:
            if end >= 0:
                yield start * PAGE_SIZE, (end - start) * PAGE_SIZE
            start = number
        end = number + 1
    if end >= 0:
        yield start * PAGE_SIZE, (end - start) * PAGE_SIZE


def _read(data: bytes) -> GuestMemoryUse:
    """Return a driver's statistics; unknown tags, and the rest of a cut one, are left."""
    told = dict(_STATISTIC.iter_unpack(data[: len(data) // _STATISTIC.size * _STATISTIC.size]))
    return GuestMemoryUse(
        total=told.get(abi.VIRTIO_BALLOON_S_MEMTOT),
        free=told.get(abi.VIRTIO_BALLOON_S_MEMFREE),
        available=told.get(abi.VIRTIO_BALLOON_S_AVAIL),
        caches=told.get(abi.VIRTIO_BALLOON_S_CACHES),
        swapped_in=told.get(abi.VIRTIO_BALLOON_S_SWAP_IN),
        swapped_out=told.get(abi.VIRTIO_BALLOON_S_SWAP_OUT),
        major_faults=told.get(abi.VIRTIO_BALLOON_S_MAJFLT),
    )
