"""A device type for tests: it returns what it gets."""

from __future__ import annotations

from tests.virtio_driver import PlainMemory
from vmm_kvm.errors import HaltError, VirtqueueError
from vmm_kvm.scatter import total
from vmm_kvm.state import Part
from vmm_kvm.virtio.buffers import gather, scatter
from vmm_kvm.virtio.chain import Chain
from vmm_kvm.virtio.queue import Virtqueue

FEATURE = 1 << 3


class EchoBackend:
    """A `Backend` of two queues that copies readable buffers to writable ones.

    The contents `error` break a rule, `crash` raises a bug of ours, `later` are answered in the
    next round, `host` wait while there is a `fault`.
    """

    def __init__(self, queue_sizes: tuple[int, ...] = (8, 16)) -> None:
        self.device_id = 42
        self.features = FEATURE
        self.queue_sizes = queue_sizes
        self.contents = bytearray(b"configuration")
        self.events: list[str] = []
        self.waiting: dict[int, list[Chain]] = {}
        self.fault: int | None = None

    def config(self) -> bytes:
        """Return the contents that `write_config` has left."""
        return bytes(self.contents)

    def write_config(self, offset: int, data: bytes) -> None:
        """Change the contents."""
        self.contents[offset : offset + len(data)] = data

    def start(self, features: int) -> None:
        """Remember."""
        self.events.append(f"start {features:#x}")

    def process(self, index: int, queue: Virtqueue) -> None:
        """Echo everything that is available."""
        for waiting in self.waiting.pop(index, []):
            self._answer(queue, waiting)
        while chain := queue.pop():
            self.events.append(f"request {index}")
            data = gather(chain.readable, total(chain.readable))
            if data == b"error":
                raise VirtqueueError("a request that cannot be")
            if data == b"crash":
                raise ZeroDivisionError
            if data == b"host" and self.fault is not None:
                queue.unpop()
                raise HaltError("echo", self.fault)
            if data == b"later":
                self.waiting.setdefault(index, []).append(chain)
            else:
                self._answer(queue, chain)

    @staticmethod
    def _answer(queue: Virtqueue, chain: Chain) -> None:
        data = gather(chain.readable, total(chain.readable))
        queue.push(chain, scatter(chain.writable, data))

    def reset(self) -> None:
        """Remember, and forget requests."""
        self.events.append("reset")
        self.waiting.clear()

    def close(self) -> None:
        """Remember."""
        self.events.append("close")

    def parts(self, _name: str) -> list[Part]:
        """Have no state."""
        return []


QUESTION, ANSWER = 0x10000, 0x11000


def ask(memory: PlainMemory, text: bytes) -> tuple[tuple[int, int, bool], tuple[int, int, bool]]:
    """Put a request into memory; returns its buffers."""
    memory.bytes[QUESTION : QUESTION + len(text)] = text
    return (QUESTION, len(text), False), (ANSWER, 0x100, True)


def answer(memory: PlainMemory, size: int) -> bytes:
    """Return the device's answer."""
    return bytes(memory.bytes[ANSWER : ANSWER + size])
