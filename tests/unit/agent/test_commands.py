"""Commands through an agent: their ends, their input and their output."""

from __future__ import annotations

import os
import select
import signal
import time
from pathlib import Path

import pytest

from tests.agents import HostAgent, is_running, left_in_group, parent_of, wait_until
from vmctl.guest.agent import Agent, AgentError, AgentRefusedError, Session
from vmctl.guest.frames import Kind
from vmm_agent import agent as guest_side

MIB = 1 << 20


def test_hello(agent: Agent) -> None:
    """An agent reports its protocol, and its version."""
    assert agent.ping(timeout=60) == (1, guest_side.VERSION)


def test_every_exit_status(agent: Agent) -> None:
    """The exit status of a command is that of the run, from 0 to 255."""
    for status in range(256):
        assert agent.run(["sh", "-c", f"exit {status}"], timeout=60) == (status, b"", b"")


@pytest.mark.parametrize("number", [1, 2, 6, 9, 11, 13, 15, 34, 64])
def test_signals(agent: Agent, number: int) -> None:
    """A command that a signal ends has 128 plus the signal's number as its status."""
    done = agent.run(["sh", "-c", f"kill -{number} $$"], timeout=60)
    assert done.status == 128 + number


def test_streams_stay_apart(agent: Agent) -> None:
    """Standard output and error are separate; the status comes after the last byte of both."""
    script = "head -c 300000 /dev/zero; echo bad >&2; exit 3"
    for _ in range(5):
        assert agent.run(["sh", "-c", script], timeout=60) == (3, bytes(300000), b"bad\n")


def test_input_that_nobody_reads(agent: Agent) -> None:
    """A command that closes its input, or ends before it, blocks nothing."""
    assert agent.run(["true"], stdin=bytes(MIB), timeout=60).status == 0
    script = "exec <&-; sleep 0.3; echo end"
    assert agent.run(["sh", "-c", script], stdin=bytes(MIB), timeout=60).output == b"end\n"


def test_without_input(agent: Agent) -> None:
    """Without input a command reads /dev/null."""
    assert agent.run(["cat"], timeout=60) == (0, b"", b"")


def test_a_background_process_is_not_waited_for(agent: Agent) -> None:
    """A background process delays neither the command's end nor its output."""
    began = time.monotonic()
    done = agent.run(["sh", "-c", "sleep 1000 & echo $!"], timeout=60)
    assert done.status == 0
    assert time.monotonic() - began < 60
    pid = int(done.output)
    assert is_running(pid)
    os.kill(pid, signal.SIGKILL)


def test_user_directory_and_environment(agent: Agent, tmp_path: Path) -> None:
    """A command runs in its directory, with the client's variables and those of its user."""
    script = 'pwd; echo "$A"; echo "$HOME"; echo "$PATH"'
    done = agent.run(
        ["sh", "-c", script], directory=str(tmp_path), environment={"A": "b=\udcff"}, timeout=60
    )
    first, second, *_, path = done.output.splitlines()
    assert (first, second) == (os.fsencode(tmp_path), b"b=\xff")
    assert path.startswith(b"/usr/local/sbin:")


def test_the_path_of_a_command(agent: Agent, tmp_path: Path) -> None:
    """A program is looked for where the client says, and is what the command's PATH finds first."""
    for number in range(2):
        (tmp_path / str(number)).mkdir()
        program = tmp_path / str(number) / "tool"
        program.write_text(f"#!/bin/sh\necho {number}\n")
        program.chmod(0o755)
    for first, second in ((0, 1), (1, 0)):
        path = {"PATH": f"{tmp_path / str(first)}:{tmp_path / str(second)}"}
        assert agent.run(["tool"], environment=path, timeout=60).output == f"{first}\n".encode()
    with pytest.raises(AgentRefusedError) as caught:
        agent.run(["tool"], timeout=60)
    assert caught.value.code == "exec:ENOENT"


@pytest.mark.root
def test_another_user(agent: Agent) -> None:
    """A command runs as a user of the guest, in all of that user's groups and in none of root's."""
    done = agent.run(["sh", "-c", "id -un; id -G; echo $USER"], user="nobody", timeout=60)
    name, groups, told = done.output.split(b"\n")[:3]
    assert (name, told) == (b"nobody", b"nobody")
    assert b"0" not in groups.split()


@pytest.mark.parametrize(
    ("given", "code"),
    [
        ({"arguments": ["/nonexistent"]}, "exec:ENOENT"),
        ({"arguments": ["/etc/passwd"]}, "exec:EACCES"),
        ({"arguments": ["true"], "directory": "/nonexistent"}, "directory:ENOENT"),
        ({"arguments": ["true"], "user": "no such user"}, "user"),
        ({"arguments": []}, "invalid"),
        ({"arguments": ["a\0b"]}, "invalid"),
        ({"arguments": [1]}, "invalid"),
        ({"arguments": ["true"], "environment": ["novalue"]}, "invalid"),
        ({"arguments": ["true"], "terminal": True, "rows": -1, "columns": 1}, "invalid"),
        ({"arguments": ["\ud800"]}, "invalid"),
    ],
)
def test_what_cannot_be_started(agent: Agent, given: dict[str, object], code: str) -> None:
    """A command that cannot be started is refused by a code."""
    with pytest.raises(AgentRefusedError) as caught:
        agent.open("exec", time.monotonic() + 60, **given)
    assert caught.value.code == code


def test_too_many_at_a_time(agent: Agent) -> None:
    """An agent refuses more commands than its bound, and takes more after others have ended."""
    sessions = []
    try:
        for _ in range(guest_side.SESSIONS_MAX):
            session = agent.execute(["cat"], reads=True, deadline=time.monotonic() + 60)
            sessions.append(session)
        with pytest.raises(AgentRefusedError, match=r"too many operations at a time"):
            agent.ping(timeout=60)
        sessions.pop().__exit__()

        def is_taken() -> bool:
            try:
                agent.ping(timeout=60)
            except AgentRefusedError:
                return False
            return True

        wait_until(is_taken)
    finally:
        for session in sessions:
            session.__exit__()


def test_a_terminal_with_resize(agent: Agent) -> None:
    """A terminal has the requested size, and the command learns of a new one."""
    script = "stty size; read x; stty size; tty >/dev/null && exit 7"
    with agent.execute(
        ["sh", "-c", script], terminal=(24, 80), reads=True, deadline=time.monotonic() + 60
    ) as session:
        shown = session.take(Kind.OUTPUT)  # some may have come with the agent's first frame
        while b"24 80\r\n" not in shown:
            session.wait()
            shown += session.take(Kind.OUTPUT)
        session.resize(50, 132)
        session.feed(b"\n")
        while session.result is None:
            session.wait()
            shown += session.take(Kind.OUTPUT)
    assert shown == b"24 80\r\n\r\n50 132\r\n"
    assert session.result == {"status": 7}


def test_end_of_input_on_a_terminal(agent: Agent) -> None:
    """The end of input becomes the terminal's own character for it."""
    with agent.execute(
        ["cat"], terminal=(24, 80), reads=True, deadline=time.monotonic() + 60
    ) as session:
        session.feed(b"x\n")
        session.end_input()
        assert session.finish() == {"status": 0}


def test_a_terminal_that_is_read_late(agent: Agent) -> None:
    """Output that a command has written to a terminal before its end waits for the reader."""
    last = 40500
    with agent.execute(["seq", str(last)], terminal=(24, 80), deadline=_soon(60)) as session:
        session._deadline = _soon(guest_side.DRAIN_S + 2)
        with pytest.raises(TimeoutError):
            _wait_for_ever(session)
        session._deadline = _soon(60)
        shown = b""
        while data := session.read(1 << 20):
            shown += data
        assert session.result == {"status": 0}
    assert shown == b"".join(b"%d\r\n" % number for number in range(1, last + 1))


def test_a_client_that_is_stopped(agent: Agent) -> None:
    """Later output, and the status, wait for a client that does not read."""
    with agent.execute(["seq", "40500"], deadline=_soon(60)) as session:
        pid = session.started["pid"]
        assert isinstance(pid, int)
        wait_until(lambda: not is_running(pid))
        select.select((), (), (), guest_side.CLOSE_S + 1)
        output = session.read(1 << 20)
        assert session.result == {"status": 0}
    assert output == b"".join(b"%d\n" % number for number in range(1, 40501))


def _soon(seconds: float) -> float:
    return time.monotonic() + seconds


def test_a_signal_for_the_group(agent: Agent) -> None:
    """A signal reaches all of a command's process group."""
    with agent.execute(["sh", "-c", "sleep 1000; :"], deadline=time.monotonic() + 60) as session:
        session.signal(signal.SIGTERM)
        assert session.finish() == {"status": 128 + 15}


def test_a_time_out_ends_the_group(agent: Agent) -> None:
    """After its time-out a run is given up, and its process group ends."""
    with pytest.raises(TimeoutError):
        agent.run(["sleep", "1234.5"], timeout=1)
    wait_until(lambda: not _with_argument("1234.5"))


def _with_argument(word: str) -> list[str]:
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if word.encode() in path.read_bytes().split(b"\0"):
                found.append(str(path))
        except (FileNotFoundError, ProcessLookupError):
            continue
    return found


@pytest.mark.parametrize("trap", ["", "trap '' HUP;"])
def test_a_client_that_goes_away(agent: Agent, trap: str) -> None:
    """The process group of a command ends with its connection, even one that ignores SIGHUP."""
    session = agent.execute(
        ["sh", "-c", f"{trap} sleep 1000 & sleep 1000; :"], deadline=time.monotonic() + 60
    )
    pid = session.started["pid"]
    assert isinstance(pid, int)
    wait_until(lambda: len(list(left_in_group(pid))) >= 3)
    session.__exit__()
    wait_until(lambda: not list(left_in_group(pid)))


def test_a_session_of_the_agent_is_killed(agent: Agent) -> None:
    """If a session is killed, its client sees the end and its command is killed; others run on."""
    with agent.execute(["sleep", "1000"], deadline=time.monotonic() + 60) as session:
        pid = session.started["pid"]
        assert isinstance(pid, int)
        os.kill(parent_of(pid), signal.SIGKILL)
        with pytest.raises(AgentError, match=r"^the connection to the guest's agent has ended$"):
            session.finish()
    wait_until(lambda: not is_running(pid))
    assert agent.ping(timeout=60).protocol == 1


def test_the_agent_is_killed(tmp_path: Path) -> None:
    """If the agent is killed, running commands end by themselves; new ones are refused at once."""
    with HostAgent(tmp_path / "agent") as host:
        with host.agent.execute(["cat"], reads=True, deadline=time.monotonic() + 60) as session:
            host.process.kill()
            host.process.wait(60)
            session.feed(b"x")
            session.end_input()
            assert session.finish() == {"status": 0}
        with pytest.raises(ConnectionRefusedError):
            host.agent.ping(timeout=60)


def test_the_agent_is_terminated(tmp_path: Path) -> None:
    """SIGTERM ends the agent, and the commands with it."""
    with HostAgent(tmp_path / "agent") as host:
        with host.agent.execute(["sleep", "1000"], deadline=time.monotonic() + 60) as session:
            pid = session.started["pid"]
            assert isinstance(pid, int)
            host.process.terminate()
            with pytest.raises(AgentError, match="has ended"):
                session.finish()
        wait_until(lambda: not is_running(pid))


def test_memory_is_bounded(agent: Agent) -> None:
    """A command that writes without end to a client that does not read costs no memory."""
    with agent.execute(["yes"], deadline=time.monotonic() + 60) as session:
        pid = session.started["pid"]
        assert isinstance(pid, int)
        handler = parent_of(pid)
        before = _memory(handler)
        while session.arrived(Kind.OUTPUT) < guest_side.WINDOW:
            session.wait()
        session._deadline = time.monotonic() + 1
        with pytest.raises(TimeoutError):
            _wait_for_ever(session)
        assert session.arrived(Kind.OUTPUT) == guest_side.WINDOW
        assert _memory(handler) < before + 4 * MIB


def _wait_for_ever(session: Session) -> None:
    while True:
        session.wait()


def _memory(pid: int) -> int:
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGESIZE")
