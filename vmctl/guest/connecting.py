"""`vmctl connect`, `ssh` and `ssh-config`: a guest's ports, without an address or a network.

A port is first one of the guest's vsock device, where systemd has sshd listen; if nobody does, it
is a TCP port of the guest's loopback address, which the guest's agent connects to.
"""

import os
import re
import select
import shlex
import shutil
import socket
import stat
import sys
from collections.abc import Sequence
from contextlib import suppress

from vmctl.client import Client, CommandError, parse_target
from vmctl.guest.access import NobodyListensError, agent_of, connect_port
from vmctl.guest.agent import AgentRefusedError, Session
from vmctl.guest.frames import PIECE, Kind
from vmctl.messages import fail
from vmctl.signals import cleaning_up
from vmm_kvm.standard_streams import OutputError

EXIT_NO_CONNECTION = 255
_EXIT_NOT_FOUND = 127
_SSH_PORT = 22
_TCP_PORT_MAX = 0xFFFF
_PIPE_BUF = 4096
"""poll promises this much room: a write of this size never blocks."""
_FILE_WRITE = 64 << 10
_USER = "root"
_NOT_FOR_A_NAME = re.compile(r"[^A-Za-z0-9._-]+")


def connect(words: Sequence[str]) -> int:
    """Be standard input and output of a guest's port; returns the exit status."""
    word, text = words
    try:
        port = _port(text)
    except CommandError as err:
        return fail(err)
    try:
        with cleaning_up():
            try:
                stream = connect_port(word, port)
            except NobodyListensError as err:
                if port > _TCP_PORT_MAX:
                    raise
                _by_agent(word, port, err)
            else:
                with stream:
                    _Raw(stream).run()
    except CommandError as err:
        fail(err)
        return EXIT_NO_CONNECTION
    return 0


def _port(text: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) < 11 and 0 < int(text) < (1 << 32) - 1):
        raise CommandError(f"invalid port: {text}")
    return int(text)


def _by_agent(word: str, port: int, problem: CommandError) -> None:
    """Join the agent's connection to a TCP port; `problem` is why it is not one by vsock."""
    try:
        session = agent_of(word).open("connect", None, port=port)
    except AgentRefusedError as err:
        if err.code == "unknown":
            raise CommandError(f"{problem} (the agent in the guest cannot connect to TCP)") from err
        raise CommandError(f"by vsock and by TCP: {err}") from None
    except CommandError as err:
        raise CommandError(f"{problem}, and {err}") from None
    with session:
        _Joined(session).run()


class _Output:
    """Standard output, which is written only as far as that does not block."""

    def __init__(self) -> None:
        self.size = _FILE_WRITE if stat.S_ISREG(os.fstat(1).st_mode) else _PIPE_BUF

    def write(self, data: bytes | memoryview) -> int:
        try:
            return os.write(1, data[: self.size])
        except BlockingIOError:  # another program made a shared descriptor non-blocking
            return 0
        except OSError as err:
            raise OutputError from err


def _read_input(size: int) -> bytes | None:
    """Return available bytes of standard input, none at its end; None if there are none yet."""
    try:
        return os.read(0, size)
    except BlockingIOError:
        return None
    except OSError:  # no standard input that can be read
        return b""


class _Raw:
    """A stream, joined to standard input and output."""

    def __init__(self, stream: socket.socket) -> None:
        """Use `stream`, which stays the caller's."""
        stream.setblocking(False)
        self._stream = stream
        self._output = _Output()
        self._to_guest = b""
        self._from_guest = b""
        self._reads_input = True

    def run(self) -> None:
        """Pass data on until the guest has ended the stream, and all is written."""
        own = self._stream.fileno()
        is_over = False
        while not is_over or self._from_guest:
            poll = select.poll()
            events = 0 if self._from_guest or is_over else select.POLLIN
            events |= select.POLLOUT if self._to_guest else 0
            if events:
                poll.register(own, events)
            if self._from_guest:
                poll.register(1, select.POLLOUT)
            if self._reads_input and not self._to_guest and not is_over:
                poll.register(0, select.POLLIN)
            ready = {fd for fd, _ in poll.poll()}
            if 0 in ready:
                self._read()
            if self._to_guest:
                self._send()
            if 1 in ready:
                self._from_guest = self._from_guest[self._output.write(self._from_guest) :]
            elif own in ready and not self._from_guest:
                is_over = not self._receive()

    def _read(self) -> None:
        data = _read_input(PIECE)
        if data:
            self._to_guest = data
        elif data is not None:
            self._reads_input = False
            with suppress(OSError):  # it has ended
                self._stream.shutdown(socket.SHUT_WR)

    def _send(self) -> None:
        try:
            self._to_guest = self._to_guest[self._stream.send(self._to_guest) :]
        except BlockingIOError:
            return
        except OSError:  # there is no reader; the end is found when it is read
            self._to_guest = b""

    def _receive(self) -> bool:
        try:
            self._from_guest = self._stream.recv(_FILE_WRITE)
        except BlockingIOError:
            return True
        except OSError:
            return False
        return bool(self._from_guest)


class _Joined:
    """An operation of the agent's, joined to standard input and output."""

    def __init__(self, session: Session) -> None:
        """Use `session`, which stays the caller's."""
        self._session = session
        self._output = _Output()
        self._reads_input = True

    def run(self) -> None:
        """Pass data on until the agent has said that it was all.

        Raises:
            CommandError: the connection breaks.
        """
        session = self._session
        while session.result is None or session.arrived(Kind.OUTPUT):
            wanted = {1: select.POLLOUT} if session.arrived(Kind.OUTPUT) else {}
            if session.result is None and self._reads_input and session.room:
                wanted[0] = select.POLLIN
            ready = session.wait(wanted)
            if 0 in ready:
                self._read()
            if 1 in ready:
                data = session.peek(Kind.OUTPUT, self._output.size)
                session.take(Kind.OUTPUT, self._output.write(data))

    def _read(self) -> None:
        data = _read_input(min(PIECE, self._session.room))
        if data:
            self._session.feed(data)
        elif data is not None:
            self._reads_input = False
            self._session.end_input()


# ssh


def ssh(
    words: Sequence[str],
    *,
    identity: Sequence[str] = (),
    user: str | None = None,
    port: str | None = None,
    options: Sequence[str] = (),
    command: str = "ssh",
) -> int:
    """Log in to a guest by ssh; returns the exit status, which is that of ssh."""
    word, *remote = words
    before, at, name = word.rpartition("@")
    if at and "/" not in before:
        word, user = name, user or before
    try:
        _check(word)
        number = _port(port) if port is not None else _SSH_PORT
        program = shlex.split(command)
    except (CommandError, ValueError) as err:
        return fail(err)
    settings = [*options, *(f"{name}={value}" for name, value in _settings(word))]
    arguments = [
        *(part for one in identity for part in ("-i", one)),
        *("-l", user or _USER, "-p", str(number)),
        *(part for one in settings for part in ("-o", one)),
        *("--", _alias(word), *remote),
    ]
    if program and shutil.which(program[0]):
        os.execvp(program[0], [*program, *arguments])  # noqa: S606 - the user's own command
    fail(f"{command}: not found")
    return _EXIT_NOT_FOUND


def show_config(words: Sequence[str]) -> int:
    """Print what ssh_config(5) has to have for a VM, or for each; returns the exit status."""
    try:
        if words:
            names = list(words)
        else:
            with Client() as client:
                names = [vm["name"] for vm in client.vms()]
        for name in names:
            _check(name)
        blocks = [_block(name) for name in names]
    except CommandError as err:
        return fail(err)
    print("\n\n".join(blocks))
    return 0


def _block(word: str) -> str:
    lines = [f"Host {_alias(word)}", f"    User {_USER}"]
    lines += [f"    {name} {value}" for name, value in _settings(word)]
    return "\n".join(lines)


def _check(word: str) -> None:
    if "/" in word:
        if not word.isprintable():
            raise CommandError("ssh takes no such path of a socket")
        return
    target = parse_target(word)
    if target.name and _NOT_FOR_A_NAME.search(word):
        raise CommandError(f"invalid name: {word}")


def _settings(word: str) -> list[tuple[str, str]]:
    """Return the options of ssh that lead to a VM. The first of a name counts, for ssh."""
    if "/" in word:
        word = os.path.abspath(word)
    proxy = " ".join((*map(shlex.quote, (*_ourselves(), "connect", "--", word)), "%p"))
    return [
        ("ProxyCommand", proxy.replace("%", "%%").removesuffix("%%p") + "%p"),
        ("HostKeyAlias", _alias(word)),
        ("UserKnownHostsFile", _quoted(_known_hosts())),
        ("StrictHostKeyChecking", "accept-new"),
        ("CheckHostIP", "no"),
    ]


def _quoted(path: str) -> str:
    path = path.replace("%", "%%")
    return f'"{path}"' if " " in path else path


def _alias(word: str) -> str:
    """Return by which name ssh knows a VM."""
    return _NOT_FOR_A_NAME.sub("_", word).lstrip("_") if "/" in word else word


def _ourselves() -> list[str]:
    """Return the words that run this program."""
    program = os.path.abspath(sys.argv[0])
    if os.path.basename(program) == "vmctl" and os.access(program, os.X_OK):
        return [program]
    return [sys.executable, "-m", "vmctl"]


def _known_hosts() -> str:
    """Return the file of the keys of guests; its directory is made."""
    base = os.environ.get("XDG_STATE_HOME", "")
    base = base if os.path.isabs(base) else os.path.expanduser("~/.local/state")
    folder = os.path.join(base, "vmm-kvm")
    with suppress(OSError):  # then ssh asks, and says so
        os.makedirs(folder, mode=0o700, exist_ok=True)
    return os.path.join(folder, "known_hosts")
