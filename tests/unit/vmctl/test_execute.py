"""`vmctl exec` with an agent on this host: streams, statuses, terminals, and every kind of end."""

from __future__ import annotations

import fcntl
import os
import pty
import select
import signal
import socket
import struct
import subprocess
import termios
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Self

import pytest

from tests.agents import BOUND_S, HostAgent, Vsock, is_running, left_in_group, spliced, wait_until
from tests.unit.vmctl.conftest import Serve
from tests.unit.vmctl.fake_daemon import Answers
from tests.vmctl_driver import VMCTL
from vmctl.guest.frames import Kind, frame
from vmd.wire.messages import AnyRequest, ErrorCode, Failed
from vmd.wire.ports import Connect, Connected

MIB = 1 << 20


@pytest.fixture
def vsock(tmp_path: Path) -> Iterator[Path]:
    """The vsock socket of a VM, with this host in place of the guest."""
    with Vsock(tmp_path / "vsock"):
        yield tmp_path / "vsock"


def _exec(
    vsock: Path, *words: str, options: Sequence[str] = (), stdin: bytes | None = None
) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        [VMCTL, "exec", *options, vsock, "--", *words],
        input=stdin,
        stdin=subprocess.DEVNULL if stdin is None else None,
        capture_output=True,
        check=False,
        timeout=BOUND_S,
    )


def test_streams_and_status(vsock: Path) -> None:
    """Output, errors and status are the command's."""
    done = _exec(vsock, "sh", "-c", "echo one; echo two >&2; exit 42")
    assert (done.returncode, done.stdout, done.stderr) == (42, b"one\n", b"two\n")


def test_input(vsock: Path) -> None:
    """Standard input is passed on to its end, with -i only."""
    data = os.urandom(3 * MIB + 1)
    assert _exec(vsock, "cat", options=["-i"], stdin=data).stdout == data
    assert _exec(vsock, "cat", stdin=b"lost").stdout == b""


def test_user_directory_and_environment(vsock: Path, tmp_path: Path) -> None:
    """The command gets -C, -e and -u; a variable without a value has vmctl's."""
    options = [
        "-C",
        str(tmp_path),
        "-e",
        "A=b=c",
        "-e",
        "PATH",
        "-e",
        "NONE",
        "-u",
        str(os.getuid()),
    ]
    done = _exec(vsock, "sh", "-c", "pwd; echo $A; echo $PATH; echo ${NONE-unset}", options=options)
    assert done.stdout.decode().splitlines() == [
        *(str(tmp_path), "b=c", os.environ["PATH"], "unset")
    ]


@pytest.mark.parametrize(
    ("words", "options", "status", "told"),
    [
        (["kill -9 $$"], (), 137, ""),
        (["exit 255"], (), 255, ""),
        (["sleep 1000"], ("--timeout", "1"), 124, "vmctl: timed out\n"),
        (["true"], ("-u", "no-one"), 125, "vmctl: no-one: no such user\n"),
        (["true"], ("-C", "/none"), 125, "vmctl: /none: No such file or directory\n"),
        (
            ["true"],
            ("--timeout", "x"),
            255,
            "vmctl: invalid time-out: x: not a number of seconds\n",
        ),
        (["true"], ("-e", "=x"), 255, "vmctl: invalid variable: =x\n"),
    ],
)
def test_statuses(
    vsock: Path, words: list[str], options: Sequence[str], status: int, told: str
) -> None:
    """Each way in which a command ends, or does not start, has its status."""
    done = _exec(vsock, "sh", "-c", *words, options=options)
    assert (done.returncode, done.stderr.decode()) == (status, told)


@pytest.mark.parametrize(
    ("command", "status", "why"),
    [
        ("/none", 127, "No such file or directory"),
        ("none-\x1b[2J", 127, "No such file or directory"),
        ("/etc/passwd", 126, "Permission denied"),
        ("/etc/passwd/x", 127, "Not a directory"),
    ],
)
def test_commands_that_cannot_run(vsock: Path, command: str, status: int, why: str) -> None:
    """The status is that of a shell, and the line has no control characters."""
    done = _exec(vsock, command)
    shown = command.replace("\x1b", "\\x1b")
    assert (done.returncode, done.stderr.decode()) == (status, f"vmctl: {shown}: {why}\n")


def test_nobody_listens(tmp_path: Path) -> None:
    """Without a socket, without a listener, and without a VM the status is 255."""
    done = _exec(tmp_path / "none", "true")
    assert done.returncode == 255
    assert done.stderr.decode() == f"vmctl: connect: {tmp_path}/none: No such file or directory\n"


@pytest.mark.parametrize(
    ("answer", "told"),
    [
        (b"", "the guest has no agent: nobody listens on its vsock port"),
        (b"x" * 1000, "the guest has no agent: nobody listens on its vsock port"),
        (b"OK 1\n", "the connection to the guest's agent has ended"),
        (
            b"OK 1\n\xff\0\0\0\0",
            "the guest's agent does not keep to the protocol: unknown frame 255",
        ),
        (
            b"OK 1\n" + frame(Kind.HELLO, b'{"protocol": 2, "version": "9"}'),
            "the guest's agent speaks another version of the protocol",
        ),
        (
            b"OK 1\n"
            + frame(Kind.HELLO, b'{"protocol": 1, "version": "9"}')
            + frame(Kind.FAILED, b'{"code": "x", "message": "\\u001b]0;bad\\u0007\\nmore"}'),
            "\\x1b]0;bad\\x07\\x0amore",
        ),
    ],
)
def test_hostile_answers(tmp_path: Path, answer: bytes, told: str) -> None:
    """Any answer yields one line and status 255, or 125 if an agent refuses."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(str(tmp_path / "vsock"))
        listener.listen()

        def serve() -> None:
            stream, _ = listener.accept()
            with stream:
                stream.recv(100)
                stream.sendall(answer)

        thread = threading.Thread(target=serve)
        thread.start()
        done = _exec(tmp_path / "vsock", "true")
        thread.join()
    assert (done.returncode, done.stderr.decode()) == (
        125 if "more" in told else 255,
        f"vmctl: {told}\n",
    )


@pytest.mark.parametrize(
    ("answer", "told"),
    [
        (Failed(code=ErrorCode.ENOENT), "vm not found"),
        (Failed(code=ErrorCode.EINVAL), "the vm has no vsock device"),
        (Failed(code=ErrorCode.NOT_RUNNING), "vm is not running"),
        (Failed(code=ErrorCode.EPERM), "Operation not permitted"),
    ],
)
def test_what_the_daemon_refuses(serve: Serve, answer: Failed, told: str) -> None:
    """A VM that cannot be reached is status 255, with the reason in a line."""
    daemon = serve(lambda _request: [answer])
    done = _exec(Path("web"), "true")
    assert (done.returncode, done.stderr.decode()) == (255, f"vmctl: {told}\n")
    assert daemon.requests == [Connect(name="web", port=1024)]


def test_by_the_daemon(serve: Serve, tmp_path: Path) -> None:
    """A name or an id is a VM of the daemon, which answers with the stream."""
    with HostAgent(tmp_path / "agent") as host:

        def answer(_request: AnyRequest) -> Answers:
            theirs, ours = socket.socketpair()
            threads.append(spliced(ours, host.connect()))
            theirs_fd = theirs.detach()
            return [(Connected(id=7), [theirs_fd])]

        threads: list[threading.Thread] = []
        daemon = serve(answer)
        done = _exec(Path("7"), "sh", "-c", "cat; exit 9", options=["-i"], stdin=b"data")
        for thread in threads:
            thread.join()
    assert (done.returncode, done.stdout, done.stderr) == (9, b"data", b"")
    assert daemon.requests == [Connect(id=7, port=1024)]


def test_output_that_nobody_reads(vsock: Path) -> None:
    """A reader that leaves ends the command, silently."""
    line = f"{VMCTL} exec {vsock} -- yes | head -n 1; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(
        ["bash", "-c", line], capture_output=True, check=True, text=True, timeout=BOUND_S
    )
    assert (done.stdout, done.stderr) == ("y\n1\n", "")


def test_a_slow_reader(vsock: Path) -> None:
    """A slow reader loses nothing, and the time-out counts meanwhile too."""
    with subprocess.Popen(
        [VMCTL, "exec", vsock, "--", "head", "-c", str(2 * MIB), "/dev/zero"],
        stdout=subprocess.PIPE,
    ) as process:
        assert process.stdout
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(1)
        assert process.stdout.read() == bytes(2 * MIB)
    assert process.returncode == 0
    with subprocess.Popen(
        [VMCTL, "exec", "--timeout", "1", vsock, "--", "yes"], stdout=subprocess.PIPE, stderr=-3
    ) as process:
        assert process.wait(BOUND_S) == 124


def _group_of(process: subprocess.Popen[bytes]) -> int:
    """Return the process group of a command that prints it first."""
    assert process.stdout
    return int(process.stdout.readline())


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_the_client_is_killed(vsock: Path, number: int) -> None:
    """The guest's process group ends, however vmctl has ended."""
    script = "sleep 1000 & echo $$; sleep 1000; :"
    with subprocess.Popen(
        [VMCTL, "exec", vsock, "--", "sh", "-c", script],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        group = _group_of(process)
        assert len(list(left_in_group(group))) >= 2
        process.send_signal(number)
        assert process.wait(BOUND_S) == -number
        assert process.stderr
        assert process.stderr.read() == b""
    wait_until(lambda: not list(left_in_group(group)))


def test_the_agent_is_killed(tmp_path: Path) -> None:
    """If the agent is killed the connection ends: one line, status 255."""
    with (
        Vsock(tmp_path / "vsock") as vsock,
        subprocess.Popen(
            [VMCTL, "exec", tmp_path / "vsock", "--", "sh", "-c", "echo $$; exec sleep 1000"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        ) as process,
    ):
        group = _group_of(process)
        os.kill(vsock.pids[0], signal.SIGKILL)
        assert process.wait(BOUND_S) == 255
        assert process.stderr
        told = process.stderr.read()
        os.killpg(group, signal.SIGKILL)  # no parent of this agent does it
    assert told == b"vmctl: the connection to the guest's agent has ended\n"


class Terminal:
    """`vmctl exec` on a terminal of its own; a context manager."""

    def __init__(self, *arguments: str | Path) -> None:
        """Start it on a terminal of 24 rows and 80 columns."""
        self.master, slave = pty.openpty()
        self.resize(24, 80)
        self.before = termios.tcgetattr(slave)
        self.process = subprocess.Popen(
            ["setsid", "--ctty", VMCTL, "exec", *arguments],
            stdin=slave,
            stdout=slave,
            stderr=slave,
            env={**os.environ, "TERM": "xterm"},
        )
        self.slave = slave
        self.shown = b""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        os.close(self.master)
        os.close(self.slave)

    def resize(self, rows: int, columns: int) -> None:
        """Change its size."""
        fcntl.ioctl(self.master, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))

    def type(self, text: bytes) -> None:
        """Type."""
        os.write(self.master, text)

    def expect(self, text: bytes) -> None:
        """Read until `text` is shown."""
        end = time.monotonic() + BOUND_S
        while text not in self.shown:
            ready, _, _ = select.select([self.master], [], [], max(0, end - time.monotonic()))
            assert ready, self.shown
            self.shown += os.read(self.master, 4096)


def test_a_terminal(vsock: Path) -> None:
    """The command's terminal has this one's size and kind, and follows changes; keys reach it."""
    script = "stty size; echo $TERM; stty -echo; echo ready; read x; stty size; sleep 1000"
    with Terminal("-it", vsock, "--", "sh", "-c", script) as terminal:
        terminal.expect(b"ready\r\n")
        assert b"24 80\r\nxterm\r\n" in terminal.shown
        terminal.resize(50, 132)
        wait_until(lambda: _is_raw(terminal))
        terminal.type(b"\r")
        terminal.expect(b"50 132\r\n")
        terminal.type(b"\x03")
        assert terminal.process.wait(BOUND_S) == 130
        assert termios.tcgetattr(terminal.slave) == terminal.before


def _is_raw(terminal: Terminal) -> bool:
    return not termios.tcgetattr(terminal.slave)[3] & termios.ICANON


def test_a_terminal_is_put_back(vsock: Path) -> None:
    """The command's changes to the terminal are undone, even if vmctl is terminated."""
    with Terminal(
        "-it", vsock, "--", "sh", "-c", "printf '\\033[?25lhidden'; sleep 1000"
    ) as terminal:
        terminal.expect(b"hidden")
        wait_until(lambda: _is_raw(terminal))
        terminal.process.terminate()
        terminal.expect(b"\x1b[?25h")
        assert terminal.process.wait(BOUND_S) == -signal.SIGTERM
        assert termios.tcgetattr(terminal.slave) == terminal.before


def test_a_command_outlives_nothing(vsock: Path) -> None:
    """A command that has ended leaves no process of the guest's agent behind."""
    done = _exec(vsock, "sh", "-c", "echo $PPID")
    wait_until(lambda: not is_running(int(done.stdout)))
