"""A VM's console: from the serial port to a terminal and any number of streams, and back.

Output goes into a ring; the terminal and each stream read it at their own pace, from 64 KiB back
when they come late. A reader that lags by more than the ring misses some output: none delays the
guest. Input waits until the serial port has room, and its reader with it. Output is shown in
batches, but what follows input at once: somebody may wait for the answer.

`transmit` may be called on any thread, the rest belongs to the event loop's thread.
"""

import os
import select
import socket
from collections import deque
from contextlib import suppress
from typing import Protocol

from vmd.shared.ring import OutputRing
from vmd.wire.messages import CONSOLE_BREAK, CONSOLE_INPUT
from vmm_kvm.log import Log
from vmm_kvm.loop import EventLoop

log = Log(__name__)

STREAMS_MAX = 64
_BATCH_NS = 3_000_000  # how long a byte may wait, to be shown with others
_SETTLING_NS = 100_000_000  # until a terminal that was opened has been set up
_PACKET_MAX = 16 * 1024
_TERMINAL_WRITE = 4096
_INPUT_MAX = 4096


class SerialPort(Protocol):
    """The guest's serial port."""

    def receive(self, data: bytes) -> int:
        """Take typed bytes; return how many were taken."""

    def receive_break(self) -> None:
        """Take a BREAK."""


class Console:
    """One VM's console. Owns the descriptors and the sockets that it is given."""

    def __init__(self, loop: EventLoop, master: int, ring: int) -> None:
        """Serve the terminal at `master`; see `pty.Pty` for both."""
        self.port: SerialPort | None = None
        """The receiver of input; to be set before the guest runs."""
        self._loop = loop
        self._ring = OutputRing(ring)
        os.close(ring)
        self._written: deque[bytes] = deque()
        self._is_armed = False
        self._is_answer = False  # what comes next
        self._timer = loop.timer(self._collect)
        self._typed = bytearray()
        self._terminal = _Terminal(self, master, loop, self._ring)
        self._streams: set[_Stream] = set()

    def close(self) -> None:
        """Show the rest, as far as readers take it at once, and close everything."""
        self._timer.cancel()
        self._collect()
        for stream in tuple(self._streams):
            stream.close()
        self._terminal.close()
        self._ring.close()

    def attach(self, stream: socket.socket, position: int) -> None:
        """Serve one more stream, from a position of the ring on; refused when there are too many.

        The stream does not get output that the ring has lost.
        """
        if len(self._streams) >= STREAMS_MAX:
            log.warning("console: more than %d streams", STREAMS_MAX)
            stream.close()
            return
        self._streams.add(_Stream(self, stream, self._loop, self._ring, position))

    def look_at_terminal(self) -> None:
        """Check whether the terminal's slave side is open."""
        self._terminal.look()

    # Output

    def transmit(self, data: bytes) -> None:
        """Take the guest's output; any thread, never blocks."""
        self._written.append(data)
        if not self._is_armed:
            self._is_armed = True
            delay_ns = 0 if self._is_answer else _BATCH_NS
            self._is_answer = False
            self._timer.arm(self._loop.monotonic_ns() + delay_ns)

    def _collect(self) -> None:
        self._is_armed = False  # before the look: a byte that comes now arms the timer again
        if not self._written:
            return
        data = bytearray()
        while self._written:
            data += self._written.popleft()
        self._ring.append(data)
        self._terminal.show()
        for stream in tuple(self._streams):
            stream.show()

    # Input

    def feed(self) -> None:
        """Give the guest input, as far as it has room; to be called when it has."""
        if self._typed and self.port:
            del self._typed[: self.port.receive(bytes(self._typed))]
        self._listen()

    def typed(self, data: bytes) -> None:
        """Take bytes of a terminal or stream."""
        self._typed += data
        self._is_answer = True
        self.feed()

    def break_typed(self) -> None:
        """Take a BREAK."""
        if self.port:
            self.port.receive_break()

    def forget(self, stream: "_Stream") -> None:
        """A stream has ended."""
        self._streams.discard(stream)

    @property
    def has_room(self) -> bool:
        """Whether more input may be read."""
        return len(self._typed) < _INPUT_MAX

    def _listen(self) -> None:
        self._terminal.listen()
        for stream in self._streams:
            stream.listen()


class _Stream:
    """A client's socket: packets both ways, see `messages.ConsoleOpened`."""

    def __init__(
        self,
        console: Console,
        sock: socket.socket,
        loop: EventLoop,
        ring: OutputRing,
        position: int,
    ) -> None:
        self._console = console
        self._socket = sock
        self._fd = sock.fileno()
        self._loop = loop
        self._ring = ring
        self._position = ring.nearest(position)
        self._is_waiting = False
        self._is_listening = False
        sock.setblocking(False)
        self.listen()
        self.show()

    def show(self) -> None:
        """Send new output, until the socket takes no more."""
        try:
            while self._position < self._ring.total:
                position, data = self._ring.read(self._position, _PACKET_MAX)
                self._socket.send(data)
                self._position = position
        except BlockingIOError:
            if not self._is_waiting:
                self._is_waiting = self._loop.add_writer(self._fd, self.show)
            return
        except OSError:
            self.close()
            return
        if self._is_waiting:
            self._is_waiting = False
            self._loop.remove_writer(self._fd)

    def listen(self) -> None:
        """Read while the console has room."""
        if self._is_listening != self._console.has_room:
            self._is_listening = not self._is_listening
            if self._is_listening:
                self._loop.add_reader(self._fd, self._read)
            else:
                self._loop.remove_reader(self._fd)

    def close(self) -> None:
        """End the stream; idempotent."""
        if self._fd >= 0:
            self._loop.remove_reader(self._fd)
            self._loop.remove_writer(self._fd)
            self._fd = -1
            self._socket.close()
            self._console.forget(self)

    def _read(self) -> None:
        try:
            packet = self._socket.recv(_INPUT_MAX + 1)
        except BlockingIOError:
            return
        except OSError:
            packet = b""
        if packet == CONSOLE_BREAK:
            self._console.break_typed()
        elif packet.startswith(CONSOLE_INPUT):
            self._console.typed(packet[1:])
        else:  # its end, or a client of another protocol
            self.close()


class _Terminal:
    """The pty. While its slave side is closed, nothing is read or written."""

    def __init__(self, console: Console, master: int, loop: EventLoop, ring: OutputRing) -> None:
        self._console = console
        self._master = master
        self._loop = loop
        self._ring = ring
        self._position = 0
        self._is_open = False
        self._is_shown = False
        self._is_waiting = False
        self._is_listening = False
        self._timer = loop.timer(self._begin)
        self.look()

    def show(self) -> None:
        """Write new output, until the terminal takes no more."""
        if not self._is_shown:
            return
        try:
            while self._position < self._ring.total:
                position, data = self._ring.read(self._position, _TERMINAL_WRITE)
                written = os.write(self._master, data)
                self._position = position - len(data) + written
        except BlockingIOError:
            if not self._is_waiting:
                self._is_waiting = self._loop.add_writer(self._master, self.show)
            return
        except OSError:
            self.look()
            return
        if self._is_waiting:
            self._is_waiting = False
            self._loop.remove_writer(self._master)

    def listen(self) -> None:
        """Read while the slave side is open and the console has room."""
        wanted = self._is_open and self._console.has_room
        if self._is_listening != wanted:
            self._is_listening = wanted
            if wanted:
                self._loop.add_reader(self._master, self._read)
            else:
                self._loop.remove_reader(self._master)

    def close(self) -> None:
        """Close the descriptor."""
        self._timer.cancel()
        self._loop.remove_reader(self._master)
        self._loop.remove_writer(self._master)
        os.close(self._master)

    def look(self) -> None:
        """See whether anybody has the slave side open."""
        poll = select.poll()
        poll.register(self._master, select.POLLOUT)
        is_open = not any(events & select.POLLHUP for _, events in poll.poll(0))
        if is_open == self._is_open:
            return
        self._is_open = is_open
        if is_open:
            self._timer.arm(self._loop.monotonic_ns() + _SETTLING_NS)
        else:
            self._timer.cancel()
            self._is_shown = self._is_waiting = False
            self._loop.remove_writer(self._master)
            self._read_rest()
        self.listen()

    def _begin(self) -> None:
        """Show earlier output to a late reader."""
        self._is_shown = True
        self._position = self._ring.late()
        self.show()

    def _read_rest(self) -> None:
        """Take input from just before the slave side was closed; a terminal holds few KiB."""
        with suppress(OSError):
            while data := os.read(self._master, _INPUT_MAX):
                self._console.typed(data)

    def _read(self) -> None:
        try:
            data = os.read(self._master, _INPUT_MAX)
        except BlockingIOError:
            return
        except OSError:  # the slave side was closed
            data = b""
        if data:
            self._console.typed(data)
        else:
            self.look()
