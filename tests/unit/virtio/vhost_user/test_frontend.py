"""The dataplane in another process: messages to the server, and the server's end."""

from __future__ import annotations

import errno
import os
import queue
import socket
from collections.abc import Collection, Iterator
from contextlib import contextmanager

import pytest

from tests.unit.virtio.vhost_user.rig import (
    BACKEND_FEATURE,
    EVENT_IDX,
    GPA,
    MEMORY_SIZE,
    RINGS,
    VERSION_1,
    Driver,
    EchoBackend,
    driver,
    is_set,
    serving,
)
from vmm_kvm.errors import GuestError, HaltError, HaltReason
from vmm_kvm.virtio.abi import VIRTIO_ID_NET, VIRTIO_NET_F_CSUM
from vmm_kvm.virtio.vhost_user.client import Client
from vmm_kvm.virtio.vhost_user.frontend import BLOCK, QUEUE_SIZE, DeviceKind, VhostUser, net_data
from vmm_kvm.virtio.vhost_user.messages import VhostUserError
from vmm_kvm.write_log import SharedLog

FLUSH, CONFIG_WCE, MQ = 1 << 9, 1 << 11, 1 << 12
RING_RESET = 1 << 40


class BlkBackend(EchoBackend):
    """A backend with two queues, their number where a block device's configuration has it."""

    features = BACKEND_FEATURE | MQ

    def __init__(self) -> None:
        super().__init__()
        self.space = bytearray(60)
        self.space[34] = 2


class RecordingTransport:
    """A Frontend that interrupts by the driver's own eventfds, or not at all."""

    def __init__(self, guest: Driver, *, has_fds: bool) -> None:
        self.guest = guest
        self.has_fds = has_fds
        self.changes = 0
        self.failures: queue.SimpleQueue[str] = queue.SimpleQueue()
        self.halts: queue.SimpleQueue[HaltError] = queue.SimpleQueue()

    def interrupt(self, index: int) -> None:
        """Do what the eventfd would have done."""
        assert not self.has_fds
        os.eventfd_write(self.guest.call[index], 1)

    def interrupt_fd(self, index: int) -> int | None:
        """Return the driver's call eventfd."""
        return self.guest.call[index] if self.has_fds else None

    def config_changed(self) -> None:
        """Count it."""
        self.changes += 1

    def fail(self, reason: str) -> None:
        """Record the reason."""
        self.failures.put(reason)

    def halt(self, err: HaltError) -> None:
        """Record the reason."""
        self.halts.put(err)


@contextmanager
def dataplane(
    backend: EchoBackend,
    *,
    has_fds: bool = True,
    kind: DeviceKind = BLOCK,
    may_halt: bool = False,
) -> Iterator[tuple[VhostUser, Driver, RecordingTransport]]:
    """Yield a dataplane whose server runs in a thread, its driver and its transport."""
    ours, theirs = socket.socketpair()
    with serving(theirs, backend), driver() as guest:
        device = VhostUser(Client(ours), guest, "disk0", kind, may_halt=may_halt)
        transport = RecordingTransport(guest, has_fds=has_fds)
        device.attach(transport)
        guest.notifiers = [device.kick_fd(index) for index in range(len(device.queue_sizes))]
        try:
            yield device, guest, transport
        finally:
            device.close()


def test_what_the_driver_is_offered() -> None:
    """The driver is offered features of device and queues, the queues' number, RING_RESET."""
    with dataplane(BlkBackend()) as (device, _, _):
        assert device.device_id == 2
        assert device.queue_sizes == (QUEUE_SIZE,) * 2
        assert device.features == BACKEND_FEATURE | MQ | EVENT_IDX | 1 << 28 | RING_RESET
        assert len(device.config()) == 60


def test_a_log_of_what_the_server_writes() -> None:
    """The log survives a new start of the device, and ends on request."""
    log = SharedLog(GPA + MEMORY_SIZE)
    with dataplane(BlkBackend()) as (device, guest, _):
        assert device.log_writes(log)
        device.start(VERSION_1, {0: guest.ring(0)})
        guest.request(b"marked")
        assert list(log.take())
        assert device.log_writes(None)
        guest.request(b"not marked")
        assert list(log.take()) == []
    log.close()


def test_what_is_decided_here() -> None:
    """This side can own a part of the configuration space; the driver is told of changes."""
    with dataplane(BlkBackend()) as (device, guest, transport):
        theirs = device.config()
        for data, changes in ((b"\x05\x06", 1), (b"\x05\x06", 1), (bytes(2), 2)):
            device.override(6, data)
            assert device.config() == theirs[:6] + data + theirs[8:]
            assert transport.changes == changes
        device.start(VERSION_1, {0: guest.ring(0)})
        device.write_config(8, b"x")
        assert device.config()[6:9] == b"\0\0x"


class NetBackend(EchoBackend):
    """A backend with two pairs of queues, counted as an interface's are."""

    device_id = VIRTIO_ID_NET
    features = 1 << VIRTIO_NET_F_CSUM
    queue_sizes = (8,) * RINGS

    def __init__(self) -> None:
        super().__init__()
        self.told: queue.SimpleQueue[list[int]] = queue.SimpleQueue()

    def serving(self, queues: Collection[int]) -> None:
        """Note it."""
        self.told.put(sorted(queues))


def test_pairs_of_queues() -> None:
    """A server of an interface learns the pairs in use, at each decision."""
    backend = NetBackend()
    with dataplane(backend, kind=net_data(2)) as (device, guest, _):
        assert device.queue_sizes == (QUEUE_SIZE,) * 4
        device.serve_first(2)
        device.start(VERSION_1, {index: guest.ring(index) for index in range(4)})
        device.settle()
        assert [backend.told.get() for _ in range(backend.told.qsize())][-1] == [0, 1]
        device.serve_first(4)
        device.settle()
        assert [backend.told.get() for _ in range(2)] == [[0, 1, 2], [0, 1, 2, 3]]
        device.serve_first(2)
        device.settle()
        assert [backend.told.get() for _ in range(2)] == [[0, 1, 3], [0, 1]]


def test_too_few_pairs() -> None:
    """A server with fewer pairs than needed is refused."""
    expected = "the server has 2 of 3 queue pairs"
    with pytest.raises(VhostUserError, match=expected), dataplane(NetBackend(), kind=net_data(3)):
        pass


def test_the_cache_mode_is_left_to_flushes() -> None:
    """A server's write-through mode is not offered: FLUSH alone makes data durable."""
    backend = BlkBackend()
    backend.features |= CONFIG_WCE | FLUSH
    with dataplane(backend) as (device, _, _):
        assert device.features & (CONFIG_WCE | FLUSH) == FLUSH


@pytest.mark.parametrize("has_fds", [True, False])
def test_requests_are_served(has_fds: bool) -> None:
    """Notifications and interrupts arrive, with MSI-X or by hand."""
    with dataplane(BlkBackend(), has_fds=has_fds) as (device, guest, _):
        device.start(VERSION_1, {0: guest.ring(0)})
        for number in range(20):
            text = f"request {number}".encode()
            assert guest.request(text) == text.upper()
        device.start_queue(1, guest.ring(1))
        assert guest.request(b"more", 1) == b"MORE"


def test_what_is_available_before_the_start_is_served() -> None:
    """The first notification may come before the driver is ready."""
    with dataplane(BlkBackend()) as (device, guest, _):
        slot = guest.offer(b"early")
        device.start(VERSION_1, {0: guest.ring(0)})
        guest.wait(used=1)
        assert guest.answer(slot, 5) == b"EARLY"


def test_settling() -> None:
    """When `settle` returns, all requests of the driver are done; without a start it returns."""
    with dataplane(BlkBackend()) as (device, guest, _):
        device.settle()
        device.start(VERSION_1, {0: guest.ring(0), 1: guest.ring(1)})
        for number in range(20):
            ring = number % 2
            guest.offer(b"request", ring)
            guest.notify(ring)
            device.settle()
            assert guest.used(ring) == guest.available[ring]


def test_a_reset_and_another_start() -> None:
    """After a stop the server leaves the rings alone; after a start they begin again."""
    backend = BlkBackend()
    with dataplane(backend) as (device, guest, _):
        for _ in range(2):
            guest.forget()
            device.start(VERSION_1 | RING_RESET | EVENT_IDX, {0: guest.ring(0), 1: guest.ring(1)})
            assert guest.request(b"one") == b"ONE"
            assert guest.request(b"two", 1) == b"TWO"
            device.stop()
            guest.offer(b"lost")
            device.kick(0)
            device.stop()
            assert guest.used() == 1
        started = f"start {VERSION_1 | EVENT_IDX:#x}"
        assert backend.calls == [started, "reset", started, "reset"]


def test_one_queue_stops() -> None:
    """One queue stops while the other runs on, and can be started again from its beginning."""
    with dataplane(BlkBackend()) as (device, guest, _):
        device.start(VERSION_1 | RING_RESET, {0: guest.ring(0), 1: guest.ring(1)})
        assert guest.request(b"one") == b"ONE"
        device.stop_queue(0)
        device.stop_queue(0)
        assert guest.request(b"two", 1) == b"TWO"
        guest.memory[:0x3000] = bytes(0x3000)
        guest.available[0] = 0
        device.start_queue(0, guest.ring(0))
        assert guest.request(b"again") == b"AGAIN"


def test_configuration_writes_reach_the_server() -> None:
    """The driver's writes show in the configuration; those outside it are ignored."""
    backend = BlkBackend()
    with dataplane(backend) as (device, _, _):
        device.write_config(32, b"\x01")
        assert device.config()[32] == 1
        device.write_config(59, b"\x01\x02")
        assert device.config()[59] == 0


def test_impossible_rings_are_the_drivers_fault() -> None:
    """A ring outside guest memory, or misaligned, is not sent to the server."""
    backend = BlkBackend()
    with dataplane(backend) as (device, guest, transport):
        for part in (2**64 - 16, GPA + MEMORY_SIZE, GPA + 1):
            with pytest.raises(GuestError):
                device.start(VERSION_1, {0: guest.ring(0)._replace(descriptors=part)})
        assert transport.failures.empty()
        device.start(VERSION_1, {0: guest.ring(0)})
        with pytest.raises(GuestError):
            device.start_queue(1, guest.ring(1)._replace(used=0))
        assert guest.request(b"fine") == b"FINE"


def test_a_broken_ring_fails_the_device() -> None:
    """A write to the server's error descriptor leads to DEVICE_NEEDS_RESET."""
    with dataplane(BlkBackend()) as (device, guest, transport):
        device.start(VERSION_1, {0: guest.ring(0)})
        guest.offer(b"bad", gpa=1)
        guest.notify()
        reason = transport.failures.get(timeout=10)
        assert reason == "vhost-user: the server gave up a ring"
        device.stop()


def test_a_request_waits_for_the_host() -> None:
    """Our server can hold a request and pause the VM; a notification retries it."""
    backend = BlkBackend()
    with dataplane(backend, may_halt=True) as (device, guest, transport):
        device.start(VERSION_1, {0: guest.ring(0), 1: guest.ring(1)})
        backend.fault = errno.ENOSPC
        slots = [guest.offer(b"wait", ring) for ring in (0, 1)]
        for ring in (0, 1):
            guest.notify(ring)
            assert transport.halts.get(timeout=10).reason is HaltReason.NO_SPACE
        backend.fault = errno.EIO
        device.kick(1)
        told = transport.halts.get(timeout=10)
        device.settle()
        assert str(told) in {"disk0: No space left on device", "disk0: Input/output error"}
        assert (guest.used(0), guest.used(1)) == (0, 0)
        backend.fault = None
        for ring, slot in enumerate(slots):
            device.kick(ring)
            guest.wait(ring, used=1)
            assert guest.answer(slot, 4, ring) == b"WAIT"
        assert transport.failures.empty()
        guest.offer(b"bad", gpa=1)
        guest.notify()
        assert transport.failures.get(timeout=10) == "vhost-user: the server gave up a ring"


def test_a_pause_has_a_request_that_waits_tried_again() -> None:
    """A request that failed before a pause is tried once more after it."""
    backend = BlkBackend()
    with dataplane(backend, may_halt=True) as (device, guest, transport):
        device.start(VERSION_1, {0: guest.ring(0)})
        backend.fault = errno.ENOSPC
        slot = guest.offer(b"wait")
        guest.notify()
        for _ in range(2):
            assert transport.halts.get(timeout=10).reason is HaltReason.NO_SPACE
            device.suspend()
            device.resume()
        backend.fault = None
        device.suspend()
        device.resume()
        guest.wait(used=1)
        assert guest.answer(slot, 4) == b"WAIT"


def test_a_server_of_others_does_not_wait_for_the_host() -> None:
    """A server that is not ours is not asked to wait: it gives up a ring."""
    backend = BlkBackend()
    backend.fault = errno.EIO
    with dataplane(backend) as (device, guest, transport):
        device.start(VERSION_1, {0: guest.ring(0)})
        guest.offer(b"wait")
        guest.notify()
        assert transport.failures.get(timeout=10) == "vhost-user: the server gave up a ring"
        assert transport.halts.empty()


def test_a_server_that_goes_away() -> None:
    """At the server's end the device fails once, with one line; a new start fails again."""
    ours, theirs = socket.socketpair()
    with driver() as guest:
        with serving(theirs, BlkBackend()):
            device = VhostUser(Client(ours), guest, "disk0")
            transport = RecordingTransport(guest, has_fds=True)
            device.attach(transport)
            device.start(VERSION_1, {0: guest.ring(0)})
        gone = "vhost-user: the server closed the connection"
        assert transport.failures.get(timeout=10) == gone
        device.kick(0)
        device.write_config(32, b"\x01")
        device.stop_queue(0)
        device.stop()
        assert transport.failures.empty()
        device.start(VERSION_1, {0: guest.ring(0)})
        assert transport.failures.get(timeout=10) == gone
        device.start_queue(1, guest.ring(1))
        device.stop()
        device.close()
        device.close()
        assert transport.failures.empty()


def test_a_server_that_is_gone_at_the_start() -> None:
    """Before the driver is ready nothing is watched: the first request shows the server's end."""
    ours, theirs = socket.socketpair()
    with driver() as guest:
        with serving(theirs, BlkBackend()):
            device = VhostUser(Client(ours), guest, "disk0")
            transport = RecordingTransport(guest, has_fds=True)
            device.attach(transport)
        device.start(VERSION_1, {0: guest.ring(0)})
        assert transport.failures.get(timeout=10).startswith("vhost-user: SET_FEATURES: ")
        device.close()


def test_servers_that_will_not_do() -> None:
    """A server without modern virtio, or with an impossible number of queues, is refused."""

    class NoQueues(BlkBackend):
        def __init__(self) -> None:
            super().__init__()
            self.space[34] = 0

    ours, theirs = socket.socketpair()
    with (
        serving(theirs, NoQueues()),
        driver() as guest,
        pytest.raises(VhostUserError, match="the server has 0 queues, not 1 to 64"),
    ):
        VhostUser(Client(ours), guest, "disk0")
    ours, theirs = socket.socketpair()
    with serving(theirs, BlkBackend()), driver() as guest:
        client = Client(ours)
        client.features &= ~VERSION_1
        with pytest.raises(VhostUserError, match="the server offers legacy virtio only"):
            VhostUser(client, guest, "disk0")


def test_the_drivers_events_are_its_own() -> None:
    """Closing the dataplane closes neither the transport's eventfds nor guest memory."""
    with dataplane(BlkBackend()) as (device, guest, _):
        device.start(VERSION_1, {0: guest.ring(0)})
        device.close()
        os.eventfd_write(guest.call[0], 1)
        assert is_set(guest.call[0])
        os.fstat(guest.fd)


def test_a_pause_keeps_what_the_server_knows() -> None:
    """Over a suspend and resume a server keeps its rings and its state."""
    backend = BlkBackend()
    with dataplane(backend) as (device, guest, _):
        device.start(VERSION_1, {0: guest.ring(0)})
        assert guest.request(b"before") == b"BEFORE"
        device.suspend()
        device.resume()
        assert guest.request(b"after") == b"AFTER"
        assert "reset" not in backend.calls


def test_a_state_is_asked_for_and_the_same_server_goes_on() -> None:
    """For a state the server stops its rings; after a resume it has them again."""
    with dataplane(BlkBackend()) as (device, guest, _):
        device.start(VERSION_1, {0: guest.ring(0), 1: guest.ring(1)})
        assert guest.request(b"before") == b"BEFORE"
        device.suspend()
        assert device.positions() == {0: 1, 1: 0}
        assert device.positions() == {0: 1, 1: 0}
        slot = guest.offer(b"meanwhile")
        guest.notify()
        device.resume()
        guest.wait(used=2)
        assert guest.answer(slot, 9) == b"MEANWHILE"


def test_another_server_goes_on() -> None:
    """Another server continues with the first one's positions, and its unserved requests."""
    with dataplane(BlkBackend()) as (device, guest, _):
        device.start(VERSION_1, {0: guest.ring(0)})
        assert guest.request(b"before") == b"BEFORE"
        device.suspend()
        positions = device.positions()
        slot = guest.offer(b"meanwhile")
        ours, theirs = socket.socketpair()
        with serving(theirs, BlkBackend()):
            successor = VhostUser(Client(ours), guest, "disk1", BLOCK)
            transport = RecordingTransport(guest, has_fds=True)
            successor.attach(transport)
            successor.restore(VERSION_1, {0: guest.ring(0)}, positions)
            assert guest.used() == 1
            successor.resume()
            guest.wait(used=2)
            assert guest.answer(slot, 9) == b"MEANWHILE"
            successor.close()
            assert transport.failures.empty()


def test_a_server_that_is_gone_has_no_positions() -> None:
    """For a server that is gone the device has failed; a resume changes nothing."""
    with dataplane(BlkBackend()) as (device, guest, transport):
        device.start(VERSION_1, {0: guest.ring(0)})
        device.suspend()
        device._client.shut_down()  # as a server that dies
        assert device.positions() == {}
        assert "GET_VRING_BASE" in transport.failures.get() or transport.failures.empty()
        device.resume()
