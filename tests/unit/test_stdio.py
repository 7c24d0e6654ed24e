"""The console of a foreground VM over real pipes, files and terminals."""

import os
import pty
import select
import termios
import tty
from collections.abc import Iterator
from pathlib import Path

import pytest

from vmctl.foreground.stdio import Stdio
from vmm_kvm.loop import EventLoop

MS = 1_000_000


class RecordingGuest:
    """A guest whose serial port has room for `room` bytes."""

    def __init__(self, room: int = 1 << 30) -> None:
        self.received = b""
        self.breaks = 0
        self.holds: list[bool] = []
        self.quits: list[str | None] = []
        self.room = room

    def receive(self, data: bytes) -> int:
        """Take as much as there is room for."""
        taken = data[: self.room]
        self.received += taken
        self.room -= len(taken)
        return len(taken)

    def receive_break(self) -> None:
        """Count a BREAK."""
        self.breaks += 1

    def throttle(self, hold: bool) -> None:
        """Note that the vCPUs are held or released."""
        self.holds.append(hold)

    def quit(self, reason: str | None) -> None:
        """Note that the VM is to end."""
        self.quits.append(reason)


@pytest.fixture
def loop() -> Iterator[EventLoop]:
    """An event loop that is closed afterwards."""
    with EventLoop() as loop:
        yield loop


@pytest.fixture
def pipes() -> Iterator[tuple[int, int, int, int]]:
    """Two pipes: our standard input with its writer, our standard output with its reader."""
    stdin, typing = os.pipe()
    reading, stdout = os.pipe()
    fds = {stdin, typing, reading, stdout}
    yield stdin, typing, reading, stdout
    for fd in fds:
        try:
            os.close(fd)
        except OSError:  # a test closed it
            continue


def spin(loop: EventLoop, for_ms: int = 20) -> None:
    """Let the loop work for a while."""
    loop.timer(loop.stop).arm(loop.monotonic_ns() + for_ms * MS)
    loop.run()


def test_bytes_go_both_ways(loop: EventLoop, pipes: tuple[int, int, int, int]) -> None:
    """A pipe carries plain bytes: nothing is an escape."""
    stdin, typing, reading, stdout = pipes
    guest = RecordingGuest()
    stdio = Stdio(loop, guest, stdin, stdout)
    stdio.start()
    os.write(typing, b"~.ls\r")
    stdio.transmit(b"file\n")
    spin(loop)
    stdio.finish(discard=False)
    assert guest.received == b"~.ls\r"
    assert os.read(reading, 100) == b"file\n"
    assert guest.quits == []


def test_slow_reader_throttles_and_loses_nothing(
    loop: EventLoop, pipes: tuple[int, int, int, int]
) -> None:
    """A long backlog throttles the guest until the reader has caught up; every byte arrives."""
    stdin, _, reading, stdout = pipes
    guest = RecordingGuest()
    stdio = Stdio(loop, guest, stdin, stdout)
    stdio.start()
    sent = bytes(range(256)) * 2048
    stdio.transmit(sent)
    spin(loop)
    assert guest.holds == [True]
    got = b""
    while len(got) < len(sent):
        if select.select([reading], [], [], 0)[0]:  # a busy machine's loop may not have written
            got += os.read(reading, 65536)
        spin(loop, 1)
    stdio.finish(discard=False)
    assert got == sent
    assert guest.holds == [True, False]


def test_finish_writes_what_is_left(loop: EventLoop, pipes: tuple[int, int, int, int]) -> None:
    """The guest's last output is written before the process ends."""
    stdin, _, reading, stdout = pipes
    stdio = Stdio(loop, RecordingGuest(), stdin, stdout)
    stdio.start()
    stdio.transmit(b"last words")
    stdio.finish(discard=False)
    assert os.read(reading, 100) == b"last words"


def test_end_of_input(loop: EventLoop, pipes: tuple[int, int, int, int]) -> None:
    """The end of standard input does not end the VM, nor keep the loop busy."""
    stdin, typing, _, stdout = pipes
    guest = RecordingGuest()
    stdio = Stdio(loop, guest, stdin, stdout)
    stdio.start()
    os.write(typing, b"bye")
    os.close(typing)
    spin(loop)
    stdio.finish(discard=False)
    assert guest.received == b"bye"
    assert guest.quits == []


def test_closed_output(
    loop: EventLoop, pipes: tuple[int, int, int, int], capsys: pytest.CaptureFixture[str]
) -> None:
    """A reader that leaves causes one line, even without output; the guest runs on."""
    stdin, _, reading, stdout = pipes
    guest = RecordingGuest()
    stdio = Stdio(loop, guest, stdin, stdout)
    stdio.start()
    os.close(reading)
    spin(loop)
    stdio.transmit(b"to nobody")
    spin(loop)
    stdio.finish(discard=False)
    assert guest.quits == []
    assert capsys.readouterr().err == "vmctl: standard output: its reader has gone away\n"


def test_a_guest_that_waits_for_a_reader_goes_on_without_it(
    loop: EventLoop, pipes: tuple[int, int, int, int]
) -> None:
    """A guest that is held for its reader is released when the reader leaves."""
    stdin, _, reading, stdout = pipes
    guest = RecordingGuest()
    stdio = Stdio(loop, guest, stdin, stdout)
    stdio.start()
    stdio.transmit(bytes(1 << 20))
    spin(loop)
    os.close(reading)
    spin(loop)
    stdio.finish(discard=False)
    assert guest.holds == [True, False]


@pytest.mark.parametrize(
    ("path", "flags", "why"),
    [
        ("/dev/full", os.O_WRONLY, "No space left on device"),
        ("/dev/null", os.O_RDONLY, "Bad file descriptor"),
    ],
)
def test_output_that_cannot_be_written(
    path: str, flags: int, why: str, loop: EventLoop, capsys: pytest.CaptureFixture[str]
) -> None:
    """Output that cannot be written causes one line, during the run and at its end."""
    stdin, stdout = os.open("/dev/null", os.O_RDONLY), os.open(path, flags)
    guest = RecordingGuest()
    stdio = Stdio(loop, guest, stdin, stdout)
    stdio.start()
    for _ in range(3):
        stdio.transmit(b"x" * 10000)
        spin(loop)
    stdio.transmit(b"last words")
    stdio.finish(discard=False)
    os.close(stdin)
    os.close(stdout)
    assert guest.quits == []
    assert capsys.readouterr().err == f"vmctl: standard output: {why}\n"


def test_a_terminal_that_hangs_up_ends_the_vm(loop: EventLoop) -> None:
    """If the terminal hangs up the VM is ended, with the reason: no user can reach it."""
    master, slave = pty.openpty()
    guest = RecordingGuest()
    stdio = Stdio(loop, guest, slave, slave)
    stdio.start()
    os.close(master)
    stdio.transmit(b"hello")
    spin(loop)
    stdio.finish(discard=False)
    os.close(slave)
    assert guest.quits == ["standard output: Input/output error"]


def test_input_waits_for_room(loop: EventLoop, pipes: tuple[int, int, int, int]) -> None:
    """Input for which the serial port has no room waits until it has."""
    stdin, typing, _, stdout = pipes
    guest = RecordingGuest(room=3)
    stdio = Stdio(loop, guest, stdin, stdout)
    stdio.start()
    os.write(typing, b"abcdef" * 2000)
    spin(loop)
    assert guest.received == b"abc"
    while len(guest.received) < 12000:
        guest.room = 16
        stdio.feed()
        spin(loop, 1)
    stdio.finish(discard=False)
    assert guest.received == b"abcdef" * 2000


def test_input_from_a_regular_file(
    loop: EventLoop, pipes: tuple[int, int, int, int], tmp_path: Path
) -> None:
    """A file, which cannot be polled, is read as the guest has room."""
    _, _, _, stdout = pipes
    path = tmp_path / "typed"
    path.write_bytes(b"x" * 10000)
    fd = os.open(path, os.O_RDONLY)
    guest = RecordingGuest(room=10)
    stdio = Stdio(loop, guest, fd, stdout)
    stdio.start()
    while len(guest.received) < 10000:
        spin(loop, 1)
        guest.room = 1000
        stdio.feed()
    spin(loop)
    stdio.finish(discard=False)
    os.close(fd)
    assert guest.received == b"x" * 10000
    assert guest.quits == []


def test_terminal_is_raw_and_restored(loop: EventLoop) -> None:
    """On a terminal keys are raw, escapes work, and the terminal is restored afterwards."""
    master, slave = pty.openpty()
    guest = RecordingGuest()
    before = termios.tcgetattr(slave)
    stdio = Stdio(loop, guest, slave, slave)
    stdio.start()
    assert not termios.tcgetattr(slave)[tty.LFLAG] & termios.ICANON
    os.write(master, b"a\x03\r~#~~b~x\r~.")
    spin(loop)
    stdio.finish(discard=False)
    after = termios.tcgetattr(slave)
    os.close(master)
    os.close(slave)
    assert guest.received == b"a\x03\r~b~x\r"
    assert guest.breaks == 1
    assert guest.quits == [None]
    assert before == after


def test_a_terminal_is_given_back_as_it_was(loop: EventLoop) -> None:
    """The guest's changes to the terminal are undone at the end, and an open line is ended."""
    master, slave = pty.openpty()
    stdio = Stdio(loop, RecordingGuest(), slave, slave)
    stdio.start()
    stdio.transmit(b"\x1b[?7l\x1b[?25l\x1b[?10")
    spin(loop)
    stdio.transmit(b"49h$ ")
    stdio.finish(discard=False)
    expected = b"\x1b[?7l\x1b[?25l\x1b[?1049h$ \x1b[?1049l\x1b[?7h\x1b[?25h\x1b[0m\r\r\n"
    shown = b""
    while len(shown) < len(expected):
        shown += os.read(master, 1000)
    os.close(master)
    os.close(slave)
    assert shown == expected


def test_a_pipe_gets_nothing_of_ours(loop: EventLoop, pipes: tuple[int, int, int, int]) -> None:
    """A pipe gets the guest's output and nothing else, because no terminal is behind it."""
    stdin, _, reading, stdout = pipes
    stdio = Stdio(loop, RecordingGuest(), stdin, stdout)
    stdio.start()
    stdio.transmit(b"\x1b[?7l$ ")
    stdio.finish(discard=False)
    assert os.read(reading, 100) == b"\x1b[?7l$ "
