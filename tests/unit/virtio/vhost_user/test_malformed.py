"""Forbidden messages of a front-end: each ends its connection with one line, and nothing else."""

from __future__ import annotations

import array
import os
import socket
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.unit.virtio.vhost_user.rig import (
    GPA,
    MEMORY_SIZE,
    USER,
    VERSION_1,
    Driver,
    EchoBackend,
    connection,
    driver,
    serving,
)
from vmm_kvm.virtio.vhost_user.client import Client
from vmm_kvm.virtio.vhost_user.messages import (
    FEATURE_PROTOCOL_FEATURES,
    FLAG_REPLY,
    ConfigAccess,
    Header,
    MemoryRegion,
    Request,
    VhostUserError,
    VringAddress,
    VringState,
    pack_log,
    pack_region,
    pack_regions,
    pack_u64,
)
from vmm_kvm.virtio.vhost_user.server import listen

R = Request
REGION = MemoryRegion(GPA, MEMORY_SIZE, USER, 0)


@pytest.fixture
def guest() -> Iterator[Driver]:
    """A driver with memory and eventfds."""
    with driver() as one:
        yield one


CASES: list[tuple[int, bytes, int, str]] = [
    # Request, payload, number of copies of the driver's memory descriptor, the line.
    (R.SET_FEATURES, pack_u64(1 << 63), 0, "SET_FEATURES: 0x8000000000000000 was not offered"),
    (R.SET_FEATURES, pack_u64(VERSION_1 | 1 << 5), 0, "SET_FEATURES: changed while a ring is"),
    (R.SET_FEATURES, bytes(7), 0, "SET_FEATURES: payload of 7 bytes, not 8"),
    (R.SET_PROTOCOL_FEATURES, pack_u64(1 << 12), 0, "SET_PROTOCOL_FEATURES: 0x1000 was not"),
    (R.SET_OWNER, b"", 1, "SET_OWNER: descriptors that do not belong to it"),
    (R.GET_FEATURES, b"", 2, "GET_FEATURES: descriptors that do not belong to it"),
    (R.SET_VRING_NUM, VringState(0, 4).pack(), 0, "SET_VRING_NUM: ring 0: is not stopped"),
    (R.SET_VRING_NUM, VringState(1, 0).pack(), 0, "SET_VRING_NUM: ring 1: size 0"),
    (R.SET_VRING_NUM, VringState(1, 5).pack(), 0, "SET_VRING_NUM: ring 1: size 5"),
    (R.SET_VRING_NUM, VringState(1, 1 << 16).pack(), 0, "SET_VRING_NUM: ring 1: size 65536"),
    (R.SET_VRING_NUM, VringState(2, 4).pack(), 0, "SET_VRING_NUM: ring 2: there are 2"),
    (R.SET_VRING_BASE, VringState(0, 0).pack(), 0, "SET_VRING_BASE: ring 0: is not stopped"),
    (R.SET_VRING_BASE, VringState(1, 1 << 16).pack(), 0, "SET_VRING_BASE: ring 1: base 0x10000"),
    (R.GET_VRING_BASE, VringState(1 << 31, 0).pack(), 0, "GET_VRING_BASE: ring 2147483648: there"),
    (R.SET_VRING_ADDR, VringAddress(1, 2, 0, 0, 0, 0).pack(), 0, "SET_VRING_ADDR: ring 1: flags"),
    (R.SET_VRING_ADDR, VringAddress(0, 0, 0, 0, 0, 0).pack(), 0, "SET_VRING_ADDR: user address 0"),
    (R.SET_VRING_ADDR, bytes(39), 0, "SET_VRING_ADDR: payload of 39 bytes, not 40"),
    (R.SET_VRING_ENABLE, VringState(0, 2).pack(), 0, "SET_VRING_ENABLE: ring 0: 2, not 0 or 1"),
    (R.SET_VRING_KICK, pack_u64(0), 0, "SET_VRING_KICK: a descriptor is missing"),
    (R.SET_VRING_KICK, pack_u64(0), 1, "SET_VRING_KICK: a descriptor that is neither an eventfd"),
    (R.SET_VRING_CALL, pack_u64(0), 1, "SET_VRING_CALL: a descriptor that is neither an eventfd"),
    (R.SET_VRING_ERR, pack_u64(0), 1, "SET_VRING_ERR: a descriptor that is neither an eventfd"),
    (R.SET_VRING_KICK, pack_u64(1 << 9), 1, "SET_VRING_KICK: 0x200"),
    (R.SET_VRING_KICK, pack_u64(9), 1, "SET_VRING_KICK: ring 9: there are 2"),
    (R.SET_VRING_KICK, pack_u64(1 | 1 << 8), 1, "SET_VRING_KICK: "),
    (R.SET_VRING_CALL, pack_u64(1 << 63), 0, "SET_VRING_CALL: 0x8000000000000000"),
    (R.SET_VRING_ERR, b"", 1, "SET_VRING_ERR: payload of 0 bytes, not 8"),
    (R.SET_MEM_TABLE, pack_regions([REGION]), 0, "SET_MEM_TABLE: 0 descriptors for 1 regions"),
    (R.SET_MEM_TABLE, pack_regions([REGION]), 2, "SET_MEM_TABLE: 2 descriptors for 1 regions"),
    (R.SET_MEM_TABLE, pack_regions([REGION] * 2), 2, "SET_MEM_TABLE: memory region 0x100000+"),
    (R.SET_MEM_TABLE, pack_regions([REGION] * 9), 8, "SET_MEM_TABLE: 9 memory regions"),
    (R.ADD_MEM_REG, pack_region(REGION), 0, "ADD_MEM_REG: a descriptor is missing"),
    (R.ADD_MEM_REG, pack_region(REGION), 1, "ADD_MEM_REG: memory region 0x100000+0x40000: over"),
    (R.REM_MEM_REG, pack_region(REGION._replace(size=1)), 0, "REM_MEM_REG: memory region"),
    (R.GET_CONFIG, ConfigAccess(250, 0, bytes(7)).pack(), 0, "GET_CONFIG: configuration space"),
    (R.SET_CONFIG, bytes(3), 0, "SET_CONFIG: payload of 3 bytes, not 12 or more"),
    (R.SET_CONFIG, ConfigAccess(0, 2, b"x").pack(), 0, "SET_CONFIG: flags 0x2"),
    (R.SET_STATUS, pack_u64(0x100), 0, "SET_STATUS: 0x100"),
    (R.SET_LOG_BASE, pack_log(4096, 0), 0, "SET_LOG_BASE: a descriptor is missing"),
    (R.SET_LOG_BASE, pack_u64(0), 1, "SET_LOG_BASE: payload of 8 bytes, not 16"),
    (R.SET_LOG_BASE, pack_log(0, 0), 1, "SET_LOG_BASE: a log of 0 bytes at 0x0"),
    (R.SET_LOG_BASE, pack_log(1 << 31, 0), 1, "SET_LOG_BASE: a log of 2147483648 bytes at 0x0"),
    (R.SET_LOG_BASE, pack_log(4096, 8), 1, "SET_LOG_BASE: a log of 4096 bytes at 0x8"),
    (R.SET_LOG_BASE, pack_log(4096, 1 << 40), 1, "SET_LOG_BASE: the log cannot be mapped: the"),
    (7, pack_u64(0), 0, "request 7: is not supported"),
    (0, b"", 0, "request 0: is not supported"),
    (0xFFFF_FFFF, b"", 0, "request 4294967295: is not supported"),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case[3])
def test_a_malformed_request_ends_the_connection(
    case: tuple[int, bytes, int, str], guest: Driver, caplog: pytest.LogCaptureFixture
) -> None:
    """A malformed request is refused by name, the device is reset, and no descriptor stays."""
    request, payload, fds, line = case
    backend = EchoBackend()
    with connection(backend) as client:
        guest.start(client)
        client._channel.send(request, payload, fds=[guest.fd] * fds)
        end_of(client)
    assert [text[: len(line)] for text in caplog.messages] == [line]
    assert backend.calls == [f"start {VERSION_1:#x}", "reset"]


def end_of(client: Client) -> None:
    """Wait until the server has closed the connection."""
    while True:
        try:
            message = client._channel.receive()
        except (VhostUserError, ConnectionResetError):
            return
        if message is None:
            return
        message.fds.close()


def test_a_refused_request_is_answered_first(guest: Driver) -> None:
    """With REPLY_ACK a front-end learns the wrong request before the connection ends."""
    with connection(EchoBackend()) as client:
        guest.start(client)
        with pytest.raises(VhostUserError, match="SET_VRING_NUM: the server refuses it"):
            client.set_size(0, 4)
        with pytest.raises(VhostUserError, match="GET_QUEUE_NUM"):
            client.queue_count()


@pytest.mark.parametrize(
    ("data", "line"),
    [
        (Header(1, 2, 0).pack(), "protocol version 2, not 1"),
        (Header(1, 1 | FLAG_REPLY, 0).pack(), "GET_FEATURES: a reply, not a request"),
        (Header(5, 1, 1 << 31).pack(), "SET_MEM_TABLE: payload of 2147483648 bytes"),
        (Header(2, 1, 8).pack() + b"abc", "SET_FEATURES: the connection ended in it"),
        (b"GET / HTTP/1.1\r\n\r\n", "protocol version 3, not 1"),
        (b"\x01", "the connection ended in a message"),
    ],
)
def test_bytes_that_are_no_message(
    data: bytes, line: str, caplog: pytest.LogCaptureFixture
) -> None:
    """A stream out of step, or cut short, ends with one line."""
    ours, theirs = socket.socketpair()
    with ours, serving(theirs, EchoBackend()) as server:
        ours.sendall(data)
        ours.shutdown(socket.SHUT_WR)
        assert server.ended.wait(10)
    assert caplog.messages == [line]


def test_a_front_end_cannot_keep_its_own_connection_open(
    guest: Driver, caplog: pytest.LogCaptureFixture
) -> None:
    """A connection's other end among our own descriptors would keep it open: it is refused."""
    ours, theirs = socket.socketpair()
    with serving(theirs, EchoBackend()) as server:
        with Client(ours) as client:
            guest.start(client)
            # In an incomplete message, whose descriptors are never read.
            rights = array.array("i", [client.fileno()])
            ours.sendmsg([b"\5"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)])
        assert server.ended.wait(10)
    assert caplog.messages == ["a socket among the descriptors"]


def test_descriptors_for_events_come_one_by_one(
    guest: Driver, caplog: pytest.LogCaptureFixture
) -> None:
    """A second descriptor for an event is refused."""
    with connection(EchoBackend()) as client:
        client._channel.send(R.SET_VRING_CALL, pack_u64(0), fds=guest.call)
        end_of(client)
    assert caplog.messages == ["SET_VRING_CALL: descriptors that do not belong to it"]


def test_a_kick_pipe_that_closes_ends_the_connection(
    guest: Driver, caplog: pytest.LogCaptureFixture
) -> None:
    """A hung-up kick pipe, which would be readable for ever, ends the connection."""
    with connection(EchoBackend()) as client:
        guest.start(client)
        read_end, write_end = os.pipe()
        client.set_kick(0, read_end)
        os.write(write_end, bytes(8))
        os.close(read_end)
        os.close(write_end)
        end_of(client)
    assert caplog.messages == ["ring 0: kick descriptor: 0 bytes, not 8"]


def test_a_call_pipe_that_closes_ends_the_connection(
    guest: Driver, caplog: pytest.LogCaptureFixture
) -> None:
    """A call pipe that closes ends the connection: no interrupt could be delivered."""
    with connection(EchoBackend()) as client:
        guest.start(client)
        read_end, write_end = os.pipe()
        client.set_call(0, write_end)
        os.close(read_end)
        os.close(write_end)
        guest.offer(b"x")
        guest.notify()
        end_of(client)
    assert caplog.messages == ["ring 0: call descriptor: Broken pipe"]


def test_a_full_call_descriptor_does_not_block(guest: Driver) -> None:
    """An eventfd at its limit, or a full pipe, is left alone: it signals already."""
    with connection(EchoBackend()) as client:
        guest.start(client)
        full = os.eventfd(0, os.EFD_CLOEXEC)
        os.eventfd_write(full, 2**64 - 2)
        client.set_call(0, full)
        os.close(full)
        guest.offer(b"x")
        guest.notify()
        while guest.used() != 1:
            client.queue_count()
        assert client.stop(0) == 1


@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    st.lists(
        st.tuples(
            st.sampled_from([*Request, 0, 6, 31, 99]),
            st.sampled_from([1, 9, 5, 0]),
            st.binary(max_size=300)
            | st.builds(pack_u64, st.integers(0, 2**64 - 1))
            | st.builds(
                lambda *state: VringState(*state).pack(), st.integers(0, 3), st.integers(0, 9)
            ),
            st.integers(0, 3),
        ),
        max_size=20,
    )
)
def test_any_messages_leave_a_server_that_works(
    tmp_path_factory: pytest.TempPathFactory, messages: list[tuple[int, int, bytes, int]]
) -> None:
    """After any messages of a front-end, the next one is served."""
    path = str(tmp_path_factory.mktemp("server") / "disk.sock")
    with serving(listen(path), EchoBackend()), driver() as guest, ExitStack() as stack:
        one = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
        one.connect(path)
        reader = threading.Thread(target=drain, args=(one,))
        reader.start()
        fds = [guest.fd, guest.kick[0], guest.call[0]]
        for request, flags, payload, count in messages:
            data = Header(request, flags, len(payload)).pack() + payload
            rights = array.array("i", fds[:count])
            ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)] if count else []
            try:
                one.sendmsg([data], ancillary)
            except OSError:
                break
        one.shutdown(socket.SHUT_WR)
        reader.join()
        other = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        other.connect(path)
        with Client(other) as client:
            guest.start(client)
            assert guest.request(b"still here") == b"STILL HERE"
    Path(path).unlink()


def drain(sock: socket.socket) -> None:
    """Read replies, and drop them, until the server closes the connection."""
    try:
        while sock.recv(4096):
            pass
    except ConnectionResetError:
        return


def test_features_without_protocol_features(guest: Driver) -> None:
    """A front-end that does not know protocol features has its rings enabled from the start."""
    with connection(EchoBackend()) as client:
        client._channel.send(Request.SET_FEATURES, pack_u64(VERSION_1))
        client.features &= ~FEATURE_PROTOCOL_FEATURES
        client.set_memory([guest.region], [guest.fd])
        guest.set_up(client, 0)
        assert guest.request(b"old") == b"OLD"
