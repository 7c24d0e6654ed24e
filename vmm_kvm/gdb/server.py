"""GDB's way to a machine: a stream, one debugger at a time.

A debugger that connects stops the machine; one that goes away, by `detach` or otherwise, lets it
go on without breakpoints. On the event loop's thread; nothing here blocks.
"""

import socket
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from select import POLLHUP, poll

from vmm_kvm.gdb.debugger import Debugger, Stop
from vmm_kvm.gdb.packets import (
    PACKET_MAX,
    Again,
    Damaged,
    OverflowedError,
    Packet,
    Reader,
    Received,
    framed,
)
from vmm_kvm.gdb.session import Session
from vmm_kvm.listening import listen
from vmm_kvm.loop import EventLoop
from vmm_kvm.machine.machine import Machine

_BACKLOG = 16


class GdbServer:
    """Serves debuggers of one VM, over its reboots."""

    def __init__(
        self, loop: EventLoop, on_kill: Callable[[], None], *, waits: bool = False
    ) -> None:
        """Serve nobody yet; `on_kill` ends the VM, if a debugger asks for it.

        With `waits` the VM's first machine stands still until a debugger lets it go on.
        """
        self._loop = loop
        self._on_kill = on_kill
        self._waits = waits
        self._machine: Machine | None = None
        self._debugger = Debugger(loop.call_soon, self._stopped)
        self._client: socket.socket | None = None
        self._session: Session | None = None
        self._reader = Reader()
        self._unsent = b""
        self._sent = b""

    def attach(self, machine: Machine) -> None:
        """Serve a machine of which no vCPU has run yet: the VM's first, or after a reboot."""
        self._machine = machine
        if self._session:
            self._debugger.attach(machine)
        elif self._waits:
            machine.hold()

    def close(self, status: int = 0) -> None:
        """Tell the debugger that the VM has ended with `status`, and serve it no more."""
        if self._client:
            with suppress(OSError):
                self._client.send(framed(b"W%02x" % (status & 0xFF)))
            self._hang_up()

    def serve(self, client: socket.socket) -> None:
        """Stop the machine for a debugger; takes over its connection, which ends if there is one.

        Raises:
            KvmError: KVM refused.
        """
        self._lose_the_gone()
        if self._client or self._machine is None:
            client.close()
            return
        client.setblocking(False)
        self._client = client
        self._reader = Reader()
        self._unsent = self._sent = b""
        self._debugger.attach(self._machine)
        self._debugger.stop()
        self._session = Session(self._debugger, self._on_kill)
        self._loop.add_reader(client.fileno(), self._readable)

    # The connection

    def _hang_up(self) -> None:
        assert self._client is not None
        self._loop.remove_reader(self._client.fileno())
        self._loop.remove_writer(self._client.fileno())
        self._client.close()
        self._client = self._session = None

    def _lose_the_gone(self) -> None:
        """Serve the rest of a debugger that has gone away, and its end.

        The loop may tell of them later than of the next debugger, which is not to be refused.
        """
        while self._client and _is_gone(self._client):
            self._readable()

    def _lose(self) -> None:
        """Go on without the debugger."""
        self._hang_up()
        self._waits = False
        self._debugger.detach()

    def _readable(self) -> None:
        assert self._client is not None
        try:
            data = self._client.recv(PACKET_MAX)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        try:
            self._reader.feed(data)
        except OverflowedError:
            data = b""
        if not data:
            self._lose()
            return
        self._serve()

    def _serve(self) -> None:
        """Serve received packets, as long as earlier answers have been sent."""
        while self._session and not self._unsent:
            received = self._next()
            if received is None:
                return
            if isinstance(received, Packet):
                self._answer(received.text)
            elif isinstance(received, Damaged):
                self._send(b"-")
            elif isinstance(received, Again):
                self._send(self._sent)
            elif not self._debugger.is_stopped:
                self._debugger.stop()
                self._stopped(Stop(0, is_asked=True))

    def _next(self) -> Received | None:
        try:
            return self._reader.next()
        except OverflowedError:
            self._lose()
            return None

    def _answer(self, text: bytes) -> None:
        session = self._session
        assert session is not None
        if not self._debugger.is_stopped:
            return  # all-stop: nothing but an interrupt has a meaning while it runs
        acknowledgement = b"+" if session.needs_acknowledgements else b""
        answer = session.handle(text)
        self._sent = b"" if answer is None else framed(answer)
        self._send(acknowledgement + self._sent)
        if session.is_over and self._client:
            self._lose()

    def _stopped(self, stop: Stop) -> None:
        if self._session:
            self._sent = framed(self._session.stopped(stop))
            self._send(self._sent)

    def _send(self, data: bytes) -> None:
        self._unsent += data
        self._writable()

    def _writable(self) -> None:
        if self._client is None:
            return
        try:
            while self._unsent:
                sent = self._client.send(self._unsent)
                self._unsent = self._unsent[sent:]
        except BlockingIOError:
            self._loop.add_writer(self._client.fileno(), self._drained)
            return
        except OSError:
            self._lose()

    def _drained(self) -> None:
        assert self._client is not None
        self._loop.remove_writer(self._client.fileno())
        self._writable()
        if not self._unsent:
            self._serve()


def _is_gone(client: socket.socket) -> bool:
    """Tell whether the other end is closed; what it has sent before is still to be read."""
    waiting = poll()
    waiting.register(client, 0)
    return any(events & POLLHUP for _, events in waiting.poll(0))


class GdbListener:
    """A UNIX socket that debuggers connect to; owns it, and removes it at the end."""

    def __init__(self, loop: EventLoop, path: str, server: GdbServer) -> None:
        """Listen at `path`, for this user alone, and have `server` serve who comes.

        Raises:
            SpecError: another program listens there, or another file is there.
            OSError: it cannot be made.
        """
        self._loop = loop
        self._path = path
        self._server = server
        self._listener = listen(
            path, socket.SOCK_STREAM, mode=0o600, backlog=_BACKLOG, server="debugged VM"
        )
        self._listener.setblocking(False)
        loop.add_reader(self._listener.fileno(), self._accept)

    def close(self) -> None:
        """Listen no more."""
        self._loop.remove_reader(self._listener.fileno())
        self._listener.close()
        with suppress(FileNotFoundError):
            Path(self._path).unlink()

    def _accept(self) -> None:
        try:
            client, _ = self._listener.accept()
        except OSError:  # it went away again, or there are no descriptors: it is tried again
            return
        self._server.serve(client)
