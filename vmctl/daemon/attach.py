"""`vmctl console`: a VM's console on this terminal, with cu's escapes and no other program.

The VM's latest output comes first. After a reboot the console is attached again, and repeated
output is not shown twice.

Source: section 3.4 of OpenBSD's behaviour; cu(1).
"""

import os
import select
import socket
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack, suppress

from vmctl.client import (
    Client,
    CommandError,
    Fields,
    RefusedError,
    Target,
    opened,
    parse_target,
)
from vmctl.messages import fail
from vmctl.screen.console import ESCAPES, Escape, EscapeParser, RawTerminal
from vmctl.screen.terminal import TerminalState
from vmctl.signals import cleaning_up
from vmm_kvm.standard_streams import OutputError

_INPUT = b"\x00"
_BREAK = b"\x01"
_PACKET_MAX = 64 << 10
_TYPED_MAX = 4096
_HISTORY_MS = 1000
_REBOOT_S = 0.05  # for the daemon to learn of the end


class _LeftError(Exception):
    """The person wants to leave."""


def console(words: Sequence[str]) -> int:
    """Attach to a VM's console until it ends or the user leaves; returns the exit status."""
    try:
        target = parse_target(words[0])
        stream, opened_as = _open(target)
    except RefusedError as err:
        if err.code in {"ENOENT", "not-running"}:
            return fail("console not found")
        return fail(f"failed to open the console: {err}")
    except CommandError as err:
        return fail(err)
    attached = Attached(stream, opened_as)
    greeting = f"Connected to {opened_as['tty']} (~. leaves, ~? lists more)"
    with cleaning_up(), ExitStack() as stack:
        stack.callback(attached.close)
        if os.isatty(0):
            attached.terminal = stack.enter_context(RawTerminal(0))
        if os.isatty(1):
            stack.callback(attached.restore_screen)
        with suppress(_LeftError):
            attached.run(greeting)
    print("[EOT]", file=sys.stderr)
    return 0


def _open(target: Target) -> tuple[socket.socket, Fields]:
    with Client() as client:
        client.send("console", target.fields())
        return opened(client)


class Attached:
    """A console's stream between standard input and output, over any number of reboots."""

    def __init__(self, stream: socket.socket, opened_as: Fields) -> None:
        """Take ownership of `stream`; `opened_as` is the daemon's answer."""
        self._stream = stream
        self._id: int = opened_as["id"]
        self._position: int = opened_as["position"]
        self._history: int = opened_as["history"]
        self._seen = 0
        self._parser = EscapeParser()
        self._reads_input = True
        self._state = TerminalState()
        self.terminal: RawTerminal | None = None
        """The user's, in raw mode; without one no input is an escape."""

    def close(self) -> None:
        """Close the stream."""
        self._stream.close()

    def restore_screen(self) -> None:
        """Undo the guest's changes to the terminal that shows it."""
        with suppress(OSError):  # it has hung up: no reader is left
            os.write(1, self._state.restore())

    def run(self, greeting: str) -> None:
        """Pass data on until the VM has ended; `greeting` goes to standard error.

        Raises:
            _LeftError: the person has left.
            OutputError: standard output cannot be written.
        """
        if self.terminal:
            # The latest output would scroll it out of sight.
            self._show_until(self._position + self._history)
            begin = "" if self._state.is_at_line_start else "\r\n"
            print(f"{begin}{greeting}\r", file=sys.stderr)
        else:
            print(greeting, file=sys.stderr)
        while True:
            self._pass_on()
            time.sleep(_REBOOT_S)
            try:
                stream, opened_as = _open(Target(id=self._id))
            except CommandError:
                return
            self._stream.close()
            self._stream = stream
            # This output is repeated: positions continue over a reboot.
            self._seen = max(0, self._position - opened_as["position"])
            self._position = max(self._position, opened_as["position"])

    def _show_until(self, position: int) -> None:
        """Show earlier output, to its last byte or the stream's end."""
        poll = select.poll()
        poll.register(self._stream, select.POLLIN)
        # Some may be lost by now, if the guest writes much: then do not wait for the end.
        while self._position < position and poll.poll(_HISTORY_MS):
            data = self._receive()
            if not data:
                return
            self._show(data)

    def _pass_on(self) -> None:
        """Serve one stream to its end."""
        poll = select.poll()
        poll.register(self._stream, select.POLLIN)
        if self._reads_input:
            poll.register(0, select.POLLIN)
        while True:
            for fd, _ in poll.poll():
                if fd == 0:
                    self._read_input()
                    if not self._reads_input:
                        poll.unregister(0)
                    continue
                data = self._receive()
                if not data:
                    return
                self._show(data)

    def _receive(self) -> bytes:
        try:
            return self._stream.recv(_PACKET_MAX)
        except ConnectionError:
            return b""

    def _show(self, data: bytes) -> None:
        seen = min(self._seen, len(data))
        self._seen -= seen
        data = data[seen:]
        self._position += len(data)
        self._state.note(data)
        view = memoryview(data)
        try:
            while view:
                view = view[os.write(1, view) :]
        except OSError as err:
            raise OutputError from err

    def _read_input(self) -> None:
        try:
            data = os.read(0, _TYPED_MAX)
        except OSError:  # a terminal that hung up, or no standard input that can be read
            data = b""
        if not data:
            self._reads_input = False
            if self.terminal:
                raise _LeftError
            return
        for part in self._parser.feed(data) if self.terminal else (data,):
            if isinstance(part, Escape):
                self._escape(part)
            else:
                self._send(_INPUT + part)

    def _send(self, packet: bytes) -> None:
        with suppress(ConnectionError):  # its end is found when it is read
            self._stream.send(packet)

    def _escape(self, escape: Escape) -> None:
        match escape:
            case Escape.POWER_OFF:
                raise _LeftError
            case Escape.BREAK:
                self._send(_BREAK)
            case Escape.SUSPEND:
                if self.terminal:
                    self.terminal.suspend()
            case Escape.HELP:
                text = ESCAPES.replace("power off and leave", "leave")
                sys.stderr.write("\r\n" + text.replace("\n", "\r\n"))
