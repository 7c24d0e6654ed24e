"""virtio over PCI, by a driver that reaches it over the buses, as a kernel does."""

from __future__ import annotations

import errno
import logging
from collections.abc import Callable, Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.fakes import Operation, exercise
from tests.unit.virtio.echo import FEATURE, EchoBackend, answer, ask
from tests.virtio_driver import EVENT_IDX, INDIRECT, DriverQueue, PlainMemory
from tests.virtio_pci_driver import DEADLINE_S, READY, PciDriver
from vmm_kvm.errors import StateError
from vmm_kvm.pci.ids import Command, Register
from vmm_kvm.virtio import abi
from vmm_kvm.virtio.common_cfg import QueueState
from vmm_kvm.virtio.pci import BAR_NOTIFY, BAR_SIZE, BAR_STRUCTURES, COMMON, DEVICE, VirtioPciState
from vmm_kvm.virtio.worker import Worker

VERSION_1 = 1 << abi.VIRTIO_F_VERSION_1
RING_RESET = 1 << abi.VIRTIO_F_RING_RESET
ACCESS_PLATFORM = 1 << abi.VIRTIO_F_ACCESS_PLATFORM
OFFERED = FEATURE | VERSION_1 | RING_RESET | INDIRECT | EVENT_IDX
NEEDS_RESET = abi.VIRTIO_CONFIG_S_NEEDS_RESET


class Bench:
    """A driver, its queues, and the device type behind the function."""

    def __init__(self, memory: PlainMemory | None = None, *, is_restricted: bool = False) -> None:
        self.memory = memory or PlainMemory()
        self.backend = EchoBackend()
        self.worker = Worker(self.backend, self.memory, "echo")
        self.driver = PciDriver(self.worker, is_restricted=is_restricted)
        self.queues = {
            0: DriverQueue(self.memory, 8, 0x1000),
            1: DriverQueue(self.memory, 16, 0x2000),
        }

    def start(self, *, msix: bool = True, features: int | None = None) -> None:
        """Start the device with both queues."""
        self.driver.start(self.queues, msix=msix, features=features)

    def send(self, text: bytes, index: int = 0) -> int:
        """Make a request available and notify; returns the chain's number."""
        head = self.queues[index].add(*ask(self.memory, text))
        self.driver.notify(index)
        return head


@pytest.fixture
def bench() -> Iterator[Bench]:
    """A device in its initial state."""
    bench = Bench()
    yield bench
    bench.driver.device.close()


def test_identity(bench: Bench) -> None:
    """The function is a modern virtio device of its type."""
    driver = bench.driver
    assert driver.config_read(Register.VENDOR_ID, 2) == 0x1AF4
    assert driver.config_read(Register.DEVICE_ID, 2) == 0x1040 + 42
    assert driver.config_read(Register.REVISION_ID, 1) == 1
    assert driver.config_read(Register.SUBSYSTEM_VENDOR_ID, 2) == 0x0B5D
    assert driver.config_read(Register.SUBSYSTEM_ID, 2) == 0x1040 + 42
    assert driver.config_read(Register.INTERRUPT_PIN, 1) == 1


def test_registers_after_reset(bench: Bench) -> None:
    """At reset nothing is negotiated, no vector is chosen, queues have their largest sizes."""
    driver = bench.driver
    assert driver.offered() == OFFERED
    assert driver.read(abi.VIRTIO_PCI_COMMON_NUMQ, 2) == 2
    assert driver.read(abi.VIRTIO_PCI_COMMON_MSIX, 2) == abi.VIRTIO_MSI_NO_VECTOR
    assert driver.status == 0
    sizes = []
    for index in range(3):
        driver.write(abi.VIRTIO_PCI_COMMON_Q_SELECT, 2, index)
        sizes.append(driver.read(abi.VIRTIO_PCI_COMMON_Q_SIZE, 2))
        assert driver.read(abi.VIRTIO_PCI_COMMON_Q_ENABLE, 2) == 0
    assert sizes == [8, 16, 0]


@pytest.mark.parametrize("index", [0, 1])
def test_a_request_is_answered(bench: Bench, index: int) -> None:
    """Notification, processing, used ring and the queue's own interrupt work together."""
    bench.start()
    head = bench.send(b"hello", index)
    assert bench.driver.interrupted() == index + 1
    assert bench.queues[index].used() == [(head, 5)]
    assert answer(bench.memory, 5) == b"hello"
    assert bench.driver.status == READY
    assert bench.backend.events == [f"start {OFFERED:#x}", f"request {index}"]


def test_restricted_memory() -> None:
    """In encrypted memory, a device works for a driver that shares its buffers, and no other."""
    bench = Bench(is_restricted=True)
    try:
        driver = bench.driver
        assert driver.offered() == OFFERED | ACCESS_PLATFORM
        driver.accept(OFFERED)
        driver.status = abi.VIRTIO_CONFIG_S_FEATURES_OK
        assert not driver.status & abi.VIRTIO_CONFIG_S_FEATURES_OK
        bench.start()
        head = bench.send(b"hello")
        assert driver.interrupted() == 1
        assert bench.queues[0].used() == [(head, 5)]
    finally:
        bench.driver.device.close()


def test_requests_before_the_driver_is_ready(bench: Bench) -> None:
    """Requests made available before DRIVER_OK are served after it, without a notification."""
    head = bench.queues[0].add(*ask(bench.memory, b"early"))
    bench.start()
    assert bench.driver.interrupted() == 1
    assert bench.queues[0].used() == [(head, 5)]


def test_nothing_happens_before_the_driver_is_ready(bench: Bench) -> None:
    """Notifications before DRIVER_OK do nothing."""
    bench.driver.place(0, bench.queues[0])
    bench.send(b"hello")
    assert bench.backend.events == []
    assert bench.driver.host.bound == {}


@pytest.mark.parametrize("by_port", [False, True])
def test_notifications_by_access(bench: Bench, by_port: bool) -> None:
    """A notification that is an exit after all works the same, to a port or in memory."""
    bench.start()
    head = bench.queues[0].add(*ask(bench.memory, b"hello"))
    driver = bench.driver
    if by_port:
        driver.pio.write(driver.notify_port(0), 2, 0)
    else:
        driver.mmio.write(driver.notify_address(0), 2, 0)
    assert bench.driver.interrupted() == 1
    assert bench.queues[0].used() == [(head, 5)]


def test_notifications_follow_the_bar(bench: Bench) -> None:
    """Eventfds are bound to the decoded BAR's ports, for enabled queues."""
    driver = bench.driver
    bench.start()
    base = driver.bar(BAR_NOTIFY)
    assert sorted(driver.host.bound) == [base, base + 4]
    driver.config_write(Register.BAR0 + 4 * BAR_NOTIFY, 0xC000)
    assert sorted(driver.host.bound) == [0xC000, 0xC004]
    driver.config_write(Register.COMMAND, Command.MEMORY_SPACE, 2)
    assert driver.host.bound == {}
    driver.config_write(Register.COMMAND, Command.IO_SPACE, 2)
    assert len(driver.host.bound) == 2
    driver.device.write(COMMON + abi.VIRTIO_PCI_COMMON_STATUS, 1, 0)
    assert driver.host.bound == {}


# Interrupts


def test_intx_without_msix(bench: Bench) -> None:
    """The pin is asserted with the queue's bit, and deasserted when the driver reads the bits."""
    bench.start(msix=False)
    bench.send(b"hello")
    assert bench.driver.pin_rose()
    assert bench.driver.config_read(Register.STATUS, 2) & 0x08
    assert bench.driver.isr() == 1
    assert not bench.driver.intx.level
    assert bench.driver.isr() == 0
    assert bench.driver.host.messages == []


def test_masked_vectors_wait(bench: Bench) -> None:
    """A masked vector's interrupt comes when it is unmasked."""
    bench.start()
    bench.driver.mask(1, is_masked=True)
    bench.send(b"hello", 0)
    bench.send(b"hello", 1)
    assert bench.driver.interrupted() == 2
    bench.driver.mask(1, is_masked=False)
    assert bench.driver.interrupted() == 1


def test_a_queue_without_vector_is_silent(bench: Bench) -> None:
    """With MSI-X, a queue without a vector does not interrupt, not even by pin."""
    bench.start()
    bench.driver.write(abi.VIRTIO_PCI_COMMON_Q_SELECT, 2, 0)
    bench.driver.write(abi.VIRTIO_PCI_COMMON_Q_MSIX, 2, abi.VIRTIO_MSI_NO_VECTOR)
    bench.send(b"hello", 0)
    bench.send(b"hello", 1)
    assert bench.driver.interrupted() == 2
    assert len(bench.queues[0].used()) == 1
    assert bench.driver.host.messages == []
    assert not bench.driver.intx.levels or not bench.driver.intx.level


@pytest.mark.parametrize("vector", [3, 0xFFFF])
def test_vectors_that_do_not_exist(bench: Bench, vector: int) -> None:
    """A vector that does not exist reads back as none."""
    bench.driver.write(abi.VIRTIO_PCI_COMMON_MSIX, 2, vector)
    assert bench.driver.read(abi.VIRTIO_PCI_COMMON_MSIX, 2) == abi.VIRTIO_MSI_NO_VECTOR
    bench.driver.write(abi.VIRTIO_PCI_COMMON_Q_MSIX, 2, vector)
    assert bench.driver.read(abi.VIRTIO_PCI_COMMON_Q_MSIX, 2) == abi.VIRTIO_MSI_NO_VECTOR


# Negotiation


@pytest.mark.parametrize(
    "features",
    [0, FEATURE, VERSION_1 | 1 << 5, VERSION_1 | 1 << 63, OFFERED | 1 << 35],
    ids=["none", "legacy", "unoffered", "unoffered-high", "unoffered-ring"],
)
def test_features_that_are_refused(bench: Bench, features: int) -> None:
    """FEATURES_OK does not stick for bits that were not offered, or without VERSION_1."""
    driver = bench.driver
    driver.status = 3
    driver.accept(features)
    driver.status |= abi.VIRTIO_CONFIG_S_FEATURES_OK
    assert driver.status == 3
    driver.accept(VERSION_1)  # a second attempt is allowed
    driver.status |= abi.VIRTIO_CONFIG_S_FEATURES_OK
    assert driver.status == 3 | abi.VIRTIO_CONFIG_S_FEATURES_OK


def test_features_are_fixed_once_they_are_ok(bench: Bench) -> None:
    """Features written after FEATURES_OK do not count."""
    bench.start(features=VERSION_1)
    bench.driver.accept(OFFERED)
    bench.send(b"hello")
    bench.driver.interrupted()
    assert bench.backend.events[0] == f"start {VERSION_1:#x}"


def test_ready_without_features(bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
    """DRIVER_OK without FEATURES_OK is an error of the driver's."""
    bench.driver.status = 7
    assert bench.driver.status == 3 | NEEDS_RESET
    assert bench.backend.events == []
    assert caplog.messages == [
        "device: needs reset: driver is ready without having negotiated features"
    ]


def test_status_bits_stay(bench: Bench) -> None:
    """A driver can clear bits only by a reset, and cannot set NEEDS_RESET."""
    bench.driver.status = 3
    bench.driver.status = 1 | NEEDS_RESET
    assert bench.driver.status == 3


# Resets and errors


def test_reset(bench: Bench) -> None:
    """After a reset nothing is left: no queue, no vector, no request, no interrupt."""
    bench.start(msix=False)
    bench.send(b"later")
    bench.driver.status = 0
    assert bench.driver.status == 0
    assert bench.backend.events[-1] == "reset"
    assert bench.driver.isr() == 0
    assert not bench.driver.intx.level
    bench.driver.write(abi.VIRTIO_PCI_COMMON_Q_SELECT, 2, 0)
    assert bench.driver.read(abi.VIRTIO_PCI_COMMON_Q_ENABLE, 2) == 0
    assert bench.driver.read(abi.VIRTIO_PCI_COMMON_Q_DESCLO, 4) == 0
    bench.queues = {0: DriverQueue(bench.memory, 8, 0x4000)}
    bench.start()
    head = bench.send(b"again")
    assert bench.driver.interrupted() == 1
    assert bench.queues[0].used() == [(head, 5)]


def test_one_queue_is_reset_and_placed_anew(bench: Bench) -> None:
    """RING_RESET stops one queue, forgets its settings, and lets it be enabled again."""
    bench.start()
    driver = bench.driver
    driver.write(abi.VIRTIO_PCI_COMMON_Q_SELECT, 2, 0)
    driver.write(abi.VIRTIO_PCI_COMMON_Q_RESET, 2, 1)
    assert driver.read(abi.VIRTIO_PCI_COMMON_Q_RESET, 2) == 0
    assert driver.read(abi.VIRTIO_PCI_COMMON_Q_ENABLE, 2) == 0
    assert driver.read(abi.VIRTIO_PCI_COMMON_Q_SIZE, 2) == 8
    assert len(driver.host.bound) == 1
    bench.send(b"still there", 1)
    assert driver.interrupted() == 2
    bench.queues[0] = DriverQueue(bench.memory, 4, 0x4000)
    driver.place(0, bench.queues[0], 1)
    head = bench.send(b"back")
    assert driver.interrupted() == 1
    assert bench.queues[0].used() == [(head, 4)]


def test_queue_resets_have_to_be_negotiated(bench: Bench) -> None:
    """Without RING_RESET the register does nothing."""
    bench.start(features=VERSION_1)
    bench.driver.write(abi.VIRTIO_PCI_COMMON_Q_SELECT, 2, 0)
    bench.driver.write(abi.VIRTIO_PCI_COMMON_Q_RESET, 2, 1)
    assert bench.driver.read(abi.VIRTIO_PCI_COMMON_Q_ENABLE, 2) == 1


def test_an_enabled_queue_stays_as_it_is(bench: Bench) -> None:
    """Size and addresses of an enabled queue cannot be changed, nor can it be disabled."""
    bench.start()
    bench.driver.write(abi.VIRTIO_PCI_COMMON_Q_SELECT, 2, 0)
    for register, size in (
        (abi.VIRTIO_PCI_COMMON_Q_SIZE, 2),
        (abi.VIRTIO_PCI_COMMON_Q_DESCLO, 4),
        (abi.VIRTIO_PCI_COMMON_Q_ENABLE, 2),
    ):
        before = bench.driver.read(register, size)
        bench.driver.write(register, size, 0)
        assert bench.driver.read(register, size) == before


@pytest.mark.parametrize("size", [0, 3, 16, 0x8000])
def test_impossible_queue_sizes(bench: Bench, size: int) -> None:
    """A size that is no power of two, or larger than offered, is an error of the driver's."""
    bench.driver.write(abi.VIRTIO_PCI_COMMON_Q_SELECT, 2, 0)
    bench.driver.write(abi.VIRTIO_PCI_COMMON_Q_SIZE, 2, size)
    assert bench.driver.status == NEEDS_RESET
    bench.driver.status = 0
    assert bench.driver.status == 0


def test_a_malformed_request_stops_the_device(
    bench: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    """The device asks for a reset, by a configuration interrupt, and works again after it."""
    bench.start()
    bench.send(b"error")
    assert bench.driver.interrupted() == 0
    assert bench.driver.status == READY | NEEDS_RESET
    assert bench.driver.isr() == abi.VIRTIO_PCI_ISR_CONFIG
    bench.send(b"ignored", 1)
    assert caplog.messages == ["device: needs reset: a request that cannot be"]
    bench.queues = {0: DriverQueue(bench.memory, 8, 0x4000)}
    bench.start()
    bench.send(b"works")
    assert bench.driver.interrupted() == 1
    assert bench.driver.status == READY


def test_a_ring_outside_memory_stops_the_device(bench: Bench) -> None:
    """Rings are checked when the driver is ready; then nothing is served."""
    bench.queues[1] = DriverQueue(bench.memory, 16, 1 << 40)
    bench.start()
    assert bench.driver.status == READY | NEEDS_RESET
    assert bench.driver.interrupted() == 0
    assert bench.driver.host.bound == {}
    assert bench.backend.events == []


def test_a_late_ring_outside_memory_stops_the_device(bench: Bench) -> None:
    """A queue with a ring outside memory that is enabled later stops the device too."""
    late = bench.queues.pop(1)
    late.ring = late.ring._replace(used=1 << 40)
    bench.start()
    bench.driver.place(1, late)
    assert bench.driver.status == READY | NEEDS_RESET


@pytest.mark.parametrize("index", [0, 1])
def test_a_request_waits_for_the_host(bench: Bench, index: int) -> None:
    """The machine learns of each attempt; the waiting request is answered once the host can."""
    bench.backend.fault = errno.ENOSPC
    bench.start()
    head = bench.send(b"host", index)
    assert bench.driver.halted.acquire(timeout=DEADLINE_S)
    bench.driver.device.settle()  # makes another attempt
    assert bench.driver.halted.acquire(timeout=DEADLINE_S)
    bench.driver.device.suspend()
    bench.driver.device.resume()
    assert bench.driver.halted.acquire(timeout=DEADLINE_S)
    assert {(err.errno, str(err)) for err in bench.driver.halts} == {
        (errno.ENOSPC, "echo: No space left on device")
    }
    assert bench.queues[index].used() == []
    assert bench.driver.status == READY
    bench.driver.device.suspend()
    bench.backend.fault = None
    bench.driver.device.resume()
    assert bench.driver.interrupted() == index + 1
    assert bench.queues[index].used() == [(head, 4)]


def test_a_reset_forgets_what_waits_for_the_host(bench: Bench) -> None:
    """After a reset of the device nothing of the old queue is touched any more."""
    bench.backend.fault = errno.EIO
    bench.start()
    bench.send(b"host")
    assert bench.driver.halted.acquire(timeout=DEADLINE_S)
    bench.driver.device.suspend()
    bench.driver.write(abi.VIRTIO_PCI_COMMON_STATUS, 1, 0)
    bench.backend.fault = None
    bench.driver.device.resume()
    bench.driver.device.settle()
    assert bench.queues[0].used() == []


def test_a_bug_stops_the_device_alone(bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
    """An unexpected exception is logged, and the device asks for a reset."""
    bench.start()
    bench.send(b"crash")
    assert bench.driver.interrupted() == 0
    assert bench.driver.status == READY | NEEDS_RESET
    assert [record.exc_info is not None for record in caplog.records] == [True, False]


def test_errors_do_not_flood_the_log(bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
    """A guest that fails for ever does not log for ever."""
    for _ in range(20):
        bench.driver.status = 7
        bench.driver.status = 0
    assert len([r for r in caplog.records if r.levelno == logging.WARNING]) == 5


# The device's configuration space


def test_device_configuration(bench: Bench) -> None:
    """The configuration can be read in any width, and written; zeros follow it."""
    driver = bench.driver
    assert driver.device_config(0, 4) == int.from_bytes(b"conf", "little")
    assert driver.device_config(12, 2) == ord("n")
    driver.device.write(DEVICE + 1, 1, ord("0"))
    assert bytes(bench.backend.contents[:4]) == b"c0nf"


def test_generation(bench: Bench) -> None:
    """The generation changes with the contents, and only with them."""
    driver = bench.driver
    before = driver.read(abi.VIRTIO_PCI_COMMON_CFGGENERATION, 1)
    assert driver.read(abi.VIRTIO_PCI_COMMON_CFGGENERATION, 1) == before
    bench.backend.contents[0] ^= 1
    after = driver.read(abi.VIRTIO_PCI_COMMON_CFGGENERATION, 1)
    assert after != before
    bench.backend.contents[0] ^= 1
    driver.device_config(0, 1)
    assert driver.read(abi.VIRTIO_PCI_COMMON_CFGGENERATION, 1) != after


def test_changes_are_told(bench: Bench) -> None:
    """A backend that changes its configuration interrupts only a driver that is ready."""
    bench.worker.config_changed()
    bench.start()
    bench.worker.config_changed()
    assert bench.driver.interrupted() == 0
    assert bench.driver.host.messages == []
    assert bench.driver.isr() == abi.VIRTIO_PCI_ISR_CONFIG


def test_a_backend_completes_by_itself(bench: Bench) -> None:
    """`notify` has the queue processed again, without the driver."""
    bench.start()
    head = bench.send(b"later")
    while not bench.driver.host.delivered.acquire(timeout=0.1):
        bench.worker.notify(0)  # a notification in the request's own round was used up by it
    assert bench.queues[0].used() == [(head, 5)]


def test_the_window_in_configuration_space(bench: Bench) -> None:
    """Firmware that cannot reach the BAR reads and writes it through a capability."""
    driver = bench.driver
    window = driver.window
    driver.config_write(window + 4, BAR_STRUCTURES, 1)
    driver.config_write(window + 8, abi.VIRTIO_PCI_COMMON_STATUS)
    driver.config_write(window + 12, 1)
    driver.config_write(window + 16, 3, 1)
    assert driver.status == 3
    assert driver.config_read(window + 16, 1) == 3
    driver.config_write(window + 8, BAR_SIZE)  # outside
    driver.config_write(window + 16, 0, 1)
    assert driver.status == 3


# Hostile guests


@given(
    st.lists(
        st.tuples(
            st.booleans(),
            st.one_of(st.integers(0, 63), st.integers(0, BAR_SIZE - 8)),
            st.sampled_from([1, 2, 4, 8]),
            st.one_of(st.integers(0, 16), st.integers(0, (1 << 64) - 1)),
        ),
        max_size=60,
    )
)
def test_any_access_is_survived(operations: list[Operation]) -> None:
    """No sequence of accesses does anything but change registers; a reset still works."""
    bench = Bench()
    try:
        exercise(bench.driver.device, operations)
        bench.driver.status = 0
        assert bench.driver.status == 0
    finally:
        bench.driver.device.close()


def test_a_successor_goes_on(bench: Bench) -> None:
    """With registers, vectors, pending bits and positions another function serves the rest."""
    bench.start()
    bench.send(b"first")
    assert bench.driver.interrupted() == 1
    bench.driver.mask(1, is_masked=True)
    device = bench.driver.device
    device.suspend()
    bench.send(b"second")  # not served
    other = Bench(bench.memory)
    other.driver.pci.restore(bench.driver.pci.save())
    other.driver.device.restore(device.save())
    assert other.driver.device.save() == device.save()
    assert other.driver.status == bench.driver.status
    other.driver.device.resume()
    assert other.driver.interrupted() == 2  # one too many is legal
    other.worker.settle()
    other.driver.mask(1, is_masked=False)
    assert other.driver.interrupted() == 1
    assert len(bench.queues[0].used()) == 2
    assert answer(bench.memory, 6) == b"second"
    other.driver.device.close()


def test_suspended_and_resumed(bench: Bench) -> None:
    """After suspend and resume the device continues, and its backend has not restarted."""
    bench.start()
    bench.send(b"first")
    assert bench.driver.interrupted() == 1
    for _ in range(2):
        bench.driver.device.suspend()
    bench.queues[0].set_used_event(1)
    bench.send(b"second")
    for _ in range(2):
        bench.driver.device.resume()
    assert bench.driver.interrupted() == 1
    assert [event for event in bench.backend.events if event.startswith("start")] == [
        bench.backend.events[0]
    ]
    bench.driver.device.suspend()
    bench.driver.status = 0
    assert bench.backend.events[-1] == "reset"


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda state: state.but(positions=((2, 0),)), "positions: no queue 2"),
        (lambda state: _with(state, status=0x40), "status: 0x40"),
        (lambda state: _with(state, queues=()), "0 queues, not 2"),
        (lambda state: _with(state, driver_features=1 << 60), "features 0x1000000000000000 are"),
    ],
)
def test_a_state_that_cannot_be(
    bench: Bench, change: Callable[[VirtioPciState], VirtioPciState], text: str
) -> None:
    """An impossible state is refused in one line."""
    bench.start()
    bench.driver.device.suspend()
    state = bench.driver.device.save()
    other = Bench()
    try:
        with pytest.raises(StateError, match=text):
            other.driver.device.restore(change(state))
    finally:
        other.driver.device.close()


def _with(
    state: VirtioPciState,
    *,
    status: int | None = None,
    queues: tuple[QueueState, ...] | None = None,
    driver_features: int | None = None,
) -> VirtioPciState:
    old = state.registers
    registers = old.but(
        status=old.status if status is None else status,
        queues=old.queues if queues is None else queues,
        driver_features=old.driver_features if driver_features is None else driver_features,
    )
    return state.but(registers=registers)
