"""A VM's console: its terminal, its streams, and the serial port behind them."""

from __future__ import annotations

import os
import select
import socket
from collections.abc import Callable, Iterator
from functools import partial

import pytest

from vmd.parent.terminal_watch import TerminalWatch
from vmd.shared.pty import Pty, open_pty
from vmd.shared.ring import CAPACITY, REPLAY, Replay, replay
from vmd.vm import console
from vmd.vm.console import STREAMS_MAX, Console
from vmm_kvm.loop import EventLoop

_PATIENCE_NS = 5_000_000_000


class Port:
    """A serial port that takes as much as it has room for."""

    def __init__(self) -> None:
        """Begin with room for everything."""
        self.received = b""
        self.breaks = 0
        self.room = 1 << 20

    def receive(self, data: bytes) -> int:
        """Take typed bytes."""
        taken = data[: self.room]
        self.received += taken
        self.room -= len(taken)
        return len(taken)

    def receive_break(self) -> None:
        """Take a BREAK."""
        self.breaks += 1


class Rig:
    """A console in an event loop that runs until a condition holds."""

    def __init__(self) -> None:
        """Make a console on a terminal of its own."""
        self.loop = EventLoop()
        self.pty: Pty = open_pty("test", os.getuid(), None)
        self.port = Port()
        self.console = Console(self.loop, *(os.dup(fd) for fd in self.pty[1:]))
        self.console.port = self.port
        self.terminals = TerminalWatch(self.loop)
        self.terminals.add(self.pty.name, self.console.look_at_terminal)
        self._streams: list[socket.socket] = []

    def attach(self, position: int | None = None) -> socket.socket:
        """Attach a stream, where the parent would or at `position`; returns the client's end."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ours.setblocking(False)
        self._streams.append(ours)
        start = replay(self.pty.ring).start if position is None else position
        self.console.attach(theirs, start)
        return ours

    def has_received(self, data: bytes) -> bool:
        """Tell whether exactly these bytes were typed."""
        return self.port.received == data

    def run_until(self, is_so: Callable[[], bool]) -> None:
        """Run the loop until a condition holds, at most some seconds."""
        timer = self.loop.timer(lambda: None)
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

    def read(self, end: socket.socket | int, size: int) -> bytes:
        """Run until `count` bytes have come out of a stream or terminal."""
        data = bytearray()

        def is_read() -> bool:
            fd = end if isinstance(end, int) else end.fileno()
            while select.select([fd], [], [], 0)[0]:
                part = os.read(fd, 1 << 20)
                if not part:
                    break
                data.extend(part)
            return len(data) >= size

        self.run_until(is_read)
        return bytes(data)

    def close(self) -> None:
        """Close everything."""
        self.terminals.close()
        self.console.close()
        for stream in self._streams:
            stream.close()
        self.loop.close()
        self.pty.close()


@pytest.fixture
def rig() -> Iterator[Rig]:
    """Return a console."""
    made = Rig()
    yield made
    made.close()


def test_output_reaches_every_stream(rig: Rig) -> None:
    """Each of several clients sees all output, late ones the earlier output too."""
    first = rig.attach()
    rig.console.transmit(b"hello ")
    assert rig.read(first, 6) == b"hello "
    second = rig.attach()
    rig.console.transmit(b"world")
    assert rig.read(first, 5) == b"world"
    assert rig.read(second, 11) == b"hello world"


def test_a_reader_that_does_not_read_holds_nobody(rig: Rig) -> None:
    """While one client does not read, another sees everything; the first later gets the newest."""
    lazy, eager = rig.attach(), rig.attach()
    for _ in range(64):
        rig.console.transmit(b"x" * 16384)
        assert len(rig.read(eager, 16384)) == 16384
    rig.console.transmit(b"the end")
    assert rig.read(eager, 7) == b"the end"
    seen = b""
    while not seen.endswith(b"the end"):
        seen += rig.read(lazy, 1)
    assert REPLAY < len(seen) < 64 * 16384


def test_typing_and_breaks(rig: Rig) -> None:
    """Bytes after a zero are typed, a lone zero is a BREAK, anything else ends the stream."""
    stream = rig.attach()
    stream.send(b"\0ls\r")
    stream.send(b"\1")
    rig.run_until(lambda: rig.port.breaks == 1)
    assert rig.port.received == b"ls\r"
    stream.send(b"what?")
    assert select.select([stream], [], [], 0)[0] == []
    rig.run_until(lambda: bool(select.select([stream], [], [], 0)[0]))
    assert stream.recv(10) == b""


def test_an_answer_is_not_held_back(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Output waits to be shown with what follows it, unless it is the first after input."""
    monkeypatch.setattr(console, "_BATCH_NS", 1 << 60)
    stream = rig.attach()
    stream.send(b"\0x")
    rig.run_until(lambda: rig.has_received(b"x"))
    rig.console.transmit(b"x")
    assert rig.read(stream, 1) == b"x"
    rig.console.transmit(b"later")
    rig.run_until(lambda: True)
    assert select.select([stream], [], [], 0)[0] == []


def test_where_history_ends(rig: Rig) -> None:
    """A stream starts at the given position; earlier output is history, the rest is new."""
    rig.console.transmit(b"old")
    rig.run_until(lambda: replay(rig.pty.ring) == Replay(0, 3))
    past = replay(rig.pty.ring)
    rig.console.transmit(b"new")
    rig.run_until(lambda: replay(rig.pty.ring) == Replay(0, 6))
    assert rig.attach(past.start).recv(100) == b"oldnew"
    assert rig.attach(past.start + past.size).recv(100) == b"new"
    rig.console.transmit(bytes(2 * CAPACITY))
    total = 6 + 2 * CAPACITY
    rig.run_until(lambda: replay(rig.pty.ring) == Replay(total - REPLAY, REPLAY))
    late = rig.attach(0)  # overwritten output is not sent
    size = 0
    while size < CAPACITY:
        rig.run_until(lambda: bool(select.select([late], [], [], 0)[0]))
        size += len(late.recv(1 << 20))
    assert size == CAPACITY


def test_input_waits_for_room(rig: Rig) -> None:
    """A guest that does not read is not flooded; when it does, no input is lost."""
    rig.port.room = 10
    stream = rig.attach()
    stream.setblocking(True)
    for _ in range(4):
        stream.send(b"\0" + b"y" * 4096)
    rig.run_until(lambda: len(rig.port.received) == 10)
    rig.port.room = 1 << 20
    rig.loop.call_soon(rig.console.feed)
    rig.run_until(lambda: len(rig.port.received) == 4 * 4096)


def test_too_many_streams(rig: Rig) -> None:
    """Beyond a limit a stream is closed at once."""
    for _ in range(STREAMS_MAX):
        rig.attach()
    assert rig.attach().recv(1) == b""


def test_a_terminal_that_is_opened_late(rig: Rig) -> None:
    """A terminal shows earlier output when it is opened, again after each closing."""
    rig.console.transmit(b"booted\r\n")
    for typed in (b"w", b"ww"):
        terminal = os.open(rig.pty.name, os.O_RDWR | os.O_NOCTTY)
        assert rig.read(terminal, 8) == b"booted\r\n"
        os.write(terminal, b"w")
        os.close(terminal)
        rig.run_until(partial(rig.has_received, typed))


def test_nothing_is_echoed_to_the_guest(rig: Rig) -> None:
    """A terminal without settings does not send output back as input."""
    terminal = os.open(rig.pty.name, os.O_RDWR | os.O_NOCTTY)
    rig.console.transmit(b"login: ")
    assert rig.read(terminal, 7) == b"login: "
    rig.console.transmit(b"again")
    assert rig.read(terminal, 5) == b"again"
    assert rig.port.received == b""
    os.close(terminal)
