"""A front-end's requests: answers that are right, wrong, late, or missing."""

from __future__ import annotations

import array
import os
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.virtio.vhost_user.rig import Driver, driver
from vmm_kvm.virtio.vhost_user import client as client_module
from vmm_kvm.virtio.vhost_user.client import Client
from vmm_kvm.virtio.vhost_user.frontend import VhostUser
from vmm_kvm.virtio.vhost_user.messages import (
    FEATURE_PROTOCOL_FEATURES,
    FLAG_NEED_REPLY,
    FLAG_REPLY,
    VERSION,
    ConfigAccess,
    Header,
    ProtocolFeature,
    Request,
    VhostUserError,
    VringState,
    pack_u64,
)

U64 = st.integers(0, 2**64 - 1)
VERSION_1 = 1 << 32


def reply(request: int, payload: bytes, flags: int = VERSION | FLAG_REPLY) -> bytes:
    """Return a message as a server sends it."""
    return Header(request, flags, len(payload)).pack() + payload


GREETING = [
    reply(Request.GET_FEATURES, pack_u64(VERSION_1 | FEATURE_PROTOCOL_FEATURES)),
    reply(Request.GET_PROTOCOL_FEATURES, pack_u64(ProtocolFeature.MQ | ProtocolFeature.CONFIG)),
]


@contextmanager
def answered(*answers: bytes) -> Iterator[socket.socket]:
    """Yield a connection to a server that has sent all this already, and sends no more."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.sendall(b"".join(answers))
        theirs.shutdown(socket.SHUT_WR)
        yield ours


def test_a_server_without_protocol_features() -> None:
    """Nothing is negotiated, one queue is assumed, and rings need not be enabled."""
    with answered(reply(Request.GET_FEATURES, pack_u64(VERSION_1))) as connection:
        client = Client(connection)
        assert client.features == VERSION_1
        assert client.queue_count() == 1
        client.enable(0, True)
        with pytest.raises(VhostUserError, match="the server has no configuration space"):
            client.config(60)


@pytest.mark.parametrize(
    ("answers", "message"),
    [
        ([], "GET_FEATURES: the server closed the connection"),
        ([reply(1, b"1234567")], "payload of 7 bytes, not 8"),
        ([reply(2, pack_u64(0))], "GET_FEATURES: the answer is of SET_FEATURES"),
        ([reply(1, pack_u64(0), VERSION)], "GET_FEATURES: the answer is of GET_FEATURES"),
        ([reply(1, pack_u64(0), 2 | FLAG_REPLY)], "protocol version 2, not 1"),
        (GREETING[:1], "GET_PROTOCOL_FEATURES: the server closed the connection"),
    ],
)
def test_bad_greetings(answers: list[bytes], message: str) -> None:
    """An unusable server is refused, by its answers."""
    with answered(*answers) as connection, pytest.raises(VhostUserError, match=message):
        Client(connection)


@pytest.mark.parametrize("count", [0, 257, 2**64 - 1])
def test_impossible_numbers_of_queues(count: int) -> None:
    """Only 1 to 256 queues are accepted."""
    answer = reply(Request.GET_QUEUE_NUM, pack_u64(count))
    with answered(*GREETING, answer) as connection:
        client = Client(connection)
        with pytest.raises(VhostUserError, match=f"GET_QUEUE_NUM: {count} queues"):
            client.queue_count()


@pytest.mark.parametrize("access", [ConfigAccess(1, 0, bytes(60)), ConfigAccess(0, 0, b"short")])
def test_another_piece_of_configuration(access: ConfigAccess) -> None:
    """A piece of configuration that was not requested is refused."""
    with answered(*GREETING, reply(Request.GET_CONFIG, access.pack())) as connection:
        client = Client(connection)
        with pytest.raises(VhostUserError, match="GET_CONFIG: another piece than was asked for"):
            client.config(60)


def test_another_ring_is_stopped() -> None:
    """The answer to GET_VRING_BASE must be about the requested ring."""
    answer = reply(Request.GET_VRING_BASE, VringState(1, 5).pack())
    with answered(*GREETING, answer) as connection:
        client = Client(connection)
        with pytest.raises(VhostUserError, match="GET_VRING_BASE: ring 1, not 0"):
            client.stop(0)


def test_unwanted_descriptors_are_closed() -> None:
    """A server that sends descriptors breaks the protocol, and all of them are closed."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        rights = array.array("i", [os.open("/dev/null", os.O_RDONLY)])
        message = reply(Request.GET_FEATURES, pack_u64(0))
        theirs.sendmsg([message], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)])
        os.close(rights[0])
        with pytest.raises(VhostUserError, match="GET_FEATURES: the answer is of GET_FEATURES"):
            Client(ours)


def test_a_server_that_does_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that does not answer counts as gone after a while."""
    monkeypatch.setattr(client_module, "REPLY_TIMEOUT_S", 0.05)
    ours, theirs = socket.socketpair()
    with ours, theirs, pytest.raises(VhostUserError, match="GET_FEATURES: no answer"):
        Client(ours)


def test_a_shut_down_connection() -> None:
    """A shut-down connection can still be polled, and every request fails."""
    with answered(*GREETING) as connection:
        client = Client(connection)
        client.shut_down()
        client.shut_down()
        with pytest.raises(VhostUserError, match="GET_QUEUE_NUM: "):
            client.queue_count()
        assert client.fileno() == connection.fileno()


PAYLOADS = (
    st.builds(pack_u64, U64)
    | st.builds(pack_u64, st.integers(0, 65))
    | st.binary(max_size=300)
    | st.builds(lambda data: ConfigAccess(0, 0, data).pack(), st.binary(min_size=60, max_size=60))
    | st.builds(lambda base: VringState(0, base).pack(), st.integers(0, 2**32 - 1))
)


@settings(deadline=None)
@given(
    st.lists(st.builds(reply, st.sampled_from(list(Request)), PAYLOADS), max_size=20),
    st.binary(max_size=20),
)
def test_any_answers(answers: list[bytes], rest: bytes) -> None:
    """Any answer of a server yields a result or a VhostUserError."""
    with answered(*GREETING, *answers, rest) as connection, driver() as guest:
        ask(Client(connection), guest)


@settings(deadline=None)
@given(st.binary(min_size=60, max_size=60), U64)
def test_any_device(config: bytes, features: int) -> None:
    """Any device that a server reports is in range, or a VhostUserError."""
    features |= FEATURE_PROTOCOL_FEATURES
    with ExitStack() as stack:
        answers = [
            reply(Request.GET_FEATURES, pack_u64(features)),
            GREETING[1],
            reply(Request.GET_CONFIG, ConfigAccess(0, 0, config).pack()),
        ]
        connection = stack.enter_context(answered(*answers))
        guest = stack.enter_context(driver())
        with suppress(VhostUserError):
            device = VhostUser(Client(connection), guest, "disk0")
            stack.callback(device.close)
            assert 1 <= len(device.queue_sizes) <= 64
            assert not device.features & ~(0x7FFF | 3 << 28 | 1 << 40)


def ask(client: Client, guest: Driver) -> None:
    """Send every request, until the server fails."""
    with suppress(VhostUserError):
        client.queue_count()
        client.config(60)
        client.set_features(VERSION_1)
        client.set_memory([guest.region], [guest.fd])
        guest.set_up(client, 0)
        client.write_config(0, b"x")
        client.stop(0)


def test_acknowledgements_are_asked_for() -> None:
    """With REPLY_ACK every request without a reply of its own asks for one."""
    ours, theirs = socket.socketpair()
    offered = pack_u64(ProtocolFeature.REPLY_ACK)
    answers = [
        GREETING[0],
        reply(Request.GET_PROTOCOL_FEATURES, offered),
        reply(Request.SET_OWNER, pack_u64(0)),
        reply(Request.SET_VRING_NUM, pack_u64(1)),
    ]
    with ours, theirs:
        theirs.sendall(b"".join(answers))
        client = Client(ours)
        with pytest.raises(VhostUserError, match="SET_VRING_NUM: the server refuses it"):
            client.set_size(0, 8)
        said = theirs.recv(4096)
    expected = Header(Request.SET_VRING_NUM, VERSION | FLAG_NEED_REPLY, 8).pack()
    assert said.endswith(expected + VringState(0, 8).pack())
