"""virtio-rng: random bytes for the guest, at a rate that a token bucket limits.

A guest that asks for more waits: its requests are kept until a timer says that there are tokens
again. No thread waits.

Source: virtio 1.2 §5.4; OpenBSD vmd/virtio.c
"""

from collections.abc import Callable
from typing import Annotated, Literal, NamedTuple

from vmm_kvm.bits import KIB, MIB
from vmm_kvm.clock import NANOSECONDS, Clock
from vmm_kvm.scatter import total
from vmm_kvm.state import Part, PartState, Range
from vmm_kvm.virtio import abi
from vmm_kvm.virtio.backlog import Backlog
from vmm_kvm.virtio.buffers import scatter
from vmm_kvm.virtio.device import Transport
from vmm_kvm.virtio.queue import Virtqueue

QUEUE_SIZE = 64
RATE = MIB
"""Bytes per second, in the long run."""
BURST = 64 * KIB
"""Bytes that a guest gets at once after a while of silence; also the most of one request."""

_GRAIN = 256  # fewer bytes are not worth an interrupt


class TokenBucket:
    """A token bucket: limits a rate in the long run to `rate` a second.

    Exact: it counts in tokens times nanoseconds, so no rounding adds up.
    """

    __slots__ = ("_capacity", "_level", "_rate", "_updated_ns")

    def __init__(self, rate: int, capacity: int, now_ns: int) -> None:
        """Make a full bucket of `capacity` tokens that gains `rate` tokens a second."""
        self._rate = rate
        self._capacity = capacity * NANOSECONDS
        self._level = self._capacity
        self._updated_ns = now_ns

    def level(self, now_ns: int) -> int:
        """Return how many tokens there are at `now_ns`, which never goes back."""
        gained = (now_ns - self._updated_ns) * self._rate
        self._level = min(self._level + gained, self._capacity)
        self._updated_ns = now_ns
        return self._level // NANOSECONDS

    def take(self, count: int) -> None:
        """Remove tokens, no more than `level` returned."""
        self._level -= count * NANOSECONDS

    @property
    def parts_left(self) -> int:
        """Its contents, in tokens times nanoseconds, at the last look."""
        return self._level

    def refill(self, parts: int, now_ns: int) -> None:
        """Set the content at `now_ns` to `parts`, tokens times nanoseconds, up to the capacity."""
        self._level = min(parts, self._capacity)
        self._updated_ns = now_ns

    def due_ns(self, count: int) -> int:
        """Return when there will be `count` tokens, no more than the capacity."""
        missing = count * NANOSECONDS - self._level
        return self._updated_ns + max(0, -(-missing // self._rate))


class RngSpec(NamedTuple):
    """A source of entropy of a machine."""

    kind: Literal["rng"] = "rng"


class RngState(PartState):
    """How much a guest may still take."""

    tokens: Annotated[int, Range(0, BURST * NANOSECONDS)]
    """Bytes times nanoseconds."""
    version: Literal[1] = 1


class VirtioRng:
    """An entropy source; a `virtio.device.Backend`.

    `random` returns that many random bytes, at most 64 KiB, without waiting.
    """

    __slots__ = (
        "_backlog",
        "_bucket",
        "_clock",
        "_random",
        "_timer",
        "_transport",
        "device_id",
        "features",
        "queue_sizes",
    )

    def __init__(
        self,
        clock: Clock,
        random: Callable[[int], bytes],
        *,
        rate: int = RATE,
        burst: int = BURST,
    ) -> None:
        """Make a source of `rate` bytes a second and `burst` (at least 256) bytes at once."""
        self.device_id = abi.VIRTIO_ID_RNG
        self.features = 0
        self.queue_sizes: tuple[int, ...] = (QUEUE_SIZE,)
        self._clock = clock
        self._random = random
        self._bucket = TokenBucket(rate, burst, clock.monotonic_ns())
        self._timer = clock.timer(self._refilled)
        self._backlog = Backlog()
        self._transport: Transport | None = None

    def attach(self, transport: Transport) -> None:
        """Remember `transport`, which arranges calls of `process`; before the guest runs."""
        self._transport = transport

    def config(self) -> bytes:
        """Return the configuration space: there is none."""
        return b""

    def write_config(self, offset: int, data: bytes) -> None:
        """Ignore it."""

    def start(self, features: int) -> None:
        """Begin; no feature matters."""

    def process(self, index: int, queue: Virtqueue) -> None:
        """Fill buffers while there are tokens; `index` is 0."""
        assert index == 0, "there is one queue"
        waiting = self._backlog.collect(queue)
        while waiting:
            tokens = self._bucket.level(self._clock.monotonic_ns())
            if tokens < _GRAIN:
                self._timer.arm(self._bucket.due_ns(_GRAIN))
                return
            chain = waiting.popleft()
            size = min(total(chain.writable), tokens, BURST)
            queue.push(chain, scatter(chain.writable, self._random(size)))
            self._bucket.take(size)

    def reset(self) -> None:
        """Forget who waits; the bucket stays as it is."""
        self._backlog.clear()
        self._timer.cancel()

    def close(self) -> None:
        """Stop the timer."""
        self._timer.cancel()

    def parts(self, name: str) -> list[Part]:
        """Return itself."""
        return [Part(f"{name}/rng", self)]

    def save(self) -> RngState:
        """Return how much the guest may still take."""
        self._bucket.level(self._clock.monotonic_ns())
        return RngState(tokens=self._bucket.parts_left)

    def restore(self, state: RngState) -> None:
        """Continue with as many tokens; waiting requests are served when the device resumes."""
        self._bucket.refill(state.tokens, self._clock.monotonic_ns())

    def _refilled(self) -> None:
        """Serve those who wait; on the clock's thread."""
        if self._transport:
            self._transport.notify(0)
