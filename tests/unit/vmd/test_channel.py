"""Channels: messages whole and in order, owned descriptors, hostile peers cut off."""

from __future__ import annotations

import array
import errno
import os
import resource
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmd.wire.ancillary import FDS_MAX, peer_credentials
from vmd.wire.channel import (
    HIGH_WATER,
    MESSAGE_MAX,
    Channel,
    ChannelClosedError,
    ChannelError,
    DescriptorsLostError,
    Fds,
    MalformedError,
    OversizeError,
    Received,
    channel_pair,
)
from vmd.wire.messages import (
    CLIENT_TO_DAEMON,
    DAEMON_TO_CLIENT,
    AnyAnswer,
    AnyRequest,
    Done,
    ErrorCode,
    Failed,
    Load,
    Reload,
    Start,
    Status,
)
from vmm_kvm.loop import EventLoop

Client = Channel[AnyRequest, AnyAnswer]
Daemon = Channel[AnyAnswer, AnyRequest]


@pytest.fixture
def pair() -> Iterator[tuple[Client, Daemon]]:
    """A client's channel and the daemon's; every descriptor is closed afterwards."""
    before = _open_fds()
    client, daemon = channel_pair(CLIENT_TO_DAEMON, DAEMON_TO_CLIENT)
    with client, daemon:
        yield client, daemon
    assert _open_fds() == before


@pytest.fixture
def raw() -> Iterator[tuple[socket.socket, Daemon]]:
    """A client that sends any bytes, and the daemon's channel."""
    before = _open_fds()
    left, right = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with left, Channel(right, DAEMON_TO_CLIENT) as daemon:
        yield left, daemon
    assert _open_fds() == before


def _open_fds() -> set[str]:
    with os.scandir("/proc/self/fd") as entries:
        return {entry.name for entry in entries}


def _pipe_end() -> int:
    reader, writer = os.pipe()
    os.close(writer)
    return reader


def test_messages_arrive_whole_and_in_order(pair: tuple[Client, Daemon]) -> None:
    """Each packet is one message; after the last there is none."""
    client, daemon = pair
    client.send(Status(serial=1))
    client.send(Start(serial=2, name="web"))
    assert daemon.receive().message == Status(serial=1)
    assert daemon.receive().message == Start(serial=2, name="web")
    with pytest.raises(BlockingIOError):
        daemon.receive()
    daemon.send(Done(serial=2, id=7))
    assert client.receive().message == Done(serial=2, id=7)


def test_descriptors_come_along(pair: tuple[Client, Daemon]) -> None:
    """The channel owns a sent descriptor; the received one is another for the same file."""
    client, daemon = pair
    reader, writer = os.pipe()
    client.send(Start(name="web", kernel=0), [reader])
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(reader)
    with daemon.receive().fds as fds:
        received = fds.take(0)
        with pytest.raises(MalformedError, match="descriptor 0 of 1 is missing"):
            fds.take(0)
        with pytest.raises(MalformedError, match="descriptor 1 of 1 is missing"):
            fds.take(1)
    assert not os.get_inheritable(received)
    os.write(writer, b"x")
    assert os.read(received, 1) == b"x"
    os.close(received)
    os.close(writer)


def test_descriptors_that_nobody_took_are_closed(pair: tuple[Client, Daemon]) -> None:
    """Descriptors of a message that was received and ignored are closed."""
    client, daemon = pair
    client.send(Reload(), [_pipe_end(), _pipe_end()])
    with daemon.receive().fds as fds:
        assert len(fds) == 2


def test_descriptors_keep_their_places_when_they_are_passed_on() -> None:
    """A message's remaining descriptors can be sent on and taken by the same indices."""
    ends = [_pipe_end() for _ in range(3)]
    first = Fds(ends)
    os.close(first.take(1))
    places = first.places
    with Fds(first.take_all()) as second:
        second.spread(places)
        assert second.places == [0, 2]
        os.close(second.take(2))
        with pytest.raises(MalformedError, match="descriptor 1"):
            second.take(1)
    for end in ends:
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(end)


@pytest.mark.parametrize("places", [(), (0, 1), (-1,), (FDS_MAX,)])
def test_places_that_do_not_fit_are_refused(places: tuple[int, ...]) -> None:
    """There must be as many places as descriptors, and each must be possible in a message."""
    with Fds([_pipe_end()]) as fds, pytest.raises(MalformedError, match="1 descriptors for"):
        fds.spread(places)


def test_descriptors_that_are_not_there_have_no_places() -> None:
    """A lost or taken descriptor cannot be spread, which has the usual error."""
    with Fds(are_lost=True) as lost, pytest.raises(DescriptorsLostError):
        lost.spread((0,))
    with Fds([_pipe_end(), _pipe_end()]) as fds:
        os.close(fds.take(0))
        with pytest.raises(MalformedError, match="1 descriptors for 2 places"):
            fds.spread((0, 1))
        fds.spread((7,))
        assert fds.places == [7]


def test_the_end_is_told(pair: tuple[Client, Daemon]) -> None:
    """A channel whose peer has closed can neither be read nor written."""
    client, daemon = pair
    client.close()
    client.close()
    with pytest.raises(ChannelClosedError):
        daemon.receive()
    with pytest.raises(ChannelClosedError):
        daemon.send(Done(), [_pipe_end()])
    with pytest.raises(ChannelClosedError, match="the channel is closed"):
        client.send(Status())


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"{", "not a message: Input data was truncated"),
        (b"\xff\xfe", "not a message: JSON is malformed: invalid character (byte 0)"),
        (b'{"type":"start","nme":"x"}', "not a message: Object contains unknown field `nme`"),
        (b'{"type":"done"}', "not a message: Invalid value 'done' - at `$.type`"),
        (b'{"type":"log"}', "not a message: Object missing required field `level`"),
        (b'{"type":"log","level":3}', "not a message: Expected `int` <= 2 - at `$.level`"),
        (b"[" * 100_000, "not a message: Expected `object`, got `array`"),
        (b" " * (MESSAGE_MAX + 1), f"a message of more than {MESSAGE_MAX} bytes"),
    ],
)
def test_malformed_messages_are_refused(
    raw: tuple[socket.socket, Daemon], data: bytes, why: str
) -> None:
    """A malformed request ends in MalformedError with one line, and its descriptors are closed."""
    peer, daemon = raw
    peer.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4 * MESSAGE_MAX)
    fd = _pipe_end()
    socket.send_fds(peer, [data], [fd])
    os.close(fd)
    with pytest.raises(MalformedError) as caught:
        daemon.receive()
    assert str(caught.value) == why


def test_a_bomb_of_descriptors_is_lost(raw: tuple[socket.socket, Daemon]) -> None:
    """More descriptors than a message may have are all closed, those received too."""
    peer, daemon = raw
    fd = _pipe_end()
    socket.send_fds(peer, [b'{"type":"status"}'], [fd] * (FDS_MAX + 1))
    os.close(fd)
    _expect_lost(daemon)


def test_descriptors_that_this_process_has_no_room_for_are_lost(
    raw: tuple[socket.socket, Daemon],
) -> None:
    """Without room the message arrives without descriptors, and the channel works on."""
    peer, daemon = raw
    fd = _pipe_end()
    for count in (40, 0):
        socket.send_fds(peer, [b'{"type":"status"}'], [fd] * count)
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    used = {int(path.name) for path in Path("/proc/self/fd").iterdir()}
    free = [number for number in range(len(used) + 20) if number not in used]
    resource.setrlimit(resource.RLIMIT_NOFILE, (free[19] + 1, limits[1]))
    try:
        _expect_lost(daemon)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        os.close(fd)
    received = daemon.receive()
    assert not received.fds.are_lost
    received.fds.check()


def _expect_lost(daemon: Daemon) -> None:
    received = daemon.receive()
    assert (received.message, received.fds.are_lost) == (Status(), True)
    assert received.fds.left == []
    with pytest.raises(DescriptorsLostError, match=f"more than {FDS_MAX} descriptors"):
        received.fds.take(0)


def test_a_packet_of_nothing_is_the_end(raw: tuple[socket.socket, Daemon]) -> None:
    """An empty packet, which looks like the end, is no message either."""
    peer, daemon = raw
    peer.sendmsg([b""], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [peer.fileno()]))])
    with pytest.raises(ChannelClosedError):
        daemon.receive()


@given(data=st.binary(min_size=1, max_size=200) | st.text(min_size=1).map(str.encode))
def test_random_bytes_are_refused(data: bytes) -> None:
    """Any bytes of a client are a request, or refused."""
    left, right = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with left, Channel(right, DAEMON_TO_CLIENT) as daemon:
        left.send(data)
        with pytest.raises(MalformedError):
            daemon.receive()


def test_what_the_peer_has_no_room_for_goes_out_later(pair: tuple[Client, Daemon]) -> None:
    """Messages wait in order, with their descriptors, until the peer has read."""
    client, daemon = pair
    sent = 0
    while client.backlog_size < 3 * 50_000:
        client.send(Load(serial=sent, path="x" * 4000), [_pipe_end()])
        sent += 1
    assert not client.flush()
    received = 0
    while received < sent:
        try:
            message, fds, _size = daemon.receive()
        except BlockingIOError:
            client.flush()
            continue
        with fds:
            assert message == Load(serial=received, path="x" * 4000)
            os.close(fds.take(0))
        received += 1
    assert client.flush()
    assert client.backlog_size == 0


def test_a_full_channel_holds_its_sources_and_loses_nothing(pair: tuple[Client, Daemon]) -> None:
    """A source whose answers the peer does not read is not read until most of them are."""
    client, daemon = pair
    answers: list[AnyAnswer] = []
    asked: list[int] = []
    backlogs: list[int] = []
    message = "m" * 60_000
    with EventLoop() as loop, client, daemon:

        def answer(received: Received[AnyRequest]) -> None:
            received.fds.close()
            asked.append(received.message.serial)
            daemon.send(Failed(serial=received.message.serial, code=ErrorCode.EIO, message=message))
            backlogs.append(daemon.backlog_size)
            if daemon.is_full:
                loop.stop()

        daemon.add_source(daemon)
        daemon.watch(loop, answer, lambda _: loop.stop())
        for serial in range(200):
            client.send(Status(serial=serial))
        loop.run()  # until it is full
        assert len(asked) < 40
        loop.call_soon(loop.stop)
        loop.run()
        assert len(asked) < 40

        def read(received: Received[AnyAnswer]) -> None:
            answers.append(received.message)
            if len(answers) == 200:
                loop.stop()

        client.watch(loop, read, lambda _: loop.stop())
        while len(answers) < 200:
            loop.run()
    assert [one.serial for one in answers] == list(range(200))
    assert max(backlogs) <= HIGH_WATER + MESSAGE_MAX


def test_a_source_is_held_by_each_reason(pair: tuple[Client, Daemon]) -> None:
    """A source is read once its last reason is released; its data are still there."""
    client, daemon = pair
    taken: list[int] = []
    with EventLoop() as loop, daemon:

        def pass_time() -> None:
            loop.timer(loop.stop).arm(loop.monotonic_ns() + 1_000_000)
            loop.run()

        daemon.hold("one")
        daemon.watch(loop, lambda received: taken.append(received.message.serial), lambda _: None)
        daemon.hold(reason := ["two"])
        daemon.release("three")
        client.send(Status(serial=1))
        daemon.release(["two"])
        daemon.release("one")
        pass_time()
        assert taken == []
        daemon.release(reason)
        pass_time()
        assert taken == [1]


def test_the_end_of_a_full_channel_releases_its_sources(
    pair: tuple[Client, Daemon],
) -> None:
    """The peer's end releases all sources that waited for it."""
    client, daemon = pair
    peer, sink = channel_pair(CLIENT_TO_DAEMON, DAEMON_TO_CLIENT)
    taken: list[int] = []
    with EventLoop() as loop, daemon, sink:
        sink.add_source(daemon)
        sink.watch(loop, lambda _: None, lambda _: None)
        while not sink.is_full:
            sink.send(Failed(code=ErrorCode.EIO, message="m" * 60_000), [_pipe_end()])

        def take(received: Received[AnyRequest]) -> None:
            taken.append(received.message.serial)
            loop.stop()

        daemon.watch(loop, take, lambda _: None)
        client.send(Status(serial=7))
        loop.call_soon(peer.close)
        loop.run()
    assert taken == [7]
    assert not sink.is_full


def test_everything_goes_out_before_a_trusted_peer_is_waited_for(
    pair: tuple[Client, Daemon],
) -> None:
    """`send_all` returns once the peer has made room for all, and leaves nothing behind."""
    client, daemon = pair
    count = 0
    while client.backlog_size < 100_000:
        client.send(Load(serial=count, path="x" * 4000))
        count += 1
    received: list[int] = []

    def read() -> None:
        while len(received) < count:
            received.append(daemon.wait().message.serial)

    reader = threading.Thread(target=read)
    reader.start()
    client.send_all(10)
    assert client.backlog_size == 0
    reader.join()
    assert received == list(range(count))


def test_descriptors_under_way_are_waited_for(pair: tuple[Client, Daemon]) -> None:
    """The kernel refuses too many descriptors under way of a user: the channel retries.

    Source: unix(7), "ETOOMANYREFS".
    """
    client, daemon = pair
    tried: list[int] = []

    class Short(socket.socket):
        """A socket of a user who at first has too many descriptors under way."""

        def sendmsg(  # type: ignore[override]
            self, buffers: list[bytes], ancillary: list[tuple[int, int, bytes]], flags: int
        ) -> int:
            tried.append(1)
            if len(tried) < 4:
                raise OSError(errno.ETOOMANYREFS, "Too many references: cannot splice")
            return super().sendmsg(buffers, ancillary, flags)

    with (
        EventLoop() as loop,
        daemon,
        Channel(Short(fileno=os.dup(client.fileno())), CLIENT_TO_DAEMON) as short,
    ):

        def take(received: Received[AnyRequest]) -> None:
            received.fds.close()
            loop.stop()

        daemon.watch(loop, take, lambda _: None)
        short.watch(loop, lambda _: None, lambda _: None)
        short.send(Status(serial=1), [_pipe_end()])
        loop.run()
    assert len(tried) == 4


def test_a_message_of_ours_that_is_too_large_is_refused(pair: tuple[Client, Daemon]) -> None:
    """The largest message is sent; a larger one is an error at its sender."""
    client, daemon = pair
    room = MESSAGE_MAX - len(DAEMON_TO_CLIENT.encode(Failed(code=ErrorCode.EIO, message="")))
    daemon.send(Failed(code=ErrorCode.EIO, message="m" * room))
    message = client.receive().message
    assert isinstance(message, Failed)
    assert len(message.message) == room
    with pytest.raises(OversizeError, match=f"a message of {MESSAGE_MAX + 1} bytes"):
        daemon.send(Failed(code=ErrorCode.EIO, message="m" * (room + 1)))
    with pytest.raises(OversizeError, match="65 descriptors"):
        daemon.send(Done(), [_pipe_end() for _ in range(FDS_MAX + 1)])
    daemon.send(Done(serial=3))
    assert client.receive().message == Done(serial=3)


def test_an_event_loop_receives_and_sends(pair: tuple[Client, Daemon]) -> None:
    """The loop calls back for each message, sends waiting ones, and reports the end once."""
    client, daemon = pair
    answers: list[AnyAnswer] = []
    ends: list[ChannelError] = []
    count = 2000
    with EventLoop() as loop:

        def answer(received: Received[AnyRequest]) -> None:
            message = received.message
            received.fds.close()
            for number in range(count):
                daemon.send(Failed(serial=number, code=ErrorCode.EIO, message="m" * 500))
            assert daemon.backlog_size > 0
            daemon.close_when_sent()
            assert message == Status(serial=5)

        def ended(err: ChannelError) -> None:
            ends.append(err)
            loop.stop()

        daemon.watch(loop, answer, ends.append)
        client.watch(loop, lambda received: answers.append(received.message), ended)
        client.send(Status(serial=5))
        client.send(Status(serial=6))
        loop.run()
    assert [one.serial for one in answers] == list(range(count))
    assert len(ends) == 1
    assert daemon.is_closed
    assert not client.is_closed


def test_a_channel_may_be_closed_by_its_own_callback(pair: tuple[Client, Daemon]) -> None:
    """After a callback that closes the channel nothing more is received."""
    client, daemon = pair
    taken = []
    with EventLoop() as loop:

        def close(received: Received[AnyRequest]) -> None:
            taken.append(received[0].serial)
            daemon.close()
            loop.stop()

        daemon.watch(loop, close, lambda _: None)
        client.send(Status(serial=1))
        client.send(Status(serial=2))
        loop.run()
    assert taken == [1]


def test_a_malformed_message_ends_the_watch_only(raw: tuple[socket.socket, Daemon]) -> None:
    """The reader is removed, but an answer with the reason can still be sent."""
    peer, daemon = raw
    with EventLoop() as loop:

        def ended(err: ChannelError) -> None:
            daemon.send(Failed(code=ErrorCode.EINVAL, message=str(err)))
            daemon.close_when_sent()
            loop.stop()

        daemon.watch(loop, lambda _: None, ended)
        peer.send(b"nonsense")
        loop.run()
    assert b'"code":"EINVAL"' in peer.recv(1000)
    assert peer.recv(1000) == b""


def test_peers_are_known(tmp_path: Path) -> None:
    """The kernel tells the user of a peer."""
    path = str(tmp_path / "socket")
    with (
        socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener,
        socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as client,
    ):
        listener.bind(path)
        listener.listen()
        client.connect(path)
        server, _ = listener.accept()
        with server:
            assert peer_credentials(server) == (os.getpid(), os.getuid(), os.getgid())
