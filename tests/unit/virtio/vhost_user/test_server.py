"""The server with a well-behaved front-end: rings start, stop, move, and continue."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from tests.unit.virtio.vhost_user.rig import (
    BACKEND_FEATURE,
    EVENT_IDX,
    GPA,
    MEMORY_SIZE,
    USER,
    VERSION_1,
    EchoBackend,
    connect,
    connection,
    driver,
    is_set,
    serving,
    wait_for,
)
from vmm_kvm.errors import SpecError
from vmm_kvm.virtio.vhost_user.client import Client
from vmm_kvm.virtio.vhost_user.messages import (
    FEATURE_LOG_ALL,
    FEATURE_PROTOCOL_FEATURES,
    MemoryRegion,
    Request,
    VhostUserError,
    pack_region,
    pack_u64,
    unpack_u64,
)
from vmm_kvm.virtio.vhost_user.regions import SLOTS_MAX
from vmm_kvm.virtio.vhost_user.server import inherited, listen
from vmm_kvm.virtio.vhost_user.session import PROTOCOL_FEATURES
from vmm_kvm.write_log import SharedLog


def test_what_the_server_offers() -> None:
    """Features are the backend's, those of modern queues, and protocol features."""
    with connection(EchoBackend()) as client:
        rings = VERSION_1 | EVENT_IDX | 1 << 28
        vhost = FEATURE_PROTOCOL_FEATURES | FEATURE_LOG_ALL
        assert client.features == BACKEND_FEATURE | rings | vhost
        assert unpack_u64(client._query(Request.GET_PROTOCOL_FEATURES)) == PROTOCOL_FEATURES
        assert client.queue_count() == 2
        assert unpack_u64(client._query(Request.GET_MAX_MEM_SLOTS)) == SLOTS_MAX


def test_configuration_space() -> None:
    """Configuration is read from any offset, with zeros after its end, and can be written."""
    with connection(EchoBackend()) as client:
        assert client.config(16) == b"configuration\0\0\0"
        client.write_config(3, b"FIG")
        assert client.config(13) == b"conFIGuration"


@pytest.mark.parametrize("features", [VERSION_1, VERSION_1 | EVENT_IDX | BACKEND_FEATURE])
def test_requests_are_served(features: int) -> None:
    """A notification causes an answer and an interrupt, round the ring several times."""
    backend = EchoBackend()
    with driver() as guest, connection(backend) as client:
        guest.start(client, features)
        for number in range(20):
            text = f"request {number}".encode()
            assert guest.request(text) == text.upper()
        assert client.stop(0) == 20
        assert backend.calls == [f"start {features:#x}", "reset"]


def test_what_is_written_is_logged() -> None:
    """Answers and used rings are marked in the log, while the front-end wants it."""
    log = SharedLog(GPA + MEMORY_SIZE)
    with driver() as guest, connection(EchoBackend()) as client:
        guest.start(client)
        guest.request(b"before")
        client.set_log(log.size, log.fd)
        guest.request(b"not yet")
        assert list(log.take()) == []
        client.set_features(VERSION_1 | FEATURE_LOG_ALL)
        slot = guest.offer(b"marked")
        guest.notify()
        guest.wait(used=3)
        assert guest.answer(slot, 6) == b"MARKED"
        marked = list(log.take())
        for place in (guest.ring(0).used, GPA + guest.answer_place(slot)):
            assert any(start <= place < end for start, end in marked), marked
        client.set_features(VERSION_1)
        guest.request(b"no more")
        assert list(log.take()) == []
    log.close()


def test_what_is_available_before_the_start_is_served() -> None:
    """No notification is needed for requests that waited for the ring's start."""
    with driver() as guest, connection(EchoBackend()) as client:
        slot = guest.offer(b"early")
        guest.start(client)
        guest.wait(used=1)
        assert guest.answer(slot, 5) == b"EARLY"


def test_two_rings() -> None:
    """Each ring has its own descriptors; the backend starts and ends once for both."""
    backend = EchoBackend()
    with driver() as guest, connection(backend) as client:
        guest.start(client)
        guest.set_up(client, 1)
        assert guest.request(b"zero", 0) == b"ZERO"
        assert guest.request(b"one", 1) == b"ONE"
        assert client.stop(1) == 1
        assert backend.calls == [f"start {VERSION_1:#x}"]
        assert client.stop(0) == 1
        assert backend.calls == [f"start {VERSION_1:#x}", "reset"]


def test_a_stopped_ring_is_left_alone() -> None:
    """After GET_VRING_BASE nothing is served; the ring continues from its position."""
    with driver() as guest, connection(EchoBackend()) as client:
        guest.start(client)
        assert guest.request(b"one") == b"ONE"
        base = client.stop(0)
        slot = guest.offer(b"two")
        guest.notify()
        assert client.queue_count() == 2  # the server has had its chance
        assert guest.used() == 1
        guest.set_up(client, 0, base)
        guest.wait(used=2)
        assert guest.answer(slot, 3) == b"TWO"


def test_a_disabled_ring_is_left_alone() -> None:
    """A disabled ring waits; once it is enabled, its available chains are served."""
    with driver() as guest, connection(EchoBackend()) as client:
        guest.start(client)
        client.enable(0, False)
        slot = guest.offer(b"later")
        guest.notify()
        assert client.queue_count() == 2
        assert guest.used() == 0
        client.enable(0, True)
        guest.wait(used=1)
        assert guest.answer(slot, 5) == b"LATER"


def test_a_ring_without_kick_descriptor_is_polled() -> None:
    """Bit 8 of SET_VRING_KICK means that the ring is polled."""
    with driver() as guest, connection(EchoBackend()) as client:
        guest.start(client)
        client.set_kick(0, None)
        for number in range(3):
            slot = guest.offer(b"polled")
            guest.wait(used=number + 1)
            assert guest.answer(slot, 6) == b"POLLED"
        assert client.stop(0) == 3


def test_a_ring_without_call_descriptor_is_served() -> None:
    """Bit 8 of SET_VRING_CALL means that the driver polls; another descriptor may follow."""
    with driver() as guest, connection(EchoBackend()) as client:
        guest.start(client)
        client.set_call(0, None)
        is_set(guest.call[0])
        guest.offer(b"silent")
        guest.notify()
        while guest.used() != 1:
            client.queue_count()
        assert not is_set(guest.call[0])
        client.set_call(0, guest.call[0])
        assert guest.request(b"loud") == b"LOUD"


def test_a_start_interrupts() -> None:
    """A start interrupts, in case a crashed predecessor did not."""
    with driver() as guest, connection(EchoBackend()) as client:
        guest.start(client)
        assert is_set(guest.call[0])


def test_a_successor_goes_on_where_the_used_ring_ends() -> None:
    """After a crash the driver's base is the used index: nothing is lost, nothing done twice."""
    first, second = EchoBackend(), EchoBackend()
    with driver() as guest:
        with connection(first) as client:
            guest.start(client)
            assert guest.request(b"one") == b"ONE"
        slot = guest.offer(b"two")
        with connection(second) as client:
            client.set_features(VERSION_1)
            client.set_memory([guest.region], [guest.fd])
            guest.set_up(client, 0, guest.used())
            guest.wait(used=2)
        assert guest.answer(slot, 3) == b"TWO"
    assert (first.served, second.served) == (1, 1)
    assert first.calls[-1] == "reset"


def test_memory_may_move_while_rings_run() -> None:
    """A new memory table takes effect at once, and rings continue in it."""
    with driver() as guest, connection(EchoBackend()) as client:
        guest.start(client)
        assert guest.request(b"before") == b"BEFORE"
        other = os.memfd_create("other", os.MFD_CLOEXEC)
        os.ftruncate(other, 0x1000)
        extra = MemoryRegion(1 << 32, 0x1000, 1 << 40, 0)
        client.set_memory([extra, guest.region], [other, guest.fd])
        os.close(other)
        assert guest.request(b"after") == b"AFTER"


def test_memory_by_slots() -> None:
    """Regions come and go one by one; a ring waits while its own is missing."""
    with driver() as guest, connection(EchoBackend()) as client:
        client.set_features(VERSION_1)
        client._order(Request.ADD_MEM_REG, pack_region(guest.region), [guest.fd])
        guest.set_up(client, 0)
        assert guest.request(b"one") == b"ONE"
        client._order(Request.REM_MEM_REG, pack_region(guest.region), [guest.fd])
        slot = guest.offer(b"two")
        guest.notify()
        assert client.queue_count() == 2
        assert guest.used() == 1
        client._order(Request.ADD_MEM_REG, pack_region(guest.region), [guest.fd])
        guest.wait(used=2)
        assert guest.answer(slot, 3) == b"TWO"


@pytest.mark.parametrize("request_", [Request.RESET_DEVICE, Request.RESET_OWNER])
def test_a_reset_stops_everything(request_: Request) -> None:
    """After a reset no ring is started, and the device can be set up again."""
    backend = EchoBackend()
    with driver() as guest, connection(backend) as client:
        guest.start(client)
        assert guest.request(b"one") == b"ONE"
        client._order(request_)
        assert backend.calls[-1] == "reset"
        guest.offer(b"lost")
        guest.notify()
        assert client.queue_count() == 2
        assert guest.used() == 1
        guest.start(client)
        guest.wait(used=3)


def test_device_status() -> None:
    """Status is kept; 0 resets the device; a broken ring shows as DEVICE_NEEDS_RESET."""
    backend = EchoBackend()
    with driver() as guest, connection(backend) as client:
        client._order(Request.SET_STATUS, pack_u64(0xF))
        guest.start(client)
        assert unpack_u64(client._query(Request.GET_STATUS)) == 0xF
        guest.offer(b"bad", gpa=0x1)
        guest.notify()
        wait_for(guest.error[0])
        assert unpack_u64(client._query(Request.GET_STATUS)) == 0x4F
        client._order(Request.SET_STATUS, pack_u64(0))
        assert unpack_u64(client._query(Request.GET_STATUS)) == 0
        assert backend.calls[-1] == "reset"


def test_a_broken_ring_is_the_drivers_fault(caplog: pytest.LogCaptureFixture) -> None:
    """The error descriptor and one line report a broken ring; others run; a restart helps."""
    with driver() as guest, connection(EchoBackend()) as client:
        guest.start(client)
        guest.set_up(client, 1)
        guest.offer(b"bad", gpa=GPA + MEMORY_SIZE)
        guest.notify(0)
        wait_for(guest.error[0])
        assert guest.request(b"other", 1) == b"OTHER"
        assert client.stop(0) == 0  # a successor continues here
        guest.set_up(client, 0, 1)
        slot = guest.offer(b"good")
        guest.notify()
        guest.wait(used=1)
        assert guest.answer(slot, 4) == b"GOOD"
    assert caplog.messages == ["ring 0: guest memory 0x140000+0x3: outside RAM"]


def test_a_driver_cannot_flood_the_log(caplog: pytest.LogCaptureFixture) -> None:
    """A ring that breaks again and again is logged a few times."""
    with driver() as guest, connection(EchoBackend()) as client:
        guest.start(client)
        for number in range(20):
            guest.offer(b"bad", gpa=1)
            guest.notify()
            wait_for(guest.error[0])
            client.stop(0)
            guest.set_up(client, 0, number + 1)
    assert len(caplog.messages) == 8


def test_a_ring_in_an_impossible_place_is_the_drivers_fault(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A misaligned ring is not served, but the connection stays."""
    with driver() as guest, connection(EchoBackend()) as client:
        guest.start(client)
        client.stop(0)
        client.set_address(guest.address(0)._replace(descriptor=USER + 1))
        client.set_kick(0, guest.kick[0])
        assert is_set(guest.error[0])
        assert client.queue_count() == 2
    assert "misaligned" in caplog.messages[0]


def test_front_ends_come_one_after_another(tmp_path: Path) -> None:
    """A listening server serves the next front-end when the first has left."""
    path = str(tmp_path / "disk.sock")
    backend = EchoBackend()
    with serving(listen(path), backend) as server:
        for _ in range(3):
            with driver() as guest, connect(path) as client:
                guest.start(client)
                assert guest.request(b"hello") == b"HELLO"
        assert not server.ended.is_set()
    assert backend.calls == [f"start {VERSION_1:#x}", "reset"] * 3


def test_a_second_front_end_waits(tmp_path: Path) -> None:
    """Only one front-end at a time is served; the next is when the first leaves."""
    path = str(tmp_path / "disk.sock")
    with serving(listen(path), EchoBackend()), connect(path) as first:
        second = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        second.connect(path)
        assert first.queue_count() == 2
        second.settimeout(0)
        with pytest.raises(BlockingIOError):
            second.recv(1)
        first.close()
        with Client(second) as client:
            assert client.queue_count() == 2


def test_one_shot(tmp_path: Path) -> None:
    """A one-shot server, and one with a connected socket, ends when its front-end leaves."""
    path = str(tmp_path / "disk.sock")
    with serving(listen(path), EchoBackend(), is_one_shot=True) as server:
        connect(path).close()
        assert server.ended.wait(10)
    ours, theirs = socket.socketpair()
    with serving(theirs, EchoBackend()) as server:
        ours.close()
        assert server.ended.wait(10)


def test_a_stale_socket_is_replaced(tmp_path: Path) -> None:
    """A stale socket is made again; one in use, or another file, is not touched."""
    path = tmp_path / "disk.sock"
    listen(str(path)).close()
    with listen(str(path)):
        assert path.stat().st_mode & 0o777 == 0o600
        with pytest.raises(SpecError, match="another process serves it"):
            listen(str(path))
    file = tmp_path / "file"
    file.write_text("precious")
    with pytest.raises(SpecError, match="no socket"):
        listen(str(file))
    assert file.read_text() == "precious"


def test_inherited_descriptors() -> None:
    """An inherited descriptor must be a UNIX stream socket."""
    ours, theirs = socket.socketpair()
    with ours, inherited(theirs.detach()) as sock:
        assert not sock.get_inheritable()
    read_end, write_end = os.pipe()
    with pytest.raises(SpecError, match="Socket operation on non-socket"):
        inherited(read_end)
    os.close(read_end)
    os.close(write_end)
    with (
        socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as datagram,
        pytest.raises(SpecError, match="not a UNIX stream socket"),
    ):
        inherited(datagram.fileno())
    with pytest.raises(SpecError, match="Bad file descriptor"):
        inherited(999)


def test_a_client_tells_what_went_wrong() -> None:
    """A refusal names the request."""
    with (
        connection(EchoBackend()) as client,
        pytest.raises(VhostUserError, match="SET_VRING_NUM: the server refuses it"),
    ):
        client.set_size(0, 7)
