"""`vmctl gdb`: GDB on this terminal, joined to a VM of the daemon.

gdb starts this command again, with --stdio, as the other end of its remote protocol.
"""

import os
import shlex
import sys
from collections.abc import Sequence
from select import POLLIN, poll
from typing import TYPE_CHECKING

from vmctl.client import Client, CommandError, opened, parse_target
from vmctl.messages import fail
from vmctl.signals import cleaning_up

if TYPE_CHECKING:
    import socket

_READ_SIZE = 32 << 10
_WHY_STOPPED = b"$?#3f"
_TIMEOUT_S = 10.0


def gdb(words: Sequence[str], *, stdio: bool = False) -> int:
    """Debug a VM's guest; returns the exit status, unless gdb takes this process over."""
    name, *arguments = words
    try:
        stream = _open(name)
    except CommandError as err:
        return fail(err)
    with stream:
        if stdio:
            with cleaning_up():
                return _relay(stream)
        if not _is_served(stream):
            return fail(f"{name}: another debugger is attached")
    # This was to know that gdb will be let in; the VM has gone on.
    ours = shlex.join([sys.argv[0], "gdb", "--stdio", name])
    try:
        os.execvp("gdb", ["gdb", "-ex", f"target remote | {ours}", *arguments])  # noqa: S606 - no shell
    except FileNotFoundError:
        return fail("gdb: not found: install it")
    except OSError as err:
        return fail(f"gdb: {err.strerror}")


def _open(name: str) -> "socket.socket":
    with Client() as client:
        client.send("debug", parse_target(name).fields())
        return opened(client, "connected")[0]


def _is_served(stream: "socket.socket") -> bool:
    """Tell whether the VM answers; it ends the connection if it has a debugger already.

    One that does not answer in time may still do so: gdb waits longer.
    """
    stream.settimeout(_TIMEOUT_S)
    try:
        stream.sendall(_WHY_STOPPED)
        return bool(stream.recv(_READ_SIZE))
    except TimeoutError:
        return True
    except OSError:
        return False


def _relay(stream: "socket.socket") -> int:
    """Pass bytes between gdb and the VM until either ends."""
    waiting = poll()
    waiting.register(0, POLLIN)
    waiting.register(stream, POLLIN)
    while True:
        for fd, _ in waiting.poll():
            try:
                data = os.read(fd, _READ_SIZE)
                if not data:
                    return 0
                if fd == 0:
                    stream.sendall(data)
                else:
                    _write(data)
            except OSError:  # the VM has ended, or gdb
                return 0


def _write(data: bytes) -> None:
    while data:
        data = data[os.write(1, data) :]
