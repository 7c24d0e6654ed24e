"""virtio-pmem: the memory's address, and flushes."""

from __future__ import annotations

import struct

import pytest

from tests.virtio_driver import DriverQueue, PlainMemory
from vmm_kvm.errors import VirtqueueError
from vmm_kvm.virtio.pmem import VirtioPmem

GPA, SIZE = 1 << 32, 64 << 20
REQUEST, ANSWER = 0x8000, 0x9000


class Bench:
    """A device whose flushes are counted, and can fail."""

    def __init__(self) -> None:
        self.memory = PlainMemory()
        self.flushes = 0
        self.fault: OSError | None = None
        self.device = VirtioPmem(GPA, SIZE, self._flush, name="disk0")
        self.driver = DriverQueue(self.memory)
        self.queue = self.driver.device(self.memory)

    def _flush(self) -> None:
        self.flushes += 1
        if self.fault:
            raise self.fault

    def request(self, kind: int = 0, number: int = 0) -> None:
        """Make a request available."""
        struct.pack_into("<I", self.memory.bytes, REQUEST + 4 * number, kind)
        struct.pack_into("<I", self.memory.bytes, ANSWER + 4 * number, 0xEEEE)
        self.driver.add((REQUEST + 4 * number, 4, False), (ANSWER + 4 * number, 4, True))

    def answers(self, count: int) -> list[int]:
        """Serve, and return the answers."""
        self.device.process(0, self.queue)
        assert [written for _, written in self.driver.used()] == [4] * count
        return list(struct.unpack_from(f"<{count}I", self.memory.bytes, ANSWER))


@pytest.fixture
def bench() -> Bench:
    """A device."""
    return Bench()


def test_configuration(bench: Bench) -> None:
    """The configuration has address and size."""
    assert bench.device.config() == struct.pack("<QQ", GPA, SIZE)


def test_one_flush_serves_all_who_wait(bench: Bench) -> None:
    """Requests that are available together need one flush, after all of them."""
    for number in range(3):
        bench.request(number=number)
    assert bench.answers(3) == [0, 0, 0]
    assert bench.flushes == 1
    bench.device.process(0, bench.queue)
    assert bench.flushes == 1


def test_a_failed_flush(bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
    """The guest learns of each failed flush; the log has it once."""
    bench.fault = OSError(5, "Input/output error")
    for _ in range(2):
        bench.request()
        assert bench.answers(1) == [1]
    assert caplog.messages == ["disk0: flush: [Errno 5] Input/output error"]


def test_unknown_requests_fail(bench: Bench) -> None:
    """An unknown type fails: there is only one."""
    bench.request(kind=7)
    assert bench.answers(1) == [1]


def test_requests_that_are_none(bench: Bench) -> None:
    """A request without a type, or room for the answer, stops the device."""
    bench.driver.add((REQUEST, 3, False), (ANSWER, 4, True))
    with pytest.raises(VirtqueueError, match=r"^disk0: a request of 3 bytes$"):
        bench.device.process(0, bench.queue)
    bench.driver.add((REQUEST, 4, False), (ANSWER, 3, True))
    with pytest.raises(VirtqueueError, match=r"^disk0: a request without room for its answer$"):
        bench.device.process(0, bench.queue)
