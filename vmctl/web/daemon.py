"""A connection to the control socket, for asyncio.

asyncio's streams do not know SOCK_SEQPACKET: the loop only tells when there is something to read.
"""

import array
import asyncio
import os
import socket
from collections.abc import Callable
from typing import Self, TypeVar

from vmd.wire.encoding import WireError
from vmd.wire.messages import CLIENT_TO_DAEMON, AnyAnswer, AnyRequest, Vms

Got = TypeVar("Got")

_MESSAGE_MAX = 256 << 10
_FDS_MAX = 64


class DaemonError(Exception):
    """The daemon is not there, is gone, or has sent an unexpected answer."""


class Connection:
    """A connection; a context manager that closes it, which cancels pending requests."""

    def __init__(self, path: str) -> None:
        """Connect to the socket at `path`.

        Raises:
            DaemonError: no daemon listens, or it does not let this user in.
        """
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._socket.setblocking(False)
        try:
            self._socket.connect(path)
        except OSError as err:
            self._socket.close()
            raise DaemonError(f"connect: {path}: {err.strerror or err}") from err

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self._socket.close()

    async def send(self, request: AnyRequest) -> None:
        """Send a request.

        Raises:
            DaemonError: the daemon is gone, or the request is too large.
        """
        try:
            await asyncio.get_running_loop().sock_sendall(
                self._socket, CLIENT_TO_DAEMON.encode(request)
            )
        except OSError as err:
            raise DaemonError(f"write error: {err.strerror or err}") from err

    async def receive(self) -> tuple[AnyAnswer, list[int]]:
        """Return the next answer or event, and its descriptors, which are the caller's.

        Raises:
            DaemonError: none comes.
        """
        try:
            data, ancillary, flags, _ = await when_ready(
                self._socket,
                lambda: self._socket.recvmsg(
                    _MESSAGE_MAX, socket.CMSG_SPACE(4 * _FDS_MAX), socket.MSG_CMSG_CLOEXEC
                ),
            )
        except OSError as err:
            raise DaemonError(f"read error: {err.strerror or err}") from err
        fds = array.array("i")
        for _, _, block in ancillary:
            fds.frombytes(block)
        try:
            return _decoded(data, flags), fds.tolist()
        except DaemonError:
            close_all(fds.tolist())
            raise

    async def ask(self, request: AnyRequest) -> AnyAnswer:
        """Send a request and wait for its answer; all parts of a list of VMs are one.

        Raises:
            DaemonError: there is no answer.
        """
        await self.send(request)
        answer = await self._answer()
        if isinstance(answer, Vms):
            vms = [*answer.vms]
            while isinstance(answer, Vms) and answer.has_more:
                answer = await self._answer()
                vms += answer.vms if isinstance(answer, Vms) else ()
            return Vms(vms=tuple(vms))
        return answer

    async def _answer(self) -> AnyAnswer:
        answer, fds = await self.receive()
        close_all(fds)
        return answer


def _decoded(data: bytes, flags: int) -> AnyAnswer:
    if not data:
        raise DaemonError("the daemon has closed the connection")
    if flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC):
        raise DaemonError("the daemon's answer is too long")
    try:
        return CLIENT_TO_DAEMON.decode(data)
    except WireError as err:
        raise DaemonError(str(err)) from err


def close_all(fds: list[int]) -> None:
    """Close descriptors that came along with an answer."""
    for fd in fds:
        os.close(fd)


async def when_ready(sock: socket.socket, read: Callable[[], Got]) -> Got:
    """Return what `read` does, once there is something to read from a socket."""
    loop = asyncio.get_running_loop()
    while True:
        try:
            return read()
        except (BlockingIOError, InterruptedError):
            ready = loop.create_future()
        loop.add_reader(sock, _set, ready)
        try:
            await ready
        finally:
            loop.remove_reader(sock)


def _set(ready: "asyncio.Future[None]") -> None:
    if not ready.done():
        ready.set_result(None)
