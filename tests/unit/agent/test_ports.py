"""The agent's `connect`: a TCP port of the guest's loopback address, joined to the connection."""

from __future__ import annotations

import socket
import struct
from collections.abc import Iterator

import pytest

from tests.agents import BOUND_S, HostAgent, wait_until
from vmctl.guest.agent import Agent, AgentRefusedError
from vmctl.guest.frames import WINDOW, Kind, frame

PIECE = 65536


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    """The listener in the guest."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(BOUND_S)
        yield listener


def port_of(listener: socket.socket) -> int:
    """Return its port."""
    port: int = listener.getsockname()[1]
    return port


def accepted(listener: socket.socket) -> socket.socket:
    """Return a connection, which waits for no longer than it may."""
    stream, _ = listener.accept()
    stream.settimeout(BOUND_S)
    return stream


@pytest.mark.parametrize("port", [0, -1, 65536, "22", True, None, 22.0])
def test_what_is_no_port(port: object, agent: Agent) -> None:
    """It is refused as invalid."""
    with pytest.raises(AgentRefusedError) as caught:
        agent.open("connect", None, port=port)
    assert (caught.value.code, str(caught.value)) == ("invalid", "port: invalid")


def test_a_port_where_nobody_listens(agent: Agent, listener: socket.socket) -> None:
    """The reason is an error's name."""
    port = port_of(listener)
    listener.close()
    with pytest.raises(AgentRefusedError) as caught:
        agent.open("connect", None, port=port)
    assert caught.value.code == "ECONNREFUSED"


def test_by_ipv6(agent: Agent) -> None:
    """A program that listens on ::1 alone is found."""
    try:
        listener = socket.create_server(("::1", 0), family=socket.AF_INET6)
    except OSError:
        pytest.skip("this host has no IPv6")
    with listener, agent.open("connect", None, port=port_of(listener)) as session:
        listener.settimeout(BOUND_S)
        with accepted(listener) as stream:
            stream.sendall(b"six")
        assert session.read(10) == b"six"


def test_the_end_of_input_is_passed_on(agent: Agent, listener: socket.socket) -> None:
    """The program reads the end of input, and its later answer arrives."""
    with agent.open("connect", None, port=port_of(listener)) as session:
        with accepted(listener) as stream:
            session.write(b"question")
            session.end_input()
            assert stream.recv(8, socket.MSG_WAITALL) == b"question"
            assert stream.recv(1) == b""
            stream.sendall(b"answer")
        assert session.read(100) == b"answer"
        assert session.finish() == {}


def test_a_slow_client_slows_the_program_down(agent: Agent, listener: socket.socket) -> None:
    """Data that the client does not read stay with the program, except a window and buffers."""
    with (
        agent.open("connect", None, port=port_of(listener)) as session,
        accepted(listener) as stream,
    ):
        stream.setblocking(False)
        sent = 0
        while True:
            try:
                sent += stream.send(bytes(PIECE))
            except BlockingIOError:
                if session.arrived(Kind.OUTPUT) == WINDOW:
                    break
                session.wait({stream.fileno(): 0})
        assert session.arrived(Kind.OUTPUT) == WINDOW
        stream.setblocking(True)
        stream.shutdown(socket.SHUT_WR)
        assert len(session.read(sent + 1)) == sent


def test_a_program_that_reads_nothing_slows_the_client_down(
    agent: Agent, listener: socket.socket
) -> None:
    """The client's room runs out; the connection's end is passed on all the same."""
    with agent.open("connect", None, port=port_of(listener)) as session:
        with accepted(listener) as stream:
            # An end with unread data is a reset.
            stream.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            while session.room:
                session.feed(bytes(min(session.room, PIECE)))
                wait_until(lambda: not session._sending or not session.wait({}))
        session.finish()


def test_input_behind_its_end_ends_the_connection(host: HostAgent, listener: socket.socket) -> None:
    """A client that breaks the protocol loses the program too."""
    with host.connect() as client:
        client.settimeout(BOUND_S)
        text = b'{"do": "connect", "port": %d}' % port_of(listener)
        client.sendall(frame(Kind.REQUEST, text))
        with accepted(listener) as stream:
            client.sendall(frame(Kind.INPUT) + frame(Kind.INPUT, b"more"))
            while stream.recv(PIECE):
                pass
            while client.recv(PIECE):
                pass
