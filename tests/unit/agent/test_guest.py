"""Operations for clones, waits, and malformed requests."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.agents import AGENT, CLONES_AGENT, HostAgent
from vmctl.client import CommandError
from vmctl.guest.agent import Agent, AgentError, AgentRefusedError
from vmctl.guest.frames import Kind, frame
from vmm_agent import agent as guest_side

MACHINE = "0123456789abcdef" * 2


@pytest.fixture
def separate(tmp_path: Path) -> Iterator[HostAgent]:
    """An agent with an /etc and a host name of its own."""
    etc = tmp_path / "etc"
    etc.mkdir()
    for name in ("passwd", "group"):
        shutil.copy(f"/etc/{name}", etc)
    # D-Bus may have a copy of the machine-id, which is this host's.
    script = f'set -e; mount --bind {etc} /etc; mount -t tmpfs none /var/lib; exec "$@"'
    through = ["unshare", "--mount", "--uts", "sh", "-c", script, "sh"]
    with HostAgent(tmp_path / "agent", through=through) as host:
        yield host


@pytest.mark.root
def test_identity(separate: HostAgent, tmp_path: Path) -> None:
    """A clone gets a machine-id and a host name, which last over its next boot."""
    agent = separate.agent
    agent.set_identity(machine_id=MACHINE, host_name="clone-7")
    assert (tmp_path / "etc/machine-id").read_text() == f"{MACHINE}\n"
    assert (tmp_path / "etc/machine-id").stat().st_mode & 0o777 == 0o444
    assert (tmp_path / "etc/hostname").read_text() == "clone-7\n"
    assert agent.run(["hostname"], timeout=60).output == b"clone-7\n"
    agent.set_identity(host_name="other")
    assert (tmp_path / "etc/machine-id").read_text() == f"{MACHINE}\n"
    assert sorted(path.name for path in (tmp_path / "etc").iterdir()) == [
        *("group", "hostname", "machine-id", "passwd")
    ]


@pytest.mark.parametrize(
    "given",
    [
        {"machine_id": MACHINE.upper()},
        {"machine_id": "12"},
        {"machine_id": 7},
        {"host_name": "a b"},
        {"host_name": "x" * 65},
        {"host_name": "a\nb"},
    ],
)
def test_what_is_no_identity(agent: Agent, given: dict[str, object]) -> None:
    """If a part is malformed nothing is changed."""
    with pytest.raises(AgentRefusedError, match="invalid"):
        agent._do("identity", **given)


@pytest.mark.root
def test_entropy(agent: Agent) -> None:
    """The kernel takes the host's random bytes; the device counts them as entropy."""
    agent.add_entropy()
    agent.add_entropy(bytes(512))


@pytest.mark.parametrize("data", ["", "0", "xy", "00" * 513, 7])
def test_what_is_no_entropy(agent: Agent, data: object) -> None:
    """Data of a wrong size or form are refused."""
    with pytest.raises(AgentRefusedError, match="data: invalid"):
        agent._do("entropy", data=data)


@pytest.mark.root
def test_a_clock_that_cannot_be_set(tmp_path: Path) -> None:
    """An agent that may not set the clock says so: the clone must not run on."""
    through = ["setpriv", "--bounding-set", "-sys_time"]
    with (
        HostAgent(tmp_path / "agent", through=through) as host,
        pytest.raises(AgentRefusedError, match="clock: Operation not permitted") as caught,
    ):
        host.agent.set_clock()
    assert caught.value.code == "EPERM"


def test_waiting_for_a_file(agent: Agent, tmp_path: Path) -> None:
    """The answer comes when the file exists, and not before."""
    waited = threading.Event()

    def wait() -> None:
        agent.wait_for(file=str(tmp_path / "file"), timeout=60)
        waited.set()

    thread = threading.Thread(target=wait)
    thread.start()
    assert not waited.wait(0.5)
    (tmp_path / "file").touch()
    thread.join(60)
    assert waited.is_set()


def test_waiting_for_a_port(agent: Agent) -> None:
    """A wait for a port ends when a program listens on it, on one address or the other."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        agent.wait_for(port=listener.getsockname()[1], timeout=60)


def test_waiting_in_vain(agent: Agent, tmp_path: Path) -> None:
    """A wait ends at its time-out, in the guest too."""
    with pytest.raises(TimeoutError, match=r"file .*/none: timed out"):
        agent.wait_for(file=str(tmp_path / "none"), timeout=0.3)


@pytest.mark.parametrize(
    ("kind", "what"), [("port", "0"), ("port", "x"), ("port", "65536"), ("file", ""), ("", "x")]
)
def test_what_cannot_be_waited_for(agent: Agent, kind: str, what: str) -> None:
    """A malformed wait is refused at once."""
    with pytest.raises(AgentRefusedError, match="invalid"):
        agent._do("wait", **{"for": kind, "what": what, "timeout_ms": 60000})


def test_an_unknown_request(agent: Agent) -> None:
    """An agent refuses an unknown operation by name, in one line without control characters."""
    with pytest.raises(AgentRefusedError) as caught:
        agent._do("\x1b[2J")
    assert str(caught.value) == "this agent cannot do '\\x1b[2J'"


@pytest.mark.parametrize(
    "data",
    [
        frame(Kind.REQUEST, b"["),
        frame(Kind.REQUEST, b"[" * 100000),
        frame(Kind.REQUEST, b"7"),
        frame(Kind.REQUEST, b"\xff"),
        frame(Kind.INPUT, b"x"),
        b"\xff" * 100,
        os.urandom(1 << 16),
    ],
)
def test_a_hostile_client(host: HostAgent, data: bytes) -> None:
    """A connection that does not start with a request is closed, without an answer."""
    with host.connect() as stream:
        stream.settimeout(60)
        stream.sendall(data)
        received = b""
        try:
            while more := stream.recv(4096):
                received += more
        except ConnectionResetError:
            pass
    assert received.endswith(b'"version": "%s"}' % guest_side.VERSION.encode())
    assert host.agent.ping(timeout=60).protocol == 1


def test_an_agent_that_does_not_speak(monkeypatch: pytest.MonkeyPatch) -> None:
    """The client gives up a listener that sends nothing."""
    monkeypatch.setattr("vmctl.guest.agent.ANSWER_S", 0.2)
    near, far = socket.socketpair()
    with far, pytest.raises(AgentError, match=r"^the guest's agent does not answer$"):
        Agent(lambda: near).ping()


def test_a_request_that_is_too_long(agent: Agent) -> None:
    """The client refuses a command line that is longer than a frame."""
    with pytest.raises(CommandError, match="too long"):
        agent.run(["true", "x" * (256 << 10)], timeout=60)


def test_a_connected_descriptor() -> None:
    """With --fd and a connected stream an agent serves that stream, and ends."""
    near, far = socket.socketpair()
    with far:
        process = subprocess.Popen(
            [sys.executable, "-I", AGENT, "--fd", str(far.fileno())], pass_fds=(far.fileno(),)
        )
    began = time.monotonic()
    assert Agent(lambda: near).run(["echo", "one"], timeout=60).output == b"one\n"
    assert process.wait(60) == 0
    assert time.monotonic() - began < 60


@pytest.mark.parametrize("what", ["", "entropy", "clock", "identity"])
def test_all_that_a_clone_needs(what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One request does all of it, or is refused."""
    monkeypatch.setenv("TOLD", str(tmp_path / "told"))
    monkeypatch.setenv("REFUSES", str(tmp_path / "refuses"))
    (tmp_path / "refuses").write_text(what)
    before = time.time_ns()
    with HostAgent(tmp_path / "agent", program=CLONES_AGENT) as host:
        deadline = time.monotonic() + 60
        if what:
            with pytest.raises(AgentRefusedError, match=f"{what}: Operation not permitted"):
                host.agent.renew(machine_id=MACHINE, host_name="clone", deadline=deadline)
            return
        host.agent.renew(machine_id=MACHINE, host_name="clone", deadline=deadline)
        with pytest.raises(TimeoutError):
            host.agent.renew(machine_id=MACHINE, host_name="clone", deadline=time.monotonic())
    told = [json.loads(line) for line in (tmp_path / "told").read_text().splitlines()][:3]
    assert [one["do"] for one in told] == ["entropy", "clock", "identity"]
    assert len(bytes.fromhex(told[0]["data"])) == 64
    assert before <= told[1]["ns"] <= time.time_ns()
    assert (told[2]["machine_id"], told[2]["host_name"]) == (MACHINE, "clone")
