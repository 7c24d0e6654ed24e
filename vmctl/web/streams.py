"""Consoles and events, passed on by WebSockets; each has a bound on what waits for either side."""

import asyncio
import socket
from collections.abc import Coroutine

from starlette.websockets import WebSocket, WebSocketDisconnect, WebSocketState

from vmctl.web import operations
from vmctl.web.daemon import Connection, DaemonError, close_all, when_ready
from vmctl.web.operations import RequestError, from_query
from vmctl.web.waiting import first
from vmd.wire.messages import (
    CONSOLE_BREAK,
    CONSOLE_INPUT,
    DAEMON_TO_CLIENT,
    AnyAnswer,
    Console,
    ConsoleOpened,
    Event,
    Events,
    Failed,
)

BREAK = "break"
"""The text message that is a BREAK."""
REFUSED = 4000
"""Plus the status of HTTP: the code that a WebSocket closes with."""

_ENDED = 1000
_PATIENCE_S = 30.0
"""The daemon must answer, and a guest take typed bytes, within this time."""
_OUTPUT_MAX = 256 << 10
_INPUT_MAX = 4096
_REASON_MAX = 120
"""Bytes of why a WebSocket closes; the protocol has room for 123."""


class RefusedError(Exception):
    """There is no such stream."""

    def __init__(self, status: int, message: str) -> None:
        """Remember the `status` of HTTP that goes with it."""
        super().__init__(message)
        self.status = status


async def serve(websocket: WebSocket, work: Coroutine[None, None, None]) -> None:
    """Accept a WebSocket, do its `work`, and close it with the reason."""
    code, reason = _ENDED, ""
    try:
        await websocket.accept()
        try:
            await work
        except RequestError as err:
            code, reason = REFUSED + 400, str(err)
        except RefusedError as err:
            code, reason = REFUSED + err.status, str(err)
        except (DaemonError, TimeoutError) as err:
            code, reason = REFUSED + 503, str(err) or "nobody answers"
        if websocket.client_state is WebSocketState.CONNECTED:
            short = reason.encode(errors="replace")[:_REASON_MAX].decode(errors="ignore")
            await websocket.close(code, short)
    except WebSocketDisconnect:
        return
    finally:
        work.close()


async def events(websocket: WebSocket, path: str) -> None:
    """Send each event of the daemon at `path`."""
    with Connection(path) as daemon:
        answer = await asyncio.wait_for(daemon.ask(Events()), _PATIENCE_S)
        _check(answer)
        await first(_send_events(daemon, websocket), _ignore(websocket))


async def _send_events(daemon: Connection, websocket: WebSocket) -> None:
    while True:
        event, fds = await daemon.receive()
        close_all(fds)
        if isinstance(event, Event):
            await websocket.send_text(DAEMON_TO_CLIENT.encode(event).decode())


async def _ignore(websocket: WebSocket) -> None:
    """Read unexpected messages of a client, until it leaves."""
    while (await websocket.receive())["type"] != "websocket.disconnect":
        pass


async def console(websocket: WebSocket, path: str) -> None:
    """Pass on a console's output, and typed bytes, until the VM ends or the client leaves."""
    request = from_query(Console, websocket.query_params.multi_items())
    with Connection(path) as daemon:
        await daemon.send(request)
        answer, fds = await asyncio.wait_for(daemon.receive(), _PATIENCE_S)
    if not isinstance(answer, ConsoleOpened) or len(fds) != 1:
        close_all(fds)
        _check(answer)
        raise DaemonError("unexpected response received from vmd")
    with socket.socket(fileno=fds[0]) as stream:
        stream.setblocking(False)
        await websocket.send_text(DAEMON_TO_CLIENT.encode(answer).decode())
        await first(_show(stream, websocket), _type(stream, websocket))


async def _show(stream: socket.socket, websocket: WebSocket) -> None:
    try:
        while data := await when_ready(stream, lambda: stream.recv(_OUTPUT_MAX)):
            await websocket.send_bytes(data)
    except ConnectionError:  # the VM's process was killed
        return


async def _type(stream: socket.socket, websocket: WebSocket) -> None:
    while (message := await websocket.receive())["type"] != "websocket.disconnect":
        data, text = message.get("bytes") or b"", message.get("text")
        if text == BREAK:
            packets = [CONSOLE_BREAK]
        elif text:
            raise RefusedError(400, f"the only text is {BREAK}: input is binary")
        else:
            pieces = range(0, len(data), _INPUT_MAX)
            packets = [CONSOLE_INPUT + data[at : at + _INPUT_MAX] for at in pieces]
        for packet in packets:
            sent = asyncio.get_running_loop().sock_sendall(stream, packet)
            try:
                await asyncio.wait_for(sent, _PATIENCE_S)
            except ConnectionError:  # its end is found when it is read
                return


def _check(answer: AnyAnswer) -> None:
    if isinstance(answer, Failed):
        raise RefusedError(operations.status_of(answer), answer.message or answer.code)
