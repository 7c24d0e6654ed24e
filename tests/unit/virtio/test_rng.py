"""virtio-rng: random bytes at a limited rate, without waits."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from tests.fakes import FakeClock
from tests.virtio_driver import Buffer, DriverQueue, PlainMemory
from vmm_kvm.clock import NANOSECONDS
from vmm_kvm.virtio.device import Backend
from vmm_kvm.virtio.rng import BURST, RATE, TokenBucket, VirtioRng

DATA = 0x10000


class Rig:
    """A source of 1, 2, 3, … with a queue; the test serves the queue."""

    def __init__(self, rate: int = RATE, burst: int = BURST) -> None:
        self.clock = FakeClock()
        self.given = 0
        self.memory = PlainMemory()
        self.queue = DriverQueue(self.memory)
        self.side = self.queue.device(self.memory)
        self.device = VirtioRng(self.clock, self._random, rate=rate, burst=burst)
        self.device.attach(self)
        self.device.start(0)

    def _random(self, size: int) -> bytes:
        self.given += 1
        return bytes((self.given,)) * size

    def notify(self, index: int) -> None:
        """Serve the queue, as a transport would on the device's thread."""
        self.device.process(index, self.side)

    def config_changed(self) -> None:
        """Fail: there is no configuration."""
        raise AssertionError

    def ask(self, *buffers: Buffer) -> list[int]:
        """Make a chain available and notify; returns the sizes of returned chains."""
        self.queue.add(*buffers)
        self.notify(0)
        return self.used()

    def used(self) -> list[int]:
        """Return the number of bytes in each chain returned since the last call."""
        return [written for _, written in self.queue.used()]


def test_what_it_is() -> None:
    """The device is an entropy source with one queue, no features, no configuration."""
    backend: Backend = Rig().device
    backend.write_config(0, b"\1")
    assert (backend.device_id, backend.features, len(backend.queue_sizes)) == (4, 0, 1)
    assert backend.config() == b""


def test_buffers_are_filled() -> None:
    """Every byte of every buffer is filled, in one request."""
    rig = Rig()
    assert rig.ask((DATA, 100, True), (DATA + 200, 28, True)) == [128]
    assert rig.memory.bytes[DATA : DATA + 100] == b"\1" * 100
    assert rig.memory.bytes[DATA + 100] == 0
    assert rig.memory.bytes[DATA + 200 : DATA + 228] == b"\1" * 28


def test_a_large_request_gets_a_part() -> None:
    """A large request gets at most one burst: the driver asks again."""
    rig = Rig()
    assert rig.ask((DATA, 0x20000, True)) == [BURST]


def test_a_chain_without_room_comes_back() -> None:
    """A request without a writable buffer gets nothing, and nothing fails."""
    assert Rig().ask((DATA, 8, False)) == [0]


def test_who_asks_for_more_waits() -> None:
    """After the burst, requests wait for the timer, which brings new tokens."""
    rig = Rig(rate=1024, burst=512)
    assert rig.ask((DATA, 512, True)) == [512]
    assert rig.ask((DATA, 256, True)) == []
    assert not rig.side.enable_kicks()
    rig.clock.advance(NANOSECONDS // 4 - 1)
    assert rig.used() == []
    rig.clock.advance(1)
    assert rig.used() == [256]


def test_reset_and_close_stop_the_timer() -> None:
    """After a reset or close no timer fires."""
    for end in (VirtioRng.reset, VirtioRng.close):
        rig = Rig(rate=1024, burst=512)
        rig.ask((DATA, 512, True))
        rig.ask((DATA, 256, True))
        end(rig.device)
        assert rig.clock.next_deadline_ns is None


@given(st.lists(st.tuples(st.integers(1, 5000), st.integers(0, NANOSECONDS)), max_size=40))
def test_no_guest_gets_more_than_the_rate(requests: list[tuple[int, int]]) -> None:
    """In any time a guest gets at most the burst, plus the rate times the time."""
    rate, burst = 3000, 1000
    rig = Rig(rate=rate, burst=burst)
    got = passed_ns = 0
    for size, wait_ns in requests:
        got += sum(rig.ask((DATA, size, True)))
        rig.clock.advance(wait_ns)
        passed_ns += wait_ns
        got += sum(rig.used())
        assert got * NANOSECONDS <= burst * NANOSECONDS + rate * passed_ns
        if rig.queue.added - rig.queue.seen == rig.queue.ring.size:
            break


def test_a_bucket_loses_nothing_to_rounding() -> None:
    """A million reads of the bucket gain as much as one."""
    bucket = TokenBucket(1000, 1000, 0)
    bucket.take(bucket.level(0))
    for now_ns in range(0, 1_000_000_000, 999_983):
        bucket.level(now_ns)
    assert bucket.level(1_000_000_000) == 1000
    bucket.take(1000)
    assert bucket.due_ns(1) == 1_001_000_000
    assert bucket.level(1_001_000_000) == 1
