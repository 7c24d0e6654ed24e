"""The control process: limits on clients, so that none disturbs another."""

from __future__ import annotations

import json
import os
import select
import socket
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from vmd.control import process as control
from vmd.control.process import Control
from vmd.parent.client_users import ClientUsers
from vmd.wire.ancillary import FDS_MAX
from vmd.wire.channel import Channel, Received, channel_pair
from vmd.wire.internal import (
    CONTROL_AND_PARENT,
    PARENT_AND_CONTROL,
    ClientAnswer,
    ClientCame,
    ClientGone,
    ClientRequest,
    Considered,
    ControlToParent,
    Happened,
    ParentToControl,
)
from vmd.wire.messages import (
    AnyAnswer,
    ConsoleOpened,
    Done,
    ErrorCode,
    Event,
    EventKind,
    Failed,
    Status,
)
from vmd.wire.parts import tag_of
from vmd.wire.ports import Connected
from vmd.wire.transfers import SnapshotOpened
from vmm_kvm.loop import EventLoop

_PATIENCE_NS = 5_000_000_000


class Rig:
    """A control process's work in an event loop, with a parent that records."""

    def __init__(self, path: str) -> None:
        """Listen at `path`."""
        self.loop = EventLoop()
        self.path = path
        self.listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.listener.bind(path)
        self.listener.listen(64)
        self.peers = ClientUsers(path)
        self.heard: list[ControlToParent] = []
        self.fd_counts: list[int] = []
        self.parent: Channel[ParentToControl, ControlToParent]
        self.parent, self._ours = channel_pair(PARENT_AND_CONTROL, CONTROL_AND_PARENT)
        self.parent.watch(self.loop, self._hear, lambda _: None)
        self._control = Control(self.loop, self._ours, self.listener)

    def _hear(self, received: Received[ControlToParent]) -> None:
        with received.fds as fds:
            if isinstance(received.message, ClientCame):
                self.peers.came(received.message.client, fds)
                return
            self.heard.append(received.message)
            self.fd_counts.append(len(fds))

    def requests(self) -> list[ClientRequest]:
        """Return the requests that the parent has received."""
        return [one for one in self.heard if isinstance(one, ClientRequest)]

    def consider(self, at: int) -> None:
        """Wait for a request by its place, and finish it without an answer."""
        self.run_until(lambda: len(self.requests()) > at)
        self.parent.send(Considered(client=self.requests()[at].client))

    def connect(self) -> socket.socket:
        """Return a client's connection."""
        client = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        client.connect(self.path)
        client.setblocking(False)
        return client

    def run_until(self, is_so: Callable[[], bool]) -> None:
        """Run the loop until a condition holds, at most some seconds."""
        deadline = self.loop.monotonic_ns() + _PATIENCE_NS

        def look() -> None:
            if is_so() or self.loop.monotonic_ns() > deadline:
                self.loop.stop()
            else:
                timer.arm(self.loop.monotonic_ns() + 1_000_000)

        timer = self.loop.timer(look)
        self.loop.call_soon(look)
        self.loop.run()
        assert is_so()

    def packet(self, client: socket.socket) -> bytes:
        """Run until a client has a packet; empty at the end of its connection."""
        found: list[bytes] = []

        def is_there() -> bool:
            if found:
                return True
            try:
                found.append(client.recv(1 << 16))
            except BlockingIOError:
                return False
            except ConnectionResetError:
                found.append(b"")
            return True

        self.run_until(is_there)
        return found[0]

    def close(self) -> None:
        """Close everything."""
        self._control.close()
        self.parent.close()
        self._ours.close()
        self.listener.close()
        self.loop.close()


@pytest.fixture
def rig(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
    """Return a control process's work."""
    made = Rig(str(tmp_path_factory.mktemp("control") / "s"))
    yield made
    made.close()


def _status(serial: int) -> bytes:
    return json.dumps({"type": "status", "serial": serial}).encode()


def test_requests_and_answers_find_their_way(rig: Rig) -> None:
    """A request goes to the parent with its client; its answer, and no other's, comes back."""
    with rig.connect() as one, rig.connect() as two:
        one.send(_status(1))
        two.send(_status(2))
        rig.run_until(lambda: len(rig.heard) == 2)
        for message in rig.heard:
            assert isinstance(message, ClientRequest)
            assert rig.peers.asks(message.client) == os.geteuid()
            assert isinstance(message.request, Status)
            answer = Done(serial=message.request.serial)
            rig.parent.send(ClientAnswer(client=message.client, answer=answer))
        assert json.loads(rig.packet(one))["serial"] == 1
        assert json.loads(rig.packet(two))["serial"] == 2


@pytest.mark.parametrize(
    "packet",
    [b"{", b"\xff\xfe", b"[]", b'{"type":"none"}', b'{"type":"status","id":-1}', b"x" * 200_000],
)
def test_what_is_no_message_ends_its_connection(rig: Rig, packet: bytes) -> None:
    """A malformed message is answered with the reason and the connection closed."""
    with rig.connect() as bad, rig.connect() as good:
        bad.send(packet)
        assert json.loads(rig.packet(bad))["type"] == "failed"
        assert rig.packet(bad) == b""
        good.send(_status(1))
        rig.run_until(lambda: any(isinstance(each, ClientRequest) for each in rig.heard))
        assert len(rig.heard) == 1


def test_another_version_is_refused(rig: Rig) -> None:
    """A client of another version is told so, and may continue with ours."""
    with rig.connect() as client:
        client.send(b'{"type":"status","serial":4,"version":99}')
        answer = json.loads(rig.packet(client))
        assert (answer["code"], answer["serial"]) == ("version", 4)
        client.send(_status(5))
        rig.run_until(lambda: len(rig.heard) == 1)


def test_the_parent_is_given_few_requests_at_a_time(rig: Rig) -> None:
    """Further requests wait, connection by connection; each is passed on once."""
    with ExitStack() as stack:
        clients = [stack.enter_context(rig.connect()) for _ in range(20)]
        for number, client in enumerate(clients):
            for serial in range(5):
                client.send(_status(number * 100 + serial))
        rig.run_until(lambda: len(rig.heard) == 16)
        assert len({one.client for one in rig.requests()}) == 16
        rig.consider(0)
        rig.run_until(lambda: len(rig.heard) == 17)
        for at in range(1, 20 * 5):
            rig.consider(at)
        rig.run_until(lambda: len(rig.heard) == 20 * 5)
        serials = [one.request.serial for one in rig.requests()]
        assert sorted(serials) == sorted(a * 100 + b for a in range(20) for b in range(5))
        assert {serial // 100 for serial in serials[:20]} == set(range(20))


def test_a_client_that_asks_without_end(rig: Rig) -> None:
    """A client with many unanswered requests is not read until some are answered."""
    with rig.connect() as greedy, rig.connect() as modest:
        for serial in range(50):
            greedy.send(_status(serial))
        for at in range(32):
            rig.consider(at)
        modest.send(_status(1000))
        rig.run_until(lambda: len(rig.heard) == 33)
        assert rig.requests()[-1].request.serial == 1000
        rig.parent.send(ClientAnswer(client=rig.requests()[0].client, answer=Done()))
        rig.run_until(lambda: len(rig.heard) == 34)
        assert rig.requests()[-1].request.serial == 32


def test_a_client_that_does_not_read_is_not_read(rig: Rig) -> None:
    """A client is not read while it does not read its answers; then it is answered again."""
    with rig.connect() as client:
        answer = Failed(code=ErrorCode.EIO, message="m" * 60_000)
        client.send(_status(0))
        rig.run_until(lambda: len(rig.heard) == 1)
        number = rig.requests()[0].client
        for _ in range(40):
            rig.parent.send(ClientAnswer(client=number, answer=answer))
        rig.consider(0)
        with rig.connect() as other:
            other.send(_status(2))
            rig.run_until(lambda: len(rig.heard) == 2)
            client.send(_status(1))
            other.send(_status(3))
            rig.run_until(lambda: len(rig.heard) == 3)
            assert rig.requests()[-1].request.serial == 3
        for _ in range(40):
            assert json.loads(rig.packet(client))["type"] == "failed"
        rig.run_until(lambda: len(rig.requests()) == 4)
        assert rig.requests()[-1].request.serial == 1


def test_events_are_told_once_to_each_connection_that_asked(rig: Rig) -> None:
    """A connection gets events once, with its request's serial; the parent does not notice."""
    with rig.connect() as one, rig.connect() as two, rig.connect() as deaf:
        for serial in range(3):
            one.send(json.dumps({"type": "events", "serial": serial}).encode())
        assert json.loads(rig.packet(one)) == {"type": "done", "serial": 0, "id": 0}
        for _ in range(2):
            assert json.loads(rig.packet(one))["code"] == "EALREADY"
        two.send(b'{"type":"events","serial":7}')
        rig.packet(two)
        event = Event(kind=EventKind.STARTED, id=3, name="web", at=1.0)
        rig.parent.send(Happened(event=event))
        for client, serial in ((one, 0), (two, 7)):
            told = json.loads(rig.packet(client))
            assert (told["kind"], told["serial"]) == ("started", serial)
        assert rig.heard == []
        deaf.send(_status(1))
        rig.run_until(lambda: len(rig.heard) == 1)


def test_a_listener_that_does_not_read_is_cut_off(rig: Rig) -> None:
    """A listener that does not read is cut off, because it would miss events; others get all."""
    with rig.connect() as deaf, rig.connect() as listener:
        for client in (deaf, listener):
            client.send(b'{"type":"events"}')
            rig.packet(client)
        event = Event(kind=EventKind.FAILED, id=3, name="web", at=1.0, message="m" * 4000)
        for _ in range(150):
            rig.parent.send(Happened(event=event))
            assert json.loads(rig.packet(listener))["kind"] == "failed"
        ends = select.poll()
        ends.register(deaf, 0)
        rig.run_until(lambda: ends.poll(0) == [(deaf.fileno(), select.POLLHUP)])


def test_what_a_user_may_have_waiting_is_limited(rig: Rig) -> None:
    """Requests beyond a user's limits of descriptors and bytes are refused with the reason."""
    with ExitStack() as stack:
        clients = [stack.enter_context(rig.connect()) for _ in range(40)]
        for client in clients[:16]:
            client.send(_status(1))
        rig.run_until(lambda: len(rig.heard) == 16)  # the others wait
        null = stack.enter_context(Path("/dev/null").open())
        for client in clients[16:19]:
            socket.send_fds(client, [_status(2)], [null.fileno()] * 60)
        refused = json.loads(rig.packet(clients[18]))
        assert refused["code"] == "EAGAIN"
        assert "too many descriptors" in refused["message"]
        large = json.dumps({"type": "load", "path": "p" * 4096, "serial": 3}).encode()
        large = large.replace(b" ", b" " * 20_000)
        for client in clients[19:]:
            client.send(large)
        refused = json.loads(rig.packet(clients[39]))
        assert refused["code"] == "EAGAIN"
        assert "too large together" in refused["message"]


@pytest.mark.parametrize(
    ("ask", "answer"),
    [
        (b'{"type":"console","name":"one"}', ConsoleOpened(id=1, tty="")),
        (b'{"type":"connect","name":"one","port":1}', Connected(id=1)),
        (b'{"type":"debug","name":"one"}', Connected(id=1)),
        (b'{"type":"open-snapshot","snapshot":"one"}', SnapshotOpened()),
    ],
)
def test_descriptors_that_nobody_takes_are_limited(rig: Rig, ask: bytes, answer: AnyAnswer) -> None:
    """The kernel keeps unread descriptors: a user may have some, and more after reading."""
    with rig.connect() as client, rig.connect() as other:
        for at in range(32):
            client.send(ask)
            rig.consider(at)
            theirs, ours = socket.socketpair()
            ours.close()
            opened = ClientAnswer(client=rig.requests()[at].client, answer=answer)
            rig.parent.send(opened, [theirs.detach()])
        other.send(ask)
        assert "streams" in json.loads(rig.packet(other))["message"]
        for _ in range(32):
            assert json.loads(rig.packet(client))["type"] == tag_of(type(answer).__name__)
        other.send(ask)
        rig.run_until(lambda: len(rig.requests()) == 33)


def test_one_user_has_so_many_connections(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """One connection too many is refused; root has some in reserve."""
    monkeypatch.setattr(control, "CLIENTS_MAX", 2)
    monkeypatch.setattr(control, "CLIENTS_OF_ROOT", 0)
    with rig.connect(), rig.connect(), rig.connect() as third:
        answer = json.loads(rig.packet(third))
        assert (answer["code"], answer["message"]) == ("EAGAIN", "you have too many connections")
        assert rig.packet(third) == b""


def test_a_client_that_goes_is_reported_once(rig: Rig) -> None:
    """The parent learns of a client's end once, and a late answer does no harm."""
    client = rig.connect()
    client.send(_status(1))
    rig.run_until(lambda: len(rig.heard) == 1)
    client.close()
    rig.run_until(lambda: len(rig.heard) == 2)
    assert isinstance(rig.heard[0], ClientRequest)
    assert rig.heard[1] == ClientGone(client=rig.heard[0].client)
    rig.parent.send(ClientAnswer(client=rig.heard[0].client, answer=Done()))
    with rig.connect() as other:
        other.send(_status(2))
        rig.run_until(lambda: len(rig.heard) == 3)


def test_descriptors_are_passed_on(rig: Rig) -> None:
    """A client's open file reaches the parent with its request."""
    with rig.connect() as client:
        socket.send_fds(client, [_status(1)], [0, 1, 2])
        rig.run_until(lambda: len(rig.heard) == 1)
        assert rig.fd_counts == [3]


def test_descriptors_that_are_lost(rig: Rig) -> None:
    """A request with too many descriptors is refused with a line; its client may continue."""
    with rig.connect() as client:
        socket.send_fds(client, [_status(7)], [0] * (FDS_MAX + 1))
        answer = json.loads(rig.packet(client))
        assert (answer["type"], answer["serial"], answer["code"]) == ("failed", 7, "EAGAIN")
        client.send(_status(8))
        rig.run_until(lambda: len(rig.heard) == 1)
