"""The console: both directions, escapes on a terminal, and reboots that do not show."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import termios
from pathlib import Path

from tests.unit.vmctl.conftest import Serve
from tests.unit.vmctl.fake_daemon import Answers
from tests.vmctl_driver import VMCTL, ConsoleProcess
from vmd.wire.messages import (
    AnyRequest,
    ConsoleOpened,
    ErrorCode,
    Failed,
    Started,
    State,
    VmInfo,
    Vms,
)

LEAVE = b"\r~."


class Vm:
    """The far end of a console: its output so far, and the current stream."""

    def __init__(self) -> None:
        self.history = b""
        self.gone = 0
        self.is_late = False
        self.streams: list[socket.socket] = []
        self.is_running = True

    def answer(self, request: AnyRequest) -> Answers:
        """Open a console: earlier output comes first."""
        if not self.is_running:
            return [Failed(code=ErrorCode.NOT_RUNNING)]
        if type(request).__name__ == "Start":
            return [Started(id=7, pid=700, tty="/dev/pts/7")]
        theirs, ours = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ours.settimeout(20)
        if self.history and not self.is_late:
            ours.send(self.history)
        self.streams.append(ours)
        opened = ConsoleOpened(
            id=7, tty="/dev/pts/7", position=self.gone, history=len(self.history)
        )
        return [(opened, [theirs.detach()])]

    def show(self, data: bytes) -> None:
        """Print something."""
        self.history += data
        self.streams[-1].send(data)

    def end(self, missed: bytes = b"") -> None:
        """Let the process end; the next one has printed `missed` before the console attaches."""
        self.history += missed
        self.streams[-1].close()

    def close(self) -> None:
        """Close every stream."""
        for stream in self.streams:
            stream.close()


def attach(*arguments: str, is_tty: bool = True) -> ConsoleProcess:
    """Start `vmctl` with these arguments; VMD_SOCKET gives the daemon's socket."""
    return ConsoleProcess([str(VMCTL), *arguments], is_tty=is_tty)


def test_a_console_on_a_terminal(serve: Serve) -> None:
    """Earlier output is shown, typed input arrives, escapes stay here."""
    vm = Vm()
    vm.history = b"login: "
    serve(vm.answer)
    with attach("console", "web") as console:
        console.expect("login: ")
        console.send(b"root\r")
        typed = vm.streams[0].recv(100)
        while len(typed) < len(b"\x00root\r"):
            typed += vm.streams[0].recv(100)[1:]
        assert typed == b"\x00root\r"
        console.send(b"~#")
        assert vm.streams[0].recv(100) == b"\x01"
        vm.show(b"Password:")
        console.expect("Password:")
        console.send(LEAVE)
        assert console.wait() == 0
    vm.close()


def test_a_console_survives_reboots(serve: Serve) -> None:
    """One stream ends, another begins, and no output is lost or shown twice."""
    vm = Vm()
    serve(vm.answer)
    with attach("console", "web", is_tty=False) as console:
        console.expect_errors("Connected to /dev/pts/7")
        vm.show(b"first boot\n")
        console.expect("first boot\n")
        vm.end(missed=b"second boot\n")
        console.expect("second boot\n")
        vm.show(b"more\n")
        console.expect("more\n")
        vm.is_running = False
        vm.end()
        assert console.wait() == 0
        assert console.output == b"first boot\nsecond boot\nmore\n"
    vm.close()


def test_a_terminal_is_given_back(serve: Serve) -> None:
    """The hint follows earlier output; at the end the guest's changes are undone."""
    vm = Vm()
    vm.history = b"\x1b[?7l\x1b[?25l" + b"line\r\n" * 500 + b"\x1b[?25hlogin: "
    serve(vm.answer)
    for number in (None, signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
        with attach("console", "web") as console:
            console.expect("login: ")
            console.expect_errors(r"\r\nConnected to /dev/pts/7 \(~\. leaves, ~\? lists more\)\r\n")
            before = termios.tcgetattr(console.terminal)
            if number is None:
                console.send(LEAVE)
                assert console.wait() == 0
            else:
                console.signal(number)
                assert console.wait() == -number
            assert console.output.endswith(b"login: \x1b[?7h\x1b[0m\r\n")
            after = termios.tcgetattr(console.terminal)
            assert not before[3] & termios.ECHO
            assert after[3] & termios.ECHO
    vm.close()


def test_what_was_missed_is_missing(serve: Serve) -> None:
    """If more was printed between two streams than the history holds, only its rest is shown."""
    vm = Vm()
    serve(vm.answer)
    with attach("console", "web", is_tty=False) as console:
        console.expect_errors("Connected to /dev/pts/7")
        vm.show(b"12345")
        console.expect("12345")
        vm.gone, vm.history = 8, b"9abc"
        vm.end()
        console.expect("9abc")
        vm.show(b"def")
        console.expect("def")
        vm.gone, vm.history = 10, b"bcdefgh"
        vm.end()
        console.expect("gh")
        vm.is_running = False
        vm.end()
        assert console.wait() == 0
        assert console.output == b"123459abcdefgh"
    vm.close()


def test_a_slow_repetition_is_not_shown_again(serve: Serve) -> None:
    """After a reboot repeated output may come slowly, and still is not shown again."""
    vm = Vm()
    serve(vm.answer)
    with attach("console", "web", is_tty=False) as console:
        console.expect_errors("Connected to /dev/pts/7")
        vm.show(b"first boot\n")
        console.expect("first boot\n")
        vm.is_late = True
        vm.end()
        while len(vm.streams) < 2:
            os.sched_yield()
        with subprocess.Popen(["sleep", "0.4"]) as sleep:
            sleep.wait()
        vm.streams[-1].send(b"first boot\n")
        vm.show(b"second boot\n")
        console.expect("second boot\n")
        vm.is_running = False
        vm.end()
        assert console.wait() == 0
        assert console.output == b"first boot\nsecond boot\n"
    vm.close()


def test_an_answer_without_a_stream(serve: Serve) -> None:
    """A console without its descriptor, or with two, is one line of error."""
    counts = iter([0, 0, 2, 2])

    def answer(_: AnyRequest) -> Answers:
        return [(ConsoleOpened(id=7, tty="x"), [os.dup(0) for _ in range(next(counts))])]

    serve(answer)
    for words in (["console", "web"], ["wait", "--for", "console=x", "web"]) * 2:
        with attach(*words, is_tty=False) as console:
            assert console.wait() == 1
            last = console.errors.splitlines()[-1]
            assert last == b"vmctl: unexpected response received from vmd"


def test_start_attaches(serve: Serve, tmp_path: Path) -> None:
    """With -c the console of the started VM follows."""
    del tmp_path
    vm = Vm()
    vm.history = b"booting"
    serve(vm.answer)
    with attach("start", "-c", "web") as console:
        console.expect("booting")
        console.send(LEAVE)
        assert console.wait() == 0
    vm.close()


def test_status_on_a_terminal(serve: Serve) -> None:
    """On a terminal the table has colours, and the same cells."""
    vm = VmInfo(id=1, name="web[1]", state=State.RUNNING, cpus=2, memory=1 << 30, pid=71234)
    serve(lambda _: [Vms(vms=(vm,))])
    with ConsoleProcess(
        [str(VMCTL), "status"], is_tty=True, environment={"TERM": "xterm", "COLUMNS": "100"}
    ) as status:
        assert status.wait() == 0
    lines = re.sub(rb"\x1b\[[0-9;]*m", b"", status.output).split(b"\r\n")
    assert [line.split() for line in lines[:2]] == [
        b"ID PID VCPUS MAXMEM CURMEM TTY OWNER STATE NAME".split(),
        b"1 71234 2 1.0G - - root running web[1]".split(),
    ]
    assert b"\x1b[32mrunning" in status.output
