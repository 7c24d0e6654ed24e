"""The vsock device of `vmctl run`: a socket in the file system leads to the guest's ports.

The protocol is Firecracker's, which other programs speak too. A client writes `CONNECT 22` and a
newline, and reads `OK ` and a number once the guest has accepted; if the guest refuses, the
connection ends. If the guest connects to the host's port 1234, the device connects to the socket
with `_1234` behind its name.
"""

import socket
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import NamedTuple

from vmm_kvm.accepting import Acceptor
from vmm_kvm.clock import NANOSECONDS
from vmm_kvm.errors import SpecError
from vmm_kvm.limits import CID_MAX, CID_MIN, GUEST_PORT_MAX
from vmm_kvm.listening import listen
from vmm_kvm.loop import EventLoop, LoopTimer
from vmm_kvm.net.host_stream import HostStream
from vmm_kvm.virtio.vsock import VsockSpec

PATIENCE_NS = 10 * NANOSECONDS
"""How long a client may take to name a port."""
CLIENTS_MAX = 64
"""Clients at once that have not named one yet."""

AUTO = "auto"
"""For VMs of the daemon, which need no socket."""
_LINE_MAX = 32
_WORD = b"CONNECT"

Connect = Callable[[HostStream, int], None]


class VsockListener:
    """The socket that leads to a guest's ports. On the event loop's thread; owns the socket."""

    def __init__(self, path: str, loop: EventLoop, connect: Connect) -> None:
        """Listen at `path`, to which this user alone may connect.

        Each client that says a port is handed to `connect`, which owns it then.

        Raises:
            SpecError: it cannot be done, or something is there.
        """
        self._path = path
        self._loop = loop
        self._connect = connect
        self._clients: dict[int, tuple[socket.socket, bytearray, LoopTimer]] = {}
        try:
            self._socket = listen(
                path, socket.SOCK_STREAM, mode=0o600, backlog=CLIENTS_MAX, server="VM"
            )
        except OSError as err:
            raise SpecError(f"{path}: {err.strerror or err}") from err
        self._inode = Path(path).stat().st_ino
        self._socket.setblocking(False)
        self._acceptor = Acceptor(loop, self._socket, self._begin)
        self._acceptor.start()

    def close(self) -> None:
        """Remove the socket, and send clients away."""
        self._acceptor.stop()
        for fd in list(self._clients):
            self._forget(fd).close()
        self._socket.close()
        with suppress(OSError):  # it has been removed, or will have to be
            path = Path(self._path)
            if path.stat().st_ino == self._inode:
                path.unlink()

    def _begin(self, client: socket.socket) -> None:
        client.setblocking(False)
        fd = client.fileno()
        if len(self._clients) >= CLIENTS_MAX:
            client.close()
            return
        timer = self._loop.timer(lambda: self._forget(fd).close())
        timer.arm(self._loop.monotonic_ns() + PATIENCE_NS)
        self._clients[fd] = client, bytearray(), timer
        self._loop.add_reader(fd, lambda: self._read(fd))

    def _forget(self, fd: int) -> socket.socket:
        client, _line, timer = self._clients.pop(fd)
        timer.cancel()
        self._loop.remove_reader(fd)
        self._acceptor.has_room()
        return client

    def _read(self, fd: int) -> None:
        """Read the client's line, and not a byte more: the rest belongs to the guest."""
        client, line, _timer = self._clients[fd]
        while not line.endswith(b"\n"):
            try:
                byte = client.recv(1)
            except BlockingIOError:
                return
            except OSError:
                byte = b""
            line += byte
            if not byte or len(line) > _LINE_MAX:
                self._forget(fd).close()
                return
        port = _port_of(bytes(line))
        client = self._forget(fd)
        if port is None:
            client.close()
        else:
            self._connect(HostStream(client), port)


def _port_of(line: bytes) -> int | None:
    """Return the port that a client's line says; None if it says none."""
    words = line.split()
    if len(words) != 2 or words[0].upper() != _WORD or not words[1].isdigit():
        return None
    port = int(words[1])
    return port if port <= GUEST_PORT_MAX else None


def dial(path: str, port: int) -> HostStream | None:
    """Connect to what listens for the host's `port`; None if nothing does. Any thread."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        sock.setblocking(False)
        sock.connect(f"{path}_{port}")
    except OSError:
        sock.close()
        return None
    return HostStream(sock)


class VsockOption(NamedTuple):
    """The value of `--vsock`."""

    path: str
    cid: int = CID_MIN

    def spec(self) -> VsockSpec:
        """Return the device."""
        return VsockSpec(self.cid, partial(dial, self.path))


def read_option(text: str) -> VsockOption:
    """Return what `--vsock` says.

    Raises:
        SpecError: it says nothing that can be.
    """
    if text == AUTO:
        raise SpecError(f"--vsock {AUTO} is for start: run needs a socket's path")
    path, comma, number = text.rpartition(",cid=")
    if not comma:
        path, number = text, str(CID_MIN)
    if not path:
        raise SpecError(f"invalid vsock: {text}: a socket's path comes first")
    if not (number.isascii() and number.isdigit() and CID_MIN <= int(number) <= CID_MAX):
        raise SpecError(f"invalid vsock: {text}: the cid is {CID_MIN} to {CID_MAX}")
    return VsockOption(path, int(number))
