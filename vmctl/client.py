"""The client's end of the control protocol, without the library that the daemon checks it with.

Requests and answers are dictionaries here: `docs/protocol.md` says what is in them, and tests hold
every request of the commands against `vmd.wire.messages`. Importing those would cost three times
all else that a short command does.
"""

import array
import errno
import json
import os
import socket
import sys
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Self

from vmd.shared.paths import SYSTEM_SOCKET, user_socket

Fields = dict[str, Any]  # type: ignore[explicit-any] # what JSON holds

_MESSAGE_MAX = 256 << 10
_FDS_MAX = 64
_ID_MAX = 0xFFFF_FFFF
_NAME_MAX = 63

_TEXTS = {
    "bios-missing": "vmm bios firmware file not found.",
    "disk-missing": "could not open disk image(s)",
    "cdrom-missing": "could not find specified iso image",
    "cdrom-invalid": "specified iso image is not a regular file",
    "template-invalid": "invalid template",
    "not-running": "vm is not running",
    "command-failed": "command failed",
    "version": "vmd speaks another version of the protocol",
    "EPROCLIM": "Too many processes",
}


class CommandError(Exception):
    """The command has failed; `str()` is one line, or several, for standard error."""


class RefusedError(CommandError):
    """The daemon does not do what it was asked."""

    def __init__(self, code: str, detail: str) -> None:
        """Remember the protocol's `code`, and why in `detail`, which may be empty."""
        super().__init__(f"{text_of(code)}\n{detail}" if detail else text_of(code))
        self.code = code
        self.detail = detail


class Target(NamedTuple):
    """A VM as it is named on a command line: by its id, or where that is 0 by its name."""

    id: int = 0
    name: str = ""

    def fields(self) -> Fields:
        """Return it as a request has it."""
        return {"id": self.id} if self.id else {"name": self.name}

    def is_named_by(self, vm: Mapping[str, object]) -> bool:
        """Tell whether it is this VM, of an answer."""
        return vm["id"] == self.id or vm["name"] == self.name


def parse_target(word: str) -> Target:
    """Read an id or a name.

    Raises:
        CommandError: it can be neither.

    Source: section 3.2 of OpenBSD's behaviour.
    """
    if word.isascii() and word.isdecimal() and int(word) <= _ID_MAX:
        return Target(id=int(word))
    if not word:
        raise CommandError(f"missing vmid argument\ninvalid id: {word}")
    if word.startswith("-"):
        raise CommandError(f"invalid id: {word}")
    if len(word) > _NAME_MAX:
        raise CommandError(f"name too long\ninvalid id: {word}")
    return Target(name=word)


def text_of(code: str) -> str:
    """Return what a user reads for the protocol's `code`."""
    number = getattr(errno, code, None)
    return _TEXTS.get(code) or (os.strerror(number) if number else code)


def socket_path() -> str:
    """Return where the daemon listens: by VMD_SOCKET, else the user's own if it is there."""
    path = os.environ.get("VMD_SOCKET")
    if path:
        return path
    own = user_socket(os.environ) if os.getuid() else None
    return own if own and os.path.exists(own) else SYSTEM_SOCKET


class Client:
    """A connection to the daemon; a context manager that closes it."""

    def __init__(self) -> None:
        """Connect.

        Raises:
            CommandError: nobody listens, or does not let this user in.
        """
        path = socket_path()
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._serial = 0
        try:
            self._socket.connect(path)
        except OSError as err:
            self._socket.close()
            raise CommandError(f"connect: {path}: {err.strerror}") from err

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self._socket.close()

    def fileno(self) -> int:
        """Return the descriptor, to wait for."""
        return self._socket.fileno()

    def ask(
        self, kind: str, fields: Mapping[str, object] | None = None, fds: Sequence[int] = ()
    ) -> Fields:
        """Send a request and wait for its answer; `fds` stay the caller's.

        Raises:
            RefusedError: the answer is that it failed.
            CommandError: there is no answer.
        """
        self.send(kind, fields, fds)
        answer, received = self.receive()
        for fd in received:
            os.close(fd)
        return answer

    def send(
        self, kind: str, fields: Mapping[str, object] | None = None, fds: Sequence[int] = ()
    ) -> None:
        """Send a request; see `ask`."""
        self._serial += 1
        data = json.dumps({"type": kind, "serial": self._serial, **(fields or {})}).encode()
        ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        try:
            self._socket.sendmsg([data], ancillary)
        except OSError as err:
            raise CommandError(f"write error: {err.strerror}") from err

    def receive(self) -> tuple[Fields, list[int]]:
        """Wait for an answer or event; returns what came, and descriptors, which are the caller's.

        Raises:
            RefusedError, CommandError: as `ask`.
        """
        try:
            data, ancillary, _, _ = self._socket.recvmsg(
                _MESSAGE_MAX, socket.CMSG_SPACE(4 * _FDS_MAX), socket.MSG_CMSG_CLOEXEC
            )
        except OSError as err:
            raise CommandError(f"read error: {err.strerror}") from err
        fds = array.array("i")
        for _, _, block in ancillary:
            fds.frombytes(block)
        if not data:
            raise CommandError("pipe closed")
        answer: Fields = json.loads(data)
        if answer.get("type") == "failed":
            raise RefusedError(answer["code"], answer["message"])
        return answer, fds.tolist()

    def vms(self, **wanted: bool) -> list[Fields]:
        """Return all VMs, in the daemon's order; `wanted` are fields of the request."""
        answer = self.ask("status", wanted)
        vms: list[Fields] = answer["vms"]
        while answer["has_more"]:
            answer, _ = self.receive()
            vms += answer["vms"]
        return vms


def fail(problem: object) -> int:
    """Say what is wrong, each line in the command's name; returns the exit status."""
    for line in str(problem).splitlines():
        print(f"vmctl: {line}", file=sys.stderr)
    return 1
