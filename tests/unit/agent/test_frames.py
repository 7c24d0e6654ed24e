"""The two ends of the protocol, which share no code, compared with each other."""

from __future__ import annotations

import ast
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.agents import AGENT, wait_until
from vmctl.guest import frames as ours
from vmctl.guest.frames import FrameReader, Kind, ProtocolError, frame
from vmm_agent import agent as theirs

FROM_CLIENT = (Kind.REQUEST, Kind.WINDOW_SIZE, Kind.SIGNAL, Kind.INPUT)
FROM_AGENT = (Kind.HELLO, Kind.STARTED, Kind.DONE, Kind.FAILED, Kind.EXIT, Kind.OUTPUT, Kind.ERRORS)


def test_both_have_the_same_numbers() -> None:
    """Kinds, sizes and the version are the same in both files."""
    assert {kind.name: kind.value for kind in Kind} == {
        kind.name: getattr(theirs, kind.name) for kind in Kind
    }
    for name in ("PROTOCOL", "PORT", "FRAME_MAX", "PIECE", "WINDOW"):
        assert getattr(ours, name) == getattr(theirs, name)


@given(st.lists(st.tuples(st.sampled_from(FROM_AGENT), st.binary(max_size=2000)), max_size=8))
@settings(max_examples=100)
def test_what_the_agent_sends_is_read(frames: list[tuple[Kind, bytes]]) -> None:
    """The client reads each frame of the agent as it was sent, however the stream is cut."""
    near, far = socket.socketpair()
    with near, far:
        wire = theirs.Wire(far)
        for kind, payload in frames:
            wire.send(kind, payload)
        far.shutdown(socket.SHUT_WR)
        reader, found = FrameReader(), []
        while data := near.recv(77):
            reader.feed(data)
            while one := reader.next():
                found.append(one)
    assert found == frames


@given(st.lists(st.tuples(st.sampled_from(FROM_CLIENT), st.binary(max_size=2000)), max_size=8))
@settings(max_examples=100)
def test_what_the_client_sends_is_read(frames: list[tuple[Kind, bytes]]) -> None:
    """The agent reads each frame of the client as it was sent, however the stream is cut."""
    near, far = socket.socketpair()
    with near, far:
        wire = theirs.Wire(far)
        data, found = b"".join(frame(kind, payload) for kind, payload in frames), []
        for at in range(0, len(data), 77):
            near.send(data[at : at + 77])
            found += list(wire.frames())
    assert found == frames


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        (b"\x00\0\0\0\0", "unknown frame 0"),
        (b"\x10\0\0\0\0", "unknown frame 16"),
        (b"\x21\0\x04\0\x01", "frame of 262145 bytes"),
        (b"\x21\xff\xff\xff\xff", "frame of 4294967295 bytes"),
    ],
)
def test_frames_that_are_refused(data: bytes, problem: str) -> None:
    """The client refuses a frame that no agent sends by its header, before it reads more."""
    reader = FrameReader()
    reader.feed(data)
    with pytest.raises(ProtocolError, match=f"^{problem}$"):
        reader.next()


@pytest.mark.parametrize(
    "data",
    [
        b"\x20\0\x04\0\x01",
        b"\x23\0\0\0\x05\x21\0\0\0\x01",
        b"\x23\0\0\0\x05\x20\0\0\0\x01",
        b"\x23\0\0\0\x01\x21",
        (b"\x20\0\x02\0\x00" + bytes(128 << 10)) * 3,
    ],
)
def test_a_client_that_breaks_the_rules(data: bytes) -> None:
    """The agent ends the connection at too large a frame, and at false or lacking credit."""
    near, far = socket.socketpair()
    with near, far:
        wire = theirs.Wire(far)
        near.setblocking(False)
        with pytest.raises(theirs.GoneError):
            _pass_on(near, data, wire)


def _pass_on(near: socket.socket, data: bytes, wire: theirs.Wire) -> None:
    while True:
        data = data[near.send(data) :] if data else data
        for _ in wire.frames():
            pass


def test_the_agent_is_python_3_9() -> None:
    """The agent is one file, of Python 3.9's syntax, and imports only its standard library."""
    tree = ast.parse(AGENT.read_text(), feature_version=(3, 9))
    found = {
        name
        for node in ast.walk(tree)
        for name in (
            [alias.name for alias in node.names]
            if isinstance(node, ast.Import)
            else [str(node.module)]
            if isinstance(node, ast.ImportFrom)
            else []
        )
    }
    assert {name.partition(".")[0] for name in found} - {*sys.stdlib_module_names} == set()


@pytest.mark.parametrize(
    ("words", "status", "told"),
    [
        (["--help"], 2, "usage: vmm-agent "),
        (["--port", "x"], 2, "usage: vmm-agent "),
        (["--fd", "99"], 1, "vmm-agent: --fd 99: Bad file descriptor\n"),
        (["--unix", "/nonexistent/socket"], 1, "vmm-agent: --unix /nonexistent/socket: No such"),
    ],
)
def test_misuse(words: list[str], status: int, told: str) -> None:
    """A wrong command line, or one with a missing file, is reported in one line."""
    done = subprocess.run(
        [sys.executable, AGENT, *words], capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == status
    assert done.stderr.startswith(told)
    assert len(done.stderr.splitlines()) == 1


def test_a_unix_socket_is_its_owners(tmp_path: Path) -> None:
    """With --unix only the agent's user can connect."""
    path = tmp_path / "agent"
    with subprocess.Popen([sys.executable, AGENT, "--unix", path]) as process:
        try:
            wait_until(path.exists)
            assert path.stat().st_mode & 0o777 == 0o600
        finally:
            process.terminate()
