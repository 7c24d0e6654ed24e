"""The client's end of the control protocol, without the library with which the daemon checks it.

A public interface: programs use `Client` and `Console`, as docs/client.md shows; the commands also
use `Client.ask`.

Requests and answers are dictionaries here: `docs/protocol.md` describes them, and tests check every
request of the commands by `vmd.wire.messages`. Importing those would cost three times as much as
the rest of a short command.
"""

import array
import errno
import json
import os
import socket
import time
from collections.abc import Mapping, Sequence

from vmctl.ports import await_guest
from vmd.shared.paths import client_socket
from vmm_kvm.limits import NAME_MAX
from vmm_kvm.record import Record

TYPE_CHECKING = False  # as in `vmm_kvm.record`
if TYPE_CHECKING:
    from typing import Any, Self

    Fields = dict[str, Any]  # type: ignore[explicit-any] # what JSON holds
else:
    Fields = dict
Shape = type | None | Sequence["Shape"] | Mapping[str, "Shape"]
"""The shape of a part of an answer: a type, None, one of several, or an object of fields."""

_MESSAGE_MAX = 256 << 10
_FDS_MAX = 64
_ID_MAX = 0xFFFF_FFFF

UNEXPECTED = "unexpected response received from vmd"
_INT_MIN = -128  # minus the number of a signal
_INT_MAX = (1 << 63) - 1
_TIME_MAX = 1e11
_NUMBER = (int, float)
_MOVED = dict.fromkeys(("index", "to_guest", "from_guest"), int)
_STATISTICS: Mapping[str, Shape] = {
    **dict.fromkeys(("cpu_ns", "disk_read", "disk_written", "net_received", "net_sent"), int),
    "disks": [_MOVED],
    "streams": [_MOVED],
    "exits": [{"reason": str, "count": int}],
    "guest_memory": (
        None,
        dict.fromkeys(
            ("total", "free", "available", "caches", "swapped_in", "swapped_out", "major_faults"),
            (int, None),
        ),
    ),
    "given_back": (int, None),
}
_INTERFACE: Mapping[str, Shape] = {
    **dict.fromkeys(("lladdr", "tap", "switch", "group", "problem"), str),
    **dict.fromkeys(("is_local", "is_locked", "is_up"), bool),
    **dict.fromkeys(("mtu", "queues", "received", "received_packets"), int),
    **dict.fromkeys(("sent", "sent_packets", "dropped"), int),
    "rdomain": (int, None),
    "host_addresses": [str],
    "guest_addresses": [str],
    "forwards": [{"protocol": str, "port": int, "to_port": int, "address": str}],
}
_END: Mapping[str, Shape] = {
    **dict.fromkeys(("reason", "message"), str),
    "at": _NUMBER,
    "exit": (int, None),
}
_VM: Mapping[str, Shape] = {
    **dict.fromkeys(("id", "cpus", "memory", "uid"), int),
    **dict.fromkeys(("memory_used", "pid", "gid"), (int, None)),
    **dict.fromkeys(("name", "state", "tty", "pause_reason", "clone_of"), str),
    "after": [str],
    **dict.fromkeys(("is_from_config", "is_template"), bool),
    "started_at": (*_NUMBER, None),
    "last_end": (_END, None),
    "disks": [
        {"path": str, "format": str, "is_read_only": bool, "is_snapshot": bool, "serial": str}
    ],
    **dict.fromkeys(("boot", "cdrom"), str),
    "append": (str, None),
    "statistics": (_STATISTICS, None),
    "interfaces": [_INTERFACE],
}
SHAPES: Mapping[str, Mapping[str, Shape]] = {
    "done": {"id": int},
    "failed": {"code": str, "message": str, "lines": [str]},
    "started": {"id": int, "pid": int, "tty": str},
    "cloned": {
        "vms": [
            {
                **dict.fromkeys(("name", "tty", "code", "message"), str),
                **dict.fromkeys(("id", "pid"), int),
            }
        ]
    },
    "terminated": {"id": int},
    "console-opened": {"id": int, "tty": str, "position": int, "history": int},
    "connected": {"id": int},
    "vms": {"vms": [_VM], "has_more": bool},
    "source-is": {"path": str, "directory": str},
    "snapshot-list": {"snapshots": [{"name": str, "created_at": _NUMBER, "size": int}]},
    "snapshot-opened": {"file": int},
    "lines": {"lines": [{"at": _NUMBER, "text": str}], "position": int},
    "totals": {
        **dict.fromkeys(("starts", "failed_starts"), int),
        "start_seconds": _NUMBER,
        "start_bounds": [_NUMBER],
        "start_counts": [int],
    },
    "event": {"kind": str, "id": int, "name": str, "at": _NUMBER, "message": str},
}
"""The parts of each answer that commands rely on, by its type; a list of one shape is a list of
such parts."""

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
    """The daemon refused a request."""

    def __init__(self, code: str, detail: str) -> None:
        """Remember the protocol's `code`, and why in `detail`, which may be empty."""
        super().__init__(f"{text_of(code)}\n{detail}" if detail else text_of(code))
        self.code = code
        self.detail = detail


class Target(Record):
    """A VM named on a command line: by its id, or if that is 0 by its name."""

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
    if len(word) > NAME_MAX:
        raise CommandError(f"name too long\ninvalid id: {word}")
    return Target(name=word)


def text_of(code: str) -> str:
    """Return the text for users of the protocol's `code`."""
    number = getattr(errno, code, None)
    return _TEXTS.get(code) or (os.strerror(number) if isinstance(number, int) else code)


class Client:
    """A connection to the daemon; a context manager that closes it."""

    def __init__(self, path: str | None = None) -> None:
        """Connect to the socket at `path`, by default the commands'.

        Raises:
            CommandError: no daemon listens, or it does not let this user in.
        """
        path = path or client_socket(os.environ)
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._serial = 0
        try:
            self._socket.connect(path)
        except OSError as err:
            self._socket.close()
            from vmctl.advice import advice  # noqa: PLC0415 - only where there is none

            lines = (f"connect: {path}: {err.strerror or err}", *advice(path, err))
            raise CommandError("\n".join(lines)) from err

    def __enter__(self) -> "Self":
        return self

    def __exit__(self, *exc: object) -> None:
        self._socket.close()

    def fileno(self) -> int:
        """Return the descriptor, to wait for."""
        return self._socket.fileno()

    def ask(
        self,
        kind: str,
        expected: str,
        fields: Mapping[str, object] | None = None,
        fds: Sequence[int] = (),
    ) -> Fields:
        """Send a request and wait for its answer; `fds` stay the caller's.

        Args:
            kind: of request.
            expected: kinds of answer that the caller understands, with spaces between them.
            fields: of the request.
            fds: descriptors that go along.

        Raises:
            RefusedError: the answer is that it failed.
            CommandError: there is no answer, or an unexpected one.
        """
        self.send(kind, fields, fds)
        answer, received = self.receive(expected)
        for fd in received:
            os.close(fd)
        return answer

    def send(
        self, kind: str, fields: Mapping[str, object] | None = None, fds: Sequence[int] = ()
    ) -> None:
        """Send a request; see `ask`."""
        self._serial += 1
        message = {"type": kind, "serial": self._serial, **(fields or {})}
        try:
            data = json.dumps(message, ensure_ascii=False).encode()
        except UnicodeEncodeError as err:
            raise CommandError(f"not UTF-8: {_word_around(err)}") from None
        ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        try:
            self._socket.sendmsg([data], ancillary)
        except OSError as err:
            raise CommandError(f"write error: {err.strerror}") from err

    def receive(self, expected: str) -> tuple[Fields, list[int]]:
        """Wait for an answer or event; returns it, and descriptors, which are the caller's.

        Raises:
            RefusedError, CommandError: as `ask`.
        """
        try:
            data, ancillary, flags, _ = self._socket.recvmsg(
                _MESSAGE_MAX, socket.CMSG_SPACE(4 * _FDS_MAX), socket.MSG_CMSG_CLOEXEC
            )
        except OSError as err:
            raise CommandError(f"read error: {err.strerror}") from err
        fds = array.array("i")
        for _, _, block in ancillary:
            fds.frombytes(block)
        try:
            if flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC):
                raise CommandError(UNEXPECTED)  # noqa: TRY301 - the descriptors are to be closed
            return _understood(data, expected), fds.tolist()
        except CommandError:
            for fd in fds:
                os.close(fd)
            raise

    def vms(self, **wanted: bool) -> list[Fields]:
        """Return all VMs, in the daemon's order; `wanted` are fields of the request."""
        answer = self.ask("status", "vms", wanted)
        vms: list[Fields] = answer["vms"]
        while answer["has_more"]:
            answer, fds = self.receive("vms")
            for fd in fds:
                os.close(fd)
            vms += answer["vms"]
        return vms

    # For programs; docs/client.md shows how.

    def list(self) -> "list[Vm]":
        """Return all VMs, in the order of `vmctl status`.

        Raises:
            CommandError: the daemon is gone, as of each of these methods.
        """
        return [_vm(fields) for fields in self.vms()]

    def vm(self, name: int | str) -> "Vm | None":
        """Return the VM of this id or name; None if there is none."""
        answer = self.ask("status", "vms", _named(name))
        return next(map(_vm, answer["vms"]), None)

    def start(
        self,
        name: int | str,
        *,
        boot: str | None = None,
        disks: Sequence[str] = (),
        template: str = "",
        **fields: object,
    ) -> "Started":
        """Start an existing VM; with options a new one, which is forgotten when it ends.

        Args:
            name: its id or name.
            boot: path of a kernel or firmware image.
            disks: paths of images.
            template: the VM of which to make an instance.
            fields: others of the protocol's request `start`, such as `memory`, in bytes, `cpus`,
                `append` or `interfaces`.

        Raises:
            RefusedError: it cannot start; `code` says why.
            OSError: the boot image cannot be opened.
        """
        from vmm_kvm.absolute import absolute  # noqa: PLC0415 - only here

        wanted = {**_named(name), **fields}
        if disks:
            wanted["disks"] = [{"path": absolute(path)} for path in disks]
        if template:
            wanted["instance"] = template
        if boot is None:
            return _started(self.ask("start", "started", wanted))
        fd = os.open(boot, os.O_RDONLY | os.O_CLOEXEC)
        try:
            wanted |= {"kernel": 0, "kernel_path": absolute(boot)}
            return _started(self.ask("start", "started", wanted, [fd]))
        finally:
            os.close(fd)

    def stop(self, name: int | str, *, force: bool = False, wait: bool = True) -> None:
        """Ask the guest to power off, or with `force` kill it; `wait` until it has ended.

        Raises:
            RefusedError: it does not run, or is not the user's.
        """
        expected = "terminated" if wait else "done terminated"
        self.ask("stop", expected, {**_named(name), "force": force, "wait": wait})

    def wait(self, name: int | str) -> None:
        """Wait until a VM ends or reboots.

        Raises:
            RefusedError: it does not run, or is not the user's.
        """
        self.ask("wait", "terminated", _named(name))

    def pause(self, name: int | str) -> None:
        """Pause a VM.

        Raises:
            RefusedError: it does not run, or is not the user's.
        """
        self.ask("pause", "done", _named(name))

    def unpause(self, name: int | str) -> None:
        """Let a paused VM continue.

        Raises:
            RefusedError: it is not paused, or is not the user's.
        """
        self.ask("unpause", "done", _named(name))

    def connect(self, name: int | str, port: int, timeout: float | None = None) -> socket.socket:
        """Connect to a port of a VM's guest, by its vsock device; the caller closes the stream.

        Args:
            name: the VM's name, or its id.
            port: 0 to 4294967294.
            timeout: seconds for the guest to accept; None waits as long as it takes.

        Raises:
            TimeoutError: the guest does not answer.
            RefusedError: the VM does not run, has no vsock device, or is another user's.
            CommandError: the guest refuses: nothing listens there, or it has no driver yet.
        """
        self.send("connect", {**_named(name), "port": port})
        stream, _answer = opened(self, "connected")
        try:
            await_guest(stream, timeout)
        except TimeoutError:
            stream.close()
            raise TimeoutError(f"port {port}: the guest does not answer") from None
        except OSError:
            stream.close()
            raise CommandError(f"port {port}: connection refused") from None
        return stream

    def console(self, name: int | str) -> "Console":
        """Attach to a VM's console, which first repeats its latest output.

        Raises:
            RefusedError: it does not run, or is not the user's.
        """
        self.send("console", _named(name))
        return Console(opened(self)[0])


class Vm(Record):
    """A VM, as `vmctl status` shows it; `Client.vms` has all of it."""

    id: int
    name: str
    state: str
    """`stopped`, `waiting`, `running`, `paused`, `stopping` and other words of the daemon."""
    cpus: int
    memory: int
    """Bytes."""
    memory_used: int | None
    """Bytes of the host's memory; None unless it runs."""
    pid: int | None
    """Of its process; None unless it runs."""
    tty: str
    """Path of its console; empty unless it runs."""


class Started(Record):
    """A VM that has been started."""

    id: int
    pid: int
    tty: str
    """Path of its console."""


class Console:
    """A VM's console; a context manager that closes it."""

    def __init__(self, stream: socket.socket) -> None:
        """Take ownership of `stream`."""
        self._stream = stream
        self.shown = b""
        """All output that no `expect` has used up."""

    def __enter__(self) -> "Self":
        return self

    def __exit__(self, *exc: object) -> None:
        self._stream.close()

    def read(self, timeout: float | None = None) -> bytes:
        """Return the next output; empty when the VM has ended.

        Args:
            timeout: seconds; None waits as long as it takes.

        Raises:
            TimeoutError: nothing came.
        """
        self._stream.settimeout(timeout)
        try:
            data = self._stream.recv(_MESSAGE_MAX)
        except ConnectionError:
            return b""
        self.shown += data
        return data

    def expect(self, text: str, timeout: float | None = None) -> str:
        """Wait until `text` is shown; use up and return the output up to its end.

        Args:
            text: what to wait for.
            timeout: seconds in all; None waits as long as it takes.

        Raises:
            TimeoutError: it has not come.
            CommandError: the VM has ended.
        """
        wanted = text.encode()
        end = None if timeout is None else time.monotonic() + timeout
        while wanted not in self.shown:
            left = None if end is None else end - time.monotonic()
            if left is not None and left <= 0:
                raise TimeoutError(f"the console has not shown {text!r}")
            try:
                data = self.read(left)
            except TimeoutError:
                continue
            if not data:
                raise CommandError("the console has ended")
        until = self.shown.index(wanted) + len(wanted)
        found, self.shown = self.shown[:until], self.shown[until:]
        return found.decode(errors="replace")

    def write(self, text: str) -> None:
        """Type `text`.

        Raises:
            OSError: the VM has ended.
        """
        self._stream.settimeout(None)
        self._stream.send(b"\0" + text.encode())


def _named(name: int | str) -> Fields:
    """Return how a request names a VM."""
    return {"id": name} if isinstance(name, int) else {"name": name}


def _vm(fields: Fields) -> Vm:
    return Vm(**{name: fields[name] for name in Vm.__annotations__})


def _started(answer: Fields) -> Started:
    return Started(id=answer["id"], pid=answer["pid"], tty=answer["tty"])


def opened(client: Client, expected: str = "console-opened") -> tuple[socket.socket, Fields]:
    """Receive the answer to a request for a console, or another stream; returns both.

    Raises:
        RefusedError, CommandError: as `Client.ask`.
    """
    answer, fds = client.receive(expected)
    if len(fds) != 1:
        for fd in fds:
            os.close(fd)
        raise CommandError(UNEXPECTED)
    return socket.socket(fileno=fds[0]), answer


def _understood(data: bytes, expected: str) -> Fields:
    """Return what an answer says.

    Raises:
        RefusedError: that the request failed.
        CommandError: nothing, or nothing that is expected.
    """
    if not data:
        raise CommandError("pipe closed")
    try:
        answer: Fields = json.loads(data)
    except (ValueError, RecursionError):
        answer = {}
    kind = answer.get("type") if isinstance(answer, dict) else None
    if kind not in (*expected.split(), "failed") or not fits(answer, SHAPES[str(kind)]):
        raise CommandError(UNEXPECTED)
    if kind == "failed":
        raise RefusedError(answer["code"], "\n".join((answer["message"], *answer["lines"])))
    return answer


def fits(value: object, shape: Shape) -> bool:
    """Tell whether a part of an answer has this `shape`, and printable numbers."""
    if shape is None:
        return value is None
    if shape is int:
        return type(value) is int and _INT_MIN <= value <= _INT_MAX
    if shape is float:
        return type(value) is float and 0 <= value <= _TIME_MAX
    if isinstance(shape, type):
        return type(value) is shape
    if isinstance(shape, Mapping):
        return isinstance(value, dict) and all(
            name in value and fits(value[name], part) for name, part in shape.items()
        )
    if isinstance(shape, list):
        return isinstance(value, list) and all(fits(one, shape[0]) for one in value)
    return any(fits(value, one) for one in shape)


def _word_around(err: UnicodeEncodeError) -> str:
    """Return the string of a JSON text that has what cannot be encoded."""
    text = str(err.object)
    return text[text.rfind('"', 0, err.start) + 1 : text.find('"', err.start)]


def check_name(name: str) -> None:
    """Refuse what no VM can be called.

    Raises:
        CommandError: in OpenBSD's words.

    Source: section 2.3 of OpenBSD's behaviour.
    """
    if len(name) > NAME_MAX:
        raise CommandError("vm name too long")
    plain = name.replace(".", "").replace("_", "").replace("-", "")
    if name[:1] in {"", ".", "_", "-"} or not (plain.isascii() and plain.isalnum()):
        raise CommandError("invalid VM name")
